"""Which TensorRT is here, that of data centres or that of RTX cards, and what it can do on this machine.

The rooms that know are imported by name: the core stands below them, and must not stop at what is broken there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from mvmr.errors import MvmrError

_RUNTIME, _SESSION = "mvmr.export.tensorrt.runtime", "mvmr.export.onnx.session"
_RTX_BUILD, _RTX_PROVIDER = "mvmr.export.tensorrt.rtx_build", "mvmr.export.tensorrt.rtx_provider"


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """A TensorRT: its version, None where it is not installed; what `export --trt` and `serve` lack (None: ready)."""

    version: str | None
    export: str | None
    serve: str | None

    def __str__(self) -> str:
        if self.version is None and self.export is not None and self.export == self.serve:
            return self.export
        lacks = {"export": self.export, "serve": self.serve}
        return "\n".join([self.version or "not installed", *(f"{use}: {why or 'ready'}" for use, why in lacks.items())])


def data_centre(version: str | None) -> TensorRT:
    """Return what can be done here with the TensorRT of this version, None where it is not installed."""
    if version is None:
        return _absent("not installed; `mvmr export --trt` takes it and an NVIDIA GPU")
    return TensorRT(
        version=version,
        export=_lack(lambda: import_module(_RUNTIME).package(import_module(_RUNTIME).device())),
        serve=_lack(lambda: import_module(_SESSION).check_provider("tensorrt")),
    )


def rtx() -> TensorRT:
    """Return what can be done here with TensorRT for RTX: exporting takes no GPU, serving does."""
    try:
        version, found = import_module(_RTX_PROVIDER).version(), import_module(_RTX_BUILD).is_installed()
    except Exception as error:  # onnxruntime, which `mvmr doctor` says more of
        return _absent(f"cannot be looked for: {type(error).__name__}: {error}")
    if not found:
        return _absent("not installed: pip install 'mvmr[rtx]' (Linux on x86-64)")
    return TensorRT(
        version=version,
        export=_lack(lambda: import_module(_RTX_BUILD).package()),
        serve=_lack(lambda: import_module(_RTX_PROVIDER).device()),
    )


def _absent(why: str) -> TensorRT:
    return TensorRT(version=None, export=why, serve=why)


def _lack(call: Callable[[], object]) -> str | None:
    try:
        call()
    except MvmrError as error:
        return str(error)
    except Exception as error:  # a package that is half there fails in many ways, and reporting that is the task
        return f"does not work: {type(error).__name__}: {error}"
    return None
