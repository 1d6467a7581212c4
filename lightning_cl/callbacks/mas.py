"""Memory aware synapses (Aljundi et al. 2018, arXiv:1711.09601)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.measured import MeasuredPenalty
from lightning_cl.callbacks.sensitivity import OutputSensitivity
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive

__all__ = ["MAS"]


class MAS(MeasuredPenalty):
    r"""Hold the weights that sway the output of the model near the values they had; no labels needed.

    From the second task on, the step minimises the task's loss plus

    .. math:: \lambda \sum_i \Omega_i (\theta_i - \theta_i^*)^2,
        \qquad \Omega \leftarrow \Omega + \frac{1}{N} \sum_{n=1}^{N}
        \left| \frac{\partial \lVert f(x_n) \rVert_2^2}{\partial \theta} \right|,

    without a ½, with :math:`\theta^*` the weights at the end of the last task. A task's term is a mean over **samples**
    of absolute per-sample gradients of the squared L2 norm of the output, measured in evaluation mode at its end, and
    the terms of tasks add up. The penalty acts as its gradient :math:`2 \lambda \Omega (\theta - \theta^*)`, added once
    per optimizer step after unscaling and before clipping, which equals the penalty in the loss. Other libraries take
    the absolute value of a batch's gradient; the page of the method converts their :math:`\lambda`.

    Args:
        strength: :math:`\lambda`; above 0.
        n_samples: Samples to measure a task's term on, over all ranks; the whole task if ``None``.
        outputs: Name of the submodule that returns :math:`f(x)`, ``[B, ...]``; found by itself in most modules. Of
            outputs ``[B, T, C]`` padding is left out: positions where the batch's ``attention_mask`` is 0, or without
            one those of label -100.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to protect; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free.
        batch_adapter: Reads batches of an uncommon structure.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, and for a
            module without an output to measure.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="mas",
        family="regularisation",
        paper="Aljundi et al. 2018, arXiv:1711.09601",
        needs="an output with one row for each sample; no labels",
        state="2 float32 per parameter",
    )
    factor: ClassVar[float] = 2.0

    def __init__(
        self,
        strength: float,
        *,
        n_samples: int | None = None,
        outputs: str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        if n_samples is not None:
            check_positive("n_samples", n_samples)
        estimator = OutputSensitivity(batch_adapter or BatchAdapter(), n_samples, outputs)
        super().__init__(strength, estimator, include=include, exclude=exclude)

    @override
    def merge(self, new: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        if self.importance:
            new = {name: self.importance[name].add_(term) for name, term in new.items()}
        self.protect(new, weights)
