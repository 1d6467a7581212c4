"""What every policy is: a rule that turns metadata into groups, shares of the capacity and keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_cl.memory.hashing import Float64Array, Int64Array
from lightning_cl.memory.index import Entries

__all__ = ["Policy", "TaskEndPolicy", "equal_shares"]


def equal_shares(counts: Int64Array, capacity: int) -> Int64Array:
    r"""Share the capacity equally: :math:`n_g = \min(c_g, L)`, the remainder to the last groups.

    A group smaller than its share leaves the rest to the others. Groups that are cut differ by one at most. The result
    depends on the counts only, and cutting now and again later gives what cutting once later would have given.

    Args:
        counts: Entries each group could fill, shape ``[groups]``.
        capacity: Entries that all groups together may keep, from 0.

    Returns:
        Entries each group keeps, shape ``[groups]``; the sum is ``min(capacity, counts.sum())``.

    >>> equal_shares(np.array([7, 1, 5, 9]), capacity=12).tolist()
    [3, 1, 4, 4]
    """
    if counts.sum() <= capacity:
        return np.array(counts)
    ordered = np.sort(counts)
    before = np.cumsum(ordered) - ordered
    levels = (capacity - before) // np.arange(len(counts), 0, -1)
    level = levels[np.argmax(ordered > levels)]  # of the smallest group that gets less than it could fill
    shares: Int64Array = np.minimum(counts, level)
    wanting = np.flatnonzero(counts > level)
    shares[wanting[len(wanting) - (capacity - int(shares.sum())) :]] += 1
    return shares


class Policy(ABC):
    """Decides what a buffer keeps. It holds neither payload nor state: the same metadata give the same decision.

    Every sample belongs to a group and has a key; a group keeps the samples with its largest keys, as many as its share
    of the capacity. A subclass with a ``name`` can be asked for by that name; nothing else has to be edited::

        class Newest(Policy):
            name = "newest"
            ...

        ReplayBuffer(100, policy="newest")

    Attributes:
        name: What users write for it; the name of the class if it was not given one.
        needs_labels: Whether :meth:`groups` reads the labels.
        needs_losses: Whether :meth:`keys` reads the model's losses.
        needs_boundaries: Whether it must be known to which task a sample belongs, or when a task ends.
        renews: Whether a sample that is presented again gets the key of that presentation if it is larger.
        stores_inputs: Whether inputs may be stored; if not, a buffer takes only identities and notes about samples.
        selects_at_task_end: Whether samples come by ``ReplayBuffer.offer`` and not by ``insert``.
    """

    registry: ClassVar[dict[str, type[Policy]]] = {}
    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    needs_losses: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    stores_inputs: ClassVar[bool] = True
    selects_at_task_end: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Enter a subclass that has a name of its own in the registry."""
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
            return
        taken = Policy.registry.setdefault(cls.name, cls)
        if taken.__qualname__ != cls.__qualname__:  # the same one comes again when its module is reloaded
            raise ValueError(f"`name={cls.name!r}` of {cls.__qualname__} is taken by {taken.__qualname__}.")
        Policy.registry[cls.name] = cls

    @staticmethod
    def resolve(policy: str | Policy) -> Policy:
        """Return ``policy``, built with its defaults if it is given by name.

        Raises:
            ValueError: If no policy has that name.
        """
        if isinstance(policy, Policy):
            return policy
        if policy not in Policy.registry:
            raise ValueError(f"`policy` must be a Policy or one of {sorted(Policy.registry)}, got {policy!r}.")
        return Policy.registry[policy]()

    @abstractmethod
    def groups(self, labels: Int64Array, tasks: Int64Array) -> Int64Array:
        """Return the group of each sample, shape ``[n]`` like both arguments; ``labels`` are 0 if there are none."""

    @abstractmethod
    def keys(self, sample_ids: Int64Array, *, seed: int, clock: int, losses: Float64Array | None) -> Int64Array:
        """Return the key of each sample, shape ``[n]``: larger keys are kept.

        No two samples of one group may have the same key.

        Args:
            sample_ids: Distinct and ascending, shape ``[n]``. A policy that selects at a task's end gets the samples of
                one group instead, the one chosen first in front.
            seed: The buffer's seed, from 0.
            clock: Number of batches the buffer has seen before, from 0 and below 2**31.
            losses: The model's loss on each sample, shape ``[n]``, for a policy that asks for it.
        """

    def shares(self, counts: Int64Array, capacity: int) -> Int64Array:
        """Share the capacity among groups, in ascending order of group; see :func:`equal_shares`."""
        return equal_shares(counts, capacity)


class TaskEndPolicy(Policy):
    """A policy to which samples are offered once, at a task's end, with features of the trained model."""

    needs_boundaries: ClassVar[bool] = True
    selects_at_task_end: ClassVar[bool] = True

    def choose(
        self, batch: Entries, shares: Int64Array, features: Tensor, *, seed: int, clock: int
    ) -> tuple[Int64Array, Int64Array]:
        """Select in every group, at most as many as ``shares`` [n] says for its samples.

        Returns:
            Positions in ``batch`` of the chosen samples, and their keys.
        """
        chosen = [np.zeros(0, dtype=np.int64)]
        keys = [chosen[0]]
        for group in np.unique(batch.groups):
            members = np.flatnonzero(batch.groups == group)
            count = min(len(members), int(shares[members[0]]))
            order = self.select(features[torch.from_numpy(members)], count).numpy()
            chosen.append(members[order])
            keys.append(self.keys(batch.ids[chosen[-1]], seed=seed, clock=clock, losses=None))
        return np.concatenate(chosen), np.concatenate(keys)

    @abstractmethod
    def select(self, features: Tensor, count: int) -> Tensor:
        """Return which samples of one group to keep, the most important first.

        Args:
            features: One row per sample, ascending in sample id, shape ``[n, dim]``, on the CPU.
            count: How many to choose, at most ``n``.

        Returns:
            Distinct positions in ``features``, int64, shape ``[count]``.
        """
