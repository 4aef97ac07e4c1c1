"""TensorRT engines: built by NVIDIA's own builder without a GPU; loaded and run on a double; for real on a GPU if any.

The builder is that of TensorRT for RTX. What only a GPU shows, a timing cache that fits, an engine that loads and what
it computes, runs on the double: that shows that the calls are those intended and exist, not that TensorRT obeys.
"""

import ast
import ctypes
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.head import Head
from mvmr.bundles.manifest import Manifest
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.export.onnx.graph import to_onnx
from mvmr.export.tensorrt import build as tensorrt_build
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_build
from mvmr.export.tensorrt import runtime as tensorrt_runtime
from mvmr.models.student import Student
from mvmr.models.torchvision_resnet import Resnet
from tests.export import tensorrt_rtx

SIDE, DIM = 4, 5
VERSION = "11.4.0.106"
MODULES = (tensorrt, tensorrt_build, tensorrt_runtime)
SURFACES = json.loads((Path(__file__).with_name("tensorrt_api.json")).read_text())


# The double. Its classes are called as TensorRT's, and a test below holds their members to the published bindings.


class Recorded:
    def __init__(self, double: "Double") -> None:
        self._double = double

    def _called(self, name: str, *arguments: object, answer: object = None) -> Any:
        self._double.calls.append((name, *arguments))
        return self._double.answers.get(name, answer)


class IHostMemory(Recorded):
    def __init__(self, double: "Double", content: bytes) -> None:
        super().__init__(double)
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content


class ITimingCache(Recorded):
    content = b"timed"

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._double, self.content)


class IOptimizationProfile(Recorded):
    def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple) -> None:  # noqa: A002
        self._called("set_shape", input, min, opt, max)


class IBuilderConfig(Recorded):
    def set_memory_pool_limit(self, pool: object, pool_size: int) -> None:
        self._called("set_memory_pool_limit", pool, pool_size)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        return self._called("add_optimization_profile", type(profile), answer=0)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if self._called("create_timing_cache", serialized_timing_cache, answer="made") is None:
            return None if serialized_timing_cache else ITimingCache(self._double)
        return ITimingCache(self._double)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        kept = self._double.calls[-1][1] != b"of another GPU"
        return self._called("set_timing_cache", ignore_mismatch, answer=kept)


class INetworkDefinition(Recorded):
    pass


class Builder(Recorded):
    def create_network(self, flags: int = 0) -> INetworkDefinition:
        self._called("create_network", flags)
        return INetworkDefinition(self._double)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._double)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile(self._double)

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory:
        self._called("build_serialized_network")
        return IHostMemory(self._double, b"the plan")


class OnnxParser(Recorded):
    def parse(self, model: bytes) -> bool:
        return self._called("parse", hashlib.sha256(model).hexdigest(), answer=True)


class ICudaEngine(Recorded):
    tensors = ("image", "embedding", "logits_x")

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return self._double.answers.get("get_tensor_name", self.tensors)[index]

    def get_tensor_mode(self, name: str) -> object:
        modes = self._double.TensorIOMode
        return modes.INPUT if name in ("image", "pixels") else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> object:
        types = self._double.DataType
        default = types.UINT8 if name in ("image", "pixels") else types.FLOAT
        return self._double.answers.get("get_tensor_dtype", {}).get(name, default)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, DIM)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert (name, profile_index) == ("image", 0)
        return [(batch, SIDE, SIDE, 3) for batch in (2, 3, 6)]

    def create_execution_context(self) -> "IExecutionContext | None":
        return self._called("create_execution_context", answer=IExecutionContext(self._double))


class IExecutionContext(Recorded):
    """Works on the memory it is given: embedding[i, j] = sum of image i + j, logits[i, j] = minus that."""

    def __init__(self, double: "Double") -> None:
        super().__init__(double)
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        self._shape = shape
        return self._called("set_input_shape", name, shape, answer=True)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._shape[0], DIM)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return self._called("set_tensor_address", name, answer=True)

    def execute_async_v3(self, stream_handle: int) -> bool:
        pixels = ctypes.string_at(self._addresses["image"], math.prod(self._shape))
        sums = np.frombuffer(pixels, np.uint8).reshape(self._shape[0], -1).sum(axis=1, dtype=np.float32)
        for name, sign in (("embedding", 1), ("logits_x", -1)):
            values = (sign * (sums[:, None] + np.arange(DIM))).astype(np.float32).tobytes()
            ctypes.memmove(self._addresses[name], values, len(values))
        return self._called("execute_async_v3", stream_handle, answer=True)


class Runtime(Recorded):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        self._double.say("The engine plan file is not compatible")
        return self._called("deserialize_cuda_engine", serialized_engine, answer=ICudaEngine(self._double))


class ILogger:
    Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    def log(self, severity: object, msg: str) -> None:
        raise NotImplementedError


class Double:
    """A recording double of the tensorrt module. It computes nothing of TensorRT's: what it answers is made up.

    calls: what was called, in order, with the arguments that matter; answers: made-up answers by name of the call.
    """

    NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")
    TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")
    DataType = Enum("DataType", "FLOAT HALF UINT8")
    ILogger = ILogger

    def __init__(self, version: str = VERSION, **answers: object) -> None:
        self.__version__ = version
        self.calls: list[tuple[Any, ...]] = []
        self.answers = answers

    def say(self, text: str) -> None:
        self.logger.log(ILogger.Severity.ERROR, text)
        self.logger.log(ILogger.Severity.WARNING, "something else")

    def Builder(self, logger: ILogger) -> Builder:
        return self._start("Builder", Builder, logger)

    def Runtime(self, logger: ILogger) -> Runtime:
        return self._start("Runtime", Runtime, logger)

    def OnnxParser(self, network: INetworkDefinition, logger: ILogger) -> OnnxParser:
        return OnnxParser(self)

    def _start(self, name: str, kind: type, logger: ILogger) -> Any:
        self.logger = logger
        self.calls.append((name,))
        if name in self.answers:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return kind(self)


RECORDED = (IHostMemory, ITimingCache, IOptimizationProfile, IBuilderConfig, INetworkDefinition, Builder)
RECORDED += (OnnxParser, ICudaEngine, IExecutionContext, Runtime, ILogger)


class Stream:
    cuda_stream = 77
    waited = 0

    def synchronize(self) -> None:
        Stream.waited += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Torch as it answers on a machine with an H100; memory is the host's, so that the double can reach it."""
    found = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(tensorrt, "_CUDA", "cpu")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return found


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fp16(side: int = SIDE, **says: str) -> bytes:
    """A small ONNX that says it is the fp16 one of a bundle."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", side, side, 3])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", side, side, 3])
    cast = helper.make_node("Cast", ["image"], ["embedding"], to=TensorProto.FLOAT)
    model = helper.make_model(helper.make_graph([cast], "student", [image], [embedding]))
    helper.set_model_props(model, {"precision": "fp16", "bundle_space_id": "5" * 32, "bundle_hash": "6" * 64} | says)
    return model.SerializeToString()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Building


def test_build_calls_tensorrt_in_this_order(card):
    trt, model = Double(), fp16()
    tensorrt.build(model, size=SIDE, batches=(1, 8, 32), workspace_gb=0.5, timing_cache=b"kept", trt=trt)
    assert trt.calls == [
        ("Builder",),
        ("create_network", 1 << Double.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        ("parse", sha256(model)),
        ("set_memory_pool_limit", Double.MemoryPoolType.WORKSPACE, 2**29),
        ("set_shape", "image", (1, SIDE, SIDE, 3), (8, SIDE, SIDE, 3), (32, SIDE, SIDE, 3)),
        ("add_optimization_profile", IOptimizationProfile),
        ("create_timing_cache", b"kept"),
        ("set_timing_cache", False),
        ("build_serialized_network",),
    ]


@pytest.mark.parametrize("version", ["10.16.1.11", VERSION])
def test_an_engine_says_where_it_came_from(version, card):
    model = fp16()
    built = tensorrt.build(model, size=SIDE, batches=(1, 8, 64), workspace_gb=2, trt=Double(version))
    assert built.engine == b"the plan"
    assert built.timing_cache == b"timed"
    assert built.name == f"trt/encoder.fp16.sm90.trt{version.rpartition('.')[0]}.engine"
    assert built.sidecar == {
        "precision": "fp16",
        "gpu": "NVIDIA H100",
        "compute_capability": "9.0",
        "driver": "580.65.06",
        "cuda": "13.0",
        "tensorrt": version,
        "profile": {"min": [1, SIDE, SIDE, 3], "opt": [8, SIDE, SIDE, 3], "max": [64, SIDE, SIDE, 3]},
        "workspace_gb": 2,
        "onnx_sha256": sha256(model),
        "engine_sha256": sha256(b"the plan"),
        "bundle_hash": "6" * 64,
        "bundle_space_id": "5" * 32,
        "mvmr_version": bundles.__version__,
    }


@pytest.mark.parametrize(
    ("kept", "tried"),
    [(None, [b""]), (b"kept", [b"kept"]), (b"of another GPU", [b"of another GPU", b""])],
)
def test_a_timing_cache_is_handed_over_and_one_that_does_not_fit_is_replaced(kept, tried, card):
    trt = Double()
    assert tensorrt.build(fp16(), size=SIDE, timing_cache=kept, trt=trt).timing_cache == b"timed"
    assert [call[1] for call in trt.calls if call[0] == "create_timing_cache"] == tried
    assert [call for call in trt.calls if call[0] == "set_timing_cache"] == [("set_timing_cache", False)] * len(tried)


def test_a_damaged_timing_cache_is_replaced(card):
    trt = Double(create_timing_cache=None)
    tensorrt.build(fp16(), size=SIDE, timing_cache=b"junk", trt=trt)
    assert [call[1] for call in trt.calls if call[0] == "create_timing_cache"] == [b"junk", b""]


@pytest.mark.parametrize(
    ("answers", "texts"),
    [
        ({"add_optimization_profile": -1}, ["refuses the input shapes [[1, 4, 4, 3], [8, 4, 4, 3], [64, 4, 4, 3]]"]),
        ({"Builder": None}, ["cannot start on this GPU", "nvidia-smi"]),
    ],
)
def test_what_our_builder_never_does_is_told_too(answers, texts, card):
    message = refusal(tensorrt.build, fp16(), size=SIDE, trt=Double(**answers))
    assert all(text in message for text in texts), message


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (fp16(), {"batches": (8, 1, 64)}, "1 <= min <= opt <= max, not (8, 1, 64)"),
        (fp16(), {"batches": (0, 1, 1)}, "--min-batch"),
        (fp16(), {"batches": (1, 8, 2**33)}, "below 2147483648 images, not 8589934592; lower --max-batch"),
        (fp16(), {"workspace_gb": 0}, "--workspace-gb"),
        (fp16(), {"workspace_gb": float("nan")}, "--workspace-gb"),
        (fp16(), {"size": 224}, "takes images of [4, 4, 3], not [224, 224, 3]"),
        (fp16(precision="int8"), {}, "an ONNX of mvmr in int8; make it with `mvmr export --fp16`"),
        (b"no ONNX at all", {}, "is no ONNX"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_gpu_is_looked_for(model, options, text, no_card):
    trt = Double()
    assert text in refusal(tensorrt.build, model, **{"size": SIDE, "trt": trt, **options})
    assert trt.calls == []


# The machine


def test_without_a_cuda_device_no_tensorrt_object_is_touched(no_card):
    """Its runtime would end the process."""
    trt = Double()
    message = refusal(tensorrt.build, fp16(), size=SIDE, trt=trt)
    assert "no CUDA device" in message
    assert "mvmr export --fp16" in message
    assert message == refusal(tensorrt.Engine, b"plan", {}, onnx_sha256="", trt=trt)
    assert trt.calls == []


def test_a_driver_that_does_not_work_is_told_by_torchs_own_words(monkeypatch):
    def warn() -> bool:
        warnings.warn("The NVIDIA driver on your system\nis too old", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    assert "(The NVIDIA driver on your system is too old)" in refusal(tensorrt.device)


def test_an_amd_gpu_is_no_cuda_device(card, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "no CUDA device" in refusal(tensorrt.device)


def test_the_device_is_described_without_tensorrt(card):
    assert tensorrt.device().to_json() == {
        "gpu": "NVIDIA H100",
        "compute_capability": "9.0",
        "driver": "580.65.06",
        "cuda": "13.0",
    }


def test_a_machine_without_nvidia_smi_has_no_driver_version(card, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tensorrt.device().driver is None


@pytest.mark.parametrize(("cuda", "package"), [("13.0", "tensorrt-cu13 "), ("12.8", "tensorrt-cu12 ")])
def test_a_missing_tensorrt_names_the_package_for_this_cuda(cuda, package, card, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    message = refusal(tensorrt.build, fp16(), size=SIDE)
    assert f"pip install {package}" in message
    assert "NVIDIA's own package index" in message


def test_a_tensorrt_whose_libraries_are_missing_says_which(card, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvonnxparser.so.11: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert "cannot be loaded (libnvonnxparser.so.11: cannot open" in refusal(tensorrt.build, fp16(), size=SIDE)


# Loading


def sidecar_of(plan: bytes = b"plan", **changes: object) -> dict[str, object]:
    return {
        "compute_capability": "9.0",
        "gpu": "NVIDIA H100",
        "tensorrt": VERSION,
        "onnx_sha256": "a" * 64,
        "engine_sha256": sha256(plan),
        **changes,
    }


def loaded(trt: Double) -> tensorrt.Engine:
    return tensorrt.Engine(b"plan", sidecar_of(), onnx_sha256="a" * 64, trt=trt)


def test_an_engine_gives_what_it_wrote_for_every_image(card):
    trt = Double()
    engine = loaded(trt)
    assert (engine.size, engine.dim, engine.batches, engine.outputs) == (SIDE, DIM, (2, 6), ("embedding", "logits_x"))
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    images.flags.writeable = False
    waited = Stream.waited
    found = engine(images)
    expected = images.reshape(3, -1).sum(axis=1, dtype=np.float32)[:, None] + np.arange(DIM)
    np.testing.assert_array_equal(found["embedding"], expected)
    np.testing.assert_array_equal(found["logits_x"], -expected)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert Stream.waited == waited + 1
    assert trt.calls == [
        ("Runtime",),
        ("deserialize_cuda_engine", b"plan"),
        ("create_execution_context",),
        ("set_input_shape", "image", (3, SIDE, SIDE, 3)),
        ("set_tensor_address", "image"),
        ("set_tensor_address", "embedding"),
        ("set_tensor_address", "logits_x"),
        ("execute_async_v3", Stream.cuda_stream),
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"compute_capability": "8.6", "gpu": "NVIDIA A10"}, "compute capability 8.6 (NVIDIA A10), this GPU has 9.0"),
        ({"tensorrt": "10.16.1.11"}, "was built by TensorRT 10.16.1, here is 11.4.0"),
        ({"tensorrt": "11.4.1.1"}, "was built by TensorRT 11.4.1, here is 11.4.0"),
        (
            {"onnx_sha256": "b" * 64},
            "built from another fp16 ONNX than the bundle's (sha256 bbbbbbbbbbbb, not aaa",
        ),
        ({"engine_sha256": "c" * 64}, "e.engine is damaged"),
        ({"tensorrt": None}, "was built by TensorRT None"),
    ],
)
def test_an_engine_from_elsewhere_is_refused_before_tensorrt_sees_it(changes, text, card, tmp_path):
    trt, path = Double(), tmp_path / "e.engine"
    path.write_bytes(b"plan")
    message = refusal(tensorrt.Engine.load, path, sidecar_of(**changes), onnx_sha256="a" * 64, trt=trt)
    assert text in message
    assert "rebuild it here: mvmr export BUNDLE --trt --rebuild" in message
    assert trt.calls == []


def test_an_engine_of_the_same_release_is_taken(card, tmp_path):
    (tmp_path / "e.engine").write_bytes(b"plan")
    sidecar = sidecar_of(tensorrt="11.4.0.99")
    engine = tensorrt.Engine.load(tmp_path / "e.engine", sidecar, onnx_sha256="a" * 64, trt=Double())
    assert engine.sidecar == sidecar


def test_an_engine_file_that_is_gone(card, tmp_path):
    path = tmp_path / "none.engine"
    message = refusal(tensorrt.Engine.load, path, sidecar_of(), onnx_sha256="a" * 64, trt=Double())
    assert "cannot read the engine" in message
    assert "none.engine: No such file" in message


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"Runtime": None}, "TensorRT cannot start on this GPU"),
        ({"deserialize_cuda_engine": None}, "refuses the engine: The engine plan file is not compatible; rebuild it"),
        ({"create_execution_context": None}, "no GPU memory to run the engine"),
        ({"get_tensor_name": ("pixels", "embedding", "logits_x")}, "but has pixels, embedding, logits_x"),
        ({"get_tensor_name": ("image", "features", "logits_x")}, "but has image, features, logits_x"),
        ({"get_tensor_dtype": {"embedding": Double.DataType.HALF}}, "image, embedding of the wrong type, logits_x"),
        ({"get_tensor_dtype": {"image": Double.DataType.FLOAT}}, "image of the wrong type"),
    ],
)
def test_an_engine_that_tensorrt_refuses_or_that_is_not_ours(answers, text, card):
    assert text in refusal(loaded, Double(**answers))


@pytest.mark.parametrize(
    ("shape", "kind", "text"),
    [
        ((1, SIDE, SIDE, 3), np.uint8, "a batch of 1 is outside the engine's profile, 2 to 6 images"),
        ((7, SIDE, SIDE, 3), np.uint8, "a batch of 7 is outside"),
        ((0, SIDE, SIDE, 3), np.uint8, "a batch of 0 is outside"),
        ((2, SIDE, SIDE + 1, 3), np.uint8, "not uint8 [2, 4, 5, 3]"),
        ((2, 3, SIDE, SIDE), np.uint8, "not uint8 [2, 3, 4, 4]"),
        ((2, SIDE, SIDE, 3), np.float32, "not float32 [2, 4, 4, 3]"),
    ],
)
def test_images_that_do_not_fit_the_engine_are_refused(shape, kind, text, card):
    trt = Double()
    engine = loaded(trt)
    before = len(trt.calls)
    assert text in refusal(engine, np.zeros(shape, kind))
    assert len(trt.calls) == before


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_a_run_that_fails_is_an_error_not_an_answer(call, card):
    engine = loaded(Double(**{call: False}))
    assert "could not run the batch" in refusal(engine, np.zeros((2, SIDE, SIDE, 3), np.uint8))


# In a bundle


@pytest.fixture
def made(tmp_path: Path, no_fsync: None) -> Bundle:
    """A bundle whose weights nobody looks into."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "encoder.safetensors").write_bytes(b"weights")
    said = Manifest(
        schema=2, mvmr_version="0.1.0", created="2026-01-01T00:00:00+00:00", backbone="resnet18",
        options={"small_kernel": True}, embedding_dim=DIM, preprocessing=Preprocess(resize=SIDE, crop=SIDE),
        training={}, metrics=(), files={"encoder.safetensors": sha256(b"weights")},
    )  # fmt: skip
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(said.to_json()))
    return bundles.load(tmp_path / "b")


def with_engine(bundle: Bundle, model: bytes, trt: Double) -> Bundle:
    built = tensorrt.build(model, size=SIDE, trt=trt)
    return bundles.add_files(bundle, {tensorrt.ONNX: model, **built.to_files({"cosine_min": 0.9999})})


def test_an_engine_is_found_again_and_loads(made, card):
    trt, model = Double(), fp16()
    bundle = bundles.load(with_engine(made, model, trt).path)
    assert tensorrt.needs_rebuild(bundle, trt=trt) is None
    assert tensorrt.needs_rebuild(bundle, batches=tensorrt.BATCHES, trt=trt) is None
    found = tensorrt.find(bundle, trt=trt)
    assert found.path == made.path / "trt/encoder.fp16.sm90.trt11.4.0.engine"
    assert found.onnx_sha256 == sha256(model)
    assert found.sidecar["report"] == {"cosine_min": 0.9999}
    assert bundle.file(tensorrt.TIMING_CACHE).read_bytes() == b"timed"
    engine = tensorrt.Engine.load(found.path, found.sidecar, onnx_sha256=found.onnx_sha256, trt=trt)
    assert engine.dim == DIM


def test_a_bundle_says_why_it_has_no_engine_for_this_machine(made, card):
    trt = Double()
    assert "has no onnx/encoder.fp16.onnx" in tensorrt.needs_rebuild(made, trt=trt)
    bundle = bundles.add_files(made, {tensorrt.ONNX: fp16()})
    assert "no engine for this machine (NVIDIA H100, compute capability 9.0, TensorRT 11.4.0); it has none" in refusal(
        tensorrt.find, bundle, trt=trt
    )
    bundle = with_engine(made, fp16(), trt)
    assert "was not built for the batches (1, 8, 128)" in tensorrt.needs_rebuild(bundle, batches=(1, 8, 128), trt=trt)
    other = Double("10.16.1.11")
    message = refusal(tensorrt.find, bundle, trt=other)
    assert "TensorRT 10.16.1); it has encoder.fp16.sm90.trt11.4.0.engine; rebuild it here" in message
    assert message.endswith(f"mvmr export {made.path} --trt --rebuild")


def test_a_student_exported_again_makes_its_engine_stale(made, card):
    trt = Double()
    bundle = with_engine(made, fp16(), trt)
    bundle = bundles.add_files(bundle, {tensorrt.ONNX: fp16(bundle_hash="7" * 64)})
    assert "built from another fp16 ONNX" in tensorrt.needs_rebuild(bundle, trt=trt)


def test_the_provider_of_onnxruntime_gets_a_folder_to_each_onnx_file(tmp_path):
    options = tensorrt.tensorrt_provider_options(tmp_path, (1, 8, 64), 224, onnx_sha256="a" * 64)
    assert options["trt_profile_min_shapes"] == "image:1x224x224x3"
    assert options["trt_profile_opt_shapes"] == "image:8x224x224x3"
    assert options["trt_profile_max_shapes"] == "image:64x224x224x3"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert "trt_fp16_enable" not in options
    other = tensorrt.tensorrt_provider_options(tmp_path, (1, 8, 64), 224, onnx_sha256="b" * 64)
    assert Path(other["trt_engine_cache_path"]).parent == Path(options["trt_engine_cache_path"]).parent == tmp_path
    assert other["trt_engine_cache_path"] != options["trt_engine_cache_path"]


# NVIDIA's own builder, without a GPU


@pytest.fixture(scope="module")
def resnet18() -> bytes:
    student = small_student()
    weight, bias = np.ones((3, 512), np.float32), np.zeros(3, np.float32)
    head = Head(name="x", weight=weight, bias=bias, classes=("a", "b", "c"), metrics={})
    return to_onnx(student, [head], precision="fp16", metadata={"precision": "fp16"})


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bindings of TensorRT for RTX, in which timing caches are deprecated and do nothing."""
    tensorrt_rtx.needed()
    monkeypatch.setattr(tensorrt_build, "device", lambda: tensorrt_rtx.NO_GPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use Deprecated in TensorRT-RTX", DeprecationWarning)
        yield rtx_build.package()


def planted(model: bytes, operator: str, domain: str = "") -> bytes:
    """The model with its second ReLU replaced by an operator that TensorRT does not have."""
    graph = onnx.load_model_from_string(model)
    node = [node for node in graph.graph.node if node.op_type == "Relu"][1]
    node.op_type, node.domain, node.name = operator, domain, "planted"
    if domain:
        graph.opset_import.append(helper.make_opsetid(domain, 1))
    return graph.SerializeToString()


def holds_half_precision_weights(engine: int, model: bytes) -> bool:
    return 0.95 * len(model) < engine < 1.25 * len(model)


def test_tensorrts_own_builder_takes_a_resnet18(resnet18, rtx):
    built = tensorrt.build(resnet18, size=32, trt=rtx)
    assert holds_half_precision_weights(len(built.engine), resnet18)
    assert all(name in built.engine for name in (b"image", b"embedding", b"logits_x"))
    assert built.sidecar["tensorrt"] == rtx.__version__
    assert built.sidecar["engine_sha256"] == sha256(built.engine)
    other = tensorrt.build(resnet18, size=32, batches=(2, 3, 200), timing_cache=b"junk", trt=rtx)
    assert other.sidecar["profile"]["max"] == [200, 32, 32, 3]
    assert other.engine != built.engine


@pytest.mark.slow
def test_tensorrts_own_builder_takes_a_resnet50_at_224_pixels(rtx):
    encoder = Resnet(name="resnet50").build()
    student = Student(encoder, Preprocess.for_size(224), dim=2048, name="large", identity="0" * 32)
    model = to_onnx(student, precision="fp16", metadata={"precision": "fp16"})
    assert holds_half_precision_weights(len(tensorrt.build(model, size=224, trt=rtx).engine), model)


def test_the_data_centres_bindings_take_our_calls(resnet18, tmp_path):
    (tmp_path / "m.onnx").write_bytes(resnet18)
    built = tensorrt_rtx.build_under_data_centre_bindings(tmp_path, tmp_path / "m.onnx", 32)
    assert built["tensorrt"] == VERSION
    assert holds_half_precision_weights(built["bytes"], resnet18)


@pytest.mark.parametrize(
    ("operator", "domain", "text"),
    [("Rot13", "mvmr.test", "Plugin not found"), ("Rot13", "", "Plugin not found"), ("Det", "", "Det planted: false")],
)
def test_an_operator_that_tensorrt_lacks_is_named_in_its_words(operator, domain, text, resnet18, rtx):
    message = refusal(tensorrt.build, planted(resnet18, operator, domain), size=32, trt=rtx)
    assert f"TensorRT {rtx.__version__} cannot parse the fp16 ONNX: {operator} planted: " in message
    assert text in message
    assert "--opset" in message


def test_a_build_without_memory_says_so(resnet18, rtx):
    message = refusal(tensorrt.build, resnet18, size=32, workspace_gb=1e-9, trt=rtx)
    assert "built no engine: " in message
    assert "OutOfMemory" in message
    assert "raise --workspace-gb (now 1e-09)" in message


# Names and arguments, against the published bindings (data/tensorrt_api.json, made by tensorrt_surface.py)


def arguments(method: Any) -> list[str]:
    listed = list(inspect.signature(method).parameters.values())[1:]
    return [parameter.name for parameter in listed]


def accepts(overload: str, given: list[str]) -> bool:
    """Whether the overload "name(first, second=)" may be called with these arguments, in this order."""
    wanted = re.findall(r"\w+=?", overload.partition("(")[2])
    required = [name for name in wanted if not name.endswith("=")]
    return len(given) >= len(required) and given == [name.rstrip("=") for name in wanted][: len(given)]


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
    known = enums | set(surface["enums"]) | set(surface["classes"]) | {"__version__", "ILogger.__init__"}
    assert {"Builder", "OnnxParser", "Runtime", "MemoryPoolType.WORKSPACE", "DataType.UINT8"} <= used
    assert used <= known


# The variables that hold TensorRT's objects in our modules.
OBJECTS = {
    "builder": "Builder",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "cache": "ITimingCache",
    "refused": "ParserError",
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
    known = {(kind, entry.partition("(")[0]) for kind in classes for entry in classes[kind]}
    assert used - known == set()


def test_the_list_tells_the_versions_apart():
    """That precision flags are gone in 11 is why networks are strongly typed: a list that misses it is no list."""
    assert set(SURFACES) == {"10.16.1.11", VERSION}
    assert "FP16" in SURFACES["10.16.1.11"]["enums"]["BuilderFlag"]
    assert "FP16" not in SURFACES[VERSION]["enums"]["BuilderFlag"]
    assert not any(
        "execute_async_v2" in entry for s in SURFACES.values() for entry in s["classes"]["IExecutionContext"]
    )


# On a GPU


def small_student() -> Student:
    """An untrained ResNet18 at 32 px: enough to compare two ways of computing it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Resnet(name="resnet18", small_kernel=True).build()
    return Student(encoder, Preprocess.for_size(32), dim=512, name="small", identity="0" * 32)


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)


@pytest.mark.gpu
def test_gpu_a_real_engine_gives_what_torch_gives(tmp_path, record_property):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed, or its libraries are not", exc_type=ImportError)
    student, data = small_student(), open_images("sample:patches", "train")
    images = np.stack([student.preprocess.image(data.load(index)) for index in range(64)])
    wanted = student.embed(images).numpy()
    model = to_onnx(student, precision="fp16", metadata={"precision": "fp16"})
    built = tensorrt.build(model, size=32, batches=(1, 8, 64))
    (tmp_path / "e.engine").write_bytes(built.engine)
    engine = tensorrt.Engine.load(tmp_path / "e.engine", built.sidecar, onnx_sha256=sha256(model))
    assert (engine.size, engine.dim, engine.batches, engine.outputs) == (32, 512, (1, 64), ("embedding",))
    for batch in (1, 3, 64):
        assert cosines(engine(images[:batch])["embedding"], wanted[:batch]).min() > 0.9995
        start = time.perf_counter()
        for _ in range(20):
            engine(images[:batch])
        record_property(f"ms_at_batch_{batch}", (time.perf_counter() - start) / 20 * 1000)
    again = tensorrt.build(model, size=32, batches=(1, 8, 64), timing_cache=built.timing_cache)
    assert again.sidecar["onnx_sha256"] == built.sidecar["onnx_sha256"]
    damaged = bytearray(built.engine)
    damaged[len(damaged) // 2] ^= 255
    assert "is damaged" in refusal(tensorrt.Engine, bytes(damaged), built.sidecar, onnx_sha256=sha256(model))
