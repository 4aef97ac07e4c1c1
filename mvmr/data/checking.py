"""Decoding every file once, so that bad ones are known before training; the verdicts are remembered."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL

from mvmr.cores import usable_cores
from mvmr.data import decoding
from mvmr.data.scan import Files
from mvmr.errors import MvmrError
from mvmr.progress import track
from mvmr.storage.atomic import atomic, cache_dir

logger = logging.getLogger(__name__)

_CHUNK = 32
_MOST_THREADS = 16


@dataclass(frozen=True)
class Verdicts:
    """short_sides: int32 [N] in pixels, 0 for a file that cannot be read; reasons: why, by number."""

    short_sides: npt.NDArray[np.int32]
    reasons: dict[int, str]


def check_files(files: Files, *, progress: bool = False) -> Verdicts:
    """Decode all files that are new or changed since the last time, on all cores.

    What is known is kept in the cache folder by path, size and time, also when the check is interrupted; a file that
    failed for a reason outside it (permissions) is tried again every time.
    """
    prints = _prints(files)
    memory = _memory(files)
    shorts, reasons = _recall(memory, prints)
    pending = np.flatnonzero(shorts < 0)
    if len(pending) == 0:
        return Verdicts(shorts, reasons)
    passing: set[int] = set()
    try:
        for index, short, reason, lasting in _decode(files, pending, progress):
            shorts[index] = short
            if reason is not None:
                reasons[index] = reason
                if not lasting:
                    passing.add(index)
    finally:
        _remember(memory, prints, shorts, reasons, passing)
    return Verdicts(shorts, reasons)


def _decode(files: Files, indices: npt.NDArray[np.intp], progress: bool) -> Iterator[tuple[int, int, str | None, bool]]:
    def check(index: int) -> tuple[int, int, str | None, bool]:
        try:
            return index, decoding.check(files.path(index)), None, True
        except Exception as error:  # Pillow's plugins raise whatever their parsing meets
            from_outside = isinstance(error, OSError) and error.errno is not None
            return index, 0, decoding.reason(error), not from_outside

    def check_chunk(chunk: npt.NDArray[np.intp]) -> list[tuple[int, int, str | None, bool]]:
        return [check(int(index)) for index in chunk]

    chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
    pool = ThreadPoolExecutor(min(_MOST_THREADS, usable_cores()))
    done = 0
    with warnings.catch_warnings(), track("checking images", 0, len(indices), shown=progress) as advance:
        # odd metadata: what matters is whether the pixels decode, and that is what is reported
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            for verdicts in pool.map(check_chunk, chunks):
                yield from verdicts
                done += len(verdicts)
                advance(done, "")
        finally:
            pool.shutdown(cancel_futures=True)


def _prints(files: Files) -> npt.NDArray[np.uint64]:
    """Return uint64 [N], one number for each path, size and time: 64 bits tell millions of files apart."""
    marks = np.stack([files.sizes, files.times], axis=1)
    prints = np.empty(len(files.names), np.uint64)
    for index, name in enumerate(files.names):
        digest = hashlib.blake2b(marks[index].tobytes() + name, digest_size=8).digest()
        prints[index] = int.from_bytes(digest, "little")
    return prints


def _memory(files: Files) -> Path:
    # another Pillow reads other files, so each version has its own memory
    name = hashlib.sha256(os.path.realpath(files.root) + b"\0" + PIL.__version__.encode()).hexdigest()
    return cache_dir() / "checked" / f"{name[:32]}.npz"


def _recall(memory: Path, prints: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    """Return short sides, -1 where nothing is known, and the reasons of the files known to be bad."""
    shorts = np.full(len(prints), -1, np.int32)
    try:
        with open(memory, "rb") as file, np.load(file, allow_pickle=False) as archive:
            old_prints, sides = archive["prints"], archive["shorts"]
            texts = {int(key): str(text) for key, text in json.loads(archive["reasons"].tobytes()).items()}
    except FileNotFoundError:
        return shorts, {}
    except Exception as error:  # a damaged memory costs time, nothing else
        logger.warning("ignoring %s, which cannot be read (%s); checking all images again", memory, error)
        return shorts, {}
    if len(old_prints) == 0:
        return shorts, {}
    positions = np.minimum(np.searchsorted(old_prints, prints), len(old_prints) - 1)
    hits = old_prints[positions] == prints
    shorts[hits] = sides[positions[hits]]
    bad = np.flatnonzero(shorts == 0).tolist()
    return shorts, {index: texts.get(int(prints[index]), "unreadable") for index in bad}


def _remember(
    memory: Path,
    prints: npt.NDArray[np.uint64],
    shorts: npt.NDArray[np.int32],
    reasons: dict[int, str],
    passing: set[int],
) -> None:
    keep = shorts >= 0
    keep[list(passing)] = False
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(prints[rows], kind="stable")]
    texts = json.dumps({str(int(prints[index])): text for index, text in reasons.items() if index not in passing})
    try:
        with atomic(memory) as temporary, open(temporary, "wb") as file:
            np.savez(file, prints=prints[rows], shorts=shorts[rows], reasons=np.frombuffer(texts.encode(), np.uint8))
    except (MvmrError, OSError) as error:
        logger.warning("cannot remember which images were checked: %s", error)
