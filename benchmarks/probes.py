"""Classifiers on many cached features: `python benchmarks/probes.py`, time and peak memory.

Features lie in a memory-mapped file, as a run leaves them, one Gaussian cloud to a class. Every case runs in a fresh
process. scikit-learn's brute-force kNN on the same rows stands beside ours; its logistic regression does not, for it
takes minutes and several copies of the features: that is why there is a mini-batch probe.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import KNeighborsClassifier

from mvmr.comparison.memory import HighWater
from mvmr.evaluation.classifiers import LARGE, adam_probe
from mvmr.evaluation.neighbours import knn_predict

_PRELOAD = ("mvmr.evaluation.classifiers", "mvmr.evaluation.neighbours", "sklearn.neighbors")
_K = 20


def draw(folder: Path, rows: int, queries: int, width: int, classes: int) -> None:
    """Training and test features with their labels, as .npy files."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 0.22, (classes, width)).astype(np.float32)
    for name, count in (("train", rows), ("test", queries)):
        labels = random.integers(0, classes, count)
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (count, width))
        for start in range(0, count, 10_000):
            chosen = labels[start : start + 10_000]
            noise = random.standard_normal((len(chosen), width), dtype=np.float32)
            file[start : start + 10_000] = np.maximum(centres[chosen] + noise * 2, 0)
        file.flush()
        np.save(folder / f"{name}-labels.npy", labels)


def run(case: str, folder: Path, classes: int, threads: int) -> dict[str, Any]:
    """Seconds, peak memory over what the process held before, and accuracy of one case."""
    measure.begin("cpu", threads)
    x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "test"))
    labels, answers = (np.load(folder / f"{name}-labels.npy") for name in ("train", "test"))
    water, wait, began = HighWater("cpu"), measure.CoreWait(), time.perf_counter()
    if case == "linear probe":
        predicted = adam_probe(x, labels, classes, LARGE).predict(y)
    elif case == "kNN":
        predicted = knn_predict(x, labels, y, classes, k=_K, temperature=None)
    else:
        plain = KNeighborsClassifier(_K, algorithm="brute", metric="cosine", n_jobs=threads)
        predicted = plain.fit(np.asarray(x), labels).predict(np.asarray(y))
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 2),
        "memory_mib": water.read(),
        "top1": round(100 * float((predicted == answers).mean()), 2),
        "core_wait": wait.share(),
    }


@click.command()
@click.option("--rows", default=100_000, show_default=True, help="Training features.")
@click.option("--queries", default=10_000, show_default=True, help="Test features.")
@click.option("--width", default=2048, show_default=True)
@click.option("--classes", default=100, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads of the processor; default: the usable cores.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(rows: int, queries: int, width: int, classes: int, threads: int | None, out: Path) -> None:
    """Time and memory of the linear probe and of kNN on many features."""
    used = measure.begin("cpu", threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, rows, queries, width, classes)
        cases = {
            case: measure.alone("cpu", _PRELOAD, run, case, folder, classes, used)
            for case in ("linear probe", "kNN", "kNN, scikit-learn")
        }
    machine = measure.machine("cpu")
    settings = {"rows": rows, "queries": queries, "width": width, "classes": classes, "k": _K}
    console: Console = measure.output()
    table = Table("case", "seconds", "MiB added at the peak", "top-1", title=f"{rows:,} x {width} on {machine['slug']}")
    for case, found in cases.items():
        table.add_row(case, f"{found['seconds']:.1f}", f"{found['memory_mib'].added:,.0f}", f"{found['top1']:.1f} %")
    console.print(table)
    ratios = {
        "kNN / scikit-learn, time": round(cases["kNN"]["seconds"] / cases["kNN, scikit-learn"]["seconds"], 3),
        "kNN / scikit-learn, memory": round(
            cases["kNN"]["memory_mib"].added / cases["kNN, scikit-learn"]["memory_mib"].added, 3
        ),
    }
    wait = max(found["core_wait"] or 0 for found in cases.values())
    result = {"machine": machine, "settings": settings, "core_wait": wait, "cases": cases, "ratios": ratios}
    measure.save("probes", result, out, console)


if __name__ == "__main__":
    main()
