"""What holds for the repository as a whole: no trace of one machine, one version number."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_cl

ROOT = Path(__file__).parents[1]

# Names that mean something on one machine, or to one provider of packages, only.
FOREIGN = re.compile(
    r"""(?<![\w.~$}/-])/(?:work|root|opt|mnt|tmp|home|Users)/  # an absolute path of somebody's machine
    | \bpythonhosted\.org | \bpypi\.(?:org|python) | download\.pytorch\.org | conda\.anaconda\.org
    | --(?:extra-)?index-url | --find-links | PIP_(?:FIND_LINKS|INDEX_URL|EXTRA_INDEX_URL|CERT)
    | \bpyenv\b""",
    re.VERBOSE,
)


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would offer to add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout to tell the project's files from what a run wrote")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_a_registry():
    """A clone works anywhere: set-up takes packages from where the user's pip takes them."""
    wrong = []
    for file in tracked_files():
        if file == Path(__file__):
            continue
        try:
            lines = file.read_text("utf-8").splitlines()
        except UnicodeDecodeError:  # an image
            continue
        place = file.relative_to(ROOT)
        wrong += [f"{place}:{n}: {line.strip()[:80]}" for n, line in enumerate(lines, 1) if FOREIGN.search(line)]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("see /work/data", True),
        ("open('/home/ada/x')", True),
        ("pip install --find-links wheels", True),
        ("https://framework.org/tmp/x", False),
        ("../shared/data", False),
        ("outputs/tmp/x", False),
    ],
)
def test_pattern_tells_machine_paths_from_others(line, found):
    """The check above neither sleeps nor cries wolf."""
    assert bool(FOREIGN.search(line)) is found


def test_version_is_the_same_everywhere():
    """The package, its metadata, the citation and the changelog agree."""
    assert lightning_cl.__version__ == version("lightning-cl")
    assert f"\nversion: {lightning_cl.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## [{lightning_cl.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
