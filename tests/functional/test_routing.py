"""Masks on the rank, joined scores and pooled features, by hand."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from lightning_cl.functional.routing import pooled_features, rank_masks, scores_of_tasks


def test_a_masked_product_is_that_of_one_task() -> None:
    """B diag(m) A = B_i A_i, exactly; of no task it is 0."""
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(r, 5, generator=generator), torch.randn(3, r, generator=generator)) for r in (2, 1, 3)]
    down, up = (
        torch.cat([a for a, _ in parts] + [torch.ones(1, 5)]),
        torch.cat([b for _, b in parts] + [torch.ones(3, 1)], 1),
    )
    masks = rank_masks([0, 2, 3, 6], rank=7)
    assert masks.shape == (4, 7)
    for mask, (a, b) in zip(masks, parts, strict=False):
        torch.testing.assert_close(up @ mask.diag() @ down, b @ a)
    assert not masks[-1].any()


def test_scores_of_two_tasks() -> None:
    """Each sample has its own choices; a class of both gets the score of the first."""
    classes = torch.tensor([[True, True, False, False], [False, True, True, False], [False, False, False, True]])
    first, second = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3), torch.tensor([[50.0, 60.0, 70.0, 80.0]] * 3)
    tasks = torch.tensor([[0, 1], [1, 0], [2, 0]])
    joined = scores_of_tasks([first, second], tasks, classes)
    expected = [[1.0, 2.0, 70.0, -50.0], [50.0, 2.0, 3.0, -50.0], [50.0, 60.0, -50.0, 4.0]]
    assert joined.tolist() == expected


def test_left_out_classes_have_no_part_in_the_softmax() -> None:
    """The loss is that among the task's own classes, also where all scores are far below 0."""
    classes = torch.tensor([[False, True, True]])
    for offset in (0.0, -400.0, 400.0):
        scores = torch.tensor([[9.0, 1.0, 2.0]]) + offset
        masked = scores_of_tasks([scores], torch.zeros(1, 1, dtype=torch.int64), classes)
        loss = cross_entropy(masked, torch.tensor([1]))
        torch.testing.assert_close(loss, cross_entropy(scores[:, 1:], torch.tensor([0])))
        assert masked.argmax() == 2
        assert bool(masked.isfinite().all())


def test_tasks_without_classes_keep_their_scores() -> None:
    """There is nothing to choose among."""
    scores = torch.tensor([[3.0, -7.0]])
    assert torch.equal(scores_of_tasks([scores], torch.tensor([[0]]), torch.zeros(1, 2, dtype=torch.bool)), scores)


def test_pooled_features() -> None:
    """Rows stay, sequences are averaged over what is no padding, images are joined."""
    rows = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(pooled_features(rows), rows.float())
    sequence = torch.tensor([[[1.0, 0.0], [5.0, 2.0]], [[3.0, 3.0], [99.0, 99.0]]])
    present = torch.tensor([[1, 1], [1, 0]])
    assert pooled_features(sequence, present).tolist() == [[3.0, 1.0], [3.0, 3.0]]
    assert pooled_features(sequence).tolist() == [[3.0, 1.0], [51.0, 51.0]]
    assert pooled_features(sequence, torch.ones(2, 7)).tolist() == [[3.0, 1.0], [51.0, 51.0]]
    assert pooled_features(sequence, torch.tensor([[1, 1], [0, 0]])).tolist() == [[3.0, 1.0], [0.0, 0.0]]
    assert pooled_features(torch.arange(8.0).reshape(1, 2, 2, 2)).shape == (1, 8)
