"""Learning without Forgetting (Li & Hoiem 2016, arXiv:1606.09282)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.distillation import Distillation
from lightning_cl.core.batches import BatchAdapter, next_labels
from lightning_cl.core.capture import OutputCapture, forward_step, undisturbed
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice, check_positive
from lightning_cl.core.classes import KnownClasses
from lightning_cl.core.distributed import is_distributed
from lightning_cl.core.requests import Influence
from lightning_cl.core.targets import predicts_next
from lightning_cl.core.task import Task
from lightning_cl.core.teacher import TeacherKind, Watched
from lightning_cl.functional.distillation import distillation_loss
from lightning_cl.functional.masked_scores import all_masked

__all__ = ["ClassPolicy", "LwF"]

ClassPolicy = Literal["old", "seen", "present"]
_IGNORED = -100


class LwF(Distillation):
    r"""Hold the class scores of new samples near those that a teacher gives them.

    The step minimises the module's own loss plus

    .. math:: \frac{\lambda}{N} \sum_n \mathrm{KL}\left(p_n \,\|\, q_n\right), \qquad
        p_n = \mathrm{softmax}_{\mathcal{C}}(z_n^{teacher} / T), \quad q_n = \mathrm{softmax}_{\mathcal{C}}(z_n / T)

    over the samples of the batch, with the teacher in evaluation mode on the very same batch. The paper writes the
    cross-entropy of p and q (eq. 2 to 4), which has the same gradients. It computes the old responses once for each
    image, here the teacher sees what the student sees, augmented as it is; and it trains a new head alone at first,
    which here is up to the user's module.

    The scores of language models are compared over the whole vocabulary, at the positions that are supervised.

    Args:
        strength: :math:`\lambda`; above 0.
        temperature: T; above 0. The paper takes 2.
        temperature_squared: Multiply by :math:`T^2`, so that the gradients do not shrink as T grows (Hinton et al.
            2015). Not in the paper.
        classes: :math:`\mathcal{C}`, where labels are classes of samples: those of earlier tasks (``"old"``), these and
            those of the present task (``"seen"``), or the latter alone (``"present"``). They are the stream's, or else
            those of the labels that were seen.
        teacher: ``"previous"``: the weights at the end of the task before, from the second task on; ``"pretrained"``:
            those that the first fit started from; ``"ema"``: an exponential moving average of the weights;
            ``"base"``: the module without its adapters, which needs no copy (a head that trains is shared with it).
        decay: The share of the average that stays at each optimizer step; for ``"ema"``.
        logits: Name of the submodule that returns the class scores; found by itself in most modules.
        batch_adapter: Reads batches of an uncommon structure.

    Raises:
        ValueError: For a setting out of range; at the start of a fit under manual optimization, and for a module whose
            scores are not found, or are masked at the classes to compare; in the first step with a teacher, for scores
            of fewer classes than there are.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="lwf",
        family="distillation",
        paper="Li & Hoiem 2016, arXiv:1606.09282",
        needs="class scores; automatic optimization",
        state="a copy of the trainable parameters",
    )

    def __init__(
        self,
        strength: float = 1.0,
        *,
        temperature: float = 2.0,
        temperature_squared: bool = False,
        classes: ClassPolicy = "old",
        teacher: TeacherKind = "previous",
        decay: float | None = None,
        logits: str | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        super().__init__(strength, teacher, decay, batch_adapter)
        check_positive("temperature", temperature)
        check_choice("classes", classes, get_args(ClassPolicy))
        self.temperature = temperature
        self.temperature_squared = temperature_squared
        self.classes = classes
        self.logits = logits
        self._known = KnownClasses()
        self._columns: Tensor | None = None
        self._watched: Watched | None = None
        # the scores of a position are for the label of the next one, as in causal language models
        self._shifted: bool | None = None
        # classes of the student's head, and of the teacher's where a head that grew has more
        self._width: int | None = None
        self._teacher_width: int | None = None
        self._checked_scores = False
        if teacher != "previous" and classes == "seen":
            # a class attribute of the base: these know no tasks
            self.boundaries = "unused"  # type: ignore[misc]

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._watched = self.teaching.watch(pl_module, self.logits)
        # the module may be on another device than in the fit before
        self._columns, self._checked_scores = None, False

    @override
    def check(self, pl_module: LightningModule, batch: Any) -> None:
        with undisturbed(pl_module, seed=0), OutputCapture(pl_module, self.logits) as capture, torch.no_grad():
            forward_step(pl_module, batch)
            scores = capture.output
        if scores.shape[-1] < 2:
            raise ValueError(
                f"`LwF` compares class scores, and those of {type(pl_module).__name__} have the shape"
                f" {list(scores.shape)}. Name the submodule that returns scores by `logits`, or use"
                " `FeatureDistillation`."
            )
        self._width = self._classes_last(scores, batch).shape[-1]
        if self.teacher == "pretrained" and self._teacher_width is None:
            self._teacher_width = self._width

    # ------------------------------------------------------------------ classes

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        if self.teacher == "previous":
            # the module's own hook, which may grow its head, comes later
            self._teacher_width = self._width
        self._known.start_task(task)
        self._columns, self._checked_scores = None, False

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        self._known.end_task(pl_module.device)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if self.teacher == "pretrained":
            self._teacher_width = self._width
        return super().renew_state(trainer, pl_module, task)

    def _compared(self, device: torch.device) -> Tensor:
        if self._columns is None:
            chosen: list[int] = getattr(self._known, self.classes)
            self._columns = torch.tensor(chosen, dtype=torch.int64, device=device)
        return self._columns

    # ------------------------------------------------------------------ the term

    @override
    def distance(self, batch: Any) -> Tensor | None:
        labels = self.adapter.class_labels(batch)
        if labels is not None and not self._known.told:
            self._known.see(labels)
            if self.classes != "old" and is_distributed():
                self._known.gather(labels.device)
            self._columns = None
        if not self.teaching:
            return None
        assert self._watched is not None
        student, teacher = (self._classes_last(scores, batch) for scores in self._watched.take())
        self._width = student.shape[-1]
        teacher = teacher[..., : self._teacher_width]
        columns = positions = None
        if labels is not None and student.ndim == 2:
            columns = self._compared(student.device)
            if not len(columns):
                return None
            if not self._checked_scores:
                self._check_width(student)
                _check_unmasked(student, columns, self.classes)
                self._checked_scores = True
        else:
            positions = self._supervised(teacher, batch)
        return distillation_loss(
            student,
            teacher,
            self.temperature,
            classes=columns,
            positions=positions,
            temperature_squared=self.temperature_squared,
        )

    def _check_width(self, student: Tensor) -> None:
        """Refuse scores of the present task's head alone: the teacher would give those of that new head too."""
        last, width = max(self._known.seen), student.shape[-1]
        if last >= width:
            raise ValueError(
                f"`LwF` compares scores by the numbers of their classes, and there is a class {last}, but scores of"
                f" {width} classes only. Return the scores of all heads, with a column for each class, name the"
                " submodule that does by `logits`, or use `FeatureDistillation`."
            )

    def _classes_last(self, scores: Tensor, batch: Any) -> Tensor:
        """Return scores with the classes last; in maps of scores, as of segmentation, they are second."""
        labels = self.adapter.labels(batch)
        if labels is None or labels.shape in (scores.shape[:-1], scores.shape[:1]):
            return scores
        return scores.movedim(1, -1) if labels.shape == scores.shape[:1] + scores.shape[2:] else scores

    def _supervised(self, teacher: Tensor, batch: Any) -> Tensor | None:
        """Return the positions whose scores the module's loss takes, bool [N, ...]; ``None`` for all.

        Where no label tells, they are all that are no padding.
        """
        labels = self.adapter.labels(batch)
        if labels is None or labels.is_floating_point() or labels.shape != teacher.shape[:-1]:
            mask = self.adapter.padding_mask(batch)
            return mask if mask is not None and mask.shape == teacher.shape[:-1] else None
        if self._shifted is None:
            self._shifted = predicts_next(teacher, labels, self.teaching.loss)
        return (next_labels(labels) if self._shifted else labels) != _IGNORED

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def state_key(self) -> str:
        # instances with different teachers live side by side in one Trainer and one checkpoint
        return self._generate_state_key(teacher=self.teacher, decay=self.decay, logits=self.logits)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "classes": self._known.state_dict(),
            "shifted": self._shifted,
            "widths": [self._width, self._teacher_width],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._known.load_state_dict(state_dict["classes"])
        self._shifted = state_dict["shifted"]
        self._width, self._teacher_width = state_dict["widths"]


def _check_unmasked(student: Tensor, columns: Tensor, policy: str) -> None:
    if all_masked(student, columns):
        raise ValueError(
            f"`LwF(classes={policy!r})` compares scores that the head masks in this task, so it would do nothing. Name"
            " the submodule that returns the scores before the mask by `logits`, such as `logits='network'`."
        )
