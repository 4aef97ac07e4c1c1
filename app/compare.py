"""The neighbours of one image under teacher and student, side by side: who is shared, who has moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mvmr.evaluation.neighbours import Bank
from mvmr.serve.engine import Floats


@dataclass(frozen=True)
class Neighbour:
    """An image of the gallery near the query on one side.

    row: its number in the gallery; rank: its place, 1 for the nearest; cosine: in [-1, 1]
    elsewhere: its place on the other side, however far; None where there is no other side
    shared: whether it is among the k nearest on both sides
    """

    row: int
    rank: int
    cosine: float
    elsewhere: int | None
    shared: bool


@dataclass(frozen=True)
class Comparison:
    """The k nearest under each side, nearest first; None for a side that is not there.

    k: how many there are, fewer than asked for in a small gallery; overlap: shared ones in percent of k
    """

    k: int
    teacher: tuple[Neighbour, ...] | None
    student: tuple[Neighbour, ...] | None
    overlap: float | None


@dataclass(frozen=True)
class Side:
    """A gallery under one encoder, and the query under the same one: float32 [D], not normalised."""

    bank: Bank
    query: Floats


def compare(teacher: Side | None, student: Side | None, k: int, *, without: int | None = None) -> Comparison:
    """Find the k nearest images of the gallery on both sides, by cosine, and where each stands on the other.

    without: a row that is no neighbour: the query's own, where it is an image of the gallery.
    """
    sides = {name: side for name, side in (("teacher", teacher), ("student", student)) if side is not None}
    excluded = None if without is None else np.array([without])
    hits = {name: side.bank.search(side.query[None], k, without=excluded) for name, side in sides.items()}
    nearest = {name: set(rows[0].tolist()) for name, (_, rows) in hits.items()}
    ranks = {name: _ranks(side, without) for name, side in sides.items()}
    shared = set.intersection(*nearest.values()) if len(nearest) == 2 else set()
    count = min([k, *map(len, nearest.values())])

    def list_neighbours(name: str, opposite: str) -> tuple[Neighbour, ...] | None:
        if name not in hits:
            return None
        cosines, rows = (values[0] for values in hits[name])
        return tuple(
            Neighbour(
                row=(row := int(rows[i])),
                rank=i + 1,
                cosine=min(1.0, max(-1.0, float(cosines[i]))),  # float32 makes 1.0000001 of some
                elsewhere=ranks[opposite][row] if opposite in ranks else None,
                shared=row in shared,
            )
            for i in range(count)
        )

    return Comparison(
        k=count,
        teacher=list_neighbours("teacher", "student"),
        student=list_neighbours("student", "teacher"),
        overlap=100 * len(shared) / count if len(sides) == 2 and count else None,
    )


def _ranks(side: Side, without: int | None) -> dict[int, int]:
    """The place of every row of the gallery but one, 1 for the nearest."""
    _, rows = side.bank.search(side.query[None], len(side.bank))
    return {int(row): rank for rank, row in enumerate(rows[0][rows[0] != without], start=1)}
