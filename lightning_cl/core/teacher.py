"""A teacher: what a module computes in the present step with the weights that it had before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_cl.core.adapters import adapters_disabled, has_adapters
from lightning_cl.core.capture import OutputCapture, class_scores, forward_step, undisturbed
from lightning_cl.core.checks import check_choice
from lightning_cl.core.copies import WeightCopy
from lightning_cl.core.step import loss_of

__all__ = ["Teacher", "TeacherKind", "Watched"]

TeacherKind = Literal["previous", "pretrained", "ema", "base"]


class Watched:
    """What one submodule returned in the present step, to the teacher and to the student."""

    def __init__(self, capture: OutputCapture) -> None:
        self.capture = capture
        self._teacher: Tensor | None = None
        self._student: Tensor | None = None

    def show(self, *, teacher: bool) -> None:
        """Keep what was recorded, as the teacher's or as the student's."""
        output = self.capture.found
        if teacher:
            self._teacher = None if output is None else output.detach()
        else:
            self._student = output
        self.capture.clear()

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the student's output and the teacher's, and forget them: they hold the step's graph.

        Raises:
            ValueError: If the submodule was not called in the step.
        """
        if self._student is None or self._teacher is None:
            # says what was looked for
            _ = self.capture.output
        student, teacher, self._student, self._teacher = self._student, self._teacher, None, None
        assert student is not None and teacher is not None
        return student, teacher


class Teacher:
    """Runs the user's own training step on the step's batch with other weights, before the student does.

    It computes in evaluation mode, without gradients, in the student's precision and with the random numbers that the
    student is about to draw, so that a random augmentation inside the step is the same for both; and it leaves no
    trace. Frozen parameters are shared, so of adapters on a frozen base it keeps the adapters only. It is no part of
    the module: neither its state dict nor its optimizers know it. For the new classes of a head that grew since, it
    gives the student's own scores.

    Args:
        kind: Whose weights: ``"previous"`` (those that the present task started from, so there is none in the first
            task), ``"pretrained"`` (those that the first fit started from), ``"ema"`` (an exponential moving average),
            ``"base"`` (the module without its adapters or prompts: no weights are kept).
        owner: The callback, for errors.
        decay: Of ``"ema"``: the share of the average that stays at each optimizer step.

    Attributes:
        loss: What the user's step returned to the teacher as its loss, in the present step.
        runs: Forwards so far.

    Raises:
        ValueError: If ``kind`` is unknown, or ``decay`` is no number between 0 and 1 or does not go with it.
    """

    def __init__(self, kind: TeacherKind, *, owner: str, decay: float | None = None) -> None:
        check_choice("teacher", kind, get_args(TeacherKind))
        if (kind == "ema") != (decay is not None):
            raise ValueError(f"`decay` goes with `teacher='ema'`, got `teacher={kind!r}`, `decay={decay!r}`.")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"`decay` must be above 0 and below 1, got {decay!r}.")
        self.kind = kind
        self.decay = decay
        self.loss: Tensor | None = None
        self.runs = 0
        self._owner = owner
        self._copy = self._no_weights()
        self._watched: list[Watched] = []
        self._inside = False
        # what holds for all steps of a task and is looked at in the first one
        self._checked = False

    def _no_weights(self) -> WeightCopy:
        # an average of half-precision weights would stand still
        return WeightCopy(self._owner, float32=self.kind == "ema")

    def __bool__(self) -> bool:
        """Whether it has weights to teach with."""
        return self.kind == "base" or bool(self._copy)

    # ------------------------------------------------------------------ the life of a fit

    def replaces(self, other: Teacher) -> bool:
        """Return whether, at the start of a fit, this teacher may do the work of another from now on.

        It may if it is the other, or of one kind and decay with it, and neither has weights that the other lacks.
        Of several callbacks with one teacher, one calls :meth:`start_fit`, :meth:`start_task` and :meth:`follow`, and
        keeps its state.
        """
        # the weights of `previous` are taken anew by every task, and `base` has none
        either = self.kind in ("previous", "base") or not (self or other)
        return self is other or (either and (self.kind, self.decay) == (other.kind, other.decay))

    def start_fit(self, pl_module: LightningModule, *, inside_task: bool) -> None:
        """Bring restored weights to their place, or take the first ones; from ``on_train_start``.

        Args:
            pl_module: The user's module.
            inside_task: Whether the fit goes on with a task that a checkpoint was written in.
        """
        self._checked = False
        if self.kind == "base":
            if not has_adapters(pl_module):
                raise ValueError(
                    f"`{self._owner}(teacher='base')` teaches with the module without its adapters, and"
                    f" {type(pl_module).__name__} has none. Use `teacher='pretrained'`, which keeps a copy."
                )
            with adapters_disabled(pl_module):  # refuses what it cannot leave out
                return
        if self.kind == "previous" and not inside_task:
            # of an earlier fit: the task that starts takes others, also of a module with other weights to train
            self._copy = self._no_weights()
        self._copy.widen(pl_module)
        self._copy.place(pl_module)
        if not self and self.kind != "previous":
            self._copy.take(pl_module)

    def start_task(self, pl_module: LightningModule, *, first: bool) -> None:
        """Take the weights that a task starts from, unless it is the first; from ``before_task_start``."""
        self._checked = False
        if self.kind == "previous" and not first:
            self._copy.take(pl_module)

    def follow(self, pl_module: LightningModule, parameters: Mapping[str, Tensor]) -> None:
        """Move an average towards the parameters of an optimizer that has stepped; from ``observe_update``."""
        if self.decay is not None:
            self._copy.move_towards(pl_module, 1 - self.decay, parameters)

    def renew(self, pl_module: LightningModule) -> Literal["removed", "recomputed"] | None:
        """Let weights go that may know forgotten samples; a kind that is not taken anew by every task takes others.

        Returns:
            What became of them, ``None`` if there were none.
        """
        if self.kind == "base" or not self:
            return None
        if self.kind == "previous":
            self._copy = self._no_weights()
            return "removed"
        self._copy.take(pl_module)
        return "recomputed"

    def warn_of_thawed(self, pl_module: LightningModule) -> None:
        """Warn of parameters that became trainable after the weights were taken: they teach themselves."""
        if thawed := self._copy.thawed(pl_module):
            rank_zero_warn(
                f"The teacher of `{self._owner}` has no weights of its own for {thawed[:3]}, which became trainable"
                " after it took them: there it is the student. Make them trainable before the task."
            )

    def end_fit(self) -> None:
        """Take the hooks off the module; from ``teardown``."""
        for watched in self._watched:
            watched.capture.__exit__()
        self._watched = []

    # ------------------------------------------------------------------ a step

    def watch(
        self,
        pl_module: LightningModule,
        name: str | None,
        read: Callable[[Any], Tensor | None] = class_scores,
    ) -> Watched:
        """Look at what a submodule returns in each step of this fit, as :class:`OutputCapture` finds it.

        Raises:
            ValueError: If ``name`` names no submodule.
        """
        capture = OutputCapture(pl_module, name, read).__enter__()
        capture.enabled = False
        self._watched.append(Watched(capture))
        return self._watched[-1]

    @contextmanager
    def around_step(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        """Run the teacher, then let the block run the student; both are watched.

        In another's block it does nothing, so that callbacks with one teacher have one forward.

        Raises:
            ValueError: If the user's step changes its batch in place.
        """
        if not self or self._inside:
            yield
            return
        self._inside = True
        try:
            with self._recording(teacher=True):
                self._run(pl_module, batch, batch_idx)
            with self._recording(teacher=False):
                yield
        finally:
            self._inside = False

    def _run(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        tensors: list[Tensor] = []
        if not self._checked:
            # a module grows its head at a task's start, after the weights were taken
            self._copy.widen(pl_module)
            leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        weights = adapters_disabled(pl_module) if self.kind == "base" else self._copy.in_place(pl_module)
        with undisturbed(pl_module, None, as_in_step=True), weights:
            self.loss = loss_of(forward_step(pl_module, batch, batch_idx))
        self.runs += 1
        self._checked = True
        if versions != [tensor._version for tensor in tensors]:
            raise ValueError(
                f"`{type(pl_module).__name__}.training_step` changes its batch in place, so the student would see"
                " another batch than its teacher. Let it work on a copy."
            )

    @contextmanager
    def _recording(self, *, teacher: bool) -> Iterator[None]:
        for watched in self._watched:
            watched.capture.enabled = True
        try:
            yield
            for watched in self._watched:
                watched.show(teacher=teacher)
        finally:
            for watched in self._watched:
                watched.capture.enabled = False
                watched.capture.clear()

    # ------------------------------------------------------------------ memory and checkpoints

    def num_bytes(self, pl_module: LightningModule) -> int:
        """Return what it keeps on this rank."""
        return 0 if self.kind == "base" else self._copy.num_bytes(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return its weights."""
        return self._copy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; :meth:`start_fit` brings it to its devices and shards."""
        self._copy.load_state_dict(state)
