r"""Diagonals of the Fisher information, as sums over samples to be divided once by the number of samples.

With :math:`z` the logits, :math:`p` their softmax and :math:`N` samples, a softmax classifier has

.. math:: F = \frac{1}{N} \sum_i \sum_c p_{ic} \left(\nabla_\theta \log p_{ic}\right)^2 ,

and the estimators differ in how they replace the sum over labels :math:`c`. The squared term is that of one sample,
never of a batch's mean, so the result does not depend on the batch size; :func:`batched_fisher` is the exception.
What each does to the strength of EWC: van de Ven 2025, arXiv:2502.11756.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cl.functional.sample_loop import SquaredGradients, squared_sums_by_loop
from lightning_cl.functional.sharding import UnshardedWeights

__all__ = ["IGNORE_INDEX", "FisherSums", "batched_fisher", "empirical_fisher", "exact_fisher", "sampled_fisher"]

IGNORE_INDEX = -100
"""The label of positions without supervision, as in :func:`torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class FisherSums:
    """Sums over the samples of a batch.

    Args:
        sums: Squared gradients summed over samples, by parameter name.
        count: Number of samples summed over; those without any supervised position do not count.
    """

    sums: dict[str, Tensor]
    count: int


def exact_fisher(tape: SquaredGradients, logits: Tensor, *, into: Mapping[str, Tensor] | None = None) -> FisherSums:
    r"""Sum :math:`\sum_c p_c (\nabla \log p_c)^2` over samples: the expectation over the model's own labels.

    Takes one backward pass for each class.

    Args:
        tape: What recorded the forward pass.
        logits: ``[B, C]``.
        into: Accumulators by name, which are added to and returned.

    Raises:
        ValueError: If ``logits`` has positions besides samples and classes.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"The exact Fisher needs logits of shape [B, C], got {tuple(logits.shape)}: labels of several positions"
            " have too many combinations. Use the `sampled` estimator."
        )
    probabilities = _probabilities(logits)
    sums = tape.squared_sums(logits, _class_cotangents(probabilities), batch_size=len(logits), into=into)
    return FisherSums(sums, len(logits))


def sampled_fisher(
    tape: SquaredGradients,
    logits: Tensor,
    uniform: Tensor,
    *,
    labels: Tensor | None = None,
    into: Mapping[str, Tensor] | None = None,
) -> FisherSums:
    r"""Sum :math:`(\nabla \sum_t \log p_{t,y_t})^2` over samples, with one label :math:`y_t \sim p_t` per position.

    Its expectation is the exact Fisher. The label is the class in whose part of the distribution function the uniform
    number falls, so numbers that belong to the samples make it independent of batches, ranks and devices.

    Args:
        tape: What recorded the forward pass.
        logits: ``[B, C]`` or ``[B, T, C]``.
        uniform: Random numbers from 0 to 1, ``[B]`` or ``[B, T]``.
        labels: ``[B]`` or ``[B, T]``, only to leave out positions of label -100.
        into: Accumulators by name, which are added to and returned.

    Raises:
        ValueError: If ``labels`` or ``uniform`` does not fit ``logits``.
    """
    if uniform.shape != logits.shape[:-1]:
        raise ValueError(
            f"`uniform` of shape {tuple(uniform.shape)} does not fit logits of shape {tuple(logits.shape)}: one number"
            " for each position is needed."
        )
    probabilities = _probabilities(logits)
    supervised = None if labels is None else _supervised(logits, labels)
    drawn = _draw(probabilities, uniform)
    return _fisher_of_labels(tape, logits, probabilities, drawn, supervised, into)


def empirical_fisher(
    tape: SquaredGradients, logits: Tensor, labels: Tensor, *, into: Mapping[str, Tensor] | None = None
) -> FisherSums:
    r"""Sum :math:`(\nabla \sum_t \log p_{t,y_t})^2` over samples, with the true labels :math:`y`.

    Not an estimate of the Fisher: it shrinks as the model fits its labels.

    Args:
        tape: What recorded the forward pass.
        logits: ``[B, C]`` or ``[B, T, C]``, in line with ``labels`` (of a causal language model: shifted).
        labels: ``[B]`` or ``[B, T]``; positions of label -100 are left out.
        into: Accumulators by name, which are added to and returned.

    Raises:
        ValueError: If ``labels`` does not fit ``logits``.
    """
    supervised = _supervised(logits, labels)
    return _fisher_of_labels(tape, logits, _probabilities(logits), labels, supervised, into)


def batched_fisher(
    params: Mapping[str, Tensor],
    loss: Tensor,
    count: int,
    *,
    into: Mapping[str, Tensor] | None = None,
    unsharded: UnshardedWeights | None = None,
) -> FisherSums:
    r"""Return :math:`(\sum_i \nabla \ell_i)^2`, a rough stand-in that needs one plain backward pass of any model.

    Divided by the number of samples this is :math:`B \bar g^2` with :math:`\bar g` the mean gradient of a batch of
    :math:`B`. Its expectation is :math:`F + (B - 1)(\mathbb{E} g)^2` with :math:`F` the empirical Fisher: close to it
    where the mean gradient vanishes, above it elsewhere, and then the more so the larger the batch. Libraries that
    average :math:`\bar g^2` over batches have :math:`1/B` of this.

    Args:
        params: The parameters by name.
        loss: Sum of the losses of the samples (a mean times ``count``).
        count: Number of samples :math:`B`; with 0 nothing is added.
        into: Accumulators by name, which are added to and returned.
        unsharded: Where parameters are sharded, what was gathered for the forward pass of ``loss``.
    """
    return FisherSums(squared_sums_by_loop([loss], params, into, unsharded=unsharded, idle=count == 0), count)


def _fisher_of_labels(
    tape: SquaredGradients,
    logits: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    supervised: Tensor | None,
    into: Mapping[str, Tensor] | None,
) -> FisherSums:
    # the gradient of -log p_y with respect to the logits is p - onehot(y)
    index = labels if supervised is None else labels.where(supervised, 0)
    cotangent = probabilities.scatter_add(-1, index.unsqueeze(-1), -torch.ones_like(probabilities[..., :1]))
    count = len(logits)
    if supervised is not None:
        cotangent = cotangent * supervised.unsqueeze(-1)
        count = int(supervised.reshape(count, -1).any(1).sum())
    return FisherSums(tape.squared_sums(logits, [cotangent], batch_size=len(logits), into=into), count)


def _class_cotangents(probabilities: Tensor) -> Iterator[Tensor]:
    # of sqrt(p_c) log p_c with the root held constant: squared, it is the term of class c
    roots = probabilities.sqrt()
    for label in range(probabilities.shape[1]):
        cotangent = -probabilities * roots[:, label : label + 1]
        cotangent[:, label] += roots[:, label]
        yield cotangent


def _probabilities(logits: Tensor) -> Tensor:
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def _supervised(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"`labels` of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: one label for"
            " each position is needed."
        )
    return labels != IGNORE_INDEX


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    # inverse of the distribution function
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:]
    threshold = (uniform.unsqueeze(-1).to(total) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
