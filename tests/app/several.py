"""A student of two teachers, none of which has learned anything, and photographs to compare them on."""

from __future__ import annotations

from pathlib import Path

from mvmr.distillation.teachers.clip import ClipTeacher
from tests.app.galleries import pictures
from tests.distill.test_report import a_bundle
from tests.distill.test_teacher import write_folder

NAMES = ("clip", "dino")


def make_student(folder: Path) -> Path:
    """The student's folder; its teachers are beside it, each in one of its name, and 24 images in photos/."""
    records = {}
    for seed, name in enumerate(NAMES):
        write_folder(folder / name, seed=seed)
        teacher = ClipTeacher.load(folder / name)
        records[name] = {key: getattr(teacher, key) for key in ("name", "weights", "identity")}
    photos = pictures(folder / "photos", 24)
    return a_bundle(folder / "student", {"teachers": records, "data": {"name": str(photos)}}).path
