"""Representation misdirection."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice, check_positive
from lightning_cl.functional.unlearning import activation_distance, control_vector, rmu_loss
from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["RMU"]


class RMU(ForgetLoss):
    r"""Steer a layer's activations on the forget set to one random point, and hold those on the retain set.

    .. math:: \frac{1}{B} \sum_b \frac{1}{n_b} \sum_t m_{bt} \, \frac{1}{D} \lVert h_{bt} - c u \rVert^2

    with u a random direction of length 1 in the positive orthant, drawn anew for every request. With
    ``Unlearn(retain="own")`` the retain term is the same distance to the reference model's activations. Every
    row counts alike, whatever its length; published code multiplies the sum of each row by the mean of 1/n over all.

    Args:
        layer: Name of the submodule whose output is steered, such as ``"model.layers.7"``; a whole block rather than
            a part of one. Its parameters and those before it learn.
        coefficient: c, the length of the control vector; above 0. It must exceed the norm that the layer's
            activations have, or they are drawn to nothing in particular.
        positions: m: ``"attended"``, where the attention mask is set, or ``"supervised"``, where a label is.

    Raises:
        ValueError: For settings out of range.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="rmu",
        family="unlearning",
        paper="Li et al. 2024, arXiv:2403.03218",
        needs="the name of a layer; no labels; activations of a reference model for the retain term",
        state="1 vector of the layer's width",
    )
    retain_reference: ClassVar[bool] = True

    def __init__(
        self, layer: str, *, coefficient: float = 20.0, positions: Literal["attended", "supervised"] = "attended"
    ) -> None:
        check_positive("coefficient", coefficient)
        check_choice("positions", positions, ("attended", "supervised"))
        self.layer = layer
        self.coefficient = coefficient
        self.positions = positions
        self._seed = 0
        self._control: Tensor | None = None

    @override
    def start(self, seed: int) -> None:
        self._seed, self._control = seed, None

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        assert forget.activations is not None
        if self._control is None:
            self._control = control_vector(forget.activations.shape[-1], self.coefficient, self._seed)
        return rmu_loss(forget.activations, self._control, self._mask(forget))

    @override
    def retain_term(self, retain: Outputs, reference: Outputs | None) -> Tensor:
        assert retain.activations is not None
        assert reference is not None
        assert reference.activations is not None
        return activation_distance(retain.activations, reference.activations, self._mask(retain))

    def _mask(self, outputs: Outputs) -> Tensor | None:
        assert outputs.activations is not None
        # rows of a module that does not shift its labels come with one position more: labels in front, masks behind
        length = outputs.activations.shape[1]
        if self.positions == "attended":
            return outputs.mask if outputs.mask is None or outputs.mask.ndim < 2 else outputs.mask[:, :length]
        if outputs.labels is None:
            raise ValueError("`RMU(positions='supervised')` needs labels in the batch. Use `positions='attended'`.")
        # activations stand where their own token is: no shift
        mask = outputs.labels != IGNORED_LABEL
        return mask if mask.ndim < 2 else mask[:, -length:]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, "control": self._control}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed, self._control = state_dict["seed"], state_dict["control"]
