"""The projection of A-GEM, and what it shares with GEM."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import add_references_, agem_coefficient, gram_matrix, reference_products, references


def test_the_projection_is_the_nearest_gradient_that_agrees() -> None:
    """Orthogonal to the reference after a conflict, as it was without one."""
    generator = torch.Generator().manual_seed(0)
    conflicts = 0
    for _ in range(50):
        g, r = torch.randn(2, 5, dtype=torch.float64, generator=generator)
        turned = g + agem_coefficient(g @ r, r @ r) * r
        if g @ r < 0:
            conflicts += 1
            assert abs(turned @ r) < 1e-12
            torch.testing.assert_close(turned, g - (g @ r) / (r @ r) * r)
        else:
            assert torch.equal(turned, g)
    assert 10 < conflicts < 40


def test_a_reference_of_zeros_forbids_nothing() -> None:
    """As on a memory that the model has learned by heart."""
    assert agem_coefficient(torch.zeros(1), torch.zeros(1)).tolist() == [0.0]


def test_a_reference_that_is_no_number_shows() -> None:
    """Silence would leave the step unprotected."""
    assert agem_coefficient(torch.tensor([torch.nan]), torch.tensor([torch.nan])).isnan().all()


def test_products_are_those_of_the_whole_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over tensors of any shape and layout, in blocks, of half-precision gradients too."""
    monkeypatch.setattr(references, "_CPU_BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 21, generator=generator)
    pieces = list(matrix.split([15, 6], dim=1))
    grads = [torch.randn(5, 3, generator=generator).T, torch.randn(6, generator=generator).bfloat16()]
    whole = torch.cat([grad.reshape(-1) for grad in grads]).double()
    torch.testing.assert_close(reference_products(pieces, grads), matrix.double() @ whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(gram_matrix(matrix), matrix.double() @ matrix.double().T, rtol=0, atol=1e-12)


def test_products_do_not_lose_small_terms() -> None:
    """A sum in float32 would end at 2**24."""
    ones = torch.ones(1, 2**24 + 1)
    assert reference_products([ones], [ones[0]]).item() == 2**24 + 1
    assert gram_matrix(ones).item() == 2**24 + 1


@pytest.mark.parametrize("count", [1, 3])
def test_references_are_added_in_place(count: int) -> None:
    """To each tensor in its own shape, layout and dtype."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 6, generator=generator), torch.randn(count, 4, generator=generator)]
    grads = [torch.randn(3, 2, generator=generator).T, torch.randn(4, generator=generator).bfloat16()]
    v = torch.randn(count, generator=generator).double()
    expected = [g.double() + (v @ r.double()).view(g.shape) for g, r in zip(grads, rows, strict=True)]
    kept = list(grads)
    add_references_(grads, rows, v)
    assert all(grad is before for grad, before in zip(grads, kept, strict=True))
    torch.testing.assert_close(grads[0].double(), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[1].double(), expected[1], rtol=1e-2, atol=1e-2)
