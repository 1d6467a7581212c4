"""The diagonal Fisher information of any LightningModule over the task that is ending."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from typing_extensions import override

from lightning_cl.callbacks.measuring import Measurement, is_sharded, on_any_rank, single_rows, sum_over_samples
from lightning_cl.core.batches import BatchAdapter, next_labels
from lightning_cl.core.capture import OutputCapture, forward_loss, run_step, undisturbed
from lightning_cl.core.checks import check_choice
from lightning_cl.core.distributed import max_over_ranks
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import local
from lightning_cl.functional.fisher import (
    IGNORE_INDEX,
    batched_fisher,
    empirical_fisher,
    exact_fisher,
    sampled_fisher,
)
from lightning_cl.functional.per_sample import LayerTape
from lightning_cl.functional.sample_loop import SampleLoop, accumulators, squared_sums_by_loop
from lightning_cl.functional.sharding import differing

__all__ = ["Estimator", "FisherEstimator"]

Estimator = Literal["empirical", "sampled", "exact", "batched"]
_COMPARED = 3
_TOLERANCE = 1e-2


class FisherEstimator(Measurement):
    r"""Measures :math:`F = \frac{1}{N} \sum_n (\nabla_\theta \ell_n)^2` with the user's own step, in evaluation mode.

    ``"empirical"`` squares the gradients of the module's own loss on single samples, whatever that loss is; they come
    from whole batches where the loss is a mean over samples and the layers allow it, which :meth:`check` finds out, and
    from a loop over samples otherwise. ``"sampled"`` and ``"exact"`` need class scores, which are captured.

    Args:
        fisher: ``"empirical"``, ``"sampled"``, ``"exact"`` or ``"batched"``.
        adapter: Reads batches.
        n_samples: Samples over all ranks; the whole task if ``None``.
        logits: Submodule that returns the class scores; found by itself if ``None``.

    Raises:
        ValueError: If ``fisher`` is unknown.
    """

    quantity: ClassVar[str] = "Fisher information"

    def __init__(self, fisher: Estimator, adapter: BatchAdapter, n_samples: int | None, logits: str | None) -> None:
        check_choice("fisher", fisher, get_args(Estimator))
        self.fisher = fisher
        self.adapter = adapter
        self.n_samples = n_samples
        self.logits = logits
        # the scores of a position are for the label of the next one, as in causal language models
        self._shifted = False

    @override
    def check(self, pl_module: LightningModule, parameters: Mapping[str, Parameter], batch: Any) -> None:
        """Try the estimator on a training batch, before the first step, and choose between batches and samples.

        Raises:
            ValueError: If the module gives no loss or no class scores, or has no labels where they are needed.
        """
        if self.fisher == "batched" and not pl_module.automatic_optimization:
            raise ValueError(
                "`fisher='batched'` runs the module's `training_step`, which under manual optimization would step the"
                " optimizer. Use 'empirical', 'sampled' or 'exact'."
            )
        part = self._few(batch, pl_module)
        with undisturbed(pl_module, seed=0), LayerTape(pl_module, list(parameters)) as tape:
            if self.fisher == "batched":
                forward_loss(pl_module, part)
                by_sample = False
            elif self._uses_logits(pl_module):
                with OutputCapture(pl_module, self.logits) as capture:
                    loss = run_step(pl_module, part, self.adapter)
                    self._shifted = on_any_rank(self._predicts_next(capture.output, part, loss), pl_module)
                    scores = capture.output.flatten(1).logsumexp(1)
                    unsure = tape.uncovered(scores, batch_size=len(scores))
                    by_sample = on_any_rank(bool(unsure), pl_module)
                    # labels or scores that do not fit show here, and not at the task's end
                    self._sums_from_logits(
                        SampleLoop(parameters, tape.unsharded) if by_sample else tape,
                        capture.output,
                        part,
                        torch.arange(len(scores)),
                        0,
                        None,
                    )
            else:
                by_sample = on_any_rank(not self._agrees(tape, pl_module, part), pl_module)
        # decided once: a run that resumes at another batch must measure as the straight run does
        self.by_sample = by_sample if self.by_sample is None else self.by_sample
        if by_sample:
            rank_zero_info(
                f"The Fisher information of {type(pl_module).__name__} is measured by a loop over samples: its loss is"
                " no mean over samples, or a layer has no rule for per-sample gradients."
            )

    @override
    def sums_over(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        pl_module: LightningModule,
        parameters: Mapping[str, Tensor],
        seed: int,
    ) -> tuple[dict[str, Tensor], float]:
        """Return the sums of squares over samples of all ranks, as local shards, and the number of samples.

        Args:
            batches: This rank's batches on the device, with the identities of their samples, int64 [n].
            pl_module: The user's module.
            parameters: The parameters by name.
            seed: Seeds the labels of ``"sampled"``.
        """
        sums = accumulators(parameters, None)
        # what was frozen since the fit began matters nothing to this task
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        count = 0
        with undisturbed(pl_module, seed), LayerTape(pl_module, list(parameters)) as tape:
            for batch, sample_ids in batches:
                if self._uses_logits(pl_module):
                    count += self._add_from_logits(tape, pl_module, batch, sample_ids, seed, sums)
                else:
                    count += self._add_from_losses(tape, pl_module, batch, sums)
        return sum_over_samples(sums, count, pl_module)

    @override
    def rehearse(
        self, pl_module: LightningModule, parameters: Mapping[str, Parameter], batch: Any
    ) -> dict[str, Tensor]:
        """Do with a batch of any values, or none, what :meth:`estimate` does with those of a task, for its memory.

        Returns:
            Sums in the placement of each parameter.
        """
        size = self.adapter.size(batch)
        sums = accumulators(parameters, None)
        with undisturbed(pl_module, seed=0), LayerTape(pl_module, list(parameters)) as tape:
            loss = forward_loss(pl_module, batch) * size
            if self.fisher == "batched":
                batched_fisher(tape.params, loss, size, into=sums, unsharded=tape.unsharded)
            else:
                tape.squared_sums(loss, batch_size=size, into=sums)
        return {name: local(value) for name, value in sums.items()}

    def _add_from_losses(
        self, tape: LayerTape, pl_module: LightningModule, batch: Any, sums: Mapping[str, Tensor]
    ) -> int:
        """Add the squares of the module's own losses on a batch to ``sums``; return the samples that count."""
        supervised = self._supervised_part(batch)
        size, sharded = self.adapter.size(supervised), is_sharded(tape.params)
        if size:
            batch = supervised
        elif not sharded:
            return 0
        if self.fisher == "batched":
            loss = forward_loss(pl_module, batch) * size
            batched_fisher(tape.params, loss, size, into=sums, unsharded=tape.unsharded)
            tape.clear()
        elif self.by_sample or self._is_uneven(supervised, pl_module, sharded):
            for row, idle in single_rows(size, pl_module, sharded):
                loss = forward_loss(pl_module, self.adapter.select(batch, [row]))
                if self.by_sample:
                    # the open tape must not keep the graph of every sample
                    tape.clear()
                    squared_sums_by_loop([loss], tape.params, sums, unsharded=tape.unsharded, idle=idle)
                else:
                    tape.squared_sums(loss, batch_size=1, into=sums, idle=idle)
        else:
            loss = forward_loss(pl_module, batch) * size
            tape.squared_sums(loss, batch_size=self.adapter.size(batch), into=sums, idle=size == 0)
        return size

    def _add_from_logits(
        self,
        tape: LayerTape,
        pl_module: LightningModule,
        batch: Any,
        sample_ids: Tensor,
        seed: int,
        sums: Mapping[str, Tensor],
    ) -> int:
        """Add the squares of gradients of class scores on a batch to ``sums``; return the samples that count."""
        if not self.by_sample:
            logits = self._captured(pl_module, batch)
            return self._sums_from_logits(tape, logits, batch, sample_ids, seed, sums)
        loop, count = SampleLoop(tape.params, tape.unsharded), 0
        for row, idle in single_rows(self.adapter.size(batch), pl_module, is_sharded(tape.params)):
            single = self.adapter.select(batch, [row])
            logits = self._captured(pl_module, single)
            tape.clear()
            if idle:
                # gradients of 0
                logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0)
            counted = self._sums_from_logits(loop, logits, single, sample_ids[row : row + 1], seed, sums)
            count += 0 if idle else counted
        return count

    def _captured(self, pl_module: LightningModule, batch: Any) -> Tensor:
        with OutputCapture(pl_module, self.logits) as capture:
            run_step(pl_module, batch, self.adapter)
        return capture.output

    def _uses_logits(self, pl_module: LightningModule) -> bool:
        return self.fisher in ("sampled", "exact") or not pl_module.automatic_optimization

    def _sums_from_logits(
        self,
        tape: LayerTape | SampleLoop,
        logits: Tensor,
        batch: Any,
        sample_ids: Tensor,
        seed: int,
        into: Mapping[str, Tensor] | None,
    ) -> int:
        """Add the sums of a batch to ``into``; return the samples that count."""
        labels = self.adapter.labels(batch)
        if self.fisher == "exact":
            return exact_fisher(tape, logits, into=into).count
        if self.fisher == "sampled":
            usable = labels if labels is not None and labels.shape == logits.shape[:-1] else None
            if usable is not None and self._shifted:
                usable = next_labels(usable)
            uniform = _uniform(seed, sample_ids, logits.shape[:-1])
            return sampled_fisher(tape, logits, uniform, labels=usable, into=into).count
        if labels is None:
            raise ValueError("`fisher='empirical'` needs labels in the batch; 'sampled' and 'exact' need none.")
        return empirical_fisher(tape, logits, labels, into=into).count

    def _predicts_next(self, logits: Tensor, batch: Any, loss: Tensor | None) -> bool:
        """Return whether the module's loss is that of labels shifted by one position, and not of the labels as is."""
        labels = self.adapter.labels(batch)
        if loss is None or labels is None or labels.ndim < 2 or labels.shape != logits.shape[:-1]:
            return False
        plain, shifted = (
            cross_entropy(logits.flatten(0, -2).float(), target.flatten(), ignore_index=IGNORE_INDEX)
            for target in (labels, next_labels(labels))
        )
        loss = loss.to(plain.dtype)
        return bool(torch.isclose(loss, shifted, rtol=_TOLERANCE) & ~torch.isclose(loss, plain, rtol=1e-6))

    def _agrees(self, tape: LayerTape, pl_module: LightningModule, part: Any) -> bool:
        """Return whether squares taken from a batch equal those of the module's losses on its single samples."""
        size = self.adapter.size(part)
        expected = squared_sums_by_loop(
            self._single_losses(tape, pl_module, part), tape.params, unsharded=tape.unsharded
        )
        try:
            found = tape.squared_sums(forward_loss(pl_module, part) * size, batch_size=size)
        except (RuntimeError, ValueError):
            return False
        return not differing(found, expected, _TOLERANCE)

    def _single_losses(self, tape: LayerTape, pl_module: LightningModule, batch: Any) -> Iterator[Tensor]:
        for row in range(self.adapter.size(batch)):
            loss = forward_loss(pl_module, self.adapter.select(batch, [row]))
            tape.clear()
            yield loss

    def _few(self, batch: Any, pl_module: LightningModule) -> Any:
        """Return a few samples to compare, of different classes if possible, because a loss may weigh classes.

        As many on every rank, because ranks of a sharded model must run the same forwards.
        """
        supervised = self._supervised_part(batch)
        rows, labels = list(range(self.adapter.size(supervised))), self.adapter.labels(supervised)
        if labels is not None and labels.ndim == 1:
            values = labels.tolist()
            rows.sort(key=lambda row: values.index(values[row]) != row)
        count = -max_over_ranks(-min(len(rows), _COMPARED), pl_module.device)
        # without labels nothing agrees, which is safe: the loop over samples is always right
        return self.adapter.select(supervised, rows[:count]) if count else self.adapter.select(batch, [0])

    def _weights(self, batch: Any) -> list[Tensor]:
        """Return the supervised positions of each sample, [B]; of labels that are shifted in the loss, both ways."""
        labels = self.adapter.labels(batch)
        if labels is None or labels.is_floating_point():
            return []
        supervised = (labels != IGNORE_INDEX).reshape(len(labels), math.prod(labels.shape[1:]))
        return [supervised.sum(1)] if labels.ndim == 1 else [supervised.sum(1), supervised[:, 1:].sum(1)]

    def _supervised_part(self, batch: Any) -> Any:
        """Return the samples with a supervised position: the others have no loss."""
        weights = self._weights(batch)
        if not weights or bool((weights[0] > 0).all()):
            return batch
        return self.adapter.select(batch, weights[0].nonzero().flatten().tolist())

    def _is_uneven(self, batch: Any, pl_module: LightningModule, sharded: bool) -> bool:
        """Return whether a mean over tokens weighs the samples of this batch unequally."""
        uneven = any(bool((weights != weights[:1]).any()) for weights in self._weights(batch))
        return on_any_rank(uneven, pl_module) if sharded else uneven


def _uniform(seed: int, sample_ids: Tensor, shape: torch.Size) -> Tensor:
    """Return numbers from 0 to 1 that belong to the samples, whatever the batch, its padding and the rank."""
    positions = math.prod(shape) // max(len(sample_ids), 1)
    generators = (torch.Generator().manual_seed(derived_seed(seed, sample)) for sample in sample_ids.tolist())
    return torch.cat([torch.rand(positions, generator=generator) for generator in generators]).reshape(shape)
