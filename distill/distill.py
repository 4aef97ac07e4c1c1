"""Label-free distillation: the trainer and objective of mvmr, with a teacher among the representations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mvmr.bundles.bundle import Bundle
from mvmr.data import open_images
from mvmr.distillation.teachers.teacher import Teacher
from mvmr.training.pretraining import fit
from mvmr.training.recipe import load_recipe


def distill(
    teacher: str | Path,
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
        teacher: an open_clip model name, or a folder in open_clip's hub format.
        pretrained: a tag of open_clip's, or a weights file; left out, `teachers.open_clip` names the default.

    The other arguments, and what is raised: as in :func:`mvmr.training.pretraining.pretrain`.
    """
    resolved = load_recipe(recipe, "mvmr.distillation", assign)
    images = open_images(
        data, "unlabelled", background=resolved.views.background, max_unreadable=max_unreadable, progress=progress
    )
    cuda = device != "cpu" and torch.cuda.is_available()
    loaded = Teacher.load(teacher, pretrained, device="cuda" if cuda else "cpu")
    return fit(
        images, out, resolved, teachers={"teacher": loaded}, init=init, resume=resume, overwrite=overwrite,
        device=device, devices=devices, progress=progress,
    )  # fmt: skip
