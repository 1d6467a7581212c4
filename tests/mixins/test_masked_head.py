"""Logits restricted to the classes of the task, or to those seen so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl import MaskedHead, Task
from lightning_cl.datamodules import ClassIncremental, TaskIncremental
from toys import ToyModule, fit_stream, toy_stream, trainer

TASK = Task(index=1, name="b", classes=(2, 3), seen_classes=(0, 1, 2, 3), num_tasks=3)
LOGITS = torch.tensor([[5.0, 1.0, 0.0, 0.5, 9.0], [0.0, 1.0, 2.0, 3.0, 4.0]])


class Masked(MaskedHead, ToyModule):
    """The toy module with the mixin in front."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.mask_logits(self.model(inputs))


def masked(head_mask: str, task: Task | None = TASK, logits: Tensor = LOGITS) -> Tensor:
    """The masked logits of a head that knows its task."""
    head = MaskedHead()
    head.head_mask, head.current_task = head_mask, task
    return head.mask_logits(logits)


# ---------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize(("head_mask", "allowed"), [("task", [2, 3]), ("seen", [0, 1, 2, 3])])
def test_probabilities_of_masked_classes_are_zero(head_mask: str, allowed: list[int]) -> None:
    """The others share the softmax as if the head had no more outputs."""
    probabilities = masked(head_mask).softmax(-1)
    expected = torch.zeros_like(LOGITS)
    expected[:, allowed] = LOGITS[:, allowed].softmax(-1)
    torch.testing.assert_close(probabilities, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_over_a_masked_label_is_finite(dtype: torch.dtype) -> None:
    """Large, but no NaN that would spoil the weights; so is its gradient."""
    logits = (20 * LOGITS).to(dtype).requires_grad_()
    loss = cross_entropy(masked("task", logits=logits), torch.tensor([0, 1]))
    loss.backward()
    assert loss.dtype == dtype
    assert 100 < loss < float("inf")
    assert not logits.grad.isnan().any()
    assert logits.grad[:, [0, 1, 4]].abs().max() == 0


def test_gradients_reach_allowed_classes_only() -> None:
    """Outputs of other tasks do not learn."""
    logits = LOGITS.clone().requires_grad_()
    cross_entropy(masked("task", logits=logits), torch.tensor([2, 3])).backward()
    assert (logits.grad != 0).any(0).tolist() == [False, False, True, True, False]


def test_leading_dimensions_are_free() -> None:
    """Tokens of a sequence, say."""
    tokens = LOGITS.expand(3, 2, 5)
    assert torch.equal(masked("task", logits=tokens), masked("task").expand(3, 2, 5))


def test_without_a_task_nothing_is_masked() -> None:
    """Before the first task, and where classes are unknown."""
    assert masked("task", None) is LOGITS
    assert masked("task", Task(index=0, name="fit 1")) is LOGITS


def test_refuses_a_class_outside_the_head_and_an_unknown_mask() -> None:
    """Each with what was given."""
    with pytest.raises(ValueError, match=r"task 2 of 3 \(b\) has class 3, but the head has 3 outputs"):
        masked("task", logits=LOGITS[:, :3])
    with pytest.raises(ValueError, match="`head_mask` must be 'task' or 'seen', got 'all'"):
        masked("all")


# ---------------------------------------------------------------------- in a fit


class Watching(Masked):
    """Counts predictions outside of the classes that are allowed for the labels at hand."""

    def __init__(self, head_mask: str) -> None:
        super().__init__()
        self.head_mask = head_mask
        self.predicted: dict[str, set[tuple[int, ...]]] = {"train": set(), "val": set(), "test": set()}

    def _watch(self, batch: Any, stage: str) -> None:
        probabilities = self(batch[0]).softmax(-1)
        self.predicted[stage].add(tuple((probabilities > 0).any(0).nonzero().flatten().tolist()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._watch(batch, "train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._watch(batch, "val")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._watch(batch, "test")


def test_task_incremental_streams_tell_the_task_of_each_loader(tmp_path: Path) -> None:
    """Training, validation and test answer with the task's own two classes."""
    module, stream = Watching("task"), toy_stream(scenario=TaskIncremental(n_tasks=2), evaluate="all")
    fit = trainer(tmp_path)
    fit.fit(module, datamodule=stream)
    fit.test(module, datamodule=stream, verbose=False)
    assert module.predicted == {stage: {(0, 1), (2, 3)} for stage in ("train", "val", "test")}


def test_class_incremental_streams_tell_what_was_seen(tmp_path: Path) -> None:
    """Two classes in the first task, four from the second on, in evaluation too."""
    module = Watching("seen")
    fit_stream(tmp_path, module=module, stream=toy_stream(scenario=ClassIncremental(n_tasks=2)))
    assert module.predicted["train"] == module.predicted["val"] - {(0, 1, 2, 3)} | {(0, 1), (0, 1, 2, 3)}
    assert module.predicted["train"] == {(0, 1), (0, 1, 2, 3)}


def test_a_mask_protects_outputs_of_other_tasks(tmp_path: Path) -> None:
    """The bias of the first task's outputs ends where the first task left it; without a mask it moves."""
    ends = []
    for module in (Masked(), ToyModule()):
        biases = []

        def on_task_end(self: Any, task: Task, biases: list[Tensor] = biases) -> None:
            biases.append(self.model[3].bias.detach().clone())

        type(module).on_task_end = on_task_end
        try:
            stream = toy_stream(scenario=TaskIncremental(n_tasks=2), optimizer_policy="rebuild")
            fit_stream(tmp_path, module=module, stream=stream)
        finally:
            del type(module).on_task_end
        ends.append(torch.equal(biases[0][:2], biases[1][:2]))
    assert ends == [True, False]
