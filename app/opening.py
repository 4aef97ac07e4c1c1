"""From what was typed after `mvmr app` to a workbench whose embeddings are at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.embedders.engines import Engines
from mvmr.app.embedders.teacher import TeacherSide, load_teacher
from mvmr.app.gallery import Gallery, cache_folder
from mvmr.app.workbench import Workbench
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.progress import say, say_plan


def open_workbench(
    bundle: str | os.PathLike[str] | None,
    *,
    teacher: str | Path | None = None,
    pretrained: str | Path | None = None,
    gallery: str | os.PathLike[str] | None = None,
    service: str | None = None,
    api_key: str | None = None,
    limit: int = 20_000,
    k: int = 10,
    device: str = "cpu",
    progress: bool = False,
) -> Workbench:
    """Open bundle or service, teacher and gallery, and embed the gallery under both sides where that is not done yet.

    Args:
        bundle: None takes the newest below runs/, unless there is a service.
        teacher, pretrained: as `mvmr report` takes them; one that can't be had leaves the app without its side. Of a
            bundle of several the first is shown, where none is named.
        gallery: as of `Gallery.open`; None takes the data the bundle was trained on.
        service: URL of an embedding service, in the place of the bundle's student.

    Raises:
        MvmrError: no bundle, no gallery, a service that can't be reached, or k below 1.
    """
    if k < 1:
        raise MvmrError(f"k = {k}: give 1 or more neighbours to compare")
    opened = None if service is not None and bundle is None else bundles.load(bundle or bundles.newest())
    engines = Engines(opened, device=device, service=service, api_key=api_key)
    spec = os.fspath(gallery) if gallery else _training_data(opened)
    images = Gallery.open(spec, background=engines.background, limit=limit, progress=progress)
    named, others = (teacher, ()) if teacher is not None or opened is None else _first_of_several(opened)
    side, reason = _teacher(opened, named, pretrained, device)
    if progress:
        also = f"; also distilled from {', '.join(others)}: --teacher {others[0]}" if others else ""
        say_plan(
            student=f"{engines.name} ({engines.choices[0].label})",
            teacher=(reason if side is None else side.label) + also,
            gallery=f"{images.name}, {len(images):,} images",
        )
    bench = Workbench(
        bundle=opened,
        engines=engines,
        gallery=images,
        folder=cache_folder(opened or engines.space_id),
        teacher=side,
        no_teacher=reason,
        k=min(k, max(1, len(images) - 1)),
    )
    _embed_gallery(bench, progress)
    return bench


def _embed_gallery(bench: Workbench, progress: bool) -> None:
    """Under both sides; a teacher that can't be had after all leaves the app without its side."""
    if bench.teacher is not None:
        try:
            bench.rows(TEACHER, progress=progress)
        except MvmrError as error:  # its weights are not those that the bundle was distilled from
            bench.teacher, bench.no_teacher = None, str(error)
            say(f"without a teacher: {error}", shown=progress)
    bench.rows(bench.engines.default, progress=progress)


def _teacher(
    bundle: Bundle | None, teacher: str | Path | None, pretrained: str | Path | None, device: str
) -> tuple[TeacherSide | None, str]:
    if bundle is None and teacher is None:
        return None, "a service does not say what its student was distilled from; name the teacher: --teacher ViT-B-16"
    try:
        return load_teacher(bundle, teacher, pretrained, device), ""
    except MvmrError as error:
        return None, str(error)


def _first_of_several(bundle: Bundle) -> tuple[str | None, Sequence[str]]:
    """The first teacher that a bundle of several records, by name, and the others; none is named where there is one."""
    teachers = bundle.manifest.training.get("teachers")
    names = list(teachers) if isinstance(teachers, Mapping) else []
    return (None, ()) if len(names) < 2 or TEACHER in names else (names[0], names[1:])


def _training_data(bundle: Bundle | None) -> str:
    data = bundle.manifest.training.get("data") if bundle is not None else None
    name = data.get("name") if isinstance(data, Mapping) else None
    if not isinstance(name, str):
        raise MvmrError("there is no gallery: give images to search, --gallery photos/ (or the output of `mvmr embed`)")
    return name
