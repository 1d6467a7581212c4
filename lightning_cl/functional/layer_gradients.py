r"""Per-sample gradients of one layer's parameters, from the layer's input and the gradient at its output.

With :math:`a_i` the input of sample :math:`i` and :math:`g_i` the gradient of the loss at the output, a linear layer
has the per-sample gradient :math:`\sum_t g_{it} a_{it}^\top` over its positions :math:`t`. Powers
:math:`|\cdot|^p` summed over samples then need one matrix product where there is a single position,
:math:`(|g|^p)^\top |a|^p`, and otherwise a batched product over a few samples at a time. Convolutions are the same over
patches of their input, embeddings scatter rows, norms are elementwise. Any other layer without children is handled by
``vmap`` over its own vector-Jacobian product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

__all__ = [
    "PerSampleGradient",
    "Power",
    "Scratch",
    "add_power_sums_",
    "add_rank_one_powers_",
    "has_rank_one_gradients",
    "has_rule",
    "is_in_reach",
    "layer_input",
    "per_sample_gradient",
    "powers",
]

Power = Literal[1, 2]
"""Sums are of absolute values or of squares."""

# elements of per-sample gradients and patches held at once: 2 MB of float32 stay in the cache of a CPU core
_CPU_CHUNK = 1 << 19
_GPU_CHUNK = 1 << 26


class Scratch:
    """Memory that is used again for every chunk of a dataset, because fresh memory costs page faults each time."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a tensor of ``shape`` with any content, in dtype and on device of ``like``, until the next call."""
        count = math.prod(shape)
        memory = self._memory
        if memory is None or memory.numel() < count or (memory.dtype, memory.device) != (like.dtype, like.device):
            self._memory = memory = like.new_empty(count)
        return memory[:count].view(shape)


class PerSampleGradient(ABC):
    """The gradients of one parameter for all samples of one call of its layer, made a few samples at a time.

    Args:
        batch: Number of samples.
        footprint: Elements that :meth:`materialise` holds for one sample.
    """

    def __init__(self, batch: int, footprint: int) -> None:
        self.batch = batch
        self.footprint = footprint

    @abstractmethod
    def materialise(self, rows: slice, scratch: Scratch | None = None) -> Tensor:
        """Return the gradients of the samples ``rows``, ``[rows, *parameter.shape]``: new, or in ``scratch``."""

    def add_powers_(self, power: Power, total: Tensor, scratch: Scratch) -> None:
        """Add the sum over samples of the gradients' powers to ``total``."""
        _add_power_sums_by_chunks_([self], power, total, scratch)


def powers(gradient: Tensor, power: Power) -> Tensor:
    """Return :math:`|g|` or :math:`g^2`."""
    return gradient.square() if power == 2 else gradient.abs()


def add_power_sums_(parts: Sequence[PerSampleGradient], power: Power, total: Tensor, scratch: Scratch) -> None:
    """Add the sum over samples of the gradient's power to ``total``, of the parameter's shape.

    Args:
        parts: One entry for each call that the parameter took part in; they are summed before the power is taken.
        power: Of the absolute value.
        total: Changed in place.
        scratch: Overwritten.
    """
    if len(parts) == 1:
        parts[0].add_powers_(power, total, scratch)
    else:
        _add_power_sums_by_chunks_(parts, power, total, scratch)


def _add_power_sums_by_chunks_(
    parts: Sequence[PerSampleGradient], power: Power, total: Tensor, scratch: Scratch
) -> None:
    budget = _CPU_CHUNK if total.device.type == "cpu" else _GPU_CHUNK
    size = max(1, budget // sum(part.footprint for part in parts))
    for start in range(0, parts[0].batch, size):
        rows = slice(start, start + size)
        gradient = parts[0].materialise(rows, scratch)
        for part in parts[1:]:
            gradient += part.materialise(rows)
        total += (gradient.square_() if power == 2 else gradient.abs_()).sum(0)


class _Direct(PerSampleGradient):
    """Biases and elementwise scales: the gradients are no larger than the layer's output."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__(len(gradient), gradient[0].numel())
        self.gradient = gradient

    @override
    def materialise(self, rows: slice, scratch: Scratch | None = None) -> Tensor:
        return self.gradient[rows].clone()

    @override
    def add_powers_(self, power: Power, total: Tensor, scratch: Scratch) -> None:
        total += powers(self.gradient, power).sum(0)


class _Outer(PerSampleGradient):
    """Sum over positions of outer products: gradient ``[B, T, out]``, input ``[B, T, in]``."""

    def __init__(self, gradient: Tensor, inputs: Tensor) -> None:
        super().__init__(len(gradient), gradient.shape[-1] * inputs.shape[-1])
        self.gradient = gradient
        self.inputs = inputs

    @override
    def materialise(self, rows: slice, scratch: Scratch | None = None) -> Tensor:
        return _batched_product(self.gradient[rows].transpose(1, 2), self.inputs[rows], scratch)


class _Patches(PerSampleGradient):
    """Convolution: outer products over positions of the gradient and the patch of the input under the kernel."""

    def __init__(self, layer: nn.modules.conv._ConvNd, gradient: Tensor, inputs: Tensor) -> None:
        self.layer = layer
        self.gradient = gradient
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode).contiguous()
        weight = layer.weight.numel()
        patches = layer.in_channels * math.prod(layer.kernel_size) * gradient[0, 0].numel()
        super().__init__(len(gradient), weight + patches)

    @override
    def materialise(self, rows: slice, scratch: Scratch | None = None) -> Tensor:
        layer, inputs, gradient = self.layer, self.inputs[rows], self.gradient[rows]
        sample, channel, *pixel = inputs.stride()
        kernel = [stride * dilation for stride, dilation in zip(pixel, layer.dilation, strict=True)]
        step = [stride * hop for stride, hop in zip(pixel, layer.stride, strict=True)]
        patches = inputs.as_strided(
            (len(inputs), layer.in_channels, *layer.kernel_size, *gradient.shape[2:]),
            (sample, channel, *kernel, *step),
            inputs.storage_offset(),
        )
        by_group = (len(inputs) * layer.groups, -1, gradient[0, 0].numel())
        outer = _batched_product(gradient.reshape(by_group), patches.reshape(by_group).transpose(1, 2), scratch)
        return outer.view(len(inputs), *layer.weight.shape)


class _Rows(PerSampleGradient):
    """Embedding: the gradient ``[B, T, D]`` of each position is added to the row of its index ``[B, T]``."""

    def __init__(self, layer: nn.Embedding, gradient: Tensor, index: Tensor) -> None:
        self.num_rows = layer.num_embeddings
        if layer.padding_idx is not None:
            gradient = gradient.masked_fill((index == layer.padding_idx).unsqueeze(-1), 0.0)
        self.gradient = gradient
        self.index = index
        super().__init__(len(gradient), layer.weight.numel())

    @override
    def materialise(self, rows: slice, scratch: Scratch | None = None) -> Tensor:
        index = self.index[rows]
        table = self.gradient.new_zeros(len(index), self.num_rows, self.gradient.shape[-1])
        return table.scatter_add_(1, index.unsqueeze(-1).expand_as(self.gradient[rows]), self.gradient[rows])

    @override
    def add_powers_(self, power: Power, total: Tensor, scratch: Scratch) -> None:
        # one row for each different (sample, index), so that a repeated index is summed before the power is taken
        offset = torch.arange(self.batch, device=self.index.device).unsqueeze(1) * self.num_rows
        pairs, where = (self.index + offset).unique(return_inverse=True)
        sums = self.gradient.new_zeros(len(pairs), self.gradient.shape[-1])
        sums.index_add_(0, where.flatten(), self.gradient.flatten(0, 1))
        total.index_add_(0, pairs % self.num_rows, powers(sums, power))


class _Mapped(PerSampleGradient):
    """Any layer without children: ``vmap`` over samples of the layer's own vector-Jacobian product."""

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        gradient: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        weights: Mapping[str, Tensor],
    ) -> None:
        self.layer = layer
        self.name = name
        self.gradient = gradient
        # whatever has one row for each sample is mapped over, the rest is the same for all samples
        self.leaves = [*args, *kwargs.values()]
        self.positional = len(args)
        self.keywords = list(kwargs)
        self.dims = [
            0 if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(gradient) else None
            for leaf in self.leaves
        ]
        self.state = {f"layer.{key}": _as(value.detach(), gradient.dtype) for key, value in weights.items()}
        super().__init__(len(gradient), self.state[f"layer.{name}"].numel() + 2 * gradient[0].numel())

    @override
    def materialise(self, rows: slice, scratch: Scratch | None = None) -> Tensor:
        # without hooks, which would take this for a call of the user's model
        bare = _WithoutHooks(self.layer)
        dtype = self.gradient.dtype
        key = f"layer.{self.name}"

        def one_sample(gradient: Tensor, *leaves: Any) -> Tensor:
            leaves = tuple(
                leaf if dim is None else leaf.unsqueeze(0) for leaf, dim in zip(leaves, self.dims, strict=True)
            )
            keywords = dict(zip(self.keywords, leaves[self.positional :], strict=True))

            def run(parameter: Tensor) -> Tensor:
                state = {**self.state, key: parameter}
                return cast(Tensor, torch.func.functional_call(bare, state, leaves[: self.positional], keywords))

            pull_back = torch.func.vjp(run, self.state[key])[1]
            return cast(Tensor, pull_back(gradient.unsqueeze(0))[0])

        leaves = [
            leaf if dim is None else _as(leaf.detach()[rows], dtype)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        return torch.func.vmap(one_sample, in_dims=(0, *self.dims))(self.gradient[rows], *leaves)


def _batched_product(left: Tensor, right: Tensor, scratch: Scratch | None) -> Tensor:
    shape = (len(left), left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=None if scratch is None else scratch.take(shape, left))


class _WithoutHooks(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a layer's call, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


def is_in_reach(layer: nn.Module) -> bool:
    """Tell whether the layer's own parameters act on its input only: it has a rule here, or no children."""
    return has_rule(layer) or next(layer.children(), None) is None


def has_rule(layer: nn.Module) -> bool:
    """Tell whether the layer's gradients follow from its input and the gradient at its output, without its weights."""
    # by its forward: a subclass that changes it is another layer
    return type(layer).forward in _RULES


def per_sample_gradient(
    layer: nn.Module,
    name: str,
    gradient: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> PerSampleGradient:
    """Return the per-sample gradients of the parameter ``name`` of ``layer`` for one call.

    Args:
        layer: The layer.
        name: The parameter's name in the layer.
        gradient: Gradient at the layer's output, ``[B, ...]``, in the dtype to compute in.
        args: Positional arguments of the call; tensors with one row for each sample come first.
        kwargs: Keyword arguments of the call.
        weights: The layer's parameters at the call, by their names in the layer; as they are now if ``None``.

    Raises:
        ValueError: If the layer has no per-sample gradient.
    """
    if not has_rule(layer):
        present = dict(layer.named_parameters()) if weights is None else weights
        return _Mapped(layer, name, gradient, args, kwargs, present)
    rule = _RULES[type(layer).forward]
    return rule(layer, name, gradient, layer_input(args, kwargs).detach())


def has_rank_one_gradients(layer: nn.Module, inputs: Any) -> bool:
    """Tell whether each sample's weight gradient is one outer product: a linear layer with one position per sample."""
    return type(layer).forward is nn.Linear.forward and isinstance(inputs, Tensor) and inputs.dim() == 2


def add_rank_one_powers_(name: str, gradient_powers: Tensor, inputs: Tensor, power: Power, total: Tensor) -> None:
    r"""Add :math:`(|g|^p)^\top |a|^p` for the weight or :math:`\sum_i |g_i|^p` for the bias of a linear layer.

    Args:
        name: ``weight`` or ``bias``.
        gradient_powers: Powers of the gradients at the output ``[B, out]``, summed over several losses if there are.
        inputs: The layer's input, ``[B, in]``.
        power: :math:`p`.
        total: Changed in place.
    """
    if name == "bias":
        total += gradient_powers.sum(0)
    else:
        total.addmm_(gradient_powers.t(), powers(inputs.detach().to(total.dtype), power))


def _linear(layer: Any, name: str, gradient: Tensor, inputs: Tensor) -> PerSampleGradient:
    gradient = gradient.reshape(len(gradient), -1, layer.out_features)
    if name == "bias":
        return _Direct(gradient.sum(1))
    return _Outer(gradient, inputs.to(gradient.dtype).reshape(*gradient.shape[:2], layer.in_features))


def _convolution(layer: Any, name: str, gradient: Tensor, inputs: Tensor) -> PerSampleGradient:
    if name == "bias":
        return _Direct(gradient.flatten(2).sum(2))
    return _Patches(layer, gradient, inputs.to(gradient.dtype))


def _embedding(layer: Any, name: str, gradient: Tensor, inputs: Tensor) -> PerSampleGradient:
    if layer.scale_grad_by_freq:
        raise ValueError("`scale_grad_by_freq=True` makes a sample's gradient depend on the rest of the batch.")
    return _Rows(layer, gradient.reshape(len(gradient), -1, layer.embedding_dim), inputs.reshape(len(gradient), -1))


def _over_last(normalise: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, str, Tensor, Tensor], PerSampleGradient]:
    """Norms over trailing dimensions, whose weights have the shape of those dimensions."""

    def rule(layer: Any, name: str, gradient: Tensor, inputs: Tensor) -> PerSampleGradient:
        if name == "weight":
            gradient = gradient * normalise(layer, inputs).to(gradient.dtype)
        return _Direct(gradient.reshape(len(gradient), -1, *layer.normalized_shape).sum(1))

    return rule


def _over_channels(
    normalise: Callable[[Any, Tensor], Tensor],
) -> Callable[[Any, str, Tensor, Tensor], PerSampleGradient]:
    """Norms whose weights belong to dimension 1."""

    def rule(layer: Any, name: str, gradient: Tensor, inputs: Tensor) -> PerSampleGradient:
        if name == "weight":
            gradient = gradient * normalise(layer, inputs).to(gradient.dtype)
        return _Direct(gradient.reshape(*gradient.shape[:2], -1).sum(2))

    return rule


def _batch_norm(layer: Any, inputs: Tensor) -> Tensor:
    return F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)


_RULES: dict[Any, Callable[[Any, str, Tensor, Tensor], PerSampleGradient]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _over_last(lambda layer, x: F.layer_norm(x, layer.normalized_shape, eps=layer.eps)),
    nn.RMSNorm.forward: _over_last(lambda layer, x: F.rms_norm(x, layer.normalized_shape, eps=layer.eps)),
    nn.GroupNorm.forward: _over_channels(lambda layer, x: F.group_norm(x, layer.num_groups, eps=layer.eps)),
    nn.BatchNorm2d.forward: _over_channels(_batch_norm),  # that of BatchNorm1d and BatchNorm3d too
    nn.SyncBatchNorm.forward: _over_channels(_batch_norm),
}
