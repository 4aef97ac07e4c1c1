"""Build a TensorRT FP16 engine from the fp16 ONNX, with TensorRT's own builder: 10.x, 11.x and RTX by the same calls.

Precision comes from the ONNX alone: the network is strongly typed, because TensorRT 11 has no precision flags. The
tests build with the builder of TensorRT for RTX, which needs no GPU; no engine has run on hardware yet: see
`mvmr.export.tensorrt.engine`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmr import __version__
from mvmr.errors import MvmrError, one_line
from mvmr.export.artifacts import IMAGE, report_of
from mvmr.export.tensorrt.runtime import device, logger, package, release, start

TIMING_CACHE = "trt/timing.cache"
BATCHES = (1, 8, 64)

_FP16 = "make it with `mvmr export --fp16`"

Batches = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine fresh from the builder, the timing cache to keep for the next build, and where it came from.

    sidecar: JSON values: precision, gpu, compute_capability, driver, cuda, tensorrt, profile, workspace_gb,
        onnx_sha256, engine_sha256, bundle_hash, bundle_space_id, mvmr_version.
    """

    engine: bytes
    timing_cache: bytes
    sidecar: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Path of the engine inside a bundle."""
        return engine_name(self.sidecar["compute_capability"], self.sidecar["tensorrt"])

    def to_files(self, report: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the files to put into a bundle, by path; `report` (of the verification) goes into the sidecar."""
        text = json.dumps({**self.sidecar, "report": dict(report)}, indent=2, ensure_ascii=False, allow_nan=False)
        return {
            self.name: self.engine,
            report_of(self.name): f"{text}\n".encode(),
            TIMING_CACHE: self.timing_cache,
        }


def engine_name(compute_capability: str, version: str) -> str:
    """Return the path inside a bundle of the engine for ("9.0", "11.4.0.106"): trt/encoder.fp16.sm90.trt11.4.0.engine.

    An engine serves one compute capability and one TensorRT version (major, minor and patch), so both are its name.
    """
    return f"trt/encoder.fp16.sm{compute_capability.replace('.', '')}.trt{release(version)}.engine"


def build(
    fp16_onnx: bytes,
    *,
    size: int,
    batches: Batches = BATCHES,
    workspace_gb: float = 4.0,
    timing_cache: bytes | None = None,
    trt: Any = None,
) -> BuiltEngine:
    """Build an engine for this machine's GPU from the bundle's fp16 ONNX, with TensorRT's own builder (10.x or 11.x).

    Args:
        size: image side in pixels.
        batches: the smallest, the most frequent (tuned for) and the largest batch that the engine will take.
        workspace_gb: GPU memory, in GiB, that a layer may use as scratch space.
        timing_cache: kept from an earlier build, makes this one faster; one of another GPU or TensorRT is left aside.
        trt: the tensorrt module; imported when left out.

    Raises: MvmrError for batches out of order, a file that is no fp16 ONNX of mvmr of this size, no CUDA device, no
        TensorRT, a file TensorRT cannot parse, or a build that fails; the last two in TensorRT's own words.
    """
    description = describe(fp16_onnx, size, batches, workspace_gb)
    gpu = device()
    trt = trt or package(gpu)
    engine, cache = plan(trt, fp16_onnx, size, batches, workspace_gb, timing_cache=timing_cache or b"")
    sidecar = {
        "precision": "fp16",
        **gpu.to_json(),
        "tensorrt": str(trt.__version__),
        "engine_sha256": hashlib.sha256(engine).hexdigest(),
        **description,
    }
    return BuiltEngine(engine=engine, timing_cache=cache, sidecar=sidecar)


def describe(fp16_onnx: bytes, size: int, batches: Batches, workspace_gb: float) -> dict[str, Any]:
    """Return what a sidecar says of an engine whoever builds it: JSON values; refuses what could not become one.

    Raises: MvmrError for batches out of order, no workspace, or a file that is no fp16 ONNX of mvmr of this size.
    """
    shapes = profile(batches, size)
    if not workspace_gb > 0:
        raise MvmrError(f"a TensorRT workspace of {workspace_gb:g} GiB is too small; give more than 0 (--workspace-gb)")
    return {
        "profile": shapes,
        "workspace_gb": workspace_gb,
        "onnx_sha256": hashlib.sha256(fp16_onnx).hexdigest(),
        **_origin(fp16_onnx, size),
        "mvmr_version": __version__,
    }


def plan(
    trt: Any, fp16_onnx: bytes, size: int, batches: Batches, workspace_gb: float, *, timing_cache: bytes | None
) -> tuple[bytes, bytes]:
    """Have a TensorRT parse the ONNX and build the engine: returns it, and the timing cache.

    timing_cache: kept from an earlier build, b"" for a new one; None builds without, as TensorRT for RTX wants it.

    Raises: MvmrError, in TensorRT's own words, for a file that it cannot parse or a build that fails.
    """
    log = logger(trt)
    builder = start(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # The parser owns the weights and the builder reads the timing cache: both must live until the engine is built.
    parser = trt.OnnxParser(network, log)
    _parse(parser, fp16_onnx, f"TensorRT {trt.__version__}", log)
    config = _configure(trt, builder, profile(batches, size), int(workspace_gb * 2**30), log)
    cache = None if timing_cache is None else _attach_timing_cache(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        cure = f"free GPU memory, lower --max-batch (now {batches[2]}) or raise --workspace-gb (now {workspace_gb:g})"
        raise MvmrError(f"TensorRT {trt.__version__} built no engine: {log.last}; {cure}")
    return bytes(engine), b"" if cache is None else bytes(cache.serialize())


def tensorrt_provider_options(cache_folder: Path, batches: Batches, size: int, *, onnx_sha256: str) -> dict[str, str]:
    """Return the options of onnxruntime's TensorRT provider, the other way to TensorRT: same ONNX, engine cached.

    The provider names a cached engine after the names in the graph, not after weights or shapes (its issue 32254): a
    student trained again would be given the old one's engine. So each ONNX file has a folder of its own below
    `cache_folder`. `trt_fp16_enable` stays off: that makes the network strongly typed, as in `build`.
    onnxruntime-gpu 1.31 links TensorRT 10, not 11: pip install 'tensorrt-cu13<11'.
    """
    shapes = profile(batches, size).items()
    folder = str(cache_folder / onnx_sha256)
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
        **{f"trt_profile_{name}_shapes": f"{IMAGE}:{'x'.join(map(str, shape))}" for name, shape in shapes},
    }


def profile(batches: Batches, size: int) -> dict[str, list[int]]:
    """Return the shapes of the input for the smallest, the tuned and the largest batch: keys min, opt, max.

    Raises: MvmrError when the batches are not in order, or larger than TensorRT counts: it would take 2**33 for 0.
    """
    if batches[2] >= 2**31:
        raise MvmrError(f"TensorRT takes batches below {2**31} images, not {batches[2]}; lower --max-batch")
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        order = "--min-batch, --opt-batch and --max-batch"
        raise MvmrError(f"TensorRT takes batches in the order 1 <= min <= opt <= max, not {batches}; change {order}")
    return {name: [batch, size, size, 3] for name, batch in zip(("min", "opt", "max"), batches, strict=True)}


def _origin(fp16_onnx: bytes, size: int) -> dict[str, str | None]:
    """Return what the ONNX says it is made of, refusing what would become an engine of the wrong kind."""
    import onnx

    try:
        model = onnx.load_model_from_string(fp16_onnx)
    except Exception as error:  # protobuf's DecodeError, of whichever protobuf is installed
        raise MvmrError(f"what the engine is built from is no ONNX ({one_line(error)}); {_FP16}") from error
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if entries.get("precision") != "fp16":
        kind = f"an ONNX of mvmr in {entries['precision']}" if "precision" in entries else "no ONNX of mvmr"
        raise MvmrError(f"the engine takes its precision from its ONNX, and this is {kind}; {_FP16}")
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    if shape != [size, size, 3]:
        raise MvmrError(f"the fp16 ONNX takes images of {shape}, not {[size, size, 3]}; {_FP16}")
    return {key: entries.get(key) for key in ("bundle_hash", "bundle_space_id")}


def _parse(parser: Any, fp16_onnx: bytes, parser_name: str, log: Any) -> None:
    if not parser.parse(fp16_onnx):
        reason = "; ".join(_refusal(parser.get_error(index)) for index in range(parser.num_errors)) or log.last
        cure = "install a newer TensorRT, or export with a lower --opset"
        raise MvmrError(f"{parser_name} cannot parse the fp16 ONNX: {reason}; {cure}")


def _refusal(parser_error: Any) -> str:
    # The description alone may be as short as "false".
    return f"{parser_error.node_operator()} {parser_error.node_name()}: {one_line(parser_error.desc())}"


def _configure(trt: Any, builder: Any, limits: Mapping[str, list[int]], workspace: int, log: Any) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(IMAGE, *map(tuple, limits.values()))
    if config.add_optimization_profile(shapes) < 0:
        raise MvmrError(f"TensorRT refuses the input shapes {list(limits.values())}: {log.last}; give other batches")
    return config


def _attach_timing_cache(config: Any, content: bytes) -> Any:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        # Timed on another GPU or by another TensorRT: begin again.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
