"""The cluster example runs on this machine, on the domains that it holds, and ends with a record."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import yaml

from lightning_cl.cli.main import main
from lightning_cl.core.imports import available

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
PARTS = ("train", "val")


def write_domains(folder: Path) -> list[str]:
    """Write the domains that this machine holds, small ones; return their names."""
    spec = importlib.util.spec_from_file_location("domains", CLUSTER / "domains.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([str(folder), "--megabytes", "0.02", "--val_share", "0.3"]) == 0
    return [name for name in module.DOMAINS if (folder / f"{name}.instructions.train.jsonl").is_file()]


@pytest.mark.distributed
@pytest.mark.skipif(not available("bitsandbytes") or not available("peft"), reason="needs the extra llm")
def test_run_of_the_cluster_fits_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files as they stand, but for fewer tokens: a 4-bit base under FSDP2 learns, and the record tells it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MASTER_ADDR", os.environ.get("MASTER_ADDR", "127.0.0.1"))
    names = write_domains(tmp_path / "data" / "domains")
    tiny = yaml.safe_load((CLUSTER / "tiny.yaml").read_text("utf-8"))
    data = tiny["data"]["init_args"]
    for part in PARTS:
        data[part] = [source for source in data[part] if Path(source["init_args"]["path"]).name.split(".")[0] in names]
        assert len(data[part]) == len(names)
        for source in data[part]:
            source["init_args"]["max_tokens"] = 6000
    data["scenario"] = {"class_path": "Predefined", "init_args": {"names": names}}
    tiny["trainer"].update({"devices": 1, "enable_progress_bar": False, "logger": False})
    tiny["model"]["init_args"].update({"max_new_tokens": 2, "learning_rate": 1e-2})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tiny))
    main(["fit", "--config", str(CLUSTER / "run.yaml"), "--config", "small.yaml"])
    record = json.loads(Path("runs/cluster/record.json").read_text("utf-8"))
    assert record["task_names"] == names
    assert all(perplexity < 250 for perplexity in record["matrix"][-1]), "that of guessing is 259"
    assert len(record["samples"]) == len(names)
    assert all(len(continued) == 3 for continued in record["samples"])
    main(["report", "runs/cluster", "--output", "report"])
    assert list(Path("report").glob("*.html"))
