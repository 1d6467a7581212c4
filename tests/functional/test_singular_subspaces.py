"""Leading singular directions, and how many of them a layer keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cl.functional import add_similarity_, leading_subspaces, normalised_importance, protected_rank


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
@pytest.mark.parametrize("rank", [0, 2, 4, 5])
def test_projections_on_leading_singular_vectors(shape: tuple[int, int], rank: int) -> None:
    """U Uᵀ and V Vᵀ of the leading vectors, of both sides."""
    weight, change = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(weight)
    u, v = u[:, :rank], v[:rank].T
    left, right = leading_subspaces(weight, rank)
    assert (left.ranks(), right.ranks()) == ([rank], [rank])
    part: Tensor = left.component(right.component(change[None]).mT).mT[0]
    torch.testing.assert_close(part, u @ u.T @ change @ v @ v.T)


def test_ratios_of_layers() -> None:
    """Importances of mean 1 give ratios of the target in the mean; more than all directions there are not."""
    importance = normalised_importance({"low": 0.2, "middle": 0.4, "high": 0.6})
    assert importance == pytest.approx({"low": 0.5, "middle": 1.0, "high": 1.5})
    ranks = [protected_rank((100, 200), value, 0.1, 0.5) for value in importance.values()]
    assert ranks == [30, 50, 70]
    assert protected_rank((4, 3), 9.0, 0.1, 0.9) == 3
    assert protected_rank((4, 30), 9.0, 0.5, 0.5) == 2


def test_importance_without_similarity() -> None:
    """Outputs that point away from inputs count as unlike; where all do, layers are alike."""
    assert normalised_importance({"a": -0.5, "b": 0.25}) == {"a": 0.0, "b": 2.0}
    assert normalised_importance({"a": -0.5, "b": 0.0}) == {"a": 1.0, "b": 1.0}
    assert normalised_importance({}) == {}


def test_similarity_is_a_mean_over_positions_without_padding() -> None:
    """Sums and counts, so that batches and ranks add up."""
    inputs, outputs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    present = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.nn.functional.cosine_similarity(inputs, outputs, dim=-1)
    total = add_similarity_(torch.zeros(2), inputs, outputs, present)
    torch.testing.assert_close(total, torch.stack([expected[present].sum(), torch.tensor(3.0)]))
    assert add_similarity_(total, inputs, outputs)[1] == 9
