"""The teachers that a bundle was distilled from, found again by what the bundle records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvmr.bundles.bundle import Bundle
from mvmr.distillation.teachers.remembered import RememberedTeacher
from mvmr.distillation.teachers.spec import CLIP, KINDS, NAME, Spec, place_of
from mvmr.distillation.teachers.table import open_teacher
from mvmr.distillation.teachers.teacher import OBJECT, NoTextTower, Teacher, TeacherGone
from mvmr.errors import MvmrError, unknown

_KEYS = {"name", "weights", "identity"}


def recorded_teachers(bundle: Bundle) -> dict[str, Mapping[str, Any]]:
    """What a bundle says of its teachers, by the name its recipe calls them; only what can be made sense of."""
    records = bundle.manifest.training.get("teachers")
    if not isinstance(records, Mapping):
        return {}
    return {name: record for name, record in records.items() if isinstance(record, Mapping) and set(record) >= _KEYS}


def names_to_open(bundle: Bundle, name: str | Path | None) -> dict[str, str | Path | None]:
    """What `teacher_of` is to be asked for, by what to call it: the one that is meant, or all that are recorded."""
    recorded = recorded_teachers(bundle)
    if name is not None or len(recorded) < 2 or NAME in recorded:
        return {NAME: name}
    return dict(zip(recorded, recorded, strict=True))


def teacher_of(
    bundle: Bundle, name: str | Path | None, pretrained: str | Path | None, device: str, *, text: bool
) -> Teacher:
    """Load the teacher named, by a spec or by the name a bundle of several records it under; else the recorded one.

    Raises:
        MvmrError: the bundle records none, or several of which none is named; its weights can't be had, or they are
            not the ones it was distilled from.
    """
    recorded = recorded_teachers(bundle)
    if name is not None and str(name) not in recorded:
        return open_teacher(Spec.parse(name), pretrained, device=device, text=text)
    if not recorded:
        raise MvmrError(f"bundle {bundle.path} names no teacher to compare with; give one: --teacher ViT-B-16")
    if name is None and len(recorded) > 1 and NAME not in recorded:
        names = ", ".join(recorded)
        raise MvmrError(f"bundle {bundle.path} was distilled from several teachers ({names}); give one: --teacher NAME")
    return _reopen(bundle, recorded[str(name or (NAME if NAME in recorded else next(iter(recorded))))], device, text)


def _reopen(bundle: Bundle, record: Mapping[str, Any], device: str, text: bool) -> Teacher:
    kind = str(record.get("kind", CLIP))
    if kind not in (*KINDS, OBJECT):
        raise unknown(f"kind of teacher in {bundle.path}", kind, KINDS)
    weights, what = place_of(record, bundle.path)
    try:
        teacher = _open(bundle, record, kind, weights, what, device=device, text=text)
    except TeacherGone as error:
        if text:
            raise NoTextTower(str(error)) from error
        return RememberedTeacher(
            name=str(record["name"]), weights=weights, identity=str(record["identity"]), dim=0, parameters=None,
            why=str(error),
        )  # fmt: skip
    if teacher.identity != record["identity"]:
        raise MvmrError(
            f"teacher {record['name']} with weights {weights} is not the one {bundle.path} was "
            "distilled from (other weights, or another preprocessing); give the right one: --teacher, --pretrained"
        )
    return teacher


def _open(
    bundle: Bundle, record: Mapping[str, Any], kind: str, weights: str, what: str, *, device: str, text: bool
) -> Teacher:
    file = Path(weights)
    if kind == OBJECT:
        raise TeacherGone(
            f"the teacher that {bundle.path} was distilled from, {record['name']}, was an object of a program; give it "
            "again: --teacher python:MODULE:FACTORY"
        )
    if file.suffix and len(file.parts) > 1 and not file.exists():  # a tag is neither
        raise TeacherGone(
            f"the teacher that {bundle.path} was distilled from is not at {os.path.abspath(file)} any more; say where: "
            "--teacher NAME|FOLDER, and --pretrained FILE"
        )
    if kind != CLIP:
        return open_teacher(Spec(NAME, kind, what), device=device, text=text)
    if (file.parent / "open_clip_config.json").is_file():  # a folder in open_clip's hub format
        return open_teacher(Spec(NAME, kind, str(file.parent)), device=device, text=text)
    return open_teacher(Spec(NAME, kind, record["name"]), weights, device=device, text=text)
