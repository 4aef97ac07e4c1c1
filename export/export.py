"""`export`: a bundle's student as ONNX files and engines, each put into the bundle only after it has been verified."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from mvmr import __version__
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.head import Head
from mvmr.cores import usable_cores
from mvmr.data import ImageSet
from mvmr.export.artifacts import Artifact, check_dense, check_opset, choose_artifacts
from mvmr.export.attempt import Attempt, BuildOptions, builder_of, check_package
from mvmr.export.images import IMAGES, choose_calibration_images, choose_verification_images
from mvmr.export.runtimes import locate
from mvmr.export.verification import Gates, Reference, Report
from mvmr.models.student import Student
from mvmr.progress import is_wanted

BATCHES = (1, 8, 64)
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")  # whose versions a report says


def export(
    bundle: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("onnx",),
    heads: Sequence[str] | str = (),
    dense: bool = False,
    data: str | None = None,
    calibration: str | None = None,
    images: int = IMAGES,
    opset: int = 20,
    gates: Sequence[str] = (),
    triton: str | os.PathLike[str] | None = None,
    batches: tuple[int, int, int] = BATCHES,
    workspace_gb: float = 4.0,
    rebuild: bool = False,
    provider: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> dict[str, Report]:
    """Export a bundle's student and put each artifact into the bundle, beside a report, once it has passed its gate.

    Args:
        formats: of ``onnx`` (fp32), ``fp16``, ``int8`` and ``trt``, which brings fp16 along. Where TensorRT or its GPU
            is not there and TensorRT for RTX is here, ``trt`` stands for that: see `docs/export.md`.
        heads: names of linear heads to put into the graph, or ``all``.
        dense: the graph also gives ``dense``, the map of features before pooling (see
            :meth:`mvmr.models.student.Student.embed`); of ``onnx`` and ``fp16`` alone.
        data: images to verify with; left out, the test split of what the student was trained on, or all of it.
        calibration: images that int8's ranges are taken from, at least 100; left out, the training data.
        images: how many to verify with, drawn at random.
        gates: changes to the gates, such as ``"cosine_min=0.999"`` (see :class:`mvmr.export.verification.Gates`).
        triton: folder of a Triton model repository, which the last of the formats is added to.
        batches: the smallest, the usual and the largest batch of an engine; workspace_gb: memory to build it in.
        rebuild: build the engine again even where the bundle has one that fits.
        provider: of onnxruntime, which fp32 and fp16 are verified on: ``cpu``, ``cuda``, ``tensorrt`` or
            ``tensorrt-rtx``.

    Returns:
        The reports by format, as they stand beside the artifacts.

    Raises:
        MvmrError: what can't be exported, before anything is computed; or an artifact that does not pass its gate,
            which is not put in place: an earlier one stays, and the report is left beside it as ``.failed.json``.
    """
    progress = is_wanted(progress)
    rows = choose_artifacts(formats)
    check_opset(opset)
    if dense:
        check_dense(rows)
    opened = bundles.load(bundle)
    limits = {row.key: Gates.of(row.gate, gates) for row in rows}
    options = BuildOptions(
        opset=opset, provider=provider, batches=batches, workspace_gb=workspace_gb, rebuild=rebuild, dense=dense
    )
    _check_machine(rows, opened, options, triton=triton is not None)
    outputs = _choose_heads(opened, heads)
    sample, origin = choose_verification_images(
        opened, data, count=images, max_unreadable=max_unreadable, progress=progress
    )
    ranges = None
    if any(row.calibrated for row in rows):
        ranges = choose_calibration_images(opened, calibration, max_unreadable=max_unreadable, progress=progress)
    student = opened.student()
    bundled = [opened.head(name) for name in opened.heads]
    reference = _compute_reference(student, sample, bundled, dense=dense, progress=progress)
    reports: dict[str, Report] = {}
    for row in rows:
        attempt = Attempt(
            artifact=row, gates=limits[row.key], options=options, bundle=opened, student=student, heads=outputs,
            reference=reference, calibration=ranges, circumstances=origin | _circumstances(opened), progress=progress,
        )  # fmt: skip
        reports[row.key] = builder_of(row).build(attempt)
    if triton is not None:
        exported = bundles.load(opened.path)
        _add_to_repository(exported, rows[-1], outputs, Path(triton), options, dense=reference.dense)
    return reports


def _check_machine(rows: Sequence[Artifact], bundle: Bundle, options: BuildOptions, *, triton: bool) -> None:
    """Refuse what this machine can't do: missing packages, no GPU for an engine or a provider."""
    if triton:
        check_package("tritonclient")
    for row in rows:
        builder_of(row).check(bundle, options, triton=triton and row is rows[-1])


def _choose_heads(bundle: Bundle, names: Sequence[str] | str) -> list[Head]:
    names = [names] if isinstance(names, str) else names
    return [bundle.head(name) for name in dict.fromkeys(bundle.heads if "all" in names else names)]


def _compute_reference(
    student: Student, images: ImageSet, heads: Sequence[Head], *, dense: bool, progress: bool
) -> Reference:
    prepared = student.preprocess.batch(images.load(index) for index in range(len(images)))
    labels, classes = images.labels, images.classes or ()
    return Reference.of(student, prepared, heads, labels=labels, classes=classes, dense=dense, progress=progress)


def _circumstances(bundle: Bundle) -> Report:
    return {
        "bundle_hash": bundle.manifest.files[bundles.ENCODER],
        "bundle_space_id": bundle.space_id,
        "versions": {"mvmr": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES if find_spec(name)},
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": usable_cores()},
    }


def _add_to_repository(
    bundle: Bundle, artifact: Artifact, heads: Sequence[Head], out: Path, options: BuildOptions, *,
    dense: tuple[int, ...],
) -> None:  # fmt: skip
    from mvmr.export import triton

    student = triton.ExportedStudent(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.path.resolve().name).strip("._-") or "student",
        platform=artifact.runtime,
        dim=bundle.manifest.embedding_dim,
        heads={head.name: head.classes for head in heads},
        dense=dense,
        space_id=bundle.space_id,
        preprocessing=bundle.manifest.preprocessing,
        precision=artifact.precision,
    )
    gpu = artifact.device == "gpu" or (artifact.device == "any" and options.provider != "cpu")
    serving = triton.Serving(gpu=gpu, max_batch=options.batches[2])
    triton.add_model(bundle.file(locate(artifact, bundle)), out, student, serving)
