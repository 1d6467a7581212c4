"""What `lightning-cl plan` says against what real runs take."""

from __future__ import annotations

import copy
import ctypes
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from language import LORA
from lightning_cl import EWC, ExperienceReplay
from lightning_cl.cli.lightning import TaskCLI, run
from lightning_cl.cli.main import main
from lightning_cl.cli.plan import parse_bytes, plan
from lightning_cl.core.live_bytes import LiveBytes
from lightning_cl.core.state import local
from lightning_cl.quantization import quantization_bytes
from ranks import exit_codes

pytest.importorskip("transformers")
MODEL = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = MODEL | {"vocab_size": 256, "num_hidden_layers": 2}
QUANTIZED = {"adapter": LORA | {"target_modules": "all-linear"}, "quantization": {"mode": "nf4"}}
SPARSE = {"optimizer": {"class_path": "SPAM", "init_args": {"density": 0.5}}}
ER = {"class_path": "ExperienceReplay", "init_args": {"capacity": 24}}
METHODS = [{"class_path": "EWC", "init_args": {"strength": 1.0, "n_samples": 8}}, ER]


def config(
    path: Path,
    *,
    strategy: Any = "fsdp2",
    callbacks: Iterable[Any] = METHODS,
    model: dict[str, Any] = SMALL,
    length: int = 64,
    accelerator: str = "cpu",
    **settings: Any,
) -> Path:
    """Write the config of a stream of two tasks of 32 rows, read in batches of 8, and return its path."""
    rows = [
        {"class_path": "language.TokenRows", "init_args": {"step": step, "rows": 32, "length": length}}
        for step in (1, 3)
    ]
    stream = {"train": rows, "scenario": {"class_path": "Predefined"}, "batch_size": 8}
    content = {
        "trainer": {
            "accelerator": accelerator,
            "strategy": strategy,
            "callbacks": list(callbacks),
            "default_root_dir": str(path.parent),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": "CausalLM", "init_args": {"model": model, **settings}},
        "data": {"class_path": "TaskStreamDataModule", "init_args": stream},
    }
    path.write_text(yaml.safe_dump(copy.deepcopy(content)))
    return path


def fsdp2(**settings: Any) -> dict[str, Any]:
    """Return a strategy as a config names it."""
    return {"class_path": "lightning_cl.strategies.FSDP2Strategy", "init_args": settings}


# ---------------------------------------------------------------------- what a real run takes


class Measured(Callback):
    """Measures the last step of the second task, and its end in the first callback that hears of it.

    Every allocation above 64 KB is mapped and unmapped on its own here, so that the resident memory follows them.
    """

    def __init__(self, *, resident: bool) -> None:
        self.resident = resident
        self.found: dict[str, Any] = {}
        self.live: LiveBytes | None = None

    @staticmethod
    def kept(trainer: Trainer, module: LightningModule) -> dict[str, list[Tensor]]:
        """Return all tensors that live from step to step."""
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        penalties = [callback for callback in trainer.callbacks if isinstance(callback, EWC)]
        return {
            "parameters": list(module.parameters()),
            "buffers": list(module.buffers()),
            "gradients": [parameter.grad for parameter in module.parameters() if parameter.grad is not None],
            "optimizer": [value for state in states for value in state.values() if isinstance(value, Tensor)],
            "EWC": [value for ewc in penalties for kept in (ewc.importance, ewc.anchors) for value in kept.values()],
        }

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, EWC) and not self.resident:
                callback.on_task_end = functools.partial(self.measure_task_end, callback.on_task_end)

    def measure_task_end(self, method: Any, trainer: Trainer, module: LightningModule, task: Any) -> None:
        tensors = [tensor for part in self.kept(trainer, module).values() for tensor in part]
        with LiveBytes(tensors, tell_saved=False) as live:
            method(trainer, module, task)
        self.found["task end"] = live.peak

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            kept = self.kept(trainer, module)
            self.found["parts"] = {name: size_of(tensors) for name, tensors in kept.items()}
            self.found["quantized"] = quantization_bytes(module)
            if self.resident:
                libc = ctypes.CDLL(None)
                libc.malloc_trim(0)
                self.found["before"] = process_bytes("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # the largest from now on
            else:
                self.live = LiveBytes([tensor for tensors in kept.values() for tensor in tensors]).__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.live is not None:
            self.live.__exit__(None, None, None)
            self.found |= {"step": self.live.peak, "kinds": dict(self.live.largest)}
            self.live = None
        elif "before" in self.found and "resident" not in self.found:
            self.found["resident"] = process_bytes("VmHWM") - self.found["before"]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        buffers = [callback.buffer for callback in trainer.callbacks if isinstance(callback, ExperienceReplay)]
        for buffer in buffers:
            pieces = [piece for column in buffer.storage.pieces().values() for piece in column]
            self.found["payload"] = sum(piece.nbytes for piece in pieces)
            self.found["samples"] = len(buffer)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind local shards, each once."""
    storages = {storage.data_ptr(): storage for storage in (local(tensor).untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def process_bytes(key: str) -> int:
    """Return an entry of this process's status in bytes."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def really(path: Path, devices: int, output: Path, *, resident: bool = False) -> None:
    """Fit a config, and write what its first rank took."""
    if resident:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    measured = Measured(resident=resident)

    class Observed(TaskCLI):
        @override
        def after_instantiate_classes(self) -> None:
            self.trainer.callbacks.append(measured)

    cli = run(["fit", "--config", str(path), f"--trainer.devices={devices}"], Observed)
    if cli.trainer.global_rank == 0:
        output.write_text(json.dumps(measured.found))


def in_own_processes(path: Path, ranks: int, *, resident: bool = False) -> dict[str, Any]:
    """Return what a run on so many ranks took."""
    output = path.with_suffix(".json")
    fit = functools.partial(really, path, ranks, output, resident=resident)
    assert exit_codes(fit, world_size=ranks) == [0] * ranks
    return json.loads(output.read_text())


def apart_from_other_tests(path: Path) -> dict[str, Any]:
    """Return what the system counts for two ranks, whose processes inherit nothing of what this one has allocated."""
    code = f"""
import importlib.util, pathlib, sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "support")]!r}
found = importlib.util.spec_from_file_location("measured", {__file__!r})
sys.modules["measured"] = module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)
module.in_own_processes(pathlib.Path({str(path)!r}), 2, resident=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.with_suffix(".json").read_text())


STEP = ("activations", "gathered weights", "temporary results")


def step_bytes(parts: dict[str, int]) -> int:
    """Return what a planned step takes on top of what stays."""
    return sum(parts[name] for name in STEP)


# ---------------------------------------------------------------------- tests


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings", [{}, QUANTIZED, SPARSE], ids=["full precision", "4 bits and LoRA", "sparse momentum"]
)
def test_plan_of_two_ranks_is_what_they_take(settings: dict[str, Any], tmp_path: Path) -> None:
    """Shards, states and the memory's payload to the byte; a step within 5 percent of its tensors."""
    if settings is QUANTIZED:
        pytest.importorskip("bitsandbytes")
    path = config(tmp_path / "run.yaml", **settings)
    planned = plan(path, devices=2)["host"]
    taken = in_own_processes(path, 2)
    parts = taken["parts"]
    weights = [planned.get(name, 0) for name in ("weights", "quantized weights", "adapters")]
    assert sum(weights) == parts["parameters"]
    assert planned.get("quantized weights", 0) == taken["quantized"]["packed"]
    assert planned.get("quantization state", 0) == pytest.approx(taken["quantized"]["state"], rel=0.1)
    assert [planned[name] for name in ("buffers", "gradients", "EWC")] == [
        parts[name] for name in ("buffers", "gradients", "EWC")
    ]
    # a random mask has the elements that it should on average
    sparse = settings is SPARSE
    assert planned["optimizer"] == pytest.approx(parts["optimizer"], rel=0.01 if sparse else 1e-9)
    # random keys give a rank about a half of the samples
    assert planned["ExperienceReplay"] == 12 * taken["payload"] // taken["samples"] + 65 * 24
    assert planned["activations"] == pytest.approx(taken["kinds"]["saved"], rel=0.05)
    assert step_bytes(planned) + sum(parts.values()) == pytest.approx(taken["step"], rel=0.05)


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{}, QUANTIZED], ids=["full precision", "4 bits and LoRA"])
def test_plan_is_what_the_system_counts(settings: dict[str, Any], tmp_path: Path) -> None:
    """The rise of the resident memory in a step, where tensors are much larger than what else a process touches."""
    if settings:
        pytest.importorskip("bitsandbytes")
    path = config(tmp_path / "run.yaml", model=MODEL, length=256, **settings)
    planned = plan(path, devices=2)["host"]
    totals = []
    # what else a process touches for the first time in that step adds to it, and seldom much: the least of some counts
    while len(totals) < 4 and sum(planned.values()) != pytest.approx(min(totals, default=0), rel=0.1):
        taken = apart_from_other_tests(path)
        assert taken["resident"] > 100 * 2**20
        kept = sum(taken["parts"].values()) + taken["quantized"]["state"] + taken["payload"]
        totals.append(taken["resident"] + kept)
    assert sum(planned.values()) == pytest.approx(min(totals), rel=0.1)


def test_a_later_config_stands_on_top_of_an_earlier_one(tmp_path: Path) -> None:
    """As in a fit: the first brings the run, the second changes a setting of it."""
    whole = config(tmp_path / "run.yaml", callbacks=[])
    (tmp_path / "more.yaml").write_text("trainer: {num_nodes: 2}")
    assert plan(whole, tmp_path / "more.yaml", devices=1)["ranks"] == 2
    with pytest.raises(ValueError, match=r"'.*more.yaml' has no `model`"):
        plan(tmp_path / "more.yaml")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("auto", 1), ("ddp", 2), (fsdp2(activation_checkpointing=True), 2), (fsdp2(reshard_after_forward=False), 2)],
    ids=["one device", "ddp", "checkpointing", "no resharding"],
)
def test_plan_follows_the_strategy(strategy: Any, ranks: int, tmp_path: Path) -> None:
    """Whole weights, DDP's buckets, recomputed activations and gathered weights that stay."""
    path = config(tmp_path / "run.yaml", strategy=strategy, callbacks=[])
    planned = plan(path, devices=ranks)["host"]
    taken = in_own_processes(path, ranks)
    assert planned["weights"] == taken["parts"]["parameters"]
    # the buckets are made before the fit's first step, by code that no mode sees
    buckets = planned.get("gradients in DDP's buckets", 0)
    assert buckets == (planned["gradients"] if strategy == "ddp" else 0)
    assert sum(planned.values()) - buckets == pytest.approx(taken["step"], rel=0.1)


@pytest.mark.distributed
def test_what_a_callback_adds_to_the_module_counts(tmp_path: Path) -> None:
    """Both slots of adapters are weights, of which one trains."""
    pytest.importorskip("bitsandbytes")
    slots = {"class_path": "AdapterSlots", "init_args": {"capacity": 32}}
    path = config(tmp_path / "run.yaml", callbacks=[slots], **QUANTIZED)
    result = plan(path, devices=2)
    planned, parts = result["host"], in_own_processes(path, 2)["parts"]
    weights = [planned.get(name, 0) for name in ("weights", "quantized weights", "adapters")]
    assert sum(weights) == parts["parameters"]
    assert [planned[name] for name in ("gradients", "optimizer")] == [
        parts[name] for name in ("gradients", "optimizer")
    ]
    # and without them there is less
    assert sum(weights) > sum(
        plan(config(tmp_path / "one.yaml", callbacks=[], **QUANTIZED), devices=2)["host"].get(name, 0)
        for name in ("weights", "quantized weights", "adapters")
    )
    assert not result["notes"]


@pytest.mark.distributed
def test_a_task_end_that_takes_more_than_a_step_counts(tmp_path: Path) -> None:
    """EWC keeps the gradients of all layers' outputs while it squares them; without replay no step takes as much."""
    path = config(tmp_path / "run.yaml", callbacks=[{"class_path": "EWC", "init_args": {"strength": 1.0}}])
    planned = plan(path, devices=2)["host"]
    taken = in_own_processes(path, 2)
    assert taken["task end"] > taken["step"]
    assert sum(planned.values()) == pytest.approx(taken["task end"], rel=0.1)
    assert sum(planned.values()) - planned["EWC at a task's end"] == pytest.approx(taken["step"], rel=0.05)


def test_nodes_shard_or_replicate(tmp_path: Path) -> None:
    """Four ranks hold a quarter each; with `hybrid` the two nodes hold a half on each of their two."""
    path = config(tmp_path / "run.yaml", callbacks=[])
    two = plan(path, devices=2)["host"]
    four = plan(path, devices=2, nodes=2)
    assert (four["ranks"], four["devices"], four["nodes"], four["strategy"]) == (4, 2, 2, "fsdp2")
    assert four["host"]["weights"] == two["weights"] // 2
    hybrid = plan(config(tmp_path / "hybrid.yaml", strategy=fsdp2(hybrid=True), callbacks=[]), devices=2, nodes=2)
    assert hybrid["host"]["weights"] == two["weights"]


def test_places(tmp_path: Path) -> None:
    """On a GPU the memory's samples stay in the machine or on the disk, and with `cpu_offload` the shards do."""
    on_disk = copy.deepcopy(ER)
    on_disk["init_args"] |= {"storage": "mmap", "directory": str(tmp_path / "replay")}
    index = copy.deepcopy(ER)
    index["init_args"]["storage"] = "index"
    sample = 2 * 64 * 8  # ids and mask
    result = plan(config(tmp_path / "disk.yaml", callbacks=[on_disk], accelerator="gpu"), devices=2)
    assert result["disk"] == {"ExperienceReplay": 12 * sample}
    assert result["host"] == {"ExperienceReplay": 24 * 65}
    assert result["total"]["device"] == sum(result["device"].values())
    result = plan(config(tmp_path / "index.yaml", callbacks=[index], accelerator="gpu"), devices=2)
    assert (result["host"], result["disk"]) == ({"ExperienceReplay": 24 * 65}, {})
    result = plan(config(tmp_path / "offload.yaml", strategy=fsdp2(cpu_offload=True), accelerator="gpu"), devices=2)
    assert {"weights", "gradients", "optimizer"} <= result["host"].keys()
    assert result["device"].keys() == {*STEP, "EWC"}


class ReadsValues(LightningModule):
    """A step that looks at the values of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).sum()
        return loss * 2 if loss.item() > 0 else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Numbers(LightningDataModule):
    """A loader without a stream."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(4, 4)), batch_size=2)


def plain_config(path: Path, **changes: Any) -> Path:
    """Write the config of a user's own module and data, as it is here or with other top-level keys."""
    own = {
        "trainer": {"accelerator": "cpu", "devices": 1},
        "model": {"class_path": f"{__name__}.ReadsValues"},
        "data": {"class_path": f"{__name__}.Numbers"},
    }
    path.write_text(yaml.safe_dump({key: value for key, value in (own | changes).items() if value is not None}))
    return path


def test_what_is_not_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that reads values has no plan; what stays has, and no verdict rests on it."""
    path = plain_config(tmp_path / "own.yaml")
    result = plan(path, card="1GiB")
    assert result["host"] == {"weights": 80, "gradients": 80, "optimizer": 80}
    assert "ReadsValues" in result["notes"][0]
    assert result["fits"] is None
    main(["plan", str(path), "--card", "1GiB"])
    assert "not known whether it fits on 1.00 GiB" in capsys.readouterr().out


class Keeps(ExperienceReplay):
    """A method that does not say what it keeps."""

    from lightning_cl.core.callback import ContinualCallback

    footprint = ContinualCallback.footprint


def test_a_method_that_says_nothing_is_named(tmp_path: Path) -> None:
    """Silence would mean that it takes no memory."""
    path = config(tmp_path / "run.yaml", callbacks=[{**ER, "class_path": f"{__name__}.Keeps"}])
    assert plan(path, devices=2)["notes"] == ["Keeps: not known, because it has no `footprint`"]


def test_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each part, the total and the verdict; `--json` is what `plan` returns."""
    path = config(tmp_path / "run.yaml", accelerator="gpu")
    main(["plan", str(path), "--devices", "2", "--card", "24GiB"])
    first, heads, *rows, verdict = capsys.readouterr().out.splitlines()
    assert first == "The largest rank of 2 ranks (2 x 1, fsdp2)"
    assert heads.split() == ["device", "host"]
    assert [row.split()[0] for row in rows][-1] == "total"
    assert len({len(row) for row in rows}) == 1
    assert re.fullmatch(r"fits on 24.00 GiB: 23.\d\d GiB left \(\d+%\)", verdict)
    main(["plan", str(path), "--devices", "2", "--card", "1MiB"])
    assert re.search(r"does not fit on 1.00 MiB: \d+\.\d\d MiB too much", capsys.readouterr().out)
    main(["plan", str(path), "--devices", "2", "--json", "--card", "24GiB"])
    assert json.loads(capsys.readouterr().out) == plan(path, devices=2, card="24GiB")


def test_ways_out_are_planned_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change is named only where the plan with it fits, with what it then needs."""
    path = config(tmp_path / "run.yaml", callbacks=[])
    whole = plan(path, devices=2)["total"]["host"]
    recomputed = config(tmp_path / "less.yaml", callbacks=[], strategy=fsdp2(activation_checkpointing=True))
    less = plan(recomputed, devices=2)["total"]["host"]
    four = plan(path, devices=4)["total"]["host"]
    assert less < four < whole
    between = plan(path, devices=2, card=f"{(less + four) // 2 / 1000}KB")
    assert between["ways"] == [{"change": "activation_checkpointing: true", "needs": less}]
    main(["plan", str(path), "--devices", "2", "--card", f"{whole / 1000 - 1}KB"])
    assert [line.partition("`")[2].partition("`")[0] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "activation_checkpointing: true",
        "--devices 4",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "`--devices` must be at least 1, got 0"),
        (["--nodes=-1"], "`--nodes` must be at least 1, got -1"),
        (["--card", "big"], "`--card` must be a size such as '80GiB' or '24GB', got 'big'"),
        ([], "`trainer.devices='auto'` of the config is no number of devices: give `--devices`"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option, what was given, and what it takes."""
    path = config(tmp_path / "run.yaml")
    assert message in refused(path, arguments, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no `model`"),
        ({"data": None}, "no `data`"),
        ({"trainer": {"accelerator": "cpu", "strategy": "fsdp"}}, "fsdp"),
    ],
)
def test_configs_that_cannot_run_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one line, like every error of the command."""
    path = plain_config(tmp_path / "own.yaml", **changes)
    assert message in refused(path, ["--devices", "2"], capsys)
    assert "There is no config" in refused(tmp_path / "none.yaml", [], capsys)


def refused(path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Plan, expect exit status 2, and return the one line of the error."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(path), *arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("lightning-cl: error:")] == lines[-1:]
    return lines[-1]


def test_sizes() -> None:
    """Units of 1024 and of 1000, in any case, with a space or without."""
    assert [parse_bytes(text) for text in ("80GiB", "24 gb", "0.5MiB")] == [80 * 2**30, 24 * 10**9, 2**19]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, QUANTIZED], ids=["full precision", "4 bits and LoRA"])
def test_plan_is_what_a_gpu_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    """The largest memory that torch allocated on one GPU, over the whole fit."""
    path = config(tmp_path / "run.yaml", model=MODEL, length=128, accelerator="gpu", dtype="bfloat16", **settings)
    planned = plan(path, devices=1)["total"]["device"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(["fit", "--config", str(path), "--trainer.devices=1"])
    assert planned == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
