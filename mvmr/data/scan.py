"""Finding image files, in a folder tree, by a glob or in a list: one pass, lean enough for millions of files."""

import glob
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr.data import decoding
from mvmr.data.image_set import Names, Skipped
from mvmr.data.readable import note_other_formats
from mvmr.errors import MvmrError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Packed(Sequence[bytes]):
    """Names in one piece of memory: a million cost their letters and 8 bytes each, also in worker processes."""

    letters: bytes
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Packed":
        letters, ends = bytearray(), array("q")
        for name in names:
            letters += name
            ends.append(len(letters))
        return cls(bytes(letters), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self.ends.tolist():
            yield self.letters[start:end]
            start = end

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return self.letters[int(self.ends[position - 1]) if position else 0 : int(self.ends[position])]


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below `root`: an image source (see `ImageSet`).

    names: paths below root, "/" between folders, in sorted order
    sizes, times: int64 [N], bytes and nanoseconds of the last change; -1 where the file could not be looked at
    """

    root: bytes
    names: Sequence[bytes]
    sizes: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]

    @property
    def keys(self) -> Names:
        """Names as text that is safe to print and to write, one line each."""
        return Names(self.names, printable)

    def path(self, index: int) -> bytes:
        return os.path.join(self.root, self.names[index])

    def load(self, index: int) -> Image.Image:
        """Return the image in mode RGB or RGBA. Raises: MvmrError when the file cannot be read."""
        try:
            return decoding.read(self.path(index))
        except Exception as error:  # Pillow's plugins raise whatever their parsing meets
            raise MvmrError(
                f"cannot read image {printable(self.path(index))}: {decoding.reason(error)}; "
                "it was readable when the data were opened; run again to leave it out"
            ) from error


@dataclass
class Scan:
    """What one pass over a folder tree found."""

    files: Files
    other_files: int = 0  # files without an image's ending
    other_formats: int = 0  # images of formats that were not asked for
    unlisted: list[Skipped] = field(default_factory=list)  # folders that could not be listed


def scan(root: bytes, below: bytes = b"", formats: tuple[str, ...] | None = None) -> Scan:
    """Find the image files (by ending, any case) in folder `root`/`below`, at any depth.

    formats: Pillow's names of those that count; None takes all that it reads

    Names that begin with "." are passed over, as are the likes of pipes. A link to a folder elsewhere is followed,
    each folder once; a link to a folder inside or around this one adds nothing, so loops end.
    """
    start = os.path.join(root, below) if below else root
    contents = Scan(stat_files(root, ()))
    names = Packed.of(_walk(start, below + b"/" if below else b"", decoding.extensions(formats), contents))
    contents.files = stat_files(root, names)
    return contents


def match(pattern: bytes, formats: tuple[str, ...] | None = None) -> tuple[list[bytes], int]:
    """Find the image files that a glob matches, in the order of their bytes, and count images of other formats.

    Raises: MvmrError for none.
    """
    files, other_formats = of_formats(formats, filter(os.path.isfile, glob.iglob(pattern, recursive=True)), bytes)
    if not files:
        cause = note_other_formats(other_formats) or "quote the pattern"
        raise MvmrError(f"no image file matches {printable(pattern)}; {cause}")
    return sorted(files), other_formats


def read_list(path: bytes) -> Packed:
    """Read a list of images: a path a line.

    Raises: MvmrError for a file that can't be read or is no list.
    """
    try:
        with decoding.open_file(path) as file:
            return list_names(file.read(), printable(path))
    except OSError as error:
        raise MvmrError(f"cannot read the list {printable(path)}: {decoding.reason(error)}; check the path") from error


def list_names(text: bytes, name: str) -> Packed:
    """The lines of a list that are not empty; raises MvmrError for none, or for what is no text."""
    names = Packed.of(path for line in text.split(b"\n") if (path := line.strip(b"\r\t ")))
    if not len(names):
        raise MvmrError(f"no images in the list {name}: it has no lines; write a path on each")
    if any(b"\x00" in path for path in names):
        raise MvmrError(
            f"{name} is not a list of paths: it holds zero bytes; give a text file with a path a line (a Parquet "
            "file with a column of paths: table:FILE)"
        )
    return names


def of_formats(
    formats: tuple[str, ...] | None, files: Iterable[T], name_of: Callable[[T], bytes]
) -> tuple[list[T], int]:
    """Those of the files whose names end as images of these formats do, and how many are images of others."""
    images, other_formats = [], 0
    for file in files:
        ending = os.path.splitext(name_of(file))[1].lower()
        if ending in decoding.extensions(formats):
            images.append(file)
        else:
            other_formats += ending in decoding.extensions()
    return images, other_formats


def stat_files(root: bytes, names: Sequence[bytes]) -> Files:
    """Return `Files` for known names, with each file's size and time."""
    sizes, times = array("q"), array("q")
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))
            sizes.append(status.st_size)
            times.append(status.st_mtime_ns)
        except OSError:
            sizes.append(-1)
            times.append(-1)
    return Files(root, names, np.array(sizes, dtype=np.int64), np.array(times, dtype=np.int64))


def printable(name: bytes) -> str:
    """Return a file name as one line of valid text; distinct names stay distinct.

    Bytes that are not UTF-8 and characters that do not print appear as escapes, a backslash as two.
    """
    text = name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _walk(start: bytes, prefix: bytes, endings: frozenset[bytes], contents: Scan) -> Iterator[bytes]:
    home = os.path.join(os.path.realpath(start), b"")
    seen: set[tuple[int, int]] = set()
    waiting = [prefix]  # names still to visit, the next one last; a folder ends in "/"
    cut = len(prefix)
    while waiting:
        name = waiting.pop()
        if not name.endswith(b"/") and name:
            yield name
            continue
        path = os.path.join(start, name[cut:])
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = _list(path, home, endings, contents)
        except OSError as error:
            contents.unlisted.append(Skipped(printable(name) or ".", f"folder not listed: {decoding.reason(error)}"))
            continue
        # a folder sorts as its name and "/", which puts whole paths in the order of their bytes
        waiting.extend(name + entry for entry in sorted(inside, reverse=True))


def _list(path: bytes, home: bytes, endings: frozenset[bytes], contents: Scan) -> list[bytes]:
    inside = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                if not (entry.is_symlink() and _leads_back(entry.path, home)):
                    inside.append(entry.name + b"/")
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if ending not in decoding.extensions() or not (entry.is_file() or entry.is_symlink()):
                contents.other_files += 1
            elif ending in endings:
                inside.append(entry.name)
            else:
                contents.other_formats += 1
    return inside


def _leads_back(link: bytes, home: bytes) -> bool:
    target = os.path.join(os.path.realpath(link), b"")
    return target.startswith(home) or home.startswith(target)
