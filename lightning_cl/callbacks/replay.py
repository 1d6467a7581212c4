"""Experience replay (Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", arXiv:1902.10486)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.memory import ReplayMemory
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import forward_loss, metrics_kept, silenced
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_automatic_optimization, check_choice, check_positive
from lightning_cl.core.footprint import Footprint
from lightning_cl.memory import Drawn

__all__ = ["ExperienceReplay"]


class ExperienceReplay(ReplayMemory):
    r"""Keep a bounded memory of samples and train on some of them in every step.

    With the incoming batch :math:`B` and a draw :math:`B_M` from the memory, the step minimises

    .. math:: \frac{1}{|B| + |B_M|} \sum_{i \in B \cup B_M} \ell_i \quad (\text{``joint''}) \qquad \text{or} \qquad
        \frac{1}{|B|} \sum_{i \in B} \ell_i + \frac{w}{|B_M|} \sum_{i \in B_M} \ell_i \quad (\text{``separate''})

    for a module whose loss is the mean over its batch. The memory is updated after the step, so a sample is never
    replayed beside itself for the first time. Every sample is kept at most once, however many epochs show it.

    On a task stream a sample is known by its identity. Otherwise the first epoch of a fit is taken as one pass over its
    data, and the later ones add nothing.

    Args:
        capacity: Samples in memory, over all ranks together.
        batch_size: Samples drawn for each rank and step; as many as the incoming batch holds if ``None``.
        policy: Which samples stay: ``"reservoir"`` (uniform over all seen), ``"class_balanced"``, ``"ring"`` (equal
            shares for tasks, the latest samples of each), ``"herding"`` (nearest to the class mean, needs
            ``features``).
        storage: ``"memory"``, ``"mmap"`` (on disk, needs ``directory``) or ``"index"`` (identities only; samples are
            read from the stream's dataset again).
        mode: ``"joint"`` puts the draw behind the incoming batch, in one forward; ``"separate"`` runs the module's
            ``training_step`` on it a second time and adds its loss.
        weight: The factor w of ``"separate"``.
        directory: Folder of the memory-mapped files.
        features: Name of the submodule whose output is the feature vector, for ``"herding"``.
        batch_adapter: Reads batches of an uncommon structure.
        seed: Seed of the memory's choices and draws.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for ``"separate"`` under manual optimization, for
            ``"index"`` without a task stream, and for a policy that needs labels or task boundaries on data without.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="er",
        family="replay",
        paper="Chaudhry et al. 2019, arXiv:1902.10486",
        needs="labels for class_balanced and herding; task boundaries for ring and herding",
        state="capacity samples over all ranks",
    )

    def __init__(
        self,
        capacity: int,
        *,
        batch_size: int | None = None,
        policy: str = "reservoir",
        storage: Literal["memory", "mmap", "index"] = "memory",
        mode: Literal["joint", "separate"] = "joint",
        weight: float = 1.0,
        directory: str | Path | None = None,
        features: str | None = None,
        batch_adapter: BatchAdapter | None = None,
        seed: int = 0,
    ) -> None:
        check_positive("weight", weight)
        check_choice("mode", mode, ("joint", "separate"))
        if mode == "joint" and weight != 1.0:
            raise ValueError(f"`weight={weight}` belongs to `mode='separate'`; a joint forward weighs samples equally.")
        super().__init__(
            capacity,
            batch_size=batch_size,
            policy=policy,
            storage=storage,
            directory=directory,
            features=features,
            batch_adapter=batch_adapter,
            seed=seed,
        )
        self.mode = mode
        self.weight = weight

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.mode == "separate":
            check_automatic_optimization(pl_module, self, "mode='separate'", "Use `mode='joint'`.")
        super().setup(trainer, pl_module, stage)

    # ------------------------------------------------------------------ rehearsal

    @override
    def transform_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        drawn = self._draw(trainer, batch) if self.mode == "joint" else None
        return batch if drawn is None else self.adapter.join(batch, drawn.columns)

    @override
    def loss_term(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        drawn = self._draw(trainer, batch) if self.mode == "separate" else None
        if drawn is None:
            return None
        with silenced(pl_module), metrics_kept(pl_module):
            loss = forward_loss(pl_module, self.as_batch(drawn, like=batch), batch_idx)
        return self.weight * loss

    def _draw(self, trainer: Trainer, batch: Any) -> Drawn | None:
        return self.draw(trainer, self.batch_size or self.adapter.size(batch))

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        size = self.adapter.size(batch)
        rows = [row % size for row in range(min(self.batch_size or size, self.share(trainer)))]

        def with_drawn(incoming: Any) -> Any:
            # in both modes the draw's forward lives until the backward
            return self.adapter.join(incoming, self.adapter.columns(self.adapter.select(batch, rows)))

        return replace(super().footprint(trainer, pl_module, batch), batch=with_drawn)
