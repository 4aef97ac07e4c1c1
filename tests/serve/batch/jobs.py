"""What tests of the batch job share: its settings, its images, and how its rows are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mvmr.errors import MvmrError
from mvmr.serve.batch import job
from mvmr.serve.batch.job import embed

DIM, CLASSES = 128, tuple("abcde")  # the width of tests.making.SMALL
COUNT, PART = 23, 5
BAD = {"08.png": b"", "09.png": b"not an image", "14.png": None}


def picture(number: int) -> Image.Image:
    """Smooth colours, so that two of them are far apart and a shift of a pixel is seen."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return coarse.resize((24 + number % 5, 20), Image.Resampling.BICUBIC)


def run(bundle: Path, images: Path | str, out: Path, **options: Any) -> job.Summary:
    return embed(bundle, images, out=out, **{"part_rows": PART, "heads": ["photos"], "threads": 2, **options})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which tells the time."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    assert not [path for path in folder.iterdir() if path.is_dir()]
    files.pop("manifest.json")
    return files


def refusal(bundle: Path, images: Path | str, out: Path, **options: Any) -> str:
    with pytest.raises(MvmrError) as caught:
        run(bundle, images, out, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
