"""Primal-dual unlearning."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import dual_update, pdu_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["PDU"]


class PDU(ForgetLoss):
    r"""Flatten the logits of the forget set, subject to a bound on the retain loss.

    .. math:: \frac{1}{n} \sum_b \sum_{t \in S_b} \left( \max_v z_{btv} - \frac{1}{V} \sum_v z_{btv} \right)^2
        + \mu \, (L_r - \epsilon), \qquad \mu \leftarrow \max(0, \mu + \eta \, (L_r - \epsilon))

    with :math:`L_r` the retain term, whose weight besides :math:`\mu` is ``Unlearn(retain_weight=1.0)``. The multiplier
    moves once per optimizer step, by the retain loss of all its micro-batches and ranks; published code moves it in
    every micro-batch and on each rank by itself.

    Args:
        epsilon: :math:`\epsilon`, the bound; best a little above the retain loss that the model starts with.
        eta: :math:`\eta`, the step size of the multiplier; above 0.
        mu: The multiplier that every request starts with; at least 0. The forget loss is quadratic in the scale of the
            logits, so 50 to 100 is usual for language models.
        warmup_steps: Optimizer steps of a request before the multiplier moves.

    Attributes:
        multiplier: :math:`\mu` of the coming step.

    Raises:
        ValueError: For settings out of range.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="pdu",
        family="unlearning",
        paper="Entesari et al. 2025, arXiv:2506.05314",
        needs="labels; retained samples",
        state="1 number",
    )
    needs_retain: ClassVar[bool] = True

    def __init__(self, epsilon: float, *, eta: float = 1.0, mu: float = 1.0, warmup_steps: int = 0) -> None:
        check_positive("eta", eta)
        check_positive("mu", mu, zero_allowed=True)
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must be an integer of at least 0, got {warmup_steps!r}.")
        self.epsilon = epsilon
        self.eta = eta
        self.mu = mu
        self.warmup_steps = warmup_steps
        self.multiplier = mu
        self._steps = 0

    @override
    def start(self, seed: int) -> None:
        self.multiplier, self._steps = self.mu, 0

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return pdu_loss(*forget.predictions)

    @override
    def weigh_retain(self, weight: float, term: Tensor) -> Tensor:
        return weight * self.multiplier * (term - self.epsilon)

    @override
    def after_step(self, retain_loss: float) -> None:
        self._steps += 1
        if self._steps > self.warmup_steps:
            self.multiplier = dual_update(self.multiplier, retain_loss, eta=self.eta, epsilon=self.epsilon)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier, "steps": self._steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.multiplier, self._steps = state_dict["multiplier"], state_dict["steps"]
