"""The reproduction of split MNIST runs on files in MNIST's format; here they hold scikit-learn's digits."""

from __future__ import annotations

import gzip
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_digits

FOLDER = Path(__file__).parents[1] / "examples" / "split_mnist"


@pytest.fixture
def run() -> ModuleType:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("split_mnist_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the four files, half of them compressed; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mnist"
    folder.mkdir()
    digits = load_digits()
    images = np.kron(digits.images * 15.9, np.ones((3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    for prefix, rows in (("train", slice(0, 800)), ("t10k", slice(800, 1000))):
        for name, values in (("images-idx3", images[rows]), ("labels-idx1", digits.target[rows].astype(np.uint8))):
            content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes() + values.tobytes()
            if prefix == "train":
                (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{prefix}-{name}-ubyte").write_bytes(content)
    return folder


def test_prepares_the_paper_s_images(run: ModuleType, mnist: Path, tmp_path: Path) -> None:
    """Padded to 32 x 32, a black pixel at -mean/deviation, a white one at (1 - mean)/deviation."""
    run.prepare(mnist, tmp_path / "out")
    images, odd, pair = (np.load(tmp_path / "out" / f"test-{name}.npy") for name in ("images", "odd", "pair"))
    digits = load_digits().target[800:1000]
    assert images.shape == (200, 32, 32)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[:, 0, 0], -0.1 / 0.2752, rtol=1e-6)
    np.testing.assert_allclose(images.max(), (254 / 255 - 0.1) / 0.2752, rtol=1e-5)
    np.testing.assert_array_equal(odd + 2 * pair, digits)


def test_one_command_prints_ours_beside_the_paper(
    run: ModuleType, mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three scenarios; replay helps where the paper says that it does, and is not served by masked heads."""
    run.main([str(mnist), "--seeds", "1", "--methods", "finetune,er", "--output", "runs"])
    printed = capsys.readouterr().out
    found = dict(re.findall(r"(\w+)-incremental: final.*?\n.*?paper\n(.*?)\n(?=\n|\[|$)", printed + "\n", re.DOTALL))
    assert found.keys() == {"task", "domain", "class"}
    rows = {name: [line.split() for line in text.splitlines()] for name, text in found.items()}
    assert [row[0] for row in rows["task"]] == ["finetune"]
    finetune, replay = rows["class"]
    assert (finetune[-1], replay[-1]) == ("19.71", "95.59")
    assert float(finetune[1]) + 5 < float(replay[1])


def test_missing_files_and_unknown_names(run: ModuleType, mnist: Path, tmp_path: Path) -> None:
    """Say what is missing, before anything runs."""
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SystemExit, match=r"neither t10k-labels-idx1-ubyte nor"):
        run.main([str(mnist)])
    with pytest.raises(SystemExit):
        run.main([str(mnist), "--methods", "magic"])


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_configs_define_every_method(run: ModuleType, scenario: str) -> None:
    """No method of the table is without settings in a scenario that serves it."""
    methods = yaml.safe_load((FOLDER / f"{scenario}.yaml").read_text("utf-8"))["methods"]
    served = {name for name in run.PAPER if (scenario, name) not in run.NOT_SERVED}
    assert methods.keys() == served - {"finetune", "joint"}
