"""The datamodule that runs a whole stream of tasks in one ``fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_cl.core.events import TaskEvents
from lightning_cl.core.progress import batches_trained
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.core.task import Task
from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.identified import IdentifiedSamples
from lightning_cl.datamodules.labels import check_label_names
from lightning_cl.datamodules.loader import BatchDataset, TaskLoader, no_loaders
from lightning_cl.datamodules.plan import StreamPlan
from lightning_cl.datamodules.samplers import EvaluationSampler, RequestSampler, TaskSampler
from lightning_cl.datamodules.samples import TrainingSamples
from lightning_cl.datamodules.scenarios import Scenario, TaskPlan
from lightning_cl.datamodules.settings import check_stream_settings
from lightning_cl.datamodules.splits import Split, read_split
from lightning_cl.functional.reset_state import reset_state

__all__ = ["TaskStreamDataModule"]

# what a config can build, and Hugging Face datasets, which are untyped; jsonargparse builds no parametrised generic
Data = Dataset | list[Dataset] | tuple[Any, Any]  # type: ignore[type-arg]


class TaskStreamDataModule(IdentifiedSamples, LightningDataModule):
    """Turn datasets into a stream of tasks that one ``Trainer.fit`` runs from its first task to its last.

    The datamodule sets the Trainer's epoch limit to the length of the stream. The order of samples is a pure function
    of ``(seed, task, epoch)`` and the position in it is part of a checkpoint, so a run resumes at any step, on any
    number of ranks.

    Args:
        train: Training data: a map-style dataset, a Hugging Face dataset or ``DatasetDict`` (its ``"train"`` split), a
            tuple of arrays ``(inputs, labels)``, or a list of these, one per task, for ``Predefined``.
        val: Validation data of the same kind; one loader per task is made of it.
        test: Test data of the same kind.
        scenario: How the data becomes tasks, such as ``ClassIncremental(n_tasks=5)``.
        batch_size: Samples for each rank and step; at least 1.
        epochs_per_task: Passes over each task, or a list with one number per task.
        steps_per_task: Steps in each task, in place of ``epochs_per_task``: for tasks too long to pass over whole, or
            of very different lengths. A task shorter than that starts over with a new order.
        num_workers: Worker processes of each loader.
        collate_fn: Joins a list of samples to a batch; torch's default if ``None``.
        seed: Seed of the split, the order and the randomness of reading.
        evaluate: Which tasks' loaders are evaluated during the fit: those ``"seen"`` so far, ``"all"``, or only the
            ``"current"`` one.
        evaluate_every_n_epochs: Evaluate within a task too, after every so many epochs of it; at its end only if
            ``None``.
        optimizer_policy: What happens to the optimizers at the start of every task but the first: ``"keep"``,
            ``"reset_state"`` (momenta forgotten) or ``"rebuild"`` (``configure_optimizers`` is called again, which also
            restarts the learning-rate schedules).
        label: Key or position of the label in a sample, where it is not ``"label"``, ``"labels"`` or the last element.
        requests: Samples to forget after so many tasks; each becomes a task of the kind ``"forget"`` whose batches are
            ``{"forget": batch, "retain": batch}``. A callback such as :class:`~lightning_cl.unlearning.Unlearn` must
            serve them.
        epochs_per_request: Passes over what a request forgets.

    Raises:
        ValueError: Before training, for a setting out of range, an empty task, labels that cannot be read, or fewer
            classes than tasks.

    Example:
        >>> import torch
        >>> from lightning_cl.datamodules import ClassIncremental
        >>> inputs, labels = torch.randn(8, 2), torch.tensor([0, 1, 2, 3] * 2)
        >>> stream = TaskStreamDataModule((inputs, labels), scenario=ClassIncremental(n_tasks=2), epochs_per_task=3)
        >>> stream.setup("fit")
        >>> [task.classes for task in stream.tasks], stream.plan.num_epochs
        ([(0, 1), (2, 3)], 6)
    """

    def __init__(
        self,
        train: Data,
        val: Data | None = None,
        test: Data | None = None,
        *,
        scenario: Scenario,
        batch_size: int = 64,
        epochs_per_task: int | list[int] = 1,
        steps_per_task: int | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        evaluate: Literal["seen", "all", "current"] = "seen",
        evaluate_every_n_epochs: int | None = None,
        optimizer_policy: Literal["keep", "reset_state", "rebuild"] = "keep",
        label: str | int | None = None,
        requests: list[ForgetRequest] | None = None,
        epochs_per_request: int = 1,
    ) -> None:
        super().__init__()
        check_stream_settings(
            scenario,
            batch_size=batch_size,
            epochs_per_task=epochs_per_task,
            steps_per_task=steps_per_task,
            num_workers=num_workers,
            seed=seed,
            evaluate=evaluate,
            evaluate_every_n_epochs=evaluate_every_n_epochs,
            optimizer_policy=optimizer_policy,
            requests=requests,
            epochs_per_request=epochs_per_request,
        )
        self.sources = {"train": train, "val": val, "test": test}
        self.scenario = scenario
        self.batch_size = batch_size
        self.epochs_per_task = epochs_per_task
        self.steps_per_task = steps_per_task
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.seed = seed
        self.evaluate = evaluate
        self.evaluate_every_n_epochs = evaluate_every_n_epochs
        self.optimizer_policy = optimizer_policy
        self.label = label
        self.requests = list(requests or ())
        self.epochs_per_request = epochs_per_request
        self._splits: dict[str, Split] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._loader: TaskLoader | None = None
        self._evaluated: list[Task] = []
        self._evaluation_at: Task | None = None
        self._position: dict[str, int] | None = None

    # ------------------------------------------------------------------ what callbacks and events read

    @property
    def hides_boundaries(self) -> bool:
        """Whether task boundaries are kept from modules and from callbacks that do not evaluate."""
        return self.scenario.hides_boundaries

    @property
    def reveals_task(self) -> bool:
        """Whether the module may know which task an evaluation batch belongs to."""
        return self.scenario.reveals_task

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the stream, in order."""
        return self.plan.tasks

    def task_of_epoch(self, epoch: int) -> Task:
        """Return the task that the Trainer's ``epoch`` belongs to."""
        return self.plan.task_of_epoch(epoch)

    def ends_task(self, epoch: int) -> bool:
        """Return whether ``epoch`` is the last of its task."""
        return self.plan.ends_task(epoch)

    def epochs_and_batches(self) -> list[tuple[int, int]]:
        """Return the epochs of every task and the batches that a rank reads in each of them."""
        world_size, starts = self._ranks()["world_size"], self.plan.starts
        return [
            (stop - start, self._steps(plan) or -(-len(plan.indices) // (self.batch_size * world_size)))
            for plan, start, stop in zip(self.plan.plans, starts, starts[1:], strict=False)
        ]

    def evaluates_after(self, epoch: int) -> bool:
        """Return whether tasks are evaluated at the end of ``epoch``."""
        every = self.evaluate_every_n_epochs
        within = every is not None and (self.plan.epoch_in_task(epoch) + 1) % every == 0
        return "val" in self._splits and (within or self.ends_task(epoch))

    def evaluated_tasks(self) -> Sequence[Task]:
        """Return the tasks of the current evaluation loaders, in their order; their indices are matrix columns."""
        return self._evaluated

    def trained_by(self, task: Task) -> list[int]:
        """Return the matrix columns that ``task`` trains: a visit trains a task again, a joint run trains all."""
        return self.plan.trained_by(task)

    def request_evaluation(self, task: Task | None) -> None:
        """Give evaluation loaders as at the end of ``task``, whatever the epoch; ``None`` ends the request."""
        self._evaluation_at = task

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, stage: str) -> None:
        self._make_plan()
        trainer = self.trainer
        if trainer is None:
            return
        TaskEvents.attach(trainer)
        if stage == "fit":
            self._check_limits(trainer)
            # a fit starts at its beginning, or at the checkpoint that is loaded next
            self._loader = self._position = None
            # a loader per epoch, and as many epochs as the stream has
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
            trainer.check_val_every_n_epoch = 1
            limit, epochs = trainer.fit_loop.max_epochs, self.plan.num_epochs
            if limit not in (None, -1, 1000, epochs):
                rank_zero_info(f"`max_epochs={limit}` gives way to the {epochs} epochs of the task stream.")
            trainer.fit_loop.max_epochs = epochs

    def _check_limits(self, trainer: Trainer) -> None:
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError(
                f"`Trainer(overfit_batches={trainer.overfit_batches})` puts samplers of its own into the stream's"  # type: ignore[attr-defined]
                " loaders. Use `limit_train_batches` with `steps_per_task`, or a small subset of the data."
            )
        self._check_interval(trainer)
        serving = (getattr(callback, "acts_on", ()) == ("forget",) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if self.requests and not any(serving):
            raise ValueError(
                f"The stream has {len(self.requests)} `requests` to forget, and no callback of the Trainer serves them:"
                " add one such as `Unlearn`."
            )
        self.plan.check_single_pass(self.batch_size * self._ranks()["world_size"])

    def _check_interval(self, trainer: Trainer) -> None:
        interval, limit = trainer.val_check_interval, trainer.limit_train_batches
        if not isinstance(interval, int) or not trainer.limit_val_batches:
            return
        for task, (epochs, batches) in zip(self.tasks, self.epochs_and_batches(), strict=True):
            steps = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            if epochs and interval > steps:
                raise ValueError(
                    f"`Trainer(val_check_interval={interval})` is more than the {steps} batches of an epoch of"
                    f" {task.name!r}. Give a share of an epoch, such as 0.5, or use `evaluate_every_n_epochs`."
                )

    def _make_plan(self) -> None:
        if self._made is not None:
            return
        for name, source in self.sources.items():
            if source is not None:
                tensors = self.collate_fn is None
                self._splits[name] = read_split(source, name, self.scenario, self.label, tensors=tensors)
        check_label_names({name: split.dataset for name, split in self._splits.items()})
        self._made = StreamPlan(
            self.scenario,
            self._splits["train"],
            seed=self.seed,
            epochs_per_task=self.epochs_per_task,
            steps_per_task=self.steps_per_task,
            requests=self.requests,
            epochs_per_request=self.epochs_per_request,
        )
        self._samples = TrainingSamples(self._splits["train"], self._made, self.collate_fn, self.seed)
        # what an evaluation set lacks is an error before training
        for name in self._splits.keys() - {"train"}:
            self._evaluation_rows(name)

    def on_task_start(self, task: Task) -> None:
        """Apply the optimizer policy at a boundary; called by the task events."""
        trainer, policy = self._attached(), self.optimizer_policy
        if task.index > 0 and policy == "rebuild":
            trainer.strategy.setup_optimizers(trainer)
        for optimizer in trainer.optimizers if task.index > 0 and policy == "reset_state" else ():
            reset_state(optimizer)

    # ------------------------------------------------------------------ loaders

    @override
    def train_dataloader(self) -> TaskLoader:
        trainer = self._attached()
        epoch = trainer.current_epoch
        task = self.task_of_epoch(epoch)
        sampler = self._loader.sampler if self._loader is not None else None
        if not isinstance(sampler, TaskSampler) or sampler.task != task.index:
            plan = self.plan.plans[task.index]
            settings = {"task": task.index, "batch_size": self.batch_size, "seed": self.seed, **self._ranks()}
            if plan.retained is not None:
                sampler = RequestSampler(plan.indices, plan.retained, **settings)
            else:
                sampler = TaskSampler(plan.indices, steps=self.steps_per_task, **settings)
            # the same loader serves all epochs of its task, so that workers stay alive
            self._loader = TaskLoader(self.samples.dataset(task.index), sampler, num_workers=self.num_workers)
        assert self._loader is not None
        start = {"batches": 0, "samples": 0}
        if self._position is not None and self._position["epoch"] == epoch:
            start = {key: self._position[key] for key in start}
        sampler.set_position(epoch=self.plan.epoch_in_task(epoch), **start)
        return self._loader

    @override
    def val_dataloader(self) -> list[TaskLoader] | CombinedLoader:
        if "val" not in self._splits:
            return no_loaders()
        trainer = self._attached()
        if trainer.state.fn != "fit":
            return self._evaluation_loaders("val", self.plan.parts)
        task = self._evaluation_at or self.task_of_epoch(trainer.current_epoch)
        if (
            self._evaluation_at is None
            and not trainer.sanity_checking
            and not self.evaluates_after(trainer.current_epoch)
        ):
            self._evaluated = []
            return no_loaders()
        wanted: Sequence[int] = range(len(self.plan.parts))
        if self.evaluate != "all":
            wanted = self.plan.seen_by(task) if self.evaluate == "seen" else self.plan.trained_by(task)
        return self._evaluation_loaders("val", [self.plan.parts[part] for part in wanted])

    @override
    def test_dataloader(self) -> list[TaskLoader] | CombinedLoader:
        return self._evaluation_loaders("test", self.plan.parts) if "test" in self._splits else no_loaders()

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        name = next((name for name in ("test", "val") if name in self._splits), "train")
        return DataLoader(self._splits[name].dataset, batch_size=self.batch_size, collate_fn=self.collate_fn)

    def _evaluation_loaders(self, name: str, tasks: Sequence[Task]) -> list[TaskLoader]:
        rows = self._evaluation_rows(name)
        reader = batch_reader(self._splits[name].dataset, self.collate_fn)
        self._evaluated = list(tasks)
        return [
            TaskLoader(
                BatchDataset(reader, self.plan.part_plans[task.index].transform),
                EvaluationSampler(rows[task.index], batch_size=self.batch_size, **self._ranks()),
                num_workers=self.num_workers,
            )
            for task in tasks
        ]

    def _evaluation_rows(self, name: str) -> list[np.ndarray]:
        if name not in self._rows:
            # a request is not evaluated apart
            learning = [plan for plan in self.plan.plans if plan.retained is None]
            self._rows[name] = list(self.scenario.evaluation(learning, self._splits[name].info, self.seed))
        return self._rows[name]

    def _steps(self, plan: TaskPlan) -> int | None:
        # an epoch of a request is a pass over what it forgets
        return self.steps_per_task if plan.retained is None else None

    def _sampler(self) -> TaskSampler:
        assert self._loader is not None and isinstance(self._loader.sampler, TaskSampler)
        return self._loader.sampler

    def _ranks(self) -> dict[str, Any]:
        # shards of one replica read the same samples, so the strategy says who reads what
        replicas = getattr(self._attached().strategy, "distributed_sampler_kwargs", None) or {}
        return {"rank": int(replicas.get("rank", 0)), "world_size": int(replicas.get("num_replicas", 1))}

    def _attached(self) -> Trainer:
        if self.trainer is None:
            raise ValueError("The stream's loaders follow a Trainer: pass the datamodule to `Trainer.fit` or `test`.")
        return self.trainer

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loader is None:
            return {}
        batches = batches_trained(self._attached())
        return {
            "stream": self.plan.fingerprint(),
            "epoch": self._attached().current_epoch,
            "batches": batches,
            "samples": self._sampler().samples_after(batches) if batches else 0,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._attached().state.fn != "fit":
            return  # weights may be tested on any stream
        self._make_plan()
        if not self.plan.continues(state_dict["stream"]):
            raise ValueError(
                "The checkpoint is of another stream: the training data, `scenario`, `seed`, `epochs_per_task` and"
                " `steps_per_task` must be those of the saved run, and further `requests` must come after its end. Rows"
                " that were deleted from the data must stay as placeholders."
            )
        self._position = {key: int(state_dict[key]) for key in ("epoch", "batches", "samples")}
        if self._loader is not None and self._position["epoch"] == 0:
            # a scheduler asked for the stream's length, and so for the first loader, before the state came
            start = {key: self._position[key] for key in ("batches", "samples")}
            self._sampler().set_position(epoch=0, **start)
