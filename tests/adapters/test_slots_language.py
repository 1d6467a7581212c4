"""Slots in language models: on a 4-bit base, in shards, past their capacity, through checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from language import LLAMA, LORA, TokenRows, built
from lightning_cl import AdapterSlots, ContinualCallback, FSDP2Strategy, LwF, Task, TaskStreamDataModule
from lightning_cl.adapters import adapters_disabled
from lightning_cl.datamodules import Predefined
from lightning_cl.modules import CausalLM
from ranks import Ranks
from toys import trainer

pytest.importorskip("bitsandbytes")
WIDE = {**LLAMA, "hidden_size": 64}
NF4 = {"mode": "nf4"}
TOKENS = TokenRows(2, rows=3).batch()
SETTINGS: dict[str, Any] = {"adapter": LORA, "learning_rate": 1e-3, "warmup": 1, "schedule": "constant"}


def token_stream(batch_size: int = 4) -> TaskStreamDataModule:
    """Three domains of three steps each."""
    domains = [TokenRows(step) for step in (1, 3, 5)]
    return TaskStreamDataModule(domains, scenario=Predefined(["ones", "threes", "fives"]), batch_size=batch_size)


class Boundaries(ContinualCallback):
    """Notes what the module says before and after every task's end, and the gradients and flags in between."""

    def __init__(self) -> None:
        self.said: list[Tensor] = []
        self.frozen_gradients: list[Tensor] = []
        self.needs_state = False  # type: ignore[misc]

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.said.append(said(trainer, pl_module))

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.frozen_gradients += [
            p.grad for n, p in pl_module.named_parameters() if ".past." in n and p.grad is not None
        ]


class Begun(Callback):
    """Notes the slots before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.slots = adapters(pl_module)


def said(trainer: Trainer, module: Any) -> Tensor:
    """Return logits as in training."""
    with torch.no_grad():
        if isinstance(trainer.strategy, FSDP2Strategy):
            return trainer.strategy.run_in_forward(lambda: module(**TOKENS).float())
        return module(**TOKENS).float()


def adapters(module: LightningModule) -> dict[str, Tensor]:
    """Return both slots of all layers, gathered."""
    found = {name: p.detach() for name, p in module.named_parameters() if "lora_" in name}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in found.items()}


def fit(
    root: Path,
    strategy: str,
    ranks: int,
    quantized: bool,
    capacity: int = 16,
    saved: str | None = None,
    ckpt_path: Path | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Learn three domains, four rows a step over all ranks; return the slots and what was said around the ends."""
    module = CausalLM(dict(WIDE), quantization=NF4 if quantized else None, **SETTINGS)
    before, after = Boundaries(), Boundaries()
    callbacks: list[Any] = [before, AdapterSlots(capacity), after]
    if saved:
        folder = root / saved
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    run = trainer(root, callbacks, devices=ranks, strategy=strategy)
    run.fit(module, datamodule=token_stream(4 // ranks), ckpt_path=ckpt_path)
    assert not before.frozen_gradients
    return adapters(module), [*before.said, *after.said]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "quantized", "capacity"),
    [("ddp", False, 16), ("ddp", True, 6), ("fsdp2", False, 6), ("fsdp2", True, 16), ("fsdp2", True, 6)],
    ids=["ddp", "ddp 4 bits compressed", "fsdp2 compressed", "fsdp2 4 bits", "fsdp2 4 bits compressed"],
)
def test_two_ranks_end_where_one_process_ends(
    strategy: str, quantized: bool, capacity: int, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Over two boundaries, with and without compression: equal bits on both ranks, and what one process has."""
    one, said_by_one = fit(tmp_path / "one", "auto", 1, quantized, capacity)
    first, second = two_ranks.run(fit, tmp_path / "two", strategy, 2, quantized, capacity)
    assert all(torch.equal(first[0][name], second[0][name]) for name in one)
    layers = [name.removesuffix(".lora_A.past.weight") for name in one if name.endswith("lora_A.past.weight")]
    assert len(layers) == 4
    for layer in layers:
        # factors of a compression are not unique, their product is
        products = [
            found[f"{layer}.lora_B.past.weight"] @ found[f"{layer}.lora_A.past.weight"] for found in (one, first[0])
        ]
        torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-5)
        assert products[0].abs().max() > 1e-3
    for found, wanted in zip(first[1], said_by_one, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4 bits"])
def test_an_end_of_a_task_changes_no_output(quantized: bool, tmp_path: Path) -> None:
    """The present slot goes into the past one; what the module says moves by rounding only."""
    slots, states = fit(tmp_path, "auto", 1, quantized)
    for before, after in zip(states[:3], states[3:], strict=True):
        assert (before - after).abs().max() <= 1e-6
    # and the tasks have left something, each in its rows
    past = next(value for name, value in slots.items() if name.endswith("lora_B.past.weight"))
    assert all(past[:, 4 * task : 4 * task + 4].abs().max() > 1e-4 for task in range(3))
    assert past[:, 12:].abs().max() == 0


@pytest.mark.distributed
@pytest.mark.parametrize("step", [2, 6, 8], ids=["first task", "boundary", "third task"])
def test_sharded_runs_resume_to_the_same_bits(step: int, two_ranks: Ranks, tmp_path: Path) -> None:
    """On a 4-bit base, from a folder of shards that was written at a boundary, or in the middle of the third task."""
    straight = two_ranks.run(fit, tmp_path, "fsdp2", 2, True, 6, "straight")
    path = tmp_path / "straight" / f"step={step}.ckpt"
    resumed = two_ranks.run(fit, tmp_path, "fsdp2", 2, True, 6, "resumed", path)
    for rank in range(2):
        assert all(torch.equal(resumed[rank][0][name], value) for name, value in straight[rank][0].items())


def test_resumes_in_the_third_task(tmp_path: Path) -> None:
    """In one process, past the capacity: the same bits."""
    straight, _ = fit(tmp_path, "auto", 1, True, 6, "straight")
    resumed, _ = fit(tmp_path, "auto", 1, True, 6, "resumed", tmp_path / "straight" / "step=8.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_skeletons_start_as_whole_networks(tmp_path: Path) -> None:
    """A slot that stood on the meta device is empty, as one that did not."""
    whole = built(CausalLM(dict(WIDE), **SETTINGS))
    begun = Begun()
    fit_one = trainer(tmp_path, [AdapterSlots(16), begun], strategy="fsdp2")
    fit_one.fit(CausalLM(dict(WIDE), **SETTINGS), datamodule=token_stream())
    torch.distributed.destroy_process_group()
    found = begun.slots
    assert all(not value.any() for name, value in found.items() if ".past." in name)
    assert all(torch.equal(found[n], p) for n, p in adapters(whole).items())


def test_the_base_teaches_without_a_copy(tmp_path: Path) -> None:
    """LwF against the module without its adapters: nothing is kept, no flag moves, and students stay nearer to it."""
    distances = []
    for strength in (1e-6, 300.0):
        module = CausalLM(dict(WIDE), **SETTINGS | {"learning_rate": 1e-2})
        lwf = LwF(strength, teacher="base")
        run = trainer(tmp_path, [lwf, AdapterSlots(16)])
        run.fit(module, datamodule=token_stream())
        assert lwf.teaching.num_bytes(module) == 0
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        assert all(flag == (".default." in name) for name, flag in flags.items())
        with torch.no_grad(), adapters_disabled(module):
            base = module(**TOKENS)
        with torch.no_grad():
            distances.append((module(**TOKENS) - base).abs().mean())
    assert distances[1] < 0.6 * distances[0]
