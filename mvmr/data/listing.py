"""Images that are read from front to back, as a batch job does: from a description of any kind to a `Source`."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from mvmr.data import grammar, remote, tar
from mvmr.data.folder import Opening
from mvmr.data.grammar import Described
from mvmr.data.image_bytes import LIMITS, Limits
from mvmr.data.image_set import ImageSet
from mvmr.data.opening import open_description
from mvmr.data.readable import Content, Listed, LocalFile, Source, note_other_formats
from mvmr.data.scan import Files, Packed, Scan, list_names, match, of_formats, printable, read_list, scan, stat_files
from mvmr.data.table import read_table
from mvmr.errors import MvmrError


def open_source(images: str, limits: Limits = LIMITS) -> Source:
    """Find the images that `images` describes.

    images: any kind of `mvmr.data.grammar`: a folder (looked through to its leaves, names with an image's ending, in
        the order of their bytes); a glob; a list, whose lines are paths relative to its own folder, or addresses; tar
        files; an address of fsspec's, folder, glob or tar files; one image; or the name of a data set, of which all
        images are read, those to train on first.
    limits: of an image: larger files are not read, and in folders, globs and addresses images of other formats are
        passed over.

    Raises: MvmrError, one line, where there is nothing of the kind or no image in it, or a package lacks.
    """
    description = grammar.parse(images)
    return _SOURCES[description.kind.name](description, limits)


def _folder(description: Described, limits: Limits) -> Source:
    name, root = description.text, os.fsencode(os.path.normpath(description.location))
    contents: Scan = scan(root, formats=limits.formats)
    lost = tuple((os.path.join(printable(root), skipped.key), skipped.reason) for skipped in contents.unlisted)
    if not len(contents.files.names) and not lost:
        count = contents.other_files
        reason = f"none of its {count} files ends as an image does" if count else "it is empty"
        cause = f"{reason}; give the folder that holds them (tar files: shards:PATTERN)"
        raise MvmrError(f"no images in {name}: {note_other_formats(contents.other_formats) or cause}")
    return _files(name, root, contents.files.names, limits, lost=lost, other_formats=contents.other_formats)


def _glob(description: Described, limits: Limits) -> Source:
    files, other_formats = match(os.fsencode(os.path.normpath(description.location)), limits.formats)
    return _files(description.text, b"", Packed.of(files), limits, other_formats=other_formats)


def _file(description: Described, limits: Limits) -> Source:
    return _files(description.text, b"", Packed.of([os.fsencode(os.path.normpath(description.location))]), limits)


def _list(description: Described, limits: Limits) -> Source:
    path = os.fsencode(os.path.normpath(description.location))
    return _lines(description.text, read_list(path), os.path.dirname(path), limits)


def _table(description: Described, limits: Limits) -> Source:
    table = read_table(description.location)
    return _files(description.text, table.folder, table.names, limits)


def _standard_input(description: Described, limits: Limits) -> Source:
    return _lines(description.text, list_names(sys.stdin.buffer.read(), "standard input"), b"", limits)


def _shards(description: Described, limits: Limits) -> Source:
    return tar.open_shards(description.text, limits.size)


def _address(description: Described, limits: Limits) -> Source:
    address = description.text
    fs, files = remote.find(address)
    images, other_formats = of_formats(limits.formats, files, lambda file: os.fsencode(file[0]))
    if not images:
        cause = "no name there ends as an image's does; check the address"
        raise MvmrError(f"no images at {address}: {note_other_formats(other_formats) or cause}")
    names = Packed.of(os.fsencode(path) for path, _ in images)
    return Listed(
        name=address,
        fingerprint=fingerprint(names, repr([stamp for _, stamp in images])),
        names=names,
        key=lambda path: printable(os.fsencode(fs.unstrip_protocol(os.fsdecode(path)))),
        read=lambda path: partial(remote.read, fs, os.fsdecode(path), limits.size),
        distant=True,
        other_formats=other_formats,
    )


def _data_set(description: Described, limits: Limits) -> Source:
    opening = Opening(name=description.text, split="unlabelled", background=None, max_unreadable=1, check=False)
    sets = (open_description(description, opening), open_description(description, replace(opening, split="test")))
    first = len(sets[0])

    def image(number: int) -> tuple[ImageSet, int]:
        return (sets[0], number) if number < first else (sets[1], number - first)

    def key(number: int) -> str:
        images, index = image(number)
        return images.keys[index]

    return Listed(
        name=description.text,
        fingerprint=fingerprint(*(images.fingerprint for images in sets)),
        names=range(sum(map(len, sets))),
        key=key,
        read=lambda number: _reader(*image(number), limits),
        lost=tuple((skipped.key, skipped.reason) for images in sets for skipped in images.skipped),
    )


def _reader(images: ImageSet, index: int, limits: Limits) -> Callable[[], Content]:
    """What reads an image of a data set: its file, or where it lies among others in one file, a file made of it."""
    if isinstance(images.source, Files):
        number = index if images.chosen is None else int(images.chosen[index])
        return LocalFile(images.source.path(number), limits.size)
    return partial(_as_file, images, index)


def _as_file(images: ImageSet, index: int) -> bytes:
    buffer = io.BytesIO()
    images.load(index).save(buffer, "BMP")  # without loss, and the same bytes from any release of any library
    return buffer.getvalue()


def _files(
    name: str,
    root: bytes,
    names: Sequence[bytes],
    limits: Limits,
    *,
    lost: tuple[tuple[str, str], ...] = (),
    other_formats: int = 0,
) -> Listed[bytes]:
    files = stat_files(root, names)
    return Listed(
        name=name,
        fingerprint=fingerprint(root, names, files.sizes, files.times, repr(lost)),
        names=names,
        key=lambda path: printable(os.path.join(root, path)),
        read=lambda path: LocalFile(os.path.join(root, path), limits.size),
        lost=lost,
        other_formats=other_formats,
    )


def _lines(name: str, names: Packed, root: bytes, limits: Limits) -> Listed[bytes]:
    addresses = sum(b"://" in name for name in names)
    if not addresses:
        return _files(name, root, names, limits)
    if addresses < len(names):
        source = "standard input" if name == "-" else name
        raise MvmrError(f"the list {source} mixes {addresses} addresses with {len(names) - addresses} paths; split it")
    fs = remote.file_system(names[0].decode("utf-8", "replace"))
    return Listed(
        name=name,
        fingerprint=fingerprint(names),
        names=names,
        key=printable,
        read=lambda address: partial(remote.read, fs, address.decode("utf-8", "surrogateescape"), limits.size),
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


_SOURCES: dict[str, Callable[[Described, Limits], Source]] = {
    "folder": _folder,
    "glob": _glob,
    "list": _list,
    "table": _table,
    "file": _file,
    "stdin": _standard_input,
    "shards": _shards,
    "address": _address,
    **dict.fromkeys((*grammar.STANDARD, *grammar.SAMPLES), _data_set),
}
