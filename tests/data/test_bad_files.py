"""Bad and odd image files: real ones, made here, counted, left out and named, or read rightly."""

import importlib
import io
import os
import shutil
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvmr.bundles.preprocess import Preprocess
from mvmr.data import decoding, open_images
from mvmr.errors import MvmrError


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return open_images("sample:patches").load(0).resize((200, 150))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def album(tmp_path: Path, photograph: Image.Image) -> Path:
    """A folder with 10 good images."""
    for number in range(10):
        photograph.rotate(number).save(tmp_path / f"good{number}.png")
    return tmp_path


def refusal(folder: Path) -> tuple[str, str]:
    """The key and reason of the one bad file of the folder."""
    images = open_images(folder, "unlabelled", max_unreadable=0.5)
    assert len(images) == 10
    (skipped,) = images.skipped
    assert "\n" not in str(skipped)
    return skipped.key, skipped.reason


def test_a_zero_byte_file(album: Path) -> None:
    (album / "none.jpg").touch()
    assert refusal(album) == ("none.jpg", "empty file (0 bytes)")


def test_a_text_file_named_jpg(album: Path) -> None:
    (album / "text.jpg").write_text("This is not an image.")
    assert refusal(album) == ("text.jpg", "not an image, or damaged in its header")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg(album: Path, photograph: Image.Image, share: float, progressive: bool) -> None:
    content = encode(photograph, "JPEG", progressive=progressive, quality=95)
    (album / "cut.jpg").write_bytes(content[: int(share * len(content))])
    key, reason = refusal(album)
    assert key == "cut.jpg"
    assert reason


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_truncated_files_of_other_formats(album: Path, photograph: Image.Image, file_format: str, share: float) -> None:
    content = encode(photograph, file_format)
    (album / f"cut.{file_format[:4].lower().replace('jpeg', 'jp2')}").write_bytes(content[: int(share * len(content))])
    assert refusal(album)[1]


def test_the_quick_check_of_a_jpeg_agrees_with_reading_it(tmp_path: Path, photograph: Image.Image) -> None:
    path = tmp_path / "cut.jpg"
    verdicts = set()
    for progressive in (False, True):
        content = encode(photograph, "JPEG", progressive=progressive)
        for end in [*range(0, len(content), 97), *range(len(content) - 6, len(content) + 1)]:
            path.write_bytes(content[:end])
            outcomes = []
            for function in (decoding.check, decoding.read):
                try:
                    function(os.fsencode(path))
                    outcomes.append(True)
                except Exception:
                    outcomes.append(False)
            assert outcomes[0] == outcomes[1], end
            verdicts.add(outcomes[0])
    assert verdicts == {True, False}


def test_a_damaged_png(album: Path, photograph: Image.Image) -> None:
    content = bytearray(encode(photograph, "PNG"))
    content[len(content) // 2] ^= 0xFF
    (album / "flip.png").write_bytes(content)
    assert refusal(album)[0] == "flip.png"


def test_a_decompression_bomb(album: Path) -> None:
    (album / "bomb.png").write_bytes(bomb(60_000))
    assert refusal(album) == ("bomb.png", "far too many pixels (a decompression bomb?)")


def test_a_large_image_is_no_reason_to_warn(album: Path) -> None:
    (album / "large.png").write_bytes(bomb(11_000))  # Pillow warns from 89 million pixels on; the data end early
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(album)[0] == "large.png"


def test_an_eps_file_is_never_run(album: Path, photograph: Image.Image) -> None:
    eps = encode(photograph, "EPS")
    (album / "drawing.eps").write_bytes(eps)  # no ending of ours: not counted
    (album / "sly.jpg").write_bytes(eps)
    assert refusal(album) == ("sly.jpg", "not an image, or damaged in its header")


def test_lab_is_read(album: Path) -> None:
    Image.new("LAB", (20, 20), (255, 128, 128)).save(album / "lab.tif")
    images = open_images(album, "unlabelled")
    assert len(images) == 11
    assert images.load(10).mode == "RGB"


def test_a_link_to_nowhere(album: Path) -> None:
    (album / "gone.jpg").symlink_to(album / "nowhere.jpg")
    assert refusal(album) == ("gone.jpg", "missing (a link to nowhere, or removed meanwhile)")


@pytest.fixture
def unprivileged_folder(photograph: Image.Image) -> Iterator[Path]:
    """A folder everyone may enter, and a process that is not root."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    cache = os.environ["MVMR_CACHE"]
    try:
        folder.chmod(0o777)
        os.environ["MVMR_CACHE"] = str(folder / "cache")
        # whatever is imported on the way is imported now: a failed import would be remembered after this test
        photograph.save(folder / "first.jpg")
        for _ in range(2):
            open_images(folder, "unlabelled").load(0)
        shutil.rmtree(folder / "cache")
        if user == 0:
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(user)
        importlib.invalidate_caches()
        os.environ["MVMR_CACHE"] = cache
        for path in folder.rglob("*"):
            path.chmod(0o777)
        shutil.rmtree(folder)


def test_files_and_folders_without_permission(unprivileged_folder: Path, photograph: Image.Image) -> None:
    photos = unprivileged_folder / "photos"
    (photos / "closed").mkdir(parents=True)
    for number in range(10):
        photograph.save(photos / f"{number}.jpg")
    photograph.save(photos / "closed" / "x.jpg")
    (photos / "3.jpg").chmod(0)
    (photos / "closed").chmod(0)
    images = open_images(photos, "unlabelled", max_unreadable=0.5)
    assert [str(s) for s in images.skipped] == [
        "closed/\tfolder not listed: permission denied",
        "3.jpg\tpermission denied",
    ]
    # unlike damage, this may change without a trace in the file: it is tried again
    (photos / "3.jpg").chmod(0o644)
    assert len(open_images(photos, "unlabelled", max_unreadable=0.5)) == 10


def test_a_root_without_permission(unprivileged_folder: Path) -> None:
    photos = unprivileged_folder / "photos"
    photos.mkdir()
    photos.chmod(0)
    with pytest.raises(MvmrError, match="permission denied"):
        open_images(photos)


def test_more_bad_files_than_allowed_stop_the_run(album: Path) -> None:
    for number in range(5):
        (album / f"bad{number}.jpg").touch()
    with pytest.raises(MvmrError) as raised:
        open_images(album)
    message = str(raised.value)
    assert "5 of 15 image files" in message
    assert "33.3 %" in message
    assert "1 % allowed" in message
    assert "bad0.jpg (empty file (0 bytes)), bad1.jpg" in message
    assert "and 2 more" in message
    assert "--max-unreadable" in message
    assert "\n" not in message


def test_the_allowed_share_is_allowed(album: Path) -> None:
    (album / "bad.jpg").touch()
    assert len(open_images(album, "unlabelled", max_unreadable=1 / 11)) == 10
    with pytest.raises(MvmrError):
        open_images(album, "unlabelled", max_unreadable=1 / 11 - 1e-6)


def test_nothing_but_bad_files(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").touch()
    with pytest.raises(MvmrError, match="1 of 1 image files"):
        open_images(tmp_path)
    with pytest.raises(MvmrError, match="no images"):
        open_images(tmp_path, max_unreadable=1)


def test_bad_files_shift_no_label(tmp_path: Path, photograph: Image.Image) -> None:
    for number in range(20):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        photograph.save(tmp_path / "ab"[number % 2] / f"{number:02d}.png")
    (tmp_path / "a" / "05.png").touch()
    (tmp_path / "b" / "00.jpg").write_text("text")
    for split in ("train", "test"):
        images = open_images(tmp_path, "test" if split == "test" else "train", max_unreadable=0.2)
        assert images.labels is not None
        assert ["ab"[label] for label in images.labels] == [key[0] for key in images.keys]
        assert [skipped.key for skipped in images.skipped] == ["a/05.png", "b/00.jpg"]


def test_an_animation_gives_its_first_frame(album: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    for file_format in ("GIF", "PNG", "WEBP"):
        frames[0].save(album / f"film.{file_format.lower()}", file_format, save_all=True, append_images=frames[1:])
        images = open_images(album, "unlabelled").subset([0])
        assert images.keys[0] == f"film.{file_format.lower()}"
        red, green, blue = np.asarray(images.load(0))[10, 10].tolist()
        assert red > 250
        assert max(green, blue) < 5
        (album / f"film.{file_format.lower()}").unlink()


def test_cmyk_grey_palette_alpha_and_16_bit_are_read(tmp_path: Path, photograph: Image.Image) -> None:
    photograph.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    photograph.convert("CMYK").save(tmp_path / "cmyk.tif")
    photograph.convert("L").save(tmp_path / "grey.png")
    photograph.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    photograph.convert("RGBA").save(tmp_path / "alpha.png")
    deep = np.asarray(photograph.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    images = open_images(tmp_path, "unlabelled")
    assert images.skipped == ()
    colour, grey = (np.asarray(photograph.convert(mode).convert("RGB")).astype(int) for mode in ("RGB", "L"))
    pictures = {key: np.asarray(images.load(i)).astype(int) for i, key in enumerate(images.keys)}
    assert np.abs(pictures["cmyk.jpg"] - colour).mean() < 4
    assert np.array_equal(pictures["cmyk.tif"], colour)
    assert np.abs(pictures["palette.png"] - colour).mean() < 8
    assert np.array_equal(pictures["alpha.png"], colour)
    for name in ("grey.png", "deep.png", "deep.tif"):
        assert np.array_equal(pictures[name], grey), name


def test_exif_orientation_of_a_file_is_honoured(tmp_path: Path, photograph: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    images = open_images(tmp_path, "unlabelled")
    assert np.array_equal(np.asarray(images.load(0)), np.asarray(photograph))


def test_images_smaller_than_the_crop_are_counted_and_enlarged(album: Path) -> None:
    Image.new("RGB", (31, 90), "red").save(album / "small.png")
    Image.new("RGB", (1, 1), "red").save(album / "tiny.png")
    images = open_images(album, "unlabelled")
    assert images.smaller_than(32) == 2
    assert images.smaller_than(31) == 1
    assert images.describe(32).endswith("12 images, 2 smaller than 32 px (enlarged)")
    for index in range(len(images)):
        assert Preprocess.for_size(32).image(images.load(index)).shape == (32, 32, 3)


def test_the_bad_file_is_not_left_open(album: Path) -> None:
    """pytest turns a file that is never closed into an error; this opens many of them."""
    for number in range(50):
        (album / f"bad{number}.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(number))
    open_images(album, "unlabelled", max_unreadable=0.9)
