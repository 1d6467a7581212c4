"""How a memory is filled: by what the steps of a task show, or by a selection at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.stored_samples import StoredSamples
from lightning_cl.core.batches import Column, stack_columns
from lightning_cl.core.capture import OutputCapture, run_step, undisturbed
from lightning_cl.core.distributed import gather_rows
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.step import loss_of
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import global_rows, task_batches
from lightning_cl.functional.sample_scores import sample_hits, sample_losses
from lightning_cl.memory import payload_bytes

__all__ = ["FilledMemory"]


class FilledMemory(StoredSamples):
    """Takes in the samples that a step has shown, after it, or those that a policy selects at a task's end."""

    # ------------------------------------------------------------------ the step

    @contextmanager
    @override
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        with nullcontext() if self.scores is None else self.scores.around_step():
            yield

    def annotate(self, batch: Any, logits: Tensor | None) -> dict[str, Column]:
        """Return what to store beside the samples of a batch, one entry for each; names begin with ``"@"``.

        Args:
            batch: The incoming batch.
            logits: The class scores on it, without gradients, if they are watched.
        """
        return {}

    def annotated_anew(self, sample_ids: Tensor, presentation: int) -> Tensor:
        """Return which samples to annotate anew, of those that a later epoch of their task shows again; bool [n].

        Asked if :attr:`renews_annotations`, on a task stream, where samples are known by their identities.

        Args:
            sample_ids: Identities, int64 [n], of samples in the memory or not.
            presentation: How often the task has shown them by now, from 2.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ writing

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if changed := [path for path, leaf, version in self._versions if leaf._version != version]:
            raise ValueError(
                f"`{type(pl_module).__name__}.training_step` changes {changed[0]!r} of its batch in place, so the"
                " memory would keep what a later step changes again. Let it work on a copy."
            )
        self._versions = []
        batch, self._incoming = self._incoming, None
        hits, self._hits = self._hits, []
        logits = None
        if pl_module.automatic_optimization and loss_of(outputs) is None:
            # Lightning skips such a step, and nothing was learned from its samples
            return
        if self.scores is not None:
            # the rows of a joint batch that are not drawn come first
            logits = self.scores.require().detach()[: self.adapter.size(batch)]
            self.scores.of_step = None
        policy = self.buffer.policy
        # the first epoch of a task shows all its samples; later ones matter only where the latest presentation does
        again = self._first_epoch is not None and trainer.current_epoch != self._first_epoch
        skipped = policy.selects_at_task_end or (again and not (policy.renews and self._identified(trainer)))
        renews = again and self.renews_annotations and not policy.selects_at_task_end and self._identified(trainer)
        if skipped and not renews and not self.buffer.recall.needs_hits:
            return
        sample_ids, owners, labels = global_rows(trainer, self.adapter, batch, batch_idx, self._presented)
        mine = sample_ids[owners == self.buffer.rank]
        task = TaskEvents.attach(trainer).task
        assert task is not None
        if self.buffer.recall.needs_hits:
            self._tell_hits(trainer, mine, logits, batch, hits, task)
        if renews:
            assert self._first_epoch is not None
            chosen = self.annotated_anew(mine, trainer.current_epoch - self._first_epoch + 1)
            self.buffer.amend(self.annotate(batch, logits), mine, chosen, task=self.number_of_task(trainer, task))
        if skipped:
            return
        self._presented += len(sample_ids)
        columns = {} if self.storage == "index" else self.adapter.columns(batch)
        shared = owners if self.buffer.world_size > 1 else None
        columns = {**columns, **self.annotate(batch, logits)}
        losses = None
        if policy.needs_losses:
            assert self.scores is not None and logits is not None
            losses = _in_order(gather_rows(sample_losses(logits, self.scores.targets(batch)))[0], owners)
        sizes = self._sizes(trainer, columns, len(mine))
        self.buffer.insert(
            columns,
            sample_ids,
            labels=labels,
            task=self.number_of_task(trainer, task),
            owners=shared,
            losses=losses,
            sizes=None if sizes is None else _in_order(sizes, owners),
        )

    def _sizes(self, trainer: Trainer, columns: dict[str, Column], count: int) -> Tensor | None:
        """Return the bytes of the samples of all ranks, in the order of ranks, if the capacity counts them."""
        if self.buffer.capacity_bytes is None:
            return None
        mine = torch.from_numpy(payload_bytes(columns, count))
        return gather_rows(mine.to(trainer.strategy.root_device))[0]

    def _tell_hits(
        self,
        trainer: Trainer,
        sample_ids: Tensor,
        logits: Tensor | None,
        batch: Any,
        drawn: list[tuple[Tensor, Tensor]],
        task: Task,
    ) -> None:
        parts = list(drawn)
        if logits is not None and self._identified(trainer):
            assert self.scores is not None
            parts.append((sample_ids, sample_hits(logits, self.scores.targets(batch))))
        if parts:
            ids, hits = (torch.cat([part[k].cpu() for part in parts]) for k in (0, 1))
            self.buffer.observe(ids, hits, task=self.number_of_task(trainer, task))

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if not self.buffer.policy.selects_at_task_end:
            return
        seed = derived_seed(self.seed, "features", task.index)
        ids, features, labels, columns = [], [], [], []
        with (
            undisturbed(pl_module, seed),
            self.capture_features(pl_module) as capture,
            OutputCapture(pl_module, self.logits) as scores,
        ):
            for batch, sample_ids in task_batches(trainer, pl_module, self.adapter):
                with torch.no_grad():
                    run_step(pl_module, batch, self.adapter)
                found = self.adapter.labels(batch)
                if found is None:
                    raise ValueError(f"`{type(self).__name__}(policy={self.policy!r})` needs labels in every batch.")
                ids.append(sample_ids)
                features.append(capture.output.detach().flatten(1).float().cpu())
                labels.append(found.cpu())
                inputs = {} if self.storage == "index" else self.adapter.columns(batch)
                notes = self.annotate(batch, None if self.scores is None else scores.output)
                # a task may be larger than an accelerator's memory
                columns.append({path: _on_cpu(column) for path, column in {**inputs, **notes}.items()})
        all_ids, owners = gather_rows(torch.cat(ids))
        if not self._identified(trainer):
            # each fit, and each rank, counts its own samples
            all_ids = self._presented + torch.arange(len(all_ids))
            self._presented += len(all_ids)
        stacked = stack_columns(columns)
        self.buffer.offer(
            stacked,
            all_ids,
            labels=gather_rows(torch.cat(labels))[0],
            task=self.number_of_task(trainer, task),
            features=gather_rows(torch.cat(features))[0],
            owners=owners,
            sizes=self._sizes(trainer, stacked, int((owners == self.buffer.rank).sum())),
        )


def _on_cpu(column: Column) -> Column:
    if isinstance(column, Tensor):
        return column.detach().cpu()
    return [row.detach().cpu() if isinstance(row, Tensor) else row for row in column]


def _in_order(gathered: Tensor, owners: Tensor) -> Tensor:
    """Return rows that are gathered in the order of ranks in that of the global batch."""
    ordered = torch.empty_like(gathered)
    ordered[owners.argsort(stable=True).to(gathered.device)] = gathered
    return ordered
