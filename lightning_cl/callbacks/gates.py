"""How much the loss of any LightningModule feels each unit of its layers, over the task that is ending."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_cl.callbacks.layers import plain_class
from lightning_cl.callbacks.measuring import is_sharded, on_any_rank, single_rows
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import forward_loss, undisturbed
from lightning_cl.core.distributed import max_over_ranks, sum_over_ranks_
from lightning_cl.core.task_data import task_batches
from lightning_cl.functional.fisher import IGNORE_INDEX

__all__ = ["GateSensitivity", "num_units", "unit_dim"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_COMPARED = 3
_TOLERANCE = 1e-2


def unit_dim(layer: nn.Module) -> int | None:
    """Return the dimension of a layer's weight that counts its units, ``None`` for a layer without such units."""
    if isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        return 0
    # the transposed linear layer of GPT-2
    return 1 if plain_class(layer).__name__ == "Conv1D" else None


def num_units(layer: Any) -> int:
    """Return the number of output features or channels of a layer."""
    return int(layer.weight.shape[unit_dim(layer) or 0])


class GateSensitivity:
    r"""Measures :math:`\sum_n |\nabla_g \ell_n|` of gates :math:`g = 1` on the units of layers, in evaluation mode.

    :math:`\ell_n` is the module's own loss on a sample. The gates of a batch are told apart by sample, so that one
    backward pass serves them all, where its loss is a mean over samples, which :meth:`check` finds out; otherwise, and
    for samples of unlike numbers of tokens, they come from a loop over samples.

    Args:
        adapter: Reads batches.
        n_samples: Samples over all ranks; the whole task if ``None``.
    """

    def __init__(self, adapter: BatchAdapter, n_samples: int | None) -> None:
        self.adapter = adapter
        self.n_samples = n_samples
        self.by_sample: bool | None = None

    def check(self, pl_module: LightningModule, layers: Mapping[str, nn.Module], batch: Any) -> None:
        """Try the measurement on a training batch, before the first step, and choose between batches and samples.

        Raises:
            ValueError: If the module gives no loss, or its step calls none of the layers.
        """
        tokens, rows = self._tokens(batch), list(range(self.adapter.size(batch)))
        if tokens is not None:
            # they differ in nothing but the content
            rows = [row for row in rows if torch.equal(tokens[row], tokens[0])]
        # as many on every rank, because ranks of a sharded model must run the same forwards
        rows = rows[: -max_over_ranks(-min(len(rows), _COMPARED), pl_module.device)]
        joined, single = self._zeros(layers), self._zeros(layers)
        with undisturbed(pl_module, seed=0), _Gates(layers) as gates:
            self._measure(gates, pl_module, self.adapter.select(batch, rows), len(rows), joined)
            for row in rows:
                self._measure(gates, pl_module, self.adapter.select(batch, [row]), 1, single)
        unlike = [
            bool((joined[name] - value).abs().max() > _TOLERANCE * value.abs().max()) for name, value in single.items()
        ]
        by_sample = on_any_rank(any(unlike), pl_module)
        # decided once: a run that resumes at another batch must measure as the straight run does
        self.by_sample = by_sample if self.by_sample is None else self.by_sample
        if by_sample:
            rank_zero_info(
                f"The importance of the units of {type(pl_module).__name__} is measured by a loop over samples: its"
                " loss is no mean over samples."
            )

    def estimate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        layers: Mapping[str, nn.Module],
        seed: int,
        sample_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the sums over the current task's samples on all ranks, float32 [units], by layer.

        Args:
            trainer: The running Trainer.
            pl_module: The user's module.
            layers: Layers by name.
            seed: Seeds the generators that the module's step may draw from.
            sample_ids: Identities of samples to measure on in the place of the task's.
        """
        sums = self._zeros(layers)
        sharded = is_sharded(dict(pl_module.named_parameters()))
        with undisturbed(pl_module, seed), _Gates(layers) as gates:
            for batch, _ in task_batches(trainer, pl_module, self.adapter, self.n_samples, sample_ids):
                self._add(gates, pl_module, batch, sums, sharded)
        return {name: sum_over_ranks_(value) for name, value in sums.items()}

    def _add(
        self, gates: _Gates, pl_module: LightningModule, batch: Any, sums: Mapping[str, Tensor], sharded: bool
    ) -> None:
        tokens, size = self._tokens(batch), self.adapter.size(batch)
        uneven = tokens is not None and bool((tokens != tokens[:1]).any())
        empty = [False] * size if tokens is None else (tokens[:, 0] == 0).tolist()
        if self.by_sample or (on_any_rank(uneven, pl_module) if sharded else uneven):
            for row, idle in single_rows(size, pl_module, sharded):
                weight = 0 if idle or empty[row] else 1
                self._measure(gates, pl_module, self.adapter.select(batch, [row]), weight, sums)
        else:
            self._measure(gates, pl_module, batch, 0 if all(empty) else size, sums)

    @staticmethod
    def _measure(
        gates: _Gates, pl_module: LightningModule, batch: Any, weight: int, sums: Mapping[str, Tensor]
    ) -> None:
        """Add the gates' gradients of the loss times ``weight``, the samples that it is a mean over."""
        loss = gates.gradients_of(lambda: forward_loss(pl_module, batch), weight)
        if not gates.found:
            raise ValueError(
                f"No call of {list(sums)[:3]} was seen in a step of {type(pl_module).__name__}: there is no unit to"
                " measure. Name layers that the step calls by `include`."
            )
        for name, gradient in loss.items():
            if weight:
                sums[name].add_(gradient.flatten(1).abs().sum(0))

    def _zeros(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        devices = {name: next(layer.parameters()).device for name, layer in layers.items()}
        return {name: torch.zeros(num_units(layer), device=devices[name]) for name, layer in layers.items()}

    def _tokens(self, batch: Any) -> Tensor | None:
        """Return the tokens of each sample that a loss may count, [samples, ways to count]; ``None`` without tokens."""
        labels = self.adapter.labels(batch)
        if labels is not None and not labels.is_floating_point() and labels.ndim > 1:
            counted = (labels != IGNORE_INDEX).flatten(1)
            # labels that are shifted in the loss lose the first
            return torch.stack([counted.sum(1), counted[:, 1:].sum(1)], dim=1)
        mask = self.adapter.padding_mask(batch) if labels is None else None
        return None if mask is None else mask.flatten(1).sum(1, keepdim=True)


class _Gates:
    """Multiplies the outputs of layers by gates of 1: one for each unit of each sample, over all calls of a layer."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._stack = ExitStack()
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> _Gates:
        for name, layer in self._layers.items():
            # first of all hooks: others may replace the output
            self._stack.callback(layer.register_forward_hook(self._hook(name, layer), prepend=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def gradients_of(self, loss: Callable[[], Tensor], weight: int) -> dict[str, Tensor]:
        """Return the gradients at the gates that a loss passes, of the loss times ``weight``."""
        self.found = {}
        value = loss() * weight
        if not self.found:
            return {}
        # also for a weight of 0: ranks of a sharded model must run the same passes
        gradients = torch.autograd.grad(value, list(self.found.values()), allow_unused=True)
        return {name: g.float() for name, g in zip(self.found, gradients, strict=True) if g is not None}

    def _hook(self, name: str, layer: nn.Module) -> Any:
        def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if output.ndim < 2:
                return output
            if name not in self.found:
                shape = [1] * output.ndim
                dim = 1 if isinstance(layer, _CONVOLUTIONS) else output.ndim - 1
                shape[0], shape[dim] = len(output), output.shape[dim]
                self.found[name] = output.new_ones(shape).requires_grad_()
            return output * self.found[name]

        return multiply
