"""A recording double of TensorRT, and machines and bundles that have it, or have not.

Its classes are called as TensorRT's, and `test_tensorrt_bindings.py` holds their members to the published bindings.
"""

import ctypes
import hashlib
import json
import math
import os
from contextlib import nullcontext
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.manifest import Manifest
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.models.student import Student
from mvmr.models.torchvision_resnet import Resnet

SIDE, DIM = 4, 5
VERSION = "11.4.0.106"


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
        usable = self._double.calls[-1][1] != b"of another GPU"
        return self._called("set_timing_cache", ignore_mismatch, answer=usable)


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


class Stream:
    cuda_stream = 77
    waited = 0

    def synchronize(self) -> None:
        Stream.waited += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Torch as it answers on a machine with an H100; memory is the host's, so that the double can reach it."""
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(tensorrt, "_CUDA", "cpu")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return gpu


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fp16(side: int = SIDE, **entries: str) -> bytes:
    """A small ONNX that says it is the fp16 one of a bundle."""
    from onnx import TensorProto, helper  # here: the fixtures beside it are wanted where onnx is not installed

    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", side, side, 3])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", side, side, 3])
    cast = helper.make_node("Cast", ["image"], ["embedding"], to=TensorProto.FLOAT)
    model = helper.make_model(helper.make_graph([cast], "student", [image], [embedding]))
    helper.set_model_props(model, {"precision": "fp16", "bundle_space_id": "5" * 32, "bundle_hash": "6" * 64} | entries)
    return model.SerializeToString()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        call(*arguments, **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


@pytest.fixture
def engine_bundle(tmp_path: Path, no_fsync: None) -> Bundle:
    """A bundle whose weights nobody looks into."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "encoder.safetensors").write_bytes(b"weights")
    manifest = Manifest(
        schema=2, mvmr_version="0.1.0", created="2026-01-01T00:00:00+00:00", backbone="resnet18",
        options={"small_kernel": True}, embedding_dim=DIM, preprocessing=Preprocess(resize=SIDE, crop=SIDE),
        training={}, metrics=(), files={"encoder.safetensors": sha256(b"weights")},
    )  # fmt: skip
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(manifest.to_json()))
    return bundles.load(tmp_path / "b")


def with_engine(bundle: Bundle, model: bytes, trt: Double) -> Bundle:
    built = tensorrt.build(model, size=SIDE, trt=trt)
    return bundles.add_files(bundle, {tensorrt.ONNX: model, **built.to_files({"cosine_min": 0.9999})})


def small_student() -> Student:
    """An untrained ResNet18 at 32 px: enough to compare two ways of computing it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Resnet(name="resnet18", small_kernel=True).build()
    return Student(encoder, Preprocess.for_size(32), dim=512, name="small", identity="0" * 32)


def cosines(actual: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (actual * wanted).sum(1) / np.linalg.norm(actual, axis=1) / np.linalg.norm(wanted, axis=1)
