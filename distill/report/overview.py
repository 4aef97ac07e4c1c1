"""The page above the reports of a student of several teachers: what it has kept of each, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from mvmr.storage.atomic import write_text


def write_overview(reports: Mapping[str, Mapping[str, Any]], page: str, path: Path) -> None:
    """Write an HTML page that leads to the report on each teacher.

    Args:
        reports: the content of each ``report.json``, by the name of the teacher, which is that of its folder.
        page: the file in each folder.
    """
    rows = [{"name": name, "teacher": report["teacher"], **_figures(report)} for name, report in reports.items()]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files(__package__).joinpath("overview.html").read_text(encoding="utf-8")
    first = next(iter(reports.values()))
    write_text(path, environment.from_string(source).render(rows=rows, page=page, report=first))


def _figures(report: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a row, as text; empty where something was not measured."""
    neighbours, probe = report["neighbours"], report["probe"]
    stages = [row for row in report["dependence"]["rows"] if row.startswith("student.")]
    cells = {(cell["row"], cell["column"]): cell for cell in report["dependence"]["cells"]}
    cell, untrained = cells.get((stages[-1], "teacher")), cells.get(("untrained", "teacher"))
    theirs = None if probe is None else probe["teacher"]
    return {
        "dcor": "" if cell is None else f"{cell['dcor']:.2f}",
        "null": "" if cell is None else f"{cell['null_mean']:.3f}",
        "dcor_untrained": "" if untrained is None else f"{untrained['dcor']:.2f}",
        "cka": "" if cell is None else f"{cell['cka']:.2f}",
        "overlap": "" if neighbours is None else f"{neighbours['overlap']['mean']:.1f}",
        "overlap_untrained": "" if neighbours is None else f"{neighbours['untrained']['mean']:.1f}",
        "student": "" if probe is None else f"{probe['student']['top1']:.1f}",
        "theirs": "" if theirs is None else f"{theirs['top1']:.1f}",
    }
