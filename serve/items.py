"""What a batch job reads: images one after the other, whatever they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Self

from mvmr.serve.decode import Rejected

Content = bytes | Rejected


class Item(NamedTuple):
    """One image, not yet read.

    path: text that opens it from here (odd characters escaped); done: how far its source has come with it, in its unit
    read: gives the file's bytes, or says why not; may be called in another thread, in any order
    """

    path: str
    read: Callable[[], Content]
    done: int


class Source(Protocol):
    """Images in an order that stays the same while they do.

    name: as the user typed it; fingerprint: hex sha256 of names, sizes and times, where there are any
    unit, total: what progress is counted in (``img``, or ``MB`` of tar files), and how many of it there are
    distant: reading waits for a network, so that more threads than cores are of use
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

    def items(self, start: int = 0) -> Iterator[Item]:
        """The images from number `start` on."""

    def share(self, number: int, of: int) -> Self:
        """The piece `number` (from 0) of `of` pieces of nearly one size; in order, they make up the whole."""


def too_many_bytes(size: int, most: float) -> Rejected:
    """What becomes of a file that is too large."""
    return Rejected("too-many-bytes", f"{size:,} bytes, more than the {most / 2**20:g} MiB allowed")
