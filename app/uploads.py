"""An image that a visitor brings: from the bytes of any file to RGB pixels, or a sentence on why not."""

from __future__ import annotations

import io
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mvmr.bundles.preprocess import WHITE, Background, describe_background, to_rgb, upright
from mvmr.data import decoding
from mvmr.data.image_bytes import LIMITS, Rejected
from mvmr.errors import MvmrError
from mvmr.serve.decoding.pool import DecodePool

_PREVIEW_SECONDS = 5.0
_SIDE = 512  # pixels that the short side of a small image is enlarged to, at most, by a preprocessing
_ORIENTATION = 0x0112
_ENDS = ("too-slow", "too-much-memory", "undecodable")  # what opening it here might not come back from
_ANOTHER = "give a photograph as JPEG, PNG, WebP, TIFF or GIF"


@dataclass(frozen=True)
class OpenedImage:
    """An image as it is shown and embedded.

    image: RGB, upright, without any metadata
    notes: what was done to it, in words for the page: "the first of 12 frames"
    width, height: the file's, in pixels, as they are stored
    """

    image: Image.Image
    notes: tuple[str, ...]
    width: int
    height: int


def open_image(data: bytes, *, background: Background = WHITE, max_pixels: float = LIMITS.pixels) -> OpenedImage:
    """Decode the file `data`; how many pixels it has is read from its header, before anything is decoded.

    background: what shows through a transparent image, as the student's preprocessing says

    Raises: MvmrError, a sentence for the page: no image, empty, cut off, or with too many pixels.
    """
    if not data:
        raise MvmrError(f"this file is empty (0 bytes); {_ANOTHER}")
    try:
        return _decode(data, background, max_pixels)
    except MvmrError:
        raise
    except UnidentifiedImageError as error:
        raise MvmrError(f"this file is not an image, or is damaged in its header; {_ANOTHER}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limits
        raise MvmrError(_too_many("this image has more pixels than", max_pixels)) from error
    except Exception as error:  # Pillow's plugins raise whatever their parsing meets
        raise MvmrError(f"this image is damaged ({decoding.reason(error)}); save it again, or give another") from error


def check(data: bytes, decoders: DecodePool) -> None:
    """Decode the file `data` where it can be stopped, before it is opened here.

    What comes of it is small and as one preprocessing wants it: the page shows, and all encoders get, the whole image.

    Raises: MvmrError, a sentence for the page, for an image that takes too much time or memory, or is damaged.
    """
    outcome = decoders.submit(data).result()
    if isinstance(outcome, Rejected) and outcome.code in _ENDS:
        what = "is damaged" if outcome.code == "undecodable" else "can't be opened here"
        raise MvmrError(f"this image {what} ({outcome.reason}); save it again, smaller, or give another")


def take_upload(payload: Any) -> bytes | MvmrError | None:
    """The bytes of a file that Gradio has stored for a visitor, None where there is none; or what went wrong.

    The file goes as soon as the browser has shown it. Payloads come from strangers: one that names a file elsewhere is
    neither read nor removed.
    """
    if payload is None or payload.path is None:
        return None
    from gradio.utils import get_upload_folder  # here: to open an image takes no Gradio, which takes seconds to import

    file = Path(payload.path).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()):
        return MvmrError("this is no upload; give the image itself")
    read = time.time()
    try:
        return file.read_bytes()
    except OSError as error:
        return MvmrError(f"the upload can't be read ({error.strerror}); upload the image again")
    finally:
        removal = threading.Timer(_PREVIEW_SECONDS, _remove, (file, read))
        removal.daemon = True
        removal.start()


def _remove(file: Path, read: float) -> None:
    with suppress(OSError):
        if file.stat().st_mtime <= read:  # else the same image has been uploaded again
            file.unlink()


def _decode(data: bytes, background: Background, max_pixels: float) -> OpenedImage:
    with Image.open(io.BytesIO(data), formats=decoding.select_formats(decoding.COMMON)) as file:
        width, height = file.size
        if width * height > max_pixels:
            raise MvmrError(_too_many(f"this image has {width} x {height} pixels, more than", max_pixels))
        # thin images are enlarged until their short side fits: 1 x 100,000 pixels would become 512 x 51,200,000
        if width * height * max(1.0, _SIDE / max(1, min(width, height))) ** 2 > max_pixels:
            raise MvmrError(f"this image of {width} x {height} pixels is too thin to be embedded; crop it")
        mode = file.mode
        notes = _several(file)
        turned = False
        with suppress(Exception):  # a broken EXIF block raises a dozen kinds of error; the pixels are still good
            turned = file.getexif().get(_ORIENTATION, 1) in range(2, 9)
        file.load()
        image = to_rgb(file, background)
        transparent = file.has_transparency_data and any(upright(file).getchannel("A").histogram()[:255])
        image = image.copy() if image is file else image
        image.info.clear()
    if turned:
        notes.append("turned upright, as its EXIF data say")
    if note := _conversion_note(mode):
        notes.append(note)
    if transparent and background is not None:
        notes.append(f"transparent parts {describe_background(background)}")
    return OpenedImage(image, tuple(notes), width, height)


def _several(file: Image.Image) -> list[str]:
    """What is said of an image of several frames.

    A GIF or TIFF tells how many only to those who go through all of it, which it may be made to let them do for hours.
    """
    if file.format == "MPO":
        return []
    if file.format == "GIF":
        return ["the first of its frames"] if "loop" in file.info or file.info.get("duration") else []
    if file.format == "TIFF":
        return ["the first of its pages"] if getattr(file, "is_animated", False) else []
    frames = getattr(file, "n_frames", 1)
    return [f"the first of {frames} frames"] if frames > 1 else []


def _conversion_note(mode: str) -> str | None:
    if mode == "CMYK":
        return "CMYK colours turned into RGB"
    if mode == "F" or mode.startswith("I"):
        return "more than 8 bits a channel reduced to 8"
    return None


def _too_many(what: str, max_pixels: float) -> str:
    return f"{what} the {max_pixels / 1e6:g} million that are allowed: scale it down"
