"""`ImageSet`: images by number, with labels that are read only when somebody asks for them."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr.bundles.preprocess import WHITE, Background, to_rgb

Split = Literal["train", "test", "unlabelled"]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Skipped:
    """A file left out, and why; `key` and `reason` are one line of valid UTF-8 each."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}\t{self.reason}"


class Source(Protocol):
    """Where the images of an `ImageSet` come from; must be picklable, for workers are started with a copy.

    load: image `index`, upright, in mode RGB, or RGBA where it has alpha
    """

    @property
    def keys(self) -> Sequence[str]: ...

    def load(self, index: int) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images numbered 0 to N - 1, in an order that never changes while the data stay the same.

    Training takes images only: `labels` is computed at its first reading, which training never does.
    May be pickled and sent to worker processes.

    name: the data as the user typed it, "stl10:/data" or "photos/"
    split: "train", "test" or "unlabelled"
    classes: names of the classes, None when there are no labels
    background: what shows through transparent images, as a bundle's preprocessing says it
    native_size: side in pixels when all images are squares of one size, else None
    short_sides: int32 [N], the short side of each image in pixels; None when `native_size` says it
    fingerprint: hex sha256 that changes when an image is added, removed, renamed or rewritten
    source: all images the data have; chosen: int64 [N], which of them are in this set, None for all
    read_labels: computes the labels of all images of `source`
    skipped: what could not be read and is not among the N
    """

    name: str
    split: Split
    source: Source = field(repr=False)
    fingerprint: str
    read_labels: Callable[[], Labels] | None = field(default=None, repr=False)
    classes: tuple[str, ...] | None = None
    background: Background = WHITE
    native_size: int | None = None
    short_sides: npt.NDArray[np.int32] | None = field(default=None, repr=False)
    skipped: tuple[Skipped, ...] = ()
    chosen: npt.NDArray[np.int64] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.source.keys) if self.chosen is None else len(self.chosen)

    def load(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB, upright (EXIF orientation applied), laid on the background.

        Raises: IndexError outside 0 to N - 1; MvmrError when the file cannot be read (any more).
        """
        return to_rgb(self.source.load(self._at(index)), self.background)

    @property
    def keys(self) -> Sequence[str]:
        """The name of each image: its path below the folder, or "test/00012". One line of valid UTF-8 each."""
        return self.source.keys if self.chosen is None else Names(self.chosen, self.source.keys.__getitem__)

    @cached_property
    def labels(self) -> Labels | None:
        """int64 [N], numbers into `classes`; None when there are none.

        For voc07 int64 [N, 20] in VOC's own code: 1 present, -1 absent, 0 present only as "difficult" (not counted).
        """
        if self.read_labels is None:
            return None
        labels = self.read_labels()
        return labels if self.chosen is None else labels[self.chosen]

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> "ImageSet":
        """Return the images at `indices`, in that order.

        Raises: IndexError for a number outside 0 to N - 1.
        """
        numbers = np.asarray(indices, dtype=np.int64).reshape(-1)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"subset of {self.name}: numbers must lie in 0 to {len(self) - 1}")
        digest = hashlib.sha256(self.fingerprint.encode() + numbers.astype("<i8").tobytes()).hexdigest()
        return replace(
            self,
            chosen=numbers if self.chosen is None else self.chosen[numbers],
            short_sides=None if self.short_sides is None else self.short_sides[numbers],
            fingerprint=digest,
        )

    def smaller_than(self, size: int) -> int:
        """Count the images whose short side is below `size` pixels: those that will be enlarged."""
        if self.short_sides is not None:
            return int((self.short_sides < size).sum())
        return len(self) if self.native_size is not None and self.native_size < size else 0

    def describe(self, size: int) -> str:
        """Return one line for the user: how many images, how many get enlarged to `size`, how many were skipped."""
        parts = [f"{self.name}: {len(self):,} images"]
        if self.classes is not None and self.split != "unlabelled":
            parts.append(f"{len(self.classes)} classes")
        if small := self.smaller_than(size):
            parts.append(f"{small:,} smaller than {size} px (enlarged)")
        if self.skipped:
            parts.append(f"{len(self.skipped):,} skipped")
        return ", ".join(parts)

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {self.name}, which has {len(self)}")
        return index if self.chosen is None else int(self.chosen[index])


@dataclass(frozen=True, eq=False)
class Arrays:
    """A source in memory: uint8 [N, S, S, 3] and the name of each image."""

    pixels: npt.NDArray[np.uint8]
    keys: Sequence[str]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


@dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """Names made of `items` when they are asked for: no string is kept for each of millions."""

    items: Sequence[Any] | npt.NDArray[np.int64]
    make: Callable[[Any], str]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self.make(item) for item in self.items[index]]
        return self.make(self.items[index])


def numbered_names(prefix: str, total: int) -> Names:
    """The names "train/00000", "train/00001", ..."""
    return Names(range(total), partial(_number, prefix))


def _number(prefix: str, index: int) -> str:
    return f"{prefix}/{index:05d}"


def background_mark(background: Background) -> tuple[bytes, ...]:
    """What a fingerprint of images that may be transparent holds of their background: without one, nothing."""
    return () if background is None else (f"background {background}".encode(),)


def digest(parts: Iterable[bytes]) -> str:
    """Return the hex sha256 of `parts`, each prefixed with its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()
