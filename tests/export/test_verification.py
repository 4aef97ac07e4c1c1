"""The gate bites: what an artifact does otherwise than torch is measured, refused, and the layer named."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from scipy.spatial.distance import cosine
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from mvmr.bundles.head import Head
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.export.onnx.drift import INPUT, first_drift
from mvmr.export.onnx.graph import emulate_half, to_onnx
from mvmr.export.onnx.session import Session
from mvmr.export.verification import Gates, Reference, Report, Run, verify
from mvmr.models.student import Student

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, WIDTH = 32, 16
CLASSES = ("a", "b", "c")
Outputs = Mapping[str, np.ndarray]


# Figures, on embeddings that are numbers and nothing else


def a_reference(count: int = 40, *, seed: int = 0, **changes: Any) -> Reference:
    """Embeddings with a large common part, and a head whose logits are three of their columns."""
    random = np.random.default_rng(seed)
    embedding = (5 + random.normal(size=(count, WIDTH))).astype(np.float32)
    return Reference(
        images=random.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8),
        outputs={"embedding": embedding, "logits_kind": embedding[:, :3].copy()},
        heads={"kind": CLASSES},
        **changes,
    )


def artifact(reference: Reference, change: Callable[[np.ndarray], np.ndarray] = np.copy) -> Run:
    """What gives the reference's embedding of an image, changed; its logits are of the changed one."""
    rows = {image.tobytes(): number for number, image in enumerate(reference.images)}

    def run(images: np.ndarray) -> Outputs:
        embedding = change(reference.outputs["embedding"])[[rows[image.tobytes()] for image in images]]
        return {"embedding": embedding, "logits_kind": embedding[:, :3]}

    return run


def noisy(size: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: (rows + size * np.random.default_rng(1).normal(size=rows.shape)).astype(np.float32)


ALL = Gates(cosine_min=0.9, centred_cosine_mean=0.9, overlap=0.9, accuracy_drop=1, batch_difference=0.01)


def test_an_exact_artifact_passes_every_gate() -> None:
    reference = a_reference(labels=np.arange(40) % 3, classes=CLASSES)
    report = verify(artifact(reference), reference, gates=ALL)
    assert report["passed"]
    assert report["failures"] == []
    exact = {"cosine_min": 1, "centred_cosine_mean": 1, "overlap": 1, "max_abs": 0, "accuracy_drop": 0}
    for name, value in exact.items():
        assert report[name] == pytest.approx(value)
    assert report["heads"]["kind"]["agreement"] == 100
    assert report["images"] == 40
    assert report["gates"]["overlap"] == 0.9
    json.dumps(report, allow_nan=False)


def test_figures_are_what_other_packages_say() -> None:
    reference = a_reference()
    actual, wanted = noisy(0.5)(reference.outputs["embedding"]), reference.outputs["embedding"]
    report = verify(artifact(reference, noisy(0.5)), reference, gates=Gates())
    cosines = [1 - cosine(a, b) for a, b in zip(actual, wanted, strict=True)]
    centre = wanted.mean(0)
    centred = [1 - cosine(a - centre, b - centre) for a, b in zip(actual, wanted, strict=True)]
    assert report["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)
    assert report["cosine_mean"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert report["centred_cosine_min"] == pytest.approx(min(centred), abs=1e-6)
    assert report["centred_cosine_mean"] == pytest.approx(np.mean(centred), abs=1e-6)
    assert report["max_abs"] == pytest.approx(np.abs(actual - wanted).max())
    assert report["max_abs_relative"] == pytest.approx(np.abs(actual - wanted).max() / np.abs(wanted).max())
    lists = [NearestNeighbors(n_neighbors=10, metric="cosine").fit(rows).kneighbors()[1] for rows in (actual, wanted)]
    overlap = np.mean([len({*a} & {*b}) / 10 for a, b in zip(*lists, strict=True)])
    assert report["overlap"] == pytest.approx(overlap)
    assert 0.1 < overlap < 0.99
    agreement = 100 * (actual[:, :3].argmax(1) == wanted[:, :3].argmax(1)).mean()
    assert report["heads"]["kind"]["agreement"] == pytest.approx(agreement)


def test_a_common_part_flatters_plain_cosines_but_not_the_gate_of_int8() -> None:
    reference = a_reference()
    report = verify(artifact(reference, noisy(1.0)), reference, gates=Gates.of("int8"))
    assert report["cosine_mean"] > 0.95
    assert not report["passed"]
    assert [text.split()[0] for text in report["failures"]] == ["centred_cosine_mean", "overlap"]
    assert report["failures"][0].endswith("wanted above 0.95")


def test_all_batch_sizes_are_run_the_largest_over_all_images() -> None:
    reference, sizes = a_reference(150), []
    exact = artifact(reference)

    def run(images: np.ndarray) -> Outputs:
        sizes.append(len(images))
        return exact(images)

    report = verify(run, reference, gates=ALL)
    assert sizes == [1] * 17 + [3] * 17 + [64, 64, 64, 22]  # one of each size more, to warm up
    assert report["batches"] == [1, 3, 64]
    assert set(report["latency_ms"]) == {"1", "3", "64"}


def test_of_few_images_the_largest_batch_is_all() -> None:
    reference = a_reference(20)
    assert verify(artifact(reference), reference, gates=ALL)["batches"] == [1, 3, 20]


def test_an_embedding_that_depends_on_its_batch_is_refused() -> None:
    reference = a_reference()
    exact = artifact(reference)

    def run(images: np.ndarray) -> Outputs:
        outputs = exact(images)
        return {**outputs, "embedding": outputs["embedding"] + np.float32(1e-3 * (len(images) == 3))}

    largest = np.abs(reference.outputs["embedding"]).max()
    report = verify(run, reference, gates=Gates.of("fp32"))
    assert report["batch_difference"] == pytest.approx(1e-3 / largest, rel=0.01)
    assert len(report["failures"]) == 1
    assert report["failures"][0].startswith("batch_difference")


def test_what_is_not_finite_has_its_own_reason_and_no_figures() -> None:
    reference = a_reference()

    def spoil(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[[3, 7], 0] = np.inf, np.nan
        return rows

    report = verify(artifact(reference, spoil), reference, gates=ALL)
    assert not report["passed"]
    assert report["failures"][0] == "embedding of 2 of 40 images holds NaN or infinity"
    assert report["cosine_min"] is None
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: {"embedding": x}, "output logits_kind is missing"),
        (lambda x: {"embedding": x, "logits_kind": x[:, :2]}, r"output logits_kind is \[40, 2\], wanted \[N, 3\]"),
        (lambda x: {"embedding": x[:, :4], "logits_kind": x[:, :3]}, r"output embedding is \[40, 4\]"),
    ],
)
def test_outputs_that_cannot_be_compared_are_named(outputs: Callable[[np.ndarray], Outputs], message: str) -> None:
    reference = a_reference()
    exact = artifact(reference)
    report = verify(lambda images: outputs(exact(images)["embedding"]), reference, gates=ALL)
    assert not report["passed"]
    assert re.search(message, report["failures"][0])


def test_a_head_that_loses_accuracy_is_refused() -> None:
    reference = a_reference(200)
    right = reference.outputs["logits_kind"].argmax(1)
    reference = replace(reference, labels=right, classes=CLASSES)

    def worse(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[:5, :3] = np.roll(rows[:5, :3], 1, axis=1)  # 5 of 200: 2.5 points
        return rows

    report = verify(artifact(reference, worse), reference, gates=Gates(accuracy_drop=1))
    assert report["heads"]["kind"] == {"agreement": 97.5, "accuracy": 97.5, "reference_accuracy": 100, "change": -2.5}
    assert report["failures"] == ["accuracy_drop 2.5, wanted at most 1"]
    assert verify(artifact(reference, worse), reference, gates=Gates(accuracy_drop=3))["passed"]


def test_an_artifact_that_happens_to_be_more_accurate_passes() -> None:
    reference = a_reference(200)
    answers = noisy(1.0)(reference.outputs["embedding"])[:, :3].argmax(1)
    reference = replace(reference, labels=answers, classes=CLASSES)
    report = verify(artifact(reference, noisy(1.0)), reference, gates=Gates(accuracy_drop=1))
    assert report["heads"]["kind"]["change"] > 5
    assert report["passed"]


def test_labels_are_matched_by_name_and_those_of_other_data_not_at_all() -> None:
    reference = a_reference()
    right = reference.outputs["logits_kind"].argmax(1)
    turned = replace(reference, labels=np.array([2, 1, 0])[right], classes=CLASSES[::-1])
    assert verify(artifact(turned), turned, gates=ALL)["heads"]["kind"]["accuracy"] == 100
    renamed = replace(reference, labels=right, classes=("x", "y", "z"))
    several = replace(reference, labels=np.ones((40, 3), np.int64), classes=CLASSES)
    for variant in (renamed, several, reference):
        report = verify(artifact(variant), variant, gates=ALL)
        assert report["heads"]["kind"]["accuracy"] is None
        assert report["accuracy_drop"] is None
        assert report["passed"]


# Gates


def test_gates_by_precision_may_be_changed() -> None:
    assert Gates.of("fp32").cosine_min == 0.99999
    assert Gates.of("fp16").cosine_min == 0.9995
    int8 = Gates.of("int8", ["overlap=0.7", "cosine_min=0.5"])
    assert (int8.overlap, int8.cosine_min, int8.centred_cosine_mean, int8.accuracy_drop) == (0.7, 0.5, 0.95, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine_mim=0.9", "unknown gate 'cosine_mim'; did you mean 'cosine_min'"),
        ("cosine_min", "has no number; give it as cosine_min=0.9"),
        ("cosine_min=high", "has no number"),
        ("overlap=nan", "must be a finite number"),
    ],
)
def test_a_gate_that_cannot_be_is_one_line(text: str, message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        Gates.of("fp32", [text])


# Real graphs, with planted faults


def patches(count: int) -> np.ndarray:
    images = open_images("sample:patches", "test")
    numbers = np.random.default_rng(0).permutation(len(images))[:count]
    return Preprocess.for_size(SIZE).batch(images.load(int(index)) for index in numbers)


def a_student(seed: int = 0) -> Student:
    """A ResNet with one block to a stage, whose batch norms have seen real images."""
    encoder, preprocess = ResNet(BasicBlock, [1, 1, 1, 1]), Preprocess.for_size(SIZE)
    encoder.fc = nn.Identity()
    generator = torch.Generator().manual_seed(seed)
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, generator=generator)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            part.momentum = None
    with torch.no_grad():
        encoder.train()(torch.from_numpy(preprocess.normalise(patches(64))))
    return Student(encoder, preprocess, dim=512, name="test", identity="0")


@dataclass(frozen=True)
class Exported:
    student: Student
    reference: Reference
    fp32: bytes
    fp16: bytes


@pytest.fixture(scope="module")
def export() -> Exported:
    torch.set_num_threads(1)
    student = a_student()
    fp32, fp16 = (to_onnx(student, precision=precision, metadata={"heads": "{}"}) for precision in ("fp32", "fp16"))
    return Exported(student, Reference.of(student, patches(64)), fp32, fp16)


def judge(export: Exported, model: bytes, precision: Any) -> Report:
    ready = emulate_half(model) if precision == "fp16" else model
    return verify(Session(ready, threads=1), export.reference, gates=Gates.of(precision))


def plant(content: bytes, change: Callable[[ModelProto], None]) -> bytes:
    model = ModelProto.FromString(content)
    change(model)
    return model.SerializeToString()


def scale(model: ModelProto, factors: Mapping[str, float]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in factors:
            values = numpy_helper.to_array(tensor)
            changed = values.astype(np.float32) * factors[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(changed.astype(values.dtype), tensor.name))


def wrong_mean(model: ModelProto) -> None:
    """CLIP's means in place of ImageNet's: they differ by less than 0.004."""
    name = next(node for node in model.graph.node if node.op_type == "Add").input[1]  # -mean / std
    tensor = next(candidate for candidate in model.graph.initializer if candidate.name == name)
    shift = -np.array([0.48145466, 0.4578275, 0.40821073], np.float32) / np.array([0.229, 0.224, 0.225], np.float32)
    assert np.abs(numpy_helper.to_array(tensor).ravel() - shift).max() < 0.02  # a small change indeed
    tensor.CopyFrom(numpy_helper.from_array(shift[:, None, None], name))


def swapped_channels(model: ModelProto) -> None:
    """BGR for RGB."""
    cast = model.graph.node[0]
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
    model.graph.node[1].input[0] = "swapped"
    model.graph.node.insert(1, helper.make_node("Gather", [cast.output[0], "order"], ["swapped"], axis=3))


def overflowing(model: ModelProto) -> None:
    """A layer scaled up and the next down by as much: the same function, but for what half precision can hold."""
    layer, after = "encoder.layer2.0.conv1", "encoder.layer2.0.conv2.weight"
    scale(model, {f"{layer}.weight": 1e4, f"{layer}.bias": 1e4, after: 1e-4})


def a_wrong_layer(model: ModelProto) -> None:
    scale(model, {"encoder.layer3.0.conv2.weight": 1.5})


@pytest.mark.slow
def test_what_is_exported_passes(export: Exported) -> None:
    assert judge(export, export.fp32, "fp32")["passed"]
    half = judge(export, export.fp16, "fp16")
    assert half["passed"]
    assert half["cosine_min"] < 0.9999999  # of half precision indeed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "change", "layer", "reason"),
    [
        ("fp32", wrong_mean, INPUT, "cosine_min"),
        ("fp16", wrong_mean, INPUT, "cosine_min"),
        ("fp32", swapped_channels, INPUT, "cosine_min"),
        ("fp32", a_wrong_layer, "layer3.0.conv2", "cosine_min"),
        ("fp16", overflowing, "layer2.0.conv1", "holds NaN or infinity"),
    ],
)
def test_a_planted_fault_is_refused_and_its_layer_named(
    export: Exported, precision: str, change: Callable[[ModelProto], None], layer: str, reason: str
) -> None:
    model = plant(getattr(export, precision), change)
    onnx.checker.check_model(model, full_check=True)
    report = judge(export, model, precision)
    assert not report["passed"]
    assert reason in report["failures"][0]
    drift = first_drift(model, export.student, export.reference.images)
    assert drift["layer"] == layer
    assert drift["before"] < 1e-2
    assert drift["error"] is None or drift["error"] > 5e-3
    json.dumps(drift, allow_nan=False)


def test_in_float32_the_overflow_is_none(export: Exported) -> None:
    assert judge(export, plant(export.fp32, overflowing), "fp32")["passed"]


@pytest.mark.slow
def test_a_file_of_other_weights_drifts_from_the_first_layer_on(export: Exported) -> None:
    reference = Reference.of(a_student(seed=1), export.reference.images)
    assert not verify(Session(export.fp32, threads=1), reference, gates=Gates.of("int8"))["passed"]
    assert first_drift(export.fp32, a_student(seed=1), reference.images)["layer"] == "conv1"


def test_layers_of_a_good_file_hardly_differ(export: Exported) -> None:
    names = [name for name, part in export.student.encoder.named_modules() if isinstance(part, nn.Conv2d)]
    for model, largest in ((export.fp32, 1e-5), (export.fp16, 1e-2)):
        layers = first_drift(model, export.student, export.reference.images)["layers"]
        assert set(layers) == {INPUT, *names, "embedding"}
        assert max(layers.values()) < largest


def test_the_reference_is_torch_and_heads_are_on_its_embedding(export: Exported) -> None:
    images, random = export.reference.images[:20], np.random.default_rng(0)
    weight, bias = random.normal(size=(3, 512)).astype(np.float32), np.array([1, 2, 3], np.float32)
    head = Head(name="kind", weight=weight, bias=bias, classes=CLASSES, metrics={})
    reference = Reference.of(export.student, images, [head])
    wanted = export.student.embed(images).numpy()
    np.testing.assert_allclose(reference.outputs["embedding"], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reference.outputs["logits_kind"], wanted @ weight.T + bias, rtol=1e-4, atol=1e-4)
    assert reference.heads == {"kind": CLASSES}


def test_a_student_that_gives_all_images_the_same_embedding_is_refused() -> None:
    student = a_student()
    for part in student.encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.zeros_(part.weight)
    with pytest.raises(MvmrError, match="embeddings are all the same"):
        Reference.of(student, patches(20))
