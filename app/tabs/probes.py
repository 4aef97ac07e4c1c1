"""Linear probes of both sides, fitted on the training split of the gallery's data and kept."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvmr import __version__
from mvmr.app.embedders.embedder import Encoder
from mvmr.app.gallery import Gallery
from mvmr.bundles.preprocess import Background
from mvmr.data import ImageSet
from mvmr.errors import MvmrError
from mvmr.evaluation.classifiers import LinearHead, linear_probe
from mvmr.evaluation.evaluate import open_labelled
from mvmr.evaluation.scores import top_k
from mvmr.storage.atomic import write_json

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
Advance = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """The training split that probes are fitted on, one label to an image; labels: int64 [M], into `classes`."""

    images: ImageSet
    labels: Labels
    classes: tuple[str, ...]

    @classmethod
    def open(
        cls, data: str, classes: Sequence[str] | None, *, background: Background, max_unreadable: float = 0.01
    ) -> Training:
        """Open the training split of the gallery's `data`; classes, background: the gallery's.

        Raises:
            MvmrError: there is none that a probe can be fitted on, for the reasons that `mvmr evaluate` gives.
        """
        labelled = open_labelled(data, background=background, max_unreadable=max_unreadable)
        if labelled.several:
            raise MvmrError(f"an image of {data} has several labels, and a probe takes one: see mvmr evaluate")
        if tuple(classes or ()) != labelled.classes:
            raise MvmrError(f"the gallery has other classes than the training split of {data}: no probe for it")
        return cls(images=labelled.train, labels=labelled.labels, classes=labelled.classes)

    def rows(self, encoder: Encoder, folder: Path, advance: Advance | None = None) -> Floats:
        """Embeddings of the training split, float32 [M, D]; computed once and kept in `folder`."""
        return Gallery(self.images).embeddings(encoder, folder, advance)

    def probe(self, encoder: Encoder, folder: Path, advance: Advance | None = None) -> LinearHead:
        """The linear probe of one side, as `mvmr report` fits it; fitted once and kept in `folder` as JSON."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        key = {"encoder": encoder.identity, "images": self.images.fingerprint, "labels": digest, "mvmr": __version__}
        file = folder / f"probe-{_digest(key)}.json"
        if (stored := _read_head(file)) is not None:
            return stored
        head = linear_probe(self.rows(encoder, folder, advance), self.labels, len(self.classes))
        weights = {"shape": list(head.weight.shape), "weight": _pack(head.weight), "bias": _pack(head.bias)}
        write_json(file, weights | {"chosen": dict(head.chosen)})
        return head


def _digest(key: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _pack(values: Floats) -> str:
    """float32 values as text, bit for bit."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _read_head(file: Path) -> LinearHead | None:
    """The probe that was kept, or None where there is none, or a damaged one."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        weight, bias = (
            np.frombuffer(base64.b64decode(record[name], validate=True), "<f4") for name in ("weight", "bias")
        )
        return LinearHead(weight.reshape(record["shape"]).copy(), bias.copy(), record["chosen"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class ProbeResult:
    """What the linear probe of one side says of the gallery; predicted: int64 [N]; top1: in percent."""

    predicted: Labels
    top1: float

    @classmethod
    def of(cls, head: LinearHead, rows: Floats, labels: Labels) -> ProbeResult:
        """Ask a probe about rows [N, D] of the true classes `labels`, int64 [N]."""
        return cls(head.predict(rows), top_k(head.logits(rows), labels, 1))


@dataclass(frozen=True)
class Probes:
    """The probes of both sides, each fitted on the training split under its own side."""

    teacher: ProbeResult
    student: ProbeResult
