"""A recipe: everything that decides how a student is trained, but for the images and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from mvmr.config import assign, parse, read_toml
from mvmr.encoder import EncoderConfig
from mvmr.errors import MvmrError, unknown
from mvmr.objective import ObjectiveConfig
from mvmr.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How the two views of an image are made."""

    policy: str = "paper"  # a name or steps of mvmr.views
    size: int | None = None  # pixels; none: the data's own (CIFAR 32, samples 64, STL10 96), 224 for photographs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The resolved recipe of a run, as it is written into the bundle."""

    name: str = "custom"
    model: EncoderConfig = field(default_factory=EncoderConfig)
    projector: tuple[int, ...] = ()  # widths; none: z = h
    views: ViewsConfig = field(default_factory=ViewsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def recipe_names(package: str) -> tuple[str, ...]:
    """Names of the recipes that ship in ``package`` (``mvmr`` to pretrain, ``mvmr.distillation`` to distil)."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in _folder(package).iterdir() if f.name.endswith(".toml")))


def load_recipe(recipe: str | Path, package: str, assignments: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or from a TOML file, changed by assignments such as ``train.lr=3e-4``.

    Raises:
        MvmrError: no such recipe or file, or keys or values that don't fit (all of them named at once).
    """
    if Path(recipe).suffix == ".toml":
        if not Path(recipe).is_file():
            raise MvmrError(f"recipe file {recipe} does not exist")
        where, mapping = str(recipe), read_toml(Path(recipe))
    else:
        if recipe not in recipe_names(package):
            raise unknown("recipe", str(recipe), recipe_names(package))
        with resources.as_file(_folder(package) / f"{recipe}.toml") as path:
            where, mapping = f"recipe {recipe}", read_toml(path)
    merged: dict[str, Any] = assign({"name": Path(recipe).stem, **mapping}, assignments)
    return parse(Recipe, merged, where=where)


def _folder(package: str) -> Traversable:
    return resources.files(package) / "recipes"
