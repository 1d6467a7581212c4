"""How much each weight of any LightningModule sways its output, over the task that is ending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.measuring import Measurement, is_sharded, on_any_rank, single_rows, sum_over_samples
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture, run_step, undisturbed
from lightning_cl.core.distributed import max_over_ranks
from lightning_cl.core.state import local
from lightning_cl.functional.fisher import IGNORE_INDEX
from lightning_cl.functional.mas import output_sensitivity
from lightning_cl.functional.per_sample import LayerTape
from lightning_cl.functional.sample_loop import SampleLoop, accumulators

__all__ = ["OutputSensitivity"]

_COMPARED = 3


class OutputSensitivity(Measurement):
    r"""Measures :math:`\Omega = \frac{1}{N} \sum_n |\nabla_\theta \lVert f(x_n) \rVert_2^2|` in evaluation mode.

    The output is captured while the user's own step runs. Gradients come from whole batches where the layers allow it,
    which :meth:`check` finds out, and from a loop over samples otherwise. Of outputs ``[B, T, C]`` the norm is over the
    positions that are no padding: those of the batch's ``attention_mask``, else those whose label is not -100.

    Args:
        adapter: Reads batches.
        n_samples: Samples over all ranks; the whole task if ``None``.
        outputs: Submodule that returns the output; found by itself if ``None``.
    """

    quantity: ClassVar[str] = "sensitivity of the output"

    def __init__(self, adapter: BatchAdapter, n_samples: int | None, outputs: str | None) -> None:
        self.adapter = adapter
        self.n_samples = n_samples
        self.outputs = outputs

    @override
    def check(self, pl_module: LightningModule, parameters: Mapping[str, Parameter], batch: Any) -> None:
        """Try the measurement on a training batch, before the first step, and choose between batches and samples.

        Raises:
            ValueError: If the module gives no output that a gradient can be taken of.
        """
        # as many on every rank, because ranks of a sharded model must run the same forwards
        count = -max_over_ranks(-min(self.adapter.size(batch), _COMPARED), pl_module.device)
        part = self.adapter.select(batch, list(range(count)))
        with undisturbed(pl_module, seed=0), LayerTape(pl_module, list(parameters)) as tape:
            outputs = self._captured(pl_module, part)
            # not the norm, whose gradient vanishes for a head of zeros
            unsure = tape.uncovered(outputs.flatten(1).logsumexp(1), batch_size=count)
            by_sample = on_any_rank(bool(unsure), pl_module)
            # whatever else may fail shows here, and not at the task's end
            output_sensitivity(
                SampleLoop(parameters, tape.unsharded) if by_sample else tape,
                outputs,
                positions=self._positions(outputs, part),
            )
        # decided once: a run that resumes at another batch must measure as the straight run does
        self.by_sample = by_sample if self.by_sample is None else self.by_sample
        if by_sample:
            rank_zero_info(
                f"The sensitivity of the output of {type(pl_module).__name__} is measured by a loop over samples: a"
                " layer has no rule for per-sample gradients."
            )

    @override
    def sums_over(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        pl_module: LightningModule,
        parameters: Mapping[str, Tensor],
        seed: int,
    ) -> tuple[dict[str, Tensor], float]:
        """Return the sums of absolute gradients over samples of all ranks, as local shards, and the number of samples.

        Args:
            batches: This rank's batches on the device, with the identities of their samples.
            pl_module: The user's module.
            parameters: The parameters by name.
            seed: Seeds the generators that the module's step may draw from.
        """
        sums = accumulators(parameters, None)
        # what was frozen since the fit began matters nothing to this task
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        count = 0
        with undisturbed(pl_module, seed), LayerTape(pl_module, list(parameters)) as tape:
            for batch, _ in batches:
                count += self._add(tape, pl_module, batch, sums)
        return sum_over_samples(sums, count, pl_module)

    @override
    def rehearse(
        self, pl_module: LightningModule, parameters: Mapping[str, Parameter], batch: Any
    ) -> dict[str, Tensor]:
        """Do with a batch of any values, or none, what :meth:`estimate` does with those of a task, for its memory.

        Returns:
            Sums in the placement of each parameter.
        """
        sums = accumulators(parameters, None)
        with undisturbed(pl_module, seed=0), LayerTape(pl_module, list(parameters)) as tape:
            output_sensitivity(tape, self._captured(pl_module, batch), into=sums)
        return {name: local(value) for name, value in sums.items()}

    def _add(self, tape: LayerTape, pl_module: LightningModule, batch: Any, sums: Mapping[str, Tensor]) -> int:
        """Add a batch to ``sums``; return the samples that count."""
        if not self.by_sample:
            outputs = self._captured(pl_module, batch)
            return output_sensitivity(tape, outputs, positions=self._positions(outputs, batch), into=sums).count
        loop, count = SampleLoop(tape.params, tape.unsharded), 0
        for row, idle in single_rows(self.adapter.size(batch), pl_module, is_sharded(tape.params)):
            single = self.adapter.select(batch, [row])
            outputs = self._captured(pl_module, single)
            # the open tape must not keep the graph of every sample
            tape.clear()
            positions = self._positions(outputs, single)
            if idle:
                positions = outputs.new_zeros(outputs.shape[:-1], dtype=torch.bool)
            count += output_sensitivity(loop, outputs, positions=positions, into=sums).count
        return count

    def _captured(self, pl_module: LightningModule, batch: Any) -> Tensor:
        with OutputCapture(pl_module, self.outputs) as capture:
            run_step(pl_module, batch, self.adapter)
        outputs, size = capture.found, self.adapter.size(batch)
        module = type(pl_module).__name__
        if outputs is None:
            seen = "No output was seen in" if self.outputs is None else f"The submodule {self.outputs!r} gave none in"
            raise ValueError(
                f"{seen} a step of {module}: a floating-point tensor of at least two dimensions, samples first. Name"
                " the submodule that returns it, such as `outputs='model.head'`."
            )
        if len(outputs) != size:
            raise ValueError(
                f"The output of {module} has {len(outputs)} rows for {size} samples. Name by `outputs` the submodule"
                " that returns one row for each sample."
            )
        if not outputs.requires_grad:
            raise ValueError(
                f"The output of {module} depends on no trainable parameter, so there is nothing to measure. Name"
                " another submodule by `outputs`."
            )
        return outputs

    def _positions(self, outputs: Tensor, batch: Any) -> Tensor | None:
        """Return which positions are no padding, ``[B, T]``; ``None`` if all count."""
        mask = self.adapter.padding_mask(batch)
        if mask is not None and mask.shape == outputs.shape[:-1]:
            return mask
        labels = self.adapter.labels(batch)
        # of a sample's only label nothing is read: the measure is made for unlabelled data
        if labels is None or labels.ndim < 2 or labels.is_floating_point() or labels.shape != outputs.shape[:-1]:
            return None
        return labels != IGNORE_INDEX
