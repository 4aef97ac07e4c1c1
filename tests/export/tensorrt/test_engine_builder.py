"""`export --trt`: engines on a double of a machine with a GPU, TensorRT for RTX, and what goes to Triton."""

import ctypes.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.export.artifacts import Artifact
from mvmr.export.cli import export as command
from mvmr.export.export import export
from mvmr.export.onnx.session import Session
from mvmr.export.tensorrt import builder as engine_builder
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_build, rtx_provider
from tests.export.exporting import FP16, refusal
from tests.export.tensorrt import tensorrt_rtx
from tests.making import SMALL

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync", "once")


# The machine


def test_an_engine_without_a_gpu_is_refused(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for package in (rtx_provider.PACKAGE, rtx_build.BINDINGS):
        monkeypatch.setitem(sys.modules, package, None)
    message = refusal(path, formats=["trt"])
    assert "no CUDA device here" in message
    assert "mvmr export --fp16" in message
    assert "pip install 'mvmr[rtx]'" in message


def test_tensorrt_for_rtx_without_its_bindings_is_refused(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_rtx.require_wheels()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, rtx_build.BINDINGS, None)
    assert "is here without its Python bindings: pip install" in refusal(path, formats=["trt"])


def test_a_tensorrt_that_is_broken_is_not_replaced_by_that_for_rtx(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_rtx.require_wheels()

    def fail(gpu: object) -> None:
        raise MvmrError("the package tensorrt cannot be loaded (libnvinfer.so.10: cannot open)")

    monkeypatch.setattr(tensorrt, "device", lambda: None)
    monkeypatch.setattr(tensorrt, "package", fail)
    assert "cannot be loaded (libnvinfer.so.10" in refusal(path, formats=["trt"])


def test_a_plug_in_of_tensorrt_for_rtx_that_does_not_fit_is_refused(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gpu(monkeypatch)

    def misfit() -> None:
        raise MvmrError("onnxruntime 1.2 cannot load TensorRT for RTX 1.7.1")

    monkeypatch.setattr(rtx_provider, "device", misfit)
    assert "onnxruntime 1.2 cannot load TensorRT for RTX" in refusal(path, formats=["trt"])


def test_triton_takes_no_tensorrt_for_rtx(
    path: Path, nothing_computed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device here" in refusal(path, formats=["trt"], triton=tmp_path / "models")


# Engines


class Double:
    """A stand-in for `tensorrt.engine` on a machine with a GPU: its engines are onnxruntime on the same ONNX."""

    TIMING_CACHE, NAME = "trt/timing.cache", "trt/encoder.fp16.sm90.trt11.4.0.engine"

    def __init__(self, *, wrong: float = 0.0) -> None:
        self.wrong, self.built, self.sizes, self.caches = wrong, 0, set(), []
        self.package = self.device = lambda *arguments: None
        self.profile = lambda batches, size: None

    def needs_rebuild(self, bundle: Bundle, *, batches: tuple[int, int, int]) -> str | None:
        return None if self.NAME in bundle.manifest.files else "there is none"

    def find(self, bundle: Bundle) -> SimpleNamespace:
        return SimpleNamespace(path=bundle.file(self.NAME), sidecar={"tensorrt": "11.4.0"})

    def BuiltEngine(self, *, engine: bytes, timing_cache: bytes, sidecar: Mapping[str, Any]) -> SimpleNamespace:
        def to_files(report: Mapping[str, Any]) -> dict[str, bytes]:
            text = json.dumps({**sidecar, "report": report}).encode()
            return {self.NAME: engine, self.NAME.replace(".engine", ".json"): text, self.TIMING_CACHE: timing_cache}

        return SimpleNamespace(engine=engine, sidecar=sidecar, name=self.NAME, to_files=to_files)

    def build(self, fp16: bytes, *, timing_cache: bytes | None, **options: Any) -> SimpleNamespace:
        self.built += 1
        self.caches.append(timing_cache)
        return self.BuiltEngine(engine=fp16, timing_cache=b"timed", sidecar={"tensorrt": "11.4.0"})

    def Engine(self, plan: bytes, sidecar: Mapping[str, Any], *, onnx_sha256: str) -> Callable[..., Any]:
        session = Session(plan, threads=1)

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            self.sizes.add(len(images))
            outputs = session(images)
            return outputs | {"embedding": outputs["embedding"] + self.wrong * np.arange(SMALL.width, dtype=np.float32)}

        return run


def with_double(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Double:
    double = Double(**options)
    monkeypatch.setattr(engine_builder, "tensorrt", double)
    return double


@pytest.mark.slow
def test_an_engine_brings_its_onnx_along_and_is_built_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = with_double(monkeypatch)
    reports = export(path, formats=["trt"], batches=(2, 8, 32))
    assert list(reports) == ["fp16", "trt"]
    assert reports["trt"]["artifact"] == double.NAME
    assert double.sizes == {2, 3, 32}  # an engine takes no smaller batch than its profile's
    assert {double.NAME, double.TIMING_CACHE, f"{FP16}.onnx"} <= bundles.load(path).manifest.files.keys()
    export(path, formats=["trt"])
    assert double.built == 1
    export(path, formats=["trt"], rebuild=True)
    assert double.built == 2
    assert double.caches == [None, b"timed"]


@pytest.mark.slow
def test_an_engine_that_drifts_is_not_put_in_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = with_double(monkeypatch, wrong=0.1)
    message = refusal(path, formats=["trt"])
    assert message.startswith(f"{double.NAME} does not do what torch does: cosine_min")
    assert not bundles.load(path).manifest.files.keys() & {double.NAME, double.TIMING_CACHE}
    assert f"{FP16}.onnx" in bundles.load(path).manifest.files


# TensorRT for RTX


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx.require_wheels()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_tensorrt_for_rtx_builds_what_has_been_verified(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gpu(monkeypatch)
    if ctypes.util.find_library("cuda"):
        pytest.skip("this machine has an NVIDIA driver")
    result = CliRunner().invoke(command, [str(path), "--trt", "--images", "16"])
    assert result.exit_code == 0, result.output
    fp16, rtx = result.stdout.splitlines()
    assert fp16.startswith(f"{path / FP16}.onnx  1.4 MB  cosine 0.9999")
    assert rtx.startswith(f"{path / FP16}.onnx  TensorRT for RTX 1.7.")
    assert "not run here: TensorRT for RTX 1.7.1 needs an NVIDIA GPU and its driver" in rtx
    assert rtx.endswith(f"Where it runs: mvmr serve {path} --provider tensorrt-rtx")
    bundle = bundles.load(path)
    (name,) = (name for name in bundle.manifest.files if name.startswith("trt/"))
    assert name == f"trt/encoder.fp16.rtx{rtx_provider.version()}.json"
    content = json.loads(bundle.file(name).read_text())
    assert (content["passed"], content["artifact"], content["provider"]) == (None, f"{FP16}.onnx", "tensorrt-rtx")
    assert content["onnx_sha256"] == content["sha256"] == bundle.manifest.files[f"{FP16}.onnx"]
    assert content["bundle_space_id"] == bundle.space_id
    assert content["profile"]["max"] == [64, 32, 32, 3]
    assert content["bytes"] < content["engine_bytes"] < 1.25 * content["bytes"]
    assert "needs an NVIDIA GPU and its driver" in content["not_run"]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_with_a_gpu_it_is_verified_as_it_is_served(path: Path, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)  # to torch: the plug-in finds one
    providers = []

    def open_shifted(artifact: Artifact, bundle: Bundle, *, provider: str) -> Any:
        providers.append(provider)
        run, shift = Session(bundle.file(artifact.file)), wrong * np.arange(SMALL.width, dtype=np.float32)
        return lambda images: {name: rows + shift for name, rows in run(images).items()}

    monkeypatch.setattr(engine_builder, "open_artifact", open_shifted)
    monkeypatch.setattr(engine_builder, "check_provider", lambda provider: None)
    report_of = f"trt/encoder.fp16.rtx{rtx_provider.version()}.json"
    if wrong:
        assert "does not do what torch does: cosine_min" in refusal(path, formats=["trt"], images=16)
        assert report_of not in bundles.load(path).manifest.files
    else:
        result = export(path, formats=["trt"], images=16)["trt"]
        assert result["passed"] is True
        assert result["cosine_min"] > 0.9999
        assert report_of in bundles.load(path).manifest.files
    assert providers == ["tensorrt-rtx"]


def test_an_operator_that_tensorrt_for_rtx_lacks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    real = rtx_build.plan

    def plan_with_fault(trt: Any, fp16: bytes, *arguments: Any, **options: Any) -> Any:
        model = onnx.ModelProto.FromString(fp16)
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Rot13"
        return real(trt, model.SerializeToString(), *arguments, **options)

    monkeypatch.setattr(rtx_build, "plan", plan_with_fault)
    assert "cannot parse the fp16 ONNX: Rot13 " in refusal(path, formats=["trt"], images=16)
    files = bundles.load(path).manifest.files
    assert f"{FP16}.onnx" in files  # which had passed, and other providers run it
    assert not [name for name in files if name.startswith("trt/")]


# Triton


@pytest.mark.slow
def test_the_last_format_goes_to_triton(path: Path, tmp_path: Path) -> None:
    export(path, formats=["onnx", "fp16"], heads="all", triton=tmp_path / "models")
    served = tmp_path / "models" / "mine" / "1" / "model.onnx"
    assert served.read_bytes() == bundles.load(path).file(f"{FP16}.onnx").read_bytes()
    config = (tmp_path / "models" / "mine" / "config.pbtxt").read_text()
    assert 'name: "logits_photos"' in config
    assert "KIND_GPU" in config  # what half precision is for
