"""Transparent pictures are laid on white, the same pixels in every room; older bundles keep what they were shown."""

import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mvmr.app.opening import open_workbenches
from mvmr.app.ui import Query
from mvmr.app.uploads import open_image
from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import WHITE, Preprocess, to_rgb
from mvmr.data import ImageSet, open_images
from mvmr.data.image_bytes import Prepared, prepare
from mvmr.errors import MvmrError
from mvmr.methods.method import AUGMENTED, ORIGINAL
from mvmr.serve.client.images import ImageFile, pack
from mvmr.serve.engine import Engine
from mvmr.training.pretraining import fit
from mvmr.training.recipe import load_recipe
from mvmr.training.views import Views
from tests.making import SMALL, build_encoder
from tests.serve.serving import encoded, photograph

Pixels = npt.NDArray[np.uint8]
BEFORE = Preprocess(resize=40, crop=32, background=None)
NOW = Preprocess(resize=40, crop=32)


def fading_picture(mode: str = "RGBA") -> Image.Image:
    """A photograph that fades out downwards, over colours of its own."""
    picture = photograph().resize((90, 70)).convert("LA" if mode == "LA" else "RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def palette() -> Image.Image:
    return photograph().resize((90, 70)).quantize(16)


def grey() -> Image.Image:
    return photograph().resize((90, 70)).convert("L")


def turned_file() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(fading_picture(), "PNG", exif=exif)


FILES: dict[str, Callable[[], bytes]] = {
    "alpha.png": lambda: encoded(fading_picture(), "PNG"),
    "alpha-grey.png": lambda: encoded(fading_picture("LA"), "PNG"),
    "alpha.webp": lambda: encoded(fading_picture(), "WEBP", lossless=True),
    "alpha.tif": lambda: encoded(fading_picture(), "TIFF"),
    "turned.png": turned_file,
    "palette-one-colour.png": lambda: encoded(palette(), "PNG", transparency=3),
    "palette-by-degrees.png": lambda: encoded(palette(), "PNG", transparency=bytes(range(0, 256, 16))),
    "palette.gif": lambda: encoded(palette(), "GIF", transparency=3),
    "grey-one-value.png": lambda: encoded(grey(), "PNG", transparency=int(np.median(np.asarray(grey())))),
    "one-colour.png": lambda: encoded(palette().convert("RGB"), "PNG", transparency=_commonest(palette())),
}


def _commonest(image: Image.Image) -> tuple[int, ...]:
    colours = image.convert("RGB").getcolors(90 * 70)
    assert colours
    colour: Any = max(colours)[1]
    return tuple(colour)


@pytest.fixture(params=FILES)
def content(request: pytest.FixtureRequest) -> bytes:
    return FILES[request.param]()


def on_white(content: bytes) -> Image.Image:
    """By Pillow's own hands."""
    with Image.open(io.BytesIO(content)) as file:
        picture = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def as_before(content: bytes) -> Image.Image:
    """What mvmr made of transparent pictures before it had a background: the alpha channel fell away."""
    with Image.open(io.BytesIO(content)) as file:
        upright = ImageOps.exif_transpose(file)
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return upright.convert("RGB")


def write(folder: Path, content: bytes) -> ImageSet:
    folder.mkdir()
    with Image.open(io.BytesIO(content)) as file:
        (folder / f"picture.{(file.format or '').lower()}").write_bytes(content)
    return open_images(folder, "unlabelled")


def chw(tensor: Tensor) -> Pixels:
    return tensor.numpy().transpose(1, 2, 0)


def test_a_transparent_picture_is_laid_on_white(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as file:
        pixels = np.asarray(to_rgb(file))
    np.testing.assert_array_equal(pixels, np.asarray(on_white(content)))
    assert (pixels != np.asarray(as_before(content))).any()


def test_every_room_sees_the_same_pixels(content: bytes, tmp_path: Path) -> None:
    wanted = NOW.image(on_white(content))
    images = write(tmp_path / "photos", content)
    np.testing.assert_array_equal(images.load(0), on_white(content))
    views = Views(images, NOW, (ORIGINAL, AUGMENTED), "none", seed=0)[0, 0]
    np.testing.assert_array_equal(chw(views["original"]), wanted)
    np.testing.assert_array_equal(chw(views["augmented"]), wanted)
    served = prepare(content, NOW)  # the service and the batch job
    assert isinstance(served, Prepared)
    np.testing.assert_array_equal(served.pixels, wanted)
    np.testing.assert_array_equal(NOW.image(open_image(content).image), wanted)  # the app
    with Image.open(io.BytesIO(content)) as file:
        np.testing.assert_array_equal(NOW.image(file), wanted)  # torch, and the engine in a program
        (sent,) = next(pack([file], 1, 10**9))
    assert isinstance(sent, ImageFile)
    through_the_client = prepare(sent.content, NOW)
    assert isinstance(through_the_client, Prepared)
    np.testing.assert_array_equal(through_the_client.pixels, wanted)


def test_sixteen_bit_grey_may_declare_a_value_transparent() -> None:
    values = np.array([[0, 257, 65535]], np.uint16).repeat(2, axis=0)
    with Image.open(io.BytesIO(encoded(Image.fromarray(values), "PNG", transparency=257))) as file:
        assert np.asarray(to_rgb(file))[0, :, 0].tolist() == [0, 255, 255]
        assert np.asarray(to_rgb(file, None))[0, :, 0].tolist() == [0, 1, 255]


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    picture = photograph()
    np.testing.assert_array_equal(np.asarray(to_rgb(picture.convert("RGBA"))), np.asarray(picture))


def test_the_background_may_be_another(content: bytes, tmp_path: Path) -> None:
    black = Preprocess(resize=40, crop=32, background=(0, 0, 0))
    with Image.open(io.BytesIO(content)) as file:
        rgba = ImageOps.exif_transpose(file).convert("RGBA")
    wanted = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    write(tmp_path / "photos", content)
    images = open_images(tmp_path / "photos", "unlabelled", background=(0, 0, 0))
    np.testing.assert_array_equal(black.image(images.load(0)), black.image(wanted))
    assert Preprocess.from_dict(black.to_dict()) == black
    assert "black" not in open_image(content, background=(0, 0, 0)).notes[-1]
    assert "laid on RGB 0, 0, 0" in open_image(content, background=(0, 0, 0)).notes[-1]


# -- bundles of before


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> bundles.Bundle:
    """A bundle as mvmr wrote it before there was a background."""
    encoder = build_encoder().eval()
    out = tmp_path_factory.mktemp("old") / "student"
    out.mkdir()
    return bundles.write(
        out, backbone=SMALL.name, options=SMALL.options, embedding_dim=SMALL.width, preprocessing=BEFORE,
        training={"data": {"name": "photos", "split": "unlabelled"}}, encoder_state=encoder.state_dict(),
    )  # fmt: skip


def test_it_names_no_background_and_keeps_its_space(old: bundles.Bundle) -> None:
    write = {
        "resize": 40, "crop": 32, "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    assert bundles.load(old.path).manifest.preprocessing == BEFORE == Preprocess.from_dict(write)
    assert BEFORE.to_dict() == write
    parts = [old.manifest.files["encoder.safetensors"], SMALL.name, write]
    assert old.space_id == hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def test_it_embeds_as_before_bit_for_bit(old: bundles.Bundle, content: bytes, tmp_path: Path) -> None:
    student = old.student()
    write(tmp_path / "photos", content)
    wanted = student.embed([as_before(content)])
    path = next((tmp_path / "photos").iterdir())
    assert torch.equal(student.embed([path]), wanted)
    images = open_images(tmp_path / "photos", "unlabelled", background=old.manifest.preprocessing.background)
    assert torch.equal(student.embed([images.load(0)]), wanted)
    served = prepare(content, BEFORE)
    assert isinstance(served, Prepared)
    np.testing.assert_array_equal(served.pixels, BEFORE.image(as_before(content)))
    shown = open_image(content, background=None)
    assert torch.equal(student.embed([shown.image]), wanted)
    assert not any("transparent" in note for note in shown.notes)


@pytest.mark.slow
def test_the_app_shows_it_what_it_was_shown_before(old: bundles.Bundle, content: bytes, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, content)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("one", "two"):
        (file,) = (tmp_path / name).iterdir()
        file.rename(photos / f"{name}{file.suffix}")
    bundle = bundles.load(shutil.copytree(old.path, tmp_path / "student"))
    (bench,) = open_workbenches(bundle.path, gallery=photos)
    uploaded = Query(content, "upload").image(bench.gallery.images.background)
    assert isinstance(uploaded, Image.Image)
    for shown in (uploaded, bench.gallery.images.load(0)):
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(as_before(content)))
    wanted = bundle.student().embed([as_before(content)]).numpy()
    np.testing.assert_allclose(bench.rows("torch"), np.repeat(wanted, 2, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_so_does_its_export(old: bundles.Bundle, tmp_path: Path) -> None:
    from mvmr.export.export import export

    for number in range(16):
        encoded_file = encoded(fading_picture().rotate(20 * number), "PNG")
        (tmp_path / f"{number}.png").write_bytes(encoded_file)
    export(old.path, formats=["onnx"], data=str(tmp_path), images=16)
    engine = Engine.load(old.path)
    assert engine.preprocess == BEFORE
    content = FILES["alpha.png"]()
    np.testing.assert_array_equal(engine.embed([content]), engine.embed([as_before(content)]))


# -- training


class Watching:
    """A teacher that keeps what it is shown."""

    name, weights, identity = "watching", "none", "0" * 64

    def __init__(self) -> None:
        self.seen: list[Pixels] = []

    def prepare(self, image: Image.Image) -> Tensor:
        self.seen.append(np.asarray(image))
        return torch.from_numpy(np.asarray(image.resize((4, 4))).astype(np.float32).flatten())

    def __call__(self, batch: Tensor) -> Tensor:
        return batch


def four(folder: Path) -> list[bytes]:
    folder.mkdir()
    contents = [FILES[name]() for name in ("alpha.png", "alpha-grey.png", "palette-by-degrees.png", "turned.png")]
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
    return contents


RECIPE = ["student.backbone=resnet18_025", "views.size=32", "train.epochs=1", "train.batch_size=4", "train.workers=0"]


@pytest.mark.parametrize("background", [WHITE, (10, 200, 30)])
def test_teacher_and_student_are_shown_the_same_picture(background: tuple[int, int, int], tmp_path: Path) -> None:
    contents, teacher = four(tmp_path / "photos"), Watching()
    recipe = load_recipe("default", "mvmr.distillation", [*RECIPE, f"views.background={list(background)}"])
    images = open_images(tmp_path / "photos", "unlabelled", background=background)
    made = fit(images, tmp_path / "student", recipe, teachers={"teacher": teacher}, device="cpu")
    for seen, content in zip(teacher.seen, contents, strict=True):
        with Image.open(io.BytesIO(content)) as file:
            np.testing.assert_array_equal(seen, np.asarray(to_rgb(file, background)))
    assert made.manifest.preprocessing.background == background
    assert f"laid on {'white' if background == WHITE else 'RGB 10, 200, 30'}" in (made.path / "README.md").read_text()


def test_images_opened_on_another_background_are_refused(tmp_path: Path) -> None:
    four(tmp_path / "photos")
    recipe = load_recipe("default", "mvmr.distillation", RECIPE)
    images = open_images(tmp_path / "photos", "unlabelled", background=None)
    with pytest.raises(MvmrError, match=r"opened on background None.*open the images on the recipe's"):
        fit(images, tmp_path / "student", recipe, teachers={"teacher": Watching()}, device="cpu")


def test_embeddings_of_another_background_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    four(tmp_path / "photos")
    image_sets = [open_images(tmp_path / "photos", background=background) for background in (None, WHITE, (0, 0, 0))]
    assert len({images.fingerprint for images in image_sets}) == 3


@pytest.mark.parametrize("background", [(1.5, 2, 3), (True, 0, 0), "abc", 5, (0, 0)])
def test_a_background_of_another_type_is_refused(background: Any, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="3 whole numbers from 0 to 255"):
        open_images(tmp_path, background=background)


def test_an_opaque_upload_has_no_note() -> None:
    assert open_image(encoded(photograph().convert("RGBA"), "PNG")).notes == ()


@pytest.mark.parametrize("background", [(0, 0, 300), (-1, 0, 0)])
def test_a_background_that_is_no_colour_is_refused(background: tuple[int, int, int], tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="3 whole numbers from 0 to 255"):
        open_images(tmp_path, background=background)
    with pytest.raises(MvmrError, match="3 whole numbers from 0 to 255"):
        load_recipe("default", "mvmr", [f"views.background={list(background)}"])


@pytest.mark.parametrize("value", ["white", [1, 2], [1.5, 2, 3], [True, 0, 0]])
def test_a_bundle_with_an_odd_background_is_refused(value: object) -> None:
    with pytest.raises(MvmrError, match="background"):
        Preprocess.from_dict(NOW.to_dict() | {"background": value})
