"""One artifact on its way into the bundle: what its builder is given, and how it ends, in place or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.head import Head
from mvmr.bundles.manifest import plain_json
from mvmr.data import ImageSet
from mvmr.errors import MvmrError, missing_extra
from mvmr.export.artifacts import DENSE, EMBEDDING, LOGITS, Artifact, report_of
from mvmr.export.verification import LARGEST, Gates, Reference, Report, Run, verify
from mvmr.models.student import Student
from mvmr.progress import say
from mvmr.storage.atomic import write_json


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build, for those artifacts that there is a choice for; see `mvmr.export.export.export`."""

    opset: int
    provider: str
    batches: tuple[int, int, int]
    workspace_gb: float
    rebuild: bool
    dense: bool


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An artifact to be built of a student, compared with torch's reference, and put into the bundle.

    heads: those that the artifact gives the logits of; circumstances: JSON values that every report holds
    calibration: images for an artifact that is made with some
    """

    artifact: Artifact
    gates: Gates
    options: BuildOptions
    bundle: Bundle
    student: Student
    heads: Sequence[Head]
    reference: Reference
    calibration: ImageSet | None
    circumstances: Mapping[str, Any]
    progress: bool

    def compare(self, run: Run, batches: Sequence[int] = (1, 3, LARGEST)) -> Report:
        """Run it over the reference's images, and judge it with every head of the bundle, in its graph or not."""
        heads = [self.bundle.head(name) for name in self.bundle.heads]

        def infer(images: npt.NDArray[np.uint8]) -> Mapping[str, npt.NDArray[np.float32]]:
            outputs = run(images)
            logits = {f"{LOGITS}{head.name}": outputs[EMBEDDING] @ head.weight.T + head.bias for head in heads}
            return {**logits, **outputs}

        return verify(infer, self.reference, batches=batches, gates=self.gates, progress=self.progress)

    def describe(self, figures: Report, file: str, content: bytes) -> Report:
        """The report of a comparison; file: name of the content inside the bundle."""
        row = self.artifact
        subject = {"artifact": file, "format": row.key, "precision": row.precision, "bytes": len(content)}
        return {**subject, "sha256": hashlib.sha256(content).hexdigest(), **figures, **self.circumstances}

    def accept(self, report: Report, files: Mapping[str, bytes]) -> Report:
        """Put the files into the bundle, and take away the report of an earlier failure."""
        bundles.add_files(self.bundle, files)
        (self.bundle.path / report_of(report["artifact"], failed=True)).unlink(missing_ok=True)
        say(f"{self.bundle.path / report['artifact']}: verified and in place", shown=self.progress)
        return report

    def refuse(self, report: Report, where: str) -> MvmrError:
        """The error for an artifact below its gate; its report is left in the bundle's folder, not in its list."""
        file = self.bundle.path / report_of(report["artifact"], failed=True)
        write_json(file, plain_json(report, "report"))
        return MvmrError(
            f"{report['artifact']} does not do what torch does: {'; '.join(report['failures'])}; {where}; "
            f"it was not put in place, see {file}"
        )


class Builder(Protocol):
    """What the module that builds an artifact has to offer.

    check: refuse, before anything is computed, what this machine can't do; triton: whether the artifact then goes there
    build: make it, have the attempt compare it, and end in what `accept` returns, or raise what `refuse` does
    summarise: a report in one line, for people
    """

    def check(self, bundle: Bundle, options: BuildOptions, *, triton: bool) -> None: ...
    def build(self, attempt: Attempt) -> Report: ...
    def summarise(self, report: Report, bundle: Path) -> str: ...


def builder_of(artifact: Artifact) -> Builder:
    """Import and return the module that builds an artifact."""
    return cast(Builder, import_module(artifact.builder))


def summarise(report: Report, bundle: Path) -> str:
    """Where an artifact is, how large, how near to torch, and how fast."""
    latency = ", ".join(f"{value:.1f} ms at batch {size}" for size, value in report["latency_ms"].items())
    dense = f"dense cosine {report[DENSE]['cosine_min']:.6f} or more  " if DENSE in report else ""
    return (
        f"{bundle / report['artifact']}  {report['bytes'] / 1e6:.1f} MB  cosine {report['cosine_min']:.6f} or more, "
        f"centred {report['centred_cosine_mean']:.4f}  overlap@{report['neighbours']} {report['overlap']:.3f}  "
        f"{dense}{latency}"
    )


def check_package(name: str) -> None:
    """Refuse to go on without a package that is imported later; raises MvmrError with the extra that brings it."""
    if find_spec(name) is None:
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        raise missing_extra(error) or error


def to_json(report: Report) -> bytes:
    """A report as it stands in a file."""
    return f"{json.dumps(plain_json(report, 'report'), indent=2, ensure_ascii=False, allow_nan=False)}\n".encode()
