"""A teacher in an ONNX file: its pixels, its normalisation by flags or metadata, and files that can't teach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mvmr.bundles.preprocess import Preprocess
from mvmr.distillation.teachers.spec import parse_specs
from mvmr.distillation.teachers.table import open_teacher
from mvmr.distillation.teachers.teacher import NoTextTower, Teacher, canaries
from mvmr.errors import MvmrError
from mvmr.export.export import export
from tests.distill.small_onnx import DIM, SIZE, small_onnx
from tests.making import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

FLOAT = {"kind": TensorProto.FLOAT, "shape": ("N", 3, SIZE, SIZE)}
IMAGENET = "mean=0.485,0.456,0.406&std=0.229,0.224,0.225"


def open_onnx(what: str) -> Teacher:
    return open_teacher(parse_specs(f"onnx:{what}")[0])


def embed(teacher: Teacher) -> np.ndarray:
    return teacher(torch.stack([teacher.prepare(image) for image in canaries()])).numpy()


def run(file: Path, pixels: np.ndarray) -> np.ndarray:
    """What onnxruntime itself makes of prepared pixels."""
    return onnxruntime.InferenceSession(file).run(["embedding"], {"image": pixels})[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [("N", SIZE, SIZE, 3), ("N", 3, SIZE, SIZE), (1, SIZE, SIZE, 3)])
def test_bytes_are_given_as_bytes_in_the_order_of_its_input(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    file = small_onnx(tmp_path / "bytes.onnx", shape=shape)
    pixels = Preprocess(resize=SIZE, crop=SIZE, interpolation="bicubic").batch(canaries())
    pixels = pixels.transpose(0, 3, 1, 2) if shape[1] == 3 else pixels
    wanted = np.concatenate([run(file, image[None]) for image in pixels])
    teacher = open_onnx(str(file))
    assert teacher.dim == DIM
    np.testing.assert_allclose(embed(teacher), wanted, rtol=1e-6)


def test_floats_are_normalised_as_the_user_says(tmp_path: Path) -> None:
    file = small_onnx(tmp_path / "floats.onnx", **FLOAT)
    preprocess = Preprocess(resize=12, crop=SIZE, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    wanted = run(file, preprocess.normalise(preprocess.batch(canaries())))
    teacher = open_onnx(f"{file}?mean=0.1,0.2,0.3&std=0.5,0.6,0.7&resize=12&interpolation=bilinear")
    np.testing.assert_allclose(embed(teacher), wanted, rtol=1e-6)


def test_floats_are_normalised_as_its_metadata_say(tmp_path: Path) -> None:
    preprocess = Preprocess(resize=10, crop=SIZE, mean=(0.1, 0.2, 0.3))
    metadata = {"preprocessing": json.dumps(preprocess.to_dict())}
    file = small_onnx(tmp_path / "floats.onnx", metadata=metadata, **FLOAT)
    wanted = run(file, preprocess.normalise(preprocess.batch(canaries())))
    np.testing.assert_allclose(embed(open_onnx(str(file))), wanted, rtol=1e-6)


@pytest.mark.slow
def test_an_exported_student_teaches_without_a_word(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    export(bundle.path, data="sample:digits", images=16)
    teacher = open_onnx(str(bundle.path / "onnx" / "encoder.fp32.onnx") + "?output=embedding")
    student = bundle.student().embed(canaries())
    np.testing.assert_allclose(embed(teacher), np.asarray(student), rtol=1e-3, atol=1e-4)


def test_a_file_that_leaves_the_side_open_is_told(tmp_path: Path) -> None:
    file = small_onnx(tmp_path / "open.onnx", kind=TensorProto.FLOAT, shape=("N", 3, "H", "W"))
    assert open_onnx(f"{file}?{IMAGENET}&size=20").prepare(canaries()[0]).shape == (3, 20, 20)
    with pytest.raises(MvmrError, match=r"leaves the side of its images open; give it: 'onnx:.*open\.onnx\?size=224'"):
        open_onnx(f"{file}?{IMAGENET}")


def test_one_of_several_outputs_is_named(tmp_path: Path) -> None:
    file = small_onnx(tmp_path / "two.onnx", outputs=("embedding", "tokens"))
    assert open_onnx(f"{file}?output=tokens").dim == DIM
    with pytest.raises(MvmrError, match=r"has several outputs \(embedding, tokens\); name one: .*\?output=embedding"):
        open_onnx(str(file))
    with pytest.raises(MvmrError, match=r"unknown output of teacher .* 'token'; did you mean 'tokens'\?"):
        open_onnx(f"{file}?output=token")


def test_what_is_said_of_it_makes_another_teacher(tmp_path: Path) -> None:
    file = small_onnx(tmp_path / "floats.onnx", **FLOAT)
    whats = [f"{file}?{IMAGENET}", f"{file}?{IMAGENET}&resize=9", f"{file}?mean=0,0,0&std=1,1,1"]
    assert len({open_onnx(what).identity for what in whats}) == 3
    assert open_onnx(whats[0]).identity == open_onnx(whats[0]).identity


def test_it_has_no_text_tower(tmp_path: Path) -> None:
    file = small_onnx(tmp_path / "bytes.onnx")
    with pytest.raises(NoTextTower, match="has no text tower"):
        open_teacher(parse_specs(f"onnx:{file}")[0], text=True)


@pytest.mark.parametrize(
    ("settings", "query", "message"),
    [
        (FLOAT, "", r"takes floats and doesn't say how they are normalised; give it, of RGB in \[0, 1\]: .*\?mean="),
        (FLOAT, "mean=0,0,0", "doesn't say how they are normalised"),
        (FLOAT, "mean=0,0&std=1,1,1", "mean=0,0 should be three numbers"),
        (FLOAT, f"{IMAGENET}&size=9", "takes images of 8 px; leave out size=9"),
        (FLOAT, f"{IMAGENET}&resize=much", "resize=much should be a whole number of pixels"),
        (FLOAT, f"{IMAGENET}&resize=4", r"crop = 8 must lie between 1 and resize = 4"),
        (FLOAT, f"{IMAGENET}&interpolation=cubic", "unknown interpolation 'cubic'; did you mean 'bicubic'"),
        (FLOAT, "means=0,0,0", r"unknown setting of teacher .* 'means'; did you mean 'mean'\?"),
        ({}, "mean=0,0,0&std=1,1,1", "takes bytes and normalises them itself; leave out mean and std"),
        ({"shape": ("N", 8, 9, 3)}, "", "not square images"),
        ({"shape": (4, SIZE, SIZE, 3)}, "", r"takes \[4, 8, 8, 3\], not square images"),
        ({"kind": TensorProto.INT64}, "", r"takes image tensor\(int64\), not one image of uint8 or floats"),
        ({"operator": ("my.domain", "Fancy")}, "", "needs an operator that onnxruntime doesn't have, and no foreign"),
    ],
)
def test_what_can_not_teach_is_one_line(tmp_path: Path, settings: dict[str, Any], query: str, message: str) -> None:
    file = small_onnx(tmp_path / "model.onnx", **settings)
    with pytest.raises(MvmrError, match=message) as excinfo:
        open_onnx(f"{file}?{query}" if query else str(file))
    assert "\n" not in str(excinfo.value)


def move_out(model: onnx.ModelProto, tensor: onnx.TensorProto, folder: Path) -> Path:
    """Write the model with a tensor's values in a file beside it."""
    folder.mkdir()
    onnx.external_data_helper.set_external_data(tensor, "side.bin")
    (folder / "side.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def initializer(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == "weight")


def below_a_branch(model: onnx.ModelProto) -> onnx.TensorProto:
    """The same in both branches of an `If`; the weight of one of them."""
    (product,) = (node for node in model.graph.node if node.op_type == "MatMul")
    output = [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    weight = initializer(model)
    branches = {
        name: helper.make_graph(
            [helper.make_node("MatMul", [product.input[0], "below"], ["inner"])], name, [], output,
            [numpy_helper.from_array(numpy_helper.to_array(weight), "below")],
        )
        for name in ("then_branch", "else_branch")
    }  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    product.CopyFrom(helper.make_node("If", ["condition"], list(product.output), **branches))
    return product.attribute[0].g.initializer[0]


def in_a_constant(model: onnx.ModelProto) -> onnx.TensorProto:
    weight = initializer(model)
    node = helper.make_node("Constant", [], ["weight"], value=weight)
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0, node)
    return model.graph.node[0].attribute[0].t


@pytest.mark.parametrize("place", [initializer, below_a_branch, in_a_constant])
@pytest.mark.parametrize("inside", [True, False])
def test_weights_in_another_file_are_refused_wherever_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[onnx.ModelProto], onnx.TensorProto], inside: bool
) -> None:
    model = onnx.load(small_onnx(tmp_path / "whole.onnx"))
    tensor = place(model)
    onnx.save(model, tmp_path / "same.onnx")
    assert open_onnx(str(tmp_path / "same.onnx")).dim == DIM
    file = move_out(model, tensor, tmp_path / "parts")
    if inside:
        monkeypatch.chdir(file.parent)  # where onnxruntime looks for the weights of a model given as bytes
    with pytest.raises(
        MvmrError, match=rf"has weights in other files \('{tensor.name}'\), .*; save it as one"
    ) as excinfo:
        open_onnx(str(file))
    assert "\n" not in str(excinfo.value)


def test_no_way_of_writing_the_mark_of_another_file_gets_through(tmp_path: Path) -> None:
    """To protobuf a padded number is the same, and of two the last counts."""
    model = onnx.load(small_onnx(tmp_path / "whole.onnx"))
    file = move_out(model, initializer(model), tmp_path / "parts")
    content, mark = file.read_bytes(), b"\x70\x01"
    tensor = initializer(model).SerializeToString()
    assert tensor.count(mark) == content.count(mark) == 1
    for other in (b"\xf0\x00\x01", b"\x70\x81\x00", b"\x70\x81\x80\x80\x80\x10", b"\x70\x00\x70\x01"):
        padded = tensor.replace(mark, other)
        assert onnx.TensorProto.FromString(padded).data_location == TensorProto.EXTERNAL
        graph = b"\x2a" + bytes([len(padded) | 0x80, len(padded) >> 7]) + padded
        file.write_bytes(b"\x3a" + bytes([len(graph) | 0x80, len(graph) >> 7]) + graph)
        assert onnx.load(file, load_external_data=False).graph.initializer[0].data_location == TensorProto.EXTERNAL
        with pytest.raises(MvmrError, match="has weights in other files"):
            open_onnx(str(file))


def test_a_tensor_called_as_other_files_are_is_none(tmp_path: Path) -> None:
    file = small_onnx(tmp_path / "names.onnx", outputs=("location", "external"))
    assert open_onnx(f"{file}?output=location").dim == DIM


@pytest.mark.parametrize("size", [1, 50, -1])
def test_a_file_that_was_cut_off_is_one_line(tmp_path: Path, size: int) -> None:
    file = small_onnx(tmp_path / "cut.onnx")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(MvmrError, match=r"cut\.onnx can't be run \(it is no whole ONNX file: "):
        open_onnx(str(file))


def test_a_file_that_is_missing_or_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"gone\.onnx: cannot read it: No such file"):
        open_onnx(str(tmp_path / "gone.onnx"))
    (tmp_path / "text.onnx").write_text("weights")
    with pytest.raises(MvmrError, match=r"text\.onnx can't be run \(.*"):
        open_onnx(str(tmp_path / "text.onnx"))
