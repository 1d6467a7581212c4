"""Squared per-sample gradients by a plain loop: slow, right for any model, and the reference for the fast way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["SampleLoop", "SquaredGradients", "accumulators", "squared_sums_by_loop"]


class SquaredGradients(Protocol):
    """What an estimator of the Fisher needs: a :class:`LayerTape` or a :class:`SampleLoop`."""

    def squared_sums(
        self,
        outputs: Tensor,
        cotangents: Iterable[Tensor] | None = None,
        *,
        batch_size: int,
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the sums described at :meth:`LayerTape.squared_sums`."""
        ...


def squared_sums_by_loop(
    losses: Iterable[Tensor], params: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    r"""Return :math:`\sum_i (\nabla_\theta \ell_i)^2` by one backward pass for each loss: slow, right for any model.

    Args:
        losses: Scalar losses :math:`\ell_i`, best from a generator, so that one graph lives at a time.
        params: The parameters by name.
        into: Accumulators by name, which are added to and returned; new zeros (at least float32) by default.

    Raises:
        ValueError: If a parameter is sharded: autograd gives such a one no gradient of a single rank's loss.
    """
    if sharded := [name for name, param in params.items() if isinstance(param, DTensor)]:
        raise ValueError(
            f"Gradients of single losses do not reach sharded parameters such as {sharded[0]!r}. Leave out those that a"
            " LayerTape does not cover, or do not shard the model."
        )
    totals = accumulators(params, into)
    for loss in losses if params else ():
        gradients = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(params, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.to(totals[name].dtype)
                totals[name].addcmul_(gradient, gradient)
    return totals


class SampleLoop:
    """The same sums as :class:`LayerTape` by a plain loop, for parameters or models that a tape does not cover.

    Each sample takes a backward pass through the whole batch's graph, so give it batches of one sample.

    Args:
        params: The parameters by name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = dict(params)

    def squared_sums(
        self,
        outputs: Tensor,
        cotangents: Iterable[Tensor] | None = None,
        *,
        batch_size: int,
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the sums described at :meth:`LayerTape.squared_sums`.

        Raises:
            ValueError: If ``outputs`` has not one row for each sample.
        """
        if outputs.dim() == 0 or len(outputs) != batch_size:
            raise ValueError(
                f"A loop over samples needs outputs with {batch_size} rows, got shape {tuple(outputs.shape)}."
                " Give it one sample at a time, or the losses before their reduction."
            )
        cotangents = [torch.ones_like(outputs)] if cotangents is None else cotangents
        rows = (
            (row * weight.to(row.dtype)).sum()
            for cotangent in cotangents
            for row, weight in zip(outputs, cotangent, strict=True)
        )
        return squared_sums_by_loop(rows, self.params, into)


def accumulators(params: Mapping[str, Tensor], into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors of ``into`` for ``params``, or new zeros of the whole shape and of at least float32."""
    if into is not None:
        return {name: into[name] for name in params}
    return {
        name: torch.zeros(param.shape, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)
        for name, param in params.items()
    }
