"""Exact unlearning by sharded, sliced training of adapters (S3T): Chowdhury et al. 2024, arXiv:2406.16257."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
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
from lightning_cl.core.checks import check_count, check_positive
from lightning_cl.core.distributed import is_distributed, rank
from lightning_cl.core.rng import derived_seed, isolated_rng
from lightning_cl.core.state import full_copy
from lightning_cl.datamodules import Predefined, TaskStreamDataModule

__all__ = ["SlicedAdapters"]

_VERSION = 1


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

    Args:
        module: Returns the module as before training, LoRA adapters in it; called with seeded generators, for every
            training, and the same weights must come back.
        train: Map-style training data. Its rows keep their numbers; those that were forgotten are never read again.
        folder: For the checkpoints, ``shard-0/order-0/prefix-1.pt`` and so on, and ``forgotten.json``.
        shards: Adapters that share no row; at least 1. A deletion costs one of them.
        slices: Trainings of each, from 1 to the number of blocks with adapters.
        permutations: Orders of the slices, from 1 to ``slices``; each costs as much as the first.
        epochs: Passes over its rows in each training.
        batch_size: Samples for each rank and step.
        seed: Of the assignment, the orders and all trainings.
        collate_fn: Joins samples to a batch; torch's default if ``None``.
        batch_adapter: Reads the inputs of batches of an uncommon structure.

    Raises:
        ValueError: For settings out of range, a folder of other settings, or a row that is not in the data.
    """

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
        self._check_folder(
            {
                "rows": length,
                "shards": shards,
                "slices": slices,
                "permutations": permutations,
                "epochs": epochs,
                "batch_size": batch_size,
                "seed": seed,
            }
        )
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
        file = self.folder / "forgotten.json"
        rows: list[int] = json.loads(file.read_text("utf-8")) if file.exists() else []
        return rows

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

    def forget(self, rows: Sequence[int]) -> list[Path]:
        """Delete every checkpoint that has seen one of ``rows``, for good, and return them. All ranks must call this.

        Raises:
            ValueError: If a row is not in the data.
        """
        length = len(self.train)  # type: ignore[arg-type]
        if wrong := [row for row in rows if not 0 <= row < length]:
            raise ValueError(f"`rows` holds {wrong[:3]}, and the data has {length} rows, from 0.")
        # before anything is deleted: a process that dies in between leaves a checkpoint that the next one drops
        self._write_json("forgotten.json", sorted({*self.forgotten, *(int(row) for row in rows)}))
        return self._drop()

    def _drop(self) -> list[Path]:
        forgotten = set(self.forgotten)
        files = sorted(self.folder.glob("shard-*/order-*/prefix-*.pt")) if forgotten else []
        dropped = [file for file in files if not forgotten.isdisjoint(_read(file)["rows"])]
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

    def _check_folder(self, settings: dict[str, int]) -> None:
        file = self.folder / "settings.json"
        if file.exists() and (found := json.loads(file.read_text("utf-8"))) != settings:
            raise ValueError(
                f"The checkpoints in {str(self.folder)!r} are of the settings {found}, and these are {settings}: rows"
                " would be in other slices. Take the same data and settings, or another folder."
            )
        self._write_json("settings.json", settings)

    def _write_json(self, name: str, value: Any) -> None:
        _meet()
        self.folder.mkdir(parents=True, exist_ok=True)
        # of its own, because ranks that have no process group yet write the same at the same time
        part = self.folder / f".{name}.{uuid4().hex}"
        part.write_text(json.dumps(value), "utf-8")
        part.replace(self.folder / name)
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
