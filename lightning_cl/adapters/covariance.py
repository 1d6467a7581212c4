"""The covariance of what adapted layers are called with, over the data of a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.adapters.slot import Slot
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.distributed import max_over_ranks_, sum_over_ranks_
from lightning_cl.core.recording import recording
from lightning_cl.core.shared_work import share_out
from lightning_cl.core.task_data import task_batches
from lightning_cl.functional.gpm import add_gram_
from lightning_cl.functional.subspaces import exact_dtype

__all__ = [
    "InputSums",
    "by_identity",
    "check_features",
    "covariance_dtype",
    "input_covariances",
    "loaded_by_identity",
    "read_batch",
    "saved_by_identity",
    "write_rows",
]

# a matrix of float64 has 32 MB then; of the wider ones float32 halves what is much
_EXACT_UP_TO = 2048
_Value = TypeVar("_Value")


def input_covariances(
    trainer: Trainer,
    pl_module: LightningModule,
    slots: Mapping[str, Slot],
    adapter: BatchAdapter,
    n_samples: int | None = None,
    sample_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""Return :math:`C = \frac{1}{n} \sum_{i=1}^{n} x_i x_i^\top` of the inputs of each layer over the current task.

    The :math:`x_i` are all positions of all samples, without padding, as the network computes them now, in evaluation
    mode: one pass forward, which leaves no trace in the module and the random generators. Sums are over all ranks, in
    float64 for up to 2048 inputs and in float32 above. Layers that are called with the same tensor, such as the
    projections to queries, keys and values, have one matrix between them, so the memory is :math:`(d + 1)^2` numbers of
    8 or 4 bytes for each different input of d features, on the device of the module, on every rank.

    Args:
        trainer: The running Trainer.
        pl_module: The user's module.
        slots: The layers.
        adapter: Reads batch sizes and masks.
        n_samples: Samples to read, over all ranks; the whole task if ``None``.
        sample_ids: Identities of samples to read in the place of the task's.

    Returns:
        C by the name of the layer, ``[d, d]``: the same object for layers that share their inputs, zeros for a layer
        that was not called.

    Raises:
        ValueError: If none of the layers was called.
    """

    def read(*, share: bool) -> InputSums:
        batches = (batch for batch, _ in task_batches(trainer, pl_module, adapter, n_samples, sample_ids))
        return InputSums(slots, pl_module.device, share=share).read(pl_module, adapter, batches)

    sums = read(share=True)
    if not sums.agree():
        # layers took the same tensor in some calls only, so each needs a matrix of its own
        sums = read(share=False)
    if not sums.called():
        raise ValueError(
            f"The step of {type(pl_module).__name__} calls none of its adapted layers, such as {list(slots)[:3]}: their"
            " inputs cannot be seen. Call them as modules."
        )
    return sums.covariances()


class InputSums:
    """Sums over the inputs of layers, one for those that are called with the same tensor one after the other.

    Args:
        slots: The layers.
        device: Where the sums are.
        share: Whether layers may share a sum.
    """

    def __init__(self, slots: Mapping[str, Slot], device: torch.device, *, share: bool = True) -> None:
        self._slots = slots
        self._device = device
        self._share = share
        self._sums: dict[str, Tensor] = {}
        self._owner: dict[str, str] = {}
        self._calls: Counter[str] = Counter()
        self._broken = False
        # the latest input of a layer with a sum of its own: held, so that no other tensor can take its place in memory
        self._latest: tuple[Tensor, int, str, int] | None = None

    def read(
        self, pl_module: LightningModule, adapter: BatchAdapter, batches: Iterable[Any], *, padding: bool = False
    ) -> InputSums:
        """Add the inputs that the module's step gives the layers on each batch, without padding; return self."""
        layers = {name: slot.layer for name, slot in self._slots.items()}

        def record(name: str, inputs: Tensor, output: Tensor, present: Tensor | None) -> None:
            self.add(name, inputs, None if padding else present)

        with torch.no_grad(), recording(pl_module, layers, record, adapter) as run:
            # drawn from inside, so that a loader's random order is forgotten too
            for batch in batches:
                run(batch)
        self._latest = None
        return self

    def add(self, name: str, inputs: Tensor, present: Tensor | None) -> None:
        """Add the inputs of a call, where they are present."""
        call = self._calls[name]
        self._calls[name] += 1
        same = self._same(inputs, call) if self._share else None
        owner = self._owner.setdefault(name, same or name)
        if owner != name:
            self._broken |= same != owner
            return
        self._latest = (inputs, inputs._version, name, call)
        if name not in self._sums:
            self._sums[name] = self._empty(name)
        # the last of x is a constant 1, so the last of the sums is their number
        add_gram_(self._sums[name], self._slots[name].layer.get_base_layer(), inputs, present)

    def _same(self, inputs: Tensor, call: int) -> str | None:
        """Return the layer that was called with this tensor just now, as often as the present one."""
        if self._latest is None:
            return None
        tensor, version, name, its_call = self._latest
        same = tensor.is_set_to(inputs) and inputs._version == version and its_call == call
        return name if same else None

    def _empty(self, name: str) -> Tensor:
        length = self._slots[name].layer.in_features + 1
        return torch.zeros(1, length, length, dtype=covariance_dtype(length - 1, self._device), device=self._device)

    def agree(self) -> bool:
        """Return whether all calls on all ranks shared alike; all ranks must call this."""
        names = list(self._slots)
        owners = [names.index(self._owner.get(name, name)) for name in names]
        uneven = any(self._calls[name] != self._calls[owner] for name, owner in self._owner.items())
        told = torch.tensor([owners, [-owner for owner in owners]], device=self._device)
        highest, lowest = max_over_ranks_(told).unbind()
        broken = max_over_ranks_(torch.tensor(int(self._broken or uneven), device=self._device))
        return not int(broken) and torch.equal(highest, -lowest)

    def called(self) -> bool:
        """Return whether any layer was called on any rank; all ranks must call this."""
        return bool(max_over_ranks_(torch.tensor(len(self._sums), device=self._device)))

    def covariances(self) -> dict[str, Tensor]:
        """Return the mean over all ranks by the name of the layer; all ranks must call this, once."""
        found: dict[str, Tensor] = {}
        for name in self._slots:
            if (owner := self._owner.get(name, name)) == name:
                mine = self._sums[name] if name in self._sums else self._empty(name)
                total = sum_over_ranks_(mine)[0]
                found[name] = total[:-1, :-1].div_(total[-1, -1].clamp(min=1))
            else:
                found[name] = found[owner]
        return found


def covariance_dtype(length: int, device: torch.device) -> torch.dtype:
    """Return the dtype that the inputs of a layer are summed in."""
    return exact_dtype(device) if length <= _EXACT_UP_TO else torch.float32


def by_identity(values: Mapping[str, _Value], also: Mapping[str, object] | None = None) -> list[list[str]]:
    """Return the names, those together that have the same object, and the same in ``also`` where that is given."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, value in values.items():
        groups.setdefault((id(value), id(also.get(name)) if also else 0), []).append(name)
    return list(groups.values())


def saved_by_identity(values: Mapping[str, _Value], save: Callable[[_Value], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what ``save`` makes of each object for a checkpoint, once for all layers that share it."""
    return [{"layers": names} | save(values[names[0]]) for names in by_identity(values)]


def loaded_by_identity(saved: list[dict[str, Any]], load: Callable[[dict[str, Any]], _Value]) -> dict[str, _Value]:
    """Return what ``load`` makes of what :func:`saved_by_identity` returned, by the name of the layer."""
    values: dict[str, _Value] = {}
    for entry in saved:
        values |= dict.fromkeys(entry["layers"], load(entry))
    return values


def check_features(user: str, what: str, found: Mapping[str, int], slots: Mapping[str, Slot]) -> None:
    """Refuse what a callback knows of the inputs of other layers.

    Args:
        user: The callback, for errors.
        what: What it knows, for errors.
        found: The features that it knows of, by the name of the layer.
        slots: The layers.

    Raises:
        ValueError: If there is a layer that it does not know, or knows with other features.
    """
    for name, slot in slots.items():
        if found.get(name) != slot.layer.in_features:
            known = f"a {what} of {found[name]} features" if name in found else f"no {what}"
            raise ValueError(
                f"`{user}` has {known} for {name!r}, which has {slot.layer.in_features}. Go on with the model of the"
                " run before."
            )


def read_batch(
    pl_module: LightningModule, slots: Mapping[str, Slot], adapter: BatchAdapter, batch: Any, kept: Callable[[], Any]
) -> Callable[[], Any]:
    """Return what takes the memory of a pass, for a footprint: sums of one batch, and what is kept beside them."""

    def collect() -> Any:
        # a mask has no values here that tell how much it leaves
        sums = InputSums(slots, pl_module.device).read(pl_module, adapter, [batch], padding=True)
        return kept(), sums

    return collect


def write_rows(
    slots: Mapping[str, Slot],
    groups: list[list[str]],
    read: Callable[[str], _Value],
    make: Callable[[list[str], _Value], Tensor],
    user: str,
) -> None:
    """Start adapters with rows for A and zeros for B; all ranks must call this.

    Args:
        slots: The layers.
        groups: Names of layers that are started alike.
        read: Returns what the rows of a group are made of, by its first name; called on all ranks.
        make: Returns A ``[r, d]``, r the largest rank of the group; called on one rank for each group.
        user: The callback, for errors.

    Raises:
        ValueError: If a B is not zero: what it has learned would be lost.
    """
    members = {names[0]: names for names in groups}
    for first, rows in share_out(list(members), read, lambda name, source: make(members[name], source).cpu()).items():
        for slot in (slots[name] for name in members[first]):
            up = slot.factors(slot.current)[1]
            if up.any():
                raise ValueError(
                    f"`{user}` chooses where the adapter {slot.current!r} of {slot.name!r} starts, but it has been"
                    " trained: that would be lost. Give the module a fresh one."
                )
            slot.write(slot.current, rows[: slot.rank(slot.current)].to(up.device), torch.zeros_like(up))
