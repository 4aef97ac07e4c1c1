"""Teachers that were opened before: where their weights are gone, the cache still has their embeddings."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mvmr import strict_json
from mvmr.data import ImageSet
from mvmr.distillation.teachers.clip_source import WEIGHT_SUFFIXES
from mvmr.distillation.teachers.spec import HUB, Spec
from mvmr.distillation.teachers.table import open_teacher
from mvmr.distillation.teachers.teacher import Teacher, TeacherGone
from mvmr.errors import MvmrError
from mvmr.progress import say
from mvmr.representations.cache import has_rows
from mvmr.storage.atomic import cache_dir, write_json

logger = logging.getLogger(__name__)

_TYPES = {"name": str, "weights": str, "identity": str, "dim": int, "parameters": int | None, "origin": dict}


@dataclass(kw_only=True)
class RememberedTeacher:
    """What is known of a teacher that can't be opened any more; see `mvmr.distillation.teachers.teacher.Teacher`.

    why: it can't be; what whoever shows it an image is told
    """

    name: str
    weights: str
    identity: str
    dim: int
    parameters: int | None
    origin: Mapping[str, Any] = field(default_factory=dict)
    why: str

    def check(self, images: ImageSet, *, progress: bool = False) -> None:
        """Refuse images of which the cache does not hold every embedding; there is no progress to show.

        Raises: MvmrError: that, and why the teacher can't be had.
        """
        if not has_rows(images, self):
            raise MvmrError(f"{self.why}; and the cache has no embeddings by {self.name} of all of {images.name}")

    def prepare(self, image: Image.Image) -> Tensor:
        raise MvmrError(self.why)

    def __call__(self, batch: Tensor) -> Tensor:
        raise MvmrError(self.why)


def open_or_recall(
    spec: Spec, pretrained: str | Path | None, *, device: str | torch.device, progress: bool = False
) -> Teacher:
    """Open a teacher, and remember it; one that is gone is recalled, for images whose embeddings are in the cache.

    Raises: MvmrError: as `open_teacher`, of a teacher that nothing is known of, or that is there and wrong.
    """
    file = _file(spec, pretrained)
    try:
        teacher = open_teacher(spec, pretrained, device=device)
    except TeacherGone as error:
        if (remembered := _recall(file, str(error))) is None:
            raise
        line = f"{error}; its embeddings in the cache will do, if they are of these images"
        say(line) if progress else logger.warning(line)
        return remembered
    with contextlib.suppress(MvmrError):  # a cache that can only be read will do
        write_json(file, {key: getattr(teacher, key, {}) for key in _TYPES})
    return teacher


def _file(spec: Spec, pretrained: str | Path | None) -> Path:
    words = [spec.kind, _place(spec), "" if pretrained is None else _absolute(str(pretrained))]
    return cache_dir() / "teachers" / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.json"


def _place(spec: Spec) -> str:
    """What is meant by a spec, wherever it is typed: a relative path in another folder is another file."""
    name, colon, file = spec.what.partition(":")
    if spec.kind in ("onnx", "rows"):
        return os.path.abspath(spec.what)
    if spec.kind == "python":  # its module may be one of the working folder
        return f"{os.getcwd()} {spec.what}"
    if spec.kind == "open_clip":
        return spec.what if spec.what.startswith(HUB) else _absolute(spec.what)
    return f"{name}{colon}{_absolute(file)}"


def _absolute(text: str) -> str:
    """A path in full; a name or a tag as it is."""
    return os.path.abspath(text) if os.sep in text or Path(text).suffix in WEIGHT_SUFFIXES else text


def _recall(file: Path, why: str) -> RememberedTeacher | None:
    try:
        content = strict_json.read(file)
    except (OSError, ValueError, MvmrError):
        return None
    if content.keys() != _TYPES.keys() or not all(isinstance(content[key], kind) for key, kind in _TYPES.items()):
        return None
    return RememberedTeacher(**content, why=why)
