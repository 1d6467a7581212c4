r"""Gradients of several losses, and what they have in common with the gradient of a step.

The reference gradients :math:`r_1, \dots, r_K` are the rows of a matrix, or of one matrix for each weight tensor.
Everything runs on local shards as it is: the products are sums over weights, which the caller adds up over the ranks
that share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["add_references_", "gram_matrix", "reference_products"]

# columns to widen at a time: what stays in the cache of a CPU, and what keeps a GPU busy
_CPU_BLOCK = 1 << 16
_GPU_BLOCK = 1 << 22


@torch.no_grad()
def reference_products(references: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    r"""Return the products :math:`\langle r_k, g \rangle`, summed in float64, shape [K].

    Args:
        references: For each weight tensor of n weights the rows of all references, [K, n].
        grads: The gradient :math:`g`, one tensor of n weights for each.

    Example:
        >>> references = [torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])]
        >>> reference_products(references, [torch.tensor([1.0]), torch.tensor([-3.0, 1.0])])
        tensor([ 3., -3.], dtype=torch.float64)
    """
    total = references[0].new_zeros(len(references[0]), dtype=_wide(references[0]))
    for rows, grad in zip(references, grads, strict=True):
        flat = grad.reshape(-1)
        for start, stop in _blocks(rows):
            total += rows[:, start:stop].to(total.dtype) @ flat[start:stop].to(total.dtype)
    return total


@torch.no_grad()
def gram_matrix(references: Tensor) -> Tensor:
    r"""Return the products of the references with each other, :math:`\langle r_k, r_l \rangle`, in float64, [K, K].

    Args:
        references: One reference in each row, [K, N].

    Example:
        >>> gram_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[5., 2.],
                [2., 1.]], dtype=torch.float64)
    """
    count = len(references)
    total = references.new_zeros((count, count), dtype=_wide(references))
    for start, stop in _blocks(references):
        # in float64 also because float32 may mean less on a GPU, and the matrix must have no negative eigenvalue
        block = references[:, start:stop].to(total.dtype)
        total.addmm_(block, block.T)
    return total


@torch.no_grad()
def add_references_(grads: Sequence[Tensor], references: Sequence[Tensor], coefficients: Tensor) -> None:
    r"""Turn the gradient in place: :math:`g \leftarrow g + \sum_k v_k r_k`.

    Args:
        grads: The gradient :math:`g`, one tensor for each weight tensor.
        references: The rows of all references for each, [K, n].
        coefficients: :math:`v`, [K].

    Example:
        >>> gradient = torch.tensor([-3.0, 1.0])
        >>> add_references_([gradient], [torch.tensor([[1.0, 0.0]])], torch.tensor([3.0]))
        >>> gradient
        tensor([0., 1.])
    """
    for grad, rows in zip(grads, references, strict=True):
        if len(rows) == 1:
            grad.add_(rows[0].view(grad.shape), alpha=float(coefficients))
        else:
            grad.add_((coefficients.to(rows) @ rows).view(grad.shape))


def _wide(tensor: Tensor) -> torch.dtype:
    # Apple's devices have no float64
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _blocks(rows: Tensor) -> Iterator[tuple[int, int]]:
    columns = rows.shape[1]
    width = _CPU_BLOCK if rows.device.type == "cpu" else max(_GPU_BLOCK // len(rows), 1)
    return ((start, min(start + width, columns)) for start in range(0, columns, width))
