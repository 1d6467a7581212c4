"""Negation of a task vector: fine-tune on what is to be forgotten, and go the opposite way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import Unpack, override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.copies import WeightCopy
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.state import fill, full_copy, full_tensor
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.unlearning import negate_weights_, negated_factors
from lightning_cl.unlearning.frozen_statistics import FrozenStatistics
from lightning_cl.unlearning.request_callback import RequestCallback, RequestSettings

__all__ = ["TaskVectorNegation", "negate_task_vector_"]

# parameters of DoRA, AdaLoRA, LoHa, LoKr, VeRA, RandLoRA, OFT, BOFT and HRA
_NONLINEAR = (
    *("lora_magnitude_vector", "lora_E", "hada_w", "lokr_w", "vera_lambda", "randlora_"),
    *(".oft_R", ".boft_", ".hra_u"),
)


@torch.no_grad()
def negate_task_vector_(module: nn.Module, tuned: Mapping[str, Tensor], alpha: float = 1.0) -> None:
    r"""Move a module from what fine-tuning on the forget set made of it the opposite way, in place.

    .. math:: \theta' = \theta - \alpha \, (\theta_{ft} - \theta)

    for its trainable parameters; buffers stay. Of LoRA adapters the product :math:`s B A` is negated and not each
    factor: exactly, where fine-tuning left one of them alone or began with :math:`B = 0`, and else as nearly as the
    adapter's rank allows (:func:`~lightning_cl.functional.unlearning.negated_factors`).

    Args:
        module: The module before it was fine-tuned.
        tuned: The parameters of a copy that was fine-tuned on the forget set, by name: its ``state_dict()``.
        alpha: :math:`\alpha`, how far to go; above 0.

    Raises:
        ValueError: If ``alpha`` is not above 0, ``tuned`` lacks a trainable parameter, or an adapter is none that can
            be negated.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> _ = module.load_state_dict({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([0.0])})
        >>> negate_task_vector_(module, {"weight": torch.tensor([[3.0]]), "bias": torch.tensor([0.5])}, alpha=0.5)
        >>> module.weight.item(), module.bias.item()
        (1.5, -0.25)
    """
    check_positive("alpha", alpha)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    _check_adapters(parameters)
    if missing := parameters.keys() - tuned.keys():
        raise ValueError(
            f"`tuned` lacks {sorted(missing)[:3]}, which train in {type(module).__name__}. Give the `state_dict()` of a"
            " copy of the module that was fine-tuned."
        )
    whole = {name: (full_copy(p), full_tensor(tuned[name]).to(p.device)) for name, p in parameters.items()}
    for up_name, down_name in _pairs(parameters):
        (up, tuned_up), (down, tuned_down) = whole.pop(up_name), whole.pop(down_name)
        # convolutions have factors of more dimensions, whose product is that of their matrices
        up, down, tuned_up, tuned_down = (t.flatten(1) for t in (up, down, tuned_up, tuned_down))
        factors = negated_factors(up, down, tuned_up, tuned_down, alpha)
        for name, factor in zip((up_name, down_name), factors, strict=True):
            fill(parameters[name], factor.reshape(parameters[name].shape))
    for name, (start, end) in whole.items():
        negate_weights_([start], [end], alpha)
        fill(parameters[name], start)


class TaskVectorNegation(RequestCallback):
    r"""Serve a request by fine-tuning on its samples, and then going the opposite way.

    .. math:: \theta' = \theta - \alpha \, (\theta_{ft} - \theta)

    The request's epochs train the module's own loss on what is to be forgotten, with the module's optimizers, begun
    anew; the retained half of each batch has no part. When they are over, the trainable parameters go to
    :math:`\theta'`. Statistics of batch normalisation stand still.

    Of LoRA adapters the product :math:`s B A` is what must be negated. So the factor that does not start at 0 is held
    during the request: the product is then linear in the other one, negating that is exact, and the rank stays.

    Args:
        alpha: :math:`\alpha`, how far to go; above 0. It is best chosen by what is left of the utility.
        settings: Those of :class:`~lightning_cl.unlearning.RequestSettings`.

    Raises:
        ValueError: If ``alpha`` is not above 0; at the start of a fit for adapters that no factor makes linear
            (DoRA, AdaLoRA, LoHa, LoKr, VeRA, OFT and the like).
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="task-vector-negation",
        family="unlearning",
        paper="Ilharco et al. 2023, arXiv:2212.04089",
        needs="a stream with requests",
        state="the ledger; 1 float32 per trainable parameter during a request",
    )

    def __init__(self, alpha: float = 1.0, **settings: Unpack[RequestSettings]) -> None:
        super().__init__(**settings)
        check_positive("alpha", alpha)
        self.alpha = alpha
        # of the request under way: in float32, because fine-tuning may move a half-precision weight by little
        self._start = self._no_weights()
        self._statistics = FrozenStatistics()
        self._held: set[str] = set()

    def _no_weights(self) -> WeightCopy:
        return WeightCopy(type(self).__name__, float32=True, buffers=False)

    # ------------------------------------------------------------------ a request

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        parameters = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        _check_adapters(parameters)
        self._held = {up if "embedding" in up else down for up, down in _pairs(parameters)}
        self._start.place(pl_module)
        if self._start:
            self._statistics.freeze(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._statistics.thaw()

    @override
    def serve_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._start.take(pl_module)
        self._statistics.freeze(pl_module)

    @override
    def transform_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        return batch["forget"] if isinstance(batch, Mapping) and "forget" in batch else batch

    @override
    def hold_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for name in self._held & step.parameters.keys():
            step.parameters[name].grad = None

    @override
    def serve_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._statistics.thaw()
        # from the start by -alpha of the way to the present weights
        self._start.move_towards(pl_module, -self.alpha)
        self._start.load_into(pl_module)
        self._start = self._no_weights()

    # ------------------------------------------------------------------ memory and checkpoints

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        return Footprint(device=self._no_weights().num_bytes(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": self._start.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._start = self._no_weights()
        self._start.load_state_dict(state_dict["start"])


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names of B and A of each LoRA adapter that has both."""
    known, found = set(names), []
    for down in sorted(known):
        for kind in ("lora_A", "lora_embedding_A"):
            up = down.replace(f".{kind}.", f".{kind[:-1]}B.")
            if f".{kind}." in down and up in known:
                found.append((up, down))
    return found


def _check_adapters(names: Iterable[str]) -> None:
    if found := [name for name in names if any(part in name for part in _NONLINEAR)]:
        raise ValueError(
            f"{found[0]!r} belongs to an adapter whose change of a weight is no linear function of one of its factors,"
            " so it cannot be negated. Use LoRA, or train the weights themselves."
        )
