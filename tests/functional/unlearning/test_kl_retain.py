"""The KL term on retained data, against sums by hand and its closed gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cl.functional.unlearning import kl_retain

GENERATOR = torch.Generator().manual_seed(1)
LOGITS, REFERENCE = torch.randn(2, 2, 4, 5, generator=GENERATOR)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
LABELS = torch.tensor([[-100, 3, -100, -100], [-100, 1, -100, 4]])
# the positions that the labels 3, 1 and 4 are predicted at
SUPERVISED = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0]]).bool()
CHOICES = {"attended": MASK.bool(), "supervised": SUPERVISED, "all": torch.ones(2, 4, dtype=torch.bool)}


def divergences(logits: Tensor) -> Tensor:
    """KL(p_ref || p) at every position, by its definition."""
    p, q = REFERENCE.softmax(-1), logits.softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize(("positions", "chosen"), CHOICES.items())
def test_value_and_gradient_by_hand(positions: str, chosen: Tensor) -> None:
    """A mean over the positions that count, and (p - p_ref) over their number."""
    logits = LOGITS.clone().requires_grad_()
    found = kl_retain(logits, REFERENCE, positions=positions, mask=MASK, labels=LABELS)
    torch.testing.assert_close(found, divergences(LOGITS)[chosen].mean())
    found.backward()
    expected = (LOGITS.softmax(-1) - REFERENCE.softmax(-1)) / chosen.sum() * chosen[..., None]
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("positions", CHOICES)
def test_zero_at_the_reference(positions: str) -> None:
    """Value and gradient."""
    logits = LOGITS.clone().requires_grad_()
    found = kl_retain(logits, LOGITS, positions=positions, mask=MASK, labels=LABELS)
    found.backward()
    assert found == 0
    torch.testing.assert_close(logits.grad, torch.zeros_like(LOGITS), rtol=0, atol=1e-7)


def test_padding_counts_only_where_all_positions_do() -> None:
    """Beside rows that are longer the weight stays the same."""
    found = kl_retain(LOGITS, REFERENCE, mask=MASK)
    torch.testing.assert_close(kl_retain(LOGITS[:, :3], REFERENCE[:, :3], mask=MASK[:, :3]), found)
    longer, shorter = (kl_retain(LOGITS[:, :n], REFERENCE[:, :n], positions="all") for n in (4, 3))
    assert (longer - shorter).abs() > 1e-3
    torch.testing.assert_close(kl_retain(LOGITS, REFERENCE), longer)


def test_classes_are_rows() -> None:
    """Of a classifier; those without a label are left out where supervised ones count."""
    logits, reference = LOGITS[:, 0], REFERENCE[:, 0]
    rows = divergences(LOGITS)[:, 0]
    torch.testing.assert_close(kl_retain(logits, reference), rows.mean())
    labels = torch.tensor([-100, 2])
    torch.testing.assert_close(kl_retain(logits, reference, positions="supervised", labels=labels), rows[1])


def test_no_position_is_a_zero_with_a_graph() -> None:
    """From scores that are no numbers too."""
    logits = torch.full_like(LOGITS, torch.nan).requires_grad_()
    found = kl_retain(logits, REFERENCE, mask=torch.zeros_like(MASK))
    assert found == 0
    found.backward()
    assert (logits.grad == 0).all()


def test_no_gradient_reaches_the_reference() -> None:
    """It may be the same module with its adapters off."""
    reference = REFERENCE.clone().requires_grad_()
    kl_retain(LOGITS.clone().requires_grad_(), reference).backward()
    assert reference.grad is None


def test_half_precision() -> None:
    """Computed in float32, inside autocast as well."""
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kl_retain(LOGITS.to(dtype), REFERENCE.to(dtype))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, kl_retain(LOGITS.to(dtype).float(), REFERENCE.to(dtype).float()))


def test_what_does_not_fit_is_refused() -> None:
    """Names, and what is missing."""
    with pytest.raises(ValueError, match=r"`positions` must be one of 'attended'.*got 'prompt'"):
        kl_retain(LOGITS, REFERENCE, positions="prompt")
    with pytest.raises(ValueError, match="`positions='supervised'` needs `labels`"):
        kl_retain(LOGITS, REFERENCE, positions="supervised")
    with pytest.raises(ValueError, match=r"`mask` of shape \[2, 4\] does not fit logits of shape \[2, 5\]"):
        kl_retain(LOGITS[:, 0], REFERENCE[:, 0], mask=MASK)
