r"""Task-aware filters: linear maps that keep of a layer's features what a task needs.

Liang et al. 2023, "Less is More: Task-aware Layer-wise Distillation for Language Model Compression", arXiv:2210.01351,
stage I.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

__all__ = ["initial_filter", "train_filter"]


def initial_filter(size: int, width: int, seed: int) -> Tensor:
    r"""Return a filter [size, width] as layers are initialised: uniform up to :math:`1 / \sqrt{width}`."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(width)
    return torch.empty(size, width).uniform_(-bound, bound, generator=generator)


def train_filter(
    features: Tensor, labels: Tensor, weight: Tensor, *, steps: int = 100, learning_rate: float = 1e-2
) -> Tensor:
    r"""Return a filter W that a linear classifier V behind it, trained along with it, can tell the classes by.

    .. math:: \min_{W, V, b} \; \frac{1}{N} \sum_n \mathrm{CE}(V W h_n + b, y_n), \qquad
        W \leftarrow W \sqrt{D'} \,/\, \|W\|_F

    by Adam on all samples at once, so that their order does not matter. The scale of W means nothing to the classifier;
    at this one, the squared error of filtered features equals that of the features themselves where all directions
    differ alike.

    Args:
        features: h, [N, D].
        labels: y, int64 [N]; any numbers.
        weight: The filter to start from, [D', D].
        steps: Steps of Adam.
        learning_rate: Its step size.

    Example:
        >>> features, labels = torch.tensor([[1.0, 9.0], [-1.0, 9.0]]), torch.tensor([3, 7])
        >>> trained = train_filter(features, labels, torch.tensor([[0.1, 0.1]]))
        >>> bool(trained[0, 0].abs() > 10 * trained[0, 1].abs())
        True
    """
    classes, targets = labels.unique(return_inverse=True)
    features = features.detach().float()
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        trained = weight.detach().to(features.device, torch.float32, copy=True).requires_grad_()
        head = torch.zeros(len(classes), len(weight), device=features.device, requires_grad=True)
        bias = torch.zeros(len(classes), device=features.device, requires_grad=True)
        optimizer = torch.optim.Adam([trained, head, bias], lr=learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(linear(linear(features, trained), head, bias), targets).backward()
            optimizer.step()
    scaled: Tensor = trained.detach() * (math.sqrt(len(weight)) / trained.detach().norm())
    return scaled
