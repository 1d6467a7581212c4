"""The assistant's loss and the logit difference, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from lightning_cl.functional.unlearning import logit_difference, uniform_divergence


def test_divergence_is_that_of_torch():
    """KL(U || p), a mean over the positions of the mask; padding and splitting change nothing else."""
    logits, mask = torch.randn(3, 5, 7) * 3, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    uniform = torch.full((8, 7), 1 / 7)
    expected = kl_div(log_softmax(logits[mask.bool()], -1), uniform, reduction="batchmean")
    torch.testing.assert_close(uniform_divergence(logits, mask), expected)
    first = torch.tensor([[1], [0], [0]]).expand(3, 5)
    torch.testing.assert_close(uniform_divergence(logits, first), uniform_divergence(logits[:1]))


def test_divergence_is_least_where_nothing_is_known():
    """0 for equal scores, with gradient p - 1/V elsewhere."""
    assert uniform_divergence(torch.full((2, 3, 9), 4.0)) == pytest.approx(0, abs=1e-6)
    logits = torch.randn(1, 1, 4, requires_grad=True)
    uniform_divergence(logits).backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - 0.25)


def test_divergence_of_nothing_is_a_zero_with_a_graph():
    """No attended position, whatever the scores hold."""
    logits = torch.full((1, 2, 3), torch.inf, requires_grad=True)
    loss = uniform_divergence(logits, torch.zeros(1, 2))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(1, 2, 3))


def test_tokens_that_a_mask_has_closed_are_left_out():
    """As if the vocabulary had none of them."""
    logits = torch.randn(2, 3, 7)
    for closed in (-torch.inf, -1e9):
        padded = torch.cat([logits, torch.full((2, 3, 2), closed)], dim=-1).requires_grad_()
        loss = uniform_divergence(padded)
        torch.testing.assert_close(loss, uniform_divergence(logits))
        loss.backward()
        assert padded.grad.isfinite().all()


def test_divergence_is_computed_in_float32():
    """Half precision goes in, float32 comes out."""
    logits = torch.randn(2, 3, 50).bfloat16()
    loss = uniform_divergence(logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, uniform_divergence(logits.float()))


def test_difference_is_the_formula_where_all_tokens_are_kept():
    """With threshold 1 it is the log-softmax of z + w a."""
    base, assistant = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    found = logit_difference(base, assistant, weight=-0.7, threshold=1.0)
    torch.testing.assert_close(found, log_softmax(base - 0.7 * assistant, -1))


def test_tokens_that_the_model_finds_hopeless_are_out():
    """A token below the share of the likeliest is impossible, or keeps the model's own score."""
    base = torch.tensor([[math.log(0.6), math.log(0.3), math.log(0.05), math.log(0.05 - 1e-6)]])
    assistant = torch.tensor([[9.0, 0.0, -9.0, -9.0]])
    # 0.1 * 0.6 is above 0.05, and a tenth of 4 tokens is none
    found = logit_difference(base, assistant, weight=-1.0, threshold=0.1)
    wanted = torch.tensor([[0.6 * math.exp(-9), 0.3, 0.0, 0.0]])
    torch.testing.assert_close(found.exp(), wanted / wanted.sum())
    kept = logit_difference(base, assistant, weight=-1.0, threshold=0.1, exclude=False).exp()
    wanted = torch.tensor([[0.6 * math.exp(-9), 0.3, 0.05, 0.05]])
    torch.testing.assert_close(kept, wanted / wanted.sum(), atol=1e-5, rtol=1e-4)


def test_a_share_of_the_vocabulary_stays_in_any_case():
    """A model that is sure of one token leaves others to take its place."""
    base = torch.tensor([50.0, 9.0, 8.0, 7.0, 0.0, 0.0, 0.0, 0.0])
    assistant = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0])
    found = logit_difference(base, assistant, weight=-1.0, threshold=0.4)
    assert (found > -torch.inf).tolist() == [True, True, True, False, False, False, False, False]
    assert found.argmax() == 1


def test_settings_are_checked():
    """Each message names the setting, or the shapes."""
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`threshold`"):
            logit_difference(torch.zeros(3), torch.zeros(3), threshold=threshold)
    with pytest.raises(ValueError, match="same vocabulary"):
        logit_difference(torch.zeros(3), torch.zeros(4))
