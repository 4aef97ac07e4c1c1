"""The student embeds whatever an image comes as, and row i depends on image i alone."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from mvmr.bundles import bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.models.student import Student, save_student
from mvmr.models.torchvision_resnet import Resnet
from mvmr.representations import Representation
from tests.making import build_encoder

CONFIG = Resnet(name="resnet18", small_kernel=True)
PREPROCESS = Preprocess(resize=20, crop=16, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    encoder = CONFIG.build()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics and blocks that are not the trivial ones
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return encoder


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, encoder: nn.Module) -> bundle.Bundle:
    root = tmp_path_factory.mktemp("student")
    bundle.write(
        root / "b.partial",
        backbone=CONFIG.name,
        options=CONFIG.options,
        embedding_dim=512,
        preprocessing=PREPROCESS,
        training={"method": "self-supervised MV-MR", "teachers": {}, "recipe": {"train": {"betas": (0.9, 0.99)}}},
        encoder_state=encoder.state_dict(),
        projector_state=nn.Linear(512, 4, bias=False).state_dict(),
    )
    bundle.publish(root / "b.partial", root / "b")
    return bundle.load(root / "b")


@pytest.fixture(scope="module")
def student(sample: bundle.Bundle) -> Student:
    return sample.student()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (24 + i, 30, 3), dtype=np.uint8)) for i in range(5)]


def test_bundle_holds_the_encoder_as_it_was_trained(sample, encoder):
    state = sample.student().encoder.state_dict()
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())
    assert sample.manifest.training["recipe"] == {"train": {"betas": [0.9, 0.99]}}
    assert "projector.safetensors" in sample.manifest.files


def test_every_file_may_be_read_by_whom_the_umask_allows(sample):
    """safetensors writes files for their owner alone; a service runs as another user."""
    assert len({file.stat().st_mode for file in sample.path.iterdir() if file.is_file()}) == 1


def test_embedding_is_preprocess_normalise_encode(student, encoder, pictures):
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(PREPROCESS.normalise(PREPROCESS.batch(pictures))))
    features = student.embed(pictures)
    assert features.shape == (5, 512)
    assert features.dtype == torch.float32
    assert features.std() > 0
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


def test_files_arrays_and_pictures_embed_alike(student, pictures, tmp_path):
    same_size = [picture.crop((0, 0, 30, 24)) for picture in pictures]
    paths = [tmp_path / f"{i}.png" for i in range(len(same_size))]
    for picture, path in zip(same_size, paths, strict=True):
        picture.save(path)
    expected = student.embed(same_size)
    assert torch.equal(student.embed(paths), expected)
    assert torch.equal(student.embed([str(path) for path in paths]), expected)
    assert torch.equal(student.embed(np.stack([np.asarray(picture) for picture in same_size])), expected)


def test_a_row_depends_on_its_image_alone(student, pictures):
    together = student.embed(pictures)
    alone = torch.cat([student.embed([picture]) for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.embed(pictures, batch_size=2), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["jpg", "tiff", "png", "webp"])
def test_a_turned_photograph_is_embedded_upright(suffix, student, pictures, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[0].save(tmp_path / f"turned.{suffix}", exif=exif)
    with Image.open(tmp_path / f"turned.{suffix}") as stored:
        upright = ImageOps.exif_transpose(stored)
    assert upright.size == (24, 30)
    assert torch.equal(student.embed([tmp_path / f"turned.{suffix}"]), student.embed([upright]))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "I;16"])
def test_any_mode_is_embedded(mode, student, pictures):
    picture = pictures[0].convert("L").convert("I;16") if mode == "I;16" else pictures[0].convert(mode)
    assert student.embed([picture]).isfinite().all()


def test_no_images_give_no_rows(student):
    assert student.embed([]).shape == (0, 512)
    assert student.embed(np.empty((0, 9, 9, 3), np.uint8)).shape == (0, 512)


def test_features_can_be_trained_on(student, pictures):
    """A user's own head needs gradients through it, which tensors of inference mode would refuse."""
    head = nn.Linear(512, 2)
    head(student.embed(pictures)).sum().backward()
    assert head.weight.grad is not None


def test_embedding_survives_somebody_training_the_encoder(student, pictures):
    before = student.embed(pictures)
    student.encoder.train()
    assert torch.equal(student.embed(pictures), before)


def test_student_is_a_representation_like_any_other(sample, student, pictures):
    as_one: Representation = student
    rows = as_one(torch.stack([as_one.prepare(picture) for picture in pictures]))
    assert torch.equal(rows, student.embed(pictures))
    assert as_one.identity == sample.space_id
    assert int(as_one.identity, 16)
    assert as_one.prepare(pictures[0]).shape == (3, 16, 16)
    assert as_one.prepare(pictures[0]).dtype == torch.uint8


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"this one is float32 \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"this one is uint8 \[8, 8, 3\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"this one is uint8 \[2, 3, 8, 8\]"),
        ("one.jpg", "put the one into a list"),
        (Image.new("RGB", (8, 8)), "put the one into a list"),
        ([None], "image number 0"),
        (["none.jpg"], r"cannot read image none\.jpg: No such file"),
    ],
)
def test_what_is_not_images_is_refused(images, text, student):
    with pytest.raises(MvmrError, match=text) as caught:
        student.embed(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", "cut"])
def test_a_broken_file_is_named(content, student, pictures, tmp_path):
    path: Path = tmp_path / "broken.jpg"
    if content == "cut":
        pictures[0].save(path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(MvmrError, match=r"cannot read image .*broken\.jpg"):
        student.embed([pictures[0], path])
    if content.startswith(b"\xff"):
        with Image.open(path) as file, pytest.raises(MvmrError, match="image number 1"):
            student.embed([pictures[0], file])


def test_the_lines_of_the_model_card_work(sample, student, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(sample.path.parent)
    for name in ("one.jpg", "two.jpg"):
        pictures[0].save(tmp_path / name, quality=100)
    card = (sample.path / "README.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(
            block.replace('"one.jpg", "two.jpg"', ", ".join(repr(str(tmp_path / n)) for n in ("one.jpg",) * 2)),
            names,
        )
    assert names["features"].shape == (2, 512)
    batch = torch.from_numpy(PREPROCESS.normalise(PREPROCESS.batch(pictures)))
    with torch.no_grad():
        assert torch.equal(names["backbone"].eval()(batch), student.embed(pictures))
    assert sample.space_id in card
    assert "self-supervised" in card


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(device, sample):
    with pytest.raises(MvmrError, match="cannot use device") as caught:
        sample.student(device)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_named(sample, tmp_path):
    import json
    import shutil

    shutil.copytree(sample.path, tmp_path / "b")
    content = json.loads((tmp_path / "b/bundle.json").read_text())
    (tmp_path / "b/bundle.json").write_text(json.dumps(content | {"options": {"small_kernel": False}}))
    with pytest.raises(MvmrError, match=r"conv1\.weight \[64, 3, 3, 3\] instead of \[64, 3, 7, 7\]"):
        bundle.load(tmp_path / "b").student()
    (tmp_path / "b/bundle.json").write_text(json.dumps(content | {"backbone": "resnet101"}))
    with pytest.raises(MvmrError, match="unknown student 'resnet101'"):
        bundle.load(tmp_path / "b").student()


def test_weights_that_do_not_fit_are_never_written(tmp_path):
    of_another, broken = build_encoder(Resnet(name="resnet50")), build_encoder(CONFIG)
    torch.nn.init.constant_(broken.bn1.bias, float("inf"))
    for wrong in (of_another, torch.nn.Sequential(build_encoder(CONFIG)), broken):
        with pytest.raises(MvmrError, match=r"does not fit|not finite"):
            save_student(tmp_path / "b.partial", wrong, CONFIG, preprocess=PREPROCESS, training={})
    assert not (tmp_path / "b.partial").exists()


def test_half_precision_channels_last_weights_are_stored_as_plain_float32(tmp_path, encoder):
    state = {key: value.half() if value.is_floating_point() else value for key, value in encoder.state_dict().items()}
    state["conv1.weight"] = state["conv1.weight"].to(memory_format=torch.channels_last)
    sample = bundle.write(
        tmp_path / "b",
        backbone="resnet18",
        options={"small_kernel": True},
        embedding_dim=512,
        preprocessing=PREPROCESS,
        training={},
        encoder_state=state,
    )
    weight = sample.student().encoder.state_dict()["conv1.weight"]
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, encoder.state_dict()["conv1.weight"], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_gpu_embeds_as_the_cpu_does(sample, student, pictures):
    features = sample.student("cuda").embed(pictures)
    assert features.device.type == "cpu"
    torch.testing.assert_close(features, student.embed(pictures), rtol=1e-2, atol=1e-2)
