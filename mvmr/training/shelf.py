"""A shelf of recipes, a folder of TOML files: their names, tables and what they say of themselves, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from mvmr.config import read_toml
from mvmr.errors import MvmrError, unknown

_PUBLISHED = "imagenet"


def is_file(recipe: str | Path) -> bool:
    """Whether a TOML file is meant, not a name."""
    return Path(recipe).suffix == ".toml"


def names_on(shelf: Traversable) -> tuple[str, ...]:
    """Names of the recipes on a shelf, and ``imagenet/NAME`` of those in its folder of published runs."""
    files = [(file, "") for file in shelf.iterdir()]
    if (published := shelf / _PUBLISHED).is_dir():
        files += [(file, f"{_PUBLISHED}/") for file in published.iterdir()]
    return tuple(sorted(folder + f.name.removesuffix(".toml") for f, folder in files if f.name.endswith(".toml")))


def read_tables(recipe: str | Path, shelf: Traversable) -> Mapping[str, Any]:
    """The tables of a recipe as they are written, by name or from a TOML file.

    Raises:
        MvmrError: no such recipe or file, or no TOML.
    """
    if is_file(recipe):
        if not Path(recipe).is_file():
            raise MvmrError(f"recipe file {recipe} does not exist")
        return read_toml(Path(recipe))
    if recipe not in names_on(shelf):
        raise unknown("recipe", str(recipe), names_on(shelf))
    with resources.as_file(shelf / f"{recipe}.toml") as path:
        return read_toml(path)


def first_line(name: str, shelf: Traversable) -> str:
    """What a recipe says of itself: the first line of its file without the ``#``; empty where that is no comment."""
    line = (shelf / f"{name}.toml").read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""
