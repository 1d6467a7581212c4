"""Blurry streams: some classes belong to one task, the others also leak into the rest."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from lightning_cl.datamodules.scenarios.base import (
    DataInfo,
    IndexArray,
    Scenario,
    TaskPlan,
    check_n_tasks,
    classes_of,
    evaluation_parts,
    generator,
    group,
    required_labels,
    split_sizes,
)

__all__ = ["Blurry"]


class Blurry(Scenario):
    r"""i-Blurry and Si-Blurry: disjoint classes in one task each, blurry classes mostly in one and partly in all.

    Every class has a home task. Of the classes, a share ``disjoint_share`` (:math:`N`, rounded to whole classes) is
    disjoint: all samples stay at home. Of each blurry class, a share ``blurry_level`` (:math:`M`, rounded to whole
    samples) goes into one pool, which is shuffled and dealt to **all** :math:`T` tasks in equal portions, so that a
    task holds :math:`1 - M + M/T` of its own blurry classes and :math:`M/T` of those of another task. (The splits
    published with the paper are made so: CIFAR-10, :math:`T=5, M=0.1` has 4600 of 5000 samples at home.)

    With ``stochastic=True`` (Si-Blurry) the numbers vary by chance: how many disjoint classes a task is home to, how
    the pool falls on the blurry classes (drawn over all their samples), and how much of it a task receives; both
    divisions use cut points drawn uniformly.

    Differs from the papers' code where classes do not divide by tasks: there the remainder is dropped, here tasks
    differ by one class (the first tasks have the extra disjoint class, the last the extra blurry one) and every task
    is home to at least one class, so that it can be evaluated. A task is evaluated on the classes at home there.
    Wrap it as ``Online(Blurry(...))`` for the single pass with hidden boundaries of the papers.

    Koh et al. 2022, arXiv:2110.10031 (i-Blurry); Moon et al. 2023, arXiv:2308.09303 (Si-Blurry).

    Args:
        n_tasks: Number of tasks :math:`T`, at least 1 and at most the number of classes.
        disjoint_share: :math:`N` as a fraction, in [0, 1].
        blurry_level: :math:`M` as a fraction, in [0, 1].
        stochastic: Draw the sizes by chance.

    Raises:
        ValueError: When planning, without labels or with fewer classes than tasks.
    """

    needs_labels = True

    def __init__(
        self, n_tasks: int, disjoint_share: float = 0.5, blurry_level: float = 0.1, stochastic: bool = False
    ) -> None:
        self.n_tasks = check_n_tasks(n_tasks)
        for name, value in (("disjoint_share", disjoint_share), ("blurry_level", blurry_level)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a fraction in [0, 1], got {value}.")
        self.disjoint_share = disjoint_share
        self.blurry_level = blurry_level
        self.stochastic = stochastic

    @override
    def plan(self, train: DataInfo, seed: int) -> list[TaskPlan]:
        labels = required_labels(train, self)
        present, inverse = np.unique(labels, return_inverse=True)
        home, is_disjoint = self._homes(len(present), seed)
        task_of = home[inverse]
        rng = generator(seed, "blurry samples")
        pool = rng.permutation(self._pool(inverse, is_disjoint, rng))
        sizes = _random_sizes(len(pool), self.n_tasks, rng) if self.stochastic else split_sizes(len(pool), self.n_tasks)
        task_of[pool] = np.repeat(np.arange(self.n_tasks), sizes)
        return [
            TaskPlan(f"blurry {task}", chosen, classes_of(labels[chosen]))
            for task, chosen in enumerate(group(task_of, self.n_tasks))
        ]

    @override
    def evaluation(self, plans: list[TaskPlan], data: DataInfo, seed: int) -> list[IndexArray]:
        # The homes are a pure function of the seed and of how many classes the stream has.
        present = np.unique(np.concatenate([np.asarray(plan.classes) for plan in plans]))
        home, _ = self._homes(len(present), seed)
        groups = [present[home == task].tolist() for task in range(self.n_tasks)]
        return evaluation_parts(required_labels(data, self), groups, plans, "label")

    def _homes(self, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the home task of each class, and whether the class is disjoint."""
        if n_classes < self.n_tasks:
            raise ValueError(
                f"`n_tasks={self.n_tasks}` asks for more tasks than the training set has classes ({n_classes}); set"
                f" `n_tasks` to at most {n_classes}."
            )
        rng = generator(seed, "blurry classes")
        n_disjoint = round(self.disjoint_share * n_classes)
        blurry_sizes = split_sizes(n_classes - n_disjoint, self.n_tasks)[::-1]
        if self.stochastic:
            # a task that is home to no blurry class gets a disjoint one before chance divides the rest
            needed = [int(size == 0) for size in blurry_sizes]
            extra = _random_sizes(n_disjoint - sum(needed), self.n_tasks, rng)
            disjoint_sizes = [one + more for one, more in zip(needed, extra, strict=True)]
        else:
            disjoint_sizes = split_sizes(n_disjoint, self.n_tasks)
        order = rng.permutation(n_classes)
        home, is_disjoint = np.empty(n_classes, dtype=np.int64), np.zeros(n_classes, dtype=bool)
        tasks = np.arange(self.n_tasks)
        home[order] = np.concatenate([np.repeat(tasks, disjoint_sizes), np.repeat(tasks, blurry_sizes)])
        is_disjoint[order[:n_disjoint]] = True
        return home, is_disjoint

    def _pool(self, class_of: np.ndarray, is_disjoint: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the samples that leave home."""
        blurry = rng.permutation(np.flatnonzero(~is_disjoint[class_of]))
        if self.stochastic:
            return blurry[: round(self.blurry_level * len(blurry))]
        # samples of a class side by side, in random order; the first M of each leave
        blurry = blurry[np.argsort(class_of[blurry], kind="stable")]
        counts = np.bincount(class_of[blurry], minlength=len(is_disjoint))
        rank = np.arange(len(blurry)) - np.repeat(np.cumsum(counts) - counts, counts)
        return blurry[rank < np.repeat(np.rint(self.blurry_level * counts), counts)]


def _random_sizes(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Return sizes that add up to ``total``, between ``parts - 1`` cut points drawn uniformly."""
    cuts = np.sort(rng.integers(0, total, size=parts - 1, endpoint=True))
    return [int(size) for size in np.diff(cuts, prepend=0, append=total)]
