"""A builder and an opener of a runtime that mvmr does not have, for a test: the float32 ONNX under another name."""

from __future__ import annotations

from mvmr.bundles.bundle import Bundle
from mvmr.export.artifacts import Artifact
from mvmr.export.attempt import Attempt, BuildOptions, Report
from mvmr.export.attempt import summarise as summarise
from mvmr.export.onnx import builder
from mvmr.export.onnx.session import Session

PROVIDER = "elsewhere"


def check(bundle: Bundle, options: BuildOptions, *, triton: bool) -> None:
    """Nothing is needed."""


def build(attempt: Attempt) -> Report:
    model = builder.write(attempt, "fp32")
    report = attempt.describe(attempt.compare(Session(model)), attempt.artifact.file, model)
    return attempt.accept(report, {attempt.artifact.file: model})


def locate(artifact: Artifact, bundle: Bundle) -> str:
    return artifact.file


def open_artifact(artifact: Artifact, bundle: Bundle, *, provider: str | None, threads: int | None) -> Session:
    assert provider in (None, PROVIDER)
    return Session(bundle.file(artifact.file), threads=threads)


def check_provider(provider: str) -> None:
    assert provider == PROVIDER
