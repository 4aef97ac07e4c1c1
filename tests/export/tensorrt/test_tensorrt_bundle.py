"""Engines in bundles, and engines built by NVIDIA's own builder, that of TensorRT for RTX, which needs no GPU."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from mvmr.bundles import bundle as bundles
from mvmr.bundles.head import Head
from mvmr.bundles.preprocess import Preprocess
from mvmr.export.onnx.graph import to_onnx
from mvmr.export.tensorrt import build as tensorrt_build
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_build
from mvmr.models.student import Student
from mvmr.models.torchvision_resnet import Resnet
from tests.export.tensorrt import tensorrt_rtx
from tests.export.tensorrt.tensorrt_double import (
    DIM,
    VERSION,
    Double,
    fp16,
    refusal,
    sha256,
    small_student,
    with_engine,
)

# In a bundle


def test_an_engine_is_found_again_and_loads(engine_bundle, card):
    trt, model = Double(), fp16()
    bundle = bundles.load(with_engine(engine_bundle, model, trt).path)
    assert tensorrt.needs_rebuild(bundle, trt=trt) is None
    assert tensorrt.needs_rebuild(bundle, batches=tensorrt.BATCHES, trt=trt) is None
    stored = tensorrt.find(bundle, trt=trt)
    assert stored.path == engine_bundle.path / "trt/encoder.fp16.sm90.trt11.4.0.engine"
    assert stored.onnx_sha256 == sha256(model)
    assert stored.sidecar["report"] == {"cosine_min": 0.9999}
    assert bundle.file(tensorrt.TIMING_CACHE).read_bytes() == b"timed"
    engine = tensorrt.Engine.load(stored.path, stored.sidecar, onnx_sha256=stored.onnx_sha256, trt=trt)
    assert engine.dim == DIM


def test_a_bundle_says_why_it_has_no_engine_for_this_machine(engine_bundle, card):
    trt = Double()
    assert "has no onnx/encoder.fp16.onnx" in tensorrt.needs_rebuild(engine_bundle, trt=trt)
    bundle = bundles.add_files(engine_bundle, {tensorrt.ONNX: fp16()})
    assert "no engine for this machine (NVIDIA H100, compute capability 9.0, TensorRT 11.4.0); it has none" in refusal(
        tensorrt.find, bundle, trt=trt
    )
    bundle = with_engine(engine_bundle, fp16(), trt)
    assert "was not built for the batches (1, 8, 128)" in tensorrt.needs_rebuild(bundle, batches=(1, 8, 128), trt=trt)
    double = Double("10.16.1.11")
    message = refusal(tensorrt.find, bundle, trt=double)
    assert "TensorRT 10.16.1); it has encoder.fp16.sm90.trt11.4.0.engine; rebuild it here" in message
    assert message.endswith(f"mvmr export {engine_bundle.path} --trt --rebuild")


def test_a_student_exported_again_makes_its_engine_stale(engine_bundle, card):
    trt = Double()
    bundle = with_engine(engine_bundle, fp16(), trt)
    bundle = bundles.add_files(bundle, {tensorrt.ONNX: fp16(bundle_hash="7" * 64)})
    assert "built from another fp16 ONNX" in tensorrt.needs_rebuild(bundle, trt=trt)


def test_the_provider_of_onnxruntime_gets_a_folder_to_each_onnx_file(tmp_path):
    options = tensorrt.tensorrt_provider_options(tmp_path, (1, 8, 64), 224, onnx_sha256="a" * 64)
    assert options["trt_profile_min_shapes"] == "image:1x224x224x3"
    assert options["trt_profile_opt_shapes"] == "image:8x224x224x3"
    assert options["trt_profile_max_shapes"] == "image:64x224x224x3"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert "trt_fp16_enable" not in options
    others = tensorrt.tensorrt_provider_options(tmp_path, (1, 8, 64), 224, onnx_sha256="b" * 64)
    assert Path(others["trt_engine_cache_path"]).parent == Path(options["trt_engine_cache_path"]).parent == tmp_path
    assert others["trt_engine_cache_path"] != options["trt_engine_cache_path"]


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
    tensorrt_rtx.require_wheels()
    monkeypatch.setattr(tensorrt_build, "device", lambda: tensorrt_rtx.NO_GPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use Deprecated in TensorRT-RTX", DeprecationWarning)
        yield rtx_build.package()


def plant(model: bytes, operator: str, domain: str = "") -> bytes:
    """The model with its second ReLU replaced by an operator that TensorRT does not have."""
    graph = onnx.load_model_from_string(model)
    node = [node for node in graph.graph.node if node.op_type == "Relu"][1]
    node.op_type, node.domain, node.name = operator, domain, "planted"
    if domain:
        graph.opset_import.append(helper.make_opsetid(domain, 1))
    return graph.SerializeToString()


def holds_half_precision_weights(engine: int, model: bytes) -> bool:
    return 0.95 * len(model) < engine < 1.25 * len(model)


@pytest.mark.slow
def test_tensorrts_own_builder_takes_a_resnet18(resnet18, rtx):
    built = tensorrt.build(resnet18, size=32, trt=rtx)
    assert holds_half_precision_weights(len(built.engine), resnet18)
    assert all(name in built.engine for name in (b"image", b"embedding", b"logits_x"))
    assert built.sidecar["tensorrt"] == rtx.__version__
    assert built.sidecar["engine_sha256"] == sha256(built.engine)
    second = tensorrt.build(resnet18, size=32, batches=(2, 3, 200), timing_cache=b"junk", trt=rtx)
    assert second.sidecar["profile"]["max"] == [200, 32, 32, 3]
    assert second.engine != built.engine


@pytest.mark.slow
def test_tensorrts_own_builder_takes_a_resnet50_at_224_pixels(rtx):
    encoder = Resnet(name="resnet50").build()
    student = Student(encoder, Preprocess.for_size(224), dim=2048, name="large", identity="0" * 32)
    model = to_onnx(student, precision="fp16", metadata={"precision": "fp16"})
    assert holds_half_precision_weights(len(tensorrt.build(model, size=224, trt=rtx).engine), model)


@pytest.mark.slow
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
    message = refusal(tensorrt.build, plant(resnet18, operator, domain), size=32, trt=rtx)
    assert f"TensorRT {rtx.__version__} cannot parse the fp16 ONNX: {operator} planted: " in message
    assert text in message
    assert "--opset" in message


def test_a_build_without_memory_says_so(resnet18, rtx):
    message = refusal(tensorrt.build, resnet18, size=32, workspace_gb=1e-9, trt=rtx)
    assert "built no engine: " in message
    assert "OutOfMemory" in message
    assert "raise --workspace-gb (now 1e-09)" in message
