"""Two small real data sets out of packages that are installed anyway: nothing is fetched.

`sample:patches`: 64 px RGB patches of the photographs shipped with scikit-image; the class is the photograph.
Training patches lie wholly in the left 60 % of each photograph, test patches wholly in the right 35 %.
`sample:digits`: scikit-learn's 8 x 8 digits, enlarged to 32 px RGB.
"""

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr.bundles.preprocess import to_rgb
from mvmr.data.image_set import Arrays, ImageSet, Labels, Split, digest, numbered_names
from mvmr.errors import MvmrError

PATCH = 64
DIGIT = 32
PER_CLASS = {"train": 80, "test": 40}
# file in skimage/data -> class name
PHOTOGRAPHS = {
    "astronaut.png": "astronaut",
    "brick.png": "brick",
    "camera.png": "camera",
    "cell.png": "cell",
    "chelsea.png": "cat",
    "clock_motion.png": "clock",
    "coffee.png": "coffee",
    "coins.png": "coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "hubble_deep_field.jpg": "hubble deep field",
    "ihc.png": "tissue",
    "moon.png": "moon",
    "motorcycle_left.png": "motorcycle",
    "page.png": "page",
    "retina.jpg": "retina",
    "rocket.jpg": "rocket",
}
_LARGE = 600  # a short side above this is halved, else a patch shows no more than a blur
_DIGITS_TRAIN = 1200


def patches(split: Split) -> ImageSet:
    """Return `sample:patches`: 17 classes, 80 training or 40 test patches each, the same on every machine.

    Raises: MvmrError when scikit-image or one of its photographs is not installed.
    """
    part: Split = "test" if split == "test" else "train"
    folder = _photograph_folder()
    per_class = PER_CLASS[part]
    parts = []
    for number, file in enumerate(PHOTOGRAPHS):
        photograph = _photograph(folder / file)
        generator = np.random.default_rng([number, 0 if part == "train" else 1])
        parts.append(_cut(photograph, _left_edges(photograph.shape[1], part), per_class, generator))
    pixels = np.concatenate(parts)
    return ImageSet(
        name="sample:patches",
        split=split,
        source=Arrays(pixels, numbered_names(part, len(pixels))),
        fingerprint=digest([b"sample:patches", part.encode(), pixels.tobytes()]),
        read_labels=None if split == "unlabelled" else partial(_blocks, len(PHOTOGRAPHS), per_class),
        classes=None if split == "unlabelled" else tuple(PHOTOGRAPHS.values()),
        native_size=PATCH,
    )


def strip(first: float, last: float, per_class: int, *, seed: int = 0) -> ImageSet:
    """Return labelled patches from a vertical strip of each photograph: to choose settings inside the training part.

    first, last: edges of the strip, as shares of the photograph's width

    Raises: MvmrError as `patches`; ValueError for a strip narrower than a patch.
    """
    folder = _photograph_folder()
    parts = []
    for number, file in enumerate(PHOTOGRAPHS):
        photograph = _photograph(folder / file)
        width = photograph.shape[1]
        edges = int(first * width), int(last * width) - PATCH
        parts.append(_cut(photograph, edges, per_class, np.random.default_rng([number, seed])))
    pixels = np.concatenate(parts)
    name = f"sample:patches[{first:g}-{last:g}]"
    return ImageSet(
        name=name,
        split="train",
        source=Arrays(pixels, numbered_names("train", len(pixels))),
        fingerprint=digest([name.encode(), pixels.tobytes()]),
        read_labels=partial(_blocks, len(PHOTOGRAPHS), per_class),
        classes=tuple(PHOTOGRAPHS.values()),
        native_size=PATCH,
    )


def digits(split: Split) -> ImageSet:
    """Return `sample:digits`: 1200 training or 597 test images of 10 classes, split with equal shares per class.

    Raises: MvmrError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MvmrError("sample:digits needs scikit-learn; pip install 'mvmr[train]'") from error
    part: Split = "test" if split == "test" else "train"
    images, numbers = load_digits(return_X_y=True)
    rows = _digits_rows(numbers, part)
    pixels = np.stack([_digit(image) for image in images.reshape(-1, 8, 8)[rows]])
    labels = numbers[rows].astype(np.int64)
    return ImageSet(
        name="sample:digits",
        split=split,
        source=Arrays(pixels, numbered_names(part, len(pixels))),
        fingerprint=digest([b"sample:digits", part.encode(), pixels.tobytes()]),
        read_labels=None if split == "unlabelled" else partial(np.copy, labels),
        classes=None if split == "unlabelled" else tuple("0123456789"),
        native_size=DIGIT,
    )


def _photograph_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MvmrError("sample:patches needs the photographs of scikit-image; pip install 'mvmr[train]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def _photograph(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            picture = to_rgb(image)
            if min(picture.size) > _LARGE:
                picture = picture.reduce(2)
            return np.asarray(picture)
    except OSError as error:
        raise MvmrError(f"sample:patches cannot read {path}: {error}; reinstall scikit-image") from error


def _left_edges(width: int, part: Split) -> tuple[int, int]:
    """The first and last left edge of a patch."""
    return (0, int(0.60 * width) - PATCH) if part == "train" else (-int(-0.65 * width // 1), width - PATCH)


def _cut(
    photograph: npt.NDArray[np.uint8], edges: tuple[int, int], count: int, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    lefts = generator.integers(*edges, count, endpoint=True)
    tops = generator.integers(0, photograph.shape[0] - PATCH, count, endpoint=True)
    return np.stack([photograph[y : y + PATCH, x : x + PATCH] for y, x in zip(tops, lefts, strict=True)])


def _blocks(classes: int, per_class: int) -> Labels:
    return np.repeat(np.arange(classes, dtype=np.int64), per_class)


def _digits_rows(numbers: npt.NDArray[np.int64], part: Split) -> npt.NDArray[np.int64]:
    """Deal the shuffled images of each class evenly, then cut: the shares are equal to within one image."""
    generator = np.random.default_rng(0)
    ranks = np.empty(len(numbers))
    for number in range(10):
        rows = generator.permutation(np.flatnonzero(numbers == number))
        ranks[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    order = np.argsort(ranks, kind="stable")
    return np.sort(order[:_DIGITS_TRAIN] if part == "train" else order[_DIGITS_TRAIN:])


def _digit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    grey = Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((DIGIT, DIGIT), Image.Resampling.BILINEAR).convert("RGB"))
