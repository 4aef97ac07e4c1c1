"""NVIDIA's own builder and parser without a GPU: TensorRT for RTX, under the Python bindings of either TensorRT.

Its libraries come with onnxruntime's plug-in. Under the bindings of TensorRT for RTX that is what `mvmr export --trt`
uses (`rtx_build.package`). Under those of the data centres' TensorRT, which a machine with a GPU has, it
shows that our calls pass through them: the libraries go by other names there, and lack one function, of plug-ins.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mvmr.export.tensorrt import rtx_build, rtx_provider
from mvmr.export.tensorrt.runtime import Device

NO_GPU = Device(name="none", compute_capability="8.9", driver=None, cuda="13.0")

_MAJOR = 11


def require_wheels() -> None:
    """Skip where there are no wheels of TensorRT for RTX."""
    if not rtx_build.is_installed():
        pytest.skip("TensorRT for RTX is not installed: it has wheels for Linux on x86-64 only")


def build_under_data_centre_bindings(folder: Path, model: Path, size: int) -> dict[str, object]:
    """Build with `mvmr.export.tensorrt.build` in a process of its own: returns its sidecar, or the refusal.

    In one process the two kinds of bindings would register the same C++ classes twice.
    """
    require_wheels()
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler to make the missing function with")
    _lay_out(folder / "tensorrt_bindings")
    command = [sys.executable, __file__, str(folder), str(model), str(size)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def _lay_out(package: Path) -> None:
    """The bindings, and beside them, where they look first, the libraries under the names that they look for."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None
    assert spec.origin is not None, "tensorrt-cu13-bindings is an extra of development"
    package.mkdir()
    for part in Path(spec.origin).parent.iterdir():
        (package / part.name).symlink_to(part)
    for ours, theirs in (("nvinfer", "libtensorrt_rtx.so.*.*"), ("nvonnxparser", "libtensorrt_onnxparser_rtx.so.*.*")):
        (library,) = (file for folder in rtx_provider.folders() for file in folder.glob(theirs))
        (package / f"lib{ours}.so.{_MAJOR}").symlink_to(library)
    source = package / "plugins.c"
    source.write_text("int initLibNvInferPlugins(void *logger, const char *name) { return 1; }\n")
    library = package / f"libnvinfer_plugin.so.{_MAJOR}"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)


def _build(folder: str, model: str, size: str) -> dict[str, object]:
    sys.path.insert(0, folder)
    import tensorrt_bindings

    from mvmr.errors import MvmrError
    from mvmr.export.tensorrt import build as tensorrt_build

    assert Path(tensorrt_bindings.__file__).parent == Path(folder) / "tensorrt_bindings"
    tensorrt_build.device = lambda: NO_GPU
    try:
        built = tensorrt_build.build(Path(model).read_bytes(), size=int(size), trt=tensorrt_bindings)
    except MvmrError as error:
        return {"refused": str(error)}
    return {**built.sidecar, "bytes": len(built.engine)}


if __name__ == "__main__":
    print(json.dumps(_build(*sys.argv[1:])))  # noqa: T201
