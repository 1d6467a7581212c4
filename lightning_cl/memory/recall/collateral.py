"""Recall of what new training damages (mix-cd, Bai et al. 2024, arXiv:2402.08096)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array
from lightning_cl.memory.index import SlotChange
from lightning_cl.memory.recall.base import LocalSamples, Recall
from lightning_cl.memory.recall.chances import weighted
from lightning_cl.memory.recall.slots import SlotGroups

__all__ = ["Collateral"]

# what is known of a sample; three groups for each partition
_UNKNOWN, _RIGHT, _WRONG = range(3)


class Collateral(Recall):
    r"""Samples of partitions in which new training does damage come more often.

    Collateral damage is a sample that the model had right and now has wrong. Samples are partitioned by task and, where
    there are labels, class. Of each partition k, the samples rehearsed in later tasks tell how many of those that were
    right (:math:`S_k`) are wrong now (:math:`D_k`), at no cost; both are multiplied by :math:`\gamma` in every step. In
    task T, of the samples that are left, one is drawn with

    .. math::
        P(i) \propto \begin{cases} \max(f, \alpha_{k(i)}) & \text{the model had } i \text{ right} \\
        f & \text{it had } i \text{ wrong} \end{cases} \qquad \alpha_k = \frac{D_k + 1}{S_k + 2}

    and none comes twice in a draw. A sample counts as right or wrong by the last time the model saw it in the task in
    which it came, and as right for good when it is right in a rehearsal. One that was never judged comes as one that
    was right. Samples of the running task come where there are too few of earlier ones.

    Bai et al. 2024, "An Efficient Rehearsal Scheme for Catastrophic Forgetting Mitigation during Multi-stage
    Fine-tuning", arXiv:2402.08096.

    Args:
        decay: :math:`\gamma`, from 0 to 1 exclusive: how much of what was counted stays after a step.
        floor: f, from 0 to 1 exclusive, so that no partition is lost from sight. With 0, samples that the model had
            wrong come only where there are too few others.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "collateral"
    needs_boundaries: ClassVar[bool] = True
    needs_hits: ClassVar[bool] = True
    bytes_per_sample: ClassVar[int] = 8

    def __init__(self, decay: float = 0.99, floor: float = 0.05) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be from 0 to 1 exclusive, got {decay!r}.")
        if not 0 <= floor < 1:
            raise ValueError(f"`floor` must be from 0 to 1 exclusive, got {floor!r}.")
        self.decay = decay
        self.floor = floor
        # partition by (task, label), then arrays over partitions
        self._partitions: dict[tuple[int, int], int] = {}
        self._seen: Float64Array = np.zeros(0)
        self._damaged: Float64Array = np.zeros(0)
        self._groups = SlotGroups()
        # hits of incoming samples that may enter at the end of the step
        self._entering: dict[int, int] = {}

    @property
    def densities(self) -> dict[tuple[int, int], float]:
        r"""The estimate :math:`\alpha_k` for each task and label (0 without labels) that this rank has kept."""
        return dict(zip(self._partitions, self._alphas().tolist(), strict=True))

    def _alphas(self) -> Float64Array:
        return (self._damaged + 1) / (self._seen + 2)

    # ------------------------------------------------------------------ what is kept

    @override
    def follow(self, change: SlotChange, samples: LocalSamples) -> None:
        known = (self._entering.get(i) for i in samples.sample_ids(change.slots).tolist())
        states = [_UNKNOWN if hit is None else _RIGHT if hit else _WRONG for hit in known]
        partitions = self._partitions_of(samples, change.slots)
        self._groups.follow(change, 3 * partitions + np.array(states, dtype=np.int64))

    def _partitions_of(self, samples: LocalSamples, slots: Int64Array | slice) -> Int64Array:
        pairs = zip(samples.tasks(slots).tolist(), samples.labels(slots).tolist(), strict=True)
        found = np.array([self._partitions.setdefault(pair, len(self._partitions)) for pair in pairs], dtype=np.int64)
        new = (0, len(self._partitions) - len(self._seen))
        self._seen, self._damaged = np.pad(self._seen, new), np.pad(self._damaged, new)
        return found

    @override
    def forget(self) -> None:
        self._seen, self._damaged = np.zeros_like(self._seen), np.zeros_like(self._damaged)
        self._entering = {}

    # ------------------------------------------------------------------ the estimate

    @override
    def observe(self, samples: LocalSamples, sample_ids: Int64Array, hits: Int64Array, *, task: int) -> None:
        # incoming samples stand last: they count where one was drawn too
        ids, last = np.unique(sample_ids[::-1], return_index=True)
        hits = hits[::-1][last]
        slots = samples.slots_of(ids)
        kept = slots >= 0
        self._entering = dict(zip(ids[~kept].tolist(), hits[~kept].tolist(), strict=True))
        slots, right = slots[kept], hits[kept] == 1
        partitions, states = np.divmod(self._groups.values[slots], 3)
        old = samples.tasks(slots) < task

        judged = old & (states == _RIGHT)
        self._seen *= self.decay
        self._damaged *= self.decay
        np.add.at(self._seen, partitions[judged], 1)
        np.add.at(self._damaged, partitions[judged & ~right], 1)

        states = np.where(right, _RIGHT, np.where(old, states, _WRONG))
        self._groups.assign(slots, 3 * partitions + states)

    @override
    def choose(self, samples: LocalSamples, size: int, generator: torch.Generator, *, task: int) -> Int64Array:
        groups, counts = self._groups.values, self._groups.counts
        if len(samples) < len(groups):
            groups = groups[samples.slots()]
            counts = np.bincount(groups, minlength=len(counts))
        weights = np.full((len(self._partitions), 3), self.floor)
        weights[:, [_UNKNOWN, _RIGHT]] = np.maximum(self._alphas(), self.floor)[:, None]
        old: npt.NDArray[np.bool_] = np.array([of < task for of, _ in self._partitions])
        weights[~old] = 0.0
        return weighted(groups, counts, weights.reshape(-1)[: len(counts)], size, generator)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        pairs = np.array(list(self._partitions), dtype=np.int64).reshape(-1, 2)
        judged = self._seen > 0
        return {
            "states": torch.from_numpy(self._groups.values % 3),
            "partitions": torch.from_numpy(pairs[judged]),
            "seen": torch.from_numpy(self._seen[judged]),
            "damaged": torch.from_numpy(self._damaged[judged]),
        }

    @override
    def load_state_dict(
        self, parts: Sequence[Mapping[str, Any]], *, kept: Int64Array, rank: int | None, samples: LocalSamples
    ) -> None:
        self._partitions, self._seen, self._damaged = {}, np.zeros(0), np.zeros(0)
        states = np.concatenate([part["states"].numpy() for part in parts])[kept]
        self._groups.restore(3 * self._partitions_of(samples, slice(None)) + states)
        # ranks that hold samples of others go on from what all counted, which must not multiply with their number
        ranks = self.world_size if rank is None else 1
        for part in parts if rank is None else [parts[rank]]:
            pairs = part["partitions"].tolist()
            for (of, label), seen, damaged in zip(pairs, part["seen"].tolist(), part["damaged"].tolist(), strict=True):
                place = self._partitions.setdefault((of, label), len(self._partitions))
                if place == len(self._seen):
                    self._seen, self._damaged = np.append(self._seen, 0.0), np.append(self._damaged, 0.0)
                self._seen[place] += seen / ranks
                self._damaged[place] += damaged / ranks
