"""The metrics of unlearning over the batches of a loader and over ranks: each sample counts once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_cl.core.checks import check_choice
from lightning_cl.metrics.unlearning.membership import check_scores, membership_auc
from lightning_cl.metrics.unlearning.memorization import (
    exact_memorization,
    extraction_strength,
    probability,
    truth_ratio,
    truth_ratio_score,
)
from lightning_cl.metrics.unlearning.quality import forget_quality

__all__ = [
    "ExactMemorization",
    "ExtractionStrength",
    "ForgetQuality",
    "MembershipAUC",
    "Probability",
    "SampleScores",
    "TruthRatio",
]


class SampleScores(Metric):
    """One number for each sample, of all batches and ranks.

    With identities a sample counts once, however often it was read: a distributed sampler repeats samples where the
    ranks' shares are unequal. The scores then come in the order of the identities, so that those of two models can be
    compared sample by sample.

    Args:
        settings: As for :class:`torchmetrics.Metric`.

    Example:
        >>> scores = SampleScores()
        >>> scores.update(torch.tensor([0.5, 0.25]), ids=torch.tensor([7, 3]))
        >>> scores.update(torch.tensor([0.5]), ids=torch.tensor([7]))
        >>> scores.compute()
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """

    full_state_update = False
    values: list[Tensor]
    ids: list[Tensor]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # torchmetrics gives a rank that saw no sample an empty tensor of the metric's dtype: one dtype for all states
        self.set_dtype(torch.float64)
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("ids", [], dist_reduce_fx="cat")

    @override
    def update(self, values: Tensor, ids: Tensor | None = None) -> None:
        """Add scores ``[B]``, NaN for samples without one, with their identities, int64 ``[B]``.

        Raises:
            ValueError: If the shapes do not fit, an identity is below 0 or too large for a float64, or only some
                batches come with identities.
        """
        if values.ndim != 1 or (ids is not None and ids.shape != values.shape):
            given = "" if ids is None else f" and `ids` of shape {tuple(ids.shape)}"
            raise ValueError(f"`values` must be Tensor[B], got shape {tuple(values.shape)}{given}.")
        if ids is None:
            ids = torch.full_like(values, -1, dtype=torch.int64)
        elif ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= 2**53):
            raise ValueError(f"`ids` must be from 0 to 2**53 - 1, got {int(ids.min())} to {int(ids.max())}.")
        self.values.append(values.detach().double())
        self.ids.append(ids.double())

    @override
    def compute(self) -> Any:
        """Return the scores float64 ``[N]``, by identity where there are any, else in the order of the ranks.

        Of a single sample torchmetrics makes a scalar.
        """
        return self.joined()

    def joined(self) -> Tensor:
        """Return the scores that are no NaN, of each sample once."""
        return _each_once(self._all(self.values), self._all(self.ids))

    def _all(self, parts: list[Tensor]) -> Tensor:
        """Return a state of all batches, which is a tensor already once the ranks' were gathered."""
        return dim_zero_cat(parts) if len(parts) else torch.zeros(0, dtype=torch.float64, device=self.device)


def _each_once(values: Tensor, ids: Tensor) -> Tensor:
    """Return the values that are no NaN, by identity and of each identity once if there are any."""
    if (ids >= 0).any():
        if (ids < 0).any():
            raise ValueError("Some batches came with `ids` and some without: give them for all or for none.")
        ids, order = ids.sort(stable=True)
        values = values[order][torch.cat([ids.new_ones(1), ids.diff()]) > 0]
    return values[~values.isnan()]


class _MeanScore(SampleScores):
    """The mean over samples of a function of logits and labels."""

    score: Callable[[Tensor, Tensor], Tensor]

    @override
    def update(self, logits: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:  # type: ignore[override]
        """Add a batch: logits and labels as for the function, identities of the samples int64 ``[B]``."""
        super().update(type(self).score(logits, labels), ids)

    @override
    def compute(self) -> Tensor:
        """Return the mean, scalar float32, NaN without a sample."""
        return self.joined().mean().float()


class Probability(_MeanScore):
    """The mean over samples of :func:`probability`; from 0 to 1, high = known.

    Example:
        >>> metric = Probability()
        >>> metric.update(torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.7000)
    """

    score = staticmethod(probability)


class ExactMemorization(_MeanScore):
    """The mean over samples of :func:`exact_memorization`; from 0 to 1, high = known.

    Example:
        >>> metric = ExactMemorization()
        >>> metric.update(torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log(), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    score = staticmethod(exact_memorization)


class ExtractionStrength(_MeanScore):
    """The mean over samples of :func:`extraction_strength`; from 0 to 1, high = known.

    Example:
        >>> metric = ExtractionStrength()
        >>> metric.update(torch.eye(4)[[0, 2, 3, 0]].unsqueeze(0), torch.tensor([[-100, 1, 2, 3]]))
        >>> metric.compute()
        tensor(0.6667)
    """

    score = staticmethod(extraction_strength)


class TruthRatio(SampleScores):
    """The mean over samples of :func:`truth_ratio_score`, from 0 to 1.

    Args:
        kind: ``"forget"`` (high = right and wrong answers are alike) or ``"retain"`` (high = told apart).
        mean: Over the wrong answers, ``"geometric"`` or ``"arithmetic"``.
        settings: As for :class:`torchmetrics.Metric`.

    Raises:
        ValueError: For an unknown setting.

    Example:
        >>> metric = TruthRatio("retain", mean="arithmetic")
        >>> metric.update(-torch.tensor([0.5]).log(), -torch.tensor([[0.4, 0.1]]).log())
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(
        self,
        kind: Literal["forget", "retain"],
        *,
        mean: Literal["geometric", "arithmetic"] = "geometric",
        **settings: Any,
    ) -> None:
        check_choice("kind", kind, ("forget", "retain"))
        check_choice("mean", mean, ("geometric", "arithmetic"))
        super().__init__(**settings)
        self.kind = kind
        self.mean = mean

    @override
    def update(self, right_nll: Tensor, wrong_nll: Tensor, ids: Tensor | None = None) -> None:  # type: ignore[override]
        """Add a batch: mean losses ``[B]`` of the right answers and ``[B, J]`` of the wrong ones."""
        ratio = truth_ratio(right_nll, wrong_nll, mean=self.mean)
        super().update(truth_ratio_score(ratio, self.kind), ids)

    @override
    def compute(self) -> Tensor:
        """Return the mean, scalar float32, NaN without a sample."""
        return self.joined().mean().float()


class ForgetQuality(SampleScores):
    """The test of :func:`forget_quality` on the scores of all batches and ranks.

    Args:
        retrained_scores: Scores ``[M]`` of the model retrained without the forget samples.
        settings: As for :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``retrained_scores`` are empty, NaN or not ``[M]``; from ``compute``, if no score was added.

    Example:
        >>> metric = ForgetQuality(torch.arange(4.0) + 10)
        >>> metric.update(torch.arange(4.0))
        >>> {name: round(float(value), 2) for name, value in metric.compute().items()}  # p = 2 / 70
        {'log10_p': -1.54, 'statistic': 1.0}
    """

    def __init__(self, retrained_scores: Tensor, **settings: Any) -> None:
        check_scores("retrained_scores", retrained_scores)
        super().__init__(**settings)
        self.retrained_scores = retrained_scores.detach().clone()

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return ``log10_p`` and ``statistic``, scalars float32."""
        result = forget_quality(self.joined(), self.retrained_scores)
        return {name: torch.tensor(value, device=self.device) for name, value in result._asdict().items()}


class MembershipAUC(SampleScores):
    """The attack of :func:`membership_auc` on the scores of all batches and ranks, the retrained model's beside it.

    Args:
        retrained_auc: AUC of the same attack against the model retrained without the forget samples, what to compare
            with; ``None`` if there is no such model.
        settings: As for :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``retrained_auc`` is not from 0 to 1; from ``compute``, if one of the two sets is empty.

    Example:
        >>> metric = MembershipAUC(retrained_auc=0.5)
        >>> metric.update(torch.tensor([0.1, 0.2]), torch.tensor([True, True]))
        >>> metric.update(torch.tensor([0.5, 0.15]), torch.tensor([False, False]))
        >>> metric.compute()
        {'auc': tensor(0.7500), 'retrained_auc': tensor(0.5000)}
    """

    forget: list[Tensor]

    def __init__(self, retrained_auc: float | None = None, **settings: Any) -> None:
        if retrained_auc is not None and not 0 <= retrained_auc <= 1:
            raise ValueError(f"`retrained_auc` must be from 0 to 1, got {retrained_auc!r}.")
        super().__init__(**settings)
        self.retrained_auc = retrained_auc
        self.add_state("forget", [], dist_reduce_fx="cat")

    @override
    def update(self, scores: Tensor, is_forget: Tensor, ids: Tensor | None = None) -> None:  # type: ignore[override]
        """Add scores ``[B]``, high = non-member, whether each is of a forget sample, bool ``[B]``, and identities.

        The two sets may be rows of different datasets: an identity means another sample in each.
        """
        if is_forget.shape != scores.shape or is_forget.dtype != torch.bool:
            raise ValueError(
                f"`is_forget` must be bool of the shape of `scores`, got {is_forget.dtype} {tuple(is_forget.shape)} for"
                f" {tuple(scores.shape)}."
            )
        super().update(scores, ids)
        self.forget.append(is_forget.double())

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return ``auc`` and, if it was given, ``retrained_auc``, scalars float32."""
        values, ids, forget = self._all(self.values), self._all(self.ids), self._all(self.forget) == 1
        result = {"auc": membership_auc(*(_each_once(values[part], ids[part]) for part in (forget, ~forget))).auc}
        if self.retrained_auc is not None:
            result["retrained_auc"] = self.retrained_auc
        return {name: torch.tensor(value, device=self.device) for name, value in result.items()}
