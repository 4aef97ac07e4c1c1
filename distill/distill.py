"""Label-free distillation: the trainer and objective of mvmr, with a teacher among the representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mvmr.bundles.bundle import Bundle
from mvmr.data import open_images
from mvmr.distillation.teachers.table import open_teacher, parse_specs
from mvmr.distillation.teachers.teacher import NAME
from mvmr.methods.mvmr import MvmrConfig
from mvmr.training.checks import check_recipe
from mvmr.training.pretraining import fit
from mvmr.training.recipe import Recipe, load_recipe


def distill(
    teacher: str | Path | Sequence[str | Path],
    data: str,
    out: str | Path,
    *,
    pretrained: str | Path | None = None,
    recipe: str | Path = "default",
    assign: Sequence[str] = (),
    init: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    devices: int = 1,
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> Bundle:
    """Distil a teacher into a student from unlabelled images, and write the student's bundle.

    The teacher sees each original image once, by its own preprocessing; its embeddings are kept and used in every
    epoch (and by the next run on the same images).

    Args:
        teacher: an open_clip model name, a folder in open_clip's hub format, ``timm:NAME[:FILE]`` or
            ``python:MODULE:FACTORY``; or several, each with a name: ``["clip=ViT-B-16", "dino=timm:..."]``. What the
            recipe says of its ``teacher`` holds for each that it does not name, its weights shared between them.
        pretrained: a tag of open_clip's, or a weights file; left out, `teachers.open_clip` names the default.

    The other arguments, and what is raised: as in :func:`mvmr.training.pretraining.pretrain`.
    """
    specs = parse_specs(teacher)
    names = [spec.name for spec in specs]
    resolved = share_weights(load_recipe(recipe, "mvmr.distillation", assign), names)
    check_recipe(resolved, names, None if resume else init)
    teacher_device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    teachers = {spec.name: open_teacher(spec, pretrained, device=teacher_device) for spec in specs}
    images = open_images(
        data, "unlabelled", background=resolved.views.background, max_unreadable=max_unreadable, progress=progress
    )
    return fit(
        images, out, resolved, teachers=teachers, init=init, resume=resume, overwrite=overwrite,
        device=device, devices=devices, progress=progress,
    )  # fmt: skip


def share_weights(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """A recipe in which what is said of `teacher` holds for those that it doesn't name, its weights shared equally."""
    method = recipe.method
    unnamed = [name for name in names if name not in method.targets]
    if NAME in names or NAME not in method.targets or not unnamed or not isinstance(method, MvmrConfig):
        return recipe

    def share(weights: Mapping[str, float]) -> dict[str, float]:
        shares = {name: weight for name, weight in weights.items() if name != NAME}
        return shares | (dict.fromkeys(unnamed, weights[NAME] / len(unnamed)) if NAME in weights else {})

    full = replace(method, representations=share(method.representations), regression=share(method.regression))
    return replace(recipe, method=full)
