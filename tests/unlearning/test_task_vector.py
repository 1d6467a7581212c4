"""Negation of task vectors against a plain loop, of weights and of LoRA adapters, as a function and as a callback."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import (
    AdaLoraConfig,
    HRAConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl import FSDP2Strategy, TaskStreamDataModule
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.datamodules.samplers import RequestSampler, TaskSampler
from lightning_cl.unlearning import TaskVectorNegation, negate_task_vector_
from ranks import Ranks
from toys import LoraToy, ToyModule, fit_stream, toy_data, toy_stream, trainer, weights

ALPHA = 0.3
FIRST, SECOND = ([i for i in range(48) if i % 4 in pair] for pair in ((0, 1), (2, 3)))
REQUESTED = [0, 1, 4, 5, 8, 9, 12, 13]
RETAINED = np.setdiff1d(FIRST, REQUESTED)


# ---------------------------------------------------------------------- the function


def test_function_negates_what_trains() -> None:
    """Theta - alpha (tuned - theta); what is frozen and buffers stay."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[0].bias.requires_grad_(False)
    before, tuned = copy.deepcopy(module.state_dict()), {n: v + 1 for n, v in module.state_dict().items()}
    negate_task_vector_(module, tuned, alpha=0.5)
    for name, value in module.state_dict().items():
        moves = name in ("0.weight", "1.weight", "1.bias")
        torch.testing.assert_close(value, before[name] - 0.5 if moves else before[name])


class Adapted(nn.Module):
    """Every kind of layer that LoRA has factors for."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(3, 2, 2), nn.Linear(3, 4))
        self.network = get_peft_model(network, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1", "2"]))

    def merged(self) -> dict[str, Tensor]:
        """The weights that it computes with."""
        merged = copy.deepcopy(self.network).merge_and_unload()
        return {name: p.detach().double() for name, p in merged.named_parameters()}


@pytest.mark.parametrize(
    ("moved", "fresh"), [("lora", True), ("lora_A", False), ("lora_B", False), ("lora_embedding_A", False)]
)
def test_function_negates_the_product_of_lora_factors(moved: str, fresh: bool) -> None:
    """As if the merged weights had been negated, wherever an adapter of its rank can be that."""
    torch.manual_seed(0)
    module = Adapted()
    if not fresh:
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * p.requires_grad)
    tuned = copy.deepcopy(module)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p.add_(torch.randn_like(p) * (p.requires_grad and moved in name))
    before, after = module.merged(), tuned.merged()
    assert any((after[name] - before[name]).abs().max() > 0.1 for name in before)
    negate_task_vector_(module, tuned.state_dict(), ALPHA)
    for name, value in module.merged().items():
        expected = before[name] - ALPHA * (after[name] - before[name])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert all(p.isfinite().all() for p in module.parameters())


def test_function_refuses() -> None:
    """What is not there, and adapters without a linear factor."""
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`tuned` lacks \['bias'\], which train in Linear"):
        negate_task_vector_(module, {"weight": module.weight})
    with pytest.raises(ValueError, match="`alpha` must be above 0, got 0"):
        negate_task_vector_(module, module.state_dict(), alpha=0)
    dora = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*belongs to an adapter whose change"):
        negate_task_vector_(dora, dora.state_dict())


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(init_r=2, target_r=1, total_step=3, target_modules=["0"]),
        VeraConfig(r=2, target_modules=["0"]),
        RandLoraConfig(r=2, target_modules=["0"]),
        OFTConfig(oft_block_size=2, target_modules=["0"]),
        HRAConfig(r=2, target_modules=["0"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_that_are_no_product_of_two_factors_are_refused(config: PeftConfig) -> None:
    """Their parameters negated one by one are not the negation of what they add."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match="belongs to an adapter whose change"):
        negate_task_vector_(model, model.state_dict())


def test_tuned_weights_are_not_rounded_to_those_of_the_module() -> None:
    """A float32 copy that was fine-tuned moves a bfloat16 module by less than its own steps times alpha."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(module.weight)
    negate_task_vector_(module, {"weight": torch.tensor([[1.001]])}, alpha=100.0)
    assert module.weight.item() == torch.tensor(0.9).bfloat16().item()


# ---------------------------------------------------------------------- the callback


def stream(batch_size: int = 8) -> TaskStreamDataModule:
    """Learn two classes, forget samples of both, learn two more."""
    return toy_stream(
        batch_size=batch_size, requests=[ForgetRequest("some", rows=REQUESTED, after=1)], epochs_per_request=3
    )


def method(root: Path, alpha: float = ALPHA) -> TaskVectorNegation:
    """With a ledger of its own."""
    return TaskVectorNegation(alpha, measure_samples=4, ledger_file=str(root / "requests.jsonl"))


def plain_loop(
    toy: type[ToyModule] = ToyModule, batch_size: int = 8, world_size: int = 1, alpha: float = ALPHA
) -> Tensor:
    """Learn, fine-tune on the request and go the opposite way, learn."""
    inputs, labels = toy_data().tensors
    module = toy()
    fixed: dict[str, Any] = {"batch_size": batch_size, "seed": 0, "world_size": world_size}
    for task, rows in enumerate([FIRST, REQUESTED, SECOND]):
        # what the optimizer remembers is dropped before and after a request
        optimizer = module.configure_optimizers()
        before = copy.deepcopy(module)
        if task == 1 and toy is LoraToy:
            for name, p in module.named_parameters():
                p.requires_grad_("lora_B" in name)
        retained = {"retained": RETAINED} if task == 1 else {}
        kind = RequestSampler if task == 1 else TaskSampler
        samplers = [kind(np.array(rows), task=task, rank=r, **retained, **fixed) for r in range(world_size)]
        for epoch in range(3 if task == 1 else 2):
            for sampler in samplers:
                sampler.set_position(epoch=epoch)
            for parts in zip(*samplers, strict=True):
                read = [part.forget.rows if task == 1 else part.rows for part in parts]
                loss = sum(cross_entropy(module(inputs[r]), labels[r]) for r in read) / len(read)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if task == 1:
            with torch.no_grad():
                for (name, p), start in zip(module.named_parameters(), before.parameters(), strict=True):
                    if p.requires_grad:
                        p.copy_(start - alpha * (p - start))
                    p.requires_grad_(toy is ToyModule or "lora" in name)
    return weights(module)


@pytest.mark.parametrize("toy", [ToyModule, LoraToy])
def test_stream_ends_where_a_plain_loop_ends(toy: type[ToyModule], tmp_path: Path) -> None:
    """With weights, and with adapters of which the factor A is held."""
    callback = method(tmp_path)
    found = fit_stream(tmp_path, [callback], module=toy(), stream=stream())
    torch.testing.assert_close(found, plain_loop(toy), rtol=1e-6, atol=1e-6)
    assert (found - plain_loop(toy, alpha=1e-9)).abs().max() > 1e-2
    assert callback.ledger.records[0].steps == 3
    assert callback.ledger.records[0].settings["alpha"] == ALPHA


class Watched(LoraToy):
    """Keeps the weights that it computes with before and after fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_task.kind == "forget" and not self.seen:
            self.seen.append(weights(self))
        return super().training_step(batch, batch_idx)


class Looking(TaskVectorNegation):
    """Looks at the weights when fine-tuning has ended, and when it has been negated."""

    def serve_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
        pl_module.seen.append(weights(pl_module))
        super().serve_end(trainer, pl_module, task)
        pl_module.seen.append(weights(pl_module))


def test_merged_weights_of_adapters_are_negated(tmp_path: Path) -> None:
    """An adapter that has learned before, so that neither factor is 0."""
    module = Watched()
    callback = Looking(ALPHA, measure_samples=4, ledger_file=str(tmp_path / "requests.jsonl"))
    fit_stream(tmp_path, [callback], module=module, stream=stream())
    start, tuned, negated = module.seen
    assert (tuned - start).abs().max() > 1e-2
    torch.testing.assert_close(negated, start - ALPHA * (tuned - start), rtol=0, atol=1e-6)


@pytest.mark.parametrize("toy", [ToyModule, LoraToy])
def test_resume_inside_the_request_is_exact(toy: type[ToyModule], tmp_path: Path) -> None:
    """With the weights that it began with, under dropout."""

    def run(name: str, ckpt_path: Path | None = None) -> Tensor:
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [method(tmp_path / name), saver]
        return fit_stream(tmp_path, callbacks, module=toy(dropout=0.3), stream=stream(), ckpt_path=ckpt_path)

    straight = run("straight")
    torch.manual_seed(999)
    # 6 steps of learning and 2 of 3 of the request
    assert torch.equal(run("resumed", tmp_path / "straight" / "step=8.ckpt"), straight)


class Statistics(ToyModule):
    """With batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def test_statistics_stand_still_and_move_again(tmp_path: Path) -> None:
    """Batches to forget leave no mark in them; the layer is in training mode afterwards."""
    module = Statistics()
    before = copy.deepcopy(module.model[1].state_dict())
    inputs, labels = toy_data().tensors
    loader = DataLoader(TensorDataset(inputs[REQUESTED], labels[REQUESTED]), batch_size=4)
    trainer(tmp_path, [method(tmp_path)], max_epochs=2).fit(module, loader, loader)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(module.model[1].state_dict()[name], before[name])
    assert not torch.equal(module.model[1].weight, before["weight"])
    assert module.model[1].training


def test_forgets_a_class(tmp_path: Path) -> None:
    """Which fine-tuning had made surer; the others stay."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    right = (module(inputs).argmax(1) == labels).float()
    assert right.mean() > 0.9
    data = UnlearningDataModule(
        (inputs, labels), (inputs, labels), requests=[ForgetRequest("one", classes=[1])], batch_size=4
    )
    fit_stream(tmp_path, [method(tmp_path, 2.0)], module=module, stream=data)
    right = (module(inputs).argmax(1) == labels).float()
    assert right[labels == 1].mean() < 0.2
    assert right[labels != 1].mean() > 0.8


def test_refuses_what_cannot_be_negated(tmp_path: Path) -> None:
    """Before the first step."""
    with pytest.raises(ValueError, match="`alpha` must be above 0, got -1"):
        TaskVectorNegation(-1)
    module = ToyModule()
    module.model = get_peft_model(module.model, LoraConfig(r=1, target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*cannot be negated"):
        fit_stream(tmp_path, [method(tmp_path)], module=module, stream=stream())


def test_footprint_is_one_float32_for_each_trained_weight() -> None:
    """Of adapters only theirs."""
    module = LoraToy()
    size = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert TaskVectorNegation().footprint(None, module.bfloat16(), None).device == size


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def fit_on_this_rank(root: Path, strategy: str, toy: type[ToyModule]) -> Tensor:
    """Fit the stream with half of each batch; return the full weights."""
    chosen = "ddp" if strategy == "ddp" else FSDP2Strategy(wrap=["Linear"])
    return fit_stream(root, [method(root)], module=toy(), stream=stream(batch_size=4), strategy=chosen, devices=2)


@pytest.mark.distributed
@pytest.mark.parametrize("toy", [ToyModule, LoraToy])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_end_where_one_process_ends(
    strategy: str, toy: type[ToyModule], two_ranks: Ranks, tmp_path: Path
) -> None:
    """Shards are negated by themselves."""
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, strategy, toy)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain_loop(toy, 4, 2), rtol=1e-6, atol=1e-6)
