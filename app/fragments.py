"""Pieces of the page as HTML, from templates that escape whatever strangers' names hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mvmr.app.classify import Guess
from mvmr.app.compare import Neighbour
from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.workbench import Compared, Workbench

PROBLEM, NOTE = "problem", "note"
# Told apart by the colour-blind (Tol 2021, bright and muted), on light and on dark ground.
_SHADES = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#aaaa00", "#99ddff",
)  # fmt: skip
_FEW = 10  # neighbours that one would compare, where there are images enough
_PREVIEW = 128  # pixels
_KILO = 1000.0
_UP, _DOWN = "\N{BLACK UP-POINTING SMALL TRIANGLE}", "\N{BLACK DOWN-POINTING SMALL TRIANGLE}"


def message(text: str, kind: str = NOTE) -> str:
    """A sentence for the visitor: a note, or a problem."""
    return render("message", text=text, kind=kind)


def header(bench: Workbench) -> str:
    """What is loaded, and what could not be."""
    gallery, engines = bench.gallery, bench.engines
    return render(
        "header",
        student=engines.name,
        teacher=None if bench.teacher is None else bench.teacher.label,
        no_teacher=bench.no_teacher,
        count=f"{len(gallery):,}",
        gallery=gallery.name,
        drawn_of=f"{gallery.available:,}" if gallery.available > len(gallery) else "",
        classes=None if gallery.classes is None else len(gallery.classes),
        architecture=described(bench),
        space=engines.space_id[:12],
        skipped=len(gallery.skipped),
        few=bench.most if bench.most < _FEW else 0,
        absent=[choice for choice in engines.choices if choice.why is not None],
    )


def described(bench: Workbench) -> str:
    """The student in a few words."""
    if bench.bundle is None:
        return f"{bench.engines.choices[0].label}, {bench.engines.dim} features"
    return f"{bench.bundle.manifest.backbone}, {bench.engines.dim} features"


def version(bench: Workbench) -> str:
    """What the addresses of thumbnails name, so that a browser never shows those of another gallery."""
    return bench.gallery.fingerprint[:12]


def map_source(bench: Workbench, engine: str, k: int) -> str:
    """Where the map's script finds what it draws; different after probes are fitted, for the map has a colour more."""
    probed = int(bench.known(("probes", engine)) is not None)
    return render("map", engine=engine, k=k, probed=probed, version=version(bench))


def strip(bench: Workbench, rows: Iterable[int]) -> str:
    """Images of the gallery to choose from."""
    images = [{"row": row, "key": bench.gallery.keys[row]} for row in rows]
    return render("strip", images=images, version=version(bench))


def neighbours(
    bench: Workbench, key: str, image: Image.Image | int, name: str, notes: Sequence[str], compared: Compared
) -> str:
    """The query, its figures, and its neighbours on both sides."""
    found = compared.found
    shared = [each.row for each in found.student or () if each.shared]
    shades = {row: _SHADES[number % len(_SHADES)] for number, row in enumerate(shared)}
    student = bench.engines.get(key)

    def cards(side: Sequence[Neighbour] | None, other: str) -> list[dict[str, Any]] | None:
        if side is None:
            return None
        return [
            {
                "row": each.row, "rank": each.rank, "cosine": each.cosine, "key": bench.gallery.keys[each.row],
                "label": label_of(bench, each.row), "shade": shades.get(each.row), "moved": _moved(each, other),
            }
            for each in side
        ]  # fmt: skip

    size = "" if student.nbytes is None else f"{student.label}: {student.nbytes / 1e6:.1f} MB on disk"
    costs = [
        f"{'teacher' if each == TEACHER else student.label}: {_KILO * seconds:.1f} ms for this image"
        for each, seconds in compared.seconds.items()
    ]
    return render(
        "neighbours",
        picture=picture(bench, image),
        name=name,
        notes=list(notes),
        k=found.k,
        shared=len(shared),
        overlap=found.overlap,
        costs=[*costs, *([size] if size else [])],
        teacher=cards(found.teacher, "student"),
        teacher_name="" if bench.teacher is None else bench.teacher.label,
        student=cards(found.student, "teacher"),
        student_name=student.label,
        version=version(bench),
    )


def classified(
    bench: Workbench,
    image: Image.Image | int,
    name: str,
    heads: Sequence[tuple[str, Sequence[Guess], str]],
    no_heads: str,
    zero_shot: Sequence[Guess] | None,
    no_zero_shot: str,
) -> str:
    """The most probable classes: by each head (its name, guesses, a note), and by the teacher's text tower."""
    return render(
        "classify",
        picture=picture(bench, image),
        name=name,
        heads=[{"name": head, "guesses": guesses, "note": note} for head, guesses, note in heads],
        no_heads=no_heads,
        zero_shot=zero_shot,
        no_zero_shot=no_zero_shot,
        teacher_name="" if bench.teacher is None else bench.teacher.label,
    )


def picture(bench: Workbench, image: Image.Image | int) -> str:
    """Where the browser finds the image; one that a visitor brought is put into the page, and nowhere else."""
    if isinstance(image, int):
        return f"thumb/{version(bench)}/{image}"
    small = image.copy()
    small.thumbnail((_PREVIEW * 2, _PREVIEW * 2))
    content = io.BytesIO()
    small.save(content, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def label_of(bench: Workbench, row: int) -> str:
    """The class of an image of the gallery, "" where it has none."""
    gallery = bench.gallery
    if gallery.labels is None or gallery.classes is None:
        return ""
    return gallery.classes[int(gallery.labels[row])]


def _moved(each: Neighbour, other: str) -> str:
    """How a neighbour's place differs on the other side."""
    if each.elsewhere is None:
        return ""
    if each.elsewhere == each.rank:
        return f"same place under the {other}"
    arrow = (
        "\N{BLACK UP-POINTING SMALL TRIANGLE}"
        if each.elsewhere < each.rank
        else "\N{BLACK DOWN-POINTING SMALL TRIANGLE}"
    )
    return f"{arrow} {each.elsewhere} under the {other}"


def render(template: str, /, **values: object) -> str:
    """The template of that name, filled in."""
    return _templates().get_template(f"{template}.html").render(**values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("mvmr.app"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
