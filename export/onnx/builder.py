"""Build the ONNX files in float32 and half precision, for the table of artifacts."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from mvmr.bundles.bundle import Bundle
from mvmr.export.artifacts import EMBEDDING, Precision, canary, encode_canary, metadata, report_of, staleness
from mvmr.export.attempt import Attempt, BuildOptions, check_package, to_json
from mvmr.export.attempt import summarise as summarise
from mvmr.export.onnx.drift import first_drift
from mvmr.export.onnx.graph import emulate_half, to_onnx
from mvmr.export.onnx.session import Session, check_provider
from mvmr.export.verification import Report
from mvmr.models.student import Student
from mvmr.progress import say

# Of each student, as long as it is there: torch's exporter takes seconds, and gives the same every time. A student is
# opened anew for each export, so that the weights of its heads need not be compared.
_WRITTEN: WeakKeyDictionary[Student, dict[tuple[int, bool, str], bytes]] = WeakKeyDictionary()


def check(bundle: Bundle, options: BuildOptions, *, triton: bool) -> None:
    """Refuse to go on without what writes an ONNX file, or a provider that can't be had."""
    check_package("onnxscript")
    check_provider(options.provider)


def build(attempt: Attempt) -> Report:
    """Export the student in the artifact's precision, and verify the file on the provider asked for."""
    return verify_file(attempt, write(attempt, attempt.artifact.precision), attempt.options.provider)


def write(attempt: Attempt, precision: Precision) -> bytes:
    """The student as an ONNX file in fp32 or fp16; int8 takes the fp32 file that was written before it."""
    opset, dense = attempt.options.opset, attempt.options.dense
    about = metadata(attempt.bundle, attempt.heads, precision)
    files, key = _WRITTEN.setdefault(attempt.student, {}), (opset, dense, repr(about))
    if key not in files:
        say(f"exporting {precision}, opset {opset}", shown=attempt.progress)
        files[key] = to_onnx(
            attempt.student, attempt.heads, precision=precision, opset=opset, metadata=about, dense=dense
        )
    return files[key]


def verify_file(attempt: Attempt, model: bytes, provider: str, **more: object) -> Report:
    """Verify an ONNX file; put it into the bundle, or say where it goes wrong.

    more: JSON values, added to the report.
    """
    session, file = Session(model, provider=provider), attempt.artifact.file
    figures = attempt.compare(session)
    if attempt.artifact.precision == "fp16" and provider == "cpu":
        # a CPU computes fp16 files in float32: nothing overflows there that would on a GPU
        as_file, figures = figures, attempt.compare(Session(emulate_half(model)))
        figures |= {"latency_ms": as_file["latency_ms"], "rounded": True, "file_on_cpu": as_file}
        figures |= {"failures": [*dict.fromkeys((*as_file["failures"], *figures["failures"]))]}
    if reason := staleness(session.metadata, attempt.bundle):
        figures["failures"].insert(0, reason)
    figures["passed"] = not figures["failures"]
    report = attempt.describe(figures, file, model)
    report |= {"opset": attempt.options.opset, "provider": provider, **more}
    report["canary"] = encode_canary(session(canary(attempt.student.preprocess.crop))[EMBEDDING][0])
    if not report["passed"]:
        drift = first_drift(model, attempt.student, attempt.reference.images)
        report["drift"] = drift
        error = "not finite" if drift["error"] is None else f"relative error {drift['error']:.2g}"
        raise attempt.refuse(report, f"it drifts first at {drift['layer']} ({error})")
    return attempt.accept(report, {file: model, report_of(file): to_json(report)})
