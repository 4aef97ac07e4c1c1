"""Teachers by their specs; each kind's libraries are imported when one of it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvmr.distillation.teachers.spec import KINDS, Spec, split_weights
from mvmr.errors import MvmrError

if TYPE_CHECKING:
    import torch

    from mvmr.distillation.teachers.teacher import Teacher


def open_teacher(
    spec: Spec, pretrained: str | Path | None = None, *, device: str | torch.device = "cpu", text: bool = False
) -> Teacher:
    """Load a teacher.

    Args:
        pretrained: weights of an open_clip model whose spec says none: one of its tags, or a file; None takes the
            default tag.
        text: also load a text tower, for zero-shot.

    Raises: MvmrError where it can't be had, or `pretrained` is given for another kind.
    """
    weights: dict[str, Any] = {}
    if pretrained is not None:
        if not _wants_weights(spec):
            raise MvmrError(f"teacher {spec} says its weights itself; leave out --pretrained {pretrained}")
        weights = {"pretrained": pretrained}
    module = import_module(f"mvmr.distillation.teachers.{KINDS[spec.kind]}")
    teacher: Teacher = module.load(spec.what, device=device, text=text, **weights)
    return teacher


def share_pretrained(specs: Sequence[Spec], pretrained: str | Path | None) -> dict[str, str | Path | None]:
    """The weights of each teacher by its name: `pretrained` of open_clip models that say none, else None.

    Raises: MvmrError where it is given and all say theirs.
    """
    if pretrained is not None and not any(map(_wants_weights, specs)):
        raise MvmrError(f"every teacher says its weights itself; leave out --pretrained {pretrained}")
    return {spec.name: pretrained if _wants_weights(spec) else None for spec in specs}


def _wants_weights(spec: Spec) -> bool:
    return spec.kind == "open_clip" and not split_weights(spec.what)[1]
