"""What every exported artifact promises: inputs, outputs, metadata, and its place in the bundle (torch-free).

Images are resized and cropped outside, by the bundle's preprocessing; everything after that is inside the graph.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from mvmr import __version__
from mvmr.bundles.bundle import ENCODER, Bundle
from mvmr.bundles.head import Head
from mvmr.errors import MvmrError, unknown

IMAGE, EMBEDDING, LOGITS = "image", "embedding", "logits_"
Precision = Literal["fp32", "fp16", "int8"]
# What a user asks for, and the precision it is computed in.
FORMATS: dict[str, Precision] = {"onnx": "fp32", "fp16": "fp16", "int8": "int8", "trt": "fp16"}
LOWEST_OPSET, HIGHEST_OPSET = 18, 23


def artifact(precision: Precision) -> str:
    """Where the ONNX file of a precision is, inside the bundle."""
    return f"onnx/encoder.{precision}.onnx"


def report_of(name: str, *, failed: bool = False) -> str:
    """Where the report on the artifact `name` is, inside the bundle; that of a failed attempt has its own name."""
    return f"{name.rpartition('.')[0]}{'.failed' if failed else ''}.json"


def metadata(bundle: Bundle, heads: Sequence[Head], precision: Precision) -> dict[str, str]:
    """What an ONNX file says about itself; all values are text, lists and tables are JSON."""
    says = bundle.manifest
    return {
        "mvmr_version": __version__,
        "bundle_space_id": bundle.space_id,
        "bundle_hash": says.files[ENCODER],
        "preprocessing": json.dumps(says.preprocessing.to_dict()),
        "heads": json.dumps({head.name: head.classes for head in heads}, ensure_ascii=False),
        "precision": precision,
        "architecture": says.backbone,
        "embedding_dim": str(says.embedding_dim),
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


def staleness(says: Mapping[str, str], bundle: Bundle) -> str | None:
    """Say how an artifact's metadata differ from the weights and the preprocessing of `bundle`; None: they agree."""
    for key, wanted in (("bundle_hash", bundle.manifest.files[ENCODER]), ("bundle_space_id", bundle.space_id)):
        if says.get(key) != wanted:
            return f"it is stale, made from another student: {key} {str(says.get(key))[:12]}, not {wanted[:12]}"
    return None


def check_opset(opset: int) -> None:
    """Refuse an opset that torch does not write as asked (17 silently becomes 18), or that few runtimes know."""
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise MvmrError(f"opset {opset} can't be exported; give one from {LOWEST_OPSET} to {HIGHEST_OPSET}")


def check_formats(formats: Sequence[str]) -> None:
    """Refuse an unknown format, or none at all."""
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    if not formats:
        raise MvmrError(f"no format to export; give some of {', '.join(FORMATS)}")
