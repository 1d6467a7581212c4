"""``lightning-cl unlearn``: serve requests to forget on the model of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_cl.cli.compare import callback_entries
from lightning_cl.cli.lightning import run
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.report.requests import write_request_report
from lightning_cl.strategies.checkpoint import read_common
from lightning_cl.unlearning.ledger import Ledger, RequestRecord
from lightning_cl.unlearning.request_callback import RequestCallback

__all__ = ["SaveAtEnd", "read_requests", "unlearn"]

_LEDGER, _CONFIG = "requests.jsonl", "config.yaml"


def read_requests(path: str | Path) -> list[ForgetRequest]:
    """Return the requests of a YAML or JSON file: one mapping, or a list of them.

    Raises:
        ValueError: If an entry is no request.
    """
    entries = yaml.safe_load(Path(path).read_text())
    try:
        return [ForgetRequest(**entry) for entry in (entries if isinstance(entries, list) else [entries])]
    except TypeError as error:
        raise ValueError(
            f"{path} must hold a request such as `{{name: customer 17, rows: [3, 14]}}`, or a list of them ({error})."
        ) from None


def unlearn(
    config: str | Path, requests: str | Path, *, checkpoint: str | Path | None, output: str | Path, epochs: int | None
) -> Path:
    """Run what ``lightning-cl fit`` would run of a config from a checkpoint on, with requests at the end of its stream.

    The requests that the ledger in ``output`` has stay in front: they were served, and are not served again. Into
    ``output`` go the model (``model.ckpt``, which the next request starts from), the ledger (``requests.jsonl``), a
    page for each request and the config.

    Args:
        config: The config of the run: a stream of tasks or an ``UnlearningDataModule``, and a callback that serves
            requests among the callbacks of its Trainer.
        requests: A file for :func:`read_requests`.
        checkpoint: Where to go on from; ``model.ckpt`` in ``output`` if ``None`` and it is there.
        output: Folder of the model's ledger.
        epochs: Passes over what a new request forgets, where it names none itself; those of the config if ``None``.

    Returns:
        The page of the ledger.

    Raises:
        ValueError: If the config has no data that take requests, or nothing that serves them, no request is new, one
            has the name of another that was served, or the ledger in ``output`` is not that of the checkpoint, or lacks
            the last of its records.
    """
    folder = Path(output)
    settings = yaml.safe_load(Path(config).read_text())
    data = (settings.get("data") or {}).get("init_args")
    if not isinstance(data, dict):
        raise ValueError(f"{config} must name its data by `data: {{class_path: ..., init_args: ...}}`.")
    last = folder / "model.ckpt"
    if checkpoint is None and last.exists():
        checkpoint = last
    ledger, own = folder / _LEDGER, data.get("requests") or []
    served = {record.name for record in _ledger_of(checkpoint).check_written(ledger, f"{checkpoint}").records}
    # as they were served, so that the stream is the one that the checkpoint was written in
    earlier = [entry for entry in _requests_of(folder / _CONFIG) or own if entry["name"] in served]
    own = [entry for entry in own if entry["name"] not in served]
    asked = read_requests(requests)
    for request in asked:
        _check_same(request, [ForgetRequest(**entry) for entry in earlier])
    new = [request for request in asked if request.name not in served]
    if not new:
        raise ValueError(f"All requests of {requests} are in the ledger {ledger}: there is nothing to do.")
    usual = epochs or data.get("epochs_per_request") or 1
    data["requests"] = [*earlier, *own, *({"epochs": usual, **_entry(request)} for request in new)]
    if checkpoint is not None:
        settings["ckpt_path"] = str(checkpoint)
    trainer = settings["trainer"] = settings.get("trainer") or {}
    saver = {"class_path": f"{__name__}.SaveAtEnd", "init_args": {"path": str(last)}}
    # the run keeps a ledger of its own: that of the folder says what the model in the folder has forgotten
    trainer.update(callbacks=[*callback_entries(trainer.get("callbacks")), saver], default_root_dir=str(folder / "run"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _CONFIG
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    cli = run(["fit", "--config", str(path)])
    if cli.trainer.is_global_zero:
        next(c for c in cli.trainer.callbacks if isinstance(c, RequestCallback)).ledger.write(ledger)  # type: ignore[attr-defined]
        write_request_report(ledger, folder)
    return folder / "requests.html"


class SaveAtEnd(Callback):
    """Saves a checkpoint at the end of a fit, on all ranks, also of one without a step.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def _ledger_of(checkpoint: str | Path | None) -> Ledger:
    """Return the ledger in a checkpoint, an empty one if there is no checkpoint on this machine, or none in it."""
    if checkpoint is None or not Path(checkpoint).exists():
        return Ledger()
    states = read_common(checkpoint).get("callbacks", {}).values()
    lines: list[str] = next((state["ledger"] for state in states if isinstance(state, dict) and "ledger" in state), [])
    return Ledger([RequestRecord.from_json(line) for line in lines])


def _requests_of(config: Path) -> list[dict[str, Any]]:
    """Return the requests of the run before, none if there was none."""
    settings = yaml.safe_load(config.read_text()) if config.exists() else {}
    found: list[dict[str, Any]] = settings.get("data", {}).get("init_args", {}).get("requests") or []
    return found


def _check_same(request: ForgetRequest, served: list[ForgetRequest]) -> None:
    """Refuse a request that has the name of one that was served for other samples."""
    for other in served:
        if other.name == request.name and (other.rows, other.classes, other.where) != (
            request.rows,
            request.classes,
            request.where,
        ):
            raise ValueError(f"Request {request.name!r} was served for other samples. Give the new one its own name.")


def _entry(request: ForgetRequest) -> dict[str, Any]:
    return {name: value for name, value in vars(request).items() if value is not None}
