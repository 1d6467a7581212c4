"""Exact unlearning by sharded, sliced training of adapters (S3T): Chowdhury et al. 2024, arXiv:2406.16257."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Subset

from lightning_cl.adapters.lora_blocks import lora_blocks
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import class_scores
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count, check_positive
from lightning_cl.core.distributed import is_distributed, rank
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed, isolated_rng
from lightning_cl.core.state import full_copy
from lightning_cl.datamodules import Predefined, TaskStreamDataModule
from lightning_cl.unlearning.digest import digest_of
from lightning_cl.unlearning.ledger import Ledger, RequestRecord, hash_of_ids, moment

__all__ = ["SlicedAdapters"]

_VERSION = 1
_LEDGER = "requests.jsonl"


class SlicedAdapters:
    r"""Train adapters so that what a sample did to them can be dropped, and nothing else with it.

    The rows of the data fall into ``shards``, and those of a shard into ``slices``, by a hash of seed and row number:
    where a row falls depends on no other row. Each shard has an adapter, trained slice by slice: the i-th training
    reads the first i slices together and moves one group of the network's blocks, the i-th from the top, with all
    others frozen, and what trains beside the adapters, as a head. It is a ``fit`` of its own over a one-task
    :class:`~lightning_cl.TaskStreamDataModule`, with a new optimizer and with generators seeded for it, and leaves a
    checkpoint. So that a deletion early in the order costs less, ``permutations`` adapters of each shard take its
    slices in rotated orders.

    :meth:`forget` deletes every checkpoint that has seen a row and no other; those that are left are, to the bit, those
    of a run that never had it. :meth:`logits` averages over shards what the longest surviving checkpoint of each says.
    :meth:`fit` trains what is missing, and then all of them are those of such a run. It goes on where it was stopped.

    Deletions are records of a :class:`~lightning_cl.unlearning.Ledger`, as those of a callback that serves requests:
    rows and their hash, the settings, the checkpoints that went, and a digest of those that stayed, which is that of
    the same checkpoints of a run that never had the rows. Measurements and what the rows held are not in it: they are
    not read for a deletion.

    Args:
        module: Returns the module as before training, LoRA adapters in it; called with seeded generators, for every
            training, and the same weights must come back.
        train: Map-style training data. Its rows keep their numbers; those that were forgotten are never read again.
        folder: For the checkpoints, ``shard-0/order-0/prefix-1.pt`` and so on, and the ledger, ``requests.jsonl``.
        shards: Adapters that share no row; at least 1. A deletion costs one of them.
        slices: Trainings of each, from 1 to the number of blocks with adapters.
        permutations: Orders of the slices, from 1 to ``slices``; each costs as much as the first.
        epochs: Passes over its rows in each training.
        batch_size: Samples for each rank and step.
        seed: Of the assignment, the orders and all trainings.
        collate_fn: Joins samples to a batch; torch's default if ``None``.
        batch_adapter: Reads the inputs of batches of an uncommon structure.

    Attributes:
        ledger: The deletions so far.

    Raises:
        ValueError: For settings out of range, a folder of other settings, or one whose ledger was changed.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="sliced-adapters",
        family="unlearning",
        paper="Chowdhury et al. 2024, arXiv:2406.16257",
        needs="a function that makes a module with LoRA; data whose rows stay; trainings of its own",
        state="the ledger; a file of what trains for each shard, order and slice",
    )

    def __init__(
        self,
        module: Callable[[], LightningModule],
        train: Dataset[Any],
        folder: str | Path,
        *,
        shards: int = 2,
        slices: int = 4,
        permutations: int = 1,
        epochs: int = 1,
        batch_size: int = 64,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        for name, value in (("shards", shards), ("slices", slices), ("epochs", epochs), ("batch_size", batch_size)):
            check_count(name, value)
        check_count("permutations", permutations)
        check_positive("seed", seed, zero_allowed=True)
        if permutations > slices:
            raise ValueError(f"`permutations={permutations}`: {slices} slices have no more than {slices} rotations.")
        self.module = module
        self.train = train
        self.folder = Path(folder)
        self.shards, self.slices, self.permutations = shards, slices, permutations
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.collate_fn = collate_fn
        self.batch_adapter = batch_adapter or BatchAdapter()
        length = len(train)  # type: ignore[arg-type]
        places = torch.tensor([derived_seed("slice", seed, row) % (shards * slices) for row in range(length)])
        self._rows = [(places == place).nonzero().flatten().tolist() for place in range(shards * slices)]
        self._settings = {
            "rows": length,
            "shards": shards,
            "slices": slices,
            "permutations": permutations,
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
        }
        self._check_folder()
        self.ledger = self._read_ledger()
        self._drop()

    # ------------------------------------------------------------------ what is where

    def rows(self, shard: int, part: int) -> list[int]:
        """Return the rows of a slice that are not forgotten, ascending."""
        forgotten = set(self.forgotten)
        return [row for row in self._rows[shard * self.slices + part] if row not in forgotten]

    def order(self, permutation: int) -> list[int]:
        """Return the slices in the order of a permutation: rotated, by offsets as even as can be."""
        first = permutation * self.slices // self.permutations
        return [(first + i) % self.slices for i in range(self.slices)]

    def path(self, shard: int, permutation: int, length: int) -> Path:
        """Return the file of the adapter after ``length`` slices, from 1."""
        return self.folder / f"shard-{shard}" / f"order-{permutation}" / f"prefix-{length}.pt"

    def served(self) -> dict[int, Path]:
        """Return the longest surviving checkpoint of each shard that has one; of several orders the first."""
        found: dict[int, Path] = {}
        for shard in range(self.shards):
            best = max(range(self.permutations), key=lambda p: self._length(shard, p))
            if length := self._length(shard, best):
                found[shard] = self.path(shard, best, length)
        return found

    @property
    def forgotten(self) -> list[int]:
        """The rows that :meth:`forget` was told, ascending."""
        return sorted({row for record in self.ledger.records for row in record.ids})

    def _length(self, shard: int, permutation: int) -> int:
        """Return how many slices the longest checkpoint of an order has seen; it has those before it, or nothing."""
        lengths = range(1, self.slices + 1)
        missing = (length for length in lengths if not self.path(shard, permutation, length).exists())
        return next(missing, self.slices + 1) - 1

    # ------------------------------------------------------------------ training

    def fit(self, trainer: Callable[[], Trainer]) -> list[Path]:
        """Train the checkpoints that are missing, and return them.

        Args:
            trainer: Returns a new Trainer for each training; its epochs are set here. All ranks must call this.

        Raises:
            ValueError: If the network has fewer blocks with adapters than there are slices.
            RuntimeError: If a training was interrupted.
        """
        # rows that another object of the same folder was told
        self.ledger = self._read_ledger()
        new = []
        for shard in range(self.shards):
            for permutation in range(self.permutations):
                for length in range(self._length(shard, permutation) + 1, self.slices + 1):
                    self._train(trainer, shard, permutation, length)
                    new.append(self.path(shard, permutation, length))
        return new

    def _train(self, make_trainer: Callable[[], Trainer], shard: int, permutation: int, length: int) -> None:
        seen = self.order(permutation)[:length]
        rows = sorted(row for part in seen for row in self.rows(shard, part))
        before = self.path(shard, permutation, length - 1)
        module = self._module(before if length > 1 else None)
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._freeze(module, length)
        if rows:
            # a sample that comes late in an order must change nothing before it: no generator goes on from there
            seed = derived_seed("training", self.seed, shard, permutation, length)
            data: Any = Subset(self.train, rows)
            stream = TaskStreamDataModule(
                [data],
                scenario=Predefined([f"shard {shard}, slices {seen}"]),
                batch_size=self.batch_size,
                epochs_per_task=self.epochs,
                collate_fn=self.collate_fn,
                seed=seed % 2**31,
            )
            with isolated_rng(seed):
                trainer = make_trainer()
                trainer.fit(module, datamodule=stream)
            if trainer.interrupted:
                raise RuntimeError(f"The training of {self.path(shard, permutation, length)} was interrupted.")
        saved = module.state_dict()
        kept = {*trained, *(name for name, _ in module.named_buffers())} & saved.keys()
        state = {name: full_copy(saved[name]).cpu() for name in sorted(kept)}
        self._write(self.path(shard, permutation, length), {"version": _VERSION, "rows": rows, "state": state})

    def _module(self, checkpoint: Path | None) -> LightningModule:
        with isolated_rng(derived_seed("module", self.seed)):
            module = self.module()
            module.configure_model()
        if checkpoint is not None:
            _load(module, checkpoint)
        return module

    def _freeze(self, module: LightningModule, length: int) -> None:
        """Let only the group of a training learn, counted from the top."""
        blocks = list(lora_blocks(module, "SlicedAdapters").values())
        if len(blocks) < self.slices:
            raise ValueError(
                f"`slices={self.slices}` train a group of blocks each, and only {len(blocks)} blocks of the network"
                " have adapters. Take fewer slices, or adapt more blocks."
            )
        place, count = self.slices - length, len(blocks)
        group = range(place * count // self.slices, (place + 1) * count // self.slices)
        for index, block in enumerate(blocks):
            for parameter in block.values():
                parameter.requires_grad_(index in group)

    # ------------------------------------------------------------------ requests and answers

    def forget(self, rows: Sequence[int], name: str | None = None) -> list[Path]:
        """Delete every checkpoint that has seen one of ``rows``, for good, and return them. All ranks must call this.

        A record of it stands in the ledger before the first file goes. A request that was served finds nothing to do.

        Args:
            rows: Rows of the training data.
            name: Name of the request in the ledger; ``"request 1"`` and so on if ``None``.

        Raises:
            ValueError: If a row is not in the data, or the name was served for other rows.
        """
        started, length = moment(), self._settings["rows"]
        if wrong := [row for row in rows if not 0 <= row < length]:
            raise ValueError(f"`rows` holds {wrong[:3]}, and the data has {length} rows, from 0.")
        self.ledger = self._read_ledger()
        asked = {int(row) for row in rows}
        new = sorted(asked.difference(self.forgotten))
        if name is not None and self.ledger.find(name) is not None:
            if new:
                raise ValueError(f"Request {name!r} was served for other rows. Give the new one a name of its own.")
        elif new or name is not None:
            names = (f"request {number}" for number in count(len(self.ledger) + 1))
            name = name or next(free for free in names if self.ledger.find(free) is None)
            self._append(name, len(asked), torch.tensor(new, dtype=torch.int64), started)
        return self._drop()

    def _append(self, name: str, asked: int, ids: Tensor, started: str) -> None:
        states = {str(file.relative_to(self.folder)): _read(file) for file in self._files()}
        dropped = [file for file, found in states.items() if not set(ids.tolist()).isdisjoint(found["rows"])]
        left = {f: found["state"] for f, found in states.items() if f not in dropped}
        record = RequestRecord(
            name=name,
            asked=asked,
            ids=ids.tolist(),
            ids_hash=hash_of_ids(ids) if len(ids) else "",
            samples_hash="",
            method=self.card.name,
            settings={**self._settings, "dropped": dropped},
            seed=self.seed,
            reference_hash=None,
            weights_hash=digest_of((f"{f}:{n}", value) for f, state in left.items() for n, value in state.items()),
            started=started,
            ended=moment(),
            steps=0,
            stopped=None,
            before={},
            after={},
            influences=[Influence(type(self).__name__, "checkpoints", "removed", len(dropped))],
            previous=self.ledger.last_hash,
        )
        # before anything is deleted: a process that dies in between leaves a checkpoint that the next one drops
        self._replace(self.folder / _LEDGER, Ledger([*self.ledger.records, record]).write)
        self.ledger = self._read_ledger()

    def _drop(self) -> list[Path]:
        forgotten = set(self.forgotten)
        dropped = [file for file in self._files() if not forgotten.isdisjoint(_read(file)["rows"])] if forgotten else []
        _meet()
        for file in dropped:
            file.unlink(missing_ok=True)
        _meet()
        return dropped

    @torch.no_grad()
    def logits(self, batches: Iterable[Any]) -> list[Tensor]:
        """Return the scores of each batch, the mean over the shards that have a checkpoint.

        Args:
            batches: Batches as the module gets them, or inputs alone, on the device to compute on.

        Raises:
            ValueError: If no shard has a checkpoint, or the module returns no scores.
        """
        served = self.served()
        if not served:
            raise ValueError("No checkpoint is left, or none was trained yet: call `fit`.")
        kept, means = list(batches), list[Tensor]()
        for checkpoint in served.values():
            module = self._module(checkpoint).eval()
            for index, batch in enumerate(kept):
                inputs = self.batch_adapter.inputs(batch)
                module.to(_device(batch))
                scores = class_scores(module(**inputs) if isinstance(inputs, Mapping) else module(inputs))
                if scores is None:
                    raise ValueError(f"`{type(module).__name__}.forward` returned no scores to average.")
                share = scores.float() / len(served)
                means[index : index + 1] = [means[index] + share if index < len(means) else share]
        return means

    # ------------------------------------------------------------------ files

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*/order-*/prefix-*.pt"))

    def _check_folder(self) -> None:
        file = self.folder / "settings.json"
        if file.exists() and (found := json.loads(file.read_text("utf-8"))) != self._settings:
            raise ValueError(
                f"The checkpoints in {str(self.folder)!r} are of the settings {found}, and these are {self._settings}:"
                " rows would be in other slices. Take the same data and settings, or another folder."
            )
        self._replace(file, lambda part: part.write_text(json.dumps(self._settings), "utf-8"))

    def _read_ledger(self) -> Ledger:
        file = self.folder / _LEDGER
        return Ledger.read(file) if file.exists() else Ledger()

    def _replace(self, file: Path, write: Callable[[Path], Any]) -> None:
        _meet()
        if rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            # of its own, because ranks that have no process group yet write the same at the same time
            part = file.with_name(f".{file.name}.{uuid4().hex}")
            write(part)
            part.replace(file)
        _meet()

    def _write(self, file: Path, value: dict[str, Any]) -> None:
        if rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.partial")
            torch.save(value, part)
            part.replace(file)
        _meet()


def _meet() -> None:
    """Let no rank look for files while another writes or deletes them."""
    if is_distributed():
        dist.barrier()


def _device(batch: Any) -> torch.device:
    """Return the device of the first tensor in a batch, the CPU if it holds none."""
    return next((leaf.device for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if found["version"] != _VERSION:
        raise ValueError(f"{str(file)!r} has version {found['version']}, and this release reads {_VERSION}.")
    return found


def _load(module: LightningModule, file: Path) -> None:
    missing = module.load_state_dict(_read(file)["state"], strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"{str(file)!r} holds {missing.unexpected_keys[:3]}, which the module does not have.")
