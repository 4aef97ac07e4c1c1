"""A recipe: everything that decides how a student is trained, but for the images and the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

from mvmr.bundles.preprocess import WHITE, check_background
from mvmr.config import ONE_OF, assign, parse, to_mapping
from mvmr.errors import MvmrError
from mvmr.methods.method import ORIGINAL, MethodConfig, ViewSpec
from mvmr.methods.mvmr import MvmrConfig
from mvmr.methods.regulariser import RegulariserConfig
from mvmr.methods.table import CONFIGS
from mvmr.models.backbone import StudentConfig
from mvmr.training.shelf import is_file, names_on, read_tables
from mvmr.training.trainer import TrainConfig

T = TypeVar("T")
_METHOD = "method.name="


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How the views of an image are made."""

    policy: str = "paper"  # none, paper (all steps), or steps joined by +: crop, flip, jitter, grey, blur
    size: int | None = None  # side; none: the data's (CIFAR 32, samples 64, STL10 96), else 224 [pixels, 1 or more]
    background: tuple[int, int, int] = WHITE  # what transparent images are laid on: red, green, blue [0 to 255 each]

    def __post_init__(self) -> None:
        check_background(self.background)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The resolved recipe of a run, as it is written into the bundle."""

    name: str = "custom"  # of the recipe, as the bundle records it; a file that gives none is called by its own name
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


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How a view is made to fine-tune on; its size is that of the bundle's preprocessing."""

    policy: str = "crop+flip"  # none, paper (all steps), or steps joined by +: crop, flip, jitter, grey, blur


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """The resolved recipe of a fine-tuning run, as it is written into the bundle."""

    name: str = "custom"  # of the recipe, as the bundle records it; a file that gives none is called by its own name
    head: Literal["probe", "zero"] = "probe"  # what the classifier starts from: a linear probe of the subset, or 0
    balanced: bool = False  # whether each class weighs the same, however many labelled images it has
    recalibrate: bool = True  # batch-norm statistics, at the end, from all training images, unlabelled
    views: AugmentationConfig = field(default_factory=AugmentationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def recipe_names(package: str) -> tuple[str, ...]:
    """Names of the recipes that ship in ``package`` (``mvmr`` to pretrain, ``mvmr.distillation`` to distil)."""
    return names_on(resources.files(package) / "recipes")


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
    mapping = read_tables(recipe, shelf)
    settings = _with_method(mapping, assignments) if issubclass(kind, Recipe) else mapping
    name = Path(recipe).stem if is_file(recipe) else str(recipe)
    where = str(recipe) if is_file(recipe) else f"recipe {recipe}"
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
