"""How long a command takes to say what is wrong with its arguments: `python benchmarks/refusals.py`.

Each is started as a shell does it, with an argument that can't be right, and must end with one line and no success.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click
import measure
from rich.table import Table

MISTAKES = {
    "a teacher's name": ["distill", "--teacher", "ViT-B-61"],
    "data to distil": ["distill", "--teacher", "ViT-B-16", "--data", "no/photos"],
    "a recipe to distil": ["distill", "--teacher", "ViT-B-16", "--recipe", "defalt"],
    "data to pretrain": ["pretrain", "--data", "no/photos"],
    "a recipe to pretrain": ["pretrain", "--recipe", "papr"],
    "a bundle to probe": ["probe", "no/bundle", "--data", "sample:digits"],
    "a bundle to fine-tune": ["finetune", "no/bundle", "--data", "sample:digits"],
    "a bundle to evaluate": ["evaluate", "no/bundle", "--data", "sample:digits"],
    "a bundle to report on": ["report", "no/bundle", "--data", "sample:digits"],
    "data to compare on": ["compare", "--methods", "mvmr,simclr", "--data", "sample:digit"],
    "data to ablate on": ["ablate", "--grid", "losses", "--data", "sample:digit"],
    "a bundle to export": ["export", "no/bundle"],
    "a bundle to embed by": ["embed", "no/bundle", "no/photos", "--out", "embeddings"],
    "a teacher to embed by": ["embed", "no/photos", "--teacher", "ViT-B-61", "--out", "embeddings"],
    "embeddings to index": ["index", "no/embeddings", "--out", "index"],
    "an index to search": ["search", "no/index", "no/photo.jpg"],
    "a bundle to serve": ["serve", "no/bundle"],
    "a bundle for the app": ["app", "no/bundle", "--port", "0"],
    "a bundle to time": ["bench", "export", "no/bundle"],
    "a bundle to show": ["info", "no/bundle"],
    "a recipe to show": ["recipe", "show", "papr"],
    "a command": ["distil"],
}


def refuse(arguments: list[str], folder: str) -> float:
    """Seconds from start to end; raises RuntimeError where it is not refused."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "mvmr", *arguments], cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode in (0, None) or "Traceback" in done.stderr:
        raise RuntimeError(f"mvmr {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-300:]}")
    return seconds


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results", show_default=True)
def main(rounds: int, out: Path) -> None:
    """Time every refusal, in turn."""
    console = measure.output()
    os.environ.pop("OMP_NUM_THREADS", None)  # as a user starts it
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: partial(refuse, arguments, folder) for name, arguments in MISTAKES.items()}
        wait = measure.CoreWait()
        seconds = measure.interleave(cases, rounds, "refuse")
    table = Table("a mistake in", "command", "seconds", title="From the start of a command to its one line")
    for name, arguments in MISTAKES.items():
        table.add_row(name, f"mvmr {arguments[0]}", str(seconds[name]))
    console.print(table)
    result = {
        "machine": measure.machine("cpu"), "settings": {"rounds": rounds}, "core_wait": wait.share(),
        "seconds": seconds, "slowest": max(spread.median for spread in seconds.values()),
    }  # fmt: skip
    console.print(f"the slowest: {result['slowest']:.2f} s")
    measure.save("refusals", result, out, console)


if __name__ == "__main__":
    main()
