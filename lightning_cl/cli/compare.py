"""Several methods on one stream, over several seeds, side by side."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import callbacks as lightning_callbacks

from lightning_cl import callbacks as own_callbacks
from lightning_cl.cli.methods import method_classes
from lightning_cl.metrics.record import read_records
from lightning_cl.report import format_markdown, print_table, summarise, write_report

__all__ = ["callback_entries", "compare"]

_BASELINES = ("finetune", "joint")


@dataclass(frozen=True)
class _Run:
    """One fit: ``name`` is the method, with the value of a setting that is swept behind it."""

    name: str
    method: str
    settings: dict[str, Any]
    seed: int
    directory: Path


def compare(
    stream: str | Path,
    *,
    methods: list[str],
    seeds: int,
    output: str | Path,
    jobs: int = 1,
    sweep: tuple[str, Sequence[Any]] | None = None,
) -> Path:
    """Run every method with every seed, print the table, and write the report and ``table.md``.

    Each run is a process of its own, so that time and memory are its own.

    Args:
        stream: A config for ``lightning-cl fit``. Its key ``methods`` holds, by name, the settings of each method: the
            arguments of its class, or ``callbacks`` (a list as in a Trainer's config) for a combination.
        methods: Names: ``finetune`` (no method), ``joint`` (all tasks at once), those of ``lightning-cl methods``, and
            those defined under ``methods`` in the config.
        seeds: Runs of each method, with seeds from 0.
        output: Folder for runs and report.
        jobs: Runs at the same time.
        sweep: A setting and its values, such as ``("capacity", [50, 200])``. Every method that has the setting runs
            with each value, under a name such as ``er/capacity-50``; the report plots scores against numbers.

    Returns:
        The report's path.

    Raises:
        ValueError: If a method is unknown, no method has the setting of ``sweep``, the config does not fit, or a run
            failed.
    """
    config = _read(stream)
    settings = config.pop("methods", None) or {}
    for method in methods:
        if method not in (*_BASELINES, *settings, *method_classes()):
            known = sorted({*_BASELINES, *settings, *method_classes()})
            raise ValueError(f"`--methods` names {method!r}; known are {', '.join(known)}.")
    if seeds < 1 or jobs < 1:
        raise ValueError(f"`--seeds` and `--jobs` must be at least 1, got {seeds} and {jobs}.")
    variants = _variants({method: settings.get(method) or {} for method in methods}, sweep)
    for method, given in variants.values():
        if method in method_classes() and "callbacks" not in given:
            parameters = signature(method_classes()[method]).parameters.values()
            needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
            missing = [name for name in needed if name not in given]
            if missing:
                raise ValueError(
                    f"Method {method!r} needs {', '.join(missing)}: add `methods: {{{method}: {{{missing[0]}: ...}}}}`"
                    f" to {str(stream)!r}."
                )
    folder = Path(output)
    runs = [
        _Run(name, method, given, seed, folder / name / f"seed-{seed}")
        for name, (method, given) in variants.items()
        for seed in range(seeds)
    ]
    for run in runs:
        run.directory.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(_config_of(run, config), sort_keys=False)
        (run.directory / "compare.yaml").write_text(text)
        (run.directory / "record.json").unlink(missing_ok=True)
    _run_all(runs, jobs)
    records = read_records([run.directory for run in runs])
    rows = summarise(records)
    print_table(rows)
    (folder / "table.md").write_text(format_markdown(rows), encoding="utf-8")
    report = write_report(records, folder)
    print(f"report: {report}")
    return report


def _read(stream: str | Path) -> dict[str, Any]:
    path = Path(stream)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config {str(path)!r}.")
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or "scenario" not in _stream_settings(config):
        raise ValueError(
            f"{str(path)!r} is no config of a task stream: `data` must be a `TaskStreamDataModule` with a `scenario`."
        )
    return config


def _stream_settings(config: dict[str, Any]) -> dict[str, Any]:
    data = config.get("data")
    settings = data.get("init_args") if isinstance(data, dict) else None
    return settings if isinstance(settings, dict) else {}


def _variants(
    settings: dict[str, dict[str, Any]], sweep: tuple[str, Sequence[Any]] | None
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return, by the name of its runs, each method with its settings, once for each value that is swept."""
    if sweep is None:
        return {method: (method, given) for method, given in settings.items()}
    setting, values = sweep
    variants: dict[str, tuple[str, dict[str, Any]]] = {}
    for method, given in settings.items():
        if not _takers(method, given, setting):
            variants[method] = (method, given)
            continue
        for value in values:
            changed = copy.deepcopy(given)
            if "callbacks" in changed:
                changed["callbacks"] = callback_entries(changed["callbacks"])
            for arguments in _takers(method, changed, setting):
                arguments[setting] = value
            variants[f"{method}/{setting}-{value}"] = (method, changed)
    if variants.keys() == settings.keys():
        raise ValueError(f"`--sweep` names {setting!r}, which is no setting of {', '.join(settings)}.")
    return variants


def _takers(method: str, given: dict[str, Any], setting: str) -> list[dict[str, Any]]:
    """Return the arguments that a setting belongs to: a method's own, or those of callbacks of a combination.

    In a combination these are the callbacks that are given it, else those whose class takes it.
    """
    if "callbacks" not in given:
        return [given] if _takes(method_classes().get(method), setting) else []
    entries = callback_entries(given["callbacks"])
    spelled = [entry["init_args"] for entry in entries if setting in entry["init_args"]]
    return spelled or [entry["init_args"] for entry in entries if _takes(_class_of(entry["class_path"]), setting)]


def _takes(kind: type | None, setting: str) -> bool:
    # the parser knows the settings behind `**` too
    parser = ArgumentParser(exit_on_error=False)
    return kind is not None and setting in parser.add_class_arguments(kind, fail_untyped=False)


def _class_of(path: str) -> type | None:
    """Return the class that a config names, with its module or, of this package and of Lightning, without."""
    found = locate(path) if "." in path else getattr(own_callbacks, path, getattr(lightning_callbacks, path, None))
    return found if isinstance(found, type) else None


def callback_entries(callbacks: Any) -> list[dict[str, Any]]:
    """Return callbacks of a config, which may be one or several, names or mappings, as mappings with arguments."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    entries: list[Any] = [{"class_path": entry} if isinstance(entry, str) else entry for entry in listed]
    for entry in entries:
        if not isinstance(entry, dict) or "class_path" not in entry:
            raise ValueError(f"An entry of `callbacks` must be a name or have a `class_path`, got {entry!r}.")
        entry["init_args"] = entry.get("init_args") or {}
    return entries


def _config_of(run: _Run, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of one run: the user's, with the method, the seed and the metrics put in."""
    config = copy.deepcopy(config)
    config["seed_everything"] = run.seed
    stream = _stream_settings(config)
    stream["seed"] = run.seed
    if run.method == "joint":
        stream["scenario"] = {"class_path": "Joint", "init_args": {"scenario": stream["scenario"]}}
    trainer = config["trainer"] = config.get("trainer") or {}
    callbacks = callback_entries(trainer.get("callbacks"))
    metrics = [entry for entry in callbacks if entry["class_path"].rpartition(".")[2] == "ContinualMetrics"]
    if not metrics:
        callbacks.append({"class_path": "ContinualMetrics", "init_args": {}})
        metrics = callbacks[-1:]
    metrics[0]["init_args"].update(name=run.name, directory=str(run.directory))
    if "callbacks" in run.settings:
        callbacks += callback_entries(copy.deepcopy(run.settings["callbacks"]))
    elif run.method not in _BASELINES:
        callbacks.append({"class_path": method_classes()[run.method].__name__, "init_args": run.settings})
    trainer.update(callbacks=callbacks, default_root_dir=str(run.directory), enable_progress_bar=False, logger=False)
    trainer.update(enable_model_summary=False, enable_checkpointing=False)
    return config


def _run_all(runs: list[_Run], jobs: int) -> None:
    failed: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_run_apart, run.directory): run for run in runs}
        for number, done in enumerate(as_completed(waiting), start=1):
            run = waiting[done]
            error = done.result()
            print(f"[{number}/{len(runs)}] {run.name}, seed {run.seed}: {error or 'done'}", flush=True)
            if error:
                failed.append(f"{run.name} (seed {run.seed}): {error}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; {failed[0]}")


def _run_apart(directory: Path) -> str | None:
    """Fit one config in a fresh process; return its error, ``None`` if there is none."""
    # the server has imported everything once and forks a process for each run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_cl.cli.lightning"])
    process = context.Process(target=_fit, args=(directory,))
    process.start()
    process.join()
    if process.exitcode == 0:
        return None
    lines = [line for line in (directory / "log.txt").read_text().splitlines() if line.strip()]
    reason = lines[-1].removeprefix("lightning-cl: error: ") if lines else f"ended with exit code {process.exitcode}"
    return f"{reason} (see {directory / 'log.txt'})"


def _fit(directory: Path) -> None:
    from lightning_cl.cli.main import main

    with (directory / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        main(["fit", "--config", str(directory / "compare.yaml")])
