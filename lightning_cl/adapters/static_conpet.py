"""Static ConPET (Song et al. 2023, "Continual Parameter-Efficient Tuning for Large Language Models")."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import Unpack, override

from lightning_cl.callbacks.memory_settings import KeepingSettings
from lightning_cl.callbacks.replay import ExperienceReplay
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.events import TaskEvents
from lightning_cl.memory import Drawn, Policy

__all__ = ["StaticConPET"]


class StaticConPET(ExperienceReplay):
    r"""Rehearse in every step a fixed number of old samples, of all earlier tasks alike.

    A step trains on the incoming batch of b samples and, from the second task on, on

    .. math:: m = \max(1, \mathrm{round}(b / \rho))

    samples of the memory, each of a task that is drawn uniformly from the earlier ones, in one forward whose loss is
    the mean over both. A task thus costs :math:`1 + m / b` times what it costs alone, however many tasks came before.
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
        task = TaskEvents.attach(trainer).task
        assert task is not None
        size = max(1, round(self.adapter.size(self._incoming) / self.new_old_ratio))
        # none of the running task, which the batches show
        return self.draw(trainer, size, tasks=range(task.index)) if task.index else None
