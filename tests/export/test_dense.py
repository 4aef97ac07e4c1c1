"""The map of features as a second output: exported, verified, and served without torch; or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from google.protobuf.text_format import Parse
from onnx import ModelProto, helper
from torch import nn
from tritonclient.grpc import model_config_pb2

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.export.artifacts import metadata
from mvmr.export.cli import export as command
from mvmr.export.export import export
from mvmr.export.onnx import builder
from mvmr.export.onnx.graph import to_onnx
from mvmr.export.onnx.session import Session
from mvmr.export.verification import Report
from mvmr.models.backbone import StudentConfig
from mvmr.models.table import open_backbone
from mvmr.serve import Engine
from tests.export.exporting import FP16, FP32, refusal, report, state
from tests.export.students import a_bundle, patches
from tests.making import SMALL, write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

SIZE = 96  # whose map has 3 by 3 patches
SHAPE = (3, 3, SMALL.width)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with nothing exported, not to be changed."""
    torch.set_num_threads(1)
    return bundles.load(a_bundle(tmp_path_factory.mktemp("plain") / "student", size=SIZE))


@pytest.fixture(scope="module")
def model(plain: Bundle) -> bytes:
    return to_onnx(plain.student(), metadata=metadata(plain, [], "fp32"), dense=True)


@pytest.fixture
def path(plain: Bundle, tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle, to export to; torch's exporter takes seconds, and has done its work."""

    def remember(*arguments: Any, dense: bool, **options: Any) -> bytes:
        assert dense
        return model

    monkeypatch.setattr(builder, "to_onnx", remember)
    return Path(shutil.copytree(plain.path, tmp_path / "student"))


def layer4(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    """What leaves the last layer in torch, by a hook, with channels last."""
    encoder, seen = bundle.student().encoder, []
    encoder.get_submodule("layer4").register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        encoder(torch.from_numpy(bundle.manifest.preprocessing.normalise(images)))
    maps: np.ndarray = seen[0].permute(0, 2, 3, 1).numpy()
    return maps


def test_the_second_output_is_torchs_map_and_its_mean_the_first(plain: Bundle, model: bytes) -> None:
    images, session = patches(9, SIZE), Session(model, threads=1)
    outputs = session(images)
    assert list(outputs) == ["embedding", "dense"]
    assert (outputs["dense"].dtype, outputs["dense"].shape) == (np.float32, (9, *SHAPE))
    np.testing.assert_allclose(outputs["dense"], layer4(plain, images), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs["dense"], plain.student().embed(images, dense=True), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs["dense"].mean((1, 2)), outputs["embedding"], rtol=1e-4, atol=1e-4)
    assert session(images[:0])["dense"].shape == (0, *SHAPE)
    assert (session.dim, session.heads) == (SMALL.width, {})


def test_its_layers_are_called_as_without_the_second_output(plain: Bundle, model: bytes) -> None:
    layers = {name for name, part in plain.student().encoder.named_modules() if isinstance(part, nn.Conv2d)}
    nodes = ModelProto.FromString(model).graph.node
    assert {node.name for node in nodes if node.op_type == "Conv"} == layers
    assert "BatchNormalization" not in {node.op_type for node in nodes}


def test_what_is_exported_is_verified_and_loaded_without_torch(path: Path) -> None:
    figures = export(path, dense=True, images=20)["onnx"]
    assert figures == report(path, FP32)
    assert figures["passed"]
    assert figures["dense"]["cosine_min"] > 0.99999
    assert figures["dense"]["batch_difference"] < 1e-4
    student, engine, images = bundles.load(path).student(), Engine.load(path, threads=1), patches(5, SIZE)
    np.testing.assert_allclose(engine.embed(images, dense=True), student.embed(images, dense=True), atol=1e-4)
    np.testing.assert_allclose(engine.embed(images), student.embed(images), atol=1e-4)
    assert engine.embed([], dense=True).shape == (0, *SHAPE)


def turn(model: ModelProto) -> None:
    """Rows of patches in the place of columns."""
    node = next(node for node in model.graph.node if "dense" in node.output)
    node.output[list(node.output).index("dense")] = "upright"
    model.graph.node.append(helper.make_node("Transpose", ["upright"], ["dense"], perm=[0, 2, 1, 3]))


def depend_on_the_batch(model: ModelProto) -> None:
    """The first image's map added to all of them, a little."""
    node = next(node for node in model.graph.node if "dense" in node.output)
    node.output[list(node.output).index("dense")] = "alone"
    constants = {"zero": np.array([0]), "little": np.array(1e-3, np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["alone", "zero"], ["most"]),
            helper.make_node("Mul", ["most", "little"], ["part"]),
            helper.make_node("Add", ["alone", "part"], ["dense"]),
        ]
    )


def drop(model: ModelProto) -> None:
    del model.graph.output[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (turn, "dense cosine_min 0."),
        (depend_on_the_batch, "dense batch_difference "),
        (drop, "output dense is missing, wanted [N, 3, 3, 128]"),
    ],
)
def test_a_file_whose_map_is_not_torchs_is_refused(
    change: Callable[[ModelProto], None], message: str, path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ModelProto.FromString(model)
    change(wrong)
    monkeypatch.setattr(builder, "to_onnx", lambda *arguments, **options: wrong.SerializeToString())
    failures = refusal(path, dense=True).removeprefix(f"{FP32}.onnx does not do what torch does: ")
    assert failures.startswith(message)
    assert f"{FP32}.onnx" not in bundles.load(path).manifest.files


@pytest.mark.slow
def test_fp16_gives_the_map_in_float32(plain: Bundle, tmp_path: Path) -> None:
    path = a_bundle(tmp_path / "student", size=SIZE)
    figures: Report = export(path, formats=["fp16"], dense=True, images=20)["fp16"]
    assert figures["dense"]["cosine_min"] > 0.9995
    images = patches(4, SIZE)
    outputs = Session(bundles.load(path).file(f"{FP16}.onnx"), threads=1)(images)
    wanted = layer4(plain, images)  # a bundle of the same seed
    assert outputs["dense"].dtype == np.float32
    assert 0 < np.abs(outputs["dense"] - wanted).max() / np.abs(wanted).max() < 1e-2


@pytest.mark.slow
def test_heads_come_before_the_map_and_without_dense_it_is_not_there(tmp_path: Path) -> None:
    path = a_bundle(tmp_path / "student", size=SIZE)
    classes, record = ("a", "b"), {"command": "c", "data": "d", "protocol": "linear", "values": {"top1": 1.0}}
    weight = np.random.default_rng(0).normal(size=(2, SMALL.width))
    bundles.add_head(bundles.load(path), "kind", weight, np.zeros(2), classes, record)
    export(path, dense=True, heads="all", images=16)
    session = Session(bundles.load(path).file(f"{FP32}.onnx"), threads=1)
    assert list(session(patches(1, SIZE))) == ["embedding", "logits_kind", "dense"]
    assert session.heads == {"kind": classes}
    assert "dense" not in export(path, images=16)["onnx"]
    assert list(Session(bundles.load(path).file(f"{FP32}.onnx"))(patches(1, SIZE))) == ["embedding"]
    with pytest.raises(MvmrError, match=r"fp32\.onnx gives no dense output; export it by .* --onnx --dense`") as caught:
        Engine.load(path, threads=1).embed([], dense=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_timm_models_map_is_exported(tmp_path: Path) -> None:
    backbone = open_backbone(StudentConfig(backbone="timm:vit_tiny_patch16_224"), SIZE)
    bundle = write_bundle(tmp_path / "student", backbone=backbone, preprocess=Preprocess.for_size(SIZE))
    student, images = bundle.student(), patches(3, SIZE)
    outputs = Session(to_onnx(student, metadata=metadata(bundle, [], "fp32"), dense=True), threads=1)(images)
    wanted = student.embed(images, dense=True).numpy()
    assert wanted.shape[1] > 1
    np.testing.assert_allclose(outputs["dense"], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("formats", [["int8"], ["onnx", "int8"], ["trt"]])
def test_formats_that_do_not_take_it_are_refused_before_anything_is_computed(
    formats: list[str], path: Path, nothing_computed: None
) -> None:
    before = state(path)
    message = f"{formats[-1]} does not take dense, only onnx and fp16 do; export it by itself, without"
    assert refusal(path, formats=formats, dense=True) == message
    assert state(path) == before


def test_triton_is_told_of_the_map(path: Path, tmp_path: Path) -> None:
    export(path, dense=True, images=16, triton=tmp_path / "models")
    config = Parse((tmp_path / "models/student/config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    outputs = {output.name: list(output.dims) for output in config.output}
    assert outputs == {"embedding": [SMALL.width], "dense": [*SHAPE]}


def test_the_command_takes_it(path: Path) -> None:
    result = CliRunner().invoke(command, [str(path), "--dense", "--images", "16"])
    assert result.exit_code == 0, result.output
    assert "dense cosine 1.000000 or more" in result.stdout


# In the service, which gives the embedding alone


def test_the_service_and_the_batch_job_take_such_a_file(path: Path, tmp_path: Path) -> None:
    from mvmr.serve.batch.job import embed  # here: these need more than an export does
    from tests.serve.batch.jobs import picture, rows
    from tests.serve.inprocess import as_json, serve

    export(path, dense=True, images=16)
    student, pixels = bundles.load(path).student(), patches(1, SIZE)
    wanted = student.embed(pixels).numpy()
    image: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3]}
    with serve(Engine.load(path, threads=1)) as client:
        answer = client.post("/v2/models/student/infer", **as_json({"inputs": [image | {"data": pixels.tolist()}]}))
        (output,) = answer.json()["outputs"]
    assert output["name"] == "embedding"
    np.testing.assert_allclose(np.float32(output["data"]), wanted[0], atol=1e-4)
    picture(0).save(tmp_path / "one.png")
    embed(path, tmp_path / "one.png", out=tmp_path / "out", threads=1)
    (row,) = rows(tmp_path / "out")
    np.testing.assert_allclose(row["embedding"], student.embed([tmp_path / "one.png"])[0], atol=1e-4)
