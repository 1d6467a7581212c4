"""What a method is to Lightning: a callback that also hears of tasks and acts inside a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.core.configure import before_wrapping
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep

__all__ = ["ContinualCallback", "continual_callbacks"]

# of Lightning's own hooks, those of a training step
_STEP_HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
)


class ContinualCallback(Callback):
    """A Lightning callback that also hears of tasks and may act inside a step.

    Its hooks come on top of Lightning's own, and each is called for all callbacks in the order of
    ``trainer.callbacks`` before the next one is. In a training step: ``transform_batch``, ``around_step``, the module's
    own ``training_step``, ``replace_loss``, ``loss_term``. In an optimizer step: ``observe_gradients``,
    ``change_gradients``, ``hold_gradients``, ``limit_gradients``, Lightning's clipping and the step itself,
    ``change_update``, ``observe_update``. So a callback's place in the list decides neither what a path integral takes
    for the task's gradient nor whether a penalty moves what a mask holds.

    Two ways to run, one behaviour: over a task stream in one ``fit``, or over any other data with one ``fit`` per
    task. In the second, what the callback learned lives on in the object, or in the checkpoint given as ``ckpt_path``.

    While a request to forget is served, methods that learn rest: no hook of a step or of the request's task is called.

    Attributes:
        acts_on: The kinds of tasks that it acts in; in others it rests.
        resting: Whether it rests now.
        boundaries: What the callback knows of task boundaries: ``"required"`` (refused on a stream that hides them),
            ``"unused"``, or ``"evaluation"`` (told even on such a stream, because it only measures).
        needs_state: Whether a checkpoint without this callback's state is an error on resume.
        takes_own_loss: Whether it changes the module's own loss, or takes it on samples of its own; it means nothing
            beside a callback that replaces that loss.
        compares_weights: Whether it holds weights against those of earlier tasks, or averages over them; it means
            nothing for adapters that start anew with every task.
        skips_steps: Whether the steps of the present task that are left shall not be made; the same on all ranks.
        ended_tasks: How many tasks of each kind ended so far, over all fits.
    """

    acts_on: ClassVar[tuple[Literal["learn", "forget"], ...]] = ("learn",)
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "required"
    needs_state: ClassVar[bool] = True
    takes_own_loss: bool = False
    compares_weights: bool = False
    ended_tasks: Mapping[str, int] = MappingProxyType({})
    resting: bool = False
    skips_steps: bool = False

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for name in _STEP_HOOKS:
            if name in cls.__dict__:
                setattr(cls, name, _unless_resting(cls.__dict__[name]))

    @property
    def completed_tasks(self) -> int:
        """Tasks of the kinds it acts in that ended so far, over all fits: a method that learns counts no request."""
        return sum(self.ended_tasks.get(kind, 0) for kind in self.acts_on)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # it needs this class
        from lightning_cl.core.events import TaskEvents

        TaskEvents.attach(trainer)
        if type(self).prepare_module is not ContinualCallback.prepare_module:
            change = partial(self.prepare_module, trainer, pl_module, stage)
            before_wrapping(pl_module, change, built=self.finds_network(pl_module))

    def prepare_module(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add to the module, or freeze, what must be so before the strategy wraps it and its optimizers are made.

        Called for every stage, when the network is there: a checkpoint is loaded into what is found then. What an
        earlier fit of the same module added must be recognised.
        """

    def finds_network(self, pl_module: LightningModule) -> bool:
        """Return whether what :meth:`prepare_module` changes is there before the module's own ``configure_model``.

        That may then be what shards it, and the change comes first.
        """
        return False

    def before_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Called before the module's layers and ``on_task_start`` of any callback change something for a task."""

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Called before the first batch of a task; not called again when a run resumes inside it.

        Layers that hear of tasks are ready for it: a head that grows has the rows of its classes.
        """

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Called after the last optimizer step of a task and before the validation that follows it."""

    def on_weights_rewritten(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after a callback has moved what weights hold from some to others: no part of an older copy fits."""

    def transform_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        """Return the batch that the module's ``training_step`` gets; it is on the device already."""
        return batch

    def replace_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor:
        """Return the loss that takes the place of the module's own; one callback of a Trainer at most may do so.

        Not called in a step that returns no loss, which Lightning skips.
        """
        raise NotImplementedError

    def loss_term(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        """Return a scalar to add to the loss of ``training_step``, or ``None``; under automatic optimization only."""
        return None

    @contextmanager
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        """Enclose the module's ``training_step``; the batch is the one it gets. A teacher's forward comes before it."""
        yield

    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        """Read the gradients of the loss: averaged over ranks, unscaled, and not yet changed by any callback."""

    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        """Add to the gradients, or turn them."""

    def hold_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        """Take gradients away from what may not move.

        A gradient of ``None`` holds a whole tensor: torch's optimizers then touch neither it nor its state.
        """

    def limit_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        """Clip what is left, before Lightning clips."""

    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        """Correct the weights after the optimizer moved them; not called when it skipped its step."""

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        """Read the weights after all corrections of a step."""

    def forget_samples(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor) -> list[Influence]:
        """Remove what is kept of samples that are about to be forgotten; called on all ranks before the request.

        Args:
            trainer: The running Trainer.
            pl_module: The user's module.
            sample_ids: Identities of the samples, int64 [n], the same on all ranks.
        """
        return []

    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        """Compute anew what the forgotten samples had a share in, as far as data allow; called after the request.

        Args:
            trainer: The running Trainer; its datamodule is a :class:`~lightning_cl.core.requests.RequestStream`, or the
                request came with loaders of the user's own.
            pl_module: The user's module, which has forgotten.
            task: The task that served the request.
        """
        forgets = type(self).forget_samples is not ContinualCallback.forget_samples
        if forgets or not self.needs_state:
            return []
        card = getattr(self, "card", None)
        return [Influence(type(self).__name__, "its state" if card is None else card.state, "remains")]

    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        """Return what the callback will take on a rank, from sharded parameters and a batch without values."""
        return Footprint()


def continual_callbacks(trainer: Trainer) -> list[ContinualCallback]:
    """Return those of a Trainer's callbacks that hear of tasks, in its order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ContinualCallback)]


def _unless_resting(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def called(self: ContinualCallback, *arguments: Any, **named: Any) -> Any:
        return None if self.resting else hook(self, *arguments, **named)

    return called
