"""What a recipe becomes on given images, and whether it can be trained: what is refused before anything long begins."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet
from mvmr.models.backbone import Backbone
from mvmr.models.initial import read_init
from mvmr.models.table import open_backbone
from mvmr.training.precision import native_precision
from mvmr.training.recipe import Recipe
from mvmr.training.targets import check_targets
from mvmr.training.views import make_policies, view_sides

_USUAL_SIZE = 224  # pixels, of students of photographs


def side(recipe: Recipe, images: ImageSet) -> int:
    """Side in pixels of the images that a student is to see."""
    return (images.native_size or _USUAL_SIZE) if recipe.views.size is None else recipe.views.size


def settle(recipe: Recipe, images: ImageSet, device: str) -> Recipe:
    """The recipe as it is written into the bundle: what it leaves to images and device is decided."""
    size = side(recipe, images)
    smallest = min(view_sides(recipe.view_specs, size))
    return replace(
        recipe,
        views=replace(recipe.views, size=size),
        method=recipe.method.settle(len(images)),
        train=replace(recipe.train, precision=native_precision(recipe.train.precision, device, smallest)),
    )


def check_trainable(recipe: Recipe, images: int, teachers: Collection[str] = (), devices: int = 1) -> None:
    """Refuse a settled recipe that can't be trained on so many images.

    Raises:
        MvmrError: as :func:`check_recipe`; or batches or a method for which there are too few images.
    """
    check_recipe(recipe, teachers, None)
    recipe.train.steps(images, devices, recipe.smallest_batch)
    recipe.method.check(recipe.train.batch_size, images)


def check_recipe(recipe: Recipe, teachers: Collection[str], init: str | Path | None) -> None:
    """Refuse what can't be whatever the images are, before one of them is read.

    Raises:
        MvmrError: targets or teachers that aren't there, views or a student that can't be, weights that don't fit.
    """
    size = _USUAL_SIZE if recipe.views.size is None else recipe.views.size
    check_targets(recipe.targets, recipe.method.stored_targets, teachers, recipe.name)
    backbone = open_backbone(recipe.student, size)
    _check_views(recipe, backbone, Preprocess.for_size(size))
    if init is not None and (recipe.views.size or not backbone.options.get("fixed")):
        read_init(backbone, init)


def _check_views(recipe: Recipe, backbone: Backbone, preprocess: Preprocess) -> None:
    make_policies(recipe.view_specs, recipe.views.policy, preprocess)
    if others := view_sides(recipe.view_specs, preprocess.crop) - {preprocess.crop}:
        with torch.device("meta"):
            backbone.build(others)
