"""The page on where teacher and student disagree, and its tables for download."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np

from mvmr.app import fragments
from mvmr.app.embedders.embedder import TEACHER
from mvmr.app.tabs.fidelity_service import fidelity
from mvmr.app.workbench import Workbench
from mvmr.errors import unknown

TABLES = ("images", "classes")
_WORST = 24


def disagreement(bench: Workbench, engine: str, k: int) -> str:
    """The images with the lowest neighbour overlap first, and every class, as HTML.

    Raises: MvmrError where there is no teacher, or not k other images.
    """
    result = fidelity(bench, engine, k)
    gallery = bench.gallery
    lists = {key: bench.bank(key) for key in (TEACHER, engine)}
    limit = min(k, 10)
    cases: list[dict[str, Any]] = []
    for row in result.worst()[:_WORST].tolist():
        own = np.array([row])
        near = {key: bank.search(bench.rows(key)[own], k, without=own)[1][0].tolist() for key, bank in lists.items()}
        shared = set(near[TEACHER]) & set(near[engine])
        cases.append({
            "row": row, "key": gallery.keys[row], "overlap": float(result.overlap[row]),
            "label": fragments.label_of(bench, row), "shared": shared,
            "sides": [("teacher", near[TEACHER][:limit]), ("student", near[engine][:limit])],
        })  # fmt: skip
    command = ""
    if bench.bundle is not None and not gallery.embedded:
        command = f"mvmr report {bench.path} --data {shlex.quote(gallery.name)} --k {k} --limit {len(gallery)}"
    return fragments.render(
        "disagreements", fidelity=result, cases=cases, engine=engine, engine_name=bench.engines.get(engine).label,
        probed=result.probes is not None, version=fragments.version(bench), count=len(gallery),
        command=command,
    )  # fmt: skip


def tables(bench: Workbench, table: str, engine: str, k: int) -> str:
    """One of `TABLES` as CSV; raises MvmrError for another one, and as `disagreement`."""
    if table not in TABLES:
        raise unknown("table", table, TABLES)
    result = fidelity(bench, engine, k)
    return result.images_csv(bench.gallery.keys) if table == "images" else result.classes_csv()
