r"""Gradient projection memory (Saha, Garg, Roy 2021, arXiv:2103.09762): the space that a layer's inputs span.

A linear layer's outputs on old inputs :math:`x` stay while its weight moves by :math:`\Delta W` with
:math:`\Delta W x = 0`. The memory is an orthonormal basis M of the inputs of all tasks so far. The paper takes it from
the singular vectors of stored inputs :math:`R = [x_1, \ldots, x_n]`; here they are the eigenvectors of the Gram matrix
:math:`R R^\top`, which is a sum over samples, batches and ranks and needs no stored input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from lightning_cl.functional.subspaces import complement_basis, exact_dtype

__all__ = ["add_gram_", "empty_gram", "extend_basis", "input_shape"]

# elements of the patches of a convolution that exist at a time: 128 MB in float64
_PATCHES = 1 << 24
# sums of rows that span less show eigenvalues of up to one epsilon of their norm where they should be 0
_ROUNDING = 16


def input_shape(layer: nn.Linear | nn.Conv2d, *, constant: bool) -> tuple[int, int]:
    """Return the number of groups, and the length d of what a row of the flattened weight is multiplied by.

    Args:
        layer: The layer.
        constant: Whether a constant input of 1 counts, which the bias is multiplied by.

    Example:
        >>> input_shape(nn.Conv2d(4, 6, kernel_size=3, groups=2), constant=True)
        (2, 19)
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return groups, layer.weight.shape[1:].numel() + constant


@torch.no_grad()
def add_gram_(gram: Tensor, layer: nn.Linear | nn.Conv2d, inputs: Tensor, present: Tensor | None = None) -> Tensor:
    r"""Add :math:`\sum_n x_n x_n^\top` over samples and positions of a layer's inputs to ``gram``; return it.

    Args:
        gram: ``[g, d, d]``; if d is one more than the layer has inputs, the last of x is a constant 1.
        layer: Its weight ``[out, d, ...]`` is not read, so it may be a shard.
        inputs: What the layer is called with: ``[..., in]``, or images ``[n, in, height, width]``, whose patches under
            the kernel are the x.
        present: Boolean ``[n, T]``; positions of inputs ``[n, T, in]`` that are False do not count.

    Example:
        >>> add_gram_(torch.zeros(1, 2, 2), nn.Linear(1, 1), torch.tensor([[3.0], [1.0]]))
        tensor([[[10.,  4.],
                 [ 4.,  2.]]])
    """
    if isinstance(layer, nn.Conv2d):
        images = inputs if inputs.ndim == 4 else inputs[None]
        patches = len(gram) * gram.shape[1] * images.shape[2] * images.shape[3]
        for part in images.split(max(_PATCHES // max(patches, 1), 1)):
            _add(gram, _patches(layer, part))
        return gram
    if present is not None and inputs.ndim > 2 and inputs.shape[:2] == present.shape:
        inputs = inputs[present]
    return _add(gram, inputs.reshape(1, -1, inputs.shape[-1]))


def extend_basis(basis: Tensor, gram: Tensor, threshold: float) -> Tensor:
    r"""Return ``basis`` and behind it the fewest directions that bring the captured energy to the threshold.

    With :math:`\hat R = R - M M^\top R`, the added columns are the k leading left singular vectors of
    :math:`\hat R`, for the smallest k with

    .. math:: \| M M^\top R \|_F^2 + \| \hat R_k \|_F^2 \ge \epsilon \, \| R \|_F^2 .

    Directions without energy beyond rounding, of the inputs to float32 or of the sum to its dtype, are never added, so
    a threshold of 1 gives the span of the inputs. The decomposition is one in float64 where the device has it.

    Args:
        basis: Orthonormal columns M, ``[d, r]``.
        gram: :math:`R R^\top`, ``[d, d]``, summed in float64 or float32.
        threshold: :math:`\epsilon`, from 0 to 1.

    Returns:
        Columns ``[d, r + k]`` in the dtype of ``basis``.

    Example:
        >>> gram = torch.diag(torch.tensor([1.0, 9.0, 90.0]))
        >>> extend_basis(torch.zeros(3, 0), gram, threshold=0.9).abs()
        tensor([[0.],
                [0.],
                [1.]])
        >>> extend_basis(torch.zeros(3, 0), gram, threshold=0.91).shape
        torch.Size([3, 2])
    """
    # what rounding adds grows neither with d nor with the trace
    rounding = _ROUNDING * max(torch.finfo(gram.dtype).eps, torch.finfo(torch.float32).eps ** 2)
    gram = gram.to(exact_dtype(gram.device))
    free = complement_basis(basis.to(gram))
    energies, vectors = torch.linalg.eigh(free.T @ gram @ free)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    total = gram.trace()
    before = total - energies.sum() + energies.cumsum(0) - energies
    wanted = (before < threshold * total) & (energies > rounding * torch.linalg.matrix_norm(gram))
    return torch.cat([basis, (free @ vectors[:, : int(wanted.sum())]).to(basis.dtype)], dim=1)


def _patches(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Return what the kernel sees, ``[g, n * positions, in / g * kernel]``."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    patches = unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return patches.view(len(images), layer.groups, -1, patches.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)


def _add(gram: Tensor, rows: Tensor) -> Tensor:
    rows = rows.to(gram.dtype)
    if rows.shape[2] < gram.shape[1]:
        rows = pad(rows, (0, 1), value=1.0)
    return gram.baddbmm_(rows.mT, rows)


def empty_gram(layer: nn.Linear | nn.Conv2d, *, constant: bool, device: torch.device) -> Tensor:
    """Return zeros ``[g, d, d]`` for :func:`add_gram_`, on the device of the inputs; weights may be elsewhere."""
    groups, length = input_shape(layer, constant=constant)
    return torch.zeros(groups, length, length, dtype=exact_dtype(device), device=device)
