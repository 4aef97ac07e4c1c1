"""What tests of engines, services and teachers share: images of every kind, and the words of a refusal."""

from typing import Any

import pytest
from PIL import Image

from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError
from tests.serve import serving

ODD = [
    serving.photograph(),
    serving.photograph("coins").convert("L"),
    serving.photograph("chelsea").convert("CMYK"),
    serving.photograph().convert("RGBA").resize((91, 300)),
    serving.photograph().quantize(16),
    Image.new("I;16", (9, 5), 40_000),
    Image.new("RGB", (1, 1), "red"),
]


def patches() -> ImageSet:
    test_split = open_images("sample:patches", "test")
    return test_split.subset(range(0, len(test_split), 5))  # 136: two whole batches and some


def load(images: ImageSet) -> list[Image.Image]:
    return [images.load(number) for number in range(len(images))]


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        call(*arguments, **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)
