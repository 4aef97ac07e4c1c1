"""The samples: the right images, nothing shared between the splits, the same on every machine."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from mvmr.data import open_images
from mvmr.data.samples import PHOTOGRAPHS, _photograph, _photograph_folder
from mvmr.errors import MvmrError


def pixels(name: str, split: str) -> np.ndarray:
    images = open_images(name, "test" if split == "test" else "train")
    return np.stack([np.asarray(images.load(i)) for i in range(len(images))])


def test_patches_have_their_shape_and_classes() -> None:
    for split, per_class in (("train", 80), ("test", 40)):
        images = open_images("sample:patches", "test" if split == "test" else "train")
        assert len(images) == 17 * per_class
        assert images.native_size == 64
        assert images.load(0).size == (64, 64)
        assert images.load(0).mode == "RGB"
        assert images.classes is not None
        assert len(set(images.classes)) == 17
        assert images.labels is not None
        assert images.labels.dtype == np.int64
        assert np.bincount(images.labels).tolist() == [per_class] * 17
        assert images.keys[0] == f"{split}/00000"


@pytest.mark.parametrize("split", ["train", "test"])
def test_patches_lie_wholly_in_their_part_of_the_photograph(split: str) -> None:
    patches = pixels("sample:patches", split)
    per_class = 80 if split == "train" else 40
    for number, file in enumerate(PHOTOGRAPHS):
        photograph = _photograph(_photograph_folder() / file)
        width = photograph.shape[1]
        part = photograph[:, : int(0.6 * width)] if split == "train" else photograph[:, -int(0.35 * width) :]
        windows = np.lib.stride_tricks.sliding_window_view(part[..., 0], (64, 64))
        corners = windows[:, :, 0, 0], windows[:, :, 31, 17], windows[:, :, 63, 63]
        for patch in patches[number * per_class : number * per_class + 5]:
            marks = patch[0, 0, 0], patch[31, 17, 0], patch[63, 63, 0]
            positions = np.argwhere(np.logical_and.reduce([c == m for c, m in zip(corners, marks, strict=True)]))
            assert any(np.array_equal(part[y : y + 64, x : x + 64], patch) for y, x in positions), file


def test_samples_never_change() -> None:
    """A change here makes every published figure incomparable: don't."""
    # JPEG photographs left out: decoders may differ in the last bit
    lossless = np.array([file.endswith(".png") for file in PHOTOGRAPHS])
    prints = {}
    for split in ("train", "test"):
        patches = pixels("sample:patches", split)
        pixels_without_loss = patches.reshape(17, -1, 64, 64, 3)[lossless]
        prints[f"patches {split}"] = hashlib.sha256(pixels_without_loss.tobytes()).hexdigest()[:16]
        prints[f"digits {split}"] = hashlib.sha256(pixels("sample:digits", split).tobytes()).hexdigest()[:16]
    assert prints == {
        "patches train": "64f0cbd4428e4029",
        "patches test": "5bdb836a4cf0fa4c",
        "digits train": "982291c962365b1e",
        "digits test": "8c03afe13c981ef6",
    }


def test_digits_are_split_with_equal_shares() -> None:
    train, test = open_images("sample:digits"), open_images("sample:digits", "test")
    assert (len(train), len(test)) == (1200, 597)
    assert train.classes == tuple("0123456789")
    assert train.load(0).size == (32, 32)
    assert train.labels is not None
    assert test.labels is not None
    shares = np.bincount(train.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert np.abs(shares - 1200 / 1797).max() < 0.005


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    wanted = sorted(
        (int(number), np.asarray(Image.fromarray(np.rint(image.reshape(8, 8) * 255 / 16).astype(np.uint8)).resize(
            (32, 32), Image.Resampling.BILINEAR)).tobytes())
        for image, number in zip(images, numbers, strict=True)
    )  # fmt: skip
    ours = []
    for split in ("train", "test"):
        part = open_images("sample:digits", "test" if split == "test" else "train")
        assert part.labels is not None
        ours += [(int(part.labels[i]), np.asarray(part.load(i))[..., 0].tobytes()) for i in range(len(part))]
    assert sorted(ours) == wanted


@pytest.mark.parametrize("name", ["sample:patches", "sample:digits"])
def test_unlabelled_is_the_training_split_without_labels(name: str) -> None:
    train, unlabelled, test = open_images(name), open_images(name, "unlabelled"), open_images(name, "test")
    assert unlabelled.labels is None
    assert unlabelled.classes is None
    assert unlabelled.fingerprint == train.fingerprint != test.fingerprint
    assert unlabelled.load(7).tobytes() == train.load(7).tobytes()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MvmrError, match=r"scikit-image.*pip install 'mvmr\[train\]'"):
        open_images("sample:patches")
