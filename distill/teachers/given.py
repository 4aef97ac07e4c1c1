"""Teachers as a program gives them: specs, or objects of its own, which are looked at before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from mvmr.distillation.teachers.spec import NAME, Spec, check_names, parse_specs
from mvmr.distillation.teachers.teacher import Teacher, measure_width
from mvmr.errors import MvmrError

One: TypeAlias = str | Path | Teacher
Given: TypeAlias = One | Iterable[str | Path] | Mapping[str, One]

_NEEDED = {"name": str, "weights": str, "identity": str, "dim": int}
_IDENTITY = re.compile(r"[0-9a-f]{16,}")


def read_given(teacher: Given) -> dict[str, Spec | Teacher]:
    """Teachers by name, of a spec, several specs, an object, or a table of names with either.

    Raises: MvmrError for what is no teacher, or a name that is none.
    """
    if isinstance(teacher, Mapping):
        teachers: dict[str, Spec | Teacher] = {}
        for name, one in teacher.items():
            named = Spec.parse(f"{name}={one if isinstance(one, str | Path) else name}")
            teachers[name] = named if isinstance(one, str | Path) else check_teacher(one)
        if not teachers:
            raise MvmrError("no teacher is given: a spec such as ViT-B-16, or an object")
    elif isinstance(teacher, str | Path | list | tuple):
        teachers = {spec.name: spec for spec in parse_specs(teacher)}
    else:
        teachers = {NAME: check_teacher(teacher)}
    check_names([one for one in teachers.values() if isinstance(one, Spec)])
    return teachers


def check_teacher(teacher: object) -> Teacher:
    """An object that has all of a `Teacher`, and does what it says on two images.

    Raises: MvmrError that says what it lacks, or as `measure_width`.
    """
    kind = type(teacher).__name__
    missing = [name for name in (*_NEEDED, "prepare") if not hasattr(teacher, name)]
    if missing or not callable(teacher):
        lack = ", ".join(missing) or "no way to be called with a batch"
        raise MvmrError(
            f"a teacher that is an object needs {lack}, which {kind} lacks: mvmr.NetworkTeacher(network, prepare, "
            "name=...) makes one of a torch module and its preprocessing (docs/teachers.md)"
        )
    for name, wanted in _NEEDED.items():
        if not isinstance(value := getattr(teacher, name), wanted) or not value:
            raise MvmrError(f"teacher {kind}.{name} is {value!r}; give a {wanted.__name__}")
    whole: Teacher = teacher  # type: ignore[assignment]  # looked at above
    if not _IDENTITY.fullmatch(whole.identity):
        raise MvmrError(
            f"teacher {whole.name}: identity = {whole.identity!r} should be a hash in hex of all that its embeddings "
            "depend on: under it they are kept and found again"
        )
    width = measure_width(whole, whole.prepare, whole.name)
    if width != whole.dim:
        raise MvmrError(f"teacher {whole.name} gives rows of {width} numbers, and its dim says {whole.dim}")
    return whole
