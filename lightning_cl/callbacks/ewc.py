"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796; online form Schwarz et al. 2018)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.fisher import Estimator, FisherEstimator
from lightning_cl.callbacks.measured import MeasuredPenalty
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice, check_positive
from lightning_cl.core.state import sum_over_shards
from lightning_cl.functional.ewc import merge_online_, merge_separate_

__all__ = ["EWC"]


class EWC(MeasuredPenalty):
    r"""Hold the weights that mattered for earlier tasks near the values they had.

    From the second task on, the step minimises the task's loss plus

    .. math:: \frac{\lambda}{2} \sum_i F_i (\theta_i - \theta_i^*)^2,
        \qquad F = \frac{1}{N} \sum_{n=1}^{N} \left( \nabla_\theta \log p(y_n \mid x_n) \right)^2,

    with F a mean over **samples** of squared per-sample gradients, measured in evaluation mode at a task's end. The
    penalty acts as its gradient :math:`\lambda F (\theta - \theta^*)`, added once per optimizer step after unscaling
    and before clipping, which equals the penalty in the loss. Other libraries leave out the ½ or square the gradient of
    a batch; the page of the method converts their :math:`\lambda`.

    Args:
        strength: :math:`\lambda`; above 0. At 0.5 elsewhere without the ½ it is 1 here.
        fisher: Whose labels y are: ``"empirical"`` (the data's; the module's own loss, so any loss works),
            ``"sampled"`` (one draw from the model for each sample), ``"exact"`` (the expectation over the model's
            classes, one backward pass for each class), or ``"batched"``, a cheap approximation: the squared gradient of
            a batch's summed loss, which depends on the batch size and is no Fisher information.
        mode: ``"online"``: :math:`F \leftarrow \gamma F + F_{task}`, anchored at the latest weights; ``"separate"``:
            one quadratic per task around the weights at its end, folded into one, so that a step costs the same.
        decay: :math:`\gamma` of the online form, from 0 to 1.
        n_samples: Samples to measure F on, over all ranks; the whole task if ``None``.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to protect; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free.
        logits: Name of the submodule that returns the class scores, for ``"sampled"`` and ``"exact"``; found by itself
            in most modules.
        batch_adapter: Reads batches of an uncommon structure.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, and for an
            estimator that the module cannot serve.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="ewc",
        family="regularisation",
        paper="Kirkpatrick et al. 2017, arXiv:1612.00796",
        needs="a loss that is a mean over samples; class scores for exact and sampled",
        state="2 float32 per parameter",
    )

    def __init__(
        self,
        strength: float,
        *,
        fisher: Estimator = "empirical",
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        n_samples: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        logits: str | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        check_choice("mode", mode, ("online", "separate"))
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` must be from 0 to 1, got {decay!r}.")
        if mode == "separate" and decay != 1.0:
            raise ValueError(f"`decay={decay}` belongs to `mode='online'`; separate quadratics do not fade.")
        if n_samples is not None:
            check_positive("n_samples", n_samples)
        estimator = FisherEstimator(fisher, batch_adapter or BatchAdapter(), n_samples, logits)
        super().__init__(strength, estimator, include=include, exclude=exclude)
        self.fisher = fisher
        self.mode = mode
        self.decay = self.fading = decay

    @override
    def merge(self, new: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        if not self.importance:
            self.protect(new, weights)
            return
        names = list(self.parameters)
        fisher, added = [self.importance[name] for name in names], [new[name] for name in names]
        if self.mode == "online":
            merge_online_(fisher, added, self.decay)
            self.protect(None, weights)
        else:
            rises = {
                name: merge_separate_([total], [self.anchors[name]], [term], [weights[name]])
                for name, total, term in zip(names, fisher, added, strict=True)
            }
            self._constant += float(sum_over_shards(rises, self.parameters))
