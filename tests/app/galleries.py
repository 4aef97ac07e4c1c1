"""What tests of galleries share: pictures, an encoder of their colours, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvmr.app.embedders.embedder import Encoder
from mvmr.app.gallery import Gallery
from mvmr.errors import MvmrError


def picture(number: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (4, 3, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def pictures(folder: Path, count: int, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        picture(number).save(folder / f"{number:03}.png")
    return folder


def refusal(spec: Path | str, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        Gallery.open(str(spec), **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def colours(count: list[int] | None = None, **changes: Any) -> Encoder:
    """An encoder of an image's mean colour and size, which counts the images that it sees."""

    def prepare(image: Image.Image) -> np.ndarray:
        assert image.mode == "RGB"
        return np.array([*np.asarray(image).mean((0, 1)), *image.size], np.float32)

    def forward(prepared: Sequence[np.ndarray]) -> np.ndarray:
        if count is not None:
            count.append(len(prepared))
        return np.stack(prepared)

    encoder = Encoder(key="x", label="X", identity="a" * 64, dim=5, nbytes=None, prepare=prepare, forward=forward)
    return replace(encoder, **changes)


def embed_all(gallery: Gallery) -> np.ndarray:
    return colours().embed([gallery.load(number) for number in range(len(gallery))])
