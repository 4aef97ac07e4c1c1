"""A recipe: everything that decides how a student is trained, but for the images and the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from mvmr.bundles.preprocess import WHITE, check_background
from mvmr.config import ONE_OF, assign, parse, read_toml, to_mapping
from mvmr.errors import MvmrError, unknown
from mvmr.methods.method import ORIGINAL, MethodConfig, ViewSpec
from mvmr.methods.mvmr import MvmrConfig
from mvmr.methods.regulariser import RegulariserConfig
from mvmr.methods.table import CONFIGS
from mvmr.models.backbone import StudentConfig
from mvmr.training.trainer import TrainConfig

T = TypeVar("T")
_METHOD = "method.name="
_PUBLISHED = "imagenet"


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How the views of an image are made."""

    policy: str = "paper"  # a name or steps of mvmr.training.views
    size: int | None = None  # pixels; none: the data's own (CIFAR 32, samples 64, STL10 96), 224 for photographs
    background: tuple[int, int, int] = WHITE  # what transparent images are laid on

    def __post_init__(self) -> None:
        check_background(self.background)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The resolved recipe of a run, as it is written into the bundle."""

    name: str = "custom"
    student: StudentConfig = field(default_factory=StudentConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    method: MethodConfig = field(default_factory=MvmrConfig, metadata={ONE_OF: CONFIGS})
    objective: RegulariserConfig = field(default_factory=RegulariserConfig)  # beside the method's own
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.objective.targets and isinstance(self.method, MvmrConfig):
            raise MvmrError("[objective] is for other methods: give mvmr's own weights in [method.representations]")

    @property
    def targets(self) -> tuple[str, ...]:
        """Representations of the original view that it learns from, each once."""
        return tuple(dict.fromkeys((*self.method.targets, *self.objective.targets)))

    @property
    def view_specs(self) -> tuple[ViewSpec, ...]:
        """The views it learns from, and the original where representations are made of it."""
        views = self.method.views
        return views if ORIGINAL in views or not self.objective.targets else (*views, ORIGINAL)

    @property
    def smallest_batch(self) -> int:
        """Images that a batch must have, over all devices."""
        return max(self.method.smallest_batch, self.objective.smallest_batch)


def recipe_names(package: str) -> tuple[str, ...]:
    """Names of the recipes that ship in ``package`` (``mvmr`` to pretrain, ``mvmr.distillation`` to distil)."""
    return _names(resources.files(package) / "recipes")


def load_recipe(recipe: str | Path, package: str, assignments: Sequence[str] = ()) -> Recipe:
    """Read a recipe of ``package`` by name, or from a TOML file; arguments and errors as in :func:`read_recipe`."""
    return read_recipe(Recipe, recipe, resources.files(package) / "recipes", assignments)


def read_recipe(kind: type[T], recipe: str | Path, shelf: Traversable, assignments: Sequence[str] = ()) -> T:
    """Read a recipe by name or from a TOML file, changed by assignments such as ``train.lr=3e-4``.

    Args:
        kind: the dataclass the recipe becomes; has a field ``name``.
        shelf: the folder of the recipes that ship.

    Raises:
        MvmrError: no such recipe or file, or keys or values that don't fit (all of them named at once).
    """
    if Path(recipe).suffix == ".toml":
        if not Path(recipe).is_file():
            raise MvmrError(f"recipe file {recipe} does not exist")
        where, mapping = str(recipe), read_toml(Path(recipe))
    else:
        if recipe not in _names(shelf):
            raise unknown("recipe", str(recipe), _names(shelf))
        with resources.as_file(shelf / f"{recipe}.toml") as path:
            where, mapping = f"recipe {recipe}", read_toml(path)
    settings: Mapping[str, Any] = mapping
    if issubclass(kind, Recipe):
        settings = _with_method(mapping, assignments)
    name = Path(recipe).stem if Path(recipe).suffix else str(recipe)
    return parse(kind, assign({"name": name, **settings}, assignments), where=where)


def _with_method(mapping: Mapping[str, Any], assignments: Sequence[str]) -> Mapping[str, Any]:
    """A recipe with its settings of a method, or without them where assignments ask for another one.

    Tables of weights that it leaves out are there as the method has them, so that an assignment changes one of them
    and leaves the others.
    """
    table = mapping.get("method", {})
    if not isinstance(table, Mapping):
        return mapping
    current = table.get("name", next(iter(CONFIGS)))
    name = [current, *(text.partition("=")[2].strip() for text in assignments if text.startswith(_METHOD))][-1]
    if name not in CONFIGS:
        return mapping
    defaults = to_mapping(CONFIGS[name](name=name))
    weights = {key: value for key, value in defaults.items() if isinstance(value, dict)}
    return {**mapping, "method": {**weights, **(table if name == current else {})}}


def _names(shelf: Traversable) -> tuple[str, ...]:
    """Names of the recipes on a shelf, and ``imagenet/NAME`` of those in its folder of published runs."""
    found = [(file, "") for file in shelf.iterdir()]
    if (published := shelf / _PUBLISHED).is_dir():
        found += [(file, f"{_PUBLISHED}/") for file in published.iterdir()]
    return tuple(sorted(folder + f.name.removesuffix(".toml") for f, folder in found if f.name.endswith(".toml")))
