"""From what was typed after `mvmr app` to workbenches whose embeddings are at hand, one for each teacher."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.embedders.engines import Engines
from mvmr.app.embedders.teacher import TeacherSide, load_teacher
from mvmr.app.gallery import Gallery, cache_folder
from mvmr.app.workbench import Kept, Workbench
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.progress import say, say_plan

_Side = tuple[TeacherSide | None, str]  # a teacher, or None and why it can't be had


def open_workbenches(
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
) -> tuple[Workbench, ...]:
    """Open bundle or service, teachers and gallery, and embed the gallery under all sides where that is not done yet.

    Args:
        bundle: None takes the newest below runs/, unless there is a service.
        teacher, pretrained: as `mvmr report` takes them; one that can't be had leaves its workbench without its side.
        gallery: as of `Gallery.open`; None takes the data the bundle was trained on.
        service: URL of an embedding service, in the place of the bundle's student.

    Returns:
        One, or of a bundle of several teachers, of which none is named, one for each, in the bundle's order.

    Raises:
        MvmrError: no bundle, no gallery, a service that can't be reached, or k below 1.
    """
    if k < 1:
        raise MvmrError(f"k = {k}: give 1 or more neighbours to compare")
    opened = None if service is not None and bundle is None else bundles.load(bundle or bundles.newest())
    engines = Engines(opened, device=device, service=service, api_key=api_key)
    spec = os.fspath(gallery) if gallery else _training_data(opened)
    images = Gallery.open(spec, background=engines.background, limit=limit, progress=progress)
    names = _several(opened) if opened is not None and teacher is None else ()
    asked: dict[str, str | Path | None] = {name: name for name in names} or {"": teacher}
    sides = {name: _open_teacher(opened, what, pretrained, device) for name, what in asked.items()}
    if progress:
        say_plan(
            student=f"{engines.name} ({engines.choices[0].label})",
            teacher=_describe(sides),
            gallery=f"{images.name}, {len(images):,} images",
        )
    benches = _set_up(opened, engines, images, sides, min(k, max(1, len(images) - 1)))
    for bench in benches:
        _embed_gallery(bench, progress)
    return benches


def _set_up(
    bundle: Bundle | None, engines: Engines, gallery: Gallery, sides: Mapping[str, _Side], k: int
) -> tuple[Workbench, ...]:
    """A workbench for each teacher; what they share is there once."""
    names = list(sides) if len(sides) > 1 else []
    pages = {name: f"teacher/{quote(name, safe='')}/" if number else "" for number, name in enumerate(names)}
    folder, shared = cache_folder(bundle or engines.space_id), Kept()
    return tuple(
        Workbench(
            bundle=bundle,
            engines=engines,
            gallery=gallery,
            folder=folder,
            teacher=side,
            no_teacher=reason,
            k=k,
            name=name,
            pages=pages,
            shared=shared,
        )
        for name, (side, reason) in sides.items()
    )


def _embed_gallery(bench: Workbench, progress: bool) -> None:
    """Under both sides; a teacher that can't be had after all leaves the app without its side."""
    if bench.teacher is not None:
        try:
            bench.rows(TEACHER, progress=progress)
        except MvmrError as error:  # its weights are not those that the bundle was distilled from
            bench.teacher, bench.no_teacher = None, str(error)
            say(f"without {f'teacher {bench.name}' if bench.name else 'a teacher'}: {error}", shown=progress)
    bench.rows(bench.engines.default, progress=progress)


def _open_teacher(
    bundle: Bundle | None, teacher: str | Path | None, pretrained: str | Path | None, device: str
) -> _Side:
    if bundle is None and teacher is None:
        return None, "a service does not say what its student was distilled from; name the teacher: --teacher ViT-B-16"
    try:
        return load_teacher(bundle, teacher, pretrained, device), ""
    except MvmrError as error:
        return None, str(error)


def _describe(sides: Mapping[str, _Side]) -> str:
    told = {name: reason if side is None else side.label for name, (side, reason) in sides.items()}
    return "; ".join(f"{name}: {label}" if name else label for name, label in told.items())


def _several(bundle: Bundle) -> Sequence[str]:
    """The names of the teachers that a bundle of several records, in its order; none where there is one."""
    teachers = bundle.manifest.training.get("teachers")
    names = list(teachers) if isinstance(teachers, Mapping) else []
    return () if len(names) < 2 or TEACHER in names else names


def _training_data(bundle: Bundle | None) -> str:
    data = bundle.manifest.training.get("data") if bundle is not None else None
    name = data.get("name") if isinstance(data, Mapping) else None
    if not isinstance(name, str):
        raise MvmrError("there is no gallery: give images to search, --gallery photos/ (or the output of `mvmr embed`)")
    return name
