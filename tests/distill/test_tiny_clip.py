"""The stand-in teacher: a real CLIP in miniature, saved so that the code for real ones loads it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file

import mvmr
from mvmr.data.image_set import Arrays, ImageSet, numbered_names
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.tiny_clip import TEMPLATES, TinyClip, augment, train_tiny_clip
from mvmr.errors import MvmrError
from mvmr.representations.cache import represent

VERY_TINY = TinyClip(
    image_size=32, width=8, head_width=32, embed_dim=16, text_width=16, steps=6, batch_size=12, warmup=2, lr=3e-3
)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230)}


def coloured(count: int = 8) -> ImageSet:
    """Noisy squares of three colours, whose names are their classes."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), count)
    noise = generator.integers(-30, 30, (len(labels), 32, 32, 3))
    pixels = np.clip(np.array(list(COLOURS.values()))[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
    return ImageSet(
        name="squares",
        split="train",
        source=Arrays(pixels, numbered_names("train", len(pixels))),
        fingerprint="c" * 64,
        read_labels=lambda: labels,
        classes=tuple(COLOURS),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(1, 1, 1, 1), (2,)], ids=["resnet", "vit"])
def test_it_is_an_open_clip_model_in_hub_format(tmp_path: Path, layers: tuple[int, ...]) -> None:
    config = replace(VERY_TINY, layers=layers, width=32, steps=2)
    images = coloured()
    out = train_tiny_clip(images, tmp_path / "runs" / "teacher", config=config)
    assert out == tmp_path / "runs" / "teacher"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    assert isinstance(model, CLIP)
    teacher = ClipTeacher.load(out)
    prepared = torch.stack([teacher.prepare(images.load(i)) for i in range(4)])
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([preprocess(images.load(i)) for i in range(4)]))
    assert torch.equal(teacher(prepared), expected)
    assert teacher.dim == 16
    assert not list((tmp_path / "runs").glob(".*"))  # nothing of the temporary folder stays


@pytest.mark.slow
def test_it_learns_what_its_captions_say(tmp_path: Path) -> None:
    images = coloured()
    teacher = ClipTeacher.load(
        train_tiny_clip(images, tmp_path / "teacher", config=replace(VERY_TINY, steps=60)), text=True
    )
    embeddings = F.normalize(torch.from_numpy(np.array(represent(images, teacher))), dim=-1)
    predicted = (embeddings @ teacher.zero_shot_classifier(images.classes or (), TEMPLATES)).argmax(1)
    assert (predicted.numpy() == images.labels).mean() > 0.9


@pytest.mark.slow
def test_one_seed_gives_one_model_and_leaves_the_global_random_state(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = weights(train_tiny_clip(coloured(), tmp_path / "a", config=VERY_TINY, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second = weights(train_tiny_clip(coloured(), tmp_path / "b", config=VERY_TINY, seed=1))
    reseeded = weights(train_tiny_clip(coloured(), tmp_path / "c", config=VERY_TINY, seed=2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["visual.conv1.weight"], reseeded["visual.conv1.weight"])


def test_the_same_model_is_not_trained_again_and_another_not_overwritten(tmp_path: Path) -> None:
    out = train_tiny_clip(coloured(), tmp_path / "teacher", config=VERY_TINY)
    written = (out / "open_clip_model.safetensors").stat().st_mtime_ns
    train_tiny_clip(coloured(), out, config=VERY_TINY)
    assert (out / "open_clip_model.safetensors").stat().st_mtime_ns == written
    for seed, config, images in [
        (1, VERY_TINY, coloured()),
        (0, replace(VERY_TINY, steps=7), coloured()),
        (0, VERY_TINY, replace(coloured(), fingerprint="d" * 64)),
    ]:
        with pytest.raises(MvmrError, match="holds something else than this tiny CLIP"):
            train_tiny_clip(images, out, config=config, seed=seed)
    assert json.loads((out / "tiny_clip.json").read_text())["data"] == "squares"
    (tmp_path / "empty").mkdir()
    train_tiny_clip(coloured(), tmp_path / "empty", config=replace(VERY_TINY, steps=1))


def test_an_interrupted_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mvmr.distillation.teachers.tiny_clip.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tiny_clip(coloured(), tmp_path / "teacher", config=replace(VERY_TINY, steps=1))
    assert not list(tmp_path.iterdir())


def test_images_without_class_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="squares has no class names"):
        train_tiny_clip(replace(coloured(), classes=None, read_labels=None), tmp_path / "teacher")
    with pytest.raises(MvmrError, match=r"holds 1 image\(s\)"):
        train_tiny_clip(coloured().subset([0]), tmp_path / "teacher")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(MvmrError, match="one number"):
        TinyClip(layers=(1, 2))
    with pytest.raises(MvmrError, match="steps >= 1"):
        TinyClip(steps=0)


def test_augmentation_keeps_shape_and_range_and_is_independent_per_image() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = augment(image.expand(6, -1, -1, -1), VERY_TINY, torch.Generator().manual_seed(1))
    assert views.shape == (6, 3, 16, 16)
    assert views.min() >= 0
    assert views.max() <= 1
    assert len({tuple(view.flatten().tolist()) for view in views}) == 6
    second = augment(image.expand(6, -1, -1, -1), VERY_TINY, torch.Generator().manual_seed(1))
    assert torch.equal(views, second)


def test_without_crop_and_jitter_only_the_flip_is_left() -> None:
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = augment(images, replace(VERY_TINY, crop=1.0, jitter=0.0, aspect=1.0), torch.Generator().manual_seed(1))
    flipped = torch.isclose(views, images.flip(3), atol=1e-5).flatten(1).all(1)
    same = torch.isclose(views, images, atol=1e-5).flatten(1).all(1)
    assert (flipped | same).all()
    assert flipped.any()
    assert same.any()


@pytest.mark.slow
def test_half_as_wide_as_the_quickstarts_it_is_a_good_teacher(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    train, test = mvmr.open_images("sample:patches", "train"), mvmr.open_images("sample:patches", "test")
    teacher = ClipTeacher.load(train_tiny_clip(train, tmp_path / "teacher", config=TinyClip(width=16)), text=True)
    fitted, held = np.array(represent(train, teacher)), np.array(represent(test, teacher))
    mean, scale = fitted.mean(0), (fitted.std(0) + 1e-6) * teacher.dim**0.5
    probe = LogisticRegression(max_iter=300).fit((fitted - mean) / scale, train.labels)
    assert probe.score((held - mean) / scale, test.labels) > 0.72
    columns = teacher.zero_shot_classifier(train.classes or (), TEMPLATES).numpy()
    assert ((held @ columns).argmax(1) == test.labels).mean() > 0.65
