"""The page of figures: what each engine costs and keeps, from reports or measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from mvmr.app import fragments
from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.tabs.figures import (
    COLUMNS,
    LIMIT,
    NOT_YET,
    Line,
    Row,
    accuracies,
    figures,
    figures_csv,
    student_parameters,
)
from mvmr.app.tabs.probes import Training
from mvmr.app.tabs.records import Records
from mvmr.app.workbench import Advance, Workbench
from mvmr.distillation.report.images import draw_rows
from mvmr.errors import MvmrError

_IMAGES = 32  # that speed is measured with
_TAKES_LONG = ("p50", "p99", "throughput", "dcor", "cka")


def figures_table(bench: Workbench, advance: Advance | None = None, *, measure: bool = False) -> str:
    """The table as HTML. What takes long is measured when asked for, and then shown to everybody."""
    if measure:
        _measure(bench, advance)
    rows = _rows(bench)
    absent: dict[str, list[str]] = {}
    for row in rows:
        for why in {cell.why for cell in row.cells.values()} - {"", NOT_YET}:
            absent.setdefault(why, []).append(row.label)
    return fragments.render("figures", rows=rows, columns=COLUMNS, absent=absent, not_yet=NOT_YET)


def table_csv(bench: Workbench) -> str:
    """The table as it stands, as CSV."""
    return figures_csv(_rows(bench))


def _measure(bench: Workbench, advance: Advance | None) -> None:
    """Measure every engine that can be had; one that fails leaves the others."""
    usable, failures = [], {}
    for key in _keys(bench):
        try:
            if _why(bench, key) is None:
                bench.rows(key, advance)
                bench.encoder(key).embed([bench.gallery.load(0)])
                usable.append(key)
        except MvmrError as error:
            failures[key] = str(error)
    for row in _lines(bench, usable, advance, failures):
        bench.own.keep(("measured", row.key), {key: row.cells[key] for key in _TAKES_LONG})


def _rows(bench: Workbench) -> list[Row]:
    """The table with all that is known by now: what was measured, and accuracies, whose records are read anew."""
    rows = _lines(bench)
    return [replace(row, cells={**row.cells, **(bench.own.recall(("measured", row.key)) or {})}) for row in rows]


def _lines(
    bench: Workbench,
    measured: Sequence[str] = (),
    advance: Advance | None = None,
    failures: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    numbers = draw_rows(len(bench.gallery), LIMIT)
    lines = [
        Line(
            key=key,
            label=_label(bench, key),
            encoder=bench.encoder(key) if key in measured else None,
            why=_why(bench, key) or failures.get(key, ""),
            parameters=_parameters(bench, key),
            nbytes=_nbytes(bench, key),
            rows=bench.rows(key)[numbers] if key in measured else None,
            accuracies=_accuracies(bench, key),
        )
        for key in _keys(bench)
    ]
    images = [bench.gallery.load(i) for i in range(min(_IMAGES, len(bench.gallery)))] if measured else []
    return figures(lines, _records(bench), images, advance=advance if measured else None)


def _keys(bench: Workbench) -> list[str]:
    return ([TEACHER] if bench.teacher is not None else []) + [choice.key for choice in bench.engines.choices]


def _label(bench: Workbench, key: str) -> str:
    if key == TEACHER and bench.teacher is not None:
        return f"teacher: {bench.teacher.label}"
    return next(choice.label for choice in bench.engines.choices if choice.key == key)


def _why(bench: Workbench, key: str) -> str | None:
    return next((choice.why for choice in bench.engines.choices if choice.key == key), None)


def _nbytes(bench: Workbench, key: str) -> int | None:
    if key == TEACHER:
        return None if bench.teacher is None else bench.teacher.nbytes
    return next(choice.nbytes for choice in bench.engines.choices if choice.key == key)


def _parameters(bench: Workbench, key: str) -> int | None:
    if key == TEACHER:
        return None if bench.teacher is None else bench.teacher.teacher.parameters
    if bench.bundle is None or _why(bench, key) is not None:
        return None
    return bench.shared.once(("parameters",), partial(student_parameters, bench.bundle))


def _accuracies(bench: Workbench, key: str) -> Mapping[str, float] | None:
    """By the probes that have been fitted here; None where they have not."""
    training: Training | None = bench.shared.recall(("training",))
    labels = bench.gallery.labels
    if training is None or labels is None or bench.own.recall(("probe" if key == TEACHER else "probes", key)) is None:
        return None
    encoder = bench.encoder(key)
    head, rows = training.probe(encoder, bench.folder), training.rows(encoder, bench.folder)
    return accuracies(head, rows, training.labels, bench.rows(key), labels, len(training.classes))


def _records(bench: Workbench) -> Records:
    teacher = bench.teacher.teacher if bench.teacher is not None else None
    names = () if teacher is None else ("name", "weights", "identity")
    facts = {"teacher" if name == "name" else name: getattr(teacher, name) for name in names}
    return Records(
        bundle=bench.bundle,
        data=bench.gallery.name,
        labelled=bench.gallery.labels is not None,
        **facts,
    )
