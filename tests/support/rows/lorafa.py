"""LoRA-FA as a plain loop."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from contract import Row
from lightning_cl import LoRAFA
from lightning_cl.core.rng import derived_seed
from lightning_cl.functional import orthonormal_rows
from lora_loops import PlainLora, fresh_start, slots_loop
from toys import LoraToy


def one_for_all(layers: list[PlainLora], task: int) -> None:
    """Draw A before the first task."""
    for layer in layers if task == 0 else ():
        generator = torch.Generator().manual_seed(derived_seed("lora-fa", 0, layer.name, 0))
        layer.down = orthonormal_rows(*layer.down.shape, generator)


def loop(*, shared: bool, **settings: Any) -> Tensor:
    """B trains, on a frozen A: that drawn first, or LoRA's own for every task."""
    if shared:
        settings |= {"begin": one_for_all, "start": lambda layer, task: layer.down.detach()}
    return slots_loop(trained=lambda layer: [layer.up], **({"start": fresh_start} | settings))


ROWS = {
    "lora-fa": Row(LoRAFA, {"shared": True}, functools.partial(loop, shared=True), tolerance=1e-5, toy=LoraToy),
    "lora-fa-apart": Row(
        LoRAFA,
        {"init": "kaiming", "shared": False, "capacity": 8},
        functools.partial(loop, shared=False),
        tolerance=1e-5,
        toy=LoraToy,
    ),
}
