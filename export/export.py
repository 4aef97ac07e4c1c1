"""`export`: a bundle's student as ONNX files and engines, each put into the bundle only after it has been verified."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvmr import __version__
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.head import Head
from mvmr.bundles.manifest import plain_json
from mvmr.cores import usable_cores
from mvmr.data import ImageSet
from mvmr.errors import MvmrError, NotHere, missing_extra, unknown
from mvmr.export.artifacts import (
    EMBEDDING,
    FORMATS,
    LOGITS,
    Precision,
    artifact,
    canary,
    check_formats,
    check_opset,
    encode_canary,
    metadata,
    report_of,
    staleness,
)
from mvmr.export.images import IMAGES, to_calibrate_with, to_verify_with
from mvmr.export.onnx.drift import first_drift
from mvmr.export.onnx.graph import rounded, to_onnx
from mvmr.export.onnx.session import PROVIDERS, Session, check_provider
from mvmr.export.tensorrt.rtx_provider import NAME as RTX
from mvmr.export.verification import LARGEST, Gates, Reference, Report, Run, verify
from mvmr.models.student import Student
from mvmr.progress import say
from mvmr.storage.atomic import write_json

BATCHES = (1, 8, 64)
DEVICES = tuple(PROVIDERS)

Images = npt.NDArray[np.uint8]


def export(
    bundle: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("onnx",),
    heads: Sequence[str] | str = (),
    data: str | None = None,
    calibration: str | None = None,
    images: int = IMAGES,
    opset: int = 20,
    gates: Sequence[str] = (),
    triton: str | os.PathLike[str] | None = None,
    batches: tuple[int, int, int] = BATCHES,
    workspace_gb: float = 4.0,
    rebuild: bool = False,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> dict[str, Report]:
    """Export a bundle's student and put each artifact into the bundle, beside a report, once it has passed its gate.

    Args:
        formats: of ``onnx`` (fp32), ``fp16``, ``int8`` and ``trt``, which brings fp16 along. Where TensorRT or its GPU
            is not there and TensorRT for RTX is here, ``trt`` stands for that: see `docs/export.md`.
        heads: names of linear heads to put into the graph, or ``all``.
        data: images to verify with; left out, the test split of what the student was trained on, or all of it.
        calibration: images that int8's ranges are taken from, at least 100; left out, the training data.
        images: how many to verify with, drawn at random.
        gates: changes to the gates, such as ``"cosine_min=0.999"`` (see :class:`mvmr.export.verification.Gates`).
        triton: folder of a Triton model repository, which the last of the formats is added to.
        batches: the smallest, the usual and the largest batch of an engine; workspace_gb: memory to build it in.
        rebuild: build the engine again even where the bundle has one that fits.
        device: onnxruntime's provider that fp32 and fp16 are verified on: ``cpu``, ``cuda``, ``tensorrt`` or
            ``tensorrt-rtx``.

    Returns:
        The reports by format, as they stand beside the artifacts.

    Raises:
        MvmrError: what can't be exported, before anything is computed; or an artifact that does not pass its gate,
            which is not put in place: an earlier one stays, and the report is left beside it as ``.failed.json``.
    """
    check_formats(formats)
    check_opset(opset)
    opened = bundles.load(bundle)
    wanted = [name for name in FORMATS if name in formats or (name == "fp16" and "trt" in formats)]
    limits = {name: Gates.of(FORMATS[name], gates) for name in wanted}
    rtx = _check_machine(wanted, opened, batches=batches, triton=triton, device=device)
    served = _heads(opened, heads)
    chosen, drawn = to_verify_with(opened, data, count=images, max_unreadable=max_unreadable, progress=progress)
    ranges = None
    if "int8" in wanted:
        ranges = to_calibrate_with(opened, calibration, max_unreadable=max_unreadable, progress=progress)
    student = opened.student()
    work = _Work(
        bundle=opened,
        student=student,
        heads=served,
        reference=_reference(student, chosen, [opened.head(name) for name in opened.heads], progress),
        described=drawn | _circumstances(opened),
        gates=limits,
        opset=opset,
        device=device,
        progress=progress,
    )
    reports: dict[str, Report] = {}
    for name in wanted:
        if name == "trt" and rtx:
            reports[name] = work.rtx(batches=batches, workspace_gb=workspace_gb)
        elif name == "trt":
            reports[name] = work.engine(batches=batches, workspace_gb=workspace_gb, rebuild=rebuild)
        elif name == "int8" and ranges is not None:
            reports[name] = work.int8(ranges)
        else:
            reports[name] = work.onnx(name)
    if triton is not None:
        _add_to_repository(bundles.load(opened.path), wanted[-1], served, Path(triton), batches, device)
    return reports


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One student on its way out: what all its artifacts are compared with, and put into."""

    bundle: Bundle
    student: Student
    heads: Sequence[Head]
    reference: Reference
    described: Mapping[str, Any]
    gates: Mapping[str, Gates]
    opset: int
    device: str
    progress: bool

    def onnx(self, name: str) -> Report:
        return self.settle(name, self.graph(FORMATS[name]), self.device)

    def int8(self, images: ImageSet) -> Report:
        from mvmr.export.onnx.int8 import search

        def batches() -> Iterator[Images]:
            for start in range(0, len(images), 32):
                part = range(start, min(start + 32, len(images)))
                yield self.student.preprocess.batch(images.load(index) for index in part)

        def judge(model: bytes) -> Report:
            return self.compare(Session(model), "int8")

        model, kept, trail = search(self.graph("fp32"), batches(), judge, progress=self.progress)
        calibrated = {"data": images.name, "split": images.split, "images": len(images)}
        return self.settle("int8", model, "cpu", kept_float=kept, search=trail, calibration=calibrated)

    def engine(self, *, batches: tuple[int, int, int], workspace_gb: float, rebuild: bool) -> Report:
        from mvmr.export.tensorrt import engine as tensorrt

        now = bundles.load(self.bundle.path)
        cache = now.file(tensorrt.TIMING_CACHE).read_bytes() if tensorrt.TIMING_CACHE in now.manifest.files else None
        if not rebuild and tensorrt.needs_rebuild(now, batches=batches) is None:
            stored = tensorrt.find(now)
            built = tensorrt.Built(engine=stored.path.read_bytes(), timing_cache=cache or b"", sidecar=stored.sidecar)
        else:
            built = tensorrt.build(
                now.file(artifact("fp16")).read_bytes(), size=self.student.preprocess.crop, batches=batches,
                workspace_gb=workspace_gb, timing_cache=cache,
            )  # fmt: skip
        engine = tensorrt.Engine(built.engine, built.sidecar, onnx_sha256=now.manifest.files[artifact("fp16")])
        sizes = sorted({max(size, batches[0]) for size in (1, 3, batches[2])})
        found = self.compare(_padded(engine, batches[0]), "trt", sizes) | {"provider": "tensorrt"}
        report = self.describe("trt", found, built.name, built.engine)
        if not report["passed"]:
            raise self.refuse(report, "its layers can't be looked into; the fp16 ONNX it was built from has passed")
        return self.accept(report, built.to_files(report))

    def rtx(self, *, batches: tuple[int, int, int], workspace_gb: float) -> Report:
        """Have TensorRT for RTX build the fp16 ONNX; where it finds a GPU, verify the file as it will be served."""
        from mvmr.export.tensorrt import rtx_build

        place = artifact("fp16")
        file = bundles.load(self.bundle.path).file(place)
        model = file.read_bytes()
        built = rtx_build.build(model, size=self.student.preprocess.crop, batches=batches, workspace_gb=workspace_gb)
        try:
            check_provider(RTX)
        except NotHere as error:
            found: Report = {"passed": None, "not_run": str(error)}
        else:
            found = self.compare(Session(file, provider=RTX), "trt")
        report = {**built, **self.describe("trt", found, place, model), "provider": RTX}
        if report["passed"] is False:
            raise self.refuse(report, "the same file has passed on the processor")
        bundles.add_files(self.bundle, {rtx_build.report_name(built["tensorrt_rtx"]): _json(report)})
        told = f"TensorRT for RTX {built['tensorrt_rtx']} builds it in {built['engine_seconds']:.1f} s"
        say(f"{self.bundle.path / place}: {told}", shown=self.progress)
        return report

    def graph(self, precision: Precision) -> bytes:
        says = metadata(self.bundle, self.heads, precision)
        say(f"exporting {precision}, opset {self.opset}", shown=self.progress)
        return to_onnx(self.student, self.heads, precision=precision, opset=self.opset, metadata=says)

    def compare(self, run: Run, name: str, batches: Sequence[int] = (1, 3, LARGEST)) -> Report:
        judged = _with_heads(run, [self.bundle.head(name) for name in self.bundle.heads])
        return verify(judged, self.reference, batches=batches, gates=self.gates[name], progress=self.progress)

    def settle(self, name: str, model: bytes, device: str, **more: object) -> Report:
        """Verify an ONNX file; put it into the bundle, or say where it goes wrong."""
        precision = FORMATS[name]
        session = Session(model, provider=device)
        found = self.compare(session, name)
        if precision == "fp16" and device == "cpu":
            # a CPU computes fp16 files in float32: nothing overflows there that would on a GPU
            as_file, found = found, self.compare(Session(rounded(model)), name)
            found |= {"latency_ms": as_file["latency_ms"], "rounded": True, "file_on_cpu": as_file}
            found |= {"failures": [*dict.fromkeys((*as_file["failures"], *found["failures"]))]}
        if stale := staleness(session.metadata, self.bundle):
            found["failures"].insert(0, stale)
        found["passed"] = not found["failures"]
        place = artifact(precision)
        report = self.describe(name, found, place, model) | {"opset": self.opset, "provider": device, **more}
        report["canary"] = encode_canary(session(canary(self.student.preprocess.crop))[EMBEDDING][0])
        if not report["passed"]:
            drift = first_drift(model, self.student, self.reference.images)
            report["drift"] = drift
            told = "not finite" if drift["error"] is None else f"relative error {drift['error']:.2g}"
            raise self.refuse(report, f"it drifts first at {drift['layer']} ({told})")
        return self.accept(report, {place: model, report_of(place): _json(report)})

    def describe(self, name: str, found: Report, place: str, content: bytes) -> Report:
        said = {"artifact": place, "format": name, "precision": FORMATS[name], "bytes": len(content)}
        return {**said, "sha256": hashlib.sha256(content).hexdigest(), **found, **self.described}

    def accept(self, report: Report, files: Mapping[str, bytes]) -> Report:
        bundles.add_files(self.bundle, files)
        (self.bundle.path / report_of(report["artifact"], failed=True)).unlink(missing_ok=True)
        say(f"{self.bundle.path / report['artifact']}: verified and in place", shown=self.progress)
        return report

    def refuse(self, report: Report, where: str) -> MvmrError:
        """The error for an artifact below its gate; its report is left in the bundle's folder, not in its list."""
        left = self.bundle.path / report_of(report["artifact"], failed=True)
        write_json(left, plain_json(report, "report"))
        return MvmrError(
            f"{report['artifact']} does not do what torch does: {'; '.join(report['failures'])}; {where}; "
            f"it was not put in place, see {left}"
        )


def _check_machine(
    wanted: Sequence[str],
    bundle: Bundle,
    *,
    batches: tuple[int, int, int],
    triton: str | os.PathLike[str] | None,
    device: str,
) -> bool:
    """Refuse what this machine can't do: missing packages, no GPU for an engine or a provider.

    Returns: whether TensorRT for RTX stands in for TensorRT, which or whose GPU is not here.
    """
    for package in ("onnxscript", *(["tritonclient"] if triton is not None else [])):
        if find_spec(package) is None:
            error = ModuleNotFoundError(f"No module named {package!r}", name=package)
            raise missing_extra(error) or error
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    check_provider(device)
    if "trt" not in wanted:
        return False
    from mvmr.export.tensorrt import engine as tensorrt
    from mvmr.export.tensorrt import rtx_build

    tensorrt.profile(batches, bundle.manifest.preprocessing.crop)
    try:
        tensorrt.package(tensorrt.device())
    except NotHere:
        if not rtx_build.installed() or (triton is not None and wanted[-1] == "trt"):  # Triton takes TensorRT's engines
            raise
    else:
        return False
    rtx_build.package()
    with suppress(NotHere):  # then it is built, and not verified
        check_provider(RTX)
    return True


def _heads(bundle: Bundle, names: Sequence[str] | str) -> list[Head]:
    asked = [names] if isinstance(names, str) else names
    return [bundle.head(name) for name in dict.fromkeys(bundle.heads if "all" in asked else asked)]


def _reference(student: Student, images: ImageSet, heads: Sequence[Head], progress: bool) -> Reference:
    prepared = student.preprocess.batch(images.load(index) for index in range(len(images)))
    return Reference.of(student, prepared, heads, labels=images.labels, classes=images.classes or (), progress=progress)


def _with_heads(run: Run, heads: Sequence[Head]) -> Run:
    """An artifact that also gives the logits of heads which are not in its graph: every head is judged."""

    def outputs(images: Images) -> Mapping[str, npt.NDArray[np.float32]]:
        found = dict(run(images))
        logits = {f"{LOGITS}{head.name}": found[EMBEDDING] @ head.weight.T + head.bias for head in heads}
        return logits | found

    return outputs


def _circumstances(bundle: Bundle) -> Report:
    packages = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {
        "bundle_hash": bundle.manifest.files[bundles.ENCODER],
        "bundle_space_id": bundle.space_id,
        "versions": {"mvmr": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages if find_spec(name)},
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": usable_cores()},
    }


def _padded(engine: Run, lowest: int) -> Run:
    """An engine that also takes fewer images than its profile: copies of the first are added, and cut off again."""

    def run(images: Images) -> Mapping[str, npt.NDArray[np.float32]]:
        lacking = max(0, lowest - len(images))
        outputs = engine(np.concatenate([images, np.repeat(images[:1], lacking, axis=0)]))
        return {name: rows[: len(images)] for name, rows in outputs.items()}

    return run


def _add_to_repository(
    bundle: Bundle, name: str, heads: Sequence[Head], out: Path, batches: tuple[int, int, int], device: str
) -> None:
    from mvmr.export import triton
    from mvmr.export.tensorrt import engine as tensorrt

    says, engine = bundle.manifest, name == "trt"
    triton.repository(
        tensorrt.find(bundle).path if engine else bundle.file(artifact(FORMATS[name])),
        out,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.path.resolve().name).strip("._-") or "student",
        platform="tensorrt" if engine else "onnxruntime",
        size=says.preprocessing.crop,
        dim=says.embedding_dim,
        heads={head.name: head.classes for head in heads},
        space_id=bundle.space_id,
        preprocessing=says.preprocessing,
        precision=FORMATS[name],
        gpu=FORMATS[name] == "fp16" or (name == "onnx" and device != "cpu"),  # where each format is meant to run
        max_batch=batches[2],
    )


def _json(report: Report) -> bytes:
    return f"{json.dumps(plain_json(report, 'report'), indent=2, ensure_ascii=False, allow_nan=False)}\n".encode()
