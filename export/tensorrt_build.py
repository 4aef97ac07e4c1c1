"""Build a TensorRT FP16 engine from the fp16 ONNX, with TensorRT's own builder: 10.x and 11.x by the same calls.

Precision comes from the ONNX alone: the network is strongly typed, because TensorRT 11 has no precision flags. Not yet
run on hardware: see `mvmr.export.tensorrt`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmr import __version__
from mvmr.errors import MvmrError
from mvmr.export.contract import IMAGE, report_of
from mvmr.export.tensorrt_runtime import device, logger, one_line, package, release, start

TIMING_CACHE = "trt/timing.cache"
BATCHES = (1, 8, 64)

_FP16 = "make it with `mvmr export --fp16`"

Batches = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Built:
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
        said = json.dumps({**self.sidecar, "report": dict(report)}, indent=2, ensure_ascii=False, allow_nan=False)
        return {
            self.name: self.engine,
            report_of(self.name): f"{said}\n".encode(),
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
) -> Built:
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
    wanted, workspace = profile(batches, size), _workspace(workspace_gb)
    described = _describe(fp16_onnx, size)
    gpu = device()
    trt = trt or package(gpu)
    log = logger(trt)
    builder = start(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # The parser owns the weights and the builder reads the timing cache: both must live until the engine is built.
    parser = trt.OnnxParser(network, log)
    _parse(parser, fp16_onnx, f"TensorRT {trt.__version__}", log)
    config = _configure(trt, builder, wanted, workspace, log)
    cache = _attach_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        cure = f"free GPU memory, lower --max-batch (now {batches[2]}) or raise --workspace-gb (now {workspace_gb:g})"
        raise MvmrError(f"TensorRT {trt.__version__} built no engine: {log.last}; {cure}")
    engine = bytes(plan)
    sidecar = {
        "precision": "fp16",
        **gpu.to_json(),
        "tensorrt": str(trt.__version__),
        "profile": wanted,
        "workspace_gb": workspace_gb,
        "onnx_sha256": hashlib.sha256(fp16_onnx).hexdigest(),
        "engine_sha256": hashlib.sha256(engine).hexdigest(),
        **described,
        "mvmr_version": __version__,
    }
    return Built(engine=engine, timing_cache=bytes(cache.serialize()), sidecar=sidecar)


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

    Raises: MvmrError when the batches are not in order.
    """
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        order = "--min-batch, --opt-batch and --max-batch"
        raise MvmrError(f"TensorRT takes batches in the order 1 <= min <= opt <= max, not {batches}; change {order}")
    return {name: [batch, size, size, 3] for name, batch in zip(("min", "opt", "max"), batches, strict=True)}


def _workspace(gibibytes: float) -> int:
    if not gibibytes > 0:
        raise MvmrError(f"a TensorRT workspace of {gibibytes:g} GiB is too small; give more than 0 (--workspace-gb)")
    return int(gibibytes * 2**30)


def _describe(fp16_onnx: bytes, size: int) -> dict[str, str | None]:
    """Return what the ONNX says it is made of, refusing what would become an engine of the wrong kind."""
    import onnx

    try:
        model = onnx.load_model_from_string(fp16_onnx)
    except Exception as error:  # protobuf's DecodeError, of whichever protobuf is installed
        raise MvmrError(f"what the engine is built from is no ONNX ({one_line(error)}); {_FP16}") from error
    says = {entry.key: entry.value for entry in model.metadata_props}
    if says.get("precision") != "fp16":
        found = f"an ONNX of mvmr in {says['precision']}" if "precision" in says else "no ONNX of mvmr"
        raise MvmrError(f"the engine takes its precision from its ONNX, and this is {found}; {_FP16}")
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    if shape != [size, size, 3]:
        raise MvmrError(f"the fp16 ONNX takes images of {shape}, not {[size, size, 3]}; {_FP16}")
    return {key: says.get(key) for key in ("bundle_hash", "bundle_space_id")}


def _parse(parser: Any, fp16_onnx: bytes, who: str, log: Any) -> None:
    if not parser.parse(fp16_onnx):
        said = "; ".join(one_line(parser.get_error(index).desc()) for index in range(parser.num_errors)) or log.last
        cure = "install a newer TensorRT, or export with a lower --opset"
        raise MvmrError(f"{who} cannot parse the fp16 ONNX: {said}; {cure}")


def _configure(trt: Any, builder: Any, wanted: Mapping[str, list[int]], workspace: int, log: Any) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(IMAGE, *map(tuple, wanted.values()))
    if config.add_optimization_profile(shapes) < 0:
        raise MvmrError(f"TensorRT refuses the input shapes {list(wanted.values())}: {log.last}; give other batches")
    return config


def _attach_timing_cache(config: Any, kept: bytes | None) -> Any:
    cache = config.create_timing_cache(kept or b"")
    if cache is None or not config.set_timing_cache(cache, False):
        # Timed on another GPU or by another TensorRT: begin again.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
