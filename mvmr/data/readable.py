"""What a batch job reads: images one after the other, whatever they lie in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from mvmr.data import decoding
from mvmr.data.image_bytes import Rejected
from mvmr.errors import MvmrError

Content = bytes | Rejected
N = TypeVar("N")


@dataclass(frozen=True)
class LocalFile:
    """A file that is here, and read when this is called; not more than `most` bytes of it are taken."""

    path: bytes
    most: float

    def __call__(self) -> Content:
        """Its bytes, or why not."""
        try:
            with decoding.open_file(self.path) as file:
                if (size := os.fstat(file.fileno()).st_size) > self.most:
                    return too_many_bytes(size, self.most)
                return file.read()
        except OSError as error:
            return Rejected("unreadable", decoding.reason(error))


class Item(NamedTuple):
    """One image, not yet read.

    path: text that opens it from here (odd characters escaped); done: how far its source has come with it, in its unit
    read: gives the file's bytes, or says why not; may be called in another thread, in any order, and where it is a
        `LocalFile` in another process
    """

    path: str
    read: Callable[[], Content]
    done: int


class Source(Protocol):
    """Images in an order that stays the same while they do.

    name: as the user typed it; fingerprint: hex sha256 of names, sizes and times, where there are any
    unit, total: what progress is counted in (``img``, or ``MB`` of tar files), and how many of it there are
    distant: reading waits for a network, so that more threads than cores are of use
    other_formats: images that were passed over, being of formats that are not read
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def total(self) -> int: ...
    @property
    def distant(self) -> bool: ...
    @property
    def other_formats(self) -> int: ...

    def items(self, start: int = 0) -> Iterator[Item]:
        """The images from number `start` on."""

    def share(self, number: int, of: int) -> Self:
        """The piece `number` (from 0) of `of` pieces of nearly one size; in order, they make up the whole."""


@dataclass(frozen=True, eq=False)
class Listed(Generic[N]):
    """Images known before any is read, by name or by number; a `Source`.

    key, read: the path as text of one of `names`, and what reads it
    lost: path and reason of what could not even be listed; it comes last
    """

    name: str
    fingerprint: str
    names: Sequence[N]
    key: Callable[[N], str]
    read: Callable[[N], Callable[[], Content]]
    distant: bool = False
    lost: tuple[tuple[str, str], ...] = ()
    piece: range | None = None
    unit: str = "img"
    other_formats: int = 0

    @property
    def numbers(self) -> range:
        """Which of the names and the lost are in this source."""
        return range(len(self.names) + len(self.lost)) if self.piece is None else self.piece

    @property
    def total(self) -> int:
        """How many there are, readable or not."""
        return len(self.numbers)

    def items(self, start: int = 0) -> Iterator[Item]:
        """The images from number `start` on."""
        for done, number in enumerate(self.numbers[start:], start + 1):
            if number < len(self.names):
                name = self.names[number]
                yield Item(self.key(name), self.read(name), done)
            else:
                path, reason = self.lost[number - len(self.names)]
                yield Item(path, partial(Rejected, "unreadable", reason), done)

    def share(self, number: int, of: int) -> Self:
        """A run of neighbours, 12 or 13 images for 100 in 8 pieces; raises MvmrError for more pieces than images."""
        here = self.numbers
        if len(here) < of:
            raise MvmrError(f"{self.name} has {len(here)} images, too few for {of} pieces; give --shard a smaller n")
        return replace(self, piece=here[len(here) * number // of : len(here) * (number + 1) // of])


def too_many_bytes(size: int, most: float) -> Rejected:
    """What becomes of a file that is too large."""
    return Rejected("too-many-bytes", f"{size:,} bytes, more than the {most / 2**20:g} MiB allowed (--max-file-mb)")


def note_other_formats(count: int) -> str:
    """Say that so many images are of formats that are not read, and what to do about it; nothing for none."""
    return f"images of other formats are passed over: {count}; --format adds formats" if count else ""
