"""Rows computed once and kept, memory-mapped, surviving a killed run (torch-free)."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from mvmr.errors import MvmrError, shorten
from mvmr.interrupt import stop_on_signal
from mvmr.progress import track
from mvmr.storage.atomic import is_disk_full, sync, write_json
from mvmr.storage.lock import hold

Floats = npt.NDArray[np.floating]


def cached_rows(
    path: Path,
    *,
    key: Mapping[str, str],
    count: int,
    batches: Callable[[int], Iterable[Floats]],
    width: int | None = None,
    progress: bool = False,
    label: str = "rows",
) -> np.memmap:
    """Return `count` rows from `path`, or compute them by `batches` and leave them there.

    Rows are appended to `path`.partial, which is renamed when whole; its length says how far a stopped run
    came. `path`.json holds the key: rows under another key are thrown away and computed again. Two processes
    that want the same rows compute them once: the second waits for the first.

    batches: called with the first row wanted; yields float [b, width], in order.
    width: None takes that of the first batch.

    Returns: float32 [count, width], read-only.
    Raises: MvmrError when a row is not finite, the disk is full or the folder cannot be written;
        ValueError when the batches do not amount to `count` rows of one width; KeyboardInterrupt, which says how far it
        came, after Ctrl-C or SIGTERM: the batch that was begun is ended and kept.
    """
    if count < 1:
        raise MvmrError(f"{label}: there are no images to compute rows for")
    store = _Store(path=path, key=dict(key), count=count, label=label)
    try:
        if (rows := store.read_if_whole(width)) is not None:
            return rows
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold(store.beside(".lock"), make=True, waiting=f"waiting for another run that computes {label}"):
            if (rows := store.read_if_whole(width)) is not None:  # another process has just finished them
                return rows
            store.compute(batches, width, progress)
            return store.read()
    except OSError as error:
        reason = "disk full" if is_disk_full(error) else (error.strerror or str(error))
        raise MvmrError(f"cannot keep {label} in {path}: {reason}; free space or point MVMR_CACHE elsewhere") from error


def is_whole(path: Path, *, key: Mapping[str, str], count: int) -> bool:
    """Whether `cached_rows` would read all rows from `path`."""
    return _Store(path=path, key=dict(key), count=count, label="").has_key() and path.is_file()


def open_rows(path: Path) -> np.memmap:
    """Open a file of rows, memory-mapped and read-only, believing nothing that its header says without its size.

    Returns: float32 or float16 [N, D], both at least 0, as the file holds them.
    Raises: MvmrError for a file that is missing or damaged, of another type, shape or order, or longer or shorter.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            shape, by_columns, kind = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), file.seek(0, os.SEEK_END)
    except OSError as error:
        raise MvmrError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # numpy's reader of headers raises a dozen kinds for strangers' bytes
        raise MvmrError(f"{path} is not a whole .npy file ({shorten(error)}); remove it and make it again") from error
    form, cure = f"{kind} {shorten(list(shape))}", "remove it and make it again"
    if version != (1, 0) or len(shape) != 2 or by_columns or kind not in (np.dtype("<f4"), np.dtype("<f2")):
        raise MvmrError(f"{path} holds {form}, not rows of float32 or float16; {cure}")
    if min(shape) < 0 or start + math.prod(shape) * kind.itemsize != size:
        raise MvmrError(f"{path} has {size:,} bytes, not those of {form}; {cure}")
    if not math.prod(shape):  # nothing that could be mapped
        return cast(np.memmap, np.empty(shape, kind))
    return np.memmap(path, kind, "r", start, shape)


@dataclass(frozen=True, kw_only=True)
class _Store:
    """The files of one array of rows: `path` when whole, .partial until then, .json for the key, .lock."""

    path: Path
    key: dict[str, str]
    count: int
    label: str

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def read(self) -> np.memmap:
        return open_rows(self.path)

    def has_key(self) -> bool:
        try:
            content = json.loads(self.beside(".json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        return bool(content == {"key": self.key, "count": self.count})

    def read_if_whole(self, width: int | None) -> np.memmap | None:
        if not self.has_key() or not self.path.is_file():
            return None
        rows = self.read()
        return rows if width in (None, rows.shape[1]) else None

    def compute(self, batches: Callable[[int], Iterable[Floats]], width: int | None, progress: bool) -> None:
        partial = self.beside(".partial")
        if not self.has_key() or self.path.exists():  # a whole file that gets here has another width
            # The old rows go before the new key comes: at no moment do old rows stand under a new key.
            self.path.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
            write_json(self.beside(".json"), {"key": self.key, "count": self.count})
        with partial.open("r+b" if partial.exists() else "w+b") as file:
            row_width, done = self.resume(file)
            if width is not None and width != row_width:
                row_width, done = width, 0
            try:
                with track(self.label, done, self.count, shown=progress) as advance, stop_on_signal() as stop:
                    for batch in batches(done) if done < self.count else ():
                        rows = np.asarray(batch, np.float32)
                        if not done:
                            row_width = row_width or rows.shape[-1]
                            self.begin(file, row_width)
                        self.check(rows, row_width, done)
                        file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
                        file.flush()
                        done += len(rows)
                        advance(done, "")
                        if stop.requested and done < self.count:
                            raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                left = f"{done:,} of {self.count:,} images of {self.label} are kept; type the same command to go on"
                raise KeyboardInterrupt(left) from error
        if done != self.count:
            raise ValueError(f"{self.label}: {done} rows came where {self.count} were announced")
        sync(partial)
        partial.rename(self.path)
        sync(self.path.parent)

    def begin(self, file: BinaryIO, width: int) -> None:
        file.seek(0)
        file.truncate()
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, width)}
        np.lib.format.write_array_header_1_0(file, header)

    def check(self, rows: npt.NDArray[np.float32], width: int | None, done: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != width or done + len(rows) > self.count:
            limit = f"at most {self.count - done} rows of {width}"
            raise ValueError(f"{self.label}: a batch of shape {rows.shape} came where {limit} were expected")
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            first = done + int(np.argmin(finite))
            raise MvmrError(f"{self.label}: row {first} holds NaN or infinity; check the weights, or use float32")

    def resume(self, file: BinaryIO) -> tuple[int | None, int]:
        """Return the width and the number of whole rows in a partial file, and stand behind the last of them."""
        try:
            np.lib.format.read_magic(file)
            (_, width), _, _ = np.lib.format.read_array_header_1_0(file)
        except Exception:  # numpy's reader of headers raises a dozen kinds for damaged ones
            return None, 0
        if width < 1:
            return None, 0
        begin = file.tell()
        done = min((file.seek(0, os.SEEK_END) - begin) // (4 * width), self.count)
        file.seek(begin + done * 4 * width)
        file.truncate()  # half a row, where the run was killed while it wrote
        return width, done
