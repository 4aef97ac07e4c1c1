"""What tests of the commands share: photographs, a recipe, and a bundle that was made of them."""

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from tests.cli.commands import COLOURS, RECIPE, a_photo, arguments, mvmr


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 images of three colours, some in odd formats, and three files that are none."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "photos"
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(9):
            a_photo(colour, random).save(folder / colour / f"{number}.jpg")
    red, green, blue = (folder / colour for colour in ("red", "green", "blue"))
    a_photo("red", random).convert("CMYK").save(red / "print.jpg")
    a_photo("red", random, (5, 4)).save(red / "tiny.png")
    a_photo("red", random, (90, 60)).save(red / "large.WEBP")
    frames = [a_photo("green", random) for _ in range(3)]
    frames[0].save(green / "moving.gif", save_all=True, append_images=frames[1:])
    a_photo("green", random).quantize(16).save(green / "palette.png")
    a_photo("green", random).convert("RGBA").save(green / "alpha.png")
    Image.fromarray(random.integers(0, 65536, (20, 26), dtype=np.uint16)).save(blue / "deep.png")
    a_photo("blue", random).save(blue / "scan.tiff")
    buffer = BytesIO()
    a_photo("blue", random, (200, 150)).save(buffer, "JPEG")
    (blue / "truncated.jpg").write_bytes(buffer.getvalue()[:900])
    (green / "empty.png").write_bytes(b"")
    (red / "letter.jpg").write_text("Dear diary")
    (red / "notes.txt").write_text("not even meant as one")
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that takes a second."""
    file = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="session")
def finished_run(photos: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished bundle and what the command said; not to be changed."""
    import torch  # here, as tests of `mvmr doctor` need none

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "mine"
    return out, mvmr("pretrain", *arguments(photos, recipe, out))


@pytest.fixture
def bundle_copy(finished_run: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of that bundle, which may be changed."""
    shutil.copytree(finished_run[0], tmp_path / "runs" / "mine")
    return tmp_path / "runs" / "mine"
