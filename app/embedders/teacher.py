"""The teacher as an encoder, loaded when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mvmr.app.embedders.embedder import TEACHER, Encoder, device_type, embed_in_torch, identity_of, once
from mvmr.bundles.bundle import Bundle
from mvmr.distillation.teachers.spec import place_of
from mvmr.errors import MvmrError, one_line

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mvmr.distillation.teachers.teacher import Teacher


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher in memory; has_text: whether its text tower is there, for zero-shot classification."""

    teacher: Teacher
    has_text: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherSide(Encoder):
    """The teacher as an encoder.

    load: gives the teacher, from the second call on the same one; raises MvmrError when it can't be had
    """

    load: Callable[[], LoadedTeacher]

    @property
    def teacher(self) -> Teacher:
        """The teacher itself; raises as `load`."""
        return self.load().teacher

    @property
    def has_text(self) -> bool:
        """Whether its text tower is there, for zero-shot classification; raises as `load`."""
        return self.load().has_text


def load_teacher(
    bundle: Bundle | None, teacher: str | Path | None, pretrained: str | Path | None, device: str = "cpu"
) -> TeacherSide:
    """Load the teacher named, by a spec or as a bundle of several calls it, or else the one that the bundle records.

    Its text tower comes with it where it has one.

    One that is recorded with a file of weights that is there is not loaded before it is needed: embeddings that were
    computed before are told by the identity that the bundle records.

    Raises: MvmrError when it can't be had, or neither is there.
    """
    if bundle is None and teacher is None:
        raise MvmrError("a service does not say what its student was distilled from; name it: --teacher ViT-B-16")
    load = once(lambda: _with_text(bundle, teacher, pretrained, device))
    record = _read_record(bundle, str(teacher or TEACHER)) if bundle is not None else None
    if record is None:
        loaded = load().teacher
        name, weights, identity, dim = loaded.name, loaded.weights, loaded.identity, loaded.dim
    else:
        (name, weights, identity), dim = record, None
    return TeacherSide(
        key=TEACHER,
        label=f"{name} ({Path(weights).name})",
        identity=identity_of(identity, TEACHER, device_type(device)),
        dim=dim,
        nbytes=_size(name, weights),
        prepare=lambda image: load().teacher.prepare(image),
        forward=lambda prepared: embed_in_torch(load().teacher, load().teacher.dim, device, prepared),
        load=load,
    )


def _with_text(
    bundle: Bundle | None, teacher: str | Path | None, pretrained: str | Path | None, device: str
) -> LoadedTeacher:
    from mvmr.distillation.teachers.recorded import teacher_of  # here, for open_clip takes seconds
    from mvmr.distillation.teachers.spec import parse_specs
    from mvmr.distillation.teachers.table import open_teacher
    from mvmr.distillation.teachers.teacher import NoTextTower

    def load(*, text: bool) -> Teacher:
        if bundle is not None:
            return teacher_of(bundle, teacher, pretrained, device, text=text)
        return open_teacher(parse_specs(teacher or ())[0], pretrained, device=device, text=text)

    try:
        return LoadedTeacher(load(text=True), has_text=True)
    except NoTextTower:
        pass
    except MvmrError:
        raise
    except Exception as error:  # some text towers need packages or files of their own, which each fail in their own way
        logger.warning("no text tower of the teacher, so no zero-shot: %s", one_line(error))
    return LoadedTeacher(load(text=False), has_text=False)


def _read_record(bundle: Bundle, teacher: str) -> tuple[str, str, str] | None:
    """Name, file of weights and identity of a teacher that the bundle records; None where no file is recorded.

    The file need not be there: embeddings of the gallery that were made before are found by the identity.
    """
    teachers = bundle.manifest.training.get("teachers")
    record = teachers.get(teacher) if isinstance(teachers, Mapping) else None
    if not isinstance(record, Mapping) or not {"name", "weights", "identity"} <= set(record):
        return None
    weights, _ = place_of(record, bundle.path)
    is_path = Path(weights).is_file() or (Path(weights).suffix and len(Path(weights).parts) > 1)  # a tag is neither
    return (str(record["name"]), weights, str(record["identity"])) if is_path else None


def _size(name: str, weights: str) -> int | None:
    try:
        if Path(weights).is_file():
            return Path(weights).stat().st_size
        from mvmr.distillation.teachers.clip_source import find_source

        return find_source(name, weights).file.stat().st_size
    except (MvmrError, OSError):
        return None
