"""Riemannian Walk (Chaudhry, Dokania, Ajanthan, Torr 2018, arXiv:1801.10112)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.path_integral import PathIntegral
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.distributed import max_over_ranks_
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.state import ParameterState
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.rwalk import (
    add_squares_,
    average_score_,
    moving_fisher_,
    rwalk_importance,
    walk_score_,
)

__all__ = ["RWalk"]


class RWalk(PathIntegral):
    r"""Hold the weights that lowered the loss much for how far they moved the predictions, and those of a high Fisher.

    From the second task on, the step minimises the task's loss plus eq. 8 of the paper, without a ½,

    .. math:: \lambda \sum_i \left( \frac{F_i}{\max F} + \frac{s_i}{\max s} \right) (\theta_i - \theta_i^*)^2,

    around the weights :math:`\theta^*` at the end of the last task. Every :math:`\Delta t` optimizer steps

    .. math:: F \leftarrow \alpha \overline{g^2} + (1 - \alpha) F, \qquad
        s_{task} \leftarrow s_{task}
        + \frac{\Delta L}{\frac{1}{2} F \, (\theta(t + \Delta t) - \theta(t))^2 + \epsilon}, \qquad
        \Delta L = -\sum_{t'} g(t') \left( \theta(t' + 1) - \theta(t') \right),

    with sums and the mean over these steps (eqs. 6, 7): how much the loss fell over how far the predictions moved, in
    KL divergence. F goes on over all tasks. At a task's end :math:`s \leftarrow \frac{1}{2} (s + \max(s_{task}, 0))`;
    the first task's score is taken whole. Both parts are divided by their maxima over all weights, so that the scale of
    neither decides. Gradients are those of the task's loss, before penalties and clipping.

    The paper's F is a mean over samples of squared gradients; per-sample gradients in every step would cost more than
    the training, so g is the step's gradient, as in the authors' code: it depends on the batch size, and so does s.
    Other than their code, this follows the paper in the ½ before F, in cutting negative scores off at a task's end and
    not in each interval, and in the average of scores. F holds the interval that it divides, so that with
    :math:`\Delta t = 1` it is eq. 6 at each step.

    Args:
        strength: :math:`\lambda`; above 0.
        alpha: :math:`\alpha`, the weight of the newest gradients in F; above 0, at most 1.
        interval: :math:`\Delta t`, optimizer steps between two updates of F and s; what is left of an interval at a
            task's end counts as a shorter one.
        damping: :math:`\epsilon`, above 0: what bounds the score of a weight that hardly moved the predictions.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to protect; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="rwalk",
        family="regularisation",
        paper="Chaudhry et al. 2018, arXiv:1801.10112",
        needs="nothing",
        state="8 float32 per parameter",
    )
    factor: ClassVar[float] = 2.0

    def __init__(
        self,
        strength: float,
        *,
        alpha: float = 0.9,
        interval: int = 10,
        damping: float = 1e-3,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(strength, include=include, exclude=exclude)
        if not 0 < alpha <= 1:
            raise ValueError(f"`alpha` must be above 0 and at most 1, got {alpha!r}.")
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"`interval` must be a whole number of steps, at least 1, got {interval!r}.")
        check_positive("damping", damping)
        self.alpha = alpha
        self.interval = interval
        self.damping = damping
        # F over all tasks, and s of the tasks before
        self.fisher = ParameterState()
        self.score = ParameterState()
        # s of this task; sums of squared gradients since the interval's start, and the weights there
        self._task_score = ParameterState()
        self._squares = ParameterState()
        self._starts = ParameterState()
        # steps since the interval's start, by parameter; parameters that have had an interval
        self._steps: dict[str, int] = {}
        self._measured: set[str] = set()

    @property
    def _states(self) -> dict[str, ParameterState]:
        return {
            "fisher": self.fisher,
            "score": self.score,
            "task_score": self._task_score,
            "squares": self._squares,
            "starts": self._starts,
        }

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for name, state in self._states.items():
            state.place(self.parameters, f"The state {name!r} of `RWalk`")

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        if not self.fisher:
            self.fisher.set(self._zeros(), self.parameters)
            self.score.set(self._zeros(), self.parameters)
        self._task_score.set(self._zeros(), self.parameters)
        self._squares.set(self._zeros(), self.parameters)
        self._starts.set(self.present_weights(), self.parameters)
        self._steps = dict.fromkeys(self.parameters, 0)

    # ------------------------------------------------------------------ the walk

    @override
    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        followed = self._followed_by(step)
        names = followed.moving
        add_squares_([self._squares[name] for name in names], [followed.gradients[name] for name in names])
        super().observe_update(trainer, pl_module, step)
        for name, parameter in followed.parameters.items():
            # a weight without a gradient has one of 0; what was frozen keeps its Fisher term
            self._steps[name] += parameter.requires_grad
        self._end_interval(name for name in followed.parameters if self._steps[name] >= self.interval)

    def _end_interval(self, names: Iterable[str]) -> None:
        """Take what was summed since the interval's start into F and s, and start another one."""
        for name in names:
            fisher, squares, path, start = self.fisher[name], self._squares[name], self.path[name], self._starts[name]
            moving_fisher_([fisher], [squares], self._steps[name], self.alpha if name in self._measured else 1.0)
            walk_score_([self._task_score[name]], [path], [fisher], [start], [self.weight(name)], self.damping)
            squares.zero_()
            path.zero_()
            start.copy_(self.weight(name))
            self._steps[name] = 0
            self._measured.add(name)

    # ------------------------------------------------------------------ consolidation

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.warn_of_thawed(pl_module)
        self._end_interval([name for name, steps in self._steps.items() if steps])
        names = list(self.parameters)
        first = not self.importance
        average_score_([self.score[name] for name in names], [self._task_score[name] for name in names], first)
        peaks = max_over_ranks_(torch.stack([_peak(self.fisher), _peak(self.score)])).tolist()
        importance = {name: rwalk_importance(self.fisher[name], self.score[name], *peaks) for name in names}
        self.protect(importance, self.present_weights())

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        # those of the path, F, s, s of the task, squares and weights at the interval's start; new importances as well
        return self._footprint(pl_module, kept=10, renewed=2)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            **{name: state.state_dict() for name, state in self._states.items()},
            "steps": dict(self._steps),
            "measured": sorted(self._measured),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name, state in self._states.items():
            state.load_state_dict(state_dict[name])
        self._steps = dict(state_dict["steps"])
        self._measured = set(state_dict["measured"])


def _peak(state: ParameterState) -> Tensor:
    """Return the largest element of this rank's shards of what is never negative, a scalar."""
    # a rank may hold no part of a small tensor
    peaks = [value.max() if value.numel() else value.new_zeros(()) for value in state.values()]
    return torch.stack(peaks).max()
