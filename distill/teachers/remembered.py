"""Teachers that were opened before: where their weights are gone, the cache still has their embeddings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mvmr import strict_json
from mvmr.distillation.teachers.table import open_teacher
from mvmr.distillation.teachers.teacher import Spec, Teacher
from mvmr.errors import MvmrError
from mvmr.progress import say
from mvmr.storage.atomic import cache_dir, write_json

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

    def prepare(self, image: Image.Image) -> Tensor:
        raise MvmrError(self.why)

    def __call__(self, batch: Tensor) -> Tensor:
        raise MvmrError(self.why)


def open_or_recall(
    spec: Spec, pretrained: str | Path | None, *, device: str | torch.device, progress: bool = False
) -> Teacher:
    """Open a teacher, and remember it; one that can't be opened is recalled, for images whose rows are in the cache.

    Raises: MvmrError: as `open_teacher`, of a teacher that nothing is known of.
    """
    file = _file(spec, pretrained)
    try:
        teacher = open_teacher(spec, pretrained, device=device)
    except MvmrError as error:
        if (remembered := _recall(file, str(error))) is None:
            raise
        say(f"{error}; going on with its embeddings in the cache", shown=progress)
        return remembered
    write_json(file, {key: getattr(teacher, key, {}) for key in _TYPES})
    return teacher


def _file(spec: Spec, pretrained: str | Path | None) -> Path:
    words = [spec.kind, _absolute(spec.what), "" if pretrained is None else _absolute(str(pretrained))]
    return cache_dir() / "teachers" / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.json"


def _absolute(text: str) -> str:
    """The same words in another folder mean another file, where they may mean a file."""
    return os.path.abspath(text) if os.sep in text or "." in text else text


def _recall(file: Path, why: str) -> RememberedTeacher | None:
    try:
        content = strict_json.read(file)
    except (OSError, ValueError, MvmrError):
        return None
    if content.keys() != _TYPES.keys() or not all(isinstance(content[key], kind) for key, kind in _TYPES.items()):
        return None
    return RememberedTeacher(**content, why=why)
