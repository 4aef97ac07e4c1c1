"""JPEG files that cost what photographs cost to decode, made here: a bare machine has no photographs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr.cores import usable_cores

WIDTH, HEIGHT = 500, 375  # as ImageNet's are on average
_QUALITY = 90
_SIDES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_FALL = 0.65  # of the strength by frequency: files are then as large as those of photographs


def write_jpegs(folder: Path, count: int) -> list[Path]:
    """Write so many pictures of 500 x 375 pixels, all different, about 35 kB each."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.jpg" for number in range(count)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(partial(_write, _canvas()), files, range(count)))
    return files


def _canvas() -> npt.NDArray[np.uint8]:
    """Noise that is weaker the finer it is, as natural images are; large enough to cut many pictures out of it."""
    random, side = np.random.default_rng(0), _SIDES[-1]
    total = np.zeros((side, side, 3), np.float32)
    for cells in _SIDES:
        noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128) * cells**-_FALL
    return np.clip(128 + 2 * total, 0, 255).astype(np.uint8)


def _write(canvas: npt.NDArray[np.uint8], file: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    top, left = random.integers(len(canvas) - HEIGHT), random.integers(len(canvas) - WIDTH)
    picture = canvas[top : top + HEIGHT, left : left + WIDTH]
    Image.fromarray(picture[:, :: random.choice((1, -1))].copy()).save(file, quality=_QUALITY)
