"""Progress of long work: a bar with rate and time left on a terminal, now and then a line where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def track(
    label: str, start: int, total: int, *, unit: str = "img", per_step: int = 1, shown: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Yield ``advance(done, note)``; progress goes to standard error.

    Args:
        start, total, done: in steps.
        per_step: units a step stands for, for the rate.
        shown: false shows nothing.
    """
    if not shown:
        yield _silent
        return
    console = Console(stderr=True)
    began = time.perf_counter()

    def rate(done: int) -> str:
        return f"{(done - start) * per_step / max(1e-9, time.perf_counter() - began):,.0f} {unit}/s"

    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, completed=start, rate="", note="")

            def update(done: int, note: str = "") -> None:
                bar.update(task, completed=done, rate=rate(done), note=note)

            yield update
        return

    line_time = began

    def line(done: int, note: str = "") -> None:
        nonlocal line_time
        now = time.perf_counter()
        if now - line_time < _SECONDS_BETWEEN_LINES and done < total:
            return
        line_time = now
        left = (now - began) / max(1, done - start) * (total - done)
        sys.stderr.write(f"{label} {done}/{total}  {rate(done)}  eta {left:.0f} s  {note}\n")
        sys.stderr.flush()

    yield line


def is_wanted(progress: bool | None) -> bool:
    """Whether to show progress: as asked for, and else where somebody looks on, at a terminal or in a notebook."""
    if progress is not None:
        return progress
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def say(line: str, *, shown: bool = True) -> None:
    """Write a line to standard error, like the progress itself."""
    if shown:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def say_plan(**facts: object) -> None:
    """What is about to be done, before it starts."""
    for name, value in facts.items():
        say(f"{name:<8} {value}")


def _silent(done: int, note: str = "") -> None:
    pass
