"""The diagonal Fisher information of any LightningModule over the task that is ending."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture, forward_loss, run_step, undisturbed
from lightning_cl.core.checks import check_choice
from lightning_cl.core.distributed import max_over_ranks, sum_over_ranks_
from lightning_cl.core.state import shard
from lightning_cl.core.task_data import task_batches
from lightning_cl.functional.fisher import (
    IGNORE_INDEX,
    batched_fisher,
    empirical_fisher,
    exact_fisher,
    sampled_fisher,
)
from lightning_cl.functional.per_sample import LayerTape
from lightning_cl.functional.sample_loop import SampleLoop, squared_sums_by_loop

__all__ = ["Estimator", "FisherEstimator"]

Estimator = Literal["empirical", "sampled", "exact", "batched"]
_COMPARED = 3
_TOLERANCE = 1e-2


class FisherEstimator:
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

    def __init__(self, fisher: Estimator, adapter: BatchAdapter, n_samples: int | None, logits: str | None) -> None:
        check_choice("fisher", fisher, get_args(Estimator))
        self.fisher = fisher
        self.adapter = adapter
        self.n_samples = n_samples
        self.logits = logits
        self.by_sample: bool | None = None

    def check(self, pl_module: LightningModule, parameters: Mapping[str, Parameter], batch: Any) -> None:
        """Try the estimator on a training batch, before the first step, and choose between batches and samples.

        Raises:
            ValueError: If the module gives no loss or no class scores, or has no labels where they are needed.
        """
        if self.fisher == "batched" and _is_sharded(parameters):
            raise ValueError("`fisher='batched'` is not for sharded weights: use 'empirical'.")
        if self.fisher == "batched" and not pl_module.automatic_optimization:
            raise ValueError(
                "`fisher='batched'` runs the module's `training_step`, which under manual optimization would step the"
                " optimizer. Use 'empirical', 'sampled' or 'exact'."
            )
        part = self._few(batch)
        with undisturbed(pl_module, seed=0), LayerTape(pl_module, list(parameters)) as tape:
            if self.fisher == "batched":
                forward_loss(pl_module, part)
                by_sample = False
            elif self._uses_logits(pl_module):
                with OutputCapture(pl_module, self.logits) as capture:
                    run_step(pl_module, part, self.adapter)
                    scores = capture.output.flatten(1).logsumexp(1)
                    unsure = tape.uncovered(scores, batch_size=len(scores))
                    by_sample = _on_any_rank(bool(unsure), pl_module)
                    # labels or scores that do not fit show here, and not at the task's end
                    self._sums_from_logits(
                        SampleLoop(parameters) if by_sample else tape,
                        capture.output,
                        part,
                        torch.Generator(),
                        None,
                    )
            else:
                by_sample = _on_any_rank(not self._agrees(tape, pl_module, parameters, part), pl_module)
        # decided once: a run that resumes at another batch must measure as the straight run does
        self.by_sample = by_sample if self.by_sample is None else self.by_sample
        if by_sample and _is_sharded(parameters):
            raise ValueError(
                f"`fisher={self.fisher!r}` on sharded weights needs a loss that is a mean over samples, and layers with"
                f" a rule for per-sample gradients; {type(pl_module).__name__} has another. Leave its parameters out by"
                " `include`/`exclude`, or train without sharding."
            )
        if by_sample:
            rank_zero_info(
                f"The Fisher information of {type(pl_module).__name__} is measured by a loop over samples: its loss is"
                " no mean over samples, or a layer has no rule for per-sample gradients."
            )

    def estimate(
        self, trainer: Trainer, pl_module: LightningModule, parameters: Mapping[str, Parameter], seed: int
    ) -> dict[str, Tensor]:
        """Return the diagonal over the current task, float32, in the placement of each parameter.

        Args:
            trainer: The running Trainer.
            pl_module: The user's module.
            parameters: The parameters by name.
            seed: Seeds the labels of ``"sampled"``.

        Raises:
            ValueError: If the task holds no sample.
        """
        sums = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in parameters.items()
        }
        # what was frozen since the fit began matters nothing to this task
        placed, parameters = parameters, {name: p for name, p in parameters.items() if p.requires_grad}
        count, sharded = 0, _is_sharded(parameters)
        generator = torch.Generator().manual_seed(seed)
        with undisturbed(pl_module, seed), LayerTape(pl_module, list(parameters)) as tape:
            for batch, _ in task_batches(trainer, pl_module, self.adapter, self.n_samples):
                if not self._uses_logits(pl_module):
                    batch = self._supervised_part(batch)
                size = self.adapter.size(batch)
                if size == 0 and not sharded:
                    continue
                if self.fisher == "batched":
                    batched_fisher(parameters, forward_loss(pl_module, batch) * size, size, into=sums)
                    tape.clear()
                elif self._uses_logits(pl_module):
                    loop = SampleLoop(parameters) if self.by_sample else None
                    parts = self._singles(batch) if loop is not None else [batch]
                    size = 0
                    for part in parts:
                        with OutputCapture(pl_module, self.logits) as capture:
                            run_step(pl_module, part, self.adapter)
                        size += self._sums_from_logits(loop or tape, capture.output, part, generator, sums)
                        tape.clear()
                elif self.by_sample:
                    squared_sums_by_loop(self._single_losses(tape, pl_module, batch), parameters, into=sums)
                elif self._is_uneven(batch, pl_module, sharded):
                    # ranks of a sharded model must run the same forwards: one with fewer samples adds zeros
                    for index in range(max_over_ranks(size, pl_module.device) if sharded else size):
                        single = self.adapter.select(batch, [min(index, size - 1)])
                        tape.squared_sums(forward_loss(pl_module, single) * (index < size), batch_size=1, into=sums)
                else:
                    tape.squared_sums(forward_loss(pl_module, batch) * size, batch_size=size, into=sums)
                count += size
        total = sum_over_ranks_(torch.tensor(float(count), device=pl_module.device, dtype=torch.float64))
        if not total:
            raise ValueError("The task holds no sample to measure the Fisher information on.")
        return {name: shard(sum_over_ranks_(value).div_(float(total)), placed[name]) for name, value in sums.items()}

    def _uses_logits(self, pl_module: LightningModule) -> bool:
        return self.fisher in ("sampled", "exact") or not pl_module.automatic_optimization

    def _sums_from_logits(
        self,
        tape: LayerTape | SampleLoop,
        logits: Tensor,
        batch: Any,
        generator: torch.Generator,
        into: dict[str, Tensor] | None,
    ) -> int:
        """Add the sums of a batch to ``into``; return the samples that count."""
        labels = self.adapter.labels(batch)
        if self.fisher == "exact":
            return exact_fisher(tape, logits, into=into).count
        if self.fisher == "sampled":
            usable = labels if labels is not None and labels.shape == logits.shape[:-1] else None
            return sampled_fisher(tape, logits, generator, labels=usable, into=into).count
        if labels is None:
            raise ValueError("`fisher='empirical'` needs labels in the batch; 'sampled' and 'exact' need none.")
        return empirical_fisher(tape, logits, labels, into=into).count

    def _agrees(
        self, tape: LayerTape, pl_module: LightningModule, parameters: Mapping[str, Parameter], part: Any
    ) -> bool:
        """Return whether squares taken from a batch equal those of the module's losses on its single samples."""
        size = self.adapter.size(part)
        if _is_sharded(parameters):
            # single gradients of a shard are out of reach: compare the losses, and see that every layer was called
            losses = torch.stack([loss.detach() for loss in self._single_losses(tape, pl_module, part)])
            joint = forward_loss(pl_module, part).detach()
            weights = self._weights(part) or [torch.ones_like(losses)]
            means = [(losses * weight).sum() / weight.sum() for weight in weights]
            agree = any(bool(torch.isclose(joint, mean, rtol=_TOLERANCE)) for mean in means)
            return tape.seen == parameters.keys() and agree
        expected = squared_sums_by_loop(self._single_losses(tape, pl_module, part), parameters)
        try:
            found = tape.squared_sums(forward_loss(pl_module, part) * size, batch_size=size)
        except (RuntimeError, ValueError):
            return False
        roots = {name: square.sqrt() for name, square in expected.items()}
        # gradients that are 0 but for rounding differ by all of themselves
        noise = 1e-3 * _TOLERANCE * max(_norm(root) for root in roots.values())
        return all(_norm(found[n].sqrt() - root) <= _TOLERANCE * _norm(root) + noise for n, root in roots.items())

    def _singles(self, batch: Any) -> Iterator[Any]:
        return (self.adapter.select(batch, [index]) for index in range(self.adapter.size(batch)))

    def _single_losses(self, tape: LayerTape, pl_module: LightningModule, batch: Any) -> Iterator[Tensor]:
        for single in self._singles(batch):
            loss = forward_loss(pl_module, single)
            # the open tape must not keep the graph of every sample
            tape.clear()
            yield loss

    def _few(self, batch: Any) -> Any:
        """Return a few samples to compare, of different classes if possible, because a loss may weigh classes."""
        batch = self._supervised_part(batch)
        rows, labels = list(range(self.adapter.size(batch))), self.adapter.labels(batch)
        if labels is not None and labels.ndim == 1:
            values = labels.tolist()
            rows.sort(key=lambda row: values.index(values[row]) != row)
        return self.adapter.select(batch, rows[:_COMPARED])

    def _weights(self, batch: Any) -> list[Tensor]:
        """Return the supervised positions of each sample, [B]; of labels that are shifted in the loss, both ways."""
        labels = self.adapter.labels(batch)
        if labels is None or labels.is_floating_point():
            return []
        supervised = (labels != IGNORE_INDEX).reshape(len(labels), -1)
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
        return _on_any_rank(uneven, pl_module) if sharded else uneven


def _on_any_rank(flag: bool, pl_module: LightningModule) -> bool:
    # ranks of a sharded model must run the same forwards
    return max_over_ranks(int(flag), pl_module.device) > 0


def _is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm())
