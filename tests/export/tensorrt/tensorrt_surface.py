"""Write down which classes, methods, arguments and enum members TensorRT's published Python bindings have.

Usage: tensorrt_surface.py WHEEL... (tensorrt_cu13_bindings-*.whl for this Python; `pip download --no-deps` gets them).
Writes tensorrt_api.json, to which test_tensorrt_bindings.py holds what mvmr calls. Needs a C compiler.

The bindings need libraries of several GB that are not on the package index. They resolve nine C functions in them and
call none on import, so libraries of empty functions will do: that shows names and arguments, never behaviour.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

API = Path(__file__).with_name("tensorrt_api.json")
CLASSES = (
    "Builder",
    "INetworkDefinition",
    "OnnxParser",
    "ParserError",
    "IBuilderConfig",
    "IOptimizationProfile",
    "ITimingCache",
    "IHostMemory",
    "ILogger",
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
)
ENUMS = (
    "BuilderFlag",
    "DataType",
    "ILogger.Severity",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "TensorIOMode",
)

_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# Python's own members, and what pybind11 adds to every class.
_PRIVATE = re.compile(r"__(?!init__)\w+__|_pybind11\w*")


def main(wheels: list[str]) -> None:
    surfaces = {}
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as folder:
            unpack(Path(wheel), Path(folder))
            command = [sys.executable, __file__, "--read", folder]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            surface = json.loads(answer.stdout)
        surfaces[surface.pop("version")] = surface
    API.write_text(json.dumps(surfaces, indent=1, sort_keys=True) + "\n")


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the wheel and put libraries of empty functions beside its extension module, which looks there first."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    major = wheel.name.split("-")[1].partition(".")[0]
    source = folder / "empty.c"
    source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in _FUNCTIONS))
    for library in _LIBRARIES:
        out = folder / "tensorrt_bindings" / f"lib{library}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(out), str(source)], check=True)


def read(folder: str) -> dict[str, object]:
    """Import the unpacked bindings and describe the classes and enums above."""
    sys.path.insert(0, folder)
    import tensorrt_bindings as trt

    log = type("Log", (trt.ILogger,), {"__init__": lambda self: trt.ILogger.__init__(self)})()
    if not isinstance(log, trt.ILogger):
        raise SystemExit("a logger can no longer be written in Python")
    classes = {name: members(getattr(trt, name)) for name in CLASSES}
    enums = {name: sorted(_find(trt, name).__members__) for name in ENUMS}
    return {"version": trt.__version__, "classes": classes, "enums": enums}


def members(kind: type) -> list[str]:
    """Return "name" for each property, "name(first, second=)" for each overload of a method ("=": has a default)."""
    names = []
    for name in dir(kind):
        if not _PRIVATE.fullmatch(name):
            member = getattr(kind, name)
            names += overloads(name, member.__doc__ or "") if callable(member) else [name]
    return sorted(set(names))


def overloads(name: str, text: str) -> list[str]:
    """Read the arguments of each overload from the docstring that pybind11 writes."""
    lists = re.findall(rf"^(?:\d+\. )?{name}\(self: (.*)\) -> ", text, flags=re.MULTILINE)
    return [f"{name}({', '.join(_arguments(inside))})" for inside in lists]


def _arguments(inside: str) -> list[str]:
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.partition(":")[0].strip() + ("=" if " = " in part else "") for part in parts[1:]]


def _find(module: object, path: str) -> object:
    for part in path.split("."):
        module = getattr(module, part)
    return module


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        print(json.dumps(read(sys.argv[2])))  # noqa: T201
    else:
        main(sys.argv[1:])
