"""The kinds of teachers, by the word before the colon of a spec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from mvmr.distillation.teachers import clip, onnx_model, python_module, stored_rows, timm_model, torchvision_model
from mvmr.distillation.teachers.clip_source import split_weights
from mvmr.distillation.teachers.teacher import Spec, Teacher
from mvmr.errors import MvmrError
from mvmr.representations import AUGMENTED_PIXELS, HAND_CRAFTED


class Load(Protocol):
    """Load what stands after the colon; text: with a text tower, for zero-shot."""

    def __call__(self, what: str, *, device: str | torch.device, text: bool) -> Teacher: ...


# The first is meant where a spec names no kind.
KINDS: dict[str, Load] = {
    "open_clip": clip.load,
    "timm": timm_model.load,
    "torchvision": torchvision_model.load,
    "onnx": onnx_model.load,
    "python": python_module.load,
    "rows": stored_rows.load,
}


def parse_specs(specs: str | Path | Iterable[str | Path]) -> list[Spec]:
    """Read one spec or several, each of a name of its own.

    Raises: MvmrError for a name that is none, given twice, or that of a hand-crafted representation.
    """
    texts = [specs] if isinstance(specs, str | Path) else list(specs)
    if not texts:
        raise MvmrError("no teacher is given: --teacher ViT-B-16")
    parsed = [Spec.parse(text, tuple(KINDS)) for text in texts]
    for number, spec in enumerate(parsed):
        if spec.name in (*HAND_CRAFTED, AUGMENTED_PIXELS):
            raise MvmrError(f"teacher {spec.name}={spec}: {spec.name!r} is what recipes call another representation")
        if spec.name in [earlier.name for earlier in parsed[:number]]:
            raise MvmrError(f"two teachers are called {spec.name}: give each a name, such as clip=ViT-B-16")
    return parsed


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
    if pretrained is None:
        return KINDS[spec.kind](spec.what, device=device, text=text)
    if not _wants_weights(spec):
        raise MvmrError(f"teacher {spec} says its weights itself; leave out --pretrained {pretrained}")
    return clip.load(spec.what, pretrained, device=device, text=text)


def share_pretrained(specs: Sequence[Spec], pretrained: str | Path | None) -> dict[str, str | Path | None]:
    """The weights of each teacher by its name: `pretrained` of open_clip models that say none, else None.

    Raises: MvmrError where it is given and all say theirs.
    """
    if pretrained is not None and not any(map(_wants_weights, specs)):
        raise MvmrError(f"every teacher says its weights itself; leave out --pretrained {pretrained}")
    return {spec.name: pretrained if _wants_weights(spec) else None for spec in specs}


def _wants_weights(spec: Spec) -> bool:
    return spec.kind == "open_clip" and not split_weights(spec.what)[1]
