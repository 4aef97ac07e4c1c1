"""Where a batch job's images come from: a folder, a glob, a list, tar shards, any of them behind an fsspec address."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from mvmr import decoding
from mvmr.data.scan import Packed, Scan, printable, scan, stat_files
from mvmr.errors import MvmrError
from mvmr.serve import remote, shards
from mvmr.serve.decode import LIMITS, Rejected
from mvmr.serve.items import Content, Item, LocalFile, Source


@dataclass(frozen=True, eq=False)
class Listed:
    """Images known by name; a `Source`.

    key, read: the path as text of one of `names`, and what reads it
    lost: path and reason of what could not even be listed; it comes last
    """

    name: str
    fingerprint: str
    names: Sequence[bytes]
    key: Callable[[bytes], str]
    read: Callable[[bytes], Callable[[], Content]]
    distant: bool = False
    lost: tuple[tuple[str, str], ...] = ()
    chosen: range | None = None
    unit: str = "img"

    @property
    def numbers(self) -> range:
        """Which of the names and the lost are in this source."""
        return range(len(self.names) + len(self.lost)) if self.chosen is None else self.chosen

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

    def share(self, number: int, of: int) -> Listed:
        """A run of neighbours, 12 or 13 images for 100 in 8 pieces; raises MvmrError for more pieces than images."""
        here = self.numbers
        if len(here) < of:
            raise MvmrError(f"{self.name} has {len(here)} images, too few for {of} pieces; give --shard a smaller n")
        return replace(self, chosen=here[len(here) * number // of : len(here) * (number + 1) // of])


def open_source(images: str, most: float = LIMITS.size) -> Source:
    """Find the images that `images` describes.

    images: a folder (looked through to its leaves, names with an image's ending, in the order of their bytes); a glob
        such as ``'photos/**/*.jpg'``; a text file with a path a line, relative to its own folder, or with an address
        a line; ``-`` for such a list on standard input; tar files by name or ``shards:PATTERN``, where a pattern may be
        a glob and hold ``{000..009}`` or ``{a,b}``; an address of fsspec's (``s3://bucket/prefix``), folder, glob or
        tar files; or one image.
    most: bytes of an image; a larger one is not read.

    Raises: MvmrError, one line, where there is nothing of the kind or no image in it, or a package lacks.
    """
    if images == "-":
        return _lines(images, sys.stdin.buffer.read(), b"", most)
    if images.startswith("shards:") or shards.is_tar(images):
        return shards.open_shards(images, most)
    if remote.is_address(images):
        return _remote(images, most)
    typed = os.fsencode(os.path.normpath(os.path.expanduser(images)))
    if os.path.isdir(typed):
        return _folder(images, typed, most)
    if os.path.isfile(typed):
        if images.lower().endswith((".txt", ".lst", ".list")):
            return _lines(images, _whole(typed), os.path.dirname(typed), most)
        return _files(images, b"", Packed.of([typed]), most)
    if glob.has_magic(typed):
        found = (name for name in glob.iglob(typed, recursive=True) if _is_image(name) and os.path.isfile(name))
        return _files(
            images, b"", Packed.of(sorted(found)), most, none=f"no image file matches {images}; quote the pattern"
        )
    raise MvmrError(
        f"no images at {images}: there is no such folder or file; give a folder, a quoted glob, a .txt list of paths, "
        "shards:PATTERN or an address such as s3://bucket/prefix"
    )


def _folder(name: str, root: bytes, most: float) -> Listed:
    found: Scan = scan(root)
    lost = tuple((os.path.join(printable(root), skipped.key), skipped.reason) for skipped in found.unlisted)
    if not len(found.files.names) and not lost:
        others = f"none of its {found.others} files ends as an image does" if found.others else "it is empty"
        raise MvmrError(f"no images in {name}: {others}; give the folder that holds them (tar files: shards:PATTERN)")
    return _files(name, root, found.files.names, most, lost=lost)


def _files(
    name: str,
    root: bytes,
    names: Sequence[bytes],
    most: float,
    *,
    lost: tuple[tuple[str, str], ...] = (),
    none: str = "",
) -> Listed:
    if not len(names) and not lost:
        raise MvmrError(none or f"no images in {name}: it is empty")
    files = stat_files(root, names)
    return Listed(
        name=name,
        fingerprint=fingerprint(root, names, files.sizes, files.times, repr(lost)),
        names=names,
        key=lambda each: printable(os.path.join(root, each)),
        read=lambda each: LocalFile(os.path.join(root, each), most),
        lost=lost,
    )


def _lines(name: str, text: bytes, root: bytes, most: float) -> Listed:
    told = "standard input" if name == "-" else name
    names = Packed.of(line for each in text.split(b"\n") if (line := each.strip(b"\r\t ")))
    none = f"no images in the list {told}: it has no lines; write a path on each"
    if any(b"\x00" in each for each in names):
        raise MvmrError(f"{told} is not a list of paths: it holds zero bytes; give a text file with a path a line")
    addresses = sum(b"://" in each for each in names)
    if not addresses:
        return _files(name, root, names, most, none=none)
    if addresses < len(names):
        raise MvmrError(f"the list {told} mixes {addresses} addresses with {len(names) - addresses} paths; split it")
    fs = remote.file_system(names[0].decode("utf-8", "replace"))
    return Listed(
        name=name,
        fingerprint=fingerprint(names),
        names=names,
        key=printable,
        read=lambda each: partial(remote.read, fs, each.decode("utf-8", "surrogateescape"), most),
        distant=True,
    )


def _remote(address: str, most: float) -> Listed:
    fs, found = remote.find(address, decoding.extensions())
    if not found:
        raise MvmrError(f"no images at {address}: no name there ends as an image's does; check the address")
    names = Packed.of(os.fsencode(path) for path, _ in found)
    return Listed(
        name=address,
        fingerprint=fingerprint(names, repr([stamp for _, stamp in found])),
        names=names,
        key=lambda each: printable(os.fsencode(fs.unstrip_protocol(os.fsdecode(each)))),
        read=lambda each: partial(remote.read, fs, os.fsdecode(each), most),
        distant=True,
    )


def fingerprint(*parts: Sequence[bytes] | npt.NDArray[np.int64] | bytes | str) -> str:
    """Hex sha256 of names, arrays and text."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            pieces = [part.encode("utf-8", "surrogateescape")]
        elif isinstance(part, np.ndarray | bytes):
            pieces = [bytes(part)]
        elif isinstance(part, Packed):
            pieces = [part.letters, part.ends.tobytes()]
        else:
            pieces = list(part)
        for piece in pieces:
            total.update(len(piece).to_bytes(8, "little"))
            total.update(piece)
    return total.hexdigest()


def _is_image(name: bytes) -> bool:
    return os.path.splitext(name)[1].lower() in decoding.extensions()


def _whole(path: bytes) -> bytes:
    content = LocalFile(path, math.inf)()
    if isinstance(content, Rejected):
        raise MvmrError(f"cannot read the list {printable(path)}: {content.reason}; check the path")
    return content
