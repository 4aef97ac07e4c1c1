"""TensorRT engines: built by NVIDIA's own builder without a GPU; loaded and run on a double; for real on a GPU if any.

The builder is that of TensorRT for RTX. What only a GPU shows, a timing cache that fits, an engine that loads and what
it computes, runs on the double: that shows that the calls are those intended and exist, not that TensorRT obeys.
"""

import sys
import time
import warnings

import numpy as np
import pytest
import torch

from mvmr.bundles import bundle as bundles
from mvmr.data import open_images
from mvmr.export.onnx.graph import to_onnx
from mvmr.export.tensorrt import engine as tensorrt
from tests.export.tensorrt.tensorrt_double import (
    DIM,
    SIDE,
    VERSION,
    Double,
    IOptimizationProfile,
    Stream,
    cosines,
    fp16,
    refusal,
    sha256,
    small_student,
)

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
    ("cache", "tried"),
    [(None, [b""]), (b"kept", [b"kept"]), (b"of another GPU", [b"of another GPU", b""])],
)
def test_a_timing_cache_is_handed_over_and_one_that_does_not_fit_is_replaced(cache, tried, card):
    trt = Double()
    assert tensorrt.build(fp16(), size=SIDE, timing_cache=cache, trt=trt).timing_cache == b"timed"
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


def load(trt: Double) -> tensorrt.Engine:
    return tensorrt.Engine(b"plan", sidecar_of(), onnx_sha256="a" * 64, trt=trt)


def test_an_engine_gives_what_it_wrote_for_every_image(card):
    trt = Double()
    engine = load(trt)
    assert (engine.size, engine.dim, engine.batches, engine.outputs) == (SIDE, DIM, (2, 6), ("embedding", "logits_x"))
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    images.flags.writeable = False
    waited = Stream.waited
    outputs = engine(images)
    expected = images.reshape(3, -1).sum(axis=1, dtype=np.float32)[:, None] + np.arange(DIM)
    np.testing.assert_array_equal(outputs["embedding"], expected)
    np.testing.assert_array_equal(outputs["logits_x"], -expected)
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.float32)}
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
    assert text in refusal(load, Double(**answers))


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
    engine = load(trt)
    before = len(trt.calls)
    assert text in refusal(engine, np.zeros(shape, kind))
    assert len(trt.calls) == before


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_a_run_that_fails_is_an_error_not_an_answer(call, card):
    engine = load(Double(**{call: False}))
    assert "could not run the batch" in refusal(engine, np.zeros((2, SIDE, SIDE, 3), np.uint8))


# On a GPU


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
    second = tensorrt.build(model, size=32, batches=(1, 8, 64), timing_cache=built.timing_cache)
    assert second.sidecar["onnx_sha256"] == built.sidecar["onnx_sha256"]
    damaged = bytearray(built.engine)
    damaged[len(damaged) // 2] ^= 255
    assert "is damaged" in refusal(tensorrt.Engine, bytes(damaged), built.sidecar, onnx_sha256=sha256(model))
