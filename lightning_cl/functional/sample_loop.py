"""Sums over per-sample gradients by a plain loop: slow, right for any model, and the reference for the fast way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_cl.functional.layer_gradients import Power, powers
from lightning_cl.functional.sharding import ShardedSums, UnshardedWeights

__all__ = [
    "AbsoluteGradients",
    "SampleLoop",
    "SquaredGradients",
    "absolute_sums_by_loop",
    "accumulators",
    "squared_sums_by_loop",
]


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


class AbsoluteGradients(Protocol):
    """What the sensitivity of outputs needs: a :class:`LayerTape` or a :class:`SampleLoop`."""

    def absolute_sums(
        self,
        outputs: Tensor,
        cotangents: Iterable[Tensor] | None = None,
        *,
        batch_size: int,
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the sums described at :meth:`LayerTape.absolute_sums`."""
        ...


def squared_sums_by_loop(
    losses: Iterable[Tensor],
    params: Mapping[str, Tensor],
    into: Mapping[str, Tensor] | None = None,
    *,
    unsharded: UnshardedWeights | None = None,
    idle: bool = False,
) -> dict[str, Tensor]:
    r"""Return :math:`\sum_i (\nabla_\theta \ell_i)^2` by one backward pass for each loss: slow, right for any model.

    Of a sharded parameter the sums are over all ranks, which must give as many losses each.

    Args:
        losses: Scalar losses :math:`\ell_i`, best from a generator, so that one graph lives at a time.
        params: The parameters by name.
        into: Accumulators by name, which are added to and returned; new zeros (at least float32, in the placement of
            the parameter) by default.
        unsharded: Where parameters are sharded, what was gathered for the forward passes of the losses.
        idle: Add nothing: for a rank that has no sample left while the others have.

    Raises:
        ValueError: If a parameter is sharded and ``unsharded`` is not given.
    """
    return _power_sums(2, losses, params, into, unsharded, idle)


def absolute_sums_by_loop(
    losses: Iterable[Tensor],
    params: Mapping[str, Tensor],
    into: Mapping[str, Tensor] | None = None,
    *,
    unsharded: UnshardedWeights | None = None,
    idle: bool = False,
) -> dict[str, Tensor]:
    r"""Return :math:`\sum_i |\nabla_\theta \ell_i|`, otherwise as :func:`squared_sums_by_loop`."""
    return _power_sums(1, losses, params, into, unsharded, idle)


def _power_sums(
    power: Power,
    losses: Iterable[Tensor],
    params: Mapping[str, Tensor],
    into: Mapping[str, Tensor] | None,
    unsharded: UnshardedWeights | None,
    idle: bool,
) -> dict[str, Tensor]:
    if unsharded is None and (sharded := [name for name, param in params.items() if isinstance(param, DTensor)]):
        raise ValueError(
            f"Gradients of single losses do not reach sharded parameters such as {sharded[0]!r} without the tensors"
            " that were gathered for the forward pass: give `unsharded`."
        )
    totals = accumulators(params, into)
    for loss in losses if params else ():
        _add_powers(power, loss, params, totals, unsharded, idle)
    return totals


def _add_powers(
    power: Power,
    loss: Tensor,
    params: Mapping[str, Tensor],
    totals: Mapping[str, Tensor],
    unsharded: UnshardedWeights | None,
    idle: bool,
) -> None:
    sums = ShardedSums()

    def reducing(total: DTensor) -> Callable[[Tensor], Tensor]:
        def reduce(gradient: Tensor) -> Tensor:
            value = gradient.to(total.dtype)
            sums.add(total, torch.zeros_like(value) if idle else powers(value, power))
            # of all that autograd collects, this takes no memory
            return gradient.new_zeros(()).expand_as(gradient)

        return reduce

    graph = {name: param if unsharded is None else unsharded[name] for name, param in params.items()}
    tensors = {name: tensor for name, tensor in graph.items() if tensor is not None}
    handles: list[RemovableHandle] = []
    try:
        for name, tensor in tensors.items():
            total = totals[name]
            if isinstance(total, DTensor):
                # at once, layer by layer: all gradients of a sharded model would not fit
                handles.append(tensor.register_hook(reducing(total)))
        gradients = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    sums.flush()
    for name, gradient in zip(tensors, gradients, strict=True):
        total = totals[name]
        if gradient is not None and not isinstance(total, DTensor) and not idle:
            gradient = gradient.to(total.dtype)
            if power == 2:
                total.addcmul_(gradient, gradient)
            else:
                total.add_(gradient.abs())


class SampleLoop:
    """The same sums as :class:`LayerTape` by a plain loop, for parameters or models that a tape does not cover.

    Each sample takes a backward pass through the whole batch's graph, so give it batches of one sample.

    Args:
        params: The parameters by name.
        unsharded: Where parameters are sharded, what was gathered for the forward passes.
    """

    def __init__(self, params: Mapping[str, Tensor], unsharded: UnshardedWeights | None = None) -> None:
        self.params = dict(params)
        self.unsharded = unsharded

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
        losses = self._losses(outputs, cotangents, batch_size)
        return squared_sums_by_loop(losses, self.params, into, unsharded=self.unsharded)

    def absolute_sums(
        self,
        outputs: Tensor,
        cotangents: Iterable[Tensor] | None = None,
        *,
        batch_size: int,
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the sums described at :meth:`LayerTape.absolute_sums`.

        Raises:
            ValueError: If ``outputs`` has not one row for each sample.
        """
        losses = self._losses(outputs, cotangents, batch_size)
        return absolute_sums_by_loop(losses, self.params, into, unsharded=self.unsharded)

    @staticmethod
    def _losses(outputs: Tensor, cotangents: Iterable[Tensor] | None, batch_size: int) -> Iterable[Tensor]:
        if outputs.dim() == 0 or len(outputs) != batch_size:
            raise ValueError(
                f"A loop over samples needs outputs with {batch_size} rows, got shape {tuple(outputs.shape)}."
                " Give it one sample at a time, or the losses before their reduction."
            )
        cotangents = [torch.ones_like(outputs)] if cotangents is None else cotangents
        return (
            (row * weight.to(row.dtype)).sum()
            for cotangent in cotangents
            for row, weight in zip(outputs, cotangent, strict=True)
        )


def accumulators(params: Mapping[str, Tensor], into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors of ``into`` for ``params``, or new zeros of at least float32 in the parameters' placements."""
    if into is not None:
        return {name: into[name] for name in params}
    return {
        name: torch.zeros_like(
            param.detach(),
            dtype=torch.promote_types(param.dtype, torch.float32),
            memory_format=torch.contiguous_format,
        )
        for name, param in params.items()
    }
