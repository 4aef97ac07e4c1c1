"""TensorRT for RTX as onnxruntime's plug-in provider: whether it is here, for which GPU, its options (torch-free).

It compiles the ONNX when a session starts, and kernels for the GPU as they are needed; the kernels are kept in a folder
beside the ONNX. Not yet run on hardware.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

import onnxruntime

from mvmr.errors import MvmrError, NotHere
from mvmr.export.artifacts import IMAGE
from mvmr.storage.atomic import cache_dir

NAME = "tensorrt-rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = "pip install 'mvmr[rtx]'"
# The smallest, the usual and the largest batch that it compiles for; left out, it plans for up to 32767 images.
BATCHES = (1, 8, 64)

_DISTRIBUTION = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
_LIBRARY = re.compile(r"libtensorrt_rtx\.so\.(\d+\.\d+\.\d+)")


def version() -> str | None:
    """Return the version of the TensorRT for RTX that the plug-in brings ("1.7.1"), None where there is none.

    Reads file names: importing the plug-in would load its libraries.
    """
    if util.find_spec(PACKAGE) is None:
        return None
    matches = [_LIBRARY.fullmatch(file.name) for folder in folders() for file in folder.iterdir()]
    return max((match[1] for match in matches if match), key=_numbers, default=None)


def folders() -> list[Path]:
    """Where the plug-in's libraries are; empty where it is not installed."""
    spec = util.find_spec(PACKAGE)
    return [Path(location) for location in (spec.submodule_search_locations or ())] if spec else []


def device() -> Any:
    """Return the GPU to run on, onnxruntime's `OrtEpDevice`: the first that the plug-in offers.

    Raises: NotHere, before anything long, where the plug-in is not installed, or there is no NVIDIA driver or no GPU
        that it takes; MvmrError where it does not fit this onnxruntime.
    """
    release = version()
    if release is None:
        raise NotHere(f"the provider {NAME} is not installed here: {INSTALL} (Linux on x86-64), or use cpu")
    _register(release)
    for gpu in onnxruntime.get_ep_devices():
        if gpu.ep_name == PROVIDER:
            return gpu  # one of several: the plug-in takes one device to a session
    raise NotHere(
        f"TensorRT for RTX {release} finds no GPU here; it takes NVIDIA's of compute capability 8.0, 8.6, 8.9, 12.0 "
        "and later with a driver that works, see nvidia-smi; or use cpu"
    )


def add_to(settings: onnxruntime.SessionOptions, model: Path | bytes, *, size: int, options: Mapping[str, str]) -> None:
    """Have a session of `model` run on the GPU, and on nothing else: what is left to the processor fails the session.

    size: image side in pixels; options: of the plug-in, which win over ours.

    Raises: MvmrError as `device` does, or for a cache that can't be written.
    """
    gpu = device()
    shapes = {name: f"{IMAGE}:{n}x{size}x{size}x3" for name, n in zip(("min", "opt", "max"), BATCHES, strict=True)}
    defaults = {f"nv_profile_{name}_shapes": shape for name, shape in shapes.items()}
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings.add_provider_for_devices(
        [gpu], defaults | {"nv_runtime_cache_path": str(kernels_of(model, gpu)), **options}
    )


def kernels_of(model: Path | bytes, gpu: Any) -> Path:
    """Make and return the folder for the kernels compiled from `model`: beside it, or in the cache where that can't be.

    Kernels of another TensorRT for RTX, GPU or ONNX would be left aside and overwritten: each has a folder of its own.
    """
    content = model if isinstance(model, bytes) else model.read_bytes()
    name = f"rtx{version()}-gpu{gpu.device.device_id:04x}-{hashlib.sha256(content).hexdigest()[:12]}"
    fallback = cache_dir() / NAME / name
    for folder in [fallback] if isinstance(model, bytes) else [model.parent / name, fallback]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a bundle that is mounted read-only
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise MvmrError(f"cannot make {fallback} for compiled kernels; set MVMR_CACHE to a folder that can be written to")


@cache
def _register(release: str) -> None:
    """Load the plug-in into onnxruntime, once to a process: it cannot be registered twice."""
    if any(gpu.ep_name == PROVIDER for gpu in onnxruntime.get_ep_devices()):
        return  # by the program that we are a part of
    try:
        plugin = import_module(PACKAGE)
        onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    except Exception as error:  # onnxruntime raises a dozen kinds, all of them derived from Exception alone
        reason = " ".join(str(error).split())
        if driver := re.search(r"(libcuda|libnvidia-ml)\.so\S*: cannot open", reason):
            raise NotHere(
                f"TensorRT for RTX {release} needs an NVIDIA GPU and its driver; {driver[1]}.so.1 is not here: "
                "install the driver (in a container: the NVIDIA container toolkit), or use cpu"
            ) from error
        raise MvmrError(
            f"onnxruntime {onnxruntime.__version__} cannot load TensorRT for RTX {release} ({reason[-200:]}); "
            f"pip install --upgrade onnxruntime {_DISTRIBUTION}, or use cpu"
        ) from error


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
