"""L2 distance to old weights (L2-SP: Li et al. 2018, arXiv:1802.01483; over tasks: Smith et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_cl.callbacks.penalty import QuadraticPenalty
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice
from lightning_cl.core.task import Task

__all__ = ["L2Anchor"]


class L2Anchor(QuadraticPenalty):
    r"""Hold all weights alike near the values they had, or near the pre-trained ones.

    The step minimises the task's loss plus

    .. math:: \frac{\lambda}{2} \sum_i (\theta_i - \theta_i^*)^2,

    a sum over weights (L2-SP of Li et al. 2018, arXiv:1802.01483, without its plain weight decay of the new layers,
    which is an optimizer's setting). The penalty acts as its gradient :math:`\lambda (\theta - \theta^*)`, added once
    per optimizer step after unscaling and before clipping, which equals the penalty in the loss.

    Smith et al. 2023, arXiv:2203.17269, take the weights of the previous task for :math:`\theta^*`, and hold the
    self-attention blocks only: ``L2Anchor(strength, include=["*.attn.*"])``.

    Args:
        strength: :math:`\lambda`; above 0. At 0.5 elsewhere without the ½ it is 1 here.
        anchor: :math:`\theta^*`: ``"previous"``, the weights at the end of the task before, from the second task on;
            ``"pretrained"``, those at the start of the first fit, from its first step on and for good.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to hold; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free, such as a new head.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="l2",
        family="regularisation",
        paper="Li et al. 2018, arXiv:1802.01483",
        needs="nothing",
        state="1 float32 per parameter",
    )
    weighted: ClassVar[bool] = False

    def __init__(
        self,
        strength: float,
        *,
        anchor: Literal["previous", "pretrained"] = "previous",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(strength, include=include, exclude=exclude)
        check_choice("anchor", anchor, ("previous", "pretrained"))
        self.anchor = anchor
        if anchor == "pretrained":
            self.boundaries = "unused"  # type: ignore[misc]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.anchor == "pretrained" and not self.anchors:
            # a later fit and a resumed one have anchors by now
            self.protect(None, self.present_weights())

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.warn_of_thawed(pl_module)
        if self.anchor == "previous":
            self.protect(None, self.present_weights())
