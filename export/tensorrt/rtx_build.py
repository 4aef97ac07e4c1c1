"""TensorRT for RTX without a GPU: its own parser and builder take an fp16 ONNX, or say why not, ahead of time.

The engine is thrown away. It is built in under a second, any other release of TensorRT for RTX refuses it, and its
embeddings cannot be verified without a GPU: the plug-in (`rtx_provider`) builds its own when it starts.
"""

from __future__ import annotations

import time
from importlib import import_module, metadata, util
from typing import Any

from mvmr.errors import MvmrError, one_line
from mvmr.export.tensorrt import rtx_provider
from mvmr.export.tensorrt.build import BATCHES, Batches, describe, plan
from mvmr.export.tensorrt.runtime import release

BINDINGS = "tensorrt_rtx_bindings"

_LIBRARIES = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
_DISTRIBUTIONS = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings")


def bindings_version() -> str | None:
    """Return the version of the Python bindings ("1.7.1.116"), None where they are not installed."""
    if util.find_spec(BINDINGS) is None:
        return None
    for distribution in _DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_installed() -> bool:
    """Whether anything of TensorRT for RTX is here: its libraries or their bindings."""
    return rtx_provider.version() is not None or bindings_version() is not None


def package() -> Any:
    """Import and return the bindings of TensorRT for RTX, over the libraries that come with the plug-in provider.

    Raises: MvmrError where one of the two is missing, they are not of one release, or they cannot be loaded.
    """
    libraries, bindings = rtx_provider.version(), bindings_version()
    if not is_installed():
        raise MvmrError(f"TensorRT for RTX is not installed here: {rtx_provider.INSTALL} (Linux on x86-64)")
    if libraries is None:
        raise MvmrError(
            f"the bindings of TensorRT for RTX {bindings} are here without onnxruntime's plug-in, which brings its "
            f"libraries: pip install {_LIBRARIES}"
        )
    cure = f"pip install '{_DISTRIBUTIONS[0]}=={libraries}.*'"
    if bindings is None:
        raise MvmrError(f"TensorRT for RTX {libraries} is here without its Python bindings: {cure}")
    if release(bindings) != libraries:
        mismatch = f"TensorRT for RTX {libraries} is here with the bindings of {bindings}, which don't fit it"
        raise MvmrError(f"{mismatch}: {cure}")
    try:
        import_module(rtx_provider.PACKAGE)  # loads the libraries, which the bindings look for by name
        return import_module(BINDINGS)
    except ImportError as error:
        cure = f"pip install --force-reinstall {_LIBRARIES} {_DISTRIBUTIONS[0]}"
        raise MvmrError(f"TensorRT for RTX {libraries} cannot be loaded ({one_line(error)}): {cure}") from error


def report_name(version: str) -> str:
    """Return the path inside a bundle of the report for ("1.7.1.116"): trt/encoder.fp16.rtx1.7.1.json."""
    return f"trt/encoder.fp16.rtx{release(version)}.json"


def build(
    fp16_onnx: bytes, *, size: int, batches: Batches = BATCHES, workspace_gb: float = 4.0, trt: Any = None
) -> dict[str, Any]:
    """Build an engine of the fp16 ONNX, which runs on GPUs from compute capability 8.0 on, and return what it is like.

    Args: as those of `mvmr.export.tensorrt.build.build`; trt: the bindings; imported when left out.

    Returns: JSON values: precision, tensorrt_rtx, engine_bytes, engine_seconds, profile, workspace_gb, onnx_sha256,
        bundle_hash, bundle_space_id, mvmr_version.

    Raises: MvmrError as `package` and `mvmr.export.tensorrt.build.build` do, but for the GPU.
    """
    description = describe(fp16_onnx, size, batches, workspace_gb)
    trt, began = trt or package(), time.perf_counter()
    # No timing cache: it has no effect on these engines, and its use is deprecated.
    engine, _ = plan(trt, fp16_onnx, size, batches, workspace_gb, timing_cache=None)
    seconds = round(time.perf_counter() - began, 3)
    facts = {"precision": "fp16", "tensorrt_rtx": str(trt.__version__), "engine_bytes": len(engine)}
    return {**facts, "engine_seconds": seconds, **description}
