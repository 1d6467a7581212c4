"""What is asked of every forget loss as a function of scores and labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient(loss: Callable[..., Tensor], *tensors: Tensor, **settings: float) -> Tensor:
    """The gradient of a loss with respect to the first argument."""
    first = tensors[0].clone().requires_grad_()
    loss(first, *tensors[1:], **settings).backward()
    assert first.grad is not None
    return first.grad


def check_nothing_supervised(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> None:
    """A zero that can be sent backward, from scores that are no numbers too."""
    for scores in (logits, torch.full_like(logits, torch.nan)):
        none = torch.full_like(labels, -100)
        assert loss(scores, none) == 0
        assert (gradient(loss, scores, none) == 0).all()


def check_half_precision(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> None:
    """Computed in float32, inside autocast as well."""
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(logits.to(dtype), labels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(logits.to(dtype).float(), labels))
