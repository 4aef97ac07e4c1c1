"""What happens to an image before an encoder sees it: colours, resize, centre crop, normalisation (torch-free).

Training, evaluation, export and the service all use this one description; it is stored in the bundle.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mvmr.errors import MvmrError, shorten, unknown

Interpolation = Literal["bilinear", "bicubic"]
# What shows through a transparent picture, sRGB; None: its hidden colours do, as in bundles that record no background.
Background = tuple[int, int, int] | None
WHITE = (255, 255, 255)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_EXIF_ORIENTATION = 0x0112
_STRIP = 64  # rows
_LARGEST = 8192  # side in pixels: what a bundle asks for is made of every image, so it must not take all memory


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Lay on `background`, resize the short side to `resize` pixels (antialiased), crop the centre, normalise.

    `image` equals torchvision's `Resize(resize)` and `CenterCrop(crop)` on a PIL image, byte for byte.
    Images smaller than `resize` are enlarged. `mean` and `std` are in units of [0, 1].

    Raises: MvmrError for sizes below 1 or above 8192, a crop larger than the resized image, unknown interpolation,
        std <= 0, numbers that are not finite, or a background that is no colour.
    """

    resize: int
    crop: int
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    background: Background = WHITE

    def __post_init__(self) -> None:
        check_background(self.background)
        if not 1 <= self.crop <= self.resize:
            raise MvmrError(f"preprocessing: crop = {self.crop} must lie between 1 and resize = {self.resize}")
        if self.resize > _LARGEST:
            raise MvmrError(f"preprocessing: resize = {self.resize} must be at most {_LARGEST} pixels")
        if self.interpolation not in get_args(Interpolation):
            raise unknown("interpolation", str(self.interpolation), get_args(Interpolation))
        if len(self.mean) != 3 or len(self.std) != 3 or not _scales(self.mean, self.std):
            raise MvmrError(f"preprocessing: mean = {self.mean} and std = {self.std} must be 3 numbers each, std > 0")

    @classmethod
    def for_size(cls, size: int, background: Background = WHITE) -> "Preprocess":
        """The usual preprocessing at `size`: no margin below 128 px, else ImageNet's 256/224 before the crop."""
        return cls(resize=size if size < 128 else round(size * 256 / 224), crop=size, background=background)

    def image(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize and crop one image of any mode.

        Shapes: PIL image -> uint8 [crop, crop, 3], sRGB in [0, 255], not normalised.
        """
        picture = to_rgb(image, self.background)
        width, height = picture.size
        short = min(width, height)
        if short != self.resize:
            # torchvision cuts the fraction off the long side; rounding would move the crop by a pixel
            size = (max(1, self.resize * width // short), max(1, self.resize * height // short))
            picture = picture.resize(size, _RESAMPLING[self.interpolation])
            width, height = size
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        if (width, height) != (self.crop, self.crop):
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        return np.array(picture)

    def batch(self, images: Iterable[Image.Image]) -> npt.NDArray[np.uint8]:
        """Resize and crop several images.

        Shapes: N PIL images -> uint8 [N, crop, crop, 3], sRGB in [0, 255], not normalised; N may be 0.
        """
        rows = [self.image(image) for image in images]
        return np.stack(rows) if rows else np.empty((0, self.crop, self.crop, 3), np.uint8)

    def normalise(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Turn pixels into what the encoder takes: (x / 255 - mean) / std.

        Shapes: uint8 [N, H, W, 3] in [0, 255] -> float32 [N, 3, H, W], contiguous.
        """
        scaled = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")
        scaled /= np.float32(255)
        scaled -= np.array(self.mean, np.float32)[:, None, None]
        scaled /= np.array(self.std, np.float32)[:, None, None]
        return scaled

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; `from_dict` takes them back.

        No background is no key: bundles that were written before there was one keep the id of their embedding space.
        """
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Preprocess":
        """Read what `to_dict` wrote.

        Raises: MvmrError for a missing or unknown key, or a value of the wrong type.
        """
        fields = tuple(cls.__dataclass_fields__)
        for key in values:
            if key not in fields:
                raise unknown("key in preprocessing", key, fields)
        missing = [key for key in fields if key not in values and key != "background"]
        if missing:
            raise MvmrError(f"preprocessing lacks {', '.join(missing)}; has {', '.join(values) or 'nothing'}")
        interpolation = str(values["interpolation"])
        if interpolation not in get_args(Interpolation):
            raise unknown("interpolation", interpolation, get_args(Interpolation))
        return cls(
            resize=_whole("resize", values["resize"]),
            crop=_whole("crop", values["crop"]),
            interpolation="bicubic" if interpolation == "bicubic" else "bilinear",
            mean=_triple("mean", values["mean"]),
            std=_triple("std", values["std"]),
            background=_background(values.get("background")),
        )


def _scales(mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    return min(std) > 0 and bool(np.isfinite([*mean, *std]).all())


def check_background(background: Background) -> None:
    """Refuse what is no colour.

    Raises: MvmrError.
    """
    if background is None:
        return
    three = isinstance(background, tuple) and len(background) == 3
    if not three or any(type(value) is not int or not 0 <= value <= 255 for value in background):
        raise MvmrError(f"background = {background} must be 3 whole numbers from 0 to 255, such as [255, 255, 255]")


def describe_background(background: Background) -> str:
    """Say in words what becomes of transparent images."""
    if background is None:
        return "without their alpha channel"
    return "laid on white" if background == WHITE else f"laid on RGB {', '.join(map(str, background))}"


def to_rgb(image: Image.Image, background: Background = WHITE) -> Image.Image:
    """Return the image upright, laid on `background`, in mode RGB; an RGB image without EXIF comes back as it is.

    Equals Pillow's `alpha_composite` of the upright image on the background. As `upright` otherwise.

    background: None leaves an alpha channel away instead, so that hidden colours show

    Raises: ValueError where Pillow has no conversion.
    """
    picture = upright(image)
    if picture.mode != "RGBA":
        return picture
    return picture.convert("RGB") if background is None else _lay_on(picture, background)


def upright(image: Image.Image) -> Image.Image:
    """Return the image with its EXIF orientation applied, 8 bits a channel, in mode RGB, or RGBA where it has alpha.

    16-bit values are divided by 257, so that 65535 becomes 255. 32-bit integers are taken as 16-bit ones when they
    fit, else scaled by their largest value. Floats are taken as [0, 1] when they fit, as [0, 255] when they fit, else
    scaled by their largest value; what is negative or not finite becomes 0. CMYK, Lab, palette, grey and
    black-and-white are converted by Pillow, a colour that the file declares transparent becomes alpha. An RGB image
    that needs none of this comes back as it is.

    Raises: ValueError where Pillow has no conversion.
    """
    picture = image if _orientation(image) == 1 else ImageOps.exif_transpose(image)
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _from_numbers(picture)
    if picture.has_transparency_data:
        return picture if picture.mode == "RGBA" else picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _lay_on(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    # a strip at a time: the whole would be in memory four times
    width, height = picture.size
    canvas = Image.new("RGB", picture.size)
    for top in range(0, height, _STRIP):
        strip = picture.crop((0, top, width, min(top + _STRIP, height)))
        below = Image.new("RGBA", strip.size, (*background, 255))
        canvas.paste(Image.alpha_composite(below, strip).convert("RGB"), (0, top))
    return canvas


def _from_numbers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    picture = Image.fromarray(_eight_bits(values)).convert("RGB")
    hidden = image.info.get("transparency")  # a 16-bit grey PNG may declare one value transparent
    if isinstance(hidden, int) and not isinstance(hidden, bool):
        picture.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return picture


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block raises a dozen kinds of error; the pixels are still good
        return 1


def _eight_bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    # a strip at a time: as float64, a whole photograph would take ten times the memory of its RGB
    strips = [slice(row, row + _STRIP) for row in range(0, len(values), _STRIP)]
    highest = max((float(_clean(values[strip]).max(initial=0.0)) for strip in strips), default=0.0)
    lowest_white = 65535.0 if values.dtype.kind != "f" else 255.0 if highest > 1 else 1.0
    white = max(lowest_white, highest)
    scaled = np.empty(values.shape, np.uint8)
    for strip in strips:
        scaled[strip] = np.rint(_clean(values[strip]) * (255.0 / white))
    return scaled


def _clean(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)


def _background(value: object) -> Background:
    if value is None:
        return None
    channels = list(value) if isinstance(value, list | tuple) else []
    if len(channels) != 3:
        raise MvmrError(f"preprocessing: background = {shorten(repr(value))} must be 3 whole numbers")
    red, green, blue = (_whole("background", channel) for channel in channels)
    return (red, green, blue)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MvmrError(f"preprocessing: {name} = {shorten(repr(value))} must be a whole number")
    return value


def _triple(name: str, value: object) -> tuple[float, float, float]:
    items = list(value) if isinstance(value, list | tuple) else []
    numbers = [float(item) for item in items if isinstance(item, int | float)]
    if not len(numbers) == len(items) == 3:
        raise MvmrError(f"preprocessing: {name} = {shorten(repr(value))} must be 3 numbers")
    return (numbers[0], numbers[1], numbers[2])
