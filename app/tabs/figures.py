"""What each engine costs and keeps: one table, read from the bundle's own reports or measured on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mvmr.app.embedders.embedder import SERVICE, TEACHER, TORCH
from mvmr.app.table import to_csv
from mvmr.app.tabs.records import Records
from mvmr.bundles.bundle import Bundle
from mvmr.distillation.report.fidelity import dependence
from mvmr.distillation.report.images import SEED
from mvmr.errors import MvmrError
from mvmr.evaluation.classifiers import LinearHead
from mvmr.evaluation.neighbours import knn_predict
from mvmr.evaluation.scores import top_k
from mvmr.models.table import backbone_of

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
LIMIT = 1000  # images that dCor and CKA are taken on at most, as in `mvmr report`
HERE = "measured here, on this machine"
NOT_YET = "not measured yet"
_BATCH = 32
_LATENCIES = (5, 1000)  # calls, at least and at most
_BATCHES = (1, 100)
_FEWEST = 4  # images; the unbiased estimator is not defined below


class Embeds(Protocol):
    """Images in, embeddings out: an encoder of `mvmr.app.embedders.embedder`."""

    def embed(self, images: Sequence[Image.Image]) -> Floats: ...


@dataclass(frozen=True)
class Column:
    """A column of the table; unit: "" for a plain number."""

    key: str
    title: str
    unit: str


COLUMNS = (
    Column("parameters", "parameters", ""),
    Column("bytes", "file size", "bytes"),
    Column("p50", "latency p50, batch 1", "ms"),
    Column("p99", "latency p99, batch 1", "ms"),
    Column("throughput", "throughput, batch 32", "images/s"),
    Column("linear", "linear probe, top-1", "%"),
    Column("knn", "kNN (weighted, k = 5), top-1", "%"),
    Column("dcor", "dCor to the teacher, unbiased", ""),
    Column("cka", "CKA to the teacher, linear", ""),
)


@dataclass(frozen=True)
class Cell:
    """One figure; value: in its column's unit, None where it can't be had.

    text: for people, with its unit; source: the command, or where it was measured; why: it can't be had
    """

    value: float | None
    text: str
    source: str = ""
    why: str = ""

    @classmethod
    def missing(cls, why: str) -> Cell:
        """A figure that can't be had, and the reason."""
        return cls(None, "-", why=why)


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """What is known of one encoder before anything is measured here.

    encoder: to be timed; None where it shall not be, or can't be had: then `why` says so
    parameters: None where nobody knows, as of a service; nbytes: of the file it runs from
    rows: its embeddings of the images that `mvmr report` draws, float32 [n, D]; None while they are not computed
    accuracies: what :func:`accuracies` gave for it, where that was asked for
    """

    key: str
    label: str
    encoder: Embeds | None
    why: str = ""
    parameters: int | None = None
    nbytes: int | None = None
    rows: Floats | None = None
    accuracies: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: a cell for each of `COLUMNS`, by its key."""

    key: str
    label: str
    cells: Mapping[str, Cell]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        cells = {
            key: {"value": cell.value, "text": cell.text, "source": cell.source, "why": cell.why}
            for key, cell in self.cells.items()
        }
        return {"key": self.key, "label": self.label, "cells": cells}


@dataclass(frozen=True)
class Speed:
    """p50, p99: milliseconds of one image alone; throughput: images/s in batches of 32; calls, batches: how many."""

    p50: float
    p99: float
    throughput: float
    calls: int
    batches: int


def figures(
    lines: Sequence[Line],
    records: Records,
    images: Sequence[Image.Image] = (),
    *,
    seconds: float = 4.0,
    advance: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Make the table: the bundle's own reports where they say a figure, else what is measured here.

    Nothing is timed without images, and no dCor is computed of lines without rows: such cells say so.

    Args:
        lines: the student's engines and, under the key "teacher", its teacher, if there is one.
        images: decoded ones, some dozens, to measure speed with; none to leave that out.
        seconds: about what each encoder is timed for.
        advance: hears how many of the encoders are done, of how many.
    """
    teacher = next((line for line in lines if line.key == TEACHER), None)
    similarities = _dependence(lines, teacher)
    rows = []
    for number, line in enumerate(lines):
        cells = _costs(line) | _speeds(line, images, seconds) | similarities[line.key]
        cells |= {protocol: _accuracy(line, protocol, records) for protocol in ("linear", "knn")}
        rows.append(Row(line.key, line.label, {column.key: cells[column.key] for column in COLUMNS}))
        if advance is not None:
            advance(number + 1, len(lines))
    return rows


def speed(
    encoder: Embeds,
    images: Sequence[Image.Image],
    *,
    seconds: float = 4.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time an encoder on decoded images, resizing and normalisation included: half the time one by one, half by 32.

    A first image warms it up; of several batches the first is left out, for memory is found for it.
    """
    encoder.embed([images[0]])
    single = _time_calls(lambda i: encoder.embed([images[i % len(images)]]), seconds / 2, _LATENCIES, clock)
    batch = [images[i % len(images)] for i in range(_BATCH)]
    batches = _time_calls(lambda _: encoder.embed(batch), seconds / 2, _BATCHES, clock)
    counted = batches[1:] or batches
    p50, p99 = np.percentile(1000 * np.array(single), [50, 99])
    return Speed(float(p50), float(p99), _BATCH * len(counted) / sum(counted), len(single), len(counted))


def accuracies(
    head: LinearHead, train: Floats, train_labels: Labels, rows: Floats, labels: Labels, classes: int
) -> dict[str, float]:
    """Accuracies in percent by the protocols `linear` and `knn` (weighted, k = 5) of `mvmr evaluate`.

    Shapes:
        head: fitted on `train`, float32 [M, D], whose labels are int64 [M]; asked about rows [N, D], labels [N].
    """
    voted = knn_predict(train, train_labels, rows, classes, k=5)
    return {"linear": top_k(head.logits(rows), labels, 1), "knn": 100 * float((voted == labels).mean())}


def student_parameters(bundle: Bundle) -> int:
    """Parameters of a bundle's encoder; no weights are read."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in backbone_of(bundle.manifest).build().parameters())


def figures_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: each figure in full, and beside it where it comes from or why it is not there."""
    columns = ["engine"]
    for column in COLUMNS:
        columns += [f"{column.title} ({column.unit})" if column.unit else column.title, f"{column.title}: source"]
    lines = []
    for row in rows:
        line: list[object] = [row.label]
        for column in COLUMNS:
            cell = row.cells[column.key]
            line += [cell.value, cell.source or cell.why]
        lines.append(line)
    return to_csv(columns, lines)


def _time_calls(
    call: Callable[[int], object], seconds: float, count: tuple[int, int], clock: Callable[[], float]
) -> list[float]:
    """Seconds that each call took: at least and at most so many calls, and no new one when the time is over."""
    least, most = count
    durations: list[float] = []
    began = clock()
    while len(durations) < least or (len(durations) < most and clock() - began < seconds):
        start = clock()
        call(len(durations))
        durations.append(clock() - start)
    return durations


def _costs(line: Line) -> dict[str, Cell]:
    served = "a service does not say" if line.key == SERVICE else line.why
    parameters = Cell.missing(served or "not known")
    if line.parameters is not None:
        source = "counted here" + (", the image tower" if line.key == TEACHER else "")
        parameters = Cell(line.parameters, _count(line.parameters), source)
    nbytes = Cell.missing(served or "not known")
    if line.nbytes is not None:
        nbytes = Cell(line.nbytes, f"{_count(line.nbytes)}B", "the file it runs from")
    return {"parameters": parameters, "bytes": nbytes}


def _speeds(line: Line, images: Sequence[Image.Image], seconds: float) -> dict[str, Cell]:
    names = ("p50", "p99", "throughput")
    if line.encoder is None or not images:
        return dict.fromkeys(names, Cell.missing(line.why or NOT_YET))
    try:
        measurement = speed(line.encoder, images, seconds=seconds)
    except MvmrError as error:  # a service that is gone
        return dict.fromkeys(names, Cell.missing(str(error)))
    single = f"{HERE}: {measurement.calls} images one by one, decoded, with resizing and normalisation"
    batched = f"{HERE}: batches of {_BATCH} images, {measurement.batches} of them, with resizing and normalisation"
    return {
        "p50": Cell(measurement.p50, f"{_number(measurement.p50)} ms", single),
        "p99": Cell(measurement.p99, f"{_number(measurement.p99)} ms", single),
        "throughput": Cell(measurement.throughput, f"{_number(measurement.throughput)} images/s", batched),
    }


def _dependence(lines: Sequence[Line], teacher: Line | None) -> dict[str, dict[str, Cell]]:
    """dCor and CKA of every line's rows to the teacher's, by the line's key."""
    names = ("dcor", "cka")
    cells = {}
    for line in lines:
        if line is teacher:
            why = "this is the teacher"
        elif teacher is None:
            why = "there is no teacher to compare with"
        else:
            why = line.why or teacher.why or NOT_YET
            if teacher.rows is not None and len(teacher.rows) < _FEWEST:
                why = f"the unbiased estimator takes {_FEWEST} images or more"
        cells[line.key] = dict.fromkeys(names, Cell.missing(why))
    if teacher is None or teacher.rows is None or len(teacher.rows) < _FEWEST:
        return cells
    rows = {line.key: line.rows for line in lines if line.rows is not None and line is not teacher}
    # What comes by chance is the report's to say: of the permutations behind it one is drawn, and not looked at.
    for cell in dependence(rows, {TEACHER: teacher.rows}, permutations=1, seed=SEED) if rows else ():
        source = f"{HERE}, on {len(teacher.rows):,} images, as `mvmr report` does"
        cells[cell["row"]] = {name: Cell(cell[name], f"{cell[name]:.3f}", source) for name in names}
    return cells


def _accuracy(line: Line, protocol: str, records: Records) -> Cell:
    of_teacher = line.key == TEACHER
    command = records.command(protocol, table=of_teacher)
    if not records.labelled:
        return Cell.missing(f"{records.data} has no labels to measure with, or several to an image")
    evaluated = of_teacher or line.key == TORCH  # what `mvmr evaluate` measures
    if evaluated and (record := records.find(protocol, teacher=of_teacher)):
        return Cell(record[0], f"{record[0]:.1f} %", record[1])
    if line.accuracies is not None:
        value = line.accuracies[protocol]
        return Cell(value, f"{value:.1f} %", f"{HERE}, on its own features, as `{command}` does")
    if protocol == "linear" and (record := records.find_exported(line.key)):
        return Cell(record[0], f"{record[0]:.1f} %", record[1])
    if evaluated:
        return Cell.missing(f"`{command}` measures it")
    return Cell.missing(line.why or f"{NOT_YET}: it takes a probe on this engine's own features")


def _count(value: float) -> str:
    """11,234,567 -> 11.2 M"""
    for factor, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {name}"
    return f"{value:.0f} "


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
