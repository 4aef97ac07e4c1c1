"""Images in tar files, read from front to back: never unpacked, and only once."""

from __future__ import annotations

import glob
import hashlib
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from mvmr.data import decoding, remote
from mvmr.data.image_bytes import Rejected
from mvmr.data.readable import Content, Item, too_many_bytes
from mvmr.data.scan import printable
from mvmr.errors import MvmrError

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST = 1_000_000
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_MB = 10**6


@dataclass(frozen=True)
class Tar:
    """A tar file: path or address, size in bytes, and what changes when it does."""

    path: str
    size: int
    state: str


@dataclass(frozen=True, eq=False)
class Shards:
    """The images of tar files, in the order of the files and of their members; a `Source` (see `mvmr.data.listing`).

    Members with another ending than an image's are passed over, as are those whose name begins with ".". Progress is
    counted in MB, for only reading them tells how many images there are. A piece is made of whole tar files. A tar file
    that is damaged gives what comes before the damage, then one item that says so.

    most: bytes of a member, larger ones are not read
    """

    name: str
    fingerprint: str
    tars: tuple[Tar, ...]
    distant: bool
    most: float
    unit: str = "MB"
    other_formats: int = 0

    @property
    def total(self) -> int:
        """MB of all tar files."""
        return max(1, sum(tar.size for tar in self.tars) // _MB)

    def items(self, start: int = 0) -> Iterator[Item]:
        """The images from number `start` on; an item's bytes are in memory already."""
        number = before = 0
        for tar in self.tars:
            for path, content, position in _members(tar, start - number, self.most):
                if number >= start:
                    yield Item(path, partial(_same, content), (before + position) // _MB)
                number += 1
            before += tar.size

    def share(self, number: int, of: int) -> Shards:
        """Some whole tar files; raises MvmrError when there are fewer of them than pieces."""
        count = len(self.tars)
        if count < of:
            raise MvmrError(f"{self.name} has {count} tar files, too few for {of} pieces; give --shard a smaller n")
        piece = self.tars[count * number // of : count * (number + 1) // of]
        return Shards(self.name, self.fingerprint, piece, self.distant, self.most)


def is_tar(text: str) -> bool:
    """Say whether a path, address or pattern means tar files."""
    return text.lower().endswith(_ENDINGS)


def open_shards(text: str, most: float) -> Shards:
    """Find the tar files of ``shards:PATTERN`` or a pattern alone: a glob, with ``{000..009}`` or ``{a,b}`` in it.

    Raises: MvmrError for a file that is not there, or a pattern that matches none.
    """
    pattern = text.removeprefix("shards:")
    exists = not remote.is_address(pattern) and os.path.exists(os.path.expanduser(pattern))
    tars = [tar for expansion in ([pattern] if exists else _expand(pattern)) for tar in _find_tars(expansion)]
    if not tars:
        raise MvmrError(f"no tar file matches {pattern!r}; check the pattern, and quote it")
    return Shards(text, hashlib.sha256(repr(tars).encode()).hexdigest(), tuple(tars), remote.is_address(pattern), most)


def _expand(pattern: str) -> Iterator[str]:
    """What a shell makes of braces, leading zeros kept."""
    if not (braces := _BRACES.search(pattern)):
        yield pattern
        return
    first, last, several = braces.groups()
    options: list[str] = several.split(",") if several else []
    if not several:
        if int(last) - int(first) not in range(_MOST):
            raise MvmrError(f"{braces[0]} in {pattern!r} is no range of at most {_MOST} numbers; write {{000..009}}")
        options = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    for option in options:
        yield from _expand(pattern[: braces.start()] + option + pattern[braces.end() :])


def _find_tars(pattern: str) -> Iterator[Tar]:
    if remote.is_address(pattern):
        for address in remote.expand(pattern):
            yield Tar(address, *remote.info(address))
        return
    path = os.path.normpath(os.path.expanduser(pattern))
    for file in [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or [path]:
        try:
            status = os.stat(file)
        except OSError as error:
            if glob.has_magic(path):
                return
            raise MvmrError(f"no tar file {file}: {error.strerror}; check the pattern") from error
        yield Tar(file, status.st_size, f"{status.st_size} {status.st_mtime_ns}")


def _members(tar: Tar, skip: int, most: float) -> Iterator[tuple[str, Content, int]]:
    """Path, bytes (none at all for the first `skip`, where that saves reading), and the position in the tar file."""
    distant = remote.is_address(tar.path)
    name = printable(os.fsencode(tar.path))
    hops = not distant and tar.path.lower().endswith(".tar")  # all others only stream
    try:
        with _raw(tar.path) as raw, _open(raw, hops) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else it remembers each of millions
                if not _is_image(member):
                    continue
                if hops and member.offset_data + member.size > tar.size:  # found whether it is read or skipped
                    raise tarfile.ReadError("unexpected end of data")
                content = b"" if hops and skip > 0 else _content(archive, member, most)
                skip -= 1
                yield printable(os.fsencode(f"{tar.path}/{member.name}")), content, raw.tell()
    except _DAMAGE as error:
        damage = Rejected("damaged-tar", f"the rest of this tar file can't be read: {decoding.reason(error)}")
        yield name, damage, tar.size
    except Exception as error:
        if not distant and not isinstance(error, OSError):
            raise
        raise MvmrError(f"cannot read {name}: {decoding.reason(error)}; mend it and go on with --resume") from error


class _Strict(tarfile.TarInfo):
    """A header after the first that is broken, cut or missing is damage; tarfile takes it for the end of the file."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the end mark
                raise
            raise tarfile.ReadError(f"{error} where the next file or the end mark should be") from error


def _raw(path: str) -> Any:
    return remote.open_stream(path) if remote.is_address(path) else Path(path).open("rb")


def _open(raw: Any, hops: bool) -> tarfile.TarFile:
    if hops:
        return tarfile.open(fileobj=raw, mode="r:", tarinfo=_Strict)
    return tarfile.open(fileobj=raw, mode="r|*", tarinfo=_Strict)


def _is_image(member: tarfile.TarInfo) -> bool:
    name = os.path.basename(member.name)
    ending = os.path.splitext(os.fsencode(name))[1].lower()
    return not name.startswith(".") and not member.isdir() and ending in decoding.extensions()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, most: float) -> Content:
    if not member.isreg():
        return Rejected("unreadable", "a link inside a tar file; make it with `tar --dereference --hard-dereference`")
    if member.size > most:
        return too_many_bytes(member.size, most)
    file: Any = archive.extractfile(member)
    content: bytes = file.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _same(content: Content) -> Content:
    return content
