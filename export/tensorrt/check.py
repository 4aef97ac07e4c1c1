"""Which TensorRT is here, that of data centres or that of RTX cards, and what it can do on this machine."""

from mvmr.cli.support import Support, find_lack
from mvmr.export.runtimes import check_provider
from mvmr.export.tensorrt import runtime


def data_centre(version: str | None) -> Support:
    """Return what can be done here with the TensorRT of this version, None where it is not installed."""
    if version is None:
        return Support.absent("not installed; `mvmr export --trt` takes it and an NVIDIA GPU")
    return Support(
        version=version,
        export=find_lack(lambda: runtime.package(runtime.device())),
        serve=find_lack(lambda: check_provider("tensorrt")),
    )


def rtx() -> Support:
    """Return what can be done here with TensorRT for RTX: exporting takes no GPU, serving does."""
    try:
        # here, for they import onnxruntime, which may be broken
        from mvmr.export.tensorrt import rtx_build, rtx_provider

        version, installed = rtx_provider.version(), rtx_build.is_installed()
    except Exception as error:  # `mvmr doctor` says more of it
        return Support.absent(f"cannot be looked for: {type(error).__name__}: {error}")
    if not installed:
        return Support.absent("not installed: pip install 'mvmr[rtx]' (Linux on x86-64)")
    return Support(version=version, export=find_lack(rtx_build.package), serve=find_lack(rtx_provider.device))
