"""Zero-shot is open_clip's for the teacher; the student's goes through its map, in a bundle or out of it."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.numpy import save
from safetensors.torch import save_file
from torch.nn.functional import interpolate, normalize

from mvmr.bundles import bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.tiny_clip import TEMPLATES
from mvmr.distillation.zeroshot import (
    IMAGENET_TEMPLATES,
    fit_space_map,
    read_map,
    store_map,
    templates_for,
    zero_shot_logits,
)
from mvmr.models.torchvision_resnet import Resnet
from tests.distill.maps import WIDTH, a_map, refusal
from tests.making import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
SMALL: dict[str, Any] = {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}
CLASSES = ["cat", "coffee cup", "hubble deep field", "page", "tissue", "rocket", "moon"]


def write_teacher(folder: Path, seed: int = 4) -> CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**deepcopy(SMALL)).eval()
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("teachers") / "small clip"
    write_teacher(target)
    return target


@pytest.fixture(scope="module")
def teacher(folder: Path) -> ClipTeacher:
    return ClipTeacher.load(folder, text=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Shapes: [200, 3, 32, 32], normalised; tinted noise, which a net that has not learnt tells apart."""
    generator = torch.Generator().manual_seed(0)
    sizes = {1: 2.0, 4: 1.0, 32: 0.25}
    parts = [scale * torch.randn(200, 3, size, size, generator=generator) for size, scale in sizes.items()]
    return sum((interpolate(part, 32) for part in parts), torch.zeros(()))


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    training = {"method": "distillation", "teachers": {}}
    backbone = Resnet(name="resnet18_025", small_kernel=True)
    return write_bundle(out, backbone=backbone, preprocess=Preprocess.for_size(32), training=training).path


# Templates


def test_the_templates_are_open_clips() -> None:
    assert len(IMAGENET_TEMPLATES) == 80
    for ours, theirs in zip(IMAGENET_TEMPLATES, open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert ours.format("coffee cup") == theirs("coffee cup")


def test_a_tiny_clip_gets_the_templates_of_its_training(tmp_path: Path, teacher: ClipTeacher) -> None:
    assert templates_for(teacher) == IMAGENET_TEMPLATES
    write_teacher(tmp_path / "tiny")
    (tmp_path / "tiny" / "tiny_clip.json").write_text("{}")
    assert templates_for(ClipTeacher.load(tmp_path / "tiny")) == TEMPLATES


# Zero-shot


def test_teacher_zero_shot_is_open_clips_bit_for_bit(folder: Path, teacher: ClipTeacher, images: torch.Tensor) -> None:
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, open_clip.OPENAI_IMAGENET_TEMPLATES)
    with torch.no_grad():
        expected = model.encode_image(images, normalize=True) @ classifier
    columns = teacher.zero_shot_classifier(CLASSES, templates_for(teacher))
    raw = teacher(images)
    logits = zero_shot_logits(raw, columns)
    assert np.array_equal(logits, expected.numpy())
    assert np.array_equal(logits.argmax(1), (100 * expected).argmax(1))
    assert len(set(logits.argmax(1))) > 1
    assert logits.dtype == np.float32
    copy = raw.numpy()
    copy.flags.writeable = False  # as the rows of the cache are
    assert np.array_equal(zero_shot_logits(copy, columns.numpy()), logits)


def test_logits_are_cosines() -> None:
    rng = np.random.default_rng(0)
    embeddings, columns = rng.normal(size=(9, 5)), rng.normal(size=(5, 3))
    columns /= np.linalg.norm(columns, axis=0)
    expected = embeddings @ columns / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(zero_shot_logits(embeddings, columns), expected, rtol=0, atol=1e-6)
    assert zero_shot_logits(embeddings[:0], columns).shape == (0, 3)
    assert "5 wide and class columns of length 3 do not fit" in refusal(zero_shot_logits, embeddings, columns.T)
    embeddings[4, 1] = np.nan
    assert "embeddings: row 4 holds NaN" in refusal(zero_shot_logits, embeddings, columns)


@pytest.mark.parametrize("width", [40, 300], ids=["N > D", "N < D"])
def test_an_affine_image_of_the_teacher_predicts_as_the_teacher_does(
    teacher: ClipTeacher, images: torch.Tensor, width: int
) -> None:
    rng = np.random.default_rng(0)
    embeddings = teacher(images)
    unit = normalize(embeddings, dim=-1).numpy()
    student = (unit @ rng.normal(size=(12, width)) + rng.normal(size=width)).astype(np.float32)
    space_map = fit_space_map(student[:150], embeddings[:150])
    columns = teacher.zero_shot_classifier(CLASSES, TEMPLATES)
    predicted = zero_shot_logits(space_map(student), columns).argmax(1)
    assert np.array_equal(predicted, zero_shot_logits(embeddings, columns).argmax(1))
    assert len(set(predicted)) > 1
    assert space_map.r2 > 0.999


def test_shuffled_embeddings_explain_nothing_and_predict_by_chance() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 10
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:, :10]  # unit columns, at right angles
    embeddings = centres.T[labels] + 0.1 * rng.normal(size=(600, 16))
    student = embeddings @ rng.normal(size=(16, 24)) + 0.1 * rng.normal(size=(600, 24)) + 3

    def measure(targets: np.ndarray) -> tuple[float, float]:
        space_map = fit_space_map(student[:400], targets[:400])
        predicted = zero_shot_logits(space_map(student[400:]), centres).argmax(1)
        return space_map.r2, float((predicted == labels[400:]).mean())

    r2, accuracy = measure(embeddings)
    assert r2 > 0.8
    assert accuracy > 0.99
    r2, accuracy = measure(rng.permutation(embeddings))
    assert -0.1 < r2 < 0.05
    assert accuracy < 0.25


def test_a_text_finds_its_images(teacher: ClipTeacher, images: torch.Tensor) -> None:
    """The recipe of the module's docstring: one class, one template, rows by cosine."""
    rng = np.random.default_rng(0)
    student = normalize(teacher(images), dim=-1).numpy() @ rng.normal(size=(12, 30))
    space_map = fit_space_map(student, teacher(images))
    query = teacher.zero_shot_classifier(["a cat on a rocket"], ["{}"])
    cosines = zero_shot_logits(space_map(student), query)[:, 0]
    expected = zero_shot_logits(teacher(images), query)[:, 0]
    assert cosines.argmax() == expected.argmax()
    np.testing.assert_allclose(cosines, expected, rtol=0, atol=0.01)


# In a bundle


def test_store_and_read_round_trip(bundle_path: Path, teacher: ClipTeacher, tmp_path: Path) -> None:
    opened = bundle.load(bundle_path)
    stored = store_map(opened, a_map(), teacher)
    assert {name for name in stored.manifest.files if name.startswith("maps/")} == {
        "maps/small-clip/map.safetensors",
        "maps/small-clip/map.json",
    }
    assert stored.space_id == opened.space_id
    for reread in (stored, bundle.load(bundle_path)):
        for by in (teacher, "small clip"):
            space_map, record = read_map(reread, by)
            assert np.array_equal(space_map.weight, a_map().weight)
            assert np.array_equal(space_map.bias, a_map().bias)
            assert (space_map.strength, space_map.r2) == (record["strength"], record["r2"]) == (0.1, 0.5)
            assert record["teacher"] == {
                "name": "small clip",
                "weights": teacher.weights,
                "identity": teacher.identity,
            }
            assert record["space_id"] == opened.space_id
    assert np.array_equal(
        read_map(store_map(stored, a_map(value=2), teacher), teacher)[0].weight, a_map(value=2).weight
    )


def test_a_map_of_another_width_is_not_stored(bundle_path: Path, teacher: ClipTeacher) -> None:
    opened = bundle.load(bundle_path)
    assert "the map takes 8 features" in refusal(store_map, opened, a_map(inputs=8), teacher)
    assert "gives 11 values but embeddings of small clip are 12 wide" in refusal(store_map, opened, a_map(11), teacher)


def test_an_unknown_map_names_those_there_are(bundle_path: Path, teacher: ClipTeacher) -> None:
    stored = store_map(bundle.load(bundle_path), a_map(), teacher)
    message = refusal(read_map, stored, "small clap")
    assert "unknown map to teacher 'small clap'; did you mean 'small-clip'?" in message
    assert str(bundle_path) in message


def test_another_teacher_of_the_same_name_is_refused(bundle_path: Path, teacher: ClipTeacher, tmp_path: Path) -> None:
    stored = store_map(bundle.load(bundle_path), a_map(), teacher)
    write_teacher(tmp_path / "small clip", seed=1)
    stranger = ClipTeacher.load(tmp_path / "small clip")
    message = refusal(read_map, stored, stranger)
    assert f"was fitted to small clip ({teacher.weights}), not to {stranger.weights}" in message


@pytest.mark.parametrize("name", ["map.safetensors", "map.json"])
def test_a_damaged_or_missing_file_is_named(bundle_path: Path, teacher: ClipTeacher, name: str) -> None:
    stored = store_map(bundle.load(bundle_path), a_map(), teacher)
    file = bundle_path / "maps" / "small-clip" / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert f"damaged: maps/small-clip/{name} has changed" in refusal(read_map, stored, teacher)
    file.unlink()
    assert f"damaged: maps/small-clip/{name} is missing" in refusal(read_map, stored, teacher)
    store_map(stored, a_map(), teacher)  # mends it
    assert read_map(bundle.load(bundle_path), teacher)[0].r2 == 0.5


def test_files_that_are_listed_but_hold_something_else(bundle_path: Path, teacher: ClipTeacher) -> None:
    stored = store_map(bundle.load(bundle_path), a_map(), teacher)
    names = "maps/small-clip/map.safetensors", "maps/small-clip/map.json"
    good = {name: stored.file(name).read_bytes() for name in names}
    record = json.loads(good[names[1]])

    def told(**changes: bytes) -> str:
        contents = good | {names[0 if key == "weights" else 1]: value for key, value in changes.items()}
        return refusal(read_map, bundle.add_files(stored, contents), teacher)

    def array(outputs: int, inputs: int) -> bytes:
        return save({"weight": np.ones((outputs, inputs), np.float32), "bias": np.ones(12, np.float32)})

    assert "is not a whole safetensors file" in told(weights=b"nonsense")
    assert "has no floating-point 'weight' but other" in told(weights=save({"other": np.ones(3)}))
    assert "has no floating-point 'bias' but int32" in told(
        weights=save({"weight": np.ones((12, WIDTH), np.float32), "bias": np.ones(12, np.int32)})
    )
    assert f"weight [11, {WIDTH}] and bias [12] make no map" in told(weights=array(11, WIDTH))
    assert "the map takes 8 features but the features of" in told(weights=array(12, 8))
    assert "map.json is not the description of a map: Expecting property name" in told(record=b"{")
    assert "map.json is not the description of a map: it holds no JSON object" in told(record=b"[]")
    assert "does not describe a map (KeyError" in told(record=b"{}")
    assert "fit the map on this bundle" in told(record=json.dumps(record | {"space_id": "0" * 32}).encode())
    assert "NaN is not JSON" in told(record=json.dumps(record | {"r2": float("nan")}).encode())


def test_a_real_student_through_its_bundle(bundle_path: Path, teacher: ClipTeacher, images: torch.Tensor) -> None:
    """Student features of images, map, bundle, and out again: predictions are those before it was stored."""
    opened = bundle.load(bundle_path)
    pictures = (images[:40] * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    features = opened.student().embed(pictures)
    fitted = fit_space_map(features, teacher(images[:40]))
    stored = store_map(opened, fitted, teacher)
    columns = teacher.zero_shot_classifier(CLASSES, TEMPLATES)
    reread, _ = read_map(stored, teacher)
    assert np.array_equal(zero_shot_logits(reread(features), columns), zero_shot_logits(fitted(features), columns))
