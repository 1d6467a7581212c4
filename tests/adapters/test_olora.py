"""O-LoRA: a penalty on the factor A of a task against those of the tasks before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_cl import AdapterSlots, FSDP2Strategy, OLoRA
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.functional import orthogonality_penalty
from lightning_cl.functional.olora import OrthogonalityForm
from ranks import Ranks
from toys import LoraToy, fit_stream, toy_loaders, toy_stream, trainer, weights

FORMS = get_args(OrthogonalityForm)
LAYERS = ("model.base_model.model.0", "model.base_model.model.3")


class ByHand(Callback):
    """The gradient by autograd, in Lightning's own hook, beside slots that are as they are."""

    def __init__(self, strength: float, form: str) -> None:
        self.strength = strength
        self.form = form

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        slots: AdapterSlots = next(c for c in trainer.callbacks if isinstance(c, AdapterSlots))
        for name, slot in slots.slots.items():
            new, used = slot.down(slot.current).weight, slots.segments[name][-1]
            past = slot.down(slot.past).weight[:used].detach()
            if not used or not any(p is new for group in optimizer.param_groups for p in group["params"]):
                continue
            with torch.enable_grad():
                rows = new.detach().clone().requires_grad_()
                products = rows @ past.T
                if self.form == "squared":
                    value = products.square().sum()
                elif self.form == "absolute":
                    value = products.abs().sum()
                else:
                    lengths = rows.norm(dim=1)[:, None] * past.norm(dim=1)
                    value = (products / lengths).square().mean() / len(slots.slots)
                (gradient,) = torch.autograd.grad(self.strength * value, rows)
            new.grad += gradient


def learned(tmp_path: Path, *callbacks: Callback, kind: Callable[[], LoraToy] = LoraToy, **settings: Any) -> Tensor:
    """The weights after two fits of a task each."""
    module = kind()
    for loader in toy_loaders(settings.pop("batch_size", 8)):
        trainer(tmp_path, callbacks, max_epochs=2, **settings).fit(module, loader, loader)
    return weights(module).float()


class Manual(LoraToy):
    """Steps its two optimizers itself: one for the factors B, and after it one for A."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = ([p for name, p in named if part in name] for part in ("lora_B", "lora_A"))
        return [torch.optim.SGD(group, lr=0.1, momentum=0.9) for group in groups]


class Mapped(LoraToy):
    """Its batches are mappings, and so is what its step returns."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step((batch[0], batch[1]), batch_idx)}


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.5},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "fused": {"kind": partial(LoraToy, learning_rate=0.05, optimizer=partial(torch.optim.AdamW, fused=True))},
    "manual": {"kind": Manual},
    "mapped": {"kind": Mapped},
}


@pytest.mark.parametrize("name", RUNS)
def test_is_the_gradient_of_the_penalty(name: str, tmp_path: Path) -> None:
    """Once per optimizer step, before clipping."""
    ours = learned(tmp_path, OLoRA(0.2), **RUNS[name])
    by_hand = learned(tmp_path, AdapterSlots(), ByHand(0.2, "squared"), **RUNS[name])
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-5)
    assert (ours - learned(tmp_path, AdapterSlots(), **RUNS[name])).abs().max() > 1e-2


@pytest.mark.parametrize(("form", "strength"), [("absolute", 0.05), ("cosine", 2.0)])
def test_other_forms(form: OrthogonalityForm, strength: float, tmp_path: Path) -> None:
    """As they are defined: a sum, and a mean over pairs and layers."""
    ours = learned(tmp_path, OLoRA(strength, form=form))
    by_hand = learned(tmp_path, AdapterSlots(), ByHand(strength, form))
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-5)


def test_accumulation_does_not_change_it(tmp_path: Path) -> None:
    """Two halves of a batch are as the whole."""
    halves = learned(tmp_path, OLoRA(0.2), batch_size=4, accumulate_grad_batches=2)
    torch.testing.assert_close(halves, learned(tmp_path, OLoRA(0.2)), rtol=1e-4, atol=1e-4)


def test_the_first_task_is_plain_lora(tmp_path: Path) -> None:
    """To the bit."""
    data = toy_loaders()[0]

    def run(method: AdapterSlots) -> Tensor:
        module = LoraToy()
        trainer(tmp_path, [method], max_epochs=2).fit(module, data, data)
        return weights(module)

    assert torch.equal(run(OLoRA(100.0)), run(AdapterSlots()))


class Overlap(Callback):
    """Notes the penalty, and its definition on what lies in the slots, at every batch of the second task."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        method: OLoRA = next(c for c in trainer.callbacks if isinstance(c, OLoRA))
        if trainer.current_epoch < trainer.datamodule.epochs_per_task:
            assert method.penalty() == 0
            return
        pairs = [(slot.factors(slot.current)[0], slot.factors(slot.past)[0]) for slot in method.slots.values()]
        value = sum(orthogonality_penalty(new, past[: method.capacity]) for new, past in pairs)
        self.values.append((float(method.penalty()), method.strength * float(value)))


@pytest.mark.parametrize("capacity", [8, 1])
def test_directions_become_orthogonal(capacity: int, tmp_path: Path) -> None:
    """The overlap shrinks; after an approximation all of the past slot counts."""
    overlaps = {}
    for strength in (1e-6, 1.0):
        overlap = Overlap()
        fit_stream(tmp_path, [OLoRA(strength, capacity=capacity), overlap], module=LoraToy())
        assert all(found == pytest.approx(expected, rel=1e-5) for found, expected in overlap.values)
        overlaps[strength] = overlap.values[-1][1] / strength
    assert overlaps[1.0] < 0.3 * overlaps[1e-6]


def test_a_factor_that_the_loss_does_not_reach_is_moved(tmp_path: Path) -> None:
    """As by a penalty in the loss; one that is frozen is not."""

    class Short(LoraToy):
        """In the second task only its last layer is used."""

        task = 0
        frozen = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            if self.task == 0:
                return super().training_step(batch, batch_idx)
            self.model.get_submodule(f"{LAYERS[0].partition('.')[2]}.lora_A.default").requires_grad_(not self.frozen)
            return cross_entropy(self.get_submodule(LAYERS[1])(torch.ones(len(batch[0]), 8)), batch[1])

    class Start(Callback):
        """Notes the first layer's factor at the start and the end of a fit."""

        def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
            self.factor = pl_module.get_submodule(LAYERS[0]).lora_A["default"].weight
            self.before = self.factor.detach().clone()

        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            self.after = self.factor.detach().clone()

    def moved(*, frozen: bool) -> bool:
        module, method, start = Short(), OLoRA(0.3), Start()
        for module.task, loader in enumerate(toy_loaders()):
            module.frozen = frozen
            trainer(tmp_path, [method, start], max_epochs=1).fit(module, loader, loader)
        return not torch.equal(start.before, start.after)

    assert moved(frozen=False)
    assert not moved(frozen=True)


class Noting(LoraToy):
    """Notes the losses of its micro-batches, by the steps before them."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[int, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses[self.trainer.global_step] = float(loss.detach())
        return loss


class Logged(Logger):
    """Keeps what is logged of the method."""

    name, version = "logged", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float, float]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is not None and "olora/penalty" in metrics:
            self.rows.append((step, metrics["olora/penalty"], metrics["olora/ratio"]))


def test_logs_the_penalty_and_its_ratio_to_the_loss(tmp_path: Path) -> None:
    """In the second task, as often as the Trainer logs; once for the micro-batches of a step."""
    module, overlap, logger = Noting(), Overlap(), Logged()
    settings: dict[str, Any] = {"logger": logger, "log_every_n_steps": 2, "accumulate_grad_batches": 2}
    fit_stream(tmp_path, [OLoRA(0.3), overlap], module=module, stream=toy_stream(batch_size=4), **settings)
    # two micro-batches in each of the six steps of the second task
    after = {7 + row: overlap.values[2 * row + 1][0] for row in range(6)}
    assert [row[0] for row in logger.rows] == [7, 9, 11]
    for step, penalty, ratio in logger.rows:
        assert penalty == pytest.approx(after[step], rel=1e-5)
        assert ratio == pytest.approx(penalty / module.losses[step - 1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"strength": 0.0}, "`strength`"), ({"form": "l1"}, "`form`"), ({"capacity": 0}, "`capacity`")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """When it is built."""
    with pytest.raises(ValueError, match=message):
        OLoRA(**settings)


# ---------------------------------------------------------------------- two ranks


class ByColumns(LoraToy):
    """Sharded within the rows of its factors."""

    def configure_model(self) -> None:
        network = self.model.base_model.model
        if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
            fully_shard(network, mesh=self.device_mesh["data_parallel"], shard_placement_fn=lambda p: Shard(p.ndim - 1))


def fit_by_columns(root: Path) -> str:
    """Return the refusal."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    fit = trainer(root, [OLoRA()], strategy=strategy, devices=2)
    with pytest.raises(ValueError, match="sharded on dimension 0") as error:
        fit.fit(ByColumns(), datamodule=toy_stream(batch_size=4))
    return str(error.value)


def copies_of(root: Path) -> tuple[int, float, float]:
    """Return what the method says it keeps on a rank, and the penalty of ranks and of whole factors."""
    overlap, method = Overlap(), OLoRA(0.2, capacity=8)
    strategy = FSDP2Strategy(wrap=["Linear"])
    fit = trainer(root, [method, overlap, Footprints()], strategy=strategy, devices=2)
    fit.fit(LoraToy(), datamodule=toy_stream(batch_size=4))
    return fit.callbacks[2].device, *overlap.values[-1]


class Footprints(Callback):
    """Asks for the footprint while the module is sharded."""

    device = 0

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        method: OLoRA = next(c for c in trainer.callbacks if isinstance(c, OLoRA))
        self.device = method.footprint(trainer, pl_module, None).device


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    """Factors split within rows are refused; the value is that of all rows; each rank keeps a copy of old rows."""
    ranks = Ranks(2)
    assert all(LAYERS[0] in text for text in ranks.run(fit_by_columns, tmp_path))
    for device, found, expected in ranks.run(copies_of, tmp_path):
        assert device == 4 * 8 * (6 + 8)
        assert found == pytest.approx(expected, rel=1e-5)
    ranks.close()


def test_zeros_of_an_approximation_do_not_weaken_the_cosines(tmp_path: Path) -> None:
    """The mean is over rows that hold something: B of the second task never trained."""

    class Idle(LoraToy):
        """Learns in the first task only."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float(self.current_task.index == 0)

    method, found = OLoRA(1.0, form="cosine", capacity=3), {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            found.update({name: pair.past for name, pair in method._pairs.items()})

    stream = toy_stream(scenario=ClassIncremental(n_tasks=3), epochs_per_task=1)
    fit_stream(tmp_path, [method, Look()], module=Idle(), stream=stream)
    assert method.segments[LAYERS[0]] == [0, 3]
    assert {len(rows) for rows in found.values()} == {2}
    assert all(rows.any(1).all() for rows in found.values())
