"""TensorRT FP16 engines: build one (`build`), find the one of this machine (`find`), run it (`Engine`).

No hardware has run this yet. The tests drive it on a recording double of TensorRT, and hold every name and argument it
uses to TensorRT's published Python bindings of 10.16.1 and 11.4.0; the tests marked `gpu` build and run a real engine
where there is a GPU and TensorRT. Neither tensorrt nor torch is imported before it is needed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvmr import strict_json
from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.export.artifacts import ARTIFACTS, EMBEDDING, IMAGE, report_of
from mvmr.export.tensorrt.build import BATCHES as BATCHES
from mvmr.export.tensorrt.build import TIMING_CACHE as TIMING_CACHE
from mvmr.export.tensorrt.build import Batches, engine_name
from mvmr.export.tensorrt.build import BuiltEngine as BuiltEngine
from mvmr.export.tensorrt.build import build as build
from mvmr.export.tensorrt.build import profile as profile
from mvmr.export.tensorrt.build import tensorrt_provider_options as tensorrt_provider_options
from mvmr.export.tensorrt.runtime import Device as Device
from mvmr.export.tensorrt.runtime import device as device
from mvmr.export.tensorrt.runtime import logger, release, start
from mvmr.export.tensorrt.runtime import package as package

ONNX = ARTIFACTS["fp16"].file

_CUDA = "cuda"


@dataclass(frozen=True, kw_only=True)
class StoredEngine:
    """An engine of a bundle that fits this machine; `Engine.load` takes all but its name in the bundle."""

    name: str
    path: Path
    sidecar: Mapping[str, Any]
    onnx_sha256: str


def needs_rebuild(bundle: Bundle, *, batches: Batches | None = None, trt: Any = None) -> str | None:
    """Say why the bundle has no engine that this machine can use, or None when it has one.

    batches: what the engine must have been built for; any when left out.

    Raises: MvmrError for no CUDA device or no TensorRT.
    """
    gpu = device()
    return _lack(bundle, gpu, str((trt or package(gpu)).__version__), batches)


def find(bundle: Bundle, *, trt: Any = None) -> StoredEngine:
    """Return the bundle's engine for this machine.

    Raises: MvmrError saying why there is none and how to make it, or for no CUDA device or no TensorRT.
    """
    gpu = device()
    version = str((trt or package(gpu)).__version__)
    if reason := _lack(bundle, gpu, version, None):
        raise _rebuild(reason, bundle.path)
    name = engine_name(gpu.compute_capability, version)
    onnx_sha256 = bundle.manifest.files[ONNX]
    return StoredEngine(name=name, path=bundle.file(name), sidecar=_sidecar(bundle, name), onnx_sha256=onnx_sha256)


class Engine:
    """A TensorRT engine on the GPU: `engine(images)` gives its outputs by name; one call at a time.

    size: image side in pixels; dim: width of the embedding; batches: smallest and largest batch it takes;
    outputs: names of the outputs, "embedding" among them; sidecar: where it came from.
    """

    def __init__(
        self, plan: bytes, sidecar: Mapping[str, Any], *, onnx_sha256: str, name: str = "the engine", trt: Any = None
    ) -> None:
        """Check that `plan` belongs to this machine and to the ONNX with this hash, then put it on the GPU.

        Load engines of bundles you trust only: an engine holds code that runs.

        Raises: MvmrError, before TensorRT sees the plan, for one made for another compute capability or TensorRT
            version, from another ONNX, or damaged; after, when TensorRT refuses it or its tensors are not ours.
        """
        import torch

        gpu = device()
        trt = trt or package(gpu)
        reason = _difference(name, sidecar, gpu, str(trt.__version__), onnx_sha256)
        if reason is None and hashlib.sha256(plan).hexdigest() != sidecar.get("engine_sha256"):
            reason = f"{name} is damaged: its sha256 is not the one in its sidecar"
        if reason:
            raise _rebuild(reason)
        self.sidecar = sidecar
        self._log = logger(trt)
        self._runtime = start(trt.Runtime, self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise _rebuild(f"TensorRT {trt.__version__} refuses {name}: {self._log.last}")
        self.outputs = _outputs(self._engine, trt, name)
        low, _, high = map(tuple, self._engine.get_tensor_profile_shape(IMAGE, 0))
        self.size, self.batches = int(high[1]), (int(low[0]), int(high[0]))
        self.dim = int(tuple(self._engine.get_tensor_shape(EMBEDDING))[-1])
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise MvmrError(f"no GPU memory to run {name}: {self._log.last}; free some, or rebuild for fewer images")
        # On the default stream TensorRT would wait for the whole device at every call.
        self._stream = torch.cuda.Stream()

    @classmethod
    def load(cls, path: Path, sidecar: Mapping[str, Any], *, onnx_sha256: str, trt: Any = None) -> "Engine":
        """Read the engine file `path` and put it on the GPU; raises as `Engine` does, or when it can't be read."""
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise _rebuild(f"cannot read the engine {path}: {error.strerror}") from error
        return cls(plan, sidecar, onnx_sha256=onnx_sha256, name=str(path), trt=trt)

    def __call__(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """Run the engine.

        Shapes: uint8 [N, size, size, 3] RGB in [0, 255], N within `batches` -> by output: float32 [N, D] or [N, C].

        Raises: MvmrError for images of another shape or type, a batch outside the profile, or a failed run.
        """
        import torch

        self._check(images)
        context = self._context
        with torch.cuda.stream(self._stream):
            self._require(context.set_input_shape(IMAGE, images.shape))
            tensors = {IMAGE: torch.tensor(images, device=_CUDA)}
            for name in self.outputs:
                shape = tuple(context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=torch.float32, device=_CUDA)
            for name, tensor in tensors.items():
                self._require(context.set_tensor_address(name, tensor.data_ptr()))
            self._require(context.execute_async_v3(self._stream.cuda_stream))
        self._stream.synchronize()
        return {name: tensors[name].cpu().numpy() for name in self.outputs}

    def _require(self, done: bool) -> None:
        if not done:
            raise MvmrError(f"TensorRT could not run the batch: {self._log.last}; try a smaller one")

    def _check(self, images: npt.NDArray[np.uint8]) -> None:
        side, (low, high) = self.size, self.batches
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            actual = f"{images.dtype} {list(images.shape)}"
            raise MvmrError(f"the engine takes images as uint8 [N, {side}, {side}, 3], not {actual}; prepare them so")
        if not low <= len(images) <= high:
            reason = f"a batch of {len(images)} is outside the engine's profile, {low} to {high} images; split it"
            raise MvmrError(f"{reason}, or rebuild: mvmr export BUNDLE --trt --rebuild --min-batch N --max-batch N")


def _lack(bundle: Bundle, gpu: Device, version: str, batches: Batches | None) -> str | None:
    files, name = bundle.manifest.files, engine_name(gpu.compute_capability, version)
    if ONNX not in files:
        return f"bundle {bundle.path} has no {ONNX}, which engines are built from"
    if name not in files or report_of(name) not in files:
        machine = f"{gpu.name}, compute capability {gpu.compute_capability}, TensorRT {release(version)}"
        engines = ", ".join(Path(file).name for file in sorted(files) if file.endswith(".engine"))
        return f"bundle {bundle.path} has no engine for this machine ({machine}); it has {engines or 'none'}"
    sidecar = _sidecar(bundle, name)
    size = bundle.manifest.preprocessing.crop
    if batches and sidecar.get("profile") != profile(batches, size):
        return f"{name} was not built for the batches {batches}"
    return _difference(name, sidecar, gpu, version, files[ONNX])


def _sidecar(bundle: Bundle, name: str) -> dict[str, Any]:
    bundle.verify(report_of(name))
    return strict_json.read_object(bundle.file(report_of(name)), "the report of an engine")


def _difference(name: str, sidecar: Mapping[str, Any], gpu: Device, version: str, onnx_sha256: str) -> str | None:
    made_for, made_by = sidecar.get("compute_capability"), release(sidecar.get("tensorrt"))
    if made_for != gpu.compute_capability:
        theirs, ours = f"{made_for} ({sidecar.get('gpu')})", f"{gpu.compute_capability} ({gpu.name})"
        return f"{name} was built for compute capability {theirs}, this GPU has {ours}"
    if made_by != release(version):
        return f"{name} was built by TensorRT {made_by}, here is {release(version)}"
    if sidecar.get("onnx_sha256") != onnx_sha256:
        hashes = f"sha256 {str(sidecar.get('onnx_sha256'))[:12]}, not {onnx_sha256[:12]}"
        return f"{name} was built from another fp16 ONNX than the bundle's ({hashes})"
    return None


def _outputs(engine: Any, trt: Any, name: str) -> tuple[str, ...]:
    tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [tensor for tensor in tensors if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT]
    types = {tensor: trt.DataType.UINT8 if tensor in inputs else trt.DataType.FLOAT for tensor in tensors}
    wrong = [tensor for tensor, wanted in types.items() if engine.get_tensor_dtype(tensor) != wanted]
    if inputs != [IMAGE] or EMBEDDING not in tensors or wrong:
        listing = ", ".join(f"{tensor} of the wrong type" if tensor in wrong else tensor for tensor in tensors)
        raise _rebuild(f"{name} should take `{IMAGE}` as uint8 and give `{EMBEDDING}` as float32, but has {listing}")
    return tuple(tensor for tensor in tensors if tensor not in inputs)


def _rebuild(reason: str, bundle: Path | str = "BUNDLE") -> MvmrError:
    return MvmrError(f"{reason}; rebuild it here: mvmr export {bundle} --trt --rebuild")
