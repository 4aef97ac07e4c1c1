"""`export` puts into the bundle what does as torch does, and nothing else, whatever goes wrong on the way."""

import ctypes.util
import json
import os
import shutil
import signal
import subprocess
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
from onnx import numpy_helper
from PIL import Image
from torch import nn

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.export import attempt
from mvmr.export.artifacts import Artifact, metadata
from mvmr.export.cli import export as command
from mvmr.export.export import export
from mvmr.export.images import to_calibrate_with, to_verify_with
from mvmr.export.onnx import builder, graph
from mvmr.export.onnx.session import Session
from mvmr.export.tensorrt import builder as engine_builder
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_build, rtx_provider
from mvmr.models.torchvision_resnet import Resnet
from tests.export import tensorrt_rtx

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

PATCHES = {"data": {"name": "sample:patches", "split": "unlabelled"}}
FP32, FP16 = "onnx/encoder.fp32", "onnx/encoder.fp16"
Change = Callable[[onnx.ModelProto], None]


def patches(count: int, size: int = 32) -> np.ndarray:
    images = open_images("sample:patches", "test")
    chosen = np.random.default_rng(0).permutation(len(images))[:count]
    return Preprocess.for_size(size).batch(images.load(int(index)) for index in chosen)


def a_bundle(
    out: Path,
    *,
    seed: int = 0,
    size: int = 32,
    backbone: str = "resnet18",
    training: Mapping[str, Any] = PATCHES,
    change: Callable[[nn.Module], None] = lambda encoder: None,
) -> Path:
    """An encoder whose batch norms have seen real images."""
    encoder, preprocess = Resnet(name=backbone).build(), Preprocess.for_size(size)
    generator = torch.Generator().manual_seed(seed)
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, generator=generator)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.2, 0.5, generator=generator)
            part.momentum = None
    with torch.no_grad():
        encoder.train()(torch.from_numpy(preprocess.normalise(patches(32, size))))
        change(encoder)
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True)
    bundles.write(
        partial, backbone=backbone, options={"small_kernel": False},
        embedding_dim=512 if backbone == "resnet18" else 2048, preprocessing=preprocess, training=training,
        encoder_state=encoder.state_dict(),
    )  # fmt: skip
    bundles.publish(partial, out)
    return out


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a head, not to be changed."""
    torch.set_num_threads(1)
    made = bundles.load(a_bundle(tmp_path_factory.mktemp("template") / "student"))
    classes = open_images("sample:patches", "test").classes or ()
    weight = np.random.default_rng(0).normal(size=(len(classes), 512))
    said = {"command": "c", "data": "sample:patches", "protocol": "linear", "values": {"top1": 1.0}}
    bundles.add_head(made, "photos", weight, np.zeros(len(classes)), classes, said)
    return made.path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "runs" / "mine")
    return tmp_path / "runs" / "mine"


_MADE: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exporter takes seconds and gives the same every time (as test_export_graph holds): once is enough."""

    def remembered(student: Any, heads: Any, **options: Any) -> bytes:
        key = repr((student.identity, [head.name for head in heads], sorted(options.items())))
        if key not in _MADE:
            _MADE[key] = graph.to_onnx(student, heads, **options)
        return _MADE[key]

    monkeypatch.setattr(builder, "to_onnx", remembered)


def plant(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let the exporter make a mistake from now on."""
    right = builder.to_onnx

    def wrong(*arguments: Any, **options: Any) -> bytes:
        model = onnx.ModelProto.FromString(right(*arguments, **options))
        change(model)
        return model.SerializeToString()

    monkeypatch.setattr(builder, "to_onnx", wrong)


def scale(model: onnx.ModelProto, name: str, factor: float) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), name))


def broken(model: onnx.ModelProto) -> None:
    scale(model, "encoder.layer2.0.conv1.weight", 2.0)


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(MvmrError) as caught:
        export(path, **({"images": 16} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def report(path: Path, name: str) -> dict[str, Any]:
    return json.loads((path / f"{name}.json").read_text())


def state(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# What is put in place


def test_the_file_is_in_the_bundle_and_does_what_torch_does(path: Path) -> None:
    found = export(path)
    now = bundles.load(path)  # checks the hash of every file
    assert {f"{FP32}.onnx", f"{FP32}.json"} <= now.manifest.files.keys()
    assert now.space_id == bundles.load(path).space_id
    session = Session(now.file(f"{FP32}.onnx"), threads=1)
    images = patches(64)
    assert np.abs(session(images)["embedding"] - now.student().embed(images).numpy()).max() < 1e-4
    assert session.preprocess == now.manifest.preprocessing
    assert session.metadata == {
        "mvmr_version": now.manifest.mvmr_version,
        "bundle_space_id": now.space_id,
        "bundle_hash": now.manifest.files["encoder.safetensors"],
        "preprocessing": json.dumps(now.manifest.preprocessing.to_dict()),
        "heads": "{}",
        "precision": "fp32",
        "architecture": "resnet18",
        "embedding_dim": "512",
    }
    assert report(path, FP32) == json.loads(json.dumps(found["onnx"]))


def test_the_report_says_what_was_measured_on_what(path: Path) -> None:
    export(path, gates=["cosine_min=0.999"])
    said = report(path, FP32)
    assert said["passed"]
    assert said["cosine_min"] > 0.99999
    assert said["max_abs"] < 1e-4
    assert said["gates"]["cosine_min"] == 0.999
    assert (said["images"], said["data"], said["split"], said["held_out"]) == (256, "sample:patches", "test", True)
    assert (said["opset"], said["provider"], said["precision"]) == (20, "cpu", "fp32")
    assert said["bytes"] == (path / f"{FP32}.onnx").stat().st_size
    assert said["sha256"] == bundles.load(path).manifest.files[f"{FP32}.onnx"]
    assert said["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_heads_come_along_by_name_or_all(path: Path) -> None:
    found = export(path, heads="all", images=32)["onnx"]
    now = bundles.load(path)
    session, head = Session(now.file(f"{FP32}.onnx"), threads=1), now.head("photos")
    assert session.heads == {"photos": head.classes}
    outputs = session(patches(8))
    logits = outputs["embedding"] @ head.weight.T + head.bias
    np.testing.assert_allclose(outputs["logits_photos"], logits, rtol=1e-4, atol=1e-3)
    figures = found["heads"]["photos"]
    assert figures["agreement"] == 100
    assert figures["accuracy"] == figures["reference_accuracy"]
    assert export(path, heads=["photos", "photos"], images=32)["onnx"]["sha256"] == found["sha256"]


def test_fp16_is_judged_as_a_gpu_would_compute_it(path: Path) -> None:
    said = export(path, formats=["fp16"])["fp16"]
    assert said["passed"]
    assert said["rounded"] is True
    assert 0.9995 < said["cosine_min"] < said["file_on_cpu"]["cosine_min"]
    assert said["bytes"] < 0.6 * (path / "encoder.safetensors").stat().st_size
    assert Session(bundles.load(path).file(f"{FP16}.onnx")).metadata["precision"] == "fp16"


# What is refused, and what then stays


def test_a_failed_export_leaves_the_earlier_file_and_a_report(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(path, images=16)
    before = state(path)
    with monkeypatch.context() as patch:
        plant(patch, broken)
        message = refused(path)
    left = path / f"{FP32}.failed.json"
    assert message.startswith(f"{FP32}.onnx does not do what torch does: cosine_min ")
    assert "wanted above 0.99999; it drifts first at layer2.0.conv1 (relative error " in message
    assert str(left) in message
    said = json.loads(left.read_text())
    assert not said["passed"]
    assert said["drift"]["layer"] == "layer2.0.conv1"
    left.unlink()
    assert state(path) == before
    bundles.load(path)


def test_the_next_success_takes_the_failure_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch, broken)
        refused(path)
    assert f"{FP32}.onnx" not in bundles.load(path).manifest.files
    assert os.listdir(path / "onnx") == ["encoder.fp32.failed.json"]
    export(path, images=16)
    assert sorted(os.listdir(path / "onnx")) == ["encoder.fp32.json", "encoder.fp32.onnx"]


def test_a_gate_that_nothing_passes(path: Path) -> None:
    assert "cosine_min 1, wanted above 2" in refused(path, gates=["cosine_min=2"])
    assert not (path / f"{FP32}.onnx").exists()


@pytest.mark.slow
def test_a_file_of_another_student_is_called_stale(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = bundles.load(a_bundle(tmp_path / "other", seed=1))
    content = graph.to_onnx(other.student(), metadata=metadata(other, [], "fp32"))
    monkeypatch.setattr(builder, "to_onnx", lambda *arguments, **options: content)
    message = refused(path)
    assert "it is stale, made from another student: bundle_hash" in message
    assert "cosine_min" in message
    assert "drifts first at conv1" in message


@pytest.mark.slow
def test_a_layer_that_overflows_in_half_is_refused_in_fp16_only(tmp_path: Path) -> None:
    def scaled(encoder: nn.Module) -> None:
        first, after = (encoder.get_submodule(f"layer1.1.{name}") for name in ("bn1", "conv2"))
        for tensor, factor in ((first.weight, 1e5), (first.bias, 1e5), (after.weight, 1e-5)):
            tensor *= factor

    path = a_bundle(tmp_path / "large", change=scaled)
    message = refused(path, formats=["onnx", "fp16"])
    assert message.startswith(f"{FP16}.onnx does not do what torch does: ")
    assert "holds NaN or infinity" in message
    assert "drifts first at layer1.1.conv1 (not finite)" in message
    assert f"{FP32}.onnx" in bundles.load(path).manifest.files  # the first of the formats had passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["mvmr.bundles.bundle.write_json", "mvmr.storage.staging.stage", "mvmr.storage.staging.settle"]
)
def test_stopped_at_any_moment_the_bundle_is_as_it_was(
    path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(path, images=16)
    before = bundles.load(path)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moment, stop)
        with pytest.raises(KeyboardInterrupt):
            export(path, heads="all", images=16)
    assert bundles.load(path) == before
    export(path, heads="all", images=16)
    assert Session(bundles.load(path).file(f"{FP32}.onnx")).heads


_KILLED = """
import os, signal, sys
from mvmr.storage import atomic as files, staging
from mvmr.export.export import export
count = 0
def sync(path):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
files.sync = staging.sync = sync
export(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 9])
def test_killed_in_the_middle_nothing_is_half_written(path: Path, moment: int) -> None:
    command = [sys.executable, "-c", _KILLED, str(path), str(moment)]
    killed = subprocess.run(command, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    now = bundles.load(path)
    if f"{FP32}.onnx" in now.manifest.files:
        Session(now.file(f"{FP32}.onnx").read_bytes())
    export(path)
    assert report(path, FP32)["passed"]
    assert sorted(os.listdir(path / "onnx")) == ["encoder.fp32.json", "encoder.fp32.onnx"]


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmr.models.student.Student.__call__", pytest.fail)
    monkeypatch.setattr(builder, "to_onnx", pytest.fail)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"formats": ["onxx"]}, "unknown format 'onxx'; did you mean 'onnx'"),
        ({"formats": []}, "no format to export"),
        ({"opset": 17}, "opset 17 can't be exported; give one from 18 to 23"),
        ({"heads": ["photo"]}, "unknown head 'photo'; did you mean 'photos'"),
        ({"gates": ["overlap=high"]}, "gate 'overlap=high' has no number"),
        ({"provider": "gpu"}, "unknown provider 'gpu'"),
        ({"images": 4}, "4 images are too few to verify with; give at least 16"),
        ({"data": "sample:patch"}, "unknown sample 'sample:patch'; did you mean"),
        ({"formats": ["int8"], "calibration": "none/"}, "does not exist; give a folder of images"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_computed(
    path: Path, options: dict[str, Any], said: str, nothing_computed: None
) -> None:
    before = state(path)
    assert said in refused(path, **options)
    assert state(path) == before


def test_a_missing_package_is_named_with_its_extra(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "find_spec", lambda package: None)
    assert "'onnxscript', not installed here: pip install 'mvmr[export]'" in refused(path)


def test_an_engine_without_a_gpu_is_refused(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for package in (rtx_provider.PACKAGE, rtx_build.BINDINGS):
        monkeypatch.setitem(sys.modules, package, None)
    message = refused(path, formats=["trt"])
    assert "no CUDA device here" in message
    assert "mvmr export --fp16" in message
    assert "pip install 'mvmr[rtx]'" in message


def test_tensorrt_for_rtx_without_its_bindings_is_refused(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_rtx.needed()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, rtx_build.BINDINGS, None)
    assert "is here without its Python bindings: pip install" in refused(path, formats=["trt"])


def test_a_tensorrt_that_is_broken_is_not_replaced_by_that_for_rtx(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_rtx.needed()

    def broken(gpu: object) -> None:
        raise MvmrError("the package tensorrt cannot be loaded (libnvinfer.so.10: cannot open)")

    monkeypatch.setattr(tensorrt, "device", lambda: None)
    monkeypatch.setattr(tensorrt, "package", broken)
    assert "cannot be loaded (libnvinfer.so.10" in refused(path, formats=["trt"])


def test_a_plug_in_of_tensorrt_for_rtx_that_does_not_fit_is_refused(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gpu(monkeypatch)

    def misfit() -> None:
        raise MvmrError("onnxruntime 1.2 cannot load TensorRT for RTX 1.7.1")

    monkeypatch.setattr(rtx_provider, "device", misfit)
    assert "onnxruntime 1.2 cannot load TensorRT for RTX" in refused(path, formats=["trt"])


def test_triton_takes_no_tensorrt_for_rtx(
    path: Path, nothing_computed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device here" in refused(path, formats=["trt"], triton=tmp_path / "models")


def test_damaged_weights_are_refused(path: Path, nothing_computed: None) -> None:
    (path / "encoder.safetensors").write_bytes(b"weightz")
    assert "encoder.safetensors has changed since it was written" in refused(path)


# Which images


def saying(path: Path, training: object) -> Bundle:
    """The bundle with another training record."""
    content = json.loads((path / "bundle.json").read_text()) | {"training": training}
    (path / "bundle.json").write_text(json.dumps(content))
    return bundles.load(path)


def photos(folder: Path, count: int, *, classes: int = 1) -> str:
    for number in range(count):
        place = folder / f"class {number % classes}" if classes > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:03}.png")
    return str(folder)


def test_images_are_held_out_where_the_data_have_some(path: Path, tmp_path: Path) -> None:
    images, said = to_verify_with(bundles.load(path))
    assert (len(images), said["data"], said["split"], said["held_out"]) == (256, "sample:patches", "test", True)
    assert list(images.keys) == list(to_verify_with(bundles.load(path))[0].keys)  # the same ones every time
    assert len(set(images.labels.tolist())) == 17
    photos(tmp_path / "split" / "train", 30)
    data = photos(tmp_path / "split" / "test", 20)
    bundle = saying(path, {"data": {"name": str(Path(data).parent), "split": "unlabelled"}})
    images, said = to_verify_with(bundle)
    assert (len(images), said["split"], said["held_out"], said["images_wanted"]) == (20, "test", True, 256)


def test_images_of_a_folder_in_one_piece_have_been_seen(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its test split is a share of what was trained on."""
    data = photos(tmp_path / "photos", 40)
    images, said = to_verify_with(saying(path, {"data": {"name": data, "split": "unlabelled"}}), progress=True)
    assert (len(images), said["split"], said["held_out"]) == (40, "unlabelled", False)
    assert f"verifying with all 40 images of {data}, fewer than 256" in capsys.readouterr().err
    bundle = saying(path, {"data": {"name": photos(tmp_path / "few", 120, classes=2), "split": "train"}})
    images, said = to_verify_with(bundle)  # fine-tuned on the training split alone
    assert (said["split"], said["held_out"]) == ("test", True)
    assert 16 <= len(images) < 60


def test_of_other_data_nobody_knows_whether_they_were_seen(path: Path, tmp_path: Path) -> None:
    images, said = to_verify_with(bundles.load(path), photos(tmp_path / "photos", 20))
    assert (len(images), said["held_out"]) == (20, None)


@pytest.mark.parametrize("training", [{}, {"data": None}, {"data": "sample:patches"}, {"data": {"name": 3}}])
def test_a_bundle_that_does_not_say_its_data_needs_some(path: Path, training: object) -> None:
    bundle = saying(path, training)
    with pytest.raises(MvmrError, match="--data"):
        to_verify_with(bundle)
    with pytest.raises(MvmrError, match="--calibration"):
        to_calibrate_with(bundle)
    assert to_verify_with(bundle, "sample:digits")[1]["data"] == "sample:digits"


def test_training_data_that_are_gone_are_one_line(path: Path, tmp_path: Path) -> None:
    bundle = saying(path, {"data": {"name": str(tmp_path / "gone"), "split": "unlabelled"}})
    with pytest.raises(MvmrError, match=r"training data can't be opened .*gone does not exist.*give images: --data"):
        to_verify_with(bundle)


def test_too_few_images_are_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="has 15 images, verifying takes at least 16; give more: --data"):
        to_verify_with(bundles.load(path), photos(tmp_path / "few", 15))
    with pytest.raises(MvmrError, match="has 99 images, int8 takes at least 100 to calibrate; give more: --calib"):
        to_calibrate_with(bundles.load(path), photos(tmp_path / "more", 99))


def test_int8_is_calibrated_on_training_images(path: Path) -> None:
    images = to_calibrate_with(bundles.load(path))
    assert len(images) == 256
    assert not {*images.keys} & {*to_verify_with(bundles.load(path))[0].keys}


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

    def Built(self, *, engine: bytes, timing_cache: bytes, sidecar: Mapping[str, Any]) -> SimpleNamespace:
        def to_files(report: Mapping[str, Any]) -> dict[str, bytes]:
            told = json.dumps({**sidecar, "report": report}).encode()
            return {self.NAME: engine, self.NAME.replace(".engine", ".json"): told, self.TIMING_CACHE: timing_cache}

        return SimpleNamespace(engine=engine, sidecar=sidecar, name=self.NAME, to_files=to_files)

    def build(self, fp16: bytes, *, timing_cache: bytes | None, **options: Any) -> SimpleNamespace:
        self.built += 1
        self.caches.append(timing_cache)
        return self.Built(engine=fp16, timing_cache=b"timed", sidecar={"tensorrt": "11.4.0"})

    def Engine(self, plan: bytes, sidecar: Mapping[str, Any], *, onnx_sha256: str) -> Callable[..., Any]:
        session = Session(plan, threads=1)

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            self.sizes.add(len(images))
            outputs = session(images)
            return outputs | {"embedding": outputs["embedding"] + self.wrong * np.arange(512, dtype=np.float32)}

        return run


def with_double(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Double:
    double = Double(**options)
    monkeypatch.setattr(engine_builder, "tensorrt", double)
    return double


@pytest.mark.slow
def test_an_engine_brings_its_onnx_along_and_is_built_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = with_double(monkeypatch)
    found = export(path, formats=["trt"], batches=(2, 8, 32))
    assert list(found) == ["fp16", "trt"]
    assert found["trt"]["artifact"] == double.NAME
    assert double.sizes == {2, 3, 32}  # an engine takes no smaller batch than its profile's
    assert {double.NAME, double.TIMING_CACHE, f"{FP16}.onnx"} <= bundles.load(path).manifest.files.keys()
    export(path, formats=["trt"])
    assert double.built == 1
    export(path, formats=["trt"], rebuild=True)
    assert double.built == 2
    assert double.caches == [None, b"timed"]


def test_an_engine_that_drifts_is_not_put_in_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = with_double(monkeypatch, wrong=0.1)
    message = refused(path, formats=["trt"])
    assert message.startswith(f"{double.NAME} does not do what torch does: cosine_min")
    assert not bundles.load(path).manifest.files.keys() & {double.NAME, double.TIMING_CACHE}
    assert f"{FP16}.onnx" in bundles.load(path).manifest.files


# TensorRT for RTX


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx.needed()
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
    assert fp16.startswith(f"{path / FP16}.onnx  22.4 MB  cosine 0.9999")
    assert rtx.startswith(f"{path / FP16}.onnx  TensorRT for RTX 1.7.")
    assert "not run here: TensorRT for RTX 1.7.1 needs an NVIDIA GPU and its driver" in rtx
    assert rtx.endswith(f"Where it runs: mvmr serve {path} --provider tensorrt-rtx")
    bundle = bundles.load(path)
    (name,) = (name for name in bundle.manifest.files if name.startswith("trt/"))
    assert name == f"trt/encoder.fp16.rtx{rtx_provider.version()}.json"
    said = json.loads(bundle.file(name).read_text())
    assert (said["passed"], said["artifact"], said["provider"]) == (None, f"{FP16}.onnx", "tensorrt-rtx")
    assert said["onnx_sha256"] == said["sha256"] == bundle.manifest.files[f"{FP16}.onnx"]
    assert said["bundle_space_id"] == bundle.space_id
    assert said["profile"]["max"] == [64, 32, 32, 3]
    assert said["bytes"] < said["engine_bytes"] < 1.25 * said["bytes"]
    assert "needs an NVIDIA GPU and its driver" in said["not_run"]


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_with_a_gpu_it_is_verified_as_it_is_served(path: Path, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)  # to torch: the plug-in finds one
    providers = []

    def opened(artifact: Artifact, bundle: Bundle, *, provider: str) -> Any:
        providers.append(provider)
        run, shift = Session(bundle.file(artifact.file)), wrong * np.arange(512, dtype=np.float32)
        return lambda images: {name: rows + shift for name, rows in run(images).items()}

    monkeypatch.setattr(engine_builder, "open_artifact", opened)
    monkeypatch.setattr(engine_builder, "check_provider", lambda provider: None)
    report_of = f"trt/encoder.fp16.rtx{rtx_provider.version()}.json"
    if wrong:
        assert "does not do what torch does: cosine_min" in refused(path, formats=["trt"], images=16)
        assert report_of not in bundles.load(path).manifest.files
    else:
        found = export(path, formats=["trt"], images=16)["trt"]
        assert found["passed"] is True
        assert found["cosine_min"] > 0.9999
        assert report_of in bundles.load(path).manifest.files
    assert providers == ["tensorrt-rtx"]


def test_an_operator_that_tensorrt_for_rtx_lacks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    real = rtx_build.plan

    def planted(trt: Any, fp16: bytes, *arguments: Any, **options: Any) -> Any:
        model = onnx.ModelProto.FromString(fp16)
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Rot13"
        return real(trt, model.SerializeToString(), *arguments, **options)

    monkeypatch.setattr(rtx_build, "plan", planted)
    assert "cannot parse the fp16 ONNX: Rot13 " in refused(path, formats=["trt"], images=16)
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


# The command


def test_the_command_says_where_each_file_is_and_how_good(path: Path) -> None:
    result = CliRunner().invoke(command, [str(path), "--onnx", "--fp16", "--gate", "overlap=0.5", "--images", "32"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(path / f"{name}.onnx") for name in (FP32, FP16)]
    assert "cosine 1.000000 or more" in lines[0]
    assert "overlap@10 1.000" in lines[0]
    assert "at batch 32" in lines[0]
    assert report(path, FP16)["gates"]["overlap"] == 0.5


def test_without_a_bundle_the_newest_and_without_a_format_onnx(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[1])
    result = CliRunner().invoke(command, ["--images", "16"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"runs/mine/{FP32}.onnx")


# Slow


@pytest.mark.slow
def test_int8_of_real_images(path: Path) -> None:
    said = export(path, formats=["int8"], heads="all", gates=["accuracy_drop=100"])["int8"]
    assert said["passed"]
    assert said["calibration"] == {"data": "sample:patches", "split": "unlabelled", "images": 256}
    assert said["search"][-1]["passed"]
    assert said["kept_float"] == list(said["search"][-1]["kept_float"])
    now = bundles.load(path)
    session = Session(now.file("onnx/encoder.int8.onnx"))
    assert session.metadata["precision"] == "int8"
    assert session.heads == {"photos": now.head("photos").classes}
    assert f"{FP32}.onnx" not in now.manifest.files


@pytest.mark.slow
def test_resnet50_at_224(tmp_path: Path) -> None:
    path = a_bundle(tmp_path / "large", size=224, backbone="resnet50")
    found = export(path, formats=["onnx", "fp16"], images=32)
    assert found["onnx"]["max_abs"] < 1e-4
    assert found["fp16"]["cosine_min"] > 0.9995
