"""What layers are called with while the module's own step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import run_step, undisturbed

__all__ = ["Record", "recording"]

# takes the name of a layer, its input, its output, and which positions are no padding
Record = Callable[[str, Tensor, Tensor, Tensor | None], object]


@contextmanager
def recording(
    pl_module: LightningModule, layers: Mapping[str, nn.Module], record: Record, adapter: BatchAdapter
) -> Iterator[Callable[[Any], None]]:
    """Call ``record`` for every call of the layers inside the block; yield what runs the module on a batch.

    The module is in evaluation mode and nothing of it changes, see :func:`~lightning_cl.core.capture.undisturbed`.

    Args:
        pl_module: The user's module.
        layers: The layers by name; each takes a tensor first and returns one.
        record: Called with a layer's name, input and output, and the mask of the batch.
        adapter: Reads the mask of padding.
    """
    present: list[Tensor | None] = [None]

    def hook(name: str, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        record(name, inputs.detach(), output.detach(), present[0])

    def run(batch: Any) -> None:
        mask = adapter.padding_mask(batch)
        present[0] = mask if mask is not None and mask.ndim == 2 else None
        run_step(pl_module, batch, adapter)

    # first of all hooks: those of FSDP2 take the weights away again
    handles = [
        layer.register_forward_hook(partial(hook, name), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    try:
        # the same samples whatever the task: nothing in evaluation mode is random
        with undisturbed(pl_module, seed=0):
            yield run
    finally:
        for handle in handles:
            handle.remove()
