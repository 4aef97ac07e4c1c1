"""What a visitor brings is an upright RGB image or a sentence, whatever the bytes; nothing large is decoded."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageFile, ImageOps, TiffImagePlugin

from mvmr.app.uploads import check, open_image
from mvmr.bundles.preprocess import Preprocess, to_rgb
from mvmr.data.image_bytes import Limits
from mvmr.errors import MvmrError
from mvmr.serve.decoding.pool import DecodePool
from tests.serve.serving import SLOW, encoded, photograph

WIDTH, HEIGHT = 60, 40


def picture() -> Image.Image:
    """A photograph that is neither square nor symmetric."""
    return photograph().resize((WIDTH, HEIGHT))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def sentence(data: bytes, **options: int) -> str:
    with pytest.raises(MvmrError) as excinfo:
        open_image(data, **options)
    text = str(excinfo.value)
    assert "\n" not in text
    assert text[0].islower()
    assert ";" in text or ":" in text  # what is wrong, and what to do
    return text


def png_header(width: int, height: int, *, kind: int = 2) -> bytes:
    """The beginning of a PNG file that promises an image of this size and ends there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")[:4]
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# -- what is taken


def sixteen_bits() -> Image.Image:
    return Image.fromarray(pixels(picture().convert("L")).astype(np.uint16) * 257)


def floats() -> Image.Image:
    return Image.fromarray(pixels(picture().convert("L")).astype(np.float32) / 255)


def see_through() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


REDUCED = ("more than 8 bits a channel reduced to 8",)
KINDS: dict[str, tuple[Callable[[], Image.Image], str, tuple[str, ...]]] = {
    "png": (picture, "PNG", ()),
    "jpeg": (picture, "JPEG", ()),
    "webp": (picture, "WEBP", ()),
    "bmp": (picture, "BMP", ()),
    "grey": (lambda: picture().convert("L"), "PNG", ()),
    "black and white": (lambda: picture().convert("1"), "PNG", ()),
    "palette": (lambda: picture().quantize(16), "PNG", ()),
    "alpha": (see_through, "PNG", ("transparent parts laid on white",)),
    "cmyk": (lambda: picture().convert("CMYK"), "JPEG", ("CMYK colours turned into RGB",)),
    "16-bit png": (sixteen_bits, "PNG", REDUCED),
    "16-bit tiff": (sixteen_bits, "TIFF", REDUCED),
    "float tiff": (floats, "TIFF", REDUCED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_file_gives_the_pixels_that_training_would_have_seen(kind: str) -> None:
    make, form, notes = KINDS[kind]
    data = encoded(make(), form)
    upload = open_image(data)
    assert upload.image.mode == "RGB"
    assert (upload.width, upload.height) == upload.image.size == (WIDTH, HEIGHT)
    assert upload.notes == notes
    with Image.open(io.BytesIO(data)) as file:
        assert np.array_equal(pixels(upload.image), pixels(to_rgb(file)))


def test_sixteen_bits_show_what_eight_would() -> None:
    grey = pixels(picture().convert("L"))
    for image in (sixteen_bits(), floats()):
        assert np.array_equal(pixels(open_image(encoded(image, "TIFF")).image), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_however_the_camera_was_held(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "PNG", exif=exif)
    upload = open_image(data)
    with Image.open(io.BytesIO(data)) as file:
        upright = ImageOps.exif_transpose(file)
    assert np.array_equal(pixels(upload.image), pixels(upright))
    assert (upload.width, upload.height) == (WIDTH, HEIGHT)
    assert upload.image.size == ((HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT))
    assert upload.notes == (() if orientation == 1 else ("turned upright, as its EXIF data say",))


@pytest.mark.parametrize(
    ("form", "several"), [("GIF", "its frames"), ("WEBP", "3 frames"), ("PNG", "3 frames"), ("TIFF", "its pages")]
)
def test_an_animation_shows_its_first_frame_and_says_so(form: str, several: str) -> None:
    first, *frames = (Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue"))
    options = {"lossless": True} if form == "WEBP" else {}
    upload = open_image(encoded(first, form, save_all=True, append_images=frames, duration=50, **options))
    assert upload.notes == (f"the first of {several}",)
    assert np.array_equal(pixels(upload.image), pixels(first))


def test_a_photograph_with_a_preview_inside_is_no_animation() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture().resize((30, 20))])
    upload = open_image(data)
    assert upload.notes == ()
    assert upload.image.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("form", "plugin"), [("GIF", GifImagePlugin.GifImageFile), ("TIFF", TiffImagePlugin.TiffImageFile)]
)
def test_later_frames_that_no_decoder_has_tried_are_not_gone_through(
    form: str, plugin: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    seek, sought = plugin._seek, set[int]()

    def remember(file: Any, frame: int, *arguments: Any) -> None:
        sought.add(frame)
        seek(file, frame, *arguments)

    monkeypatch.setattr(plugin, "_seek", remember)
    open_image(data)
    assert sought == {0}


def test_an_animation_whose_later_frames_are_cut_off_still_shows_the_first() -> None:
    frames = [Image.fromarray(np.roll(pixels(picture()), shift, axis=1)) for shift in range(0, 30, 10)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0)
    complete, cut = open_image(data), open_image(data[: len(data) * 2 // 3])
    assert np.array_equal(pixels(cut.image), pixels(complete.image))
    assert cut.notes[0].startswith("the first of ")


def test_nothing_of_the_file_but_its_pixels_goes_on() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00"}
    upload = open_image(encoded(picture(), "JPEG", exif=exif, comment=b"at home", icc_profile=b"a profile"))
    assert not isinstance(upload.image, ImageFile.ImageFile)
    assert upload.image.info == {}
    assert dict(upload.image.getexif()) == {}


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_the_smallest_images_work(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    upload = open_image(encoded(image, "PNG"))
    assert upload.image.size == size
    assert (Preprocess.for_size(224).image(upload.image) == (10, 200, 30)).all()


# -- what is refused


def test_an_empty_file() -> None:
    assert "empty" in sentence(b"")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"hello, I am a photograph",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
        b"PK\x03\x04" + bytes(100),
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\xff\xd8\xff",
    ],
)
def test_what_is_not_an_image(data: bytes) -> None:
    assert "not an image" in sentence(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_an_image_that_was_cut_off_says_so(form: str, part: float) -> None:
    data = encoded(photograph(), form)
    assert "damaged" in sentence(data[: int(part * len(data))])


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_000, 10_000), (7_072, 7_071)])
def test_too_many_pixels_are_refused_by_the_header_alone(width: int, height: int) -> None:
    data = png_header(width, height)
    assert len(data) < 100
    reason = sentence(data)
    assert "than the 50 million that are allowed" in reason
    assert "damaged" in sentence(png_header(70, 70))  # of a size that is allowed, it would have been decoded


def test_the_limit_is_the_callers() -> None:
    data = encoded(picture(), "PNG")
    with pytest.raises(MvmrError, match=r"60 x 40 pixels, more than the 0\.001 million"):
        open_image(data, max_pixels=1000)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 10_000)])
def test_a_thread_of_pixels_that_a_resize_would_blow_up_is_refused(size: tuple[int, int]) -> None:
    assert "too thin" in sentence(encoded(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_bytes_flipped_at_random_never_do_more_than_spoil_the_image(form: str) -> None:
    generator = np.random.default_rng(5)
    options = {"save_all": True, "append_images": [picture().rotate(90)]} if form in ("GIF", "WEBP", "TIFF") else {}
    data = np.frombuffer(encoded(picture(), form, **options), np.uint8)
    read, reasons = 0, []
    for _ in range(150):
        broken = data.copy()
        at = generator.integers(0, min(len(data), 400), 4)  # headers and tables are the likelier to break a parser
        broken[at] = generator.integers(0, 256, 4)
        try:
            upload = open_image(broken.tobytes())
        except MvmrError as error:
            reasons.append(str(error))
        else:
            assert upload.image.mode == "RGB"
            read += 1
    assert reasons
    assert len(reasons) + read == 150
    assert not any("\n" in reason for reason in reasons)


def test_an_image_that_takes_too_long_is_refused_before_it_is_opened_here() -> None:
    limits = Limits(seconds=0.3)
    with DecodePool(Preprocess.for_size(32), limits, processes=1) as decoders:
        check(encoded(picture(), "PNG"), decoders)
        with pytest.raises(MvmrError, match=r"can't be opened here .*0.3 s of a processor.*give another"):
            check(SLOW, decoders)
