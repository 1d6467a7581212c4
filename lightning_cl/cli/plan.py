"""What a run will take in memory on each rank, and whether that fits on a card."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_cl.cli.fakes import fake_ranks
from lightning_cl.cli.lightning import TaskCLI, run
from lightning_cl.cli.simulation import RankMemory, simulate
from lightning_cl.core.capture import move_batch
from lightning_cl.strategies import FSDP2Strategy

__all__ = ["parse_bytes", "plan", "print_plan"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# What CUDA, NCCL and the gaps between tensors take is not the plan's to know.
_TIGHT = 0.1


def plan(
    *configs: str | Path, devices: int | None = None, nodes: int | None = None, card: str | None = None
) -> dict[str, Any]:
    """Return the bytes that a run of ``configs`` takes on the rank with most of them, without running it.

    Module, data, callbacks and strategy are built as for ``lightning-cl fit``, on the CPU; then a training step of one
    rank runs on tensors without values. A language model is neither loaded nor filled.

    Args:
        configs: Configs for ``lightning-cl fit``, the later ones on top of the earlier.
        devices: Ranks on each node; the config's ``trainer.devices`` if ``None``.
        nodes: Nodes; the config's ``trainer.num_nodes`` if ``None``.
        card: Memory of a card, such as ``"80GiB"``.

    Returns:
        ``"ranks"``, ``"strategy"``; ``"device"``, ``"host"`` and ``"disk"``: bytes by part; ``"total"``: their sums;
        ``"notes"``: what is not known. With ``card``: its bytes, ``"fits"`` (``None`` if that is not known), and
        ``"ways"``: changes after which it would.

    Raises:
        ValueError: For a number or a size that is none, a config without model or data, and for what the run would be
            refused for.
        FileNotFoundError: If there is no such config.
    """
    paths = [Path(config) for config in configs]
    _check(paths)
    for name, value in (("--devices", devices), ("--nodes", nodes)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    size = None if card is None else parse_bytes(card)
    result = _plan(paths, devices, nodes)
    if size is None:
        return result
    needed = _needed(result)
    # what is not known may be anything
    fits = None if result["notes"] and needed <= size else needed <= size
    return result | {"card": size, "fits": fits, "ways": [] if fits is not False else _ways(paths, result, size)}


def _plan(paths: list[Path], devices: int | None, nodes: int | None, **changes: Any) -> dict[str, Any]:
    """Return the plan of a config, with these settings of its strategy changed."""
    with _quiet():
        cli = run(["fit", *(f"--config={path}" for path in paths)], _planner(devices, nodes, changes))
        memory = _measure(cli)
    trainer: Trainer = cli.trainer
    places = {"device": memory.device, "host": memory.host, "disk": memory.disk}
    if cli.on_cpu:  # type: ignore[attr-defined]
        places["host"] = places.pop("device") | places["host"]
    return {
        "ranks": trainer.world_size,
        "devices": trainer.num_devices,
        "nodes": trainer.num_nodes,
        "strategy": _name(trainer.strategy),
        **places,
        "total": {place: sum(parts.values()) for place, parts in places.items()},
        "notes": memory.notes,
    }


def _name(strategy: Strategy) -> str:
    if isinstance(strategy, FSDP2Strategy):
        return "fsdp2"
    return "ddp" if isinstance(strategy, DDPStrategy) else "one device"


def _needed(result: dict[str, Any]) -> int:
    needed: int = result["total"].get("device", result["total"]["host"])
    return needed


def _ways(paths: list[Path], result: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Return the changes after which a plan would fit, each made and planned."""
    devices, nodes = result["devices"], result["nodes"]
    if result["strategy"] != "fsdp2":
        return []
    tried = {
        "activation_checkpointing: true": _plan(paths, devices, nodes, activation_checkpointing=True),
        f"--devices {2 * devices}": _plan(paths, 2 * devices, nodes),
    }
    return [{"change": change, "needs": _needed(plan)} for change, plan in tried.items() if _needed(plan) <= size]


def parse_bytes(text: str) -> int:
    """Return a size in bytes.

    Args:
        text: A number with a unit of ``KiB``, ``MiB``, ``GiB`` (1024) or ``KB``, ``MB``, ``GB`` (1000).

    Raises:
        ValueError: If ``text`` is none.

    Example:
        >>> parse_bytes("80GiB"), parse_bytes("1.5 GB")
        (85899345920, 1500000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise ValueError(f"`--card` must be a size such as '80GiB' or '24GB', got {text!r}.")
    return int(float(match[1]) * units[match[2].lower()])


def print_plan(result: dict[str, Any]) -> None:
    """Print what :func:`plan` returned: a line for each part, its bytes in the places where it lies."""
    places = [place for place in ("device", "host", "disk") if result.get(place)]
    ranks = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    print(f"The largest rank of {ranks} ({result['devices']} x {result['nodes']}, {result['strategy']})")
    parts = list(dict.fromkeys(part for place in places for part in result[place]))
    rows = [("", *places)]
    rows += [(part, *(_amount(result[place].get(part, 0)) for place in places)) for part in parts]
    rows.append(("total", *(_amount(result["total"][place]) for place in places)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    for note in result["notes"]:
        print(note)
    if "card" in result:
        print(_verdict(result))
        for way in result["ways"]:
            print(f"with `{way['change']}` it needs {_amount(way['needs'])}")


def _verdict(result: dict[str, Any]) -> str:
    needed, card = _needed(result), result["card"]
    size = _amount(card)
    if needed > card:
        return f"does not fit on {size}: {_amount(needed - card)} too much"
    if result["fits"] is None:
        return f"not known whether it fits on {size}: what is known leaves {_amount(card - needed)}"
    left = f"fits on {size}: {_amount(card - needed)} left ({(card - needed) / card:.0%})"
    if card - needed < _TIGHT * card:
        left += ", which is little for CUDA's own memory, buffers of NCCL and gaps between tensors"
    return left


def _amount(size: int) -> str:
    if size == 0:
        return "-"
    unit = "GiB" if size >= 2**30 else "MiB"
    value = size / _UNITS[unit]
    return f"{value:.2f} {unit}" if value >= 0.01 else f"{size} B"


# ---------------------------------------------------------------------- from the config to the step


def _check(paths: list[Path]) -> None:
    given: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"There is no config {str(path)!r}.")
        config = yaml.safe_load(path.read_text())
        given |= config if isinstance(config, dict) else {}
    for key in ("model", "data"):
        if not given.get(key):
            named = " and ".join(repr(str(path)) for path in paths)
            raise ValueError(f"{named} has no `{key}`: give the config of a run, as for `lightning-cl fit`.")


def _planner(devices: int | None, nodes: int | None, changes: Mapping[str, Any]) -> type[TaskCLI]:
    """Return a command line that builds what ``fit`` would, for so many CPUs, and does not run it."""

    class Planner(TaskCLI):
        on_cpu = False

        @override
        def before_instantiate_classes(self) -> None:
            settings = self.config[self.subcommand].trainer
            self.on_cpu = settings.accelerator == "cpu"
            settings.accelerator = "cpu"
            settings.devices = devices if devices is not None else _number(settings.devices)
            if nodes is not None:
                settings.num_nodes = nodes
            settings.logger = settings.enable_progress_bar = settings.enable_model_summary = False

        @override
        def after_instantiate_classes(self) -> None:
            for name, value in changes.items():
                setattr(self.trainer.strategy, name, value)

        @override
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    return Planner


def _number(devices: Any) -> int:
    """Return how many devices a Trainer's setting names."""
    if isinstance(devices, str) and devices.strip().lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    raise ValueError(f"`trainer.devices={devices!r}` of the config is no number of devices: give `--devices`.")


def _measure(cli: TaskCLI) -> RankMemory:
    trainer, module, datamodule = cli.trainer, cli.model, cli.datamodule
    trainer.state.fn, trainer.training = TrainerFn.FITTING, True
    trainer.strategy._lightning_module = module
    trainer._data_connector.attach_data(module, datamodule=datamodule)

    def read_batch() -> Any:
        source: Any = module if datamodule is None else datamodule
        for owner in (datamodule, module):
            if owner is not None:
                owner.prepare_data()
                owner.setup("fit")
        try:
            batch = next(iter(source.train_dataloader()), None)
        except TypeError as error:
            raise ValueError(f"`lightning-cl plan` needs one training loader: {error}.") from error
        if batch is None:
            raise ValueError("The training loader has no batch.")
        return move_batch(trainer, module, batch)

    with fake_ranks(trainer.world_size):
        return simulate(trainer, module, read_batch)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from telling about a Trainer that will not run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
