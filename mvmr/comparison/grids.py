"""Rows of a comparison: the paper's ablation grids (Tables 5 to 8), and what each changes in a recipe; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from typing import NamedTuple

from mvmr.errors import MvmrError, unknown


class Row(NamedTuple):
    """A row of a grid: its label, and assignments such as ``method.invariance=0`` that make it of any recipe."""

    label: str
    assignments: tuple[str, ...]


LOSSES = ("L1", "L2", "L3")
REPRESENTATIONS = ("augmented_pixels", "pixels", "scattering", "hog", "local_std")
POLICIES = ("none", "crop", "crop+flip", "crop+flip+jitter", "crop+flip+jitter+grey", "paper")
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
_DEPTHS = (1, 2, 3)


def _subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All but the empty one, the smallest first."""
    return [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]


def _objective(losses: tuple[str, ...], representations: tuple[str, ...]) -> tuple[str, ...]:
    """The whole objective, so that no term of the recipe it is applied to is left."""
    on = {name: int(name in losses) for name in LOSSES}
    weights = ", ".join(f"{name} = 1" for name in representations if on["L3"])
    return (
        f"method.invariance={on['L1']}",
        f"method.variance={on['L1']}",
        f"method.dependence={on['L2']}",
        f"method.representations={{{weights}}}",  # the table is replaced: those it does not name are off
        "method.decorrelation=0",
    )


def _losses() -> tuple[Row, ...]:
    """Table 5: the terms. L1 is invariance and variance, L2 dependence, L3 all five representations."""
    return tuple(Row(" + ".join(terms), _objective(terms, REPRESENTATIONS)) for terms in _subsets(LOSSES))


def _representations() -> tuple[Row, ...]:
    """Table 6: the representations in L3, beside L1 and L2."""
    return tuple(Row(" + ".join(names), _objective(LOSSES, names)) for names in _subsets(REPRESENTATIONS))


def _augmentations() -> tuple[Row, ...]:
    """Table 7: the steps of the paper's views, one after the other."""
    return tuple(Row(policy, (f"views.policy={policy}",)) for policy in POLICIES)


def _projector() -> tuple[Row, ...]:
    """Table 8: width and depth of the projector.

    The paper's table has 19 rows; its list was not at hand, and this one spans the same number: none (z = h), and
    one to three layers of six widths.
    """
    rows = [Row("none", ("method.projector=[]",))]
    for width in WIDTHS:
        sizes = [[width] * depth for depth in _DEPTHS]
        rows += [Row("-".join(map(str, layers)), (f"method.projector={layers}",)) for layers in sizes]
    return tuple(rows)


GRIDS: dict[str, tuple[Row, ...]] = {
    "losses": _losses(),
    "representations": _representations(),
    "augmentations": _augmentations(),
    "projector": _projector(),
}


def rows_of(grid: str, only: str | None = None) -> tuple[Row, ...]:
    """The rows of a grid, or those whose label matches the glob ``only``, or where none does, contains it.

    Raises:
        MvmrError: an unknown grid (with the nearest), or no such row (with all labels).
    """
    if grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    rows = GRIDS[grid]
    if only is None:
        return rows
    matching = [row for row in rows if fnmatchcase(row.label, only)] or [row for row in rows if only in row.label]
    if not matching:
        raise MvmrError(f"no row of grid {grid} matches {only!r}; its rows: {', '.join(row.label for row in rows)}")
    return tuple(matching)


def check_free(rows: Sequence[Row], assign: Sequence[str], what: str, *, but: str | None = None) -> None:
    """Refuse assignments that rows would override, and that of the seed.

    Args:
        what: the rows are of; but: a key that may be assigned all the same.

    Raises:
        MvmrError: naming the key.
    """
    own_keys = {assignment.partition("=")[0] for row in rows for assignment in row.assignments} | {"train.seed"}
    for assignment in assign:
        key = assignment.partition("=")[0].strip()
        if key != but and any(
            f"{key}.".startswith(f"{own_key}.") or own_key.startswith(f"{key}.") for own_key in own_keys
        ):
            raise MvmrError(f"cannot set {key}: the rows of {what} and their seeds decide it; leave it out")
