"""Static ConPET (Song et al. 2023, "Continual Parameter-Efficient Tuning for Large Language Models")."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import Unpack, override

from lightning_cl.callbacks.memory_settings import KeepingSettings
from lightning_cl.callbacks.replay import ExperienceReplay
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.task import Task
from lightning_cl.memory import Drawn, Policy

__all__ = ["StaticConPET"]


class StaticConPET(ExperienceReplay):
    r"""Rehearse in every step a fixed number of old samples, which do not favour the tasks that kept more of them.

    A step trains on the incoming batch of b samples and, from the second task on, on

    .. math:: m = \max(1, \mathrm{round}(b / \rho))

    samples of the memory, drawn one after another without replacement, each with a chance in proportion to
    :math:`1 / n_j`, where :math:`n_j` samples are kept of its task j, in one forward whose loss is the mean over both.
    The first is of each earlier task with the same chance; where a draw takes much of what is kept of a task, that task
    comes less often. Tasks of earlier streams count as earlier ones. A task thus costs
    :math:`1 + m / b` times what it costs alone, however many tasks came before.
    The method says nothing of the model: adapters keep what trains small.

    Args:
        capacity: Samples in memory, over all ranks together; or bytes, such as ``"512MiB"``.
        new_old_ratio: :math:`\rho`, new samples for each old one; above 0.
        policy: Which samples stay, see :class:`StoredSamples`.
        features: Name of the submodule whose output is the feature vector, for ``policy="herding"``.
        **memory: Further settings of the memory, see :class:`StoredSamples`.

    Raises:
        ValueError: For a setting out of range; at the start of a fit as :class:`ExperienceReplay`, and on streams that
            hide their boundaries.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="static-conpet",
        family="replay",
        paper="Song et al. 2023, arXiv:2309.14763",
        needs="task boundaries; labels for class_balanced and herding",
        state="capacity samples over all ranks",
    )

    def __init__(
        self,
        capacity: int | str,
        *,
        new_old_ratio: float = 1.0,
        policy: str | Policy = "reservoir",
        features: str | None = None,
        **memory: Unpack[KeepingSettings],
    ) -> None:
        check_positive("new_old_ratio", new_old_ratio)
        super().__init__(capacity, policy=policy, features=features, recall="task_uniform", **memory)
        self.new_old_ratio = new_old_ratio

    @override
    def samples(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Drawn | None:
        earlier = self.completed_tasks
        size = max(1, round(self.adapter.size(self._incoming) / self.new_old_ratio))
        # none of the running task, which the batches show
        return self.draw(trainer, size, tasks=range(earlier)) if earlier else None

    @override
    def number_of_task(self, trainer: Trainer, task: Task) -> int:
        # over all fits: a second stream counts its tasks from 0 again
        return self.completed_tasks
