"""The command line, through its entry point."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_cl.cli.compare import _config_of, _Run, _variants
from lightning_cl.cli.lightning import run
from lightning_cl.cli.main import _values, main
from lightning_cl.cli.methods import method_classes
from lightning_cl.core.card import methods_below
from lightning_cl.optim import SPAM
from lightning_cl.strategies.checkpoint import is_complete
from lightning_cl.unlearning import ForgetLoss

DEMO = Path(__file__).parents[2] / "examples" / "cli" / "demo.yaml"
QUICK = [
    "--data.epochs_per_task=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_model_summary=false",
]


def fails_with(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, expect exit status 2, and return the one line of the error."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-cl: error:")]
    assert len(lines) == 1
    return lines[0]


def test_fit_runs_the_demo_and_names_the_task_in_its_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """The config of `compare` serves `fit` too; its methods' settings are passed over."""
    main(["fit", "--config", str(DEMO), *QUICK])
    output = capsys.readouterr()
    assert "Task 5/5 (classes 8-9)" in output.out + output.err


@pytest.mark.distributed
def test_several_devices_are_started_by_the_command_itself(tmp_path: Path) -> None:
    """`strategy: fsdp2` on two CPUs without a launcher: the second rank runs the same command line."""
    command = Path(sys.executable).parent / "lightning-cl"
    more = [
        "--trainer.strategy=fsdp2",
        "--trainer.devices=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
    ]
    more += ["--trainer.callbacks+=lightning_cl.ContinualMetrics", f"--trainer.callbacks.directory={tmp_path}"]
    run = [str(command), "fit", "--config", str(DEMO), "--data.epochs_per_task=1", *more]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stdout + done.stderr
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert is_complete(saved)
    assert json.loads((tmp_path / "record.json").read_text())


def test_strategy_is_built_from_a_config(tmp_path: Path) -> None:
    """With its options, and a timeout as a duration."""
    (tmp_path / "strategy.yaml").write_text(
        """
trainer:
  strategy:
    class_path: lightning_cl.FSDP2Strategy
    init_args:
      wrap: [Linear]
      mixed_precision: bfloat16
      reshard_after_forward: false
      async_checkpoint: true
      timeout: "0:01:30"
  enable_progress_bar: false
"""
    )
    main(["fit", "--config", str(DEMO), "--config", str(tmp_path / "strategy.yaml"), *QUICK])


def test_validate_and_test_run_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside of a fit all tasks are evaluated."""
    quick = [*QUICK, "--trainer.enable_progress_bar=false"]
    main(["validate", "--config", str(DEMO), *quick])
    shown = capsys.readouterr().out
    assert "DataLoader 4" in shown
    assert "val_acc" in shown
    main(["test", "--config", str(DEMO), *quick])
    assert "test_acc" in capsys.readouterr().out
    main(["predict", "--config", str(DEMO), *quick])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--data.scenario.n_tasks=50", r"`n_tasks=50`.*at most 10"),
        ("--data.batch_size=0", r"`batch_size` must be above 0, got 0"),
        ("--data.nonsense=3", "Option 'nonsense' is not accepted"),
        ("--data.scenario=Nope", "Nope"),
        ("--trainer.callbacks+=EWC", "strength"),
    ],
)
def test_errors_are_one_line(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong setting is named, without a traceback."""
    line = fails_with(["fit", "--config", str(DEMO), *QUICK, override], capsys)
    assert re.search(message, line), line


@pytest.mark.filterwarnings("ignore:.*will be overridden")
@pytest.mark.parametrize("name", ["SPAM", "lightning_cl.optim.SPAM"])
def test_optimizers_of_ours_are_built_from_a_config(name: str, tmp_path: Path) -> None:
    """By LightningCLI's own section, and by the module's setting, with their settings."""
    settings = {"class_path": name, "init_args": {"reset_interval": 77}}
    common = ["fit", "--config", str(DEMO), *QUICK, "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}"]
    given = f"--model.init_args.optimizer={json.dumps(settings)}"
    (by_section,) = run([*common, f"--optimizer={json.dumps(settings)}"]).trainer.optimizers
    (by_module,) = run([*common, given]).trainer.optimizers
    for optimizer in (by_section, by_module):
        assert isinstance(optimizer, SPAM)
        assert (optimizer.param_groups[0]["reset_interval"], optimizer.param_groups[0]["lr"]) == (77, 0.001)


@pytest.mark.filterwarnings("ignore:.*will be overridden")
def test_an_optimizer_of_a_network_that_is_not_built_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A language model is built when its strategy is known; the message says where to name the optimizer."""
    config = tmp_path / "run.yaml"
    model = {"class_path": "CausalLM", "init_args": {"model": {"model_type": "llama", "hidden_size": 64}}}
    config.write_text(yaml.safe_dump({"model": model}))
    arguments = ["fit", "--config", str(DEMO), "--config", str(config), "--optimizer", "SPAM"]
    assert "`model.init_args.optimizer`" in fails_with(arguments, capsys)


def test_methods_lists_every_method_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each, under the heads of the columns."""
    main(["methods"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "class", "family", "paper", "needs", "state", "strategies"]
    losses = methods_below(ForgetLoss)
    assert [row.split()[0] for row in rows] == [*method_classes(), *losses, "sliced-adapters"]
    assert all("arXiv:" in row for row in rows)


def test_compare_runs_methods_and_writes_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each run in a process of its own; table, records and page at the end; `report` reads the records again."""
    config = yaml.safe_load(DEMO.read_text())
    config["data"]["init_args"].update(epochs_per_task=2)
    config["methods"]["both"] = {
        "callbacks": [
            {"class_path": "EWC", "init_args": {"strength": 10.0}},
            {"class_path": "ExperienceReplay", "init_args": {"capacity": 60}},
        ]
    }
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "out"
    main(["compare", str(tmp_path / "stream.yaml"), "--methods=finetune,both,joint", "--jobs=2", f"--output={output}"])
    table = capfd.readouterr().out
    assert [name in table for name in ("finetune", "both", "joint", "forgetting")] == [True] * 4
    assert {path.parent.parent.name for path in output.rglob("record.json")} == {"finetune", "both", "joint"}
    assert "both" in (output / "report.html").read_text()
    assert (output / "table.md").read_text().splitlines()[2].startswith("| `finetune` (lower bound) |")
    main(["report", str(output), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "report.html").stat().st_size > 10_000


def test_compare_sweeps_a_setting_of_every_method_that_has_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run for each value, under its own name; in a combination the callback that is given the setting; a plot."""
    config = yaml.safe_load(DEMO.read_text())
    config["data"]["init_args"].update(epochs_per_task=1)
    config["methods"]["both"] = {
        "callbacks": [
            {"class_path": "EWC", "init_args": {"strength": 10.0}},
            {"class_path": "ExperienceReplay", "init_args": {"capacity": 60}},
        ]
    }
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "stream.yaml"), "--methods=finetune,er,both", "--sweep=capacity=20,200"]
    main([*arguments, "--jobs=2", f"--output={output}"])
    found = {path.parent.relative_to(output).as_posix() for path in output.rglob("record.json")}
    names = [f"{method}/capacity-{value}" for method in ("er", "both") for value in (20, 200)]
    assert found == {f"{name}/seed-0" for name in ["finetune", *names]}
    table = capfd.readouterr().out
    assert all(name in table for name in names)
    for name in names:
        settings = yaml.safe_load((output / name / "seed-0" / "compare.yaml").read_text())
        callbacks = {entry["class_path"]: entry["init_args"] for entry in settings["trainer"]["callbacks"]}
        assert callbacks["ExperienceReplay"]["capacity"] == int(name.rpartition("-")[2])
        assert callbacks["ContinualMetrics"]["name"] == name
    assert [line.split("`")[1] for line in (output / "table.md").read_text().splitlines()[2:]] == ["finetune", *names]
    assert (output / "capacity_average_accuracy.png").is_file()


def test_compare_sweeps_settings_of_the_memory_too(tmp_path: Path) -> None:
    """Those that a method passes on, and numbers in any notation; a swept setting need not stand in the config."""
    config = yaml.safe_load(DEMO.read_text())
    config["data"]["init_args"].update(epochs_per_task=1)
    del config["methods"]["ewc"]
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(config))
    stream = str(tmp_path / "stream.yaml")
    main(["compare", stream, "--methods=er", "--sweep=policy=ring,reservoir", f"--output={tmp_path / 'er'}"])
    settings = yaml.safe_load((tmp_path / "er" / "er" / "policy-ring" / "seed-0" / "compare.yaml").read_text())
    assert settings["trainer"]["callbacks"][-1]["init_args"] == {"capacity": 100, "policy": "ring"}
    main(["compare", stream, "--methods=ewc", "--sweep=strength=1,1e-3", f"--output={tmp_path / 'ewc'}"])
    assert sorted(path.name for path in (tmp_path / "ewc" / "ewc").iterdir()) == ["strength-0.001", "strength-1"]


SWEEPS_REFUSED = ["capacity", "capacity=", "capacity=1,1", "=1,2", "policy=a/b,c", "capacity=100,1e2"]
SWEEPS_REFUSED += ["capacity=1MB,1000KB", "strength=0.1,1e-1"]


@pytest.mark.parametrize("sweep", SWEEPS_REFUSED)
def test_compare_refuses_a_sweep_without_values(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The form is shown."""
    assert "such as capacity=50,100" in fails_with(["compare", str(DEMO), "--methods=er", "--sweep", sweep], capsys)


def test_sweeps_hold_whole_numbers_and_sizes() -> None:
    """In any notation; what is no number stays a text."""
    assert repr(_values("capacity=1e2,64KB,0.5,9007199254740993")) == (
        "('capacity', [100, '64KB', 0.5, 9007199254740993])"
    )


def test_compare_takes_callbacks_as_lightning_does(tmp_path: Path) -> None:
    """An empty trainer; a name in the place of a mapping; one in the place of a list; arguments left out."""
    config = yaml.safe_load(DEMO.read_text())
    run = _Run("mine", "mine", {"callbacks": "EWC"}, 0, tmp_path)
    metrics = {"name": "mine", "directory": str(tmp_path)}
    empty = {"class_path": "ContinualMetrics", "init_args": None}
    for trainer in (None, {"callbacks": ["ContinualMetrics"]}, {"callbacks": "ContinualMetrics"}, {"callbacks": empty}):
        made = _config_of(run, {**config, "trainer": trainer})["trainer"]["callbacks"]
        expected = [("ContinualMetrics", metrics), ("EWC", {})]
        assert [(entry["class_path"], entry["init_args"]) for entry in made] == expected
    config["data"]["init_args"].update(epochs_per_task=1)
    config["trainer"]["callbacks"] = ["ContinualMetrics", {"class_path": "EWC", "init_args": {"strength": 1.0}}]
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(config))
    main(["compare", str(tmp_path / "stream.yaml"), "--methods=finetune", f"--output={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "finetune" / "seed-0" / "record.json").is_file()
    with pytest.raises(ValueError, match="must be a name or have a `class_path`, got 3"):
        _config_of(run, {**config, "trainer": {"callbacks": [3]}})


def test_combination_takes_what_its_classes_take() -> None:
    """Also what the config does not spell out; where one is given it, that one alone; by any name of the class."""
    both = ["EWC", {"class_path": "lightning_cl.ExperienceReplay", "init_args": None}]
    made = _variants({"both": {"callbacks": both}}, ("policy", ["ring"]))
    assert [entry["init_args"] for entry in made["both/policy-ring"][1]["callbacks"]] == [{}, {"policy": "ring"}]
    spelled = [{"class_path": "EWC", "init_args": {"strength": 1.0}}, "SynapticIntelligence"]
    made = _variants({"both": {"callbacks": spelled}}, ("strength", [2]))
    assert [entry["init_args"] for entry in made["both/strength-2"][1]["callbacks"]] == [{"strength": 2}, {}]
    with pytest.raises(ValueError, match="no setting of both"):
        _variants({"both": {"callbacks": [*both, "tests.Nothing"]}}, ("margin", [1]))


def test_compare_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any run starts."""
    assert "known are" in fails_with(["compare", str(DEMO), "--methods", "ewk"], capsys)
    assert "no config" in fails_with(["compare", str(tmp_path / "none.yaml")], capsys)
    (tmp_path / "plain.yaml").write_text("model: {}\n")
    assert "TaskStreamDataModule" in fails_with(["compare", str(tmp_path / "plain.yaml")], capsys)
    assert "at least 1" in fails_with(["compare", str(DEMO), "--seeds", "0"], capsys)
    sweep = ["--methods=finetune,er", "--sweep=margin=1,2"]
    assert "'margin', which is no setting of finetune, er" in fails_with(["compare", str(DEMO), *sweep], capsys)
    config = yaml.safe_load(DEMO.read_text())
    del config["methods"]["ewc"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(config))
    assert "'ewc' needs strength" in fails_with(["compare", str(tmp_path / "bare.yaml"), "--methods", "ewc"], capsys)


def test_compare_says_which_run_failed_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line of the run's log, and where the log is."""
    config = yaml.safe_load(DEMO.read_text())
    config["methods"]["ewc"] = {"strength": -1.0}
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump(config))
    arguments = ["compare", str(tmp_path / "stream.yaml"), "--methods", "ewc", "--output", str(tmp_path / "out")]
    line = fails_with(arguments, capsys)
    assert "`strength` must be above 0" in line
    assert "log.txt" in line


def test_report_refuses_a_folder_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is named."""
    assert "record.json" in fails_with(["report", str(tmp_path)], capsys)


def test_runs_as_a_module() -> None:
    """What the package installs as `lightning-cl`."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_cl.cli.main", "--help"], capture_output=True, text=True, check=True
    )
    assert "compare" in done.stdout
