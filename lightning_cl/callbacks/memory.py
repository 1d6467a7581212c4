"""What all methods with a memory of samples share: what comes back of it in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.filled_memory import FilledMemory
from lightning_cl.core.capture import forward_loss, metrics_kept, silenced
from lightning_cl.core.distributed import sum_over_ranks_, world_size
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.head import masks_other_tasks
from lightning_cl.core.rng import derived_seed, isolated_rng
from lightning_cl.functional.sample_scores import sample_hits
from lightning_cl.memory import Drawn

__all__ = ["Rehearsed", "ReplayMemory"]


@dataclass(frozen=True)
class Rehearsed:
    """A forward of the module's own training step on drawn samples.

    Attributes:
        loss: What the step returned times ``share``, a scalar. The mean over ranks, which every strategy takes, is then
            the mean over the samples that all ranks drew.
        logits: The class scores, ``None`` if they are not watched.
        share: How many samples this rank drew, over the mean of all ranks: what a term made of ``logits`` must be
            multiplied by. 1 in a single process, 0 on a rank that drew nothing, whose forward is on the batch beside.
    """

    loss: Tensor
    logits: Tensor | None
    share: Tensor | float


class ReplayMemory(FilledMemory):
    """A memory that is drawn from in a step; a subclass says what the samples are for.

    Attributes:
        mixes_tasks: Whether it takes the module's own loss on samples of several tasks at once.
    """

    mixes_tasks: bool = True

    @override
    def _check(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super()._check(trainer, pl_module, batch, batch_idx)
        # under manual optimization the step cannot be run aside
        if self.mixes_tasks and pl_module.automatic_optimization and masks_other_tasks(pl_module, batch, batch_idx):
            raise ValueError(
                f"`{type(self).__name__}` takes one loss on samples of all earlier tasks, but"
                f" `{type(pl_module).__name__}.training_step` masks the classes of all tasks but the present one. Use"
                " `head_mask='seen'`, or `GEM`, which takes the loss on each task under that task's own mask."
            )

    def draw(self, trainer: Trainer, size: int, *, stream: int = 0, tasks: range | None = None) -> Drawn | None:
        """Draw from this rank's share for the step that is under way.

        The same step, on the same rank, gives the same draw whenever it is asked for (not under
        ``recall="view_batch"``, which goes on); a resumed run draws what the straight run would have drawn.

        Args:
            trainer: The running Trainer.
            size: Samples to draw, from 1; if there are fewer, all of them come.
            stream: Tells apart independent draws in one step, from 0.
            tasks: Draw only what came in these tasks.

        Returns:
            Copies of the drawn samples, transformed, or ``None`` if this rank has none.
        """
        step, task = self.number_of_draw(trainer), TaskEvents.attach(trainer).task
        assert task is not None
        drawn = self.buffer.draw(size, step=step, stream=stream, task=self.number_of_task(trainer, task), tasks=tasks)
        if drawn is None or self.transform is None:
            return drawn
        with isolated_rng(derived_seed(self.seed, "transform", trainer.global_rank, step, stream)):
            return replace(drawn, columns=self.adapter.map_inputs(drawn.columns, self.transform))

    def as_batch(self, drawn: Drawn, like: Any) -> Any:
        """Return the drawn samples as a batch with the structure, the device and the dtypes of another one."""
        return self.adapter.join(self.adapter.select(like, slice(0, 0)), drawn.columns)

    def must_rehearse(self, drawn: Drawn | None) -> bool:
        """Return whether to call :meth:`rehearse`, also with nothing drawn: where other ranks have something.

        Ranks of a sharded model must run the same forwards. What all of them keep is known on each.
        """
        return drawn is not None or (world_size() > 1 and self.buffer.total > 0)

    def rehearse(self, pl_module: LightningModule, drawn: Drawn | None, like: Any, batch_idx: int) -> Rehearsed:
        """Run the module's own training step on drawn samples, beside that on a batch: in silence, with gradients.

        Call it on all ranks or on none, see :meth:`must_rehearse`.
        """
        batch = like if drawn is None else self.as_batch(drawn, like)
        share = self._share_of_draw(pl_module, drawn)
        with silenced(pl_module), metrics_kept(pl_module):
            if self.scores is None:
                return Rehearsed(forward_loss(pl_module, batch, batch_idx) * share, None, share)
            with self.scores.aside() as capture:
                loss = forward_loss(pl_module, batch, batch_idx)
                logits = capture.output
        if drawn is not None:
            self.note_hits(drawn, logits, batch)
        return Rehearsed(loss * share, logits, share)

    @staticmethod
    def _share_of_draw(pl_module: LightningModule, drawn: Drawn | None) -> Tensor | float:
        if world_size() == 1:
            return 1.0
        mine = torch.tensor(float(len(drawn or ())), device=pl_module.device)
        return mine * world_size() / sum_over_ranks_(mine.clone())

    def with_draws(self, trainer: Trainer, batch: Any, draws: int) -> Callable[[Any], Any]:
        """Return what joins a loader's batch and so many draws, for ``Footprint.batch``.

        Forwards beside each other take what one forward over all their samples takes, until the backward.
        """
        size = self.adapter.size(batch)
        rows = [row % size for row in range(draws * min(self.batch_size or size, self.share(trainer, batch)))]
        return lambda incoming: self.adapter.join(incoming, self.adapter.columns(self.adapter.select(batch, rows)))

    def note_hits(self, drawn: Drawn, logits: Tensor, batch: Any) -> None:
        """Keep for the recall schedule what the model gets right of drawn samples, from its scores on them."""
        if self.buffer.recall.needs_hits:
            assert self.scores is not None
            self._hits.append((drawn.sample_ids, sample_hits(logits.detach(), self.scores.targets(batch))))
