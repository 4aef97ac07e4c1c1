"""The exported graph does what torch does, keeps to the contract, and tells nothing of the machine that made it."""

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from mvmr.bundles.head import Head
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.export.onnx.graph import ServedEncoder, emulate_half, to_onnx
from mvmr.export.onnx.session import Session
from mvmr.models.folding import fold_batch_norm, plain_copy
from mvmr.models.student import Student
from mvmr.models.torchvision_resnet import Resnet

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 32
METADATA = {"heads": json.dumps({"kind": ["a", "ü"]}), "precision": "told"}


def patches(count: int, size: int = SIZE) -> np.ndarray:
    images = open_images("sample:patches", "test")
    numbers = np.random.default_rng(0).permutation(len(images))[:count]
    return Preprocess.for_size(size).batch(images.load(int(index)) for index in numbers)


def a_student(encoder: nn.Module, size: int = SIZE, *, seed: int = 0) -> Student:
    """A student whose batch norms have seen real images, and differ from channel to channel."""
    preprocess = Preprocess.for_size(size)
    encoder.fc = nn.Identity()
    generator = torch.Generator().manual_seed(seed)
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, generator=generator)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(part.bias, 0, 0.3, generator=generator)
            part.momentum = None
    with torch.no_grad():
        encoder.train()(torch.from_numpy(preprocess.normalise(patches(64, size))))
    return Student(encoder, preprocess, dim=512, name="test", identity="0")


def small_student(*, seed: int = 0) -> Student:
    """A ResNet with one block to a stage: all that a larger one is made of."""
    return a_student(ResNet(BasicBlock, [1, 1, 1, 1]), seed=seed)


def a_head(width: int = 512) -> Head:
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(2, width)).astype(np.float32), np.array([3, -1], np.float32)
    return Head(name="kind", weight=weight, bias=bias, classes=("a", "ü"), metrics={})


@dataclass(frozen=True)
class Exported:
    student: Student
    head: Head
    fp32: bytes
    fp16: bytes


@pytest.fixture(scope="module")
def export() -> Exported:
    torch.set_num_threads(1)
    student, head = small_student(), a_head()
    fp32, fp16 = (to_onnx(student, [head], precision=p, metadata=METADATA) for p in ("fp32", "fp16"))
    return Exported(student, head, fp32, fp16)


def in_torch(student: Student, images: np.ndarray) -> np.ndarray:
    return student(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def relative(actual: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(actual - wanted).max() / np.abs(wanted).max())


def test_onnx_agrees_with_torch_on_real_images(export: Exported) -> None:
    images = patches(256)
    outputs, wanted = Session(export.fp32, threads=1)(images), in_torch(export.student, images)
    assert np.abs(outputs["embedding"] - wanted).max() < 1e-4
    assert np.abs(wanted).max() > 1  # so that 1e-4 is little
    logits = wanted @ export.head.weight.T + export.head.bias
    np.testing.assert_allclose(outputs["logits_kind"], logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_batch_size_works_and_changes_nothing(export: Exported, precision: str) -> None:
    images, session = patches(64), Session(getattr(export, precision), threads=1)
    reference = session(images)["embedding"]
    for size in (1, 2, 3, 33):
        np.testing.assert_allclose(session(images[:size])["embedding"], reference[:size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_file_keeps_to_the_contract(export: Exported, precision: str, tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(getattr(export, precision))
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA
    described = [
        (value.name, value.type.tensor_type.elem_type, [axis.dim_param or axis.dim_value for axis in shape])
        for value in (*model.graph.input, *model.graph.output)
        for shape in (value.type.tensor_type.shape.dim,)
    ]
    assert described == [
        ("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3]),
        ("embedding", TensorProto.FLOAT, ["batch", 512]),
        ("logits_kind", TensorProto.FLOAT, ["batch", 2]),
    ]
    kinds = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds[:2] == ["Cast", "Transpose"]  # TensorRT takes uint8 in no other order
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_convolutions_are_called_after_their_layers_in_torch(export: Exported) -> None:
    layers = {name for name, part in export.student.encoder.named_modules() if isinstance(part, nn.Conv2d)}
    for content in (export.fp32, export.fp16):
        nodes = [node for node in onnx.ModelProto.FromString(content).graph.node if node.op_type == "Conv"]
        assert {node.name for node in nodes} == layers
        assert len(nodes) == len(layers) == 12


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_of_this_machine_is_in_the_file(export: Exported, precision: str) -> None:
    content = getattr(export, precision)
    folders = {str(Path(__file__).parents[3]), os.getcwd(), sys.prefix, tempfile.gettempdir(), str(Path.home())}
    for text in (*folders - {"/"}, "site-packages", "eval_with_key", ".py", "stack_trace", 'File "'):
        assert text.encode() not in content, text


# fp16


def test_half_precision_is_near_and_rounded_is_what_torch_makes_of_it(export: Exported) -> None:
    images = patches(32)
    wanted = in_torch(export.student, images)
    actual = Session(emulate_half(export.fp16), threads=1)(images)["embedding"]
    with torch.no_grad():  # torch's own half precision, an independent way
        theirs = ServedEncoder(export.student, half=True)(torch.from_numpy(images))[0].numpy()
    assert 1e-5 < relative(actual, wanted) < 0.01
    assert relative(actual, theirs) < relative(actual, wanted)
    on_cpu = Session(export.fp16, threads=1)(images)["embedding"]
    assert relative(on_cpu, wanted) < 0.01


def test_weights_are_half_but_normalisation_and_heads_are_not(export: Exported) -> None:
    graph = onnx.ModelProto.FromString(export.fp16).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert {kinds[name] for node in convolutions for name in node.input[1:]} == {TensorProto.FLOAT16}
    maker = {name: node for node in graph.node for name in node.output}
    cast = maker[convolutions[0].input[0]]
    assert cast.op_type == "Cast"
    assert maker[cast.input[0]].op_type == "Add"
    assert {kinds[name] for name in maker["logits_kind"].input if name in kinds} == {TensorProto.FLOAT}
    assert len(export.fp16) < 0.51 * len(export.fp32)


def test_folding_before_halving_is_nearer_than_after(export: Exported) -> None:
    images = torch.from_numpy(patches(64))
    wanted = in_torch(export.student, images.numpy())
    after = copy.deepcopy(export.student.encoder).half()  # batch norm and weights rounded, then folded
    served = {}
    for name, encoder in (("before", export.student.encoder), ("after", after)):
        served[name] = ServedEncoder(export.student, half=True)
        served[name].encoder = fold_batch_norm(plain_copy(encoder)).half()
    with torch.no_grad():
        errors = {name: np.square(encoder(images)[0].numpy() - wanted).mean() for name, encoder in served.items()}
    assert errors["before"] < errors["after"]


def test_rounded_overflows_where_a_gpu_would_and_a_cpu_does_not(export: Exported) -> None:
    """The reason for it: onnxruntime's CPU provider keeps what is between the nodes in float32."""
    model = onnx.ModelProto.FromString(export.fp16)
    for tensor in model.graph.initializer:
        factors = {"encoder.layer1.0.conv1.weight": 1e4, "encoder.layer1.0.conv1.bias": 1e4}
        factor = factors.get(tensor.name, 1e-4 if tensor.name == "encoder.layer1.0.conv2.weight" else 1)
        if factor != 1:
            tensor.CopyFrom(
                numpy_helper.from_array((numpy_helper.to_array(tensor) * factor).astype(np.float16), tensor.name)
            )
    planted = model.SerializeToString()
    on_cpu, on_gpu = (Session(file, threads=1)(patches(32))["embedding"] for file in (planted, emulate_half(planted)))
    assert np.isfinite(on_cpu).all()
    assert not np.isfinite(on_gpu).all()


# Bad input, and what else torch's exporter may do


@pytest.mark.parametrize("opset", [7, 17, 24])
def test_an_opset_that_would_not_come_out_as_asked_is_refused(
    export: Exported, opset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", pytest.fail)
    with pytest.raises(MvmrError, match=f"opset {opset} can't be exported; give one from 18 to 23"):
        to_onnx(export.student, opset=opset, metadata={})


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23])
def test_the_lowest_and_the_highest_opset(export: Exported, opset: int) -> None:
    content = to_onnx(export.student, opset=opset, metadata=METADATA | {"heads": "{}"})
    assert onnx.ModelProto.FromString(content).opset_import[0].version == opset
    images = patches(8)
    assert relative(Session(content)(images)["embedding"], in_torch(export.student, images)) < 1e-5


@pytest.mark.slow
def test_the_same_student_gives_the_same_bytes_in_silence(
    export: Exported, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert to_onnx(export.student, [export.head], precision="fp16", metadata=METADATA) == export.fp16
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == []


_IN_ANOTHER_PROCESS = """
import hashlib, runpy, sys
module = runpy.run_path(sys.argv[1])
student, head = module["small_student"](), module["a_head"]()
print(hashlib.sha256(module["to_onnx"](student, [head], metadata=module["METADATA"])).hexdigest())
"""


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(export: Exported) -> None:
    command = [sys.executable, "-c", _IN_ANOTHER_PROCESS, __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    assert process.stdout.split() == [hashlib.sha256(export.fp32).hexdigest()]


@pytest.mark.slow
@pytest.mark.parametrize("small_kernel", [False, True])
def test_the_real_encoders(small_kernel: bool) -> None:
    student = a_student(Resnet(name="resnet18", small_kernel=small_kernel).build())
    images = patches(16)
    session = Session(to_onnx(student, metadata={"heads": "{}"}))
    assert relative(session(images)["embedding"], in_torch(student, images)) < 1e-5
