"""O-LoRA as a plain loop."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from contract import Row
from lightning_cl import OLoRA
from lora_loops import PlainLora, slots_loop
from toys import LoraToy

STRENGTH = 0.2


def penalty(layers: list[PlainLora], form: str) -> Tensor | float:
    """The penalty in the loss, task by task of those that are finished."""
    total: Tensor | float = 0.0
    for layer in layers:
        for past, _ in layer.finished:
            if form == "squared":
                total = total + STRENGTH * (layer.down @ past.mT).square().sum()
            else:
                cosines = normalize(layer.down, dim=1) @ normalize(past, dim=1).mT
                total = total + 10 * STRENGTH * cosines.square().mean() / len(layers)
    return total


def loop(form: str, **settings: Any) -> Tensor:
    """The whole stream."""
    return slots_loop(penalty=functools.partial(penalty, form=form), **settings)


ROWS = {
    "o-lora": Row(
        OLoRA, {"strength": STRENGTH, "capacity": 8}, functools.partial(loop, "squared"), tolerance=1e-5, toy=LoraToy
    ),
    "o-lora-cosine": Row(
        OLoRA,
        {"strength": 10 * STRENGTH, "form": "cosine", "capacity": 8},
        functools.partial(loop, "cosine"),
        tolerance=1e-5,
        toy=LoraToy,
    ),
}
