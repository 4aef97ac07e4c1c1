"""The artifacts, one row of a table to each, and what all of them promise: outputs, metadata, reports (torch-free).

Images are resized and cropped outside, by the bundle's preprocessing; everything after that is inside the artifact.
"""

from __future__ import annotations

import base64
import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mvmr import __version__
from mvmr.bundles.bundle import ENCODER, Bundle
from mvmr.bundles.head import Head
from mvmr.errors import MvmrError, unknown

IMAGE, EMBEDDING, DENSE, LOGITS = "image", "embedding", "dense", "logits_"
Precision = Literal["fp32", "fp16", "int8"]
LOWEST_OPSET, HIGHEST_OPSET = 18, 23


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Something that a student is exported to.

    key: what users type: `mvmr export --KEY`; label: for tables and pages; purpose: the help of the option
    runtime: what runs it, a key of `mvmr.export.runtimes.RUNTIMES`; precision: what that computes in
    file: its place in the bundle; a pattern where each kind of GPU has a file of its own, and the runtime finds this
        machine's
    gate: the precision whose gates of `mvmr.export.verification` it has to pass
    builder: a module that keeps the contract of `mvmr.export.attempt.Builder`
    device: what it is meant for, which Triton and the benchmark go by
    needs: keys of artifacts that are exported along with it, before it; calibrated: whether it is made with images
    dense: whether it can also give the map of features before pooling
    machine: what can make it, in words, where not every machine can
    """

    key: str
    label: str
    purpose: str
    runtime: str
    precision: Precision
    file: str
    gate: Precision
    builder: str
    device: Literal["any", "cpu", "gpu"]
    needs: tuple[str, ...] = ()
    calibrated: bool = False
    dense: bool = False
    machine: str = ""

    def files(self, names: Iterable[str]) -> list[str]:
        """Those of a bundle's files that are this artifact; several where each kind of GPU has its own."""
        return fnmatch.filter(names, self.file)


_TABLE = (
    Artifact(
        key="onnx",
        label="ONNX fp32",
        purpose="ONNX in float32; what is exported when no format is given.",
        runtime="onnxruntime",
        precision="fp32",
        file="onnx/encoder.fp32.onnx",
        gate="fp32",
        builder="mvmr.export.onnx.builder",
        device="any",
        dense=True,
    ),
    Artifact(
        key="fp16",
        label="ONNX fp16",
        purpose="ONNX in half precision, for GPUs.",
        runtime="onnxruntime",
        precision="fp16",
        file="onnx/encoder.fp16.onnx",
        gate="fp16",
        builder="mvmr.export.onnx.builder",
        device="gpu",
        dense=True,
    ),
    Artifact(
        key="int8",
        label="ONNX int8",
        purpose="ONNX in 8 bits, for CPUs.",
        runtime="onnxruntime",
        precision="int8",
        file="onnx/encoder.int8.onnx",
        gate="int8",
        builder="mvmr.export.onnx.int8_builder",
        device="cpu",
        calibrated=True,
    ),
    Artifact(
        key="trt",
        label="TensorRT fp16",
        purpose="A TensorRT engine in half precision, for this machine's GPU; or for RTX cards.",
        runtime="tensorrt",
        precision="fp16",
        file="trt/encoder.fp16.*.engine",
        gate="fp16",
        builder="mvmr.export.tensorrt.builder",
        device="gpu",
        needs=("fp16",),
        machine="a machine with an NVIDIA GPU and TensorRT",
    ),
)
ARTIFACTS: dict[str, Artifact] = {row.key: row for row in _TABLE}  # each after those that it needs


def choose_artifacts(keys: Sequence[str]) -> list[Artifact]:
    """The rows of these keys and of what they need, in the order of the table.

    Raises: MvmrError for an unknown key, with the nearest, or none at all.
    """
    for key in keys:
        if key not in ARTIFACTS:
            raise unknown("format", key, ARTIFACTS)
    if not keys:
        raise MvmrError(f"no format to export; give some of {', '.join(ARTIFACTS)}")
    needed = {need for key in keys for need in ARTIFACTS[key].needs}
    return [row for row in ARTIFACTS.values() if row.key in needed.union(keys)]


def check_dense(rows: Sequence[Artifact]) -> None:
    """Refuse those that can't give a map of features beside the embedding."""
    if other := next((row for row in rows if not row.dense), None):
        able = " and ".join(row.key for row in ARTIFACTS.values() if row.dense)
        raise MvmrError(f"{other.key} does not take dense, only {able} do; export it by itself, without")


def report_of(name: str, *, failed: bool = False) -> str:
    """Where the report on the artifact `name` is, inside the bundle; that of a failed attempt has its own name."""
    return f"{name.rpartition('.')[0]}{'.failed' if failed else ''}.json"


def metadata(bundle: Bundle, heads: Sequence[Head], precision: Precision) -> dict[str, str]:
    """What an ONNX file says about itself; all values are text, lists and tables are JSON."""
    manifest = bundle.manifest
    return {
        "mvmr_version": __version__,
        "bundle_space_id": bundle.space_id,
        "bundle_hash": manifest.files[ENCODER],
        "preprocessing": json.dumps(manifest.preprocessing.to_dict()),
        "heads": json.dumps({head.name: head.classes for head in heads}, ensure_ascii=False),
        "precision": precision,
        "architecture": manifest.backbone,
        "embedding_dim": str(manifest.embedding_dim),
    }


def canary(size: int) -> npt.NDArray[np.uint8]:
    """An image that an artifact's report holds the embedding of, so that a service can tell whether its engine works.

    Shapes: uint8 [1, size, size, 3]; the same bytes on every machine.
    """
    rows, columns, channels = np.ogrid[:size, :size, :3]
    pattern = (7 * rows + 13 * columns * (channels + 1)) ^ (rows * columns // 8)
    return (pattern % 256).astype(np.uint8)[None]


def encode_canary(embedding: npt.NDArray[np.float32]) -> str:
    """An embedding, float32 [D], as text for a report; `decode_canary` takes it back, bit for bit."""
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()


def decode_canary(text: str) -> npt.NDArray[np.float32]:
    """What `encode_canary` was given; raises ValueError for other text."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)


def staleness(entries: Mapping[str, str], bundle: Bundle) -> str | None:
    """Say how an artifact's metadata differ from the weights and the preprocessing of `bundle`; None: they agree."""
    for key, wanted in (("bundle_hash", bundle.manifest.files[ENCODER]), ("bundle_space_id", bundle.space_id)):
        if entries.get(key) != wanted:
            return f"it is stale, made from another student: {key} {str(entries.get(key))[:12]}, not {wanted[:12]}"
    return None


def check_opset(opset: int) -> None:
    """Refuse an opset that torch does not write as asked (17 silently becomes 18), or that few runtimes know."""
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise MvmrError(f"opset {opset} can't be exported; give one from {LOWEST_OPSET} to {HIGHEST_OPSET}")
