"""How much weights sway an output, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_cl.functional import LayerTape, SampleLoop, output_sensitivity

BATCH = 6


def _measured(model, inputs, by_loop=False, **settings):
    with LayerTape(model, dict(model.named_parameters())) as tape:
        outputs = model(inputs)
        return output_sensitivity(SampleLoop(tape.params) if by_loop else tape, outputs, **settings)


@pytest.mark.parametrize("by_loop", [False, True])
def test_linear_model_has_a_closed_form(by_loop):
    """The sum over samples of |2 (Wx + b)_i x_j|, and of |2 (Wx + b)_i| for the bias."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3).double(), torch.randn(BATCH, 4, dtype=torch.float64)
    found = _measured(model, inputs, by_loop)
    outputs = model(inputs).detach()
    expected = {
        "weight": (2 * outputs[:, :, None] * inputs[:, None, :]).abs().sum(0),
        "bias": (2 * outputs).abs().sum(0),
    }
    torch.testing.assert_close(found.sums, expected)
    assert found.count == BATCH
    # opposite signs do not cancel
    assert (expected["bias"] > (2 * outputs).sum(0).abs() + 0.1).any()


def test_norm_is_over_the_positions_that_count():
    """What stands in the others matters nothing, nor does a sample without any."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3).double(), torch.randn(BATCH, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 1, 0, 2, 4])
    positions = torch.arange(5) < lengths[:, None]
    found = _measured(model, inputs, positions=positions)
    other = _measured(model, torch.where(positions.unsqueeze(-1), inputs, 1e3), positions=positions)
    torch.testing.assert_close(found.sums, other.sums)
    samples = [_measured(model, inputs[i : i + 1, :length]).sums for i, length in enumerate(lengths) if length]
    for name, total in found.sums.items():
        torch.testing.assert_close(total, sum(sample[name] for sample in samples))
    assert found.count == 5


@pytest.mark.parametrize("masked", [-float("inf"), torch.finfo(torch.float32).min], ids=str)
def test_masked_classes_are_no_output(masked):
    """Logits without a chance take no part in the norm, be they filled or added to."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(BATCH, 4)
    mask = torch.tensor([0.0, masked, 0.0])
    for hide in (lambda logits: logits + mask, lambda logits: logits.masked_fill(mask != 0, masked)):
        with LayerTape(model, ["weight"]) as tape:
            found = output_sensitivity(tape, hide(model(inputs))).sums["weight"]
        outputs = model(inputs).detach() * (mask == 0)
        torch.testing.assert_close(found, (2 * outputs[:, :, None] * inputs[:, None, :]).abs().sum(0))


def test_batches_add_up_in_accumulators():
    """Two batches added to what was there are one batch."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(BATCH, 4)
    into = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    counts = [_measured(model, part, into=into).count for part in inputs.split(4)]
    assert counts == [4, 2]
    torch.testing.assert_close(into, {name: 1 + total for name, total in _measured(model, inputs).sums.items()})


def test_positions_must_fit():
    """One entry for each position."""
    with pytest.raises(ValueError, match=r"`positions` of shape \(6, 4\) do not fit outputs of shape \(6, 5, 3\)"):
        _measured(nn.Linear(4, 3), torch.randn(BATCH, 5, 4), positions=torch.ones(BATCH, 4, dtype=torch.bool))
