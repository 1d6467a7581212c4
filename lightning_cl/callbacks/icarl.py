"""iCaRL (Rebuffi et al. 2017, "iCaRL: Incremental Classifier and Representation Learning", arXiv:1611.07725)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_cl.callbacks.memory_settings import StorageSettings
from lightning_cl.callbacks.nearest_mean import NearestMeanReplay
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_automatic_optimization, check_choice
from lightning_cl.core.classes import KnownClasses
from lightning_cl.core.distributed import is_distributed
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.step import loss_of
from lightning_cl.core.task import Task
from lightning_cl.core.teacher import Teacher, Watched
from lightning_cl.functional.icarl import ClassReduction, icarl_loss
from lightning_cl.functional.masked_scores import all_masked

__all__ = ["ICaRL"]


class ICaRL(NearestMeanReplay):
    r"""Rehearse exemplars chosen by herding, distil the old classes, and classify by the nearest mean of exemplars.

    The loss of the joint batch of new samples and exemplars takes the place of the module's own:

    .. math:: \frac{1}{N} \sum_{n} \Big[ \sum_{c \in \mathcal{C}} H(\mathbb{1}[c = y_n], g_{nc})
        + \sum_{c \in \mathcal{O}} H(q_{nc}, g_{nc}) \Big], \qquad H(t, g) = -t \log g - (1 - t) \log(1 - g)

    with :math:`g = \mathrm{sigmoid}(z)` of the class scores, the classes :math:`\mathcal{C}` of the present task, and
    for those :math:`\mathcal{O}` of earlier tasks the outputs :math:`q` of a teacher: the module as it was when the
    present task began, on the same batch. A class that comes again is learned from labels.

    At a task's end every class gets its share of ``capacity`` as exemplars, chosen by herding. From then on the class
    scores that the user's own step gets in validation, test and prediction are

    .. math:: -\Big\| \frac{\varphi(x)}{\|\varphi(x)\|} - \mu_c \Big\|^2

    with the features :math:`\varphi` and the normalised mean :math:`\mu_c` of the normalised features of the exemplars
    of a class, computed anew at the start of each evaluation; -5 for a class without exemplars, and the module's own
    scores before there are any.

    Args:
        capacity: Exemplars, over all ranks and classes together.
        loss: ``"binary"`` as above, or ``"module"``: the module's own loss, plus the terms of :math:`\mathcal{O}`.
        reduction: Over classes: ``"sum"`` as above, or ``"mean"``, whose gradients shrink as classes come.
        classifier: ``"nearest_mean"``, or ``"head"`` for the module's own scores.
        features: Name of the submodule whose output is the feature vector :math:`\varphi`; the input of the last linear
            layer if ``None``.
        **storage: Further settings of the memory, see :class:`StoredSamples`.

    Raises:
        ValueError: For a setting out of range; at the start of a fit under manual optimization, on a stream that hides
            its boundaries, for data without one class label for each sample, and for a module whose scores or features
            are not found; in the first step with a teacher, for scores that are masked at all old classes.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="icarl",
        family="replay",
        paper="Rebuffi et al. 2017, arXiv:1611.07725",
        needs="class labels; class scores; task boundaries; automatic optimization",
        state="capacity samples over all ranks; a copy of the trainable parameters",
    )

    def __init__(
        self,
        capacity: int | str,
        *,
        loss: Literal["binary", "module"] = "binary",
        reduction: ClassReduction = "sum",
        classifier: Literal["nearest_mean", "head"] = "nearest_mean",
        features: str | None = None,
        **storage: Unpack[StorageSettings],
    ) -> None:
        check_choice("loss", loss, ("binary", "module"))
        check_choice("reduction", reduction, get_args(ClassReduction))
        super().__init__(capacity, classifier=classifier, features=features, **storage)
        self.loss = loss
        self.mixes_tasks = loss == "module"
        self.reduction = reduction
        self._teacher = Teacher("previous", owner=type(self).__name__)
        self._watched: Watched | None = None
        self._known = KnownClasses()
        # of the present task and of those before it; none yet, or to be looked at again, if `None`
        self._columns: tuple[Tensor, Tensor] | None = None
        self._checked_scores = False

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            way_out = "Return the loss from `training_step`, or use `ExperienceReplay`."
            check_automatic_optimization(pl_module, self, f"loss={self.loss!r}", way_out)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._teacher.start_fit(pl_module, inside_task=TaskEvents.attach(trainer).running)
        self._watched = self._teacher.watch(pl_module, self.logits)
        # the module may be on another device than in the fit before
        self._columns, self._checked_scores = None, False

    @override
    def before_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().before_task_start(trainer, pl_module, task)
        self._teacher.start_task(pl_module, first=self.completed_tasks == 0)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        self._known.start_task(task)
        self._columns, self._checked_scores = None, False

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        self._teacher.warn_of_thawed(pl_module)
        self._known.end_task(pl_module.device)

    @override
    def _stop_watching(self) -> None:
        super()._stop_watching()
        self._teacher.end_fit()
        self._watched = None

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        outcome = self._teacher.renew(pl_module)
        return [] if outcome is None else [Influence(type(self).__name__, "the weights of the teacher", outcome)]

    # ------------------------------------------------------------------ the step

    @contextmanager
    @override
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        # the teacher's forward comes before what watches the student's
        teaching = self._teacher.around_step(pl_module, batch, batch_idx)
        with teaching, super().around_step(trainer, pl_module, batch, batch_idx):
            yield

    @override
    def replace_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor:
        assert self.scores is not None and self._watched is not None
        student, labels = self.scores.require(), self.scores.targets(batch)
        teacher = self._watched.take()[1] if self._teacher else None
        # exemplars of earlier tasks do not tell which classes the present one has
        classes, old = self._classes(labels[: self.adapter.size(self._incoming)], student.shape[1])
        if teacher is not None and len(old) and not self._checked_scores:
            self._check_unmasked(student, old)
            self._checked_scores = True
        if self.loss == "binary":
            return icarl_loss(student, labels, classes, old=old, teacher=teacher, reduction=self.reduction)
        loss = loss_of(outputs)
        assert loss is not None
        if teacher is None:
            return loss
        return loss + icarl_loss(student, labels, old[:0], old=old, teacher=teacher, reduction=self.reduction)

    def _classes(self, incoming: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the classes to learn from labels, and those to learn from the teacher."""
        if self._columns is not None and self._known.told:
            return self._columns
        if not self._known.told:
            self._known.see(incoming)
            if is_distributed():
                self._known.gather(incoming.device)
        present, last = self._known.present, max(self._known.seen, default=-1)
        if last >= width:
            raise ValueError(
                f"`ICaRL` reads scores by the numbers of their classes, and there is a class {last}, but scores of"
                f" {width} classes only. Return a column for each class, or name the submodule that does by `logits`."
            )
        taught = [label for label in self._known.old if label not in present]
        classes, old = (torch.tensor(chosen, dtype=torch.int64, device=incoming.device) for chosen in (present, taught))
        self._columns = classes, old
        return self._columns

    @staticmethod
    def _check_unmasked(student: Tensor, old: Tensor) -> None:
        if all_masked(student, old):
            raise ValueError(
                "`ICaRL` distils the scores of earlier classes, which the head masks in this task. Name the submodule"
                " that returns the scores before the mask by `logits`, or mask with `head_mask='seen'`."
            )

    # ------------------------------------------------------------------ memory and checkpoints

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        return replace(super().footprint(trainer, pl_module, batch), device=self._teacher.num_bytes(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "teacher": self._teacher.state_dict(), "classes": self._known.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._teacher.load_state_dict(state_dict["teacher"])
        self._known.load_state_dict(state_dict["classes"])
