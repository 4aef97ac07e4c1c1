"""Claim: the house has few doors to a corridor. Files to a folder, imports between files, circles, what is long.

`python benchmarks/house.py` counts this checkout; `--at COMMIT` another one, by git, to compare.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
ROOMS = {
    "mvmr": "mvmr",
    "distill": "mvmr.distillation",
    "export": "mvmr.export",
    "serve": "mvmr.serve",
    "app": "mvmr.app",
}
LONG_FUNCTION = 50
_MOST_FILES = 15


@click.command()
@click.option("--at", "commit", help="A commit; left out, the checkout as it is.")
def main(commit: str | None) -> None:
    """Count what makes a house easy or hard to find one's way in."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as folder:
        root = ROOT
        if commit:
            packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
            root = Path(folder)
        house = House(root)
        console.print(_folders(house))
        console.print(_figures(house))


@dataclass(frozen=True)
class House:
    """A checkout: its modules, and which of them imports which."""

    root: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        """Path of each module, by the name it is imported as."""
        found = {}
        for folder, package in ROOMS.items():
            for path in sorted((self.root / folder).rglob("*.py")):
                parts = path.relative_to(self.root / folder).with_suffix("").parts
                name = ".".join((package, *parts)).removesuffix(".__init__")
                found[name] = path
        return found

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """Syntax of each module."""
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """What each module imports, at its top or in a function: our own by module, others by package."""
        return {name: self._imports_of(name) for name in self.files}

    def _imports_of(self, name: str) -> set[str]:
        found = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {
                    inner if (inner := f"{node.module}.{alias.name}") in self.files else node.module
                    for alias in node.names
                }
        return {module for module in found if module != name}

    def edges(self, *rooms: str) -> int:
        """Imports between files of these rooms: those of a room, or into another of them."""
        inside = {name for name, path in self.files.items() if path.relative_to(self.root).parts[0] in rooms}
        return sum(len(self.imports[name] & inside) for name in inside)

    @property
    def circle(self) -> list[str]:
        """Modules that import each other when they are imported themselves; none, if all is well."""
        at_top = {name: self._at_top(name) for name in self.files}
        try:
            TopologicalSorter(at_top).prepare()
        except CycleError as error:
            return list(error.args[1])
        return []

    def _at_top(self, name: str) -> set[str]:
        found = set()
        for node in self.trees[name].body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in self.files else node.module)
        return {module for module in found if module in self.files and module != name and module != "mvmr"}

    @property
    def undeclared(self) -> list[str]:
        """Packages that are imported, but not in pyproject.toml."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = [
            *project["dependencies"],
            *(line for extra in project["optional-dependencies"].values() for line in extra),
        ]
        declared = {_normal(re.split(r"[\[<>=;~! ]", line)[0]) for line in lines}
        owners = packages_distributions()
        modules = {module.partition(".")[0] for imports in self.imports.values() for module in imports}
        outside = modules - set(sys.stdlib_module_names) - {"mvmr"}
        return sorted(
            module for module in outside if not declared & {_normal(owner) for owner in owners.get(module, [module])}
        )

    @property
    def long_functions(self) -> list[tuple[int, str]]:
        """Functions of more than so many lines, the longest first."""
        found = []
        for name, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    if lines > LONG_FUNCTION:
                        found.append((lines, f"{name}.{node.name}"))
        return sorted(found, reverse=True)

    def longest(self, folder: str = "") -> tuple[int, str]:
        """Lines and path of the longest Python file of a folder; of the rooms, when none is given."""
        paths = (self.root / folder).rglob("*.py") if folder else self.files.values()
        return max(
            (len(path.read_text(encoding="utf-8").splitlines()), str(path.relative_to(self.root))) for path in paths
        )

    def folders(self) -> Counter[str]:
        """Modules of each folder, `__init__` left out."""
        return Counter(
            str(path.parent.relative_to(self.root)) for path in self.files.values() if path.name != "__init__.py"
        )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _folders(house: House) -> Table:
    table = Table("folder", "files", title="Files to a folder")
    for folder, count in sorted(house.folders().items()):
        table.add_row(folder, f"[red]{count}" if count > _MOST_FILES else str(count))
    return table


def _figures(house: House) -> Table:
    table = Table("count", "", title="The house")
    lines, path = house.longest()
    tests, test = house.longest("tests")
    table.add_row("files", str(len(house.files)))
    table.add_row("imports between files of the core", str(house.edges("mvmr")))
    table.add_row("of core, service and export", str(house.edges("mvmr", "serve", "export")))
    table.add_row("of all rooms", str(house.edges(*ROOMS)))
    table.add_row("a circle of imports", " > ".join(house.circle) or "none")
    table.add_row("longest file", f"{lines} lines: {path}")
    table.add_row("longest test", f"{tests} lines: {test}")
    functions = ", ".join(f"{name} ({lines})" for lines, name in house.long_functions)
    table.add_row(f"functions above {LONG_FUNCTION} lines", functions or "none")
    table.add_row("imported, not declared", ", ".join(house.undeclared) or "none")
    return table


if __name__ == "__main__":
    main()
