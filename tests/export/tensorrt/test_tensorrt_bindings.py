"""Every name and argument of TensorRT that mvmr uses, and those of the double, against the published bindings.

The bindings are in tensorrt_api.json, made by tensorrt_surface.py.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvmr.export.tensorrt import build as tensorrt_build
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import runtime as tensorrt_runtime
from tests.export.tensorrt.tensorrt_double import (
    VERSION,
    Builder,
    Double,
    IBuilderConfig,
    ICudaEngine,
    IExecutionContext,
    IHostMemory,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    ITimingCache,
    OnnxParser,
    Runtime,
)

MODULES = (tensorrt, tensorrt_build, tensorrt_runtime)
SURFACES = json.loads((Path(__file__).with_name("tensorrt_api.json")).read_text())
RECORDED = (IHostMemory, ITimingCache, IOptimizationProfile, IBuilderConfig, INetworkDefinition, Builder)
RECORDED += (OnnxParser, ICudaEngine, IExecutionContext, Runtime, ILogger)


def arguments(method: Any) -> list[str]:
    listed = list(inspect.signature(method).parameters.values())[1:]
    return [parameter.name for parameter in listed]


def accepts(overload: str, arguments: list[str]) -> bool:
    """Whether the overload "name(first, second=)" may be called with these arguments, in this order."""
    wanted = re.findall(r"\w+=?", overload.partition("(")[2])
    required = [name for name in wanted if not name.endswith("=")]
    return len(arguments) >= len(required) and arguments == [name.rstrip("=") for name in wanted][: len(arguments)]


@pytest.mark.parametrize("version", SURFACES)
@pytest.mark.parametrize("kind", RECORDED, ids=lambda kind: kind.__name__)
def test_the_double_has_no_member_that_tensorrt_lacks(kind, version):
    surface = SURFACES[version]["classes"][kind.__name__]
    for name, member in vars(kind).items():
        if name.startswith("_") or name in ("content", "tensors", "Severity"):
            continue
        if inspect.isfunction(member):
            overloads = [entry for entry in surface if entry.startswith(f"{name}(")]
            assert any(accepts(overload, arguments(member)) for overload in overloads), (name, overloads)
        else:
            assert name in surface


@pytest.mark.parametrize("version", SURFACES)
@pytest.mark.parametrize("name", ["Builder", "OnnxParser", "Runtime"])
def test_the_double_starts_objects_as_tensorrt_does(name, version):
    overloads = [entry for entry in SURFACES[version]["classes"][name] if entry.startswith("__init__(")]
    assert any(accepts(overload, arguments(getattr(Double, name))) for overload in overloads), overloads


def chains(module: Any) -> Iterator[list[str]]:
    """Dotted names in the source of a module: ["trt", "MemoryPoolType", "WORKSPACE"]."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield [node.id, *parts]


@pytest.mark.parametrize("version", SURFACES)
def test_every_name_that_we_take_from_tensorrt_exists(version):
    surface = SURFACES[version]
    used = {".".join(chain[1:]) for module in MODULES for chain in chains(module) if chain[0] == "trt"}
    enums = {f"{enum}.{member}" for enum, members in surface["enums"].items() for member in members}
    names = enums | set(surface["enums"]) | set(surface["classes"]) | {"__version__", "ILogger.__init__"}
    assert {"Builder", "OnnxParser", "Runtime", "MemoryPoolType.WORKSPACE", "DataType.UINT8"} <= used
    assert used <= names


# The variables that hold TensorRT's objects in our modules.
OBJECTS = {
    "builder": "Builder",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "cache": "ITimingCache",
    "parser_error": "ParserError",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "self._engine": "ICudaEngine",
    "self._runtime": "Runtime",
}


@pytest.mark.parametrize("version", SURFACES)
def test_every_member_of_an_object_that_we_use_exists(version):
    used = set()
    for chain in (chain for module in MODULES for chain in chains(module)):
        holder, _, member = ".".join(chain).rpartition(".")
        if holder in OBJECTS:
            used.add((OBJECTS[holder], member))
    assert {kind for kind, _ in used} == set(OBJECTS.values())
    classes = SURFACES[version]["classes"]
    members = {(kind, entry.partition("(")[0]) for kind in classes for entry in classes[kind]}
    assert used - members == set()


def test_the_list_tells_the_versions_apart():
    """That precision flags are gone in 11 is why networks are strongly typed: a list that misses it is no list."""
    assert set(SURFACES) == {"10.16.1.11", VERSION}
    assert "FP16" in SURFACES["10.16.1.11"]["enums"]["BuilderFlag"]
    assert "FP16" not in SURFACES[VERSION]["enums"]["BuilderFlag"]
    assert not any(
        "execute_async_v2" in entry for s in SURFACES.values() for entry in s["classes"]["IExecutionContext"]
    )
