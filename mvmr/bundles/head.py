"""A linear head on the features: how it stands in a bundle (torch-free)."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mvmr import strict_json
from mvmr.bundles.manifest import check_record
from mvmr.errors import MvmrError, one_line, shorten

WEIGHTS, DESCRIPTION = "head.safetensors", "head.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = features @ weight.T + bias, on raw (not normalised) features.

    Shapes: weight float32 [C, D], bias float32 [C]; classes: C names.
    metrics: the record of how well it did, and by which command (keys as in bundle.json).
    Raises: MvmrError for a bad name, arrays that don't fit one another, values that are not finite,
        doubled classes, or a class that is no Unicode text.
    """

    name: str
    weight: Floats
    bias: Floats
    classes: tuple[str, ...]
    metrics: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise MvmrError(
                f"head name {shorten(self.name)!r} is not allowed; use at most 64 letters, digits, dots, dashes and "
                "underscores, a letter or digit first"
            )
        count = len(self.classes)
        if self.weight.ndim != 2 or self.weight.shape[0] != count or self.bias.shape != (count,) or not count:
            shapes = f"weight {list(self.weight.shape)}, bias {list(self.bias.shape)}"
            raise MvmrError(f"head {self.name}: {shapes} and {count} classes do not fit one another")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise MvmrError(f"head {self.name} holds values that are not finite; fit it again")
        if len(set(self.classes)) != count:
            raise MvmrError(f"head {self.name} names a class twice among {count}; class names must differ")
        if strange := [name for name in self.classes if name.encode("utf-8", "replace").decode() != name]:
            raise MvmrError(
                f"head {self.name} has the class {shorten(strange[0])!r}, which is no Unicode text; rename its folder"
            )

    def probabilities(self, features: Floats) -> Floats:
        """Softmax of the logits: float32 [N, D] -> float32 [N, C], rows sum to 1."""
        logits = features @ self.weight.T + self.bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)

    def to_files(self) -> dict[str, bytes]:
        """Return the content of the head's files, by path inside the bundle."""
        folder = f"heads/{self.name}"
        description = {"name": self.name, "classes": list(self.classes), "metrics": dict(self.metrics)}
        arrays = {"weight": np.ascontiguousarray(self.weight), "bias": np.ascontiguousarray(self.bias)}
        return {
            f"{folder}/{WEIGHTS}": save(arrays),
            f"{folder}/{DESCRIPTION}": (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(),
        }


def make(
    name: str, weight: npt.ArrayLike, bias: npt.ArrayLike, classes: Sequence[str], metrics: Mapping[str, Any]
) -> Head:
    """Make a head from arrays (or CPU tensors) and the record of its accuracy; raises as `Head` does."""
    arrays = np.asarray(weight, dtype=np.float32), np.asarray(bias, dtype=np.float32)
    record = check_record({**metrics, "head": name})
    return Head(name=name, weight=arrays[0], bias=arrays[1], classes=tuple(map(str, classes)), metrics=record)


def read(weights: Path, description: Path) -> Head:
    """Read a head from its two files.

    Raises: MvmrError naming the file that is missing, broken, or does not fit the other.
    """
    content = strict_json.read_object(description, "the description of a head")
    arrays = read_arrays(weights, ("weight", "bias"))
    try:
        classes = content["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError("its classes are no list of names")
        return Head(
            name=str(content["name"]),
            weight=arrays["weight"],
            bias=arrays["bias"],
            classes=tuple(classes),
            metrics=dict(content["metrics"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MvmrError(f"{description} does not describe a head ({type(error).__name__}: {error})") from error


def read_arrays(weights: Path, names: Sequence[str]) -> dict[str, Floats]:
    """Read arrays of floating point from a safetensors file, as float32.

    Raises: MvmrError naming the file that is missing or broken, or lacks one of `names` or holds it in another type.
    """
    try:
        arrays = load_file(weights)
    except OSError as error:
        raise MvmrError(f"cannot read {weights}: {error.strerror or error}; take a whole copy") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # types that numpy lacks are KeyErrors
        raise MvmrError(f"{weights} is not a whole safetensors file ({one_line(error)}); take a whole copy") from error
    for name in names:
        if name not in arrays or arrays[name].dtype.kind != "f":
            seen = arrays[name].dtype if name in arrays else ", ".join(map(shorten, arrays)) or "nothing"
            raise MvmrError(f"{weights} has no floating-point {name!r} but {shorten(seen)}; take a whole copy")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which its owner refuses
        return {name: arrays[name].astype(np.float32) for name in names}
