"""Build the engine for this machine's GPU, for the table of artifacts; or have TensorRT for RTX take the fp16 file.

TensorRT for RTX stands in where TensorRT, or its GPU, is not here: see `mvmr.export.tensorrt.rtx_build`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.errors import NotHere
from mvmr.export.artifacts import ARTIFACTS
from mvmr.export.attempt import Attempt, BuildOptions, to_json
from mvmr.export.attempt import summarise as summarise_verified
from mvmr.export.runtimes import check_provider, open_artifact
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_build
from mvmr.export.tensorrt.opener import any_batch
from mvmr.export.tensorrt.rtx_provider import NAME as RTX
from mvmr.export.verification import Report
from mvmr.progress import say

_FP16 = ARTIFACTS["fp16"]


def check(bundle: Bundle, options: BuildOptions, *, triton: bool) -> None:
    """Refuse batches that can't be, and a machine with neither TensorRT and its GPU nor TensorRT for RTX."""
    tensorrt.profile(options.batches, bundle.manifest.preprocessing.crop)
    if not _takes_rtx(triton=triton):
        return
    rtx_build.package()
    with suppress(NotHere):  # then it is built, and not verified
        check_provider(RTX)


def build(attempt: Attempt) -> Report:
    """Build the engine of the fp16 ONNX in the bundle, which has been verified by now."""
    return _build_with_rtx(attempt) if _takes_rtx() else _build_engine(attempt)


def summarise(report: Report, bundle: Path) -> str:
    """The report of an engine, or of one that could not be run here."""
    if report["passed"] is not None:
        return summarise_verified(report, bundle)
    return (
        f"{bundle / report['artifact']}  TensorRT for RTX {report['tensorrt_rtx']} builds it in "
        f"{report['engine_seconds']:.1f} s, an engine of {report['engine_bytes'] / 1e6:.1f} MB; not run here: "
        f"{report['not_run']}. Where it runs: mvmr serve {bundle} --provider {RTX}"
    )


def _takes_rtx(*, triton: bool = False) -> bool:
    """Whether TensorRT or its GPU is not here, but TensorRT for RTX; raises NotHere where that is not either."""
    try:
        tensorrt.package(tensorrt.device())
    except NotHere:
        if triton or not rtx_build.is_installed():  # Triton takes TensorRT's engines
            raise
        return True
    return False


def _build_engine(attempt: Attempt) -> Report:
    bundle, options = bundles.load(attempt.bundle.path), attempt.options
    cache = bundle.file(tensorrt.TIMING_CACHE).read_bytes() if tensorrt.TIMING_CACHE in bundle.manifest.files else None
    if not options.rebuild and tensorrt.needs_rebuild(bundle, batches=options.batches) is None:
        stored = tensorrt.find(bundle)
        built = tensorrt.BuiltEngine(engine=stored.path.read_bytes(), timing_cache=cache or b"", sidecar=stored.sidecar)
    else:
        built = tensorrt.build(
            bundle.file(_FP16.file).read_bytes(), size=attempt.student.preprocess.crop, batches=options.batches,
            workspace_gb=options.workspace_gb, timing_cache=cache,
        )  # fmt: skip
    low, _, high = options.batches
    engine = tensorrt.Engine(built.engine, built.sidecar, onnx_sha256=bundle.manifest.files[_FP16.file])
    figures = attempt.compare(any_batch(engine, low, high), sorted({max(size, low) for size in (1, 3, high)}))
    report = attempt.describe(figures | {"provider": "tensorrt"}, built.name, built.engine)
    if not report["passed"]:
        raise attempt.refuse(report, "its layers can't be looked into; the fp16 ONNX it was built from has passed")
    return attempt.accept(report, built.to_files(report))


def _build_with_rtx(attempt: Attempt) -> Report:
    """Have TensorRT for RTX build the fp16 ONNX; where it finds a GPU, verify the file as it will be served."""
    bundle, options = bundles.load(attempt.bundle.path), attempt.options
    model = bundle.file(_FP16.file).read_bytes()
    facts = rtx_build.build(
        model, size=attempt.student.preprocess.crop, batches=options.batches, workspace_gb=options.workspace_gb
    )
    try:
        check_provider(RTX)
    except NotHere as error:
        figures: Report = {"passed": None, "not_run": str(error)}
    else:
        figures = attempt.compare(open_artifact(_FP16, bundle, provider=RTX))
    report = {**facts, **attempt.describe(figures, _FP16.file, model), "provider": RTX}
    if report["passed"] is False:
        raise attempt.refuse(report, "the same file has passed on the processor")
    bundles.add_files(attempt.bundle, {rtx_build.report_name(facts["tensorrt_rtx"]): to_json(report)})
    how = f"TensorRT for RTX {facts['tensorrt_rtx']} builds it in {facts['engine_seconds']:.1f} s"
    say(f"{bundle.path / _FP16.file}: {how}", shown=attempt.progress)
    return report
