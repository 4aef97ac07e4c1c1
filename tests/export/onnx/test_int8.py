"""int8 does nearly what float does on real images, says what it could not quantise, and leaves nothing behind."""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from mvmr.bundles.head import Head
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.export.onnx import int8
from mvmr.export.onnx.graph import to_onnx
from mvmr.export.onnx.int8 import quantise, search
from mvmr.export.onnx.session import Session
from mvmr.models.student import Student
from mvmr.models.torchvision_resnet import Resnet

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, WIDTH, CLASSES = 32, 48, ("cat", "dog", "hen")
LAYERS = {"stem", "conv1", "conv2", "shortcut", "last"}
METADATA = {"precision": "fp32", "heads": json.dumps({"pets": CLASSES}), "bundle_hash": "abc", "mvmr_version": "1"}


def has_vnni() -> bool:
    """Whether the processor sums 8-bit products in 32 bits; others saturate in 16, and embeddings are not as close."""
    cpuinfo = Path("/proc/cpuinfo")
    return "x86" not in platform.machine() or not cpuinfo.is_file() or "vnni" in cpuinfo.read_text()


saturates = pytest.mark.skipif(
    not has_vnni(), reason="sums of 8-bit products saturate on this processor: it has no VNNI"
)

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Small(nn.Module):
    """A ResNet of one block."""

    def __init__(self) -> None:
        super().__init__()
        for name, into, out, kernel, stride in (
            ("stem", 3, 16, 3, 1), ("conv1", 16, 32, 3, 2), ("conv2", 32, 32, 3, 1), ("shortcut", 16, 32, 1, 2),
            ("last", 32, WIDTH, 3, 1),
        ):  # fmt: skip
            self.add_module(name, nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(out))

    def layer(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(f"{name}_norm")(self.get_submodule(name)(x))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.layer("stem", x)), 2)
        inner = self.layer("conv2", torch.relu(self.layer("conv1", x)))
        x = torch.relu(inner + self.layer("shortcut", x))
        return torch.relu(self.layer("last", x)).mean((2, 3))


def export_float(encoder: nn.Module, width: int, images: Images) -> bytes:
    """A float file of an encoder whose batch norms have seen the images, with a head."""
    preprocess = Preprocess.for_size(SIZE)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # averages over all it has seen
            nn.init.uniform_(part.weight, 0.5, 1.5)
    with torch.no_grad():
        encoder.train()(torch.from_numpy(preprocess.normalise(images)))
    student = Student(encoder, preprocess, dim=width, name="small", identity="small")
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(len(CLASSES), width)), random.normal(size=len(CLASSES))
    numbers = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
    head = Head(name="pets", **numbers, classes=CLASSES, metrics={})
    return to_onnx(student, [head], metadata=METADATA)


@pytest.fixture(scope="module")
def photos() -> tuple[Images, Images]:
    """To calibrate with, and others to judge by."""
    preprocess = Preprocess.for_size(SIZE)
    sets = open_images("sample:patches", "train"), open_images("sample:patches", "test")
    calibration, held_out = (
        preprocess.batch(images.load(index) for index in range(0, len(images), len(images) // count))
        for images, count in zip(sets, (120, 64), strict=True)
    )
    return calibration[:120], held_out[:64]


@pytest.fixture(scope="module")
def fp32(photos: tuple[Images, Images]) -> bytes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return export_float(Small(), WIDTH, photos[0])


@pytest.fixture(scope="module")
def int8_file(fp32: bytes, photos: tuple[Images, Images]) -> bytes:
    return quantise(fp32, [photos[0]])


@pytest.fixture(scope="module")
def uneven(fp32: bytes) -> bytes:
    """The same function, but a channel between conv1 and conv2 is 1000 times as large."""
    return multiply(
        fp32, ("conv1", 1, np.s_[0], 1e3), ("conv1", 2, np.s_[0], 1e3), ("conv2", 1, np.s_[:, 0], 1e-3)
    )  # fmt: skip


def multiply(model: bytes, *changes: tuple[str, int, Any, float]) -> bytes:
    """A file of which parts of a layer's weight (input 1) or bias (2) are multiplied by a number."""
    graph = (proto := onnx.ModelProto.FromString(model)).graph
    inputs = {node.name: node.input for node in graph.node}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for layer, index, part, factor in changes:
        tensor = tensors[inputs[layer][index]]
        values = numpy_helper.to_array(tensor).copy()
        values[part] *= factor
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return proto.SerializeToString()


def embed(model: bytes, images: Images) -> Floats:
    return Session(model)(images)["embedding"]


def likeness(actual: Floats, wanted: Floats) -> float:
    """Mean cosine after the mean of those wanted has been subtracted."""
    a, b = actual - wanted.mean(0), wanted - wanted.mean(0)
    return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def asking(fp32: bytes, images: Images, least: float) -> Callable[[bytes], dict[str, Any]]:
    """A judge that wants the likeness on held-out images to be above `least`."""
    wanted = embed(fp32, images)

    def judge(model: bytes) -> dict[str, Any]:
        cosine = likeness(embed(model, images), wanted)
        return {"passed": cosine > least, "likeness": cosine}

    return judge


def weights(model: bytes) -> dict[str, tuple[onnx.NodeProto, npt.NDArray[Any]]]:
    """By layer: the node the convolution's weight comes from (itself where it is a constant), and the constant."""
    graph = onnx.ModelProto.FromString(model).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    convolutions = {node.name: node for node in graph.node if node.op_type == "Conv"}
    sources = {name: makers.get(node.input[1], node) for name, node in convolutions.items()}
    return {name: (node, constants[node.input[1 if node.op_type == "Conv" else 0]]) for name, node in sources.items()}


@saturates
def test_embeddings_of_other_images_are_close_to_floats(
    fp32: bytes, int8_file: bytes, photos: tuple[Images, Images]
) -> None:
    actual, wanted = embed(int8_file, photos[1]), embed(fp32, photos[1])
    assert likeness(actual, wanted) > 0.99
    assert not np.array_equal(actual, wanted)
    shuffled = np.random.default_rng(0).permutation(len(actual))
    assert likeness(actual[shuffled], wanted) < 0.5  # the measure tells images apart


@pytest.mark.parametrize("size", [1, 2, 3, 7, 32, 63])
def test_an_embedding_does_not_depend_on_its_batch(int8_file: bytes, photos: tuple[Images, Images], size: int) -> None:
    session = Session(int8_file, threads=1)
    together = session(photos[1])["embedding"]
    parts = [session(photos[1][start : start + size])["embedding"] for start in range(0, 64, size)]
    np.testing.assert_allclose(np.concatenate(parts), together, rtol=1e-5, atol=1e-6)


def test_weights_are_int8_with_a_scale_for_each_channel(fp32: bytes, int8_file: bytes) -> None:
    graph = onnx.ModelProto.FromString(int8_file).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    exact = weights(fp32)
    assert set(exact) == LAYERS
    for name, (node, stored) in weights(int8_file).items():
        assert node.op_type == "DequantizeLinear"
        assert stored.dtype == np.int8
        axis = {entry.name: entry.i for entry in node.attribute}["axis"]
        scale, zero = (constants[entry] for entry in node.input[1:])
        assert (axis, scale.shape) == (0, (len(stored),))
        assert not zero.any()
        scales = scale[:, None, None, None]
        assert (np.abs(stored * scales - exact[name][1]) <= scales * 0.501).all()


def test_activations_are_uint8_and_outputs_are_not_quantised(int8_file: bytes, photos: tuple[Images, Images]) -> None:
    graph = onnx.ModelProto.FromString(int8_file).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    steps = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {kinds[node.input[2]] for node in steps} == {TensorProto.UINT8}
    # the input, the pool's input and output, inside the block, its two branches, their sum, the last
    assert len(steps) >= 7
    makers = {name: node.op_type for node in graph.node for name in node.output}
    assert {makers[output.name] for output in graph.output}.isdisjoint({"DequantizeLinear", "QuantizeLinear"})
    heads = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weight, bias = heads["heads.0.weight"], heads["heads.0.bias"]
    outputs = Session(int8_file)(photos[1])
    np.testing.assert_allclose(outputs["logits_pets"], outputs["embedding"] @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_the_contract_stays(fp32: bytes, int8_file: bytes) -> None:
    before, after = (onnx.ModelProto.FromString(content) for content in (fp32, int8_file))
    onnx.checker.check_model(after, full_check=True)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.opset_import) == list(before.opset_import)
    assert {entry.key: entry.value for entry in after.metadata_props} == METADATA | {"precision": "int8"}
    assert not any(tensor.external_data for tensor in after.graph.initializer)
    assert len(int8_file) < 0.6 * len(fp32)
    session = Session(int8_file)
    assert (session.size, session.dim, session.heads) == (SIZE, WIDTH, {"pets": CLASSES})


def test_the_normalisation_has_its_numbers_for_every_pixel_of_a_row(fp32: bytes, int8_file: bytes) -> None:
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.ModelProto.FromString(model).graph.initializer}
        for model in (fp32, int8_file)
    )
    names = [name for name, values in before.items() if values.shape == (3, 1, 1)]
    assert len(names) == 2  # a factor and a summand
    for name in names:
        assert after[name].shape == (3, 1, SIZE)
        assert (after[name] == before[name]).all()


def test_a_layer_kept_in_float_keeps_its_weights(fp32: bytes, photos: tuple[Images, Images]) -> None:
    layers = weights(quantise(fp32, [photos[0]], keep_float=["conv2", "stem"]))
    for name, (_, stored) in layers.items():
        if name in ("conv2", "stem"):
            assert np.array_equal(stored, weights(fp32)[name][1])
        else:
            assert stored.dtype == np.int8


def test_the_same_in_other_batches_and_in_another_process_in_silence(
    fp32: bytes, photos: tuple[Images, Images], tmp_path: Path
) -> None:
    model = multiply(fp32, ("conv1", 1, np.s_[1], 1e-9))  # a channel all but dead, which onnxruntime remarks upon
    (tmp_path / "float.onnx").write_bytes(model)
    np.save(tmp_path / "images.npy", photos[0])
    code = (
        "import hashlib, logging, sys, numpy as np; from mvmr.export.onnx.int8 import quantise\n"
        "model = quantise(open('float.onnx', 'rb').read(), [np.load('images.npy')])\n"
        "print(hashlib.sha256(model).hexdigest(), len(logging.root.handlers), 'torch' in sys.modules)"
    )
    (tmp_path / "temporary").mkdir()
    env = os.environ | {"PYTHONHASHSEED": "7", "TMPDIR": str(tmp_path / "temporary")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stderr == ""
    handlers = list(logging.root.handlers)
    content = quantise(model, np.split(photos[0], 5))
    assert logging.root.handlers == handlers
    assert run.stdout.split() == [hashlib.sha256(content).hexdigest(), "0", "False"]
    remains = {file.name for file in (tmp_path / "temporary").iterdir()}
    assert remains <= {".ses"}  # onnxruntime writes it when it is imported
    assert sorted(file.name for file in tmp_path.iterdir()) == ["float.onnx", "images.npy", "temporary"]


def test_search_stops_at_once_where_int8_will_do(fp32: bytes, int8_file: bytes, photos: tuple[Images, Images]) -> None:
    model, float_layers, trail = search(fp32, [photos[0]], asking(fp32, photos[1], 0.95))
    assert (model, float_layers, len(trail)) == (int8_file, [], 1)
    step = trail[0]
    assert step["passed"]
    assert step["kept_float"] == {}
    assert step["bytes"] == len(model)
    assert step["latency_ms"] > 0
    assert 0 < step["noise"] < 0.05
    assert step["verdict"]["likeness"] > 0.95


@saturates
def test_layers_that_quantise_badly_are_found_and_kept(
    fp32: bytes, uneven: bytes, photos: tuple[Images, Images]
) -> None:
    np.testing.assert_allclose(embed(uneven, photos[1]), embed(fp32, photos[1]), rtol=1e-3, atol=1e-3)
    model, float_layers, trail = search(uneven, [photos[0]], asking(fp32, photos[1], 0.98))
    assert set(float_layers) == {"conv1", "conv2"}
    assert [step["passed"] for step in trail] == [False, False, True]
    assert [list(step["kept_float"]) for step in trail] == [[], float_layers[:1], float_layers]
    assert trail[0]["noise"] > 5 * trail[-1]["noise"]
    assert trail[0]["bytes"] < trail[-1]["bytes"] == len(model)
    assert {name for name, (_, stored) in weights(model).items() if stored.dtype == np.float32} == set(float_layers)


def test_search_gives_up_with_the_best_and_all_its_figures(fp32: bytes, photos: tuple[Images, Images]) -> None:
    models: list[bytes] = []

    def never(model: bytes) -> dict[str, Any]:
        models.append(model)
        return {"passed": False, "failures": ["never"]}

    model, float_layers, trail = search(fp32, [photos[0]], never)
    assert [len(step["kept_float"]) for step in trail] == [0, 1, 2, 4]
    assert not any(step["passed"] for step in trail)
    best = min(range(4), key=lambda number: trail[number]["noise"])
    assert model == models[best]
    assert float_layers == list(trail[best]["kept_float"])
    alone = list(trail[3]["kept_float"].values())
    assert alone == sorted(alone, reverse=True)
    json.dumps(trail, allow_nan=False)


def refusal(fp32: bytes, images: Images, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        quantise(fp32, [images], **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def test_bad_input_is_refused_before_calibrating(
    fp32: bytes, int8_file: bytes, photos: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "create_calibrator", lambda *args, **options: pytest.fail("began to calibrate"))
    good = photos[0]
    assert "at least 100 real images" in refusal(fp32, good[:99])
    assert "got 99" in refusal(fp32, good[:99])
    assert "got 0" in refusal(fp32, good[:0])
    assert "uint8 [n, 32, 32, 3], these are float32" in refusal(fp32, good.astype(np.float32))
    assert "these are uint8 [120, 3, 32, 32]" in refusal(fp32, np.ascontiguousarray(good.transpose(0, 3, 1, 2)))
    assert "these are uint8 [120, 16, 16, 3]" in refusal(fp32, good[:, ::2, ::2])
    assert "did you mean 'conv1'" in refusal(fp32, good, keep_float=["conv11"])
    assert "nothing is left for int8" in refusal(fp32, good, keep_float=sorted(LAYERS))
    assert "made from the fp32 ONNX" in refusal(int8_file, good)


def test_a_full_disk_is_said(fp32: bytes, photos: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, os.strerror(28), "ready.onnx")

    monkeypatch.setattr(int8, "quant_pre_process", full)
    assert refusal(fp32, photos[0]).startswith("disk full")


@pytest.mark.slow
@saturates
def test_a_resnet_passes_and_its_layers_have_torchs_names(photos: tuple[Images, Images]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Resnet(name="resnet18").build()
        names = {name for name, part in encoder.named_modules() if isinstance(part, nn.Conv2d)}
        fp32 = export_float(encoder, 512, photos[0])
    model = quantise(fp32, [photos[0]], keep_float=["layer3.1.conv2"])
    kinds = {name: stored.dtype for name, (_, stored) in weights(model).items()}
    assert set(kinds) == names
    assert [name for name, kind in kinds.items() if kind != np.int8] == ["layer3.1.conv2"]
    assert likeness(embed(model, photos[1]), embed(fp32, photos[1])) > 0.95
