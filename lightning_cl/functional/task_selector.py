"""A linear classifier that tells of which task a sample is, by its features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["likeliest_tasks", "train_selector"]


def likeliest_tasks(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Return the tasks in the order of their scores :math:`v_t \cdot \varphi + c_t`, the likeliest first.

    They are compared by

    .. math:: v_t \cdot \varphi + c_t - \tfrac{1}{2} \|\varphi\|^2
        = c_t + \tfrac{1}{2} \|v_t\|^2 - \tfrac{1}{2} \|\varphi - v_t\|^2

    so that a row depends on its own features alone, to the bit, as in :func:`prototype_distances`: a product of
    matrices rounds by the size of a batch. Computed in float64. Of equal scores the earlier task comes first.

    Args:
        features: :math:`\varphi`, [B, D].
        weight: v, [T, D].
        bias: c, [T].

    Returns:
        int64 [B, T].

    Example:
        >>> features, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> likeliest_tasks(features, weight, torch.tensor([0.0, 0.0]))
        tensor([[0, 1],
                [1, 0]])
        >>> likeliest_tasks(features, weight, torch.tensor([0.0, 3.0]))
        tensor([[1, 0],
                [1, 0]])
    """
    features, weight = features.double(), weight.double()
    distances = torch.cdist(features, weight, compute_mode="donot_use_mm_for_euclid_dist").square()
    scores = bias + (weight.square().sum(1) - distances) / 2
    return scores.argsort(dim=1, descending=True, stable=True)


def train_selector(features: Tensor, tasks: Tensor, num_tasks: int, penalty: float) -> tuple[Tensor, Tensor]:
    r"""Return the weight and the bias of softmax regression on tasks, at its minimum.

    .. math:: \frac{1}{N} \sum_{n=1}^{N} - \log \mathrm{softmax}\big(V \hat{\varphi}_n + c\big)_{t_n}
        + \frac{\lambda}{2} \|V\|^2

    with :math:`\hat{\varphi}` the features made to have mean 0 and variance 1 over the samples. It is the only minimum,
    found by L-BFGS in float64; what is returned takes the features as they are.

    Args:
        features: :math:`\varphi`, [N, D].
        tasks: t, int64 [N], from 0.
        num_tasks: T, above every task.
        penalty: :math:`\lambda`, above 0.

    Returns:
        Weight [T, D] and bias [T] in float32.

    Example:
        >>> features, tasks = torch.tensor([[0.0, 5.0], [1.0, 5.0], [3.0, 5.0], [4.0, 5.0]]), torch.tensor([0, 0, 1, 1])
        >>> weight, bias = train_selector(features, tasks, num_tasks=2, penalty=0.01)
        >>> (torch.tensor([[1.9, 5.0], [2.1, 5.0]]) @ weight.T + bias).argmax(1)
        tensor([0, 1])
    """
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # a feature that never varies says nothing
    scale = torch.where(deviation > 0, 1 / deviation, 0)
    inputs = (features - mean) * scale
    weight, bias = inputs.new_zeros(num_tasks, inputs.shape[1]), inputs.new_zeros(num_tasks)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss = cross_entropy(inputs @ weight.T + bias, tasks) + penalty / 2 * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        return loss

    with torch.enable_grad():
        weight.requires_grad_()
        bias.requires_grad_()
        optimizer.step(closure)
    scaled = weight.detach() * scale
    return scaled.float(), (bias.detach() - scaled @ mean).float()
