"""`export` puts into the bundle what does as torch does, and nothing else, whatever goes wrong on the way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import nn

from mvmr.bundles import bundle as bundles
from mvmr.export import attempt
from mvmr.export.artifacts import metadata
from mvmr.export.cli import export as command
from mvmr.export.export import export
from mvmr.export.onnx import builder, graph
from mvmr.export.onnx.session import Session
from tests.export.exporting import FP16, FP32, refusal, report, state
from tests.export.students import a_bundle, patches
from tests.making import SMALL

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync", "once")
Change = Callable[[onnx.ModelProto], None]


def plant(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let the exporter make a mistake from now on."""
    right = builder.to_onnx

    def wrong(*arguments: Any, **options: Any) -> bytes:
        model = onnx.ModelProto.FromString(right(*arguments, **options))
        change(model)
        return model.SerializeToString()

    monkeypatch.setattr(builder, "to_onnx", wrong)


def scale(model: onnx.ModelProto, name: str, factor: float) -> None:
    tensor = next(candidate for candidate in model.graph.initializer if candidate.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), name))


def double_weights(model: onnx.ModelProto) -> None:
    scale(model, "encoder.layer2.0.conv1.weight", 2.0)


# What is put in place


def test_the_file_is_in_the_bundle_and_does_what_torch_does(path: Path) -> None:
    reports = export(path)
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
        "architecture": SMALL.name,
        "embedding_dim": str(SMALL.width),
    }
    assert report(path, FP32) == json.loads(json.dumps(reports["onnx"]))


def test_the_report_says_what_was_measured_on_what(path: Path) -> None:
    export(path, gates=["cosine_min=0.999"])
    content = report(path, FP32)
    assert content["passed"]
    assert content["cosine_min"] > 0.99999
    assert content["max_abs"] < 1e-4
    assert content["gates"]["cosine_min"] == 0.999
    assert (content["images"], content["data"], content["split"], content["held_out"]) == (
        256,
        "sample:patches",
        "test",
        True,
    )
    assert (content["opset"], content["provider"], content["precision"]) == (20, "cpu", "fp32")
    assert content["bytes"] == (path / f"{FP32}.onnx").stat().st_size
    assert content["sha256"] == bundles.load(path).manifest.files[f"{FP32}.onnx"]
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.slow
def test_heads_come_along_by_name_or_all(path: Path) -> None:
    result = export(path, heads="all", images=32)["onnx"]
    now = bundles.load(path)
    session, head = Session(now.file(f"{FP32}.onnx"), threads=1), now.head("photos")
    assert session.heads == {"photos": head.classes}
    outputs = session(patches(8))
    logits = outputs["embedding"] @ head.weight.T + head.bias
    np.testing.assert_allclose(outputs["logits_photos"], logits, rtol=1e-4, atol=1e-3)
    figures = result["heads"]["photos"]
    assert figures["agreement"] == 100
    assert figures["accuracy"] == figures["reference_accuracy"]
    assert export(path, heads=["photos", "photos"], images=32)["onnx"]["sha256"] == result["sha256"]


@pytest.mark.slow
def test_fp16_is_judged_as_a_gpu_would_compute_it(path: Path) -> None:
    result = export(path, formats=["fp16"])["fp16"]
    assert result["passed"]
    assert result["rounded"] is True
    assert 0.9995 < result["cosine_min"] < result["file_on_cpu"]["cosine_min"]
    assert result["bytes"] < 0.6 * (path / "encoder.safetensors").stat().st_size
    assert Session(bundles.load(path).file(f"{FP16}.onnx")).metadata["precision"] == "fp16"


# What is refused, and what then stays


def test_a_failed_export_leaves_the_earlier_file_and_a_report(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(path, images=16)
    before = state(path)
    with monkeypatch.context() as patch:
        plant(patch, double_weights)
        message = refusal(path)
    left = path / f"{FP32}.failed.json"
    assert message.startswith(f"{FP32}.onnx does not do what torch does: cosine_min ")
    assert "wanted above 0.99999; it drifts first at layer2.0.conv1 (relative error " in message
    assert str(left) in message
    content = json.loads(left.read_text())
    assert not content["passed"]
    assert content["drift"]["layer"] == "layer2.0.conv1"
    left.unlink()
    assert state(path) == before
    bundles.load(path)


def test_the_next_success_takes_the_failure_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch, double_weights)
        refusal(path)
    assert f"{FP32}.onnx" not in bundles.load(path).manifest.files
    assert os.listdir(path / "onnx") == ["encoder.fp32.failed.json"]
    export(path, images=16)
    assert sorted(os.listdir(path / "onnx")) == ["encoder.fp32.json", "encoder.fp32.onnx"]


def test_a_gate_that_nothing_passes(path: Path) -> None:
    assert "cosine_min 1, wanted above 2" in refusal(path, gates=["cosine_min=2"])
    assert not (path / f"{FP32}.onnx").exists()


@pytest.mark.slow
def test_a_file_of_another_student_is_called_stale(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = bundles.load(a_bundle(tmp_path / "other", seed=1))
    content = graph.to_onnx(stranger.student(), metadata=metadata(stranger, [], "fp32"))
    monkeypatch.setattr(builder, "to_onnx", lambda *arguments, **options: content)
    message = refusal(path)
    assert "it is stale, made from another student: bundle_hash" in message
    assert "cosine_min" in message
    assert "drifts first at conv1" in message


@pytest.mark.slow
def test_a_layer_that_overflows_in_half_is_refused_in_fp16_only(tmp_path: Path) -> None:
    def scale_layer(encoder: nn.Module) -> None:
        first, after = (encoder.get_submodule(f"layer1.1.{name}") for name in ("bn1", "conv2"))
        for tensor, factor in ((first.weight, 1e5), (first.bias, 1e5), (after.weight, 1e-5)):
            tensor *= factor

    path = a_bundle(tmp_path / "large", change=scale_layer)
    message = refusal(path, formats=["onnx", "fp16"])
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


@pytest.mark.parametrize(
    ("options", "message"),
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
    path: Path, options: dict[str, Any], message: str, nothing_computed: None
) -> None:
    before = state(path)
    assert message in refusal(path, **options)
    assert state(path) == before


def test_a_missing_package_is_named_with_its_extra(
    path: Path, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "find_spec", lambda package: None)
    assert "'onnxscript', not installed here: pip install 'mvmr[export]'" in refusal(path)


def test_damaged_weights_are_refused(path: Path, nothing_computed: None) -> None:
    (path / "encoder.safetensors").write_bytes(b"weightz")
    assert "encoder.safetensors has changed since it was written" in refusal(path)


# The command


@pytest.mark.slow
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
    result = export(path, formats=["int8"], heads="all", gates=["accuracy_drop=100"])["int8"]
    assert result["passed"]
    assert result["calibration"] == {"data": "sample:patches", "split": "unlabelled", "images": 256}
    assert result["search"][-1]["passed"]
    assert result["kept_float"] == list(result["search"][-1]["kept_float"])
    now = bundles.load(path)
    session = Session(now.file("onnx/encoder.int8.onnx"))
    assert session.metadata["precision"] == "int8"
    assert session.heads == {"photos": now.head("photos").classes}
    assert f"{FP32}.onnx" not in now.manifest.files


@pytest.mark.slow
def test_resnet50_at_224(tmp_path: Path) -> None:
    path = a_bundle(tmp_path / "large", size=224, backbone="resnet50")
    reports = export(path, formats=["onnx", "fp16"], images=16)
    assert reports["onnx"]["max_abs"] < 1e-4
    assert reports["fp16"]["cosine_min"] > 0.9995
