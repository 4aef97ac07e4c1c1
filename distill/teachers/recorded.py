"""The teacher that a bundle was distilled from, found again by what the bundle records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mvmr.bundles.bundle import Bundle
from mvmr.distillation.teachers.teacher import Teacher
from mvmr.errors import MvmrError


def teacher_of(
    bundle: Bundle, name: str | Path | None, pretrained: str | Path | None, device: str, *, text: bool
) -> Teacher:
    """Load the teacher named, or else the one the bundle records.

    Raises:
        MvmrError: the bundle records none, its weights can't be had, or they are not the ones it was distilled from.
    """
    if name is not None:
        return Teacher.load(name, pretrained, device=device, text=text)
    recorded = bundle.manifest.training.get("teachers")
    described = recorded.get("teacher") if isinstance(recorded, Mapping) else None
    if not isinstance(described, Mapping) or not {"name", "weights", "identity"} <= set(described):
        raise MvmrError(f"bundle {bundle.path} names no teacher to compare with; give one: --teacher ViT-B-16")
    file = Path(described["weights"])
    if file.suffix and len(file.parts) > 1 and not file.exists():  # a tag is neither
        raise MvmrError(
            f"the teacher that {bundle.path} was distilled from is not at {file} any more (looked from {Path.cwd()}); "
            "say where: --teacher NAME|FOLDER, and --pretrained FILE"
        )
    if (file.parent / "open_clip_config.json").is_file():  # a folder in open_clip's hub format
        loaded = Teacher.load(file.parent, device=device, text=text)
    else:
        loaded = Teacher.load(described["name"], described["weights"], device=device, text=text)
    if loaded.identity != described["identity"]:
        raise MvmrError(
            f"teacher {described['name']} with weights {described['weights']} is not the one {bundle.path} was "
            "distilled from (other weights, or another preprocessing); give the right one: --teacher, --pretrained"
        )
    return loaded
