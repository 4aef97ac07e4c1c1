"""How a user names teachers, and what can be said of a spec before anything is loaded: no torch is imported here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mvmr.bundles.manifest import WEIGHTS
from mvmr.errors import MvmrError, nearest, unknown

NAME = "teacher"  # of one that is given none
# The kinds, each a module beside this one with a function `load`; the first is meant where a spec names none.
CLIP = "open_clip"
KINDS = {
    CLIP: "clip",
    "timm": "timm_model",
    "torchvision": "torchvision_model",
    "onnx": "onnx_model",
    "python": "python_module",
    "rows": "stored_rows",
}
# What recipes and tables call something else; a test holds it to the representations that there are.
RESERVED = ("student", "pixels", "scattering", "hog", "local_std", "augmented_pixels")
HUB = "hf-hub:"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Spec:
    """A teacher as a user names it, `[NAME=][KIND:]WHAT`.

    name: what the recipe and reports call it; kind: a key of `KINDS`
    """

    name: str
    kind: str
    what: str

    @classmethod
    def parse(cls, text: str | Path) -> Spec:
        """Read a spec; without a kind it is an open_clip model, or a folder in open_clip's hub format.

        Raises: MvmrError for a name that is none.
        """
        name, equals, model = str(text).partition("=")
        if not equals or "/" in name or ":" in name:  # a path or a spec may hold one, too
            name, model = NAME, str(text)
        if not _NAME.fullmatch(name):
            raise MvmrError(f"teacher {text}: {name!r} is no name; give letters and digits, such as clip=ViT-B-16")
        if name in RESERVED:
            raise MvmrError(f"teacher {text}: {name!r} is what recipes and tables call something else")
        kind, colon, what = model.partition(":")
        if colon and kind in KINDS:
            return cls(name, kind, what)
        return cls(name, CLIP, model)

    def __str__(self) -> str:
        return self.what if self.kind == CLIP else f"{self.kind}:{self.what}"


def parse_specs(specs: str | Path | Iterable[str | Path]) -> list[Spec]:
    """Read one spec or several, each of a name of its own.

    Raises: MvmrError for a name that is none, is given twice, or stands for something else.
    """
    texts = [specs] if isinstance(specs, str | Path) else list(specs)
    if not texts:
        raise MvmrError("no teacher is given: --teacher ViT-B-16")
    parsed = [Spec.parse(text) for text in texts]
    for number, spec in enumerate(parsed):
        if spec.name in [earlier.name for earlier in parsed[:number]]:
            raise MvmrError(f"two teachers are called {spec.name}: give each a name, such as clip=ViT-B-16")
    return parsed


def check_names(specs: Sequence[Spec]) -> None:
    """Refuse models of open_clip's that there are not, long before open_clip is imported.

    Raises: MvmrError that names the nearest.
    """
    for spec in specs:
        if spec.kind == CLIP and (known := _open_clip_names()):
            name, _ = split_weights(spec.what)
            missing = name.replace("/", "-") not in known and not name.startswith(HUB) and not Path(name).is_dir()
            if missing and not (os.sep in name and nearest(name.replace("/", "-"), known) is None):
                raise unknown("teacher", name, known)


def split_weights(what: str) -> tuple[str, str]:
    """Model and weights of open_clip's `NAME[:TAG|FILE]`; a folder and a repository of the hub have their own ("")."""
    if what.startswith(HUB) or Path(what).is_dir():
        return what, ""
    name, _, weights = what.partition(":")
    return name, weights


def place_of(record: Mapping[str, Any], bundle: Path) -> tuple[str, str]:
    """Weights and `what` of a teacher that a bundle records, as they are to be opened from here.

    A file that lay beside the bundle is recorded from the bundle on, so that both may move together; any other by its
    whole path. (Bundles of before record what was typed, from the folder where it was typed.)
    """
    weights, what = str(record["weights"]), str(record.get("what", ""))
    if record.get("beside"):
        weights = os.path.normpath(os.path.join(os.path.abspath(bundle), weights))
    return weights, what.replace(WEIGHTS, weights)


@cache
def _open_clip_names() -> tuple[str, ...]:
    """The models that open_clip has a configuration of; none where it is not installed, or keeps them elsewhere."""
    package = find_spec("open_clip")
    folders = [Path(place) / "model_configs" for place in (package.submodule_search_locations or ())] if package else []
    return tuple(sorted(file.stem for folder in folders for file in folder.glob("*.json")))
