"""Where the recipes of each command lie; they are read without torch."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

# command -> package and folder; a name without a command is looked for in this order
SHELVES = {
    "distill": ("mvmr.distillation", ("recipes",)),
    "pretrain": ("mvmr", ("recipes",)),
    "finetune": ("mvmr", ("recipes", "finetune")),
}


def shelf_of(command: str) -> Traversable:
    """The folder of the recipes that ship for ``command``, one of ``SHELVES``."""
    package, folders = SHELVES[command]
    return resources.files(package).joinpath(*folders)
