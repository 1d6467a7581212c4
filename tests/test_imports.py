"""The layering of the package: who may import whom, and what stays unimported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "lightning_cl"

# A folder imports from itself and from the layers before its own, never from its neighbours.
LAYERS = (
    {"__about__"},
    {"core"},
    {"functional", "memory"},
    {"datamodules", "optim", "quantization", "metrics"},
    {"callbacks", "mixins", "strategies"},
    {"unlearning"},
    {"adapters"},
    {"modules", "report"},
    {"cli"},
    {"__init__", "testing"},
)
LEVEL = {folder: level for level, layer in enumerate(LAYERS) for folder in layer}
# Pure mathematics knows neither Lightning nor our core, which does.
TORCH_ONLY = {"functional": {"functional"}, "optim": {"functional", "optim"}}
OWNED = {"peft": {"adapters"}, "bitsandbytes": {"quantization", "optim"}}
# They cost seconds to import, or are missing without their extra.
OPTIONAL = {"transformers", "peft", "datasets", "bitsandbytes", "sklearn", "matplotlib", "pandas", "pyarrow", "jinja2"}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "PyYAML"}


class Import(NamedTuple):
    """One import: ``folder/file.py:line`` imports ``target``; ``early`` if importing the file runs it."""

    folder: str
    place: str
    target: str
    early: bool

    @property
    def top(self) -> str:
        """The package that is imported."""
        return self.target.partition(".")[0]


def targets_of(node: ast.AST, file: Path) -> list[str]:
    """Return the dotted names that an import statement, or a call of ``require("name")``, brings in."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            base = [] if level == 0 else ["lightning_cl", *file.relative_to(PACKAGE).parts[:-level]]
            base += module.split(".") if module else []
            if base == ["lightning_cl"]:  # `from lightning_cl import core` names the folder, not the package
                return [f"lightning_cl.{alias.name}" for alias in names]
            return [".".join(base)]
        case ast.Call(
            func=ast.Name(id="require" | "import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def walk(node: ast.AST, early: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield all nodes under ``node``, with whether they run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        yield child, early and not lazy
        yield from walk(child, early and not lazy)


def imports() -> list[Import]:
    """Return all imports of the package, those inside functions too."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        folder = place.parts[0] if len(place.parts) > 1 else place.stem
        for node, early in walk(ast.parse(file.read_text("utf-8")), early=True):
            found += [Import(folder, f"{place}:{node.lineno}", name, early) for name in targets_of(node, file)]
    assert len(found) > 10, "the reader of imports found next to none"
    return found


def folder_of(target: str) -> str:
    """Return the folder of ``lightning_cl`` that a dotted name lies in; a name of the package itself is its root."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def normalized(name: str) -> str:
    """Return the name of a distribution as packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_folder_has_a_layer():
    """A new folder gets its place in the direction of imports before anything else."""
    folders = {p.name for p in PACKAGE.iterdir() if any(p.glob("*.py"))} | {p.stem for p in PACKAGE.glob("*.py")}
    assert folders - LEVEL.keys() == set()


def test_folders_import_only_from_the_layers_before():
    """`core` knows none of the others, `cli` all of them."""
    wrong = [
        f"{i.place} imports {i.target}"
        for i in imports()
        if i.top == "lightning_cl"
        and folder_of(i.target) != i.folder
        and LEVEL[folder_of(i.target)] >= LEVEL.get(i.folder, 0)
    ]
    assert wrong == []


def test_pure_mathematics_imports_torch_only():
    """`functional` and `optim` can be read, tested and copied without Lightning."""
    wrong = [
        f"{i.place} imports {i.target}"
        for i in imports()
        if i.folder in TORCH_ONLY
        and i.top not in sys.stdlib_module_names | {"torch", "typing_extensions"}
        and i.folder not in OWNED.get(i.top, ())
        and not (i.top == "lightning_cl" and folder_of(i.target) in TORCH_ONLY[i.folder])
    ]
    assert wrong == []


def test_owned_packages_are_imported_by_their_folder_only():
    """PEFT stays behind `adapters`, bitsandbytes behind weights and optimizer states in few bits."""
    wrong = [f"{i.place} imports {i.target}" for i in imports() if i.folder not in OWNED.get(i.top, {i.folder})]
    assert wrong == []


def test_optional_packages_are_imported_where_they_are_used():
    """A module-level import of them would slow down, or break, every user without the extra."""
    wrong = [
        f"{i.place} imports {i.target}"
        for i in imports()
        if i.early and i.top in OPTIONAL and i.folder not in OWNED.get(i.top, ())
    ]
    assert wrong == []


def test_third_party_imports_are_declared():
    """What we import we depend on ourselves, not through somebody else's dependencies."""
    declared = {normalized(re.match(r"[\w.-]+", line).group()) for line in requires("lightning-cl")}
    wrong = [
        f"{i.place} imports {i.target}"
        for i in imports()
        if i.top not in sys.stdlib_module_names | {"lightning_cl"}
        and normalized(DISTRIBUTIONS.get(i.top, i.top)) not in declared
    ]
    assert wrong == []


def test_importing_the_package_loads_nothing_heavy():
    """What Lightning itself loads where installed (matplotlib, transformers) is Lightning's matter."""
    script = (
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_cl\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert "lightning_cl" in loaded
    assert OPTIONAL.intersection(loaded) == set()


def test_source_files_are_short():
    """Past 400 lines a file is split by meaning."""
    lengths = {str(f.relative_to(PACKAGE)): len(f.read_text("utf-8").splitlines()) for f in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
