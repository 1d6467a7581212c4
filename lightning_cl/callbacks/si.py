"""Synaptic Intelligence (Zenke, Poole, Ganguli 2017, arXiv:1703.04200)."""

from __future__ import annotations

from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_cl.callbacks.path_integral import PathIntegral
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.task import Task
from lightning_cl.functional.path_integral import path_importance_

__all__ = ["SI"]


class SI(PathIntegral):
    r"""Hold the weights whose moves lowered the loss of earlier tasks near the values they had.

    From the second task on, the step minimises the task's loss plus eq. 4 of the paper, without a ½,

    .. math:: c \sum_i \Omega_i (\theta_i - \theta_i^*)^2, \qquad
        \Omega_i = \sum_{tasks} \frac{\omega_i}{\Delta_i^2 + \xi}, \qquad
        \omega_i = -\sum_t g_i(t) \left( \theta_i(t+1) - \theta_i(t) \right),

    with :math:`\omega` summed over all optimizer steps of a task, :math:`\Delta` the weight's change over the task and
    :math:`\theta^*` the weights at the end of the last one. The gradient g is that of the task's loss: unscaled, summed
    over accumulated batches, before penalties and clipping; the move is what the weight did in the end. Nothing is
    measured at a task's end, and the data is not read again.

    As in the paper, :math:`\Omega` may be negative, where a weight moved against its gradient: the penalty then drives
    that weight away from its old value, and has no minimum. ``clamp`` forbids it.

    Args:
        strength: c; above 0. With c = 1 old and new tasks weigh the same if the path integral is exact.
        damping: :math:`\xi`, above 0: what bounds the importance of a weight that hardly moved. The paper takes 0.1
            (permuted MNIST) and 0.001 (split MNIST and CIFAR).
        clamp: Raise negative :math:`\Omega` to 0 at each task's end, as the authors' code does for their results.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to protect; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free.

    Raises:
        ValueError: If ``strength`` or ``damping`` is not above 0; at the start of a fit for a pattern that matches
            nothing.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="si",
        family="regularisation",
        paper="Zenke, Poole, Ganguli 2017, arXiv:1703.04200",
        needs="nothing",
        state="3 float32 per parameter",
    )
    factor: ClassVar[float] = 2.0

    def __init__(
        self,
        strength: float,
        *,
        damping: float = 0.1,
        clamp: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(strength, include=include, exclude=exclude)
        check_positive("damping", damping)
        self.damping = damping
        self.clamp = clamp

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.warn_of_thawed(pl_module)
        names, weights = list(self.parameters), self.present_weights()
        importance = dict(self.importance) or self._zeros()
        path_importance_(
            [importance[name] for name in names],
            [self.path[name] for name in names],
            [self.anchors[name] for name in names],
            [weights[name] for name in names],
            self.damping,
            self.clamp,
        )
        self.protect(importance, weights)
