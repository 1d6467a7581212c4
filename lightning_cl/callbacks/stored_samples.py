"""The memory of a method: which samples stay, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.watching import StepScores
from lightning_cl.core.batches import BatchAdapter, column_bytes, own_mapping
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.capture import (
    OutputCapture,
    move_batch,
    run_step,
    undisturbed,
)
from lightning_cl.core.card import MethodCard, methods_below
from lightning_cl.core.checkpoint_io import StreamedCheckpointIO
from lightning_cl.core.checks import check_count
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.shards import PerRank, of_all_ranks
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import IdentifiedData, global_rows
from lightning_cl.memory import IndexStorage, MmapStorage, Policy, Recall, ReplayBuffer, Storage, payload_bytes
from lightning_cl.memory.capacity import parse_bytes, parse_capacity
from lightning_cl.memory.index import BYTES_PER_ENTRY

__all__ = ["StoredSamples"]


class StoredSamples(ContinualCallback):
    """Keeps a bounded memory of samples: what stays, where it lies, what a checkpoint holds of it.

    The memory is updated after the step, and every sample is kept at most once, however many epochs show it. On a task
    stream a sample is known by its identity. Otherwise the first epoch of a fit is taken as one pass over its data, and
    the later ones add nothing.

    Args:
        capacity: What the memory holds over all ranks together: a number of samples, or of bytes, such as ``"512MiB"``.
        batch_size: Samples drawn for each rank and step; as many as the incoming batch holds if ``None``.
        policy: Which samples stay: ``"reservoir"`` (uniform over all seen), ``"class_balanced"``, ``"ring"`` (equal
            shares for tasks, the latest samples of each), ``"herding"`` (nearest to the class mean, needs
            ``features``), ``"loss_aware"`` (with chances by the loss), ``"no_raw_data"`` (uniform, and only with
            ``storage="index"``), or a :class:`~lightning_cl.memory.Policy`.
        recall: Which of them come back: ``"uniform"``, ``"power_law"`` (earlier tasks less often), ``"view_batch"`` (in
            turn, with several views), ``"collateral"`` (what new training damages), or a
            :class:`~lightning_cl.memory.Recall`.
        storage: ``"memory"``, ``"mmap"`` (on disk, needs ``directory``) or ``"index"`` (identities only; samples are
            read from the stream's dataset again).
        directory: Folder of the memory-mapped files.
        in_memory: Bytes of each rank that ``"mmap"`` keeps in memory before it begins to write files.
        features: Name of the submodule whose output is the feature vector, for ``"herding"``.
        logits: Name of the submodule that returns the class scores, where they are needed; found by itself in most
            modules.
        transform: Called with the stored inputs of one sample (a tensor, or a dict of them) on the CPU whenever it is
            drawn, under random numbers of its own; such as a random crop.
        batch_adapter: Reads batches of an uncommon structure.
        seed: Seed of the memory's choices and draws.

    Attributes:
        buffer: The memory.
        adapter: What reads batches.
        scores: The class scores of each step, ``None`` where nothing needs them.
        needs_logits: Whether a subclass wants the class scores of each step.
        needs_targets: Whether a subclass that does so reads them against labels.
        finds_features: Whether a subclass finds the feature vectors itself where ``features`` is ``None``.
        keeps: What the memory holds, in a few words.
        renews_annotations: Whether what is stored beside a sample may change when its task shows it again.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for ``"index"`` without a task stream, and for a
            policy that needs labels or task boundaries on data without.
    """

    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "unused"
    needs_logits: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    finds_features: ClassVar[bool] = False
    keeps: ClassVar[str] = "samples in memory"
    renews_annotations: bool = False

    def __init__(
        self,
        capacity: int | str,
        *,
        batch_size: int | None = None,
        policy: str | Policy = "reservoir",
        recall: str | Recall = "uniform",
        storage: Literal["memory", "mmap", "index"] = "memory",
        directory: str | Path | None = None,
        in_memory: int | str = 0,
        features: str | None = None,
        logits: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        batch_adapter: BatchAdapter | None = None,
        seed: int = 0,
    ) -> None:
        parse_capacity(capacity)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if (storage == "mmap") != (directory is not None):
            raise ValueError(
                f"`directory` (a folder for its files) goes with `storage='mmap'`, got `storage={storage!r}`,"
                f" `directory={directory!r}`."
            )
        if in_memory and storage != "mmap":
            raise ValueError(f"`in_memory={in_memory!r}` belongs to `storage='mmap'`, got `storage={storage!r}`.")
        if storage != "index" and not Policy.resolve(policy).stores_inputs:
            left = [name for name, kind in methods_below(ContinualCallback).items() if not _card(kind).stores_inputs]
            raise ValueError(
                f"`policy={policy!r}` refuses to store inputs, which `storage={storage!r}` does. Use"
                " `storage='index'`, which keeps identities and reads samples from the dataset of a task stream again,"
                f" or a method that keeps no samples: {', '.join(left)}."
            )
        self.capacity = capacity
        self.batch_size = batch_size
        self.policy = policy
        self.recall = recall
        self.storage = storage
        self.directory = directory
        self.in_memory = in_memory
        self.features = features
        self.logits = logits
        self.transform = transform
        self.adapter = batch_adapter or BatchAdapter()
        self.seed = seed
        self._presented = 0
        self._first_epoch: int | None = None
        self._checked = False
        self._versions: list[tuple[str, Tensor, int]] = []
        self._incoming: Any = None
        # identities and hits of what was drawn in the present step
        self._hits: list[tuple[Tensor, Tensor]] = []
        self.buffer = self._new_buffer(rank=0, world_size=1)
        judges = self.buffer.policy.needs_losses or self.buffer.recall.needs_hits
        labelled = judges or self.needs_targets
        watches = self.needs_logits or judges
        self.scores = StepScores(type(self).__name__, logits, self.adapter, labelled) if watches else None
        selects = self.buffer.policy.selects_at_task_end
        named = features is not None
        if selects > (named or self.finds_features) or named > selects:
            raise ValueError(
                f"`features` (the name of a submodule) goes with `policy='herding'`, got `policy={policy!r}`,"
                f" `features={features!r}`."
            )
        if self.buffer.policy.needs_boundaries or self.buffer.recall.needs_boundaries:
            # a class attribute of the base: a policy decides what this callback must know
            self.boundaries = "required"  # type: ignore[misc]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Say on the card of a method with a memory that it stores inputs."""
        super().__init_subclass__(**kwargs)
        card: MethodCard | None = cls.__dict__.get("card")
        if card is not None:
            cls.card = replace(card, stores_inputs=True)  # type: ignore[attr-defined]

    def _new_buffer(self, rank: int, world_size: int) -> ReplayBuffer:
        storage: str | Storage = self.storage
        if self.directory is not None:
            storage = MmapStorage(self.directory, self.in_memory)
        return ReplayBuffer(
            self.capacity, self.policy, storage, self.recall, rank=rank, world_size=world_size, seed=self.seed
        )

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        name, datamodule = type(self).__name__, trainer.datamodule  # type: ignore[attr-defined]
        if (
            self._identified(trainer)
            and self.buffer.policy.needs_labels
            and datamodule.labels_of(torch.zeros(0).long()) is None
        ):
            raise ValueError(
                f"`{name}(policy={self.policy!r})` needs class labels, but the stream's data has none. Use"
                " `policy='reservoir'`, or name the labels by `TaskStreamDataModule(label=...)`."
            )
        self.place_buffer(trainer, pl_module)
        # a checkpoint that is put together in memory would hold all samples a second time
        StreamedCheckpointIO.use(trainer)

    def place_buffer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the memory this rank's, and able to read its samples; a subclass may need it in other stages too."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if self.storage == "index" and not self._identified(trainer):
            raise ValueError(
                f"`{type(self).__name__}(storage='index')` reads samples again by their identity, which only a"
                " `TaskStreamDataModule` gives. Use `storage='memory'` or `'mmap'`."
            )
        rank, world_size = trainer.global_rank, trainer.world_size
        if (rank, world_size) != (self.buffer.rank, self.buffer.world_size):
            if len(self.buffer):
                raise ValueError(
                    f"The memory was filled on {self.buffer.world_size} ranks and this fit has {world_size}: resume"
                    " from a checkpoint, which redistributes it."
                )
            self.buffer = self._new_buffer(rank, world_size)
        if isinstance(self.buffer.storage, IndexStorage):
            # as the training loop gets its batches: the module's own transfer hooks may change them
            self.buffer.storage.bind(
                lambda ids: self.adapter.columns(
                    move_batch(trainer, pl_module, datamodule.fetch(ids, seed=self.number_of_draw(trainer)))
                )
            )

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        # not called on a stream that hides its boundaries, where every epoch brings new samples
        self._first_epoch = trainer.current_epoch

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._checked = False
        if self.scores is not None:
            self.scores.start(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_watching()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._hits = []
        if self.scores is not None:
            self.scores.stop()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._checked:
            # what would fail after a step, or at the task's end, fails before the first step
            self._check(trainer, pl_module, batch, batch_idx)
            self._checked = True
            leaves = self.adapter.columns(batch).items()
            self._versions = [(path, leaf, leaf._version) for path, leaf in leaves if isinstance(leaf, Tensor)]
        # the step may take keys out of its batch
        self._incoming = own_mapping(batch)

    def _check(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        labels = global_rows(trainer, self.adapter, batch, batch_idx, 0)[2]
        if self.buffer.policy.needs_labels and labels is None:
            raise ValueError(
                f"`{type(self).__name__}(policy={self.policy!r})` needs one class label for each sample, and found none"
                " in the batch. Name them by `batch_adapter=BatchAdapter(labels=...)`, or use `policy='reservoir'`."
            )
        if self.scores is not None:
            self.check_scores(pl_module, self.scores.check(pl_module, batch), self.adapter.size(batch))
        if self.features is not None or self.buffer.policy.selects_at_task_end:
            part = self.adapter.select(batch, [0])
            with undisturbed(pl_module, seed=0), self.capture_features(pl_module) as capture, torch.no_grad():
                run_step(pl_module, part, self.adapter)
                if len(capture.output) != 1:
                    raise ValueError(
                        f"`features={self.features!r}` must name a submodule that returns one row for each sample, but"
                        f" its output for one sample has shape {tuple(capture.output.shape)}."
                    )

    def check_scores(self, pl_module: LightningModule, scores: Tensor, size: int) -> None:
        """Refuse class scores that a subclass cannot use, before the first step.

        Args:
            pl_module: The user's module.
            scores: Those of a batch, if they are watched.
            size: Samples in the batch.
        """

    def capture_features(self, pl_module: LightningModule) -> OutputCapture:
        """Return what records the feature vectors in a forward, a row for each sample."""
        return OutputCapture(pl_module, self.features)

    @staticmethod
    def _identified(trainer: Trainer) -> bool:
        return isinstance(trainer.datamodule, IdentifiedData)  # type: ignore[attr-defined]

    @staticmethod
    def number_of_draw(trainer: Trainer) -> int:
        """Return a number of the step that is under way which no other step has, nor one of another fit."""
        # micro-batches of one fit differ by their number, fits of one stream by the tasks before them
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        return int(TaskEvents.attach(trainer).completed_tasks * 2**40 + batches.processed)

    def purge(self, sample_ids: Tensor) -> int:
        """Remove samples for good, here and in every later checkpoint; return how many all ranks removed."""
        return self.buffer.purge(sample_ids)

    @override
    def forget_samples(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor) -> list[Influence]:
        name = type(self).__name__
        if not self._identified(trainer):
            # they cannot be told from others
            return [Influence(name, self.keeps, "remains", self.buffer.total)] if self.buffer.total else []
        return [Influence(name, self.keeps, "removed", self.purge(sample_ids))]

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        columns, size = self.adapter.columns(batch), self.adapter.size(batch)
        share = self.share(trainer, batch)
        payload = 0 if self.storage == "index" else sum(column_bytes(c) for c in columns.values()) * share // size
        on_disk = max(payload - parse_bytes("in_memory", self.in_memory), 0) if self.storage == "mmap" else 0
        known = BYTES_PER_ENTRY * trainer.world_size + self.buffer.recall.bytes_per_sample
        return Footprint(host=known * share + payload - on_disk, disk=on_disk)

    def share(self, trainer: Trainer, batch: Any) -> int:
        """Return how many samples like those of ``batch`` a rank keeps, about."""
        capacity = self.buffer.capacity
        if self.buffer.capacity_bytes is not None:
            size = self.adapter.size(batch)
            payload = int(payload_bytes(self.adapter.columns(batch), size).sum())
            capacity = self.buffer.capacity_bytes * size // max(payload, 1)
        return -(-capacity // trainer.world_size)

    def number_of_task(self, trainer: Trainer, task: Task) -> int:
        """Return the number by which the memory knows the samples of the running task."""
        return task.index

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "presented": self._presented,
            "first_epoch": self._first_epoch,
            "buffer": PerRank(self.buffer.state_dict()),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._presented = state_dict["presented"]
        self._first_epoch = state_dict["first_epoch"]
        self.buffer.load_state_dict(ReplayBuffer.merge_states(of_all_ranks(state_dict["buffer"])))


def _card(kind: type[ContinualCallback]) -> MethodCard:
    card: MethodCard = kind.__dict__["card"]
    return card
