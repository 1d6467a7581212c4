"""Whose rows a task trains, over several fits, beside teachers and memories, and which it gets in evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import TASKS, WIDTH, PromptToy, TwoTasks, prompt_stream, trained
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_cl import (
    L2P,
    CODAPrompt,
    DualPrompt,
    ExperienceReplay,
    LwF,
    ProgressivePrompts,
    SPrompts,
    Task,
)
from lightning_cl.adapters.prompted import prompts_in
from toys import trainer

METHODS: dict[str, Any] = {
    "dual-prompt": lambda: DualPrompt([0], [1, 2], general_length=2, expert_length=3, num_tasks=4),
    "coda-prompt": lambda: CODAPrompt(3, length=2, layers=[0, 2], num_tasks=4),
    "s-prompts": lambda: SPrompts(3, k=2, num_tasks=4),
    "progressive": lambda: ProgressivePrompts(3, num_tasks=4),
}
EVERY = {**METHODS, "l2p": lambda: L2P(4, length=2, top_k=2, diversify=True)}
by_index = pytest.mark.parametrize("name", ["dual-prompt", "coda-prompt", "s-prompts"])


def fit(root: Path, *callbacks: Any, module: Any = None, stream: Any = None, **settings: Any) -> Any:
    """Fit two tasks and return the module."""
    module = module or PromptToy()
    tells = any(isinstance(callback, ProgressivePrompts) for callback in callbacks)
    trainer(root, callbacks, **settings).fit(module, datamodule=stream or prompt_stream(tells_task=tells))
    return module


def rows(module: Any) -> dict[str, list[Tensor]]:
    """Return what each of the four tasks has of its own."""
    prompts = prompts_in(module)
    kept = {name: getattr(prompts, name).detach().clone().chunk(4) for name in prompts.by_task}
    if isinstance(prompts, type(SPrompts(num_tasks=4).attach(PromptToy()))):
        kept["prototypes"] = prompts.prototypes.clone().chunk(4)
    return {name: list(parts) for name, parts in kept.items()}


# ---------------------------------------------------------------------- several fits


@by_index
def test_a_second_stream_goes_on_with_the_next_rows(name: str, tmp_path: Path) -> None:
    """Its tasks are numbered from 0 again, and the rows of the first stream stay to the bit."""
    method = METHODS[name]()
    module = fit(tmp_path, method)
    first = rows(module)
    fit(tmp_path, method, module=module)
    for part, second in rows(module).items():
        moved = [not torch.equal(new, old) for new, old in zip(second, first[part], strict=True)]
        assert moved == [False, False, True, True]
    assert int(prompts_in(module).learned) == 4
    with pytest.raises(ValueError, match=r"Task 5 has no prompts: there is room for 4"):
        fit(tmp_path, method, module=module)


@by_index
def test_a_callback_that_knows_other_tasks_is_refused(name: str, tmp_path: Path) -> None:
    """A fresh one on learned prompts, and an old one on a fresh network; nothing is written before."""
    method = METHODS[name]()
    module = fit(tmp_path, method)
    before = rows(module)
    with pytest.raises(ValueError, match=r"prompts of 2 tasks, and this `\w+` knows of 0.*`ckpt_path`"):
        fit(tmp_path, METHODS[name](), module=module)
    assert all(torch.equal(*pair) for part, old in rows(module).items() for pair in zip(old, before[part], strict=True))
    with pytest.raises(ValueError, match=r"prompts of 0 tasks, and this `\w+` knows of 2"):
        fit(tmp_path, method)


def test_a_fresh_pool_callback_goes_on(tmp_path: Path) -> None:
    """L2P has no rows that a task could lose."""
    module = fit(tmp_path, L2P(4, length=2, top_k=2))
    before = trained(module)
    fit(tmp_path, L2P(4, length=2, top_k=2), module=module)
    assert not torch.equal(trained(module), before)


class Fails(PromptToy):
    """Breaks in its third step, the first time."""

    broken = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 2 and not self.broken:
            self.broken = True
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


def test_a_task_that_did_not_end_keeps_its_rows(tmp_path: Path) -> None:
    """The next fit of the same callback trains them on."""
    method, module = METHODS["dual-prompt"](), Fails()
    start = rows(copy_with_prompts(method))
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, method, module=module)
    fit(tmp_path, method, module=module)
    moved = [not torch.equal(new, old) for new, old in zip(rows(module)["expert"], start["expert"], strict=True)]
    assert moved == [True, True, False, False]


def copy_with_prompts(method: Any) -> Any:
    """Return a fresh module with the prompts that a method starts from."""
    module = PromptToy()
    method.attach(module, 4)
    return module


def test_progressive_prompts_refuse_a_second_stream(tmp_path: Path) -> None:
    """The index of a task, by which evaluation finds its prompts, would mean two tasks."""
    method = METHODS["progressive"]()
    module = fit(tmp_path, method)
    with pytest.raises(ValueError, match=r"task 1 here comes after 2 learned tasks.*one stream"):
        fit(tmp_path, method, module=module)


# ---------------------------------------------------------------------- teachers and memories


@pytest.mark.parametrize("name", EVERY)
def test_the_place_beside_a_teacher_changes_nothing(name: str, tmp_path: Path) -> None:
    """A teacher's forward is evaluation wherever it stands: it trains no key and its choices do not count."""
    found, states = [], []
    for turned in (False, True):
        method = EVERY[name]()
        callbacks = [method, LwF(10.0, logits="model")]
        found.append(trained(fit(tmp_path, *(callbacks[::-1] if turned else callbacks))))
        states.append(method.state_dict())
    assert torch.equal(*found)
    if name == "l2p":
        # 16 rows, two epochs, two prompts each, two tasks
        assert [int(state["earlier"].sum()) for state in states] == [16 * 2 * 2 * 2] * 2


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_network_in_evaluation_mode_trains(tmp_path: Path) -> None:
    """As `from_pretrained` returns it; one that a step puts there does not, and is refused."""
    method = METHODS["s-prompts"]()
    module = copy_with_prompts(method).eval()
    start = rows(module)["tokens"]
    fit(tmp_path, method, module=module)
    assert not torch.equal(rows(module)["tokens"][1], start[1])

    class Resting(PromptToy):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.model.bert.eval()
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"`Resting.training_step` puts the network in evaluation mode"):
        fit(tmp_path, METHODS["s-prompts"](), module=Resting())


@pytest.mark.parametrize("name", METHODS)
def test_memories_of_several_tasks_are_refused(name: str, tmp_path: Path) -> None:
    """Their samples would train the present task's prompts; a pool that tasks share takes them."""
    with pytest.raises(ValueError, match=r"`ExperienceReplay` trains .* prompts for each task.*use `L2P`"):
        fit(tmp_path, METHODS[name](), ExperienceReplay(8))
    fit(tmp_path, L2P(4, length=2, top_k=2), ExperienceReplay(8))


# ---------------------------------------------------------------------- evaluation


class Predicts(PromptToy):
    """Returns its scores."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.model(**batch).logits


def test_progressive_prompts_do_not_guess_in_predict(tmp_path: Path) -> None:
    """After a fit no task is left over; one that the user sets counts, and testing on the stream tells it."""
    module = fit(tmp_path, METHODS["progressive"](), module=Predicts())
    job = trainer(tmp_path, [METHODS["progressive"]()])
    loader = DataLoader(Subset(TwoTasks(), TASKS[0].tolist()), batch_size=16)
    with pytest.raises(ValueError, match=r"needs to know the task.*`predict` does not.*`current_task`"):
        job.predict(module, datamodule=prompt_stream(tells_task=True))
    found = []
    for index in (0, 1):
        module.current_task = Task(index, "mine")
        found.append(trainer(tmp_path, [METHODS["progressive"]()]).predict(module, loader)[0])
        assert module.current_task == Task(index, "mine")
        module.eval()
        with torch.no_grad():
            torch.testing.assert_close(found[-1], module.model(**next(iter(loader))).logits)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_prototypes_stay_exact_in_half_precision(tmp_path: Path) -> None:
    """No cast of the module rounds them, and a checkpoint brings them back: routing stays that of float32."""
    module = PromptToy()
    prompts: Any = SPrompts(3, k=2, num_tasks=2).attach(module)
    centres = 50 + 0.05 * torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    prompts.prototypes.copy_(centres)
    prompts.learned.fill_(2)
    module.to(torch.bfloat16)
    assert torch.equal(prompts.prototypes, centres)
    found = prompts.choose(centres[:, 0], 2).tokens
    assert torch.equal(found, prompts.tokens)
    again = PromptToy()
    SPrompts(3, k=2, num_tasks=2).attach(again)
    again.load_state_dict(module.state_dict())
    assert torch.equal(prompts_in(again).prototypes, centres)
    assert torch.equal(prompts_in(copy.deepcopy(module)).prototypes, centres)
    trainer(tmp_path, [method := SPrompts(3, k=8)], precision="bf16-true").fit(
        half := PromptToy(), datamodule=prompt_stream()
    )
    kept = prompts_in(half).prototypes
    assert kept.dtype == torch.float32
    assert not torch.equal(kept, kept.bfloat16().float())
    assert method.state_dict()["finished"] == 2


def test_a_shared_pool_looks_for_its_rows_once(tmp_path: Path) -> None:
    """Not in every step, though it finds none."""

    class Counts(PromptToy):
        looked = 0

        def named_modules(self, *args: Any, **settings: Any) -> Any:
            self.looked += self.inside
            return super().named_modules(*args, **settings)

        inside = False

    class Watched(L2P):
        def _held(self, pl_module: Any, step: Any) -> dict[str, Tensor]:
            pl_module.inside = True
            try:
                return super()._held(pl_module, step)
            finally:
                pl_module.inside = False

    module = fit(tmp_path, Watched(4, length=2, top_k=2), module=Counts())
    # once for the prompts and once for their name in each task of four steps
    assert module.looked == 2 * 2
