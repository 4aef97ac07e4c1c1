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
from mvmr.app.workbench import TimedComparison, Workbench

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
    home = "../" * bench.address.count("/") or "./"  # relative, for a proxy may put the app below an address of its own
    return render(
        "header",
        student=engines.name,
        teacher=None if bench.teacher is None else bench.teacher.label,
        no_teacher=bench.no_teacher,
        pages=[(name, f"{home}{address}", name == bench.name) for name, address in bench.pages.items()],
        count=f"{len(gallery):,}",
        gallery=gallery.name,
        drawn_of=f"{gallery.available:,}" if gallery.available > len(gallery) else "",
        classes=None if gallery.classes is None else len(gallery.classes),
        architecture=describe_student(bench),
        space=engines.space_id[:12],
        skipped=len(gallery.skipped),
        few=bench.most if bench.most < _FEW else 0,
        absent=[choice for choice in engines.choices if choice.why is not None],
    )


def describe_student(bench: Workbench) -> str:
    """The student in a few words."""
    if bench.bundle is None:
        return f"{bench.engines.choices[0].label}, {bench.engines.dim} features"
    return f"{bench.bundle.manifest.backbone}, {bench.engines.dim} features"


def version(bench: Workbench) -> str:
    """What the addresses of thumbnails name, so that a browser never shows those of another gallery."""
    return bench.gallery.fingerprint[:12]


def map_source(bench: Workbench, engine: str, k: int) -> str:
    """Where the map's script finds what it draws; different after probes are fitted, for the map has a colour more."""
    probed = int(bench.own.recall(("probes", engine)) is not None)
    return render("map", engine=engine, k=k, probed=probed, version=version(bench))


def strip(bench: Workbench, rows: Iterable[int]) -> str:
    """Images of the gallery to choose from."""
    images = [{"row": row, "key": bench.gallery.keys[row]} for row in rows]
    return render("strip", images=images, version=version(bench))


def neighbours(
    bench: Workbench, key: str, image: Image.Image | int, name: str, notes: Sequence[str], timed: TimedComparison
) -> str:
    """The query, its figures, and its neighbours on both sides."""
    comparison = timed.comparison
    shared = [neighbour.row for neighbour in comparison.student or () if neighbour.shared]
    shades = {row: _SHADES[number % len(_SHADES)] for number, row in enumerate(shared)}
    student = bench.engines.get(key)

    def cards(side: Sequence[Neighbour] | None, opposite: str) -> list[dict[str, Any]] | None:
        if side is None:
            return None
        return [
            {
                "row": neighbour.row,
                "rank": neighbour.rank,
                "cosine": neighbour.cosine,
                "key": bench.gallery.keys[neighbour.row],
                "label": label_of(bench, neighbour.row),
                "shade": shades.get(neighbour.row),
                "moved": _describe_move(neighbour, opposite),
            }
            for neighbour in side
        ]

    size = "" if student.nbytes is None else f"{student.label}: {student.nbytes / 1e6:.1f} MB on disk"
    costs = [
        f"{'teacher' if side == TEACHER else student.label}: {_KILO * seconds:.1f} ms for this image"
        for side, seconds in timed.seconds.items()
    ]
    return render(
        "neighbours",
        picture=picture(bench, image),
        name=name,
        notes=list(notes),
        k=comparison.k,
        shared=len(shared),
        overlap=comparison.overlap,
        costs=[*costs, *([size] if size else [])],
        teacher=cards(comparison.teacher, "student"),
        teacher_name="" if bench.teacher is None else bench.teacher.label,
        student=cards(comparison.student, "teacher"),
        student_name=student.label,
        version=version(bench),
    )


def classification(
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


def _describe_move(neighbour: Neighbour, opposite: str) -> str:
    """How a neighbour's place differs on the other side."""
    if neighbour.elsewhere is None:
        return ""
    if neighbour.elsewhere == neighbour.rank:
        return f"same place under the {opposite}"
    arrow = _UP if neighbour.elsewhere < neighbour.rank else _DOWN
    return f"{arrow} {neighbour.elsewhere} under the {opposite}"


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
