"""Dark experience replay (Buzzega et al. 2020, "Dark Experience for General Continual Learning", arXiv:2004.07211)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_cl.callbacks.memory import Rehearsed, ReplayMemory
from lightning_cl.callbacks.memory_settings import MemorySettings
from lightning_cl.core.batches import Column
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_automatic_optimization, check_choice, check_positive
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.head import LabelledStream
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.step import loss_of
from lightning_cl.core.task import Task
from lightning_cl.functional.dark_experience import LogitReduction, compared_logits, logit_distance, pad_logits
from lightning_cl.memory import Drawn
from lightning_cl.memory.hashing import sample_keys

__all__ = ["DER"]

_LOGITS = "@logits"


class DER(ReplayMemory):
    r"""Keep samples with the class scores that they had, and hold their present scores near them.

    With a draw :math:`B_M` from the memory and the logits z that were stored with it, the step minimises the module's
    own loss plus

    .. math:: \frac{\alpha}{|B_M|} \sum_{(x, z) \in B_M} \frac{1}{|\mathcal{C}_x|}
        \sum_{c \in \mathcal{C}_x} \left(h_c(x) - z_c\right)^2

    over the classes that a sample has a score for both then and now; without :math:`1 / |\mathcal{C}_x|` for ``"sum"``,
    which is the paper's form. The mean over classes is what its code takes, and what its :math:`\alpha` are for. The
    scores come from a second forward of the module's ``training_step``, on the draw; labels are not used.

    What is stored is what the step computed: logits in training mode, of the batch as it was augmented. The paper's
    reservoir takes presentations, so that over several epochs the logits of a sample come from any of them. Here a
    sample is kept once, and on a task stream its logits are those of a presentation drawn uniformly from all that its
    task gave it. Without a stream, samples of later epochs are not known again: the logits are those of a fit's first
    epoch. Herding stores those of the trained model at the task's end, in evaluation mode.

    Args:
        capacity: Samples in memory, over all ranks together; or bytes, such as ``"512MiB"``.
        alpha: :math:`\alpha`; above 0.
        reduction: Over classes: ``"per_class_mean"`` or ``"sum"``.
        presentation: Which presentation's logits are kept on a task stream: ``"any"`` (each with the same chance) or
            ``"last"``.
        **memory: Settings of the memory, see :class:`StoredSamples`.

    Raises:
        ValueError: For a setting out of range; at the start of a fit under manual optimization, and for a module whose
            step has not one row of class scores for each sample; in the first step of a task whose head masks all that
            was stored.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="der",
        family="replay",
        paper="Buzzega et al. 2020, arXiv:2004.07211",
        needs="class scores; automatic optimization",
        state="capacity samples over all ranks, with a float32 for each class",
    )
    needs_logits: ClassVar[bool] = True
    mixes_tasks: bool = False
    needs_targets: ClassVar[bool] = False
    # on draws, in each step
    _forwards: int = 1

    def __init__(
        self,
        capacity: int | str,
        *,
        alpha: float = 0.3,
        reduction: LogitReduction = "per_class_mean",
        presentation: Literal["any", "last"] = "any",
        **memory: Unpack[MemorySettings],
    ) -> None:
        check_positive("alpha", alpha)
        check_choice("reduction", reduction, get_args(LogitReduction))
        check_choice("presentation", presentation, ("any", "last"))
        super().__init__(capacity, **memory)
        self.alpha = alpha
        self.reduction = reduction
        self.presentation = presentation
        self.renews_annotations = True
        self._checked_mask = False

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_automatic_optimization(
                pl_module, self, f"alpha={self.alpha}", "Use `ExperienceReplay(mode='joint')`."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        self._checked_mask = False

    @override
    def check_scores(self, pl_module: LightningModule, scores: Tensor, size: int) -> None:
        if scores.ndim != 2 or len(scores) != size:
            raise ValueError(
                f"`{type(self).__name__}` stores one row of class scores for each sample, but those of"
                f" `{type(pl_module).__name__}` have the shape {list(scores.shape)} for {size} samples. Name the"
                " submodule that returns such rows by `logits`; for scores of positions, as of language models, use"
                " `LwF` or `SelfRehearsal`."
            )

    # ------------------------------------------------------------------ what is stored

    @override
    def annotate(self, batch: Any, logits: Tensor | None) -> dict[str, Column]:
        assert logits is not None
        # one dtype, whatever the precision of a fit
        return {_LOGITS: logits.float()}

    @override
    def annotated_anew(self, sample_ids: Tensor, presentation: int) -> Tensor:
        if self.presentation == "last":
            return torch.ones(len(sample_ids), dtype=torch.bool)
        # a reservoir of one: the k-th takes the place with chance 1/k, which leaves each with the same
        keys = sample_keys(sample_ids.numpy(), derived_seed(self.seed, "presentation", presentation))
        return torch.from_numpy(keys / 2**64 + 0.5 < 1 / presentation)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # what earlier weights said of them
        return [Influence(type(self).__name__, "class scores of retained samples", "remains", self.buffer.total)]

    # ------------------------------------------------------------------ the step

    def rehearsed(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *, stream: int = 0
    ) -> tuple[Drawn | None, Rehearsed | None]:
        """Draw, and run the module's step on it; ``None`` for what there is not, see :meth:`must_rehearse`."""
        drawn = self.draw(trainer, self.batch_size or self.adapter.size(self._incoming), stream=stream)
        if not self.must_rehearse(drawn):
            return None, None
        return drawn, self.rehearse(pl_module, drawn, batch, batch_idx)

    def distance(self, pl_module: LightningModule, drawn: Drawn | None, rehearsed: Rehearsed) -> Tensor:
        """Return the distance of the present scores of a draw from those that were stored, times the rank's share."""
        assert rehearsed.logits is not None
        if drawn is None:
            # times 0, but the backward must go where those of other ranks go
            stored = rehearsed.logits.detach()
        else:
            stored = pad_logits(drawn.columns[_LOGITS]).to(rehearsed.logits.device, non_blocking=True)
            if not self._checked_mask:
                self._check_mask(pl_module, rehearsed.logits, stored)
                self._checked_mask = True
        return rehearsed.share * logit_distance(rehearsed.logits, stored, self.reduction)

    @override
    def loss_term(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        if loss_of(outputs) is None:
            # a step that Lightning skips
            return None
        drawn, rehearsed = self.rehearsed(trainer, pl_module, batch, batch_idx)
        return None if rehearsed is None else self.alpha * self.distance(pl_module, drawn, rehearsed)

    def _check_mask(self, pl_module: LightningModule, logits: Tensor, stored: Tensor) -> None:
        if not bool(compared_logits(logits, stored).any()):
            raise ValueError(
                f"The head of `{type(pl_module).__name__}` masks in this task all classes that it had a score for when"
                f" samples were stored, so `{type(self).__name__}` would compare nothing. Name the submodule that"
                " returns the scores before the mask by `logits`, such as `logits='network'`."
            )

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        base = super().footprint(trainer, pl_module, batch)
        stream = trainer.datamodule  # type: ignore[attr-defined]
        largest = stream.largest_label() if isinstance(stream, LabelledStream) else None
        logits = 0 if largest is None else 4 * (largest[0] + 1) * self.share(trainer, batch)
        on_disk = logits if self.storage == "mmap" else 0
        joined = self.with_draws(trainer, batch, self._forwards)
        return replace(base, host=base.host + logits - on_disk, disk=base.disk + on_disk, batch=joined)
