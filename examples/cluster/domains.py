"""Gather three domains of real text that most machines hold, as JSON lines for `PackedTextSource`.

    python examples/cluster/domains.py data/domains --megabytes 4

writes `python.train.jsonl`, `python.val.jsonl` and the same for `c` (headers) and `manual` (documentation and manual
pages): one `{"text": ..., "file": ...}` a line, a document either in train or in val. The same machine gives the same
files. A domain that the machine does not have is left out, with a message.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

LENGTHS = (200, 100_000)  # characters of a document: no stubs, and no document that makes up the domain
PROSE = {"", ".txt", ".md", ".rst", ".Debian"}


def python_sources() -> list[Path]:
    """The standard library, without its tests, which are long and much alike."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [file for file in root.rglob("*.py") if not skipped & set(file.relative_to(root).parts)]


def c_headers() -> list[Path]:
    """Headers where the compiler looks for them."""
    folders = {Path("/usr/include"), Path(sysconfig.get_paths()["include"])}
    compiler = shutil.which("cc")
    if compiler is not None:
        command = [compiler, "-E", "-v", "-x", "c", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        folders |= {Path(line.strip()) for line in told.splitlines() if line.startswith(" /")}
    return [file for folder in folders if folder.is_dir() for file in folder.rglob("*.h")]


def manuals() -> list[Path]:
    """Manual pages in English, and texts of packages; licences are left out, they are all alike."""
    pages = [file for section in Path("/usr/share/man").glob("man*") for file in section.iterdir()]
    texts = [file for file in Path("/usr/share/doc").rglob("*") if Path(file.name.removesuffix(".gz")).suffix in PROSE]
    return pages + [file for file in texts if not file.name.startswith("copyright")]


DOMAINS = {
    "python": (python_sources, "Python's standard library as sources"),
    "c": (c_headers, "C headers (the package of a compiler or of libc's development files)"),
    "manual": (
        manuals,
        "pages below /usr/share/man or /usr/share/doc (images of containers often lack them)",
    ),
}


def read(file: Path) -> str | None:
    """Return the text of a file, `None` if it is no UTF-8 text of a fitting length."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    return text if LENGTHS[0] <= len(text) <= LENGTHS[1] and "\0" not in text else None


def documents(files: list[Path], seed: int) -> Iterator[tuple[str, str]]:
    """Yield path and text of files in random order; of equal texts the first."""
    files = sorted({file.resolve() for file in files if file.is_file()})
    random.Random(seed).shuffle(files)
    seen = set()
    for file in files:
        text = read(file)
        if text is not None and text not in seen:
            seen.add(text)
            yield str(file), text


def gather(name: str, folder: Path, characters: float, val_share: float, seed: int) -> tuple[int, int]:
    """Write both parts of a domain; return how many characters each has."""
    find, _ = DOMAINS[name]
    paths = [folder / f"{name}.{part}.jsonl" for part in ("train", "val")]
    sizes, limits = [0, 0], [characters * (1 - val_share), characters * val_share]
    chance = random.Random(seed)
    with paths[0].open("w", encoding="utf-8") as train, paths[1].open("w", encoding="utf-8") as val:
        for file, text in documents(find(), seed):
            part = int(chance.random() < val_share)
            if sizes[part] < limits[part]:
                (train, val)[part].write(json.dumps({"text": text, "file": file}) + "\n")
                sizes[part] += len(text)
            elif all(size >= limit for size, limit in zip(sizes, limits, strict=True)):
                break
    if not all(sizes):
        for path in paths:
            path.unlink()
    return sizes[0], sizes[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--megabytes", type=float, default=4.0, help="size of each domain, in millions of characters")
    parser.add_argument("--val_share", type=float, default=0.05, help="share of it for validation")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, (_, needs) in DOMAINS.items():
        train, val = gather(name, given.folder, given.megabytes * 1e6, given.val_share, given.seed)
        if train and val:
            print(f"{name}: {train / 1e6:.2f} million characters for training, {val / 1e6:.2f} for validation")
            written += 1
        else:
            print(f"{name}: left out, this machine lacks {needs}", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
