"""Preprocessing equals torchvision's, byte for byte, and every image mode becomes RGB with the right brightness."""

import io
import json
import subprocess
import sys
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mvmr.bundles.preprocess import Preprocess, to_rgb
from mvmr.data import open_images
from mvmr.errors import MvmrError

BICUBIC, BILINEAR = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR


@lru_cache(maxsize=1)
def patch() -> Image.Image:
    return open_images("sample:patches").load(1)


def photograph(width: int, height: int) -> Image.Image:
    return patch().resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "size", [(64, 64), (65, 64), (64, 97), (100, 75), (333, 251), (251, 333), (31, 40), (640, 97), (1, 7), (7, 500)]
)
@pytest.mark.parametrize(("resize", "crop"), [(64, 64), (73, 64), (256, 224), (37, 32), (37, 31), (96, 1)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_image_equals_torchvision_bit_for_bit(
    size: tuple[int, int], resize: int, crop: int, interpolation: str
) -> None:
    image = photograph(*size)
    mode = BICUBIC if interpolation == "bicubic" else BILINEAR
    reference = transforms.Compose([transforms.Resize(resize, interpolation=mode), transforms.CenterCrop(crop)])(image)
    ours = Preprocess.from_dict(
        Preprocess(resize=resize, crop=crop).to_dict() | {"interpolation": interpolation}
    ).image(image)
    assert ours.shape == (crop, crop, 3)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, np.asarray(reference))


def test_normalise_equals_torchvision_bit_for_bit() -> None:
    preprocess = Preprocess.for_size(64)
    images = [photograph(64, 64), photograph(64, 80)]
    normalise = transforms.Normalize(preprocess.mean, preprocess.std)
    reference = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor(), normalise])
    ours = preprocess.normalise(preprocess.batch(images))
    assert ours.dtype == np.float32
    assert ours.flags["C_CONTIGUOUS"]
    assert torch.equal(torch.from_numpy(ours), torch.stack([reference(image) for image in images]))


def test_an_empty_batch_has_its_shape() -> None:
    assert Preprocess.for_size(32).batch([]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(("size", "resize"), [(32, 32), (64, 64), (127, 127), (128, 146), (224, 256)])
def test_for_size_has_a_margin_from_128_pixels_on(size: int, resize: int) -> None:
    preprocess = Preprocess.for_size(size)
    assert (preprocess.resize, preprocess.crop) == (resize, size)


def test_round_trip_through_json() -> None:
    preprocess = Preprocess(resize=70, crop=64, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 2.0))
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop": 65}, "crop = 65"),
        ({"crop": 0}, "crop = 0"),
        ({"crop": 63.5}, "63.5"),
        ({"crop": True}, "True"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": "0.5"}, "mean"),
        ({"std": [1, 0, 1]}, "std > 0"),
        ({"men": [0, 0, 0]}, "did you mean 'mean'"),
    ],
)
def test_wrong_values_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(MvmrError) as raised:
        Preprocess.from_dict(Preprocess.for_size(64).to_dict() | change)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(MvmrError, match="lacks std"):
        Preprocess.from_dict({k: v for k, v in Preprocess.for_size(64).to_dict().items() if k != "std"})


def store(image: Image.Image, file_format: str, **options: object) -> Image.Image:
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return Image.open(io.BytesIO(data.getvalue()))


def test_16_bit_values_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16).repeat(2, axis=0)
    for image in (store(Image.fromarray(values), "PNG"), store(Image.fromarray(values), "TIFF")):
        assert image.mode.startswith("I")
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[-5, 2**30]], np.int32), [0, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[0, 500, 1000]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, 1]], np.float32), [0, 0, 255]),
    ],
)
def test_wide_values_are_scaled(values: np.ndarray, expected: list[int]) -> None:
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (5, 4))
    assert to_rgb(image).mode == "RGB"


def test_an_rgb_image_is_not_copied() -> None:
    image = photograph(8, 8)
    assert to_rgb(image) is image


def test_a_palette_with_transparency_does_not_warn() -> None:
    image = photograph(16, 16).convert("P")
    again = store(image, "PNG", transparency=bytes(range(256)))
    assert again.mode == "P"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(to_rgb(again, None)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((6, 10, 3), np.uint8)
    upright[:3, :5] = 255
    turn = {2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: lambda a: a.swapaxes(0, 1)}
    turn |= {6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, -1)}
    laid = np.ascontiguousarray(turn.get(orientation, lambda a: a)(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = store(Image.fromarray(laid), "PNG", exif=exif)
    assert np.array_equal(np.asarray(to_rgb(image)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_lose_the_image() -> None:
    image = store(photograph(16, 16), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert to_rgb(image).size == (16, 16)


def test_preprocessing_needs_no_torch() -> None:
    heavy = "('torch', 'torchvision', 'scipy')"
    code = f"import sys, mvmr.bundles.preprocess; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
