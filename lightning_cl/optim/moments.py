"""How an optimizer keeps its running averages: in the parameter's dtype, in another, or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_cl.functional.rounding import stochastic_bfloat16
from lightning_cl.functional.sparse_masks import derived_key

__all__ = ["MOMENTS", "StateDtype", "Storage", "local"]

StateDtype = Literal["float32", "bfloat16", "8bit"]

MOMENTS = ("exp_avg", "exp_avg_sq")

# as bitsandbytes does, small tensors stay as they are
_SMALLEST_IN_8_BITS = 4096
_BLOCKS = (256, 128, 64)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Storage:
    """Moments of one parameter in its state: how they are made, read and written.

    Args:
        parameter: The parameter, sharded or not.
        dtype: ``"float32"``, ``"bfloat16"`` (rounded stochastically), ``"8bit"`` (blockwise by bitsandbytes, for
            tensors of 4096 elements or more with rows that are a multiple of 64), or ``None`` for the parameter's own,
            but float32 for float16.
    """

    def __init__(self, parameter: Parameter, dtype: StateDtype | None) -> None:
        self._parameter = parameter
        row = prod(parameter.shape[1:])
        blocks = [block for block in _BLOCKS if row % block == 0]
        # blocks within rows are the same blocks in every sharding
        self.block = blocks[0] if blocks and parameter.dim() > 1 and parameter.numel() >= _SMALLEST_IN_8_BITS else 0
        if dtype != "8bit":
            self.block = 0
        elif (
            self.block
            and isinstance(parameter, DTensor)
            and not all(p.is_replicate() or p.is_shard(0) for p in parameter.placements)
        ):
            raise ValueError(f"`state_dtype='8bit'` needs weights sharded by rows, got {parameter.placements}.")
        # in float16 a second moment overflows, and `eps` is zero
        own = torch.float32 if parameter.dtype == torch.float16 else parameter.dtype
        stored = {None: own, "float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.float32}
        self.dtype = torch.uint8 if self.block else stored[dtype]
        # computed on in place, without a copy
        self.direct = not self.block and dtype != "bfloat16"

    def create(self) -> dict[str, Tensor]:
        """Return moments of zero."""
        state: dict[str, Tensor] = {}
        for key in MOMENTS:
            layout = torch.contiguous_format if self.block else torch.preserve_format
            state[key] = torch.zeros_like(self._parameter, dtype=self.dtype, memory_format=layout)
            if self.block:
                flat = local(state[key]).flatten(1)
                scales = torch.zeros(len(flat), flat.shape[1] // self.block, device=flat.device)
                state[f"{key}_scale"] = self._placed(scales)
                self.write(state, key, torch.zeros_like(local(state[key]), dtype=torch.float32), ())
        return state

    def read(self, state: dict[str, Any], key: str) -> Tensor:
        """Return the local shard of a moment: what is stored, or a float32 copy of it."""
        stored = local(state[key])
        if self.block:
            scales = local(state[f"{key}_scale"]).flatten()
            values: Tensor = _bitsandbytes().dequantize_blockwise(
                stored, scales, _code(key, stored), self.block, torch.float32
            )
            return values
        return stored if self.direct else stored.float()

    def write(self, state: dict[str, Any], key: str, values: Tensor, draw: Sequence[int]) -> None:
        """Store what :meth:`read` returned a copy of; ``draw`` is what random rounding is a pure function of."""
        stored = local(state[key])
        if self.block:
            quantized, scales = _bitsandbytes().quantize_blockwise(values, _code(key, stored), self.block)
            stored.copy_(quantized.view_as(stored))
            local(state[f"{key}_scale"]).copy_(scales.view_as(local(state[f"{key}_scale"])))
        elif not self.direct:
            generator = torch.Generator(stored.device).manual_seed(derived_key(*draw, MOMENTS.index(key)))
            stored.copy_(stochastic_bfloat16(values, generator))

    def _placed(self, values: Tensor) -> Tensor:
        like = self._parameter
        if not isinstance(like, DTensor):
            return values
        shape = torch.Size((like.shape[0], values.shape[1]))
        return DTensor.from_local(values, like.device_mesh, like.placements, shape=shape, stride=(values.shape[1], 1))


def _code(key: str, like: Tensor) -> Tensor:
    if isinstance(like, FakeTensor):
        # a plan has no values, and what it makes must not stay in the cache
        return like.new_empty(256, dtype=torch.float32)
    # the second moment has no sign
    return _make_code(key == MOMENTS[0], like.device)


@lru_cache
def _make_code(signed: bool, device: torch.device) -> Tensor:
    code: Tensor = import_module("bitsandbytes.functional").create_dynamic_map(signed=signed)
    return code.to(device)


def _bitsandbytes() -> Any:
    try:
        import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError("`state_dtype='8bit'` needs bitsandbytes: `pip install bitsandbytes`.") from error
    return torch.ops.bitsandbytes
