"""Moments of a random part of a tensor's elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_cl.functional.sparse_masks import global_indices, random_mask
from lightning_cl.optim.moments import MOMENTS, local

__all__ = ["SparseMoments"]


class SparseMoments:
    """The moments of the elements that a mask holds, as flat tensors of this rank's shard.

    The mask is a pure function of its settings, the parameter's number and the number of resets. Elements that the mask
    before it held too come first: their moments are bias-corrected estimates, which stay so.

    Args:
        parameter: The parameter, sharded or not.
        dtype: Of the moments.
        density: Fraction of the elements.
        key: The seed, and the number of the parameter.
    """

    def __init__(self, parameter: Parameter, dtype: torch.dtype, density: float, key: tuple[int, int]) -> None:
        self._parameter = parameter
        self._dtype = dtype
        self._density = density
        self._key = key

    def create(self) -> dict[str, Any]:
        """Return moments of zero for the elements of the first mask."""
        empty = torch.zeros(local(self._parameter).numel(), dtype=self._dtype, device=self._parameter.device)
        return self.compress(dict.fromkeys(MOMENTS, empty), 0)

    def compress(self, dense: dict[str, Tensor], resets: int, *, anew: bool = False) -> dict[str, Any]:
        """Return the state of the mask after ``resets`` resets, with its elements of flat dense moments.

        With ``anew`` the last of them kept nothing.
        """
        now = self._mask(resets)
        before = self._mask(resets - 1) if resets and not anew else torch.zeros_like(now)
        carried, new = self._places(now & before, 0.0), self._places(now & ~before, self._density)
        indices = torch.cat([carried, new])
        kept = {key: values.flatten()[indices].to(self._dtype) for key, values in dense.items()}
        # half the memory for all but giant tensors
        narrow = torch.int32 if now.numel() < 2**31 else torch.int64
        return {**kept, "indices": indices.to(narrow), "carried": len(carried), "anew": torch.tensor(float(anew))}

    def expand(self, state: dict[str, Any], key: str) -> Tensor:
        """Return a moment in the shape and placement of the parameter, zero outside of the mask."""
        shard = local(self._parameter)
        dense = torch.zeros(shard.numel(), dtype=self._dtype, device=shard.device)
        dense[state["indices"].long()] = state[key]
        dense = dense.view(shard.shape)
        like = self._parameter
        if isinstance(like, DTensor):
            return DTensor.from_local(
                dense, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
            )
        return dense

    def redraw(self, state: dict[str, Any], betas: tuple[float, float], *, anew: bool) -> dict[str, Any]:
        """Return the state of the next mask: what both hold keeps its moments, bias-corrected; others begin at zero.

        With ``anew`` all begin at zero.
        """
        step, carried = state["step"].item(), state["carried"]
        dense = {}
        for key, beta in zip(MOMENTS, betas, strict=True):
            state[key][carried:] /= 1 - beta**step
            if anew:
                state[key].zero_()
            dense[key] = local(self.expand(state, key))
        return self.compress(dense, int(state["resets"]) + 1, anew=anew)

    def _places(self, mask: Tensor, expected: float) -> Tensor:
        if isinstance(mask, FakeTensor):
            # a plan has no values to count
            return mask.new_zeros(round(expected * mask.numel()), dtype=torch.int64)
        return mask.nonzero().flatten()

    def _mask(self, resets: int) -> Tensor:
        return random_mask(global_indices(self._parameter).flatten(), self._density, *self._key, resets)
