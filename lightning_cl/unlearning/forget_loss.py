"""What a forget loss is, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_cl.core.card import methods_below
from lightning_cl.functional.unlearning import supervised_rows, token_nll

__all__ = ["ForgetLoss", "Outputs"]


@dataclass(eq=False)
class Outputs:
    """What a model made of one batch, forgotten or retained.

    Args:
        logits: Scores, [B, T, V] of tokens or [B, C] of classes.
        labels: Of tokens int64 [B, T], unshifted, -100 where nothing is to be predicted; of classes [B].
        mask: Attention mask, bool [B, T]; all positions if ``None``.
        activations: Output of the submodule that the loss names as its ``layer``, [B, T, D] or [B, D].
        ids: Identities of the samples, int64 [B].
        alternate: The same for the answers that are preferred, from a batch's ``alternate_input_ids``,
            ``alternate_attention_mask`` and ``alternate_labels``.
        stored_nll_sum: :attr:`nll_sum` of a reference whose logits are not there, [B].
    """

    logits: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    activations: Tensor | None = None
    ids: Tensor | None = None
    alternate: Outputs | None = None
    stored_nll_sum: Tensor | None = None

    @property
    def nll_sum(self) -> Tensor:
        """Sum of the negative log-likelihoods of each row's supervised tokens, float32 [B]."""
        if self.stored_nll_sum is not None:
            return self.stored_nll_sum
        return token_nll(*self.predictions, reduction="sequence_sum")

    @property
    def supervised(self) -> Tensor:
        """Which rows have at least one supervised token, bool [B]."""
        return supervised_rows(self._need("labels"))

    @property
    def score_mask(self) -> Tensor | None:
        """The attention mask for the positions of the scores; ``None`` where a row has those of one answer, [B, C]."""
        return None if self.logits is not None and self.logits.ndim == 2 else self.mask

    @property
    def predictions(self) -> tuple[Tensor, Tensor]:
        """Logits and labels, which must be there."""
        return self._need("logits"), self._need("labels")

    def _need(self, name: Literal["logits", "labels"]) -> Tensor:
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(
                f"The forget loss needs `{name}`, and the batch or the module gave none. Let the batch hold labels and"
                " the module return class scores, or read them by a `BatchAdapter`."
            )
        return value


class ForgetLoss(ABC):
    """A loss whose descent forgets a batch; :class:`~lightning_cl.unlearning.Unlearn` trains with it.

    A method is a subclass with a ``card``; its constructor is its YAML. What it keeps between steps of a request goes
    through ``state_dict``, so that a resume inside the request is exact.

    Attributes:
        reference: What it needs of the reference model on the forget batch: nothing, one sum of negative
            log-likelihoods per row (``"sequences"``, which can be computed once and kept), or all logits
            (``"scores"``).
        retain_reference: Whether its own retain term needs the reference's activations on the retain batch.
        layer: Name of the submodule whose output is read as activations.
        needs_retain: Whether it means nothing without a retain batch.
        only_retain: The one setting of ``Unlearn(retain=...)`` that it means anything with; any of them if ``None``.
    """

    reference: ClassVar[Literal["none", "sequences", "scores"]] = "none"
    retain_reference: ClassVar[bool] = False
    layer: str | None = None
    needs_retain: ClassVar[bool] = False
    only_retain: ClassVar[str | None] = None

    def start(self, seed: int) -> None:  # noqa: B027  most losses keep nothing
        """Begin a request: draw anew what is drawn, from this seed only, and put back what moved during the last."""

    @abstractmethod
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        """Return the loss of a forget batch, a scalar in float32; a zero with a graph if nothing is supervised.

        Args:
            forget: Of the trained model, with a graph.
            reference: Of the reference model, as far as ``reference`` asks for it.
        """

    def retain_term(self, retain: Outputs, reference: Outputs | None) -> Tensor:
        """Return the retain term of ``Unlearn(retain="own")``, a scalar in float32."""
        raise ValueError(
            f'`retain="own"` is for losses with a retain term of their own, such as RMU; `{type(self).__name__}` has'
            ' none. Use "nll" or "kl".'
        )

    def weigh_retain(self, weight: float, term: Tensor) -> Tensor:
        """Return what the retain term adds to the loss: its weight times it, unless a method has its own rule."""
        return weight * term

    def after_step(self, retain_loss: float) -> None:  # noqa: B027  most losses keep nothing
        """See an optimizer step that was taken.

        Args:
            retain_loss: The step's retain term, a mean over its micro-batches and over all ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume inside a request needs, in plain values and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027  most losses keep nothing
        """Take back what :meth:`state_dict` returned."""

    @staticmethod
    def resolve(method: ForgetLoss | str) -> ForgetLoss:
        """Return ``method``, made with its defaults if it is given by name.

        Raises:
            ValueError: If none has that name, or it has settings without a default.
        """
        if isinstance(method, ForgetLoss):
            return method
        known: dict[str, Any] = methods_below(ForgetLoss)
        if method not in known:
            raise ValueError(f"`method` must be a `ForgetLoss` or one of {', '.join(known)}, got {method!r}.")
        kind = known[method]
        try:
            made: ForgetLoss = kind()
        except TypeError:
            raise ValueError(
                f"`method={method!r}` has settings without defaults: give it as `{kind.__name__}(...)`."
            ) from None
        return made
