r"""Sums over samples of squared or absolute per-sample gradients, :math:`\sum_i |\nabla_\theta \ell_i|^p`.

They come from one backward pass. A :class:`LayerTape` keeps the input and the output edge of every layer that owns a
wanted parameter, asks autograd for the gradients at those outputs only (no weight gradient is computed) and forms the
powers from the two. It assumes
that dimension 0 of a layer's input counts the samples, and that a parameter acts through calls of the layer that owns
it. :meth:`LayerTape.uncovered` checks both against autograd; what it names is left to a
:class:`~lightning_cl.functional.sample_loop.SampleLoop`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_cl.functional.layer_gradients import (
    PerSampleGradient,
    Power,
    Scratch,
    add_power_sums_,
    add_rank_one_powers_,
    has_rank_one_gradients,
    has_rule,
    is_in_reach,
    layer_input,
    per_sample_gradient,
    powers,
)
from lightning_cl.functional.sample_loop import accumulators, squared_sums_by_loop
from lightning_cl.functional.sharding import ShardedSums, UnshardedWeights, check_layout, differing, root_mean_squares

__all__ = ["LayerTape"]


@dataclass
class _Call:
    """One call of a layer: what went in, and where in the graph its output is."""

    layer: nn.Module
    layer_name: str
    names: dict[str, str]  # the parameter's name in the layer -> its name in the model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[tuple[Tensor, int]]
    edge: GradientEdge
    shape: torch.Size  # of the output
    weights: dict[str, Tensor] | None  # of a sharded layer that needs them for its gradients


class LayerTape:
    r"""Record the calls of layers in a forward pass, then sum powers of per-sample gradients without a loop over them.

    A context manager: hooks stand while it is open, and each use of the records ends them, so one tape serves a whole
    dataset. The model must not mix samples: batch normalisation must be in eval mode.

    Under ``fully_shard``, all ranks must run the same passes. The powers of one parameter at a time stand in full on a
    rank, before they are summed over the ranks into a shard.

    Args:
        module: The model.
        names: Fully qualified names of the parameters wanted.

    Attributes:
        unsharded: What ``fully_shard`` gathered for the forward pass.

    Raises:
        ValueError: If a name is not a parameter of ``module``, or one is sharded otherwise than by ``fully_shard``.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with LayerTape(layer, ["weight"]) as tape:
        ...     loss = layer(torch.tensor([[1.0], [-3.0]])).sum()  # gradients 1 and -3, of sum -2
        ...     tape.squared_sums(loss, batch_size=2)
        {'weight': tensor([[10.]])}
    """

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        params = dict(module.named_parameters(remove_duplicate=False))
        if unknown := [name for name in names if name not in params]:
            raise ValueError(f"`names` holds {unknown[:3]}, which are no parameters of the module.")
        self.module = module
        self.params: dict[str, Tensor] = {name: params[name] for name in names}
        check_layout(self.params)
        self.unsharded = UnshardedWeights(module, self.params)
        self._calls: list[_Call] = []
        self._refused: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        self._recording = False
        self._scratch = Scratch()

    def __enter__(self) -> Self:
        self.unsharded.__enter__()
        owned = {id(param): name for name, param in self.params.items()}
        for layer_name, layer in self.module.named_modules():
            names = {local: owned[id(p)] for local, p in layer._parameters.items() if id(p) in owned}
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                self._handles.append(layer.register_forward_hook(_batch_norm_check(layer_name)))
            if names:
                # first of all hooks: others may replace the output
                hook = self._recorder(layer_name, names)
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
        self._recording = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._recording = False
        self._scratch = Scratch()
        self.unsharded.__exit__()
        self.clear()

    def clear(self) -> None:
        """Drop the records of a forward pass that is not going to be used."""
        self._calls.clear()
        self._refused.clear()

    def squared_sums(
        self,
        outputs: Tensor,
        cotangents: Iterable[Tensor] | None = None,
        *,
        batch_size: int,
        into: Mapping[str, Tensor] | None = None,
        retain_graph: bool = False,
        idle: bool = False,
    ) -> dict[str, Tensor]:
        r"""Return :math:`\sum_c \sum_i (\nabla_\theta \langle v_{ci}, z_i \rangle)^2` over samples :math:`i`.

        Args:
            outputs: :math:`z`: the scalar sum of the samples' losses (a mean times its count), one loss for each
                sample, or any outputs ``[B, ...]`` such as logits.
            cotangents: Gradients :math:`v_c` of a loss with respect to ``outputs``, each of its shape; ones by default.
                Squares are summed over several of them.
            batch_size: Number of samples in the forward pass.
            into: Accumulators by name, which are added to and returned; new zeros (at least float32, in the placement
                of the parameter) by default. The squares are formed in the dtype of the accumulators.
            retain_graph: Keep the graph and the records for another use.
            idle: Add nothing: for a rank of a sharded model that has no sample left while the others have.

        Returns:
            The sums by name, of a sharded parameter over all ranks; zeros for a parameter that took no part.

        Raises:
            ValueError: If a recorded layer was not called with one row for each sample.
            RuntimeError: If an input of a layer was changed in place after the call.
        """
        return self._power_sums(2, outputs, cotangents, batch_size, into, retain_graph, idle)

    def absolute_sums(
        self,
        outputs: Tensor,
        cotangents: Iterable[Tensor] | None = None,
        *,
        batch_size: int,
        into: Mapping[str, Tensor] | None = None,
        retain_graph: bool = False,
        idle: bool = False,
    ) -> dict[str, Tensor]:
        r"""Return :math:`\sum_c \sum_i |\nabla_\theta \langle v_{ci}, z_i \rangle|`, else as :meth:`squared_sums`."""
        return self._power_sums(1, outputs, cotangents, batch_size, into, retain_graph, idle)

    def _power_sums(
        self,
        power: Power,
        outputs: Tensor,
        cotangents: Iterable[Tensor] | None,
        batch_size: int,
        into: Mapping[str, Tensor] | None,
        retain_graph: bool,
        idle: bool,
    ) -> dict[str, Tensor]:
        totals = accumulators(self.params, into)
        with self._backward(retain_graph):
            if self._refused:
                name, reason = next(iter(self._refused.items()))
                raise ValueError(f"Per-sample gradients of {name!r} are out of reach: {reason}")
            calls_of = self._calls_by_name()
            summed: dict[int, Tensor] = {}  # powers over cotangents, for layers whose sums need only these
            for cotangent, last in _with_last(_given_or_ones(outputs, cotangents)):
                gradients = self._output_gradients(outputs, cotangent, retain_graph or not last)
                for number, gradient in gradients.items():
                    _check(self._calls[number], batch_size)
                    if self._is_rank_one(number, calls_of):
                        gradient = gradient.to(totals[next(iter(self._calls[number].names.values()))].dtype)
                        if number in summed:
                            summed[number] += powers(gradient, power)
                        else:
                            summed[number] = powers(gradient, power)
                sums = ShardedSums()
                for name, total in totals.items():
                    numbers = calls_of.get(name, [])
                    rank_one = any(number in summed for number in numbers)
                    if rank_one and not last:
                        continue
                    with sums.full(total) as full:
                        if rank_one and not idle:
                            self._add_rank_one_powers_(numbers[0], name, summed, power, full)
                        elif not idle and (parts := self._parts(name, numbers, gradients, total.dtype)):
                            add_power_sums_(parts, power, full, self._scratch)
                sums.flush()
        return totals

    def uncovered(
        self, losses: Tensor, *, batch_size: int, samples: int = 2, tolerance: float = 0.01
    ) -> dict[str, str]:
        r"""Compare with autograd, and return the parameters for which the tape is wrong, with the reason.

        Takes ``samples`` backward passes, so it is meant for one batch of a dataset; the graph and the records are
        kept. It finds parameters used outside their layer (tied weights, the projections of
        :class:`~torch.nn.MultiheadAttention`, parameters of modules with children), layers whose rows are not samples,
        and models that mix samples.

        Args:
            losses: One loss for each sample, ``[B]``, of this forward pass. Any function of the outputs will do.
            batch_size: Number of samples in the forward pass.
            samples: How many of the samples to compare, from the first on; of a sharded model the same on all ranks.
            tolerance: Largest relative error, of the root of the squared gradients, that is taken for rounding.

        Raises:
            ValueError: If ``losses`` has another shape.
        """
        if losses.shape != (batch_size,):
            raise ValueError(
                f"`losses` must have shape ({batch_size},), one for each sample, got {tuple(losses.shape)}."
            )
        chosen = range(min(samples, batch_size))
        reasons = dict(self._refused)
        expected = squared_sums_by_loop((losses[i] for i in chosen), self.params, unsharded=self.unsharded)
        found = accumulators(self.params, None)
        with self._backward(retain_graph=True):
            calls_of = self._calls_by_name()
            for i in chosen:
                cotangent = torch.zeros_like(losses)
                cotangent[i] = 1.0
                gradients = self._output_gradients(losses, cotangent, retain_graph=True)
                sums = ShardedSums()
                for name, total in found.items():
                    numbers = calls_of.get(name, [])
                    with sums.full(total) as full:
                        try:
                            for number in numbers:
                                _check(self._calls[number], batch_size)
                            if parts := self._parts(name, numbers, gradients, total.dtype):
                                add_power_sums_(parts, 2, full, self._scratch)
                        except (RuntimeError, ValueError) as error:
                            # whatever a foreign layer cannot do, the caller can do by a loop
                            reasons.setdefault(name, str(error))
                sums.flush()
        if not any(root_mean_squares(expected).values()):
            return dict.fromkeys(self.params, "the losses compared depend on no parameter, so nothing is known.")
        for name in differing(found, expected, tolerance):
            reasons.setdefault(name, "it also acts outside calls of the layer that owns it, or samples are mixed.")
        return {name: reasons[name] for name in self.params if name in reasons}

    def _recorder(self, layer_name: str, names: dict[str, str]) -> Callable[..., Tensor | None]:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not self._recording or not torch.is_grad_enabled():
                return None
            if not isinstance(output, Tensor) or not is_in_reach(layer):
                reason = f"layer {layer_name!r} returns several tensors or has child modules."
                self._refused.update(dict.fromkeys(names.values(), reason))
                return None
            if not output.requires_grad:
                return None
            replaced = None
            if output._is_view():
                # what changes a view in place rewrites the history of its base, and the edge would lead nowhere
                output = replaced = torch.ops.aten._unsafe_view(output, output.shape)
            tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
            versions = [(tensor, tensor._version) for tensor in tensors]
            # the edge, not the tensor: an activation in place makes the tensor mean something else
            edge = get_gradient_edge(output)
            weights = None
            if not has_rule(layer) and any(isinstance(self.params[name], DTensor) for name in names.values()):
                # copied while they are gathered; layers without a rule are norms and other small ones
                weights = {key: parameter.detach().clone() for key, parameter in layer.named_parameters()}
            self._calls.append(_Call(layer, layer_name, names, args, kwargs, versions, edge, output.shape, weights))
            return replaced

        return record

    @contextmanager
    def _backward(self, retain_graph: bool) -> Iterator[None]:
        # activation checkpointing calls layers again in here; autocast would round the squares
        device = next(iter(self.params.values())).device.type if self.params else "cpu"
        if not self._recording:
            raise RuntimeError("A LayerTape holds records only inside its `with` block.")
        self._recording = False
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                yield
        finally:
            self._recording = True
            if not retain_graph:
                self.clear()

    def _calls_by_name(self) -> dict[str, list[int]]:
        calls_of: dict[str, list[int]] = {}
        for number, call in enumerate(self._calls):
            for name in call.names.values():
                calls_of.setdefault(name, []).append(number)
        return calls_of

    def _is_rank_one(self, number: int, calls_of: Mapping[str, list[int]]) -> bool:
        call = self._calls[number]
        once = all(calls_of[name] == [number] for name in call.names.values())
        return once and has_rank_one_gradients(call.layer, layer_input(call.args, call.kwargs))

    def _add_rank_one_powers_(
        self, number: int, name: str, summed: Mapping[int, Tensor], power: Power, total: Tensor
    ) -> None:
        call = self._calls[number]
        local = next(local for local, of in call.names.items() if of == name)
        add_rank_one_powers_(local, summed[number], layer_input(call.args, call.kwargs), power, total)

    def _output_gradients(self, outputs: Tensor, cotangent: Tensor, retain_graph: bool) -> dict[int, Tensor]:
        """Return the gradients at the outputs of the calls that ``outputs`` depends on, by number of the call."""
        edges = [call.edge for call in self._calls]
        if not edges:
            return {}
        gradients = torch.autograd.grad(
            outputs, edges, cotangent.to(outputs.dtype), retain_graph=retain_graph, allow_unused=True
        )
        return {number: gradient for number, gradient in enumerate(gradients) if gradient is not None}

    def _parts(
        self, name: str, numbers: list[int], gradients: Mapping[int, Tensor], dtype: torch.dtype
    ) -> list[PerSampleGradient]:
        return [
            per_sample_gradient(call.layer, local, gradients[number].to(dtype), call.args, call.kwargs, call.weights)
            for number in numbers
            if number in gradients
            for call in (self._calls[number],)
            for local, of in call.names.items()
            if of == name
        ]


def _check(call: _Call, batch_size: int) -> None:
    inputs = layer_input(call.args, call.kwargs)
    rows = [tensor.shape[0] if tensor.dim() else 0 for tensor in (inputs,) if isinstance(tensor, Tensor)]
    rows.append(call.shape[0] if call.shape else 0)
    if any(count != batch_size for count in rows):
        raise ValueError(
            f"layer {call.layer_name!r} was called with {rows[0]} rows for {batch_size} samples; dimension 0 of its"
            " input and output must count samples. Use a SampleLoop for its parameters."
        )
    if any(tensor._version != version for tensor, version in call.versions):
        raise RuntimeError(f"An input of layer {call.layer_name!r} was changed in place after the call.")


def _batch_norm_check(layer_name: str) -> Callable[..., None]:
    def check(layer: Any, args: Any, output: Any) -> None:
        if layer.training or layer.running_mean is None:
            raise ValueError(
                f"Batch normalisation {layer_name!r} uses the statistics of the batch, so samples have no gradients of"
                " their own. Call `eval()` on it, and keep `track_running_stats=True`."
            )

    return check


def _given_or_ones(outputs: Tensor, cotangents: Iterable[Tensor] | None) -> Iterable[Tensor]:
    return [torch.ones_like(outputs)] if cotangents is None else cotangents


def _with_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Pair each item with whether it is the last."""
    iterator = iter(items)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following
