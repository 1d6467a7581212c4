"""Dynamic ConPET: whom the selector chooses, what the chosen adapters say together, and what is kept for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from routed import INPUTS, Gentle, adapted, base_features, learned, predicted
from torch import Tensor
from torch.nn.functional import linear

from lightning_cl import DynamicConPET
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.functional.task_selector import likeliest_tasks, train_selector
from toys import toy_data, toy_stream, trainer


def by_hand(module: Any, inputs: Tensor, tasks: Tensor, num_tasks: int) -> Tensor:
    """Class scores of which each task gives those of its own class."""
    scores = torch.stack([adapted(module, inputs, slice(2 * t, 2 * t + 2))[1] for t in range(num_tasks)])
    joined = torch.full((len(inputs), num_tasks), -torch.inf)
    for row, chosen in enumerate(tasks):
        for task in chosen:
            joined[row, task] = scores[task, row, task]
    return joined


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_the_chosen_adapters_answer_together(top_k: int, tmp_path: Path) -> None:
    """Four tasks of one class: each chosen task gives the score of its class, others are out."""
    method = DynamicConPET(top_k=top_k, capacity=8)
    module, fit = learned(tmp_path, method, scenario=ClassIncremental(n_tasks=4))
    inputs, labels = toy_data().tensors
    features = base_features(module, torch.cat([inputs[labels == task] for task in range(4)]))
    weight, bias = train_selector(features, torch.arange(4).repeat_interleave(12), 4, 0.01)
    # the order of the samples makes no difference but for rounding
    tasks = linear(base_features(module, INPUTS), weight, bias).topk(min(top_k, 4), dim=1).indices
    expected, got = by_hand(module, INPUTS, tasks, 4), predicted(fit, module, INPUTS)
    chosen = expected.isfinite()
    assert (chosen.sum(1) == min(top_k, 4)).all()
    torch.testing.assert_close(got[chosen], expected[chosen].detach())
    assert (got.masked_fill(chosen, -torch.inf).amax(1) <= got.amax(1) - 50).all()
    assert torch.equal(predicted(fit, module, INPUTS[:3], 1).argmax(1), got[:3].argmax(1))


def test_choices_do_not_depend_on_the_batch() -> None:
    """Scores that are equal but for rounding: mirrored weights of mirrored features."""
    generator = torch.Generator().manual_seed(0)
    half, weight = torch.randn(200, 150, generator=generator), torch.randn(300, generator=generator)
    features, weights = torch.cat([half, half.flip(1)], 1), torch.stack([weight, weight.flip(0), weight])
    together = likeliest_tasks(features, weights, torch.zeros(3))
    alone = torch.cat([likeliest_tasks(row[None], weights, torch.zeros(3)) for row in features])
    assert torch.equal(together, alone)
    assert len(together[:, 0].unique()) > 1
    assert likeliest_tasks(features, weights, torch.tensor([0.0, 1.0, 0.0]))[:, 0].tolist() == [1] * 200


def test_the_second_choice_computes_in_the_precision_of_the_step(tmp_path: Path) -> None:
    """Joined scores have one dtype, and both tasks' classes the values of a step under autocast."""
    method, module = DynamicConPET(top_k=2, capacity=4), Gentle()
    fit = trainer(tmp_path, [method], precision="bf16-mixed")
    fit.fit(module, datamodule=toy_stream(epochs_per_task=4))
    got = predicted(fit, module, INPUTS)
    assert got.dtype == torch.bfloat16


def test_equal_shares_of_the_memory(tmp_path: Path) -> None:
    """10 vectors of one task, 5 of each of two, 3 of each of three; what stays of a task was there before."""
    method, module = DynamicConPET(memory=10, capacity=8), Gentle()
    learned(tmp_path, method, module, scenario=ClassIncremental(n_tasks=4))
    assert [len(rows) for rows in method._kept] == [2, 2, 2, 2]
    inputs, labels = toy_data().tensors
    for task, rows in enumerate(method._kept):
        own = base_features(module, inputs[labels == task])
        assert all(bool((own == row).all(1).any()) for row in rows)
        assert len(rows.unique(dim=0)) == 2
    alone = DynamicConPET(memory=10, capacity=8)
    features = torch.arange(24.0).reshape(12, 2)
    for index, share in enumerate((10, 5, 3, 2)):
        before = alone._kept
        alone.learn(index, features + 100 * index, torch.arange(12))
        assert [len(rows) for rows in alone._kept] == [share] * (index + 1)
        for old, new in zip(before, alone._kept, strict=False):
            assert torch.equal(old[:share], new)
    assert alone.choose(features[:1] + 200).tolist() == [[2]]
    alone.learn(1, features - 500, torch.arange(12))
    assert len(alone._kept) == 2


def test_accuracy_counts_any_of_the_chosen(tmp_path: Path) -> None:
    """With as many choices as tasks it is 1."""
    _, fit = learned(tmp_path, DynamicConPET(top_k=2, capacity=4))
    assert fit.callback_metrics["dynamic-conpet/routing_accuracy"] == 1.0


def test_goes_on_from_a_state(tmp_path: Path) -> None:
    """The selector is in the checkpoint."""
    module, fit = learned(tmp_path, DynamicConPET(capacity=4))
    expected = predicted(fit, module, INPUTS)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    again = trainer(tmp_path, [DynamicConPET(capacity=4)])
    again.validate(Gentle(seed=9), toy_stream(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=False)
    torch.testing.assert_close(predicted(again, again.lightning_module, INPUTS), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "`top_k` must be"),
        ({"memory": 0}, "`memory` must be"),
        ({"penalty": 0.0}, "`penalty` must be"),
        ({"top_k": 2, "mask_classes": False}, "`top_k=2` joins the scores"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    """Named, with what was given."""
    with pytest.raises(ValueError, match=message):
        DynamicConPET(**settings)
