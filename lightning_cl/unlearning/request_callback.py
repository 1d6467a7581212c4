"""What all that serves requests to forget shares: the ledger, the purge, the measurements before and after."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import TypedDict, Unpack, override

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.callback import ContinualCallback, continual_callbacks
from lightning_cl.core.checks import check_positive
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.requests import Influence, RequestStream
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import reshard
from lightning_cl.core.task import Task
from lightning_cl.functional.reset_state import reset_state
from lightning_cl.unlearning.digest import digest_of
from lightning_cl.unlearning.learning_rate import ScaledLearningRate
from lightning_cl.unlearning.ledger import Ledger, RequestRecord, hash_of_ids, moment
from lightning_cl.unlearning.measuring import Scores, measured, score_samples
from lightning_cl.unlearning.reading import OutputReader
from lightning_cl.unlearning.served import check_served, hash_of_samples, of_rank_zero

__all__ = ["RequestCallback", "RequestSettings"]


class RequestSettings(TypedDict, total=False):
    """Settings of :class:`RequestCallback` that its subclasses take as they are.

    Attributes:
        ledger_file: File of JSON Lines that gets the records. Give one to carry a model's ledger from run to run: its
            records count as served. ``requests.jsonl`` in the logger's folder if ``None``.
        measure_samples: Samples of each set that is measured, at most; at least 1.
        logits: Name of the submodule that returns the class scores; found by itself in most modules.
        batch_adapter: Reads batches of an uncommon structure.
        seed: Seed of what is drawn.
        learning_rate_factor: What the optimizers' learning rate is multiplied by in the steps of a request; above 0. To
            forget often takes a tenth of the rate of learning.
        erased: Names of served requests whose samples were since erased from the data, with placeholders in their rows:
            these are still left out, but neither compared with the ledger nor measured.
    """

    ledger_file: str | None
    measure_samples: int
    logits: str | None
    batch_adapter: BatchAdapter | None
    seed: int
    learning_rate_factor: float
    erased: list[str]


class RequestCallback(ContinualCallback):
    """Serves the requests to forget of a stream, one after another, and keeps the ledger of them.

    At a request's start all callbacks of the Trainer remove what they keep of its samples, the model is measured, and
    the optimizers forget their moments. At its end callbacks compute anew what they can, the model is measured again,
    and a :class:`~lightning_cl.unlearning.RequestRecord` says all of it. A request whose name is in the ledger is left
    out: it is not served twice.

    Without a stream a fit is one request; its loader yields ``{"forget": batch, "retain": batch}``, or batches to
    forget alone. There are no identities then, so that nothing can be purged or measured, and every fit is served.

    Args:
        settings: Those of :class:`RequestSettings`.

    Attributes:
        ledger: The requests served so far.

    Raises:
        ValueError: For a setting out of range; at the start of a fit beside another callback that serves requests, if
            the file holds a ledger that is not this run's or lacks records, or if the data no longer hold the samples
            of a served request where it names them, or still hold them and no request of the stream names them.
    """

    acts_on: ClassVar[tuple[Literal["learn", "forget"], ...]] = ("forget",)
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "unused"
    # a run that only learned has none: it may be asked to forget all the same
    needs_state: ClassVar[bool] = False
    edits_at_once: ClassVar[bool] = False

    def __init__(self, **settings: Unpack[RequestSettings]) -> None:
        self.ledger_file = settings.get("ledger_file")
        self.measure_samples = settings.get("measure_samples", 256)
        self.logits = settings.get("logits")
        self.adapter = settings.get("batch_adapter") or BatchAdapter()
        self.seed = settings.get("seed", 0)
        self.learning_rate_factor = settings.get("learning_rate_factor", 1.0)
        self.erased = list(settings.get("erased") or ())
        check_positive("measure_samples", self.measure_samples)
        check_positive("seed", self.seed, zero_allowed=True)
        check_positive("learning_rate_factor", self.learning_rate_factor)
        self.ledger = Ledger()
        self.stopped: str | None = None
        self.reference_hash: str | None = None
        self._open: dict[str, Any] | None = None
        self._reader: OutputReader | None = None
        self._restored = False
        self._learning_rate = ScaledLearningRate(self.learning_rate_factor)
        # of each served request that is measured again
        self._served_ids: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def serve_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Begin a request, or serve it by an edit: samples are purged, the model is measured, moments are dropped."""

    def serve_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """End a request, before the model is measured again."""

    def layer(self) -> str | None:
        """Return the submodule whose output is read as activations."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the settings for the ledger, plain."""
        names = [*inspect.signature(type(self).__init__).parameters, *RequestSettings.__annotations__]
        left_out = {"self", "settings", "ledger_file", "batch_adapter"}
        return {name: _plain(getattr(self, name)) for name in names if name not in left_out and hasattr(self, name)}

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        serving = [c for c in trainer.callbacks if isinstance(c, RequestCallback)]  # type: ignore[attr-defined]
        if len(serving) > 1:
            names = " and ".join(f"`{type(c).__name__}`" for c in serving)
            raise ValueError(f"{names} would each serve the requests: use one of them.")
        self._reader = OutputReader(pl_module, type(self).__name__, self.adapter, self.logits, self.layer())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        events = TaskEvents.attach(trainer)
        if events.running and events.task is not None and events.task.kind == "forget" and not self._restored:
            raise ValueError(
                f"`ckpt_path={str(trainer.ckpt_path)!r}` was written inside request {events.task.name!r} and holds no"
                f" state for `{type(self).__name__}`. Resume with the callback that served it."
            )
        if not self._restored:
            # what an error left open in an earlier fit
            self._open, self.stopped, self.skips_steps = None, None, False
        path = self._path(trainer)
        source = "the checkpoint" if self._restored else "this callback"
        # nodes may see other files than rank 0, which writes it
        written = of_rank_zero(trainer, lambda: self.ledger.check_written(path, source))
        if self.ledger_file is not None and not self._restored and not len(self.ledger):
            self.ledger = written
        if not self._restored and not len(self.ledger) and len(written):
            raise ValueError(
                f"{str(path)!r} holds the ledger of an earlier run. If the model comes of that run, give it as"
                " `ledger_file`; else move it away."
            )
        if (stream := _stream(trainer)) is not None:
            self._served_ids = check_served(trainer, stream, self.ledger, self._open, self.erased)
        if self._open is not None:
            self._learning_rate.start(trainer.optimizers)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reader, self._restored = None, False
        self._learning_rate.end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teardown(trainer, pl_module, "fit")

    @property
    def reader(self) -> OutputReader:
        """Reads what the module makes of batches; there during a fit."""
        assert self._reader is not None
        return self._reader

    @property
    def request_seed(self) -> int:
        """Seed of the present request: of the setting and of the request's name."""
        assert self._open is not None
        return derived_seed(self.seed, "request", self._open["name"])

    def _name_of_fit(self, task: Task) -> str:
        # loaders do not tell whether they ask for what a fit before did, so each of them is served
        names = (f"fit {number}" for number in count(task.index + 1))
        return next(name for name in names if self.ledger.find(name) is None)

    def _path(self, trainer: Trainer) -> Path:
        if self.ledger_file is not None:
            return Path(self.ledger_file)
        return Path(trainer.log_dir or trainer.default_root_dir) / "requests.jsonl"

    # ------------------------------------------------------------------ a request

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        stream = _stream(trainer)
        ids = torch.empty(0, dtype=torch.int64) if stream is None else stream.forgotten_ids(task)
        name = task.name if stream is not None else self._name_of_fit(task)
        served = self.ledger.find(name)
        self.stopped, self._open, self.skips_steps = None, None, True
        if served is not None:
            rank_zero_warn(f"Request {task.name!r} was served on {served.ended} and is not served again.")
            return
        asked = 0 if stream is None else stream.requested(task)
        self._open = {"name": name, "asked": asked, "ids": ids, "started": moment(), "step": trainer.global_step}
        self._open["samples_hash"] = "" if stream is None else hash_of_samples(trainer, stream, ids)
        self._open["influences"] = []
        for callback in continual_callbacks(trainer):
            self._open["influences"] += [_entry(i) for i in callback.forget_samples(trainer, pl_module, ids)]
        self._open["before"] = self.measure(trainer, pl_module, task)
        self._reset_optimizers(trainer)
        self.skips_steps = self.edits_at_once
        self._learning_rate.start(trainer.optimizers)
        self.serve_start(trainer, pl_module, task)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._learning_rate.end()
        if self._open is not None:
            self.serve_end(trainer, pl_module, task)
            reshard(pl_module)
            # the moments of an ascent must not move what is learned next
            self._reset_optimizers(trainer)
            for callback in continual_callbacks(trainer):
                self._open["influences"] += [_entry(i) for i in callback.renew_state(trainer, pl_module, task)]
            self._record(trainer, pl_module, self.measure(trainer, pl_module, task))
        self._open, self.skips_steps = None, False

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # the ledger names the samples and holds nothing of their content
        return []

    def _record(self, trainer: Trainer, pl_module: LightningModule, after: dict[str, float]) -> None:
        assert self._open is not None
        ids: Tensor = self._open["ids"]
        record = RequestRecord(
            name=self._open["name"],
            asked=self._open["asked"],
            ids=ids.tolist(),
            ids_hash=hash_of_ids(ids) if len(ids) else "",
            samples_hash=self._open["samples_hash"],
            method=self.method_name(),
            settings=self.describe(),
            seed=self.request_seed,
            reference_hash=self.reference_hash,
            weights_hash=digest_of((name, p) for name, p in pl_module.named_parameters() if p.requires_grad),
            started=self._open["started"],
            ended=moment(),
            steps=trainer.global_step - self._open["step"],
            stopped=self.stopped,
            before=self._open["before"],
            after=after,
            influences=[Influence(**influence) for influence in self._open["influences"]],
            previous=self.ledger.last_hash,
        )
        self.ledger.append(record)
        self._served_ids[record.name] = ids
        # the logger's folder is agreed on by all ranks
        path = self._path(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.ledger.write(path)
        values = {f"unlearning/{name}": value for name, value in after.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def method_name(self) -> str:
        """Return the name of the method for the ledger."""
        card = getattr(self, "card", None)
        return type(self).__name__ if card is None else card.name

    @staticmethod
    def _reset_optimizers(trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            reset_state(optimizer)

    # ------------------------------------------------------------------ measurements

    def measure(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> dict[str, float]:
        """Return :func:`~lightning_cl.unlearning.measuring.measured` of the forgotten, the retained, the held out.

        The samples of each request served before that the stream names are a set of their own, ``request:<name>``, so
        that what was forgotten once can be seen to come back.
        """
        stream = _stream(trainer)
        if stream is None:
            return {}
        sets = {"forget": self.sample_ids(stream.forgotten_ids(task), "forget")}
        if len(retained := stream.retained_ids(task)):
            sets["retain"] = self.sample_ids(retained, "retain")
        for name, ids in self._served_ids.items():
            sets[f"request:{name}"] = self.sample_ids(ids, "forget")
        scores = {name: self.score(trainer, pl_module, ids) for name, ids in sets.items() if len(ids)}
        holdout = stream.read_holdout(task, self.measure_samples)
        scores["holdout"] = score_samples(trainer, pl_module, self.reader, holdout).once()
        return measured(scores)

    def sample_ids(self, ids: Tensor, purpose: str) -> Tensor:
        """Return at most ``measure_samples`` of identities, drawn by the seed, int64 [n], ascending."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "measure", purpose))
        return ids[torch.randperm(len(ids), generator=generator)[: self.measure_samples]].sort().values

    def score(self, trainer: Trainer, pl_module: LightningModule, ids: Tensor) -> Scores:
        """Return the scores of training samples, over all ranks."""
        stream = _stream(trainer)
        assert stream is not None
        return score_samples(trainer, pl_module, self.reader, stream.read_samples(ids)).once()

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "ledger": [record.to_json() for record in self.ledger.records],
            "open": self._open,
            "skips_steps": self.skips_steps,
            "stopped": self.stopped,
            "reference_hash": self.reference_hash,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ledger = Ledger([RequestRecord.from_json(line) for line in state_dict["ledger"]])
        self._open = state_dict["open"]
        self.skips_steps, self.stopped = state_dict["skips_steps"], state_dict["stopped"]
        self.reference_hash = state_dict["reference_hash"]
        self._restored = True


def _stream(trainer: Trainer) -> RequestStream | None:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule if isinstance(datamodule, RequestStream) else None


def _entry(influence: Influence) -> dict[str, Any]:
    return dict(vars(influence))


def _plain(value: Any) -> Any:
    """Return a setting as plain values: of an object its class and its own settings."""
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such number
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    names = inspect.signature(type(value)).parameters
    return {"class": type(value).__name__, **{n: _plain(getattr(value, n)) for n in names if hasattr(value, n)}}
