"""What the classes of forget losses add to the functions: settings, what they ask for, what they refuse."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cl.core.card import methods_below
from lightning_cl.functional.unlearning import (
    dpo_loss,
    gradient_ascent,
    npo_loss,
    npo_loss_from_logits,
    satimp_loss,
    simnpo_loss,
    token_nll,
    wga_loss,
)
from lightning_cl.unlearning import DPO, NPO, WGA, ForgetLoss, GradientAscent, Outputs, SatImp, SimNPO

LOGITS, REFERENCE = 2 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[-100, -100, 3, 6, -100], [2, -100, -100, -100, -100], [1, 0, -100, 5, 4]])
FORGET, BEFORE = Outputs(LOGITS, LABELS), Outputs(REFERENCE, LABELS)

EXPECTED: dict[str, tuple[ForgetLoss, Tensor]] = {
    "gradient-ascent": (GradientAscent(), gradient_ascent(LOGITS, LABELS, bound=math.log(7))),
    "bounded": (GradientAscent(3.0), gradient_ascent(LOGITS, LABELS, bound=3.0)),
    "unbounded": (GradientAscent(None), gradient_ascent(LOGITS, LABELS, bound=None)),
    "npo": (NPO(0.3), npo_loss_from_logits(LOGITS, REFERENCE, LABELS, beta=0.3)),
    "simnpo": (SimNPO(1.5, 0.3), simnpo_loss(LOGITS, LABELS, beta=1.5, delta=0.3)),
    "wga": (WGA(0.5), wga_loss(LOGITS, LABELS, beta=0.5)),
    "satimp": (SatImp(2.0, 0.5), satimp_loss(LOGITS, LABELS, beta1=2.0, beta2=0.5)),
}


@pytest.mark.parametrize(("loss", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_loss_is_that_of_the_function(loss: ForgetLoss, expected: Tensor) -> None:
    """With the settings of the constructor, and the reference only where it is asked for."""
    reference = None if loss.reference == "none" else BEFORE
    assert torch.equal(loss(FORGET, reference), expected)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(FORGET, reference), expected)
    assert loss.reference == ("sequences" if isinstance(loss, NPO) else "none")


def test_defaults_are_those_of_the_papers() -> None:
    """Gradient ascent's bound is ours."""
    assert NPO().beta == DPO().beta == 0.1
    assert (SimNPO().beta, SimNPO().delta) == (4.5, 0.0)
    assert (WGA().beta, SatImp().beta1, SatImp().beta2) == (1.0, 5.0, 1.0)
    assert GradientAscent().bound == "uniform"


def test_cards_name_the_methods() -> None:
    """By which `Unlearn(method=...)` finds them."""
    found = methods_below(ForgetLoss)
    expected = {
        "dpo": DPO,
        "gradient-ascent": GradientAscent,
        "npo": NPO,
        "satimp": SatImp,
        "simnpo": SimNPO,
        "wga": WGA,
    }
    assert expected.items() <= found.items()
    assert {kind.card.family for kind in found.values()} == {"unlearning"}


def test_stored_sums_stand_for_the_logits_of_the_reference() -> None:
    """One number per row is all that NPO needs of it."""
    stored = Outputs(stored_nll_sum=token_nll(REFERENCE, LABELS, reduction="sequence_sum"))
    assert torch.equal(NPO(0.3)(FORGET, stored), NPO(0.3)(FORGET, BEFORE))


def test_rows_without_supervision_have_no_part() -> None:
    """The second row has none: a mean over the other two."""
    assert FORGET.supervised.tolist() == [True, False, True]
    nll, before = FORGET.nll_sum[::2], BEFORE.nll_sum[::2]
    torch.testing.assert_close(NPO(0.3)(FORGET, BEFORE), npo_loss(nll, before, beta=0.3))


def test_dpo_prefers_the_alternate() -> None:
    """In its own place, of the model and of the reference; a row counts where both answers are supervised."""
    labels = torch.tensor([[-100, 4, -100], [-100, 4, 2], [-100, -100, -100]])
    alternate = [Outputs(scores[:, :3], labels) for scores in (LOGITS.flip(0), REFERENCE.flip(0))]
    forget, reference = (Outputs(s, LABELS, alternate=a) for s, a in zip((LOGITS, REFERENCE), alternate, strict=True))
    expected = dpo_loss(
        alternate[0].nll_sum[:1], forget.nll_sum[:1], alternate[1].nll_sum[:1], reference.nll_sum[:1], beta=0.2
    )
    torch.testing.assert_close(DPO(0.2)(forget, reference), expected)


def test_dpo_needs_the_alternate() -> None:
    """And says which keys of a batch it is read from."""
    with pytest.raises(ValueError, match=r"holds none.*`alternate_labels`, or use `NPO`"):
        DPO()(FORGET, BEFORE)


@pytest.mark.parametrize("outputs", [Outputs(labels=LABELS), Outputs(logits=LOGITS)], ids=["logits", "labels"])
def test_what_the_batch_lacks_is_named(outputs: Outputs) -> None:
    """A module that returns no scores, a batch without labels."""
    missing = "logits" if outputs.logits is None else "labels"
    with pytest.raises(ValueError, match=f"needs `{missing}`.*`BatchAdapter`"):
        GradientAscent()(outputs, None)


def test_what_a_loss_may_leave_to_the_base() -> None:
    """No retain term of its own, a plain weight, nothing that a resume needs."""
    loss = GradientAscent()
    with pytest.raises(ValueError, match=r'retain="own".*`GradientAscent` has none.*"nll" or "kl"'):
        loss.retain_term(FORGET, None)
    assert loss.weigh_retain(0.25, torch.tensor(8.0)) == 2.0
    loss.start(3)
    loss.after_step(1.0)
    assert loss.state_dict() == {}
    loss.load_state_dict({})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GradientAscent, {"bound": 0.0}, r"`bound` must be above 0, got 0\.0"),
        (GradientAscent, {"bound": "guess"}, "`bound` must be above 0, got 'guess'"),
        (NPO, {"beta": 0.0}, r"`beta` must be above 0, got 0\.0"),
        (SimNPO, {"beta": -1.0}, r"`beta` must be above 0, got -1\.0"),
        (DPO, {"beta": 0.0}, r"`beta` must be above 0, got 0\.0"),
        (WGA, {"beta": -0.1}, r"`beta` must be at least 0, got -0\.1"),
        (SatImp, {"beta1": -0.1}, r"`beta1` must be at least 0, got -0\.1"),
        (SatImp, {"beta2": -0.1}, r"`beta2` must be at least 0, got -0\.1"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type[ForgetLoss], settings: dict[str, Any], message: str) -> None:
    """When the loss is made."""
    with pytest.raises(ValueError, match=message):
        kind(**settings)
