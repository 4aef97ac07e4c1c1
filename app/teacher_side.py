"""The teacher as an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mvmr.app.encoders import TEACHER, Encoder, identity_of, in_torch
from mvmr.bundle import Bundle
from mvmr.distillation.recorded import teacher_of
from mvmr.distillation.source import find_source
from mvmr.distillation.teacher import Teacher
from mvmr.errors import MvmrError


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherSide(Encoder):
    """The teacher as an encoder; has_text: whether its text tower is there, for zero-shot classification."""

    teacher: Teacher
    has_text: bool


def load_teacher(
    bundle: Bundle | None, teacher: str | Path | None, pretrained: str | Path | None, device: str = "cpu"
) -> TeacherSide:
    """Load the teacher named, or else the one that the bundle records, with its text tower where it has one.

    Raises: MvmrError when it can't be had, or neither is there.
    """

    def load(*, text: bool) -> Teacher:
        if bundle is not None:
            return teacher_of(bundle, teacher, pretrained, device, text=text)
        if teacher is None:
            raise MvmrError("a service does not say what its student was distilled from; name it: --teacher ViT-B-16")
        return Teacher.load(teacher, pretrained, device=device, text=text)

    has_text = True
    try:
        loaded = load(text=True)
    except MvmrError as error:
        if "text tower" not in str(error):
            raise
        loaded, has_text = load(text=False), False
    except Exception:  # some text towers need packages or files of their own, which each fail in their own way
        loaded, has_text = load(text=False), False
    return TeacherSide(
        key=TEACHER,
        label=f"{loaded.name} ({Path(loaded.weights).name})",
        identity=identity_of(loaded.identity, TEACHER, torch.device(device).type),
        dim=loaded.dim,
        nbytes=_teacher_size(loaded),
        prepare=loaded.prepare,
        forward=partial(in_torch, loaded, loaded.dim, device),
        teacher=loaded,
        has_text=has_text,
    )


def _teacher_size(teacher: Teacher) -> int | None:
    try:
        file = Path(teacher.weights)
        return (file if file.is_file() else find_source(teacher.name, teacher.weights).file).stat().st_size
    except (MvmrError, OSError):
        return None
