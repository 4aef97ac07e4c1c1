"""How many threads compute: told before the libraries that start them are imported."""

from __future__ import annotations

import os
import sys

import click

from mvmr.cores import free_cores, usable_cores
from mvmr.progress import say

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_NOTE = "mvmr.threads"


def _use(context: click.Context, parameter: click.Parameter, threads: int | None) -> None:
    if context.resilient_parsing or (threads is None and _VARIABLES[0] in os.environ):
        return
    usable, count = usable_cores(), threads or free_cores()
    if threads is None and count < usable:
        context.meta[_NOTE] = f"{usable - count} of {usable} cores are busy with other work: computing with {count}"
    os.environ.update(dict.fromkeys(_VARIABLES, str(count)))  # processes of ours inherit it
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


# Of every command that computes by torch; no parameter of its function, which finds the threads as they are.
THREADS = click.option(
    "--threads",
    type=click.IntRange(1),
    expose_value=False,
    callback=_use,
    help="Threads that compute on the processor; left out, one to a core that nobody else is busy on.",
)


def note_threads() -> None:
    """Say that fewer threads than cores compute, where that was not asked for."""
    if (context := click.get_current_context(silent=True)) and (note := context.meta.get(_NOTE)):
        say(f"{note} (--threads)")
