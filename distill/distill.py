"""Label-free distillation: the trainer and objective of mvmr, with a teacher among the representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.distillation.teachers.given import Given, read_given
from mvmr.distillation.teachers.remembered import RememberedTeacher, open_or_recall
from mvmr.distillation.teachers.rows_file import Numbers
from mvmr.distillation.teachers.spec import NAME, Spec
from mvmr.distillation.teachers.stored_rows import StoredRows, describe_missing
from mvmr.distillation.teachers.table import share_pretrained
from mvmr.distillation.teachers.teacher import Teacher
from mvmr.errors import MvmrError
from mvmr.progress import is_wanted, say
from mvmr.training.checks import check_recipe
from mvmr.training.pretraining import fit, teacher_device
from mvmr.training.recipe import Recipe, load_recipe
from mvmr.training.shorthands import Shorthands, assignments


def distill(
    teacher: Given,
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
    max_missing: float = 0.01,
    progress: bool | None = None,
    **settings: Unpack[Shorthands],
) -> Bundle:
    """Distil a teacher into a student from unlabelled images, and write the student's bundle.

    The teacher sees each original image once, by its own preprocessing; its embeddings are kept and used in every
    epoch (and by the next run on the same images).

    Args:
        teacher: an open_clip model, ``NAME[:TAG|FILE]``, a folder in open_clip's hub format, ``timm:NAME[:FILE]``,
            ``torchvision:NAME[:WEIGHTS|FILE]``, ``onnx:FILE``, ``python:MODULE:FACTORY`` or ``rows:FILE.parquet``; or
            several, each with a name: ``["clip=ViT-B-16", "dino=timm:..."]``. What the recipe says of its ``teacher``
            holds for each that it does not name, its weights shared between them. One whose weights are gone will do
            where its embeddings of the images are in the cache. Or an object with all that
            `mvmr.distillation.teachers.teacher.Teacher` has, such as ``mvmr.NetworkTeacher(network, prepare,
            name="mine")``; or a mapping of names to specs and objects.
        pretrained: a tag of open_clip's, or a weights file, for open_clip models that don't say theirs
            (``ViT-B-16:openai``); left out, `clip_source.default_tag` names the default.
        max_missing: the run stops when a larger share of the images has no row in a teacher's file; the others are
            left out.

    The other arguments, and what is raised: as in :func:`mvmr.training.pretraining.pretrain`.
    """
    progress = is_wanted(progress)
    if not 0 <= max_missing <= 1:
        raise MvmrError(f"max_missing = {max_missing}: a share, from 0 to 1")
    given = read_given(teacher)
    weights = share_pretrained([one for one in given.values() if isinstance(one, Spec)], pretrained)
    names = list(given)
    changes = (*assignments(settings), *assign)
    resolved = share_weights(load_recipe(recipe, "mvmr.distillation", changes), names)
    check_recipe(resolved, names, None if resume else init)
    computing = teacher_device(device)
    teachers = {
        name: open_or_recall(one, weights[name], device=computing, progress=progress) if isinstance(one, Spec) else one
        for name, one in given.items()
    }
    images = open_images(
        data, "unlabelled", background=resolved.views.background, max_unreadable=max_unreadable, progress=progress
    )
    images = leave_out_unknown(images, teachers, max_missing, progress=progress)
    for opened in teachers.values():
        if isinstance(opened, RememberedTeacher):
            opened.check(images)
    say(describe(resolved), shown=progress)
    return fit(
        images, out, resolved, teachers=teachers, init=init, resume=resume, overwrite=overwrite,
        device=device, devices=devices, progress=progress,
    )  # fmt: skip


def describe(recipe: Recipe) -> str:
    """One line on what is learnt, from whom and how long."""
    method, train = recipe.method, recipe.train
    weights = [(name, weight) for field in method.weighted for name, weight in getattr(method, field).items() if weight]
    whole = method.name
    if losses := getattr(method, "losses", None):
        whole += f" ({', '.join(f'{weight:g} {name}' for name, weight in losses.items() if weight)})"
    if weights:
        whole += f" of {', '.join(f'{name} ({weight:g})' for name, weight in weights)}"
    if beside := [f"{name} ({weight:g})" for name, weight in recipe.objective.representations.items() if weight]:
        whole += f", and dependence on {', '.join(beside)}"
    return (
        f"learning by {whole}: {recipe.student.backbone}, views {recipe.views.policy}, {train.epochs} epochs of "
        f"batches of {train.batch_size}"
    )


def leave_out_unknown(
    images: ImageSet, teachers: Mapping[str, Teacher], max_missing: float, *, progress: bool
) -> ImageSet:
    """The images of which every teacher that is a file of embeddings has a row.

    Raises:
        MvmrError: a larger share than ``max_missing`` has none, in one file or in all together, or as
            `StoredRows.numbers`.
    """
    stored = [teacher for teacher in teachers.values() if isinstance(teacher, StoredRows)]
    together = np.zeros(len(images), np.int64)
    for teacher in stored:
        numbers = teacher.numbers(images, progress=progress)
        _check_missing(f"{teacher.weights} lacks", images, numbers, max_missing, progress)
        together = np.minimum(together, numbers)
    if len(stored) > 1:
        _check_missing("all files together lack", images, together, max_missing, progress)
    return images if (together >= 0).all() else images.subset(np.flatnonzero(together >= 0))


def _check_missing(who: str, images: ImageSet, numbers: Numbers, max_missing: float, progress: bool) -> None:
    if missing := describe_missing(images, numbers):
        if (numbers < 0).mean() > max_missing:
            raise MvmrError(
                f"{who} {missing}, more than the {100 * max_missing:.3g} % allowed; embed them, too, or allow a "
                "larger share with max_missing (--max-missing), and they are left out"
            )
        say(f"{who} {missing}, which are left out", shown=progress)


def share_weights(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """A recipe in which the weight of `teacher` in a table is shared equally by those that the table doesn't name.

    A method that takes weights and is given none learns from the teachers, with weight 1.
    """

    def share(weights: Mapping[str, float]) -> dict[str, float]:
        if NAME not in weights:
            return dict(weights)
        unnamed = [name for name in names if name not in weights or name == NAME]
        named = {name: weight for name, weight in weights.items() if name != NAME}
        return named | dict.fromkeys(unnamed, weights[NAME] / max(1, len(unnamed)))

    method = recipe.method
    tables = {field: share(getattr(method, field) or {NAME: 1.0}) for field in method.weighted}
    return replace(
        recipe,
        method=replace(method, **tables),  # type: ignore[arg-type]
        objective=replace(recipe.objective, representations=share(recipe.objective.representations)),
    )
