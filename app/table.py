"""Tables as CSV, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a spreadsheet takes for the beginning of one


def to_csv(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table as CSV (RFC 4180). Text that a spreadsheet would run as a formula gets an apostrophe in front.

    Numbers are written in full, so that they read back as they were; None is an empty cell.
    """
    out = io.StringIO()
    csv.writer(out).writerows([[_safe(cell) for cell in line] for line in (columns, *lines)])
    return out.getvalue()


def _safe(cell: object) -> object:
    if isinstance(cell, str):
        text = cell.encode("utf-8", "replace").decode()
        return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text
    return cell
