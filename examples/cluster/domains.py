"""Gather three domains that most machines hold, as JSON lines: instructions with responses, and texts.

    python examples/cluster/domains.py data/domains --megabytes 4

writes for each domain instructions for `InstructionSource`, `python.instructions.train.jsonl` with a
`{"prompt": ..., "response": ..., "file": ...}` on each line, and documents for `PackedTextSource`,
`python.text.train.jsonl` with a `{"text": ..., "file": ...}`; and the same with `val`. What comes from one file is
either in train or in val. The domains and what is asked in them:

- `python`: write the docstring of this function of the standard library
- `c`: declare in C what this comment of a header says
- `manual`: what does this command, or this option of it, do (manual pages; the texts are of packages too)

The same machine gives the same files. A domain that the machine does not have is left out, with a message.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

LENGTHS = (200, 100_000)  # characters of a document: no stubs, and no document that makes up the domain
RESPONSES = (10, 400)  # characters of a response
PAGES_ALIKE = 30  # manual pages whose names begin with the same word, such as those of one tool's subcommands
PROSE = {"", ".txt", ".md", ".rst", ".Debian"}
KINDS = ("instructions", "text")
PARTS = ("train", "val")


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
    pages: list[Path] = []
    alike: Counter[str] = Counter()
    for file in sorted(file for section in Path("/usr/share/man").glob("man*") for file in section.iterdir()):
        word = re.split(r"[-_.:]", file.name)[0]
        alike[word] += 1
        pages += [file] if alike[word] <= PAGES_ALIKE else []
    texts = [file for file in Path("/usr/share/doc").rglob("*") if Path(file.name.removesuffix(".gz")).suffix in PROSE]
    return pages + [file for file in texts if not file.name.startswith("copyright")]


Pairs = Iterator[tuple[str, str]]


def docstrings(file: Path, text: str) -> Pairs:
    """Ask for the first paragraph of the docstring of each function of a module."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                head = f"def {node.name}({ast.unparse(node.args)}):"
                yield f"Write the docstring of this function in {file.name}:\n{head}", docstring.split("\n\n")[0]


def declarations(file: Path, text: str) -> Pairs:
    """Ask for the declaration or the macro behind each comment of a header."""
    found = r"/\*+((?:(?!\*/).){10,300}?)\*/\n((?:extern|[a-z_]+ )[^;{}#/]{5,300};|#\s*define \w[^\n\\]{5,120}\n)"
    for comment, code in re.findall(found, text, re.DOTALL):
        said = " ".join(re.sub(r"^\s*\*", "", line).strip() for line in comment.splitlines())
        yield f"Declare in C, as {file.name} does:\n{said.strip()}", " ".join(code.split())


def answers(file: Path, text: str) -> Pairs:
    """Ask what a command or function does, by the NAME section of its page, and what its options do."""
    name, _, section = file.name.removesuffix(".gz").rpartition(".")
    described = re.search(r"^\.S[hH] \"?NAME\"?\n(.+?)^\.S[hH]", text, re.DOTALL | re.MULTILINE)
    if described is None:
        return
    _, dash, purpose = plain(described[1]).partition(" - ")
    kind = {"1": "command", "2": "system call", "3": "function", "5": "file", "8": "command"}.get(section[:1], "page")
    if dash:
        yield f"What does the {kind} {name} do?", purpose
    for option, meaning in re.findall(r"^\.TP.*\n(.*\\-.*)\n((?:[^.'].*\n)+)", text, re.MULTILINE):
        yield f"What does the option {plain(option)} of {name} do?", plain(meaning)


def plain(roff: str) -> str:
    """Return what a piece of a manual page says."""
    roff = re.sub(r"^\.\\\".*\n|^\.[A-Za-z]{1,2} ?", "", roff, flags=re.MULTILINE)
    roff = re.sub(r"\\f\[\w*\]|\\f\(..|\\f.|\\[&,/|^]|\\s[-+]?\d", "", roff)
    roff = re.sub(r"\\\(aq|\\\(cq|\\\[aq\]", "'", re.sub(r"\\\(em|\\\(en|\\-", "-", roff))
    for written, meant in (('"', ""), ("\\e", "\\"), ("\\ ", " "), ("\\'", "'")):
        roff = roff.replace(written, meant)
    return " ".join(roff.split()).removeprefix(": ")


# of each domain: its files, what it asks of one, and what a machine without it lacks
DOMAINS: dict[str, tuple[Callable[[], list[Path]], Callable[[Path, str], Pairs], str]] = {
    "python": (python_sources, docstrings, "Python's standard library as sources"),
    "c": (c_headers, declarations, "C headers (the package of a compiler or of libc's development files)"),
    "manual": (manuals, answers, "pages below /usr/share/man (images of containers often lack them)"),
}


def read(file: Path) -> str | None:
    """Return the text of a file, `None` if it is no UTF-8 text of a fitting length."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    return text if LENGTHS[0] <= len(text) <= LENGTHS[1] and "\0" not in text else None


def documents(files: list[Path], seed: int) -> Iterator[tuple[Path, str]]:
    """Yield path and text of files in random order; of equal texts the first."""
    files = sorted({file.resolve() for file in files if file.is_file()})
    random.Random(seed).shuffle(files)
    seen = set()
    for file in files:
        text = read(file)
        if text is not None and text not in seen:
            seen.add(text)
            yield file, text


def rows(kind: str, file: Path, text: str, ask: Callable[[Path, str], Pairs]) -> Iterator[dict[str, str]]:
    """Yield the rows of a kind that come from a file."""
    if kind == "text":
        yield {"text": text, "file": str(file)}
        return
    for prompt, response in ask(file, text):
        if RESPONSES[0] <= len(response) <= RESPONSES[1] and len(prompt) <= RESPONSES[1]:
            yield {"prompt": prompt, "response": response, "file": str(file)}


def gather(name: str, folder: Path, characters: float, val_share: float, seed: int) -> dict[tuple[str, str], int]:
    """Write all files of a domain; return how many characters each has, by kind and part."""
    find, ask, _ = DOMAINS[name]
    paths = {(kind, part): folder / f"{name}.{kind}.{part}.jsonl" for kind in KINDS for part in PARTS}
    sizes = dict.fromkeys(paths, 0)
    limits = {key: characters * (val_share if key[1] == "val" else 1 - val_share) for key in paths}
    chance, seen = random.Random(seed), set()
    with ExitStack() as stack:
        opened = {key: stack.enter_context(path.open("w", encoding="utf-8")) for key, path in paths.items()}
        for file, text in documents(find(), seed):
            part = PARTS[chance.random() < val_share]
            for kind in KINDS:
                key = (kind, part)
                if sizes[key] >= limits[key]:
                    continue
                for row in rows(kind, file, text, ask):
                    line = json.dumps(row)
                    # files hold the same under other names
                    content = tuple(value for name, value in row.items() if name != "file")
                    if content not in seen:
                        seen.add(content)
                        opened[key].write(line + "\n")
                        sizes[key] += sum(map(len, content))
            if all(sizes[key] >= limits[key] for key in paths):
                break
    if not all(sizes.values()):
        for path in paths.values():
            path.unlink()
    return sizes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument(
        "--megabytes", type=float, default=4.0, help="most of each kind in a domain, in millions of characters"
    )
    parser.add_argument("--val_share", type=float, default=0.05, help="share of it for validation")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, (_, _, needs) in DOMAINS.items():
        sizes = gather(name, given.folder, given.megabytes * 1e6, given.val_share, given.seed)
        if all(sizes.values()):
            told = (f"{size / 1e6:.2f} of {kind} for {part}" for (kind, part), size in sizes.items())
            print(f"{name}, millions of characters: {', '.join(told)}")
            written += 1
        else:
            print(f"{name}: left out, this machine lacks {needs}", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
