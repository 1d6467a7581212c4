"""Whether the first dimension of what a layer gets is that of the samples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_cl.adapters.slot import Slot
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.recording import recording

__all__ = ["check_batch_first"]


def check_batch_first(
    pl_module: LightningModule, slots: Collection[Slot], batch: Any, adapter: BatchAdapter, user: str
) -> None:
    """Run the module, unseen, on two numbers of samples, and refuse adapted layers that do not get one row for each.

    One number says little: a sequence may be as long as the batch.

    Args:
        pl_module: The user's module.
        slots: The slots of its layers.
        batch: A batch, of which one sample is left out, or doubled if it is the only one.
        adapter: Reads batches.
        user: The callback, for errors.

    Raises:
        ValueError: If there is such a layer.
    """
    size = adapter.size(batch)
    other = adapter.select(batch, [0, 0] if size == 1 else range(size - 1))
    for samples in (batch, other):
        found = _shapes(pl_module, slots, samples, adapter)
        rows = adapter.size(samples)
        for name, shape in found:
            if shape[0] != rows:
                raise ValueError(
                    f"`{user}` gives each sample the adapter of its own task, so the first dimension of what an adapted"
                    f" layer gets must be that of the samples, and {name!r} gets the shape {list(shape)} for {rows} of"
                    " them. Let it get the batch first (such as `batch_first=True`), or leave it out of"
                    " `target_modules`."
                )


def _shapes(
    pl_module: LightningModule, slots: Collection[Slot], batch: Any, adapter: BatchAdapter
) -> list[tuple[str, torch.Size]]:
    """Return the name and the shape of its input for each call of an adapted layer."""
    found: list[tuple[str, torch.Size]] = []

    def look(name: str, inputs: Tensor, *_: Any) -> None:
        found.append((name, inputs.shape))

    layers = {slot.name: slot.down(slot.past) for slot in slots}
    with recording(pl_module, layers, look, adapter) as run, torch.no_grad():
        run(batch)
    return found
