"""Running an exported student with onnxruntime, on the provider asked for and on no other (torch-free)."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from mvmr import strict_json
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.cores import usable_cores
from mvmr.errors import MvmrError, shorten, unknown
from mvmr.export.artifacts import DENSE, EMBEDDING, IMAGE, LOGITS, Artifact
from mvmr.export.tensorrt import rtx_provider
from mvmr.storage.atomic import cache_dir

Outputs = dict[str, npt.NDArray[np.float32]]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    rtx_provider.NAME: rtx_provider.PROVIDER,
}
_CURES = {
    "cpu": "pip install --force-reinstall onnxruntime",
    "cuda": "pip install onnxruntime-gpu in place of onnxruntime, with the CUDA and cuDNN it names, or use cpu",
    "tensorrt": "pip install onnxruntime-gpu and the TensorRT major version it was built for (see `ldd` of its "
    "libonnxruntime_providers_tensorrt.so), or use cuda",
    rtx_provider.NAME: f"{rtx_provider.INSTALL}, or use cpu",
}
_ERRORS_ONLY = 4  # of onnxruntime's log: what fails is raised
# Texts of a model that name another file: of weights (the key "location", the only one onnxruntime looks for), or of an
# engine that a provider has compiled. `mvmr export` writes neither, and no bundle lists the hash of such a file. In
# protobuf a text's length, 8 or 9 here, stands before it; a padded length ends in a zero byte.
_EXTERNAL_REFERENCES = {
    "weights": re.compile(rb"location(?<=[\x08\x00]location)"),
    "a compiled engine": re.compile(rb"EPContext(?<=[\x09\x00]EPContext)"),
}


class Session:
    """An exported ONNX file, ready to run.

    Shapes: called with uint8 [N, S, S, 3] RGB, prepared by `preprocess`, it returns ``embedding`` float32 [N, D], not
        normalised, ``logits_<head>`` float32 [N, C] of each head and, of a file exported with it, ``dense`` float32
        [N, h, w, C], the features before they are pooled.

    Args:
        model: the file, or its bytes.
        provider: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``; where it can't be had that is an error, never
            another one instead.
        threads: of one image batch; None takes all cores of this process.
        options: onnxruntime's options of the provider.

    Raises: MvmrError for a file that is missing, damaged, of an opset this onnxruntime doesn't know, not a student
        exported by mvmr, or that refers to other files; or a provider that can't be had.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.name = "the exported model" if isinstance(model, bytes) else str(model)
        if provider not in PROVIDERS:
            raise unknown("provider", provider, PROVIDERS)
        if isinstance(model, Path) and not model.is_file():
            raise MvmrError(f"{model} is not there; make it with `mvmr export`")
        self._session = _start(model, self.name, provider, threads, options)
        # TensorRT for RTX has compiled for so many images; a larger batch goes through in parts.
        self._largest_batch = rtx_provider.BATCHES[2] if provider == rtx_provider.NAME else None
        self._check_contract()
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.heads: dict[str, tuple[str, ...]] = self._read_heads()

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return int(self._session.get_inputs()[0].shape[1])

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self._shapes()[EMBEDDING][0]

    @property
    def preprocess(self) -> Preprocess:
        """How images are resized and cropped before they come here; raises MvmrError where the file doesn't say."""
        return Preprocess.from_dict(self._read("preprocessing"))

    def __call__(self, images: npt.NDArray[np.uint8]) -> Outputs:
        """Run a batch of any size; raises MvmrError for an array of another type or shape."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (self.size, self.size, 3):
            wanted = f"uint8 [N, {self.size}, {self.size}, 3]"
            raise MvmrError(f"{self.name} takes {wanted}, this array is {images.dtype} {list(images.shape)}")
        names = [output.name for output in self._session.get_outputs()]
        if not len(images):
            return {name: np.empty((0, *shape), np.float32) for name, shape in self._shapes().items()}
        step = self._largest_batch or len(images)
        parts = [
            self._session.run(names, {IMAGE: images[start : start + step]}) for start in range(0, len(images), step)
        ]
        rows = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return dict(zip(names, rows, strict=True))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one image's outputs."""
        return {output.name: tuple(output.shape[1:]) for output in self._session.get_outputs()}

    def _check_contract(self) -> None:
        inputs = [
            (tensor.name, tensor.type, tensor.shape[3:], len(tensor.shape)) for tensor in self._session.get_inputs()
        ]
        if inputs != [(IMAGE, "tensor(uint8)", [3], 4)] or not isinstance(self._session.get_inputs()[0].shape[1], int):
            signature = ", ".join(
                f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in self._session.get_inputs()
            )
            raise MvmrError(
                f"{self.name} takes {signature} instead of {IMAGE} uint8 [N, S, S, 3]; make it by `mvmr export`"
            )
        shapes, kinds = self._shapes(), {tensor.type for tensor in self._session.get_outputs()}
        misfits = [
            name
            for name, shape in shapes.items()
            if len(shape) != (3 if name == DENSE else 1) or not all(isinstance(axis, int) for axis in shape)
        ]
        if EMBEDDING not in shapes or misfits or kinds != {"tensor(float)"}:
            signature = ", ".join(
                f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in self._session.get_outputs()
            )
            raise MvmrError(
                f"{self.name} gives {signature} instead of {EMBEDDING} float32 [N, D]; make it by `mvmr export`"
            )

    def _read_heads(self) -> dict[str, tuple[str, ...]]:
        heads = {name: tuple(classes) for name, classes in self._read("heads").items() if _are_names(classes)}
        wanted = {f"{LOGITS}{name}": len(classes) for name, classes in heads.items()}
        widths = {name: shape[0] for name, shape in self._shapes().items() if name not in (EMBEDDING, DENSE)}
        if wanted != widths:
            mismatch = f"gives {shorten(widths)} where its metadata say {shorten(wanted)}"
            raise MvmrError(f"{self.name} {mismatch}; export it again")
        return heads

    def _read(self, key: str) -> dict[str, Any]:
        try:
            value = strict_json.parse(self.metadata[key])
            if not isinstance(value, dict):
                raise TypeError(f"{key} is no JSON object")
            return value
        except (KeyError, ValueError, TypeError) as error:
            raise MvmrError(f"{self.name} has no metadata {key!r} of mvmr's; make it by `mvmr export`") from error


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def locate(artifact: Artifact, bundle: Bundle) -> str:
    """Name the bundle's file of an artifact, the same for every machine; raises MvmrError where it is not there."""
    if artifact.file not in bundle.manifest.files:
        cure = f"make it by `mvmr export {bundle.path} --{artifact.key}`"
        raise MvmrError(f"bundle {bundle.path} has no {artifact.file}; {cure}")
    return artifact.file


def open_artifact(
    artifact: Artifact, bundle: Bundle, *, provider: str | None = None, threads: int | None = None
) -> Session:
    """Start a session of a bundle's file; see `mvmr.export.runtimes.open_artifact`, which also checks it."""
    return Session(bundle.file(artifact.file), provider=provider or "cpu", threads=threads)


def check_provider(provider: str) -> None:
    """Refuse, in one line with the cure, a provider that this onnxruntime or this machine does not have."""
    if provider not in PROVIDERS:
        raise unknown("provider", provider, PROVIDERS)
    if provider == rtx_provider.NAME:  # a plug-in: onnxruntime was built without it, always
        rtx_provider.device()
    elif PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise MvmrError(f"onnxruntime {onnxruntime.__version__} here has no {provider}: {_CURES[provider]}")


def _external_reference(model: Path | bytes) -> str | None:
    """What a model refers to in other files, None where it stands alone."""
    if isinstance(model, bytes):
        return next((reference for reference, text in _EXTERNAL_REFERENCES.items() if text.search(model)), None)
    if not model.stat().st_size:  # which can't be mapped
        return None
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return next((reference for reference, text in _EXTERNAL_REFERENCES.items() if text.search(content)), None)


def _options(provider: str, model: Path | bytes) -> dict[str, str]:
    if provider == "cuda":  # parity with float32 comes first: TF32 rounds every product to 10 bits
        return {"use_tf32": "0"}
    if provider == "tensorrt":
        # Else it builds its engine again at every start, for minutes. It names a cached engine after the names in the
        # graph, not after the weights (its issue 32254): a student trained again would be given the old one's.
        content = model if isinstance(model, bytes) else model.read_bytes()
        folder = cache_dir() / "tensorrt" / hashlib.sha256(content).hexdigest()[:12]
        return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
    return {}


def _start(
    model: Path | bytes, name: str, provider: str, threads: int | None, options: Mapping[str, str] | None
) -> onnxruntime.InferenceSession:
    check_provider(provider)
    if reference := _external_reference(model):
        raise MvmrError(f"{name} refers to {reference} in another file, which no bundle vouches for; export it again")
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # not its own, which is not looked into
    settings.intra_op_num_threads = threads or usable_cores()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not burn a core
    settings.log_severity_level = _ERRORS_ONLY
    providers = [(PROVIDERS[provider], dict(options or _options(provider, model)))]
    if provider == "tensorrt":
        providers.append((PROVIDERS["cuda"], _options("cuda", model)))
    elif provider == rtx_provider.NAME:
        # The images' size must be known before it compiles: the file is looked at, and checked, on the processor.
        rtx_provider.add_to(settings, model, size=Session(model, threads=1).size, options=options or {})
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            settings,
            providers=None if provider == rtx_provider.NAME else providers,  # a plug-in's stand in the settings
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime raises a dozen kinds, all of them derived from Exception alone
        reason = " ".join(str(error).split())
        if "opset" in reason:
            problem = f"onnxruntime {onnxruntime.__version__} doesn't know the opset of {name}"
            raise MvmrError(f"{problem}; upgrade onnxruntime, or export again with --opset 20") from error
        if "fallback to CPU EP has been explicitly disabled" in reason:
            raise MvmrError(
                f"{provider} leaves a part of {name} to the processor; use cpu, or another provider"
            ) from error
        summary = reason.removeprefix("[ONNXRuntimeError] : ")[:200]
        raise MvmrError(f"onnxruntime cannot load {name} on {provider} ({summary}); export it again") from error
    # Where a provider's libraries are missing, onnxruntime goes on without it and says nothing.
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise MvmrError(f"onnxruntime fell back to {session.get_providers()[0]} from {provider}: {_CURES[provider]}")
    return session
