"""TensorRT on this machine: the GPU, found without it, the package, and what it says when something fails."""

import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from mvmr.errors import MvmrError, NotHere, one_line


@dataclass(frozen=True, kw_only=True)
class Device:
    """The CUDA device in use; `driver` is None where nvidia-smi does not say."""

    name: str
    compute_capability: str
    driver: str | None
    cuda: str

    def to_json(self) -> dict[str, str | None]:
        """Return what an engine's sidecar says about the GPU it was built on."""
        return {"gpu": self.name, **{key: value for key, value in asdict(self).items() if key != "name"}}


def device() -> Device:
    """Return the CUDA device that torch would use, found without TensorRT.

    TensorRT must not be asked: without a device its runtime returns an object whose first use ends the process.

    Raises: NotHere when there is none, saying what runs without TensorRT.
    """
    import torch

    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available() and torch.version.cuda is not None
    if not usable:
        why = f" ({one_line(notices[0].message)})" if notices else ""
        raise NotHere(
            f"TensorRT needs an NVIDIA GPU and its driver, and torch finds no CUDA device here{why}; build the engine "
            "where there is one, or use `mvmr export --fp16`: onnxruntime's CUDA provider runs that without TensorRT, "
            "and TensorRT for RTX (pip install 'mvmr[rtx]') builds from it when it starts"
        )
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        name=card.name,
        compute_capability=f"{card.major}.{card.minor}",
        driver=_driver(),
        cuda=str(torch.version.cuda),
    )


def package(gpu: Device) -> Any:
    """Import and return the tensorrt module; asked for only after `device` has found `gpu`.

    Raises: NotHere when it is not installed, MvmrError when its libraries are not there; both with the cure.
    """
    try:
        return import_module("tensorrt")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "tensorrt"
        problem = "is not installed" if missing else f"cannot be loaded ({one_line(error)})"
        raise (NotHere if missing else MvmrError)(
            f"the package tensorrt {problem}: pip install tensorrt-cu{gpu.cuda.partition('.')[0]} (it fetches its "
            "libraries from NVIDIA's own package index); `mvmr export --fp16` needs no TensorRT"
        ) from error


def release(version: object) -> str:
    """Return major.minor.patch of a TensorRT version: engines of "11.4.0.106" serve every 11.4.0."""
    return ".".join(str(version).split(".")[:3])


def logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps what matters instead of printing it: `last` is the last error's text."""

    class Log(trt.ILogger):  # the base class is there only once TensorRT is
        last = "it gives no reason"

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = one_line(msg)

    return Log()


def start(kind: Callable[[Any], Any], log: Any) -> Any:
    """Make a `trt.Builder` or `trt.Runtime`.

    Raises: MvmrError when TensorRT returns none (its bindings then raise a bare TypeError).
    """
    try:
        return kind(log)
    except TypeError as error:
        raise MvmrError(f"TensorRT cannot start on this GPU: {log.last}; check the driver with nvidia-smi") from error


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().partition("\n")[0] or None
