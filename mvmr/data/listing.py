"""Where a batch job's images come from: a folder, a glob, a list, tar shards, any of them behind an fsspec address."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mvmr.data import decoding, remote, tar
from mvmr.data.image_bytes import LIMITS, Limits, Rejected
from mvmr.data.readable import Content, Item, LocalFile, Source
from mvmr.data.scan import Packed, Scan, printable, scan, stat_files
from mvmr.errors import MvmrError

T = TypeVar("T")


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
    other_formats: int = 0

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


def open_source(images: str, limits: Limits = LIMITS) -> Source:
    """Find the images that `images` describes.

    images: a folder (looked through to its leaves, names with an image's ending, in the order of their bytes); a glob
        such as ``'photos/**/*.jpg'``; a text file with a path a line, relative to its own folder, or with an address
        a line; ``-`` for such a list on standard input; tar files by name or ``shards:PATTERN``, where a pattern may be
        a glob and hold ``{000..009}`` or ``{a,b}``; an address of fsspec's (``s3://bucket/prefix``), folder, glob or
        tar files; or one image.
    limits: of an image: larger files are not read, and in folders, globs and addresses images of other formats are
        passed over.

    Raises: MvmrError, one line, where there is nothing of the kind or no image in it, or a package lacks.
    """
    most = limits.size
    if images == "-":
        return _lines(images, sys.stdin.buffer.read(), b"", most)
    if images.startswith("shards:") or tar.is_tar(images):
        return tar.open_shards(images, most)
    if remote.is_address(images):
        return _remote(images, limits)
    typed = os.fsencode(os.path.normpath(os.path.expanduser(images)))
    if os.path.isdir(typed):
        return _folder(images, typed, limits)
    if os.path.isfile(typed):
        if images.lower().endswith((".txt", ".lst", ".list")):
            return _lines(images, _whole(typed), os.path.dirname(typed), most)
        return _files(images, b"", Packed.of([typed]), most)
    if glob.has_magic(typed):
        found, others = _of_formats(limits.formats, filter(os.path.isfile, glob.iglob(typed, recursive=True)), bytes)
        if not found:
            raise MvmrError(f"no image file matches {images}; {passed_over(others) or 'quote the pattern'}")
        return _files(images, b"", Packed.of(sorted(found)), most, other_formats=others)
    raise MvmrError(
        f"no images at {images}: there is no such folder or file; give a folder, a quoted glob, a .txt list of paths, "
        "shards:PATTERN or an address such as s3://bucket/prefix"
    )


def _folder(name: str, root: bytes, limits: Limits) -> Listed:
    found: Scan = scan(root, formats=limits.formats)
    lost = tuple((os.path.join(printable(root), skipped.key), skipped.reason) for skipped in found.unlisted)
    if not len(found.files.names) and not lost:
        others = f"none of its {found.others} files ends as an image does" if found.others else "it is empty"
        cause = f"{others}; give the folder that holds them (tar files: shards:PATTERN)"
        raise MvmrError(f"no images in {name}: {passed_over(found.other_formats) or cause}")
    return _files(name, root, found.files.names, limits.size, lost=lost, other_formats=found.other_formats)


def _files(
    name: str,
    root: bytes,
    names: Sequence[bytes],
    most: float,
    *,
    lost: tuple[tuple[str, str], ...] = (),
    other_formats: int = 0,
) -> Listed:
    files = stat_files(root, names)
    return Listed(
        name=name,
        fingerprint=fingerprint(root, names, files.sizes, files.times, repr(lost)),
        names=names,
        key=lambda each: printable(os.path.join(root, each)),
        read=lambda each: LocalFile(os.path.join(root, each), most),
        lost=lost,
        other_formats=other_formats,
    )


def _lines(name: str, text: bytes, root: bytes, most: float) -> Listed:
    told = "standard input" if name == "-" else name
    names = Packed.of(line for each in text.split(b"\n") if (line := each.strip(b"\r\t ")))
    if not len(names):
        raise MvmrError(f"no images in the list {told}: it has no lines; write a path on each")
    if any(b"\x00" in each for each in names):
        raise MvmrError(f"{told} is not a list of paths: it holds zero bytes; give a text file with a path a line")
    addresses = sum(b"://" in each for each in names)
    if not addresses:
        return _files(name, root, names, most)
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


def _remote(address: str, limits: Limits) -> Listed:
    fs, files = remote.find(address)
    found, others = _of_formats(limits.formats, files, lambda file: os.fsencode(file[0]))
    if not found:
        cause = "no name there ends as an image's does; check the address"
        raise MvmrError(f"no images at {address}: {passed_over(others) or cause}")
    names = Packed.of(os.fsencode(path) for path, _ in found)
    return Listed(
        name=address,
        fingerprint=fingerprint(names, repr([stamp for _, stamp in found])),
        names=names,
        key=lambda each: printable(os.fsencode(fs.unstrip_protocol(os.fsdecode(each)))),
        read=lambda each: partial(remote.read, fs, os.fsdecode(each), limits.size),
        distant=True,
        other_formats=others,
    )


def passed_over(count: int) -> str:
    """Say that so many images are of formats that are not read, and what to do about it; nothing for none."""
    return f"images of other formats are passed over: {count}; --format adds formats" if count else ""


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


def _of_formats(formats: tuple[str, ...], files: Iterable[T], name_of: Callable[[T], bytes]) -> tuple[list[T], int]:
    """Those of the files whose names end as images of these formats do, and how many are images of others."""
    found, others = [], 0
    for file in files:
        ending = os.path.splitext(name_of(file))[1].lower()
        if ending in decoding.extensions(formats):
            found.append(file)
        else:
            others += ending in decoding.extensions()
    return found, others


def _whole(path: bytes) -> bytes:
    content = LocalFile(path, math.inf)()
    if isinstance(content, Rejected):
        raise MvmrError(f"cannot read the list {printable(path)}: {content.reason}; check the path")
    return content
