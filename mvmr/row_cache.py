"""Rows computed once and kept: fixed representations of every image, memory-mapped, surviving a killed run."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mvmr.data.images import ImageSet
from mvmr.errors import MvmrError
from mvmr.files import cache_dir, is_disk_full, sync, write_json
from mvmr.progress import track
from mvmr.representations import Representation

logger = logging.getLogger(__name__)


def represent(
    images: ImageSet,
    representation: Representation,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: bool = False,
) -> np.memmap:
    """Return the representation of every image, computed the first time and read from the cache afterwards.

    A run that was stopped, even by `kill -9`, goes on where it was. Draws nothing from the global random state.

    Returns: float32 [N, K], read-only, row i for image i.
    Raises: MvmrError when an image cannot be read, a row is not finite, or the cache folder cannot be written.
    """

    def batches(start: int) -> Iterator[Tensor]:
        loader = DataLoader(
            _Prepared(images, representation.prepare, start),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # else the loader draws a seed from the global generator
        )
        for batch in loader:
            if isinstance(batch, MvmrError):
                raise batch
            yield representation(batch.to(device, non_blocking=True))

    name = re.sub(r"[^\w.-]+", "_", representation.name)
    file = f"{name}-{representation.identity[:16]}-{images.fingerprint[:16]}.npy"
    return cached_rows(
        cache_dir() / "representations" / file,
        key={"representation": representation.identity, "images": images.fingerprint},
        count=len(images),
        batches=batches,
        progress=progress,
        label=f"{representation.name} of {images.name}",
    )


def cached_rows(
    path: Path,
    *,
    key: Mapping[str, str],
    count: int,
    batches: Callable[[int], Iterable[Tensor]],
    width: int | None = None,
    progress: bool = False,
    label: str = "rows",
) -> np.memmap:
    """Return `count` rows from `path`, or compute them by `batches` and leave them there.

    Rows are appended to `path`.partial, which is renamed when whole; its length says how far a stopped run
    came. `path`.json holds the key: rows under another key are thrown away and computed again. Two processes
    that want the same rows compute them once: the second waits for the first.

    batches: called with the first row wanted; yields [b, width], in order. A width of None: as the first batch has it.

    Returns: float32 [count, width], read-only.
    Raises: MvmrError when a row is not finite, the disk is full or the folder cannot be written;
        ValueError when the batches do not amount to `count` rows of one width.
    """
    if count < 1:
        raise MvmrError(f"{label}: there are no images to compute rows for")
    store = _Store(path=path, key=dict(key), count=count, label=label)
    try:
        if (rows := store.whole(width)) is not None:
            return rows
        path.parent.mkdir(parents=True, exist_ok=True)
        with store.locked():
            if (rows := store.whole(width)) is not None:  # another process has just finished them
                return rows
            store.compute(batches, width, progress)
            return store.read()
    except OSError as error:
        reason = "disk full" if is_disk_full(error) else (error.strerror or str(error))
        raise MvmrError(f"cannot keep {label} in {path}: {reason}; free space or point MVMR_CACHE elsewhere") from error


@dataclass(frozen=True, kw_only=True)
class _Store:
    """The files of one array of rows: `path` when whole, .partial until then, .json for the key, .lock."""

    path: Path
    key: dict[str, str]
    count: int
    label: str

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def locked(self) -> AbstractContextManager[object]:
        lock = FileLock(self.beside(".lock"))  # let go by the system when its process dies
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another run that computes %s", self.label)
            return lock.acquire()

    def read(self) -> np.memmap:
        return np.load(self.path, mmap_mode="r")

    def has_key(self) -> bool:
        try:
            found = json.loads(self.beside(".json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        return bool(found == {"key": self.key, "count": self.count})

    def whole(self, width: int | None) -> np.memmap | None:
        if not self.has_key() or not self.path.is_file():
            return None
        rows = self.read()
        return rows if width in (None, rows.shape[1]) else None

    def compute(self, batches: Callable[[int], Iterable[Tensor]], width: int | None, progress: bool) -> None:
        partial = self.beside(".partial")
        if not self.has_key() or self.path.exists():  # a whole file that gets here has another width
            # The old rows go before the new key comes: at no moment do old rows stand under a new key.
            self.path.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
            write_json(self.beside(".json"), {"key": self.key, "count": self.count})
        with partial.open("r+b" if partial.exists() else "w+b") as file:
            found, done = self.resume(file)
            if width is not None and width != found:
                found, done = width, 0
            with track(self.label, done, self.count, shown=progress) as advance:
                for batch in batches(done) if done < self.count else ():
                    rows = batch.detach().to("cpu", torch.float32).numpy()
                    if not done:
                        found = found or rows.shape[-1]
                        self.begin(file, found)
                    self.check(rows, found, done)
                    file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
                    file.flush()
                    done += len(rows)
                    advance(done, "")
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
            wanted = f"at most {self.count - done} rows of {width}"
            raise ValueError(f"{self.label}: a batch of shape {rows.shape} came where {wanted} were expected")
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            first = done + int(np.argmin(finite))
            raise MvmrError(f"{self.label}: row {first} holds NaN or infinity; check the weights, or use float32")

    def resume(self, file: BinaryIO) -> tuple[int | None, int]:
        """Return the width and the number of whole rows in a partial file, and stand behind the last of them."""
        try:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            return None, 0
        begin, width = file.tell(), int(shape[1])
        done = min((file.seek(0, os.SEEK_END) - begin) // (4 * width), self.count)
        file.seek(begin + done * 4 * width)
        file.truncate()  # half a row, where the run was killed while it wrote
        return width, done


class _Prepared(Dataset[Tensor | MvmrError]):
    """Prepared images from `start` on. An error is returned, for workers wrap what they raise in a long trace."""

    def __init__(self, images: ImageSet, prepare: Callable[[Image.Image], Tensor], start: int) -> None:
        self.images, self.prepare, self.start = images, prepare, start

    def __len__(self) -> int:
        return len(self.images) - self.start

    def __getitem__(self, index: int) -> Tensor | MvmrError:
        try:
            return self.prepare(self.images.load(self.start + index))
        except MvmrError as error:
            return error


def _stack(items: Sequence[Tensor | MvmrError]) -> Tensor | MvmrError:
    tensors = [item for item in items if isinstance(item, Tensor)]
    failed = [item for item in items if isinstance(item, MvmrError)]
    return failed[0] if failed else torch.stack(tensors)
