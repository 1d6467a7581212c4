"""One adapter for each task, of which every sample gets that of the task it looks like."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.adapters.batch_first import check_batch_first
from lightning_cl.adapters.evaluated import EvaluatedBatches
from lightning_cl.adapters.joint_replay import refuse_joint_replay, refuse_teachers
from lightning_cl.adapters.own_classes import OwnClasses
from lightning_cl.adapters.router import task_features
from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.adapters.task_heads import TaskHeads, incremental_head
from lightning_cl.core.adapters import adapters_disabled
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture, run_evaluation_step, run_step, undisturbed
from lightning_cl.core.checks import check_automatic_optimization, check_choice, check_count
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.head import find_head
from lightning_cl.core.requests import Influence
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import task_batches
from lightning_cl.functional.routing import pooled_features, rank_masks

__all__ = ["RoutedSlots"]


class RoutedSlots(EvaluatedBatches, AdapterSlots):
    """Gives each task an adapter of its own on the base, and each sample of an evaluation that of a task.

    The finished adapters lie side by side in the rank of the past slot. In training none of them acts. In evaluation
    the module's own step runs twice: first on the base, unseen, for the features that the task is chosen by, and then
    with a mask on the rank for each sample, so that a batch may mix tasks and no sample depends on another.

    Args:
        mask_classes: Whether a sample is given the classes of its task only, in training and in evaluation.
        features_from: What computes the features: the frozen ``"base"``, or that with the ``"first"`` task's adapter.
        features: Name of the submodule whose output is the feature vector; the input of the last linear layer if
            ``None``.
        logits: Name of the submodule that returns the class scores; found by itself in most modules.
        n_samples: Samples of a task to read features of, over all ranks; the whole task if ``None``.
        batch_adapter: Reads batches of an uncommon structure.
        capacity: Rank of the slot for finished tasks, at least tasks times r: adapters are never approximated.
        seed: Seed of the fresh adapters and of what is drawn.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a capacity that is too small for the tasks of
            the stream, for a memory of samples or a teacher of the task before beside it, and for trainable parameters
            that belong neither to the slots nor to one linear layer; at the start of a task for features or class
            scores that are not found, for a module that masks classes itself, and for an adapted layer whose first
            dimension is not that of the samples.
    """

    def __init__(
        self,
        *,
        mask_classes: bool,
        features_from: Literal["base", "first"],
        features: str | None,
        logits: str | None,
        n_samples: int | None,
        batch_adapter: BatchAdapter | None,
        capacity: int,
        seed: int,
    ) -> None:
        check_choice("features_from", features_from, ("base", "first"))
        if n_samples is not None:
            check_count("n_samples", n_samples)
        super().__init__(capacity, seed=seed)
        self.mask_classes = mask_classes
        self.features_from = features_from
        self.features = features
        self.logits = logits
        self.n_samples = n_samples
        self.adapter = batch_adapter or BatchAdapter()
        self._heads = TaskHeads()
        self._classes = OwnClasses(type(self).__name__, self.adapter)
        # found at a task's start: the linear layer whose input the features are
        self._source: str | None = None
        # of each task that has begun the columns of the evaluation that are its own
        self._columns: list[list[int]] = []
        self._batch = ExitStack()
        # the tasks of the samples of the coming forward
        self._acting: list[Tensor] = []

    @override
    def extend(self, slot: Slot) -> None:
        super().extend(slot)
        slot.slot_factor(slot.past).routed = True

    # ------------------------------------------------------------------ what a subclass says

    @property
    @abstractmethod
    def known(self) -> int:
        """How many tasks there are to choose from; with 0 of them, the present adapter acts alone."""

    @abstractmethod
    def learn(self, index: int, features: Tensor, sample_ids: Tensor) -> None:
        """Take the features [N, D] of a task and the identities of its samples, those of all ranks; called on all."""

    @abstractmethod
    def choose(self, features: Tensor) -> Tensor:
        """Return the tasks for features [B, D], the best one first, int64 [B, choices]."""

    @abstractmethod
    def feature_rows(self, tasks: int) -> int:
        """Return how many vectors as wide as the features are kept once there are so many tasks."""

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = type(self).__name__
        if stage == "fit":
            if self.features is None:
                way_out = "Name the submodule that returns the feature vector by `features`."
                check_automatic_optimization(pl_module, self, "features=None", way_out)
            if self.mask_classes:
                way_out = "Use `mask_classes=False`."
                check_automatic_optimization(pl_module, self, "mask_classes=True", way_out)
            refuse_joint_replay(trainer, name, "an adapter", "AdapterSlots")
            refuse_teachers(trainer, name)
        super().setup(trainer, pl_module, stage)

    @override
    def prepare_module(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().prepare_module(trainer, pl_module, stage)
        for slot in self.slots.values():
            slot.slot_factor(slot.current)
        self._rest()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._classes.answered = True
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._batch.close()
        for slot in self.slots.values():
            for adapter in (slot.current, slot.past):
                slot.slot_factor(adapter).route = None
        super().teardown(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._rest()
        self._heads.find(pl_module, self.slots.values(), type(self).__name__)
        self._check_room(TaskEvents.attach(trainer).tasks_to_end(self) or 0, "the stream has")

    def _check_room(self, tasks: int, whose: str) -> None:
        for slot in self.slots.values():
            rank, used = slot.rank(slot.current), self.segments.get(slot.name, [0])[-1]
            if used + tasks * rank > self.capacity:
                raise ValueError(
                    f"`{type(self).__name__}` keeps the adapter of each task as it is, but of `capacity="
                    f"{self.capacity}` of {slot.name!r} {used} are used, and {whose} {tasks} more to learn, of rank"
                    f" {rank}: give it `capacity={used + tasks * rank}` or more."
                )

    @property
    def finished(self) -> int:
        """How many tasks have left their adapters in the past slot."""
        return len(next(iter(self.segments.values()), [0])) - 1

    # ------------------------------------------------------------------ tasks

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        self._check_room(1, "there is")
        index, stream = self.finished, trainer.datamodule  # type: ignore[attr-defined]
        self._find_places(trainer, pl_module)
        columns = stream.trained_by(task) if isinstance(stream, TaskStream) else [task.index]
        self._columns[index:] = [list(columns)]
        if self.mask_classes:
            self._classes.begin_task(trainer, pl_module, task, index)
        if self.features_from == "base" or index:
            self._learn(trainer, pl_module, index)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        index = self.finished
        self._heads.keep(pl_module, index)
        super().on_task_end(trainer, pl_module, task)
        if self.features_from == "first" and not index:
            self._learn(trainer, pl_module, index)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if self._is_trained():
            rank_zero_warn(
                f"The request {task.name!r} trained the adapter that `{type(self).__name__}` has for the coming task:"
                " it is started anew, and those of finished tasks, which act on their samples, know what they knew."
            )
            self.restart(trainer, pl_module, task.index + 1)
        return super().renew_state(trainer, pl_module, task)

    def _find_places(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what the features and the scores are read of, on the first batch of a task."""
        name, batch = type(self).__name__, next(task_batches(trainer, pl_module, self.adapter))[0]
        check_batch_first(pl_module, self.slots.values(), batch, self.adapter, name)
        head = self._head(pl_module, batch)
        if self.features is None:
            self._source = head
            if head is None:
                raise ValueError(
                    f"`{name}` takes the input of the linear layer that returns the class scores for the feature"
                    f" vector, and `{type(pl_module).__name__}.training_step` calls none. Name the submodule that"
                    " returns it by `features`, such as `features='model.encoder'`."
                )
        if self.mask_classes:
            self._classes.find(pl_module, self.logits, head, batch)

    def _head(self, pl_module: LightningModule, batch: Any) -> str | None:
        if not pl_module.automatic_optimization or not (self.features is None or self.mask_classes):
            return None
        if self.logits is None and (name := incremental_head(pl_module)) is not None:
            return name
        with adapters_disabled(pl_module):
            # not with adapters: theirs is the last linear layer then
            return find_head(pl_module, self.logits, batch)

    def _learn(self, trainer: Trainer, pl_module: LightningModule, index: int, ids: Tensor | None = None) -> None:
        around, capture = self._featured(pl_module), self._capture(pl_module)
        self.learn(index, *task_features(trainer, pl_module, self.adapter, capture, around, self.n_samples, ids))

    # ------------------------------------------------------------------ training

    @contextmanager
    @override
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        with self._classes.training(pl_module, self.finished) if self.mask_classes else nullcontext():
            yield

    # ------------------------------------------------------------------ evaluation

    @override
    def before_batch(
        self, trainer: Trainer, pl_module: LightningModule, step: str, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Choose tasks for the samples of a batch, and let the module's own step compute with their adapters."""
        if not self.known:
            return
        run = partial(run_evaluation_step, pl_module, step, batch, batch_idx, dataloader_idx)
        with (
            undisturbed(pl_module, seed=0),
            self._featured(pl_module),
            self._capture(pl_module) as capture,
            torch.no_grad(),
        ):
            run()
            features = pooled_features(capture.output, self.adapter.padding_mask(batch))
        if len(features) != (size := self.adapter.size(batch)):
            raise ValueError(
                f"`{type(self).__name__}` needs one row of features for each sample, and in `{step}` found the shape"
                f" {list(capture.output.shape)} for {size} of them. Let that step give samples first, as training does."
            )
        tasks = self.choose(features)
        self._batch.callback(self._rest)
        others: list[Tensor] = []
        change = None
        if self.mask_classes:
            # before the head of a task, which may be the same layer: of hooks in front the last comes first
            masking = self._classes.joining(pl_module, tasks, others)
            change = self._batch.enter_context(masking)
        if (handle := self._heads.put_in_place(pl_module, self._acting)) is not None:
            self._batch.callback(handle.remove)
        if change is not None:
            for choice in range(1, tasks.shape[1]):
                # in the precision of the step, which takes the scores of the first choice; none is in force yet
                with (
                    undisturbed(pl_module, 0),
                    trainer.precision_plugin.forward_context(),
                    OutputCapture(pl_module, self._classes.name) as capture,
                    torch.no_grad(),
                ):
                    self._act(tasks[:, choice])
                    run()
                    others.append(capture.output)
            self._batch.enter_context(change.active())
            self._batch.callback(self._warn_if_unused, pl_module)
        self._act(tasks[:, 0])
        if step != "predict_step":
            self._log_accuracy(trainer, pl_module, tasks, dataloader_idx)

    @override
    def after_batch(self) -> None:
        self._batch.close()

    def _warn_if_unused(self, pl_module: LightningModule) -> None:
        if not self._classes.answered:
            rank_zero_warn(
                f"The evaluation of `{type(pl_module).__name__}` did not call {self._classes.name!r}, whose class"
                f" scores `{type(self).__name__}` restricts to the classes of each sample's task. Call it, or name"
                " another submodule by `logits`."
            )

    def _log_accuracy(self, trainer: Trainer, pl_module: LightningModule, tasks: Tensor, dataloader_idx: int) -> None:
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(stream, TaskStream):
            return
        column = stream.evaluated_tasks()[dataloader_idx].index
        right = [task for task, columns in enumerate(self._columns) if column in columns]
        if right:
            hits = torch.isin(tasks, torch.tensor(right, device=tasks.device)).any(1).float()
            name = f"{type(self).card.name}/routing_accuracy"
            pl_module.log(name, hits.mean(), batch_size=len(hits), on_step=False, on_epoch=True, sync_dist=True)

    # ------------------------------------------------------------------ which adapters act

    def _rest(self) -> None:
        """Let the present adapters act alone, as in training."""
        self._acting.clear()
        for slot in self.slots.values():
            slot.slot_factor(slot.current).route = None
            # of one row: for every sample
            slot.slot_factor(slot.past).route = torch.zeros(1, self.capacity, device=_device(slot.down(slot.past)))

    def _act(self, tasks: Tensor) -> None:
        """Let each sample of the coming forward have the adapter of its task, int64 [B]."""
        self._acting[:] = [tasks]
        for slot in self.slots.values():
            masks = rank_masks(self.segments[slot.name], self.capacity).to(tasks.device)
            slot.slot_factor(slot.past).route = masks[tasks]
            slot.slot_factor(slot.current).route = (tasks == self.finished).float()[:, None]

    @contextmanager
    def _featured(self, pl_module: LightningModule) -> Iterator[None]:
        """Let a forward inside the block compute the features of every sample."""
        if self.features_from == "base":
            with adapters_disabled(pl_module):
                yield
            return
        self._act(torch.zeros(1, dtype=torch.int64, device=pl_module.device))
        try:
            yield
        finally:
            self._rest()

    def _capture(self, pl_module: LightningModule) -> OutputCapture:
        if self.features is not None:
            return OutputCapture(pl_module, self.features)
        return OutputCapture(pl_module, self._source, inputs=True)

    # ------------------------------------------------------------------ memory and checkpoints

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        slots = super().footprint(trainer, pl_module, batch)
        coming = TaskEvents.attach(trainer).tasks_to_end(self)
        # of data that are no stream, each fit is one task more
        tasks = self.finished + (1 if coming is None else coming)
        self._heads.find(pl_module, self.slots.values(), type(self).__name__)
        if self.features is None and self._source is None:
            self._source = self._head(pl_module, batch)
        with undisturbed(pl_module, seed=0), self._capture(pl_module) as capture, torch.no_grad():
            run_step(pl_module, batch, self.adapter)
            width = pooled_features(capture.output).shape[1]
        rows = self.feature_rows(tasks) * width * torch.float32.itemsize
        return replace(slots, device=slots.device + rows + tasks * self._heads.num_bytes(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "source": self._source,
            "classes": self._classes.state_dict(),
            "columns": [list(columns) for columns in self._columns],
            "heads": self._heads.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._source, self._columns = state_dict["source"], [list(columns) for columns in state_dict["columns"]]
        self._classes.load_state_dict(state_dict["classes"])
        self._heads.load_state_dict(state_dict["heads"])


def _device(layer: nn.Linear) -> torch.device:
    # a skeleton's slots stand on the meta device until they are filled
    return torch.device("cpu") if layer.weight.is_meta else layer.weight.device
