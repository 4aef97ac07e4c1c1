"""The sha256 of images' files: what says whether a row of embeddings is of this very file."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mvmr.cores import usable_cores
from mvmr.data import ImageSet
from mvmr.data.decoding import reason
from mvmr.data.scan import Files, printable
from mvmr.errors import MvmrError
from mvmr.progress import track

LETTERS = 64  # of a sha256 in hex
_BLOCK = 512
_LONG = 10_000  # files, from which on progress is shown


class Contents:
    """Reads every file once, however often, and in whatever subset of its images, it is asked for."""

    def __init__(self) -> None:
        self._known: dict[Files, npt.NDArray[np.bytes_]] = {}

    def of(self, images: ImageSet, *, progress: bool = False) -> pa.Array:
        """The sha256 of each image's file in hex, large strings [N], null for images that are no files of their own.

        Raises: MvmrError for a file that can't be read any more.
        """
        source = images.source
        if not isinstance(source, Files):
            return pa.nulls(len(images), pa.large_string())
        known = self._known.setdefault(source, np.zeros(len(source.names), f"S{LETTERS}"))
        places = np.arange(len(images)) if images.chosen is None else images.chosen
        left = places[known[places] == b""]
        shown = progress and len(left) >= _LONG
        with (
            ThreadPoolExecutor(usable_cores(), "sha256") as pool,
            track(f"sha256 of {images.name}", 0, len(left), shown=shown) as advance,
        ):
            for start in range(0, len(left), _BLOCK):
                block = left[start : start + _BLOCK]
                known[block] = list(pool.map(lambda place: _sha256(source.path(place)), block.tolist()))
                advance(start + len(block), "")
        return pa.array(known[places], pa.binary()).cast(pa.large_string())


def _sha256(path: bytes) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MvmrError(
            f"cannot read image {printable(path)}: {reason(error)}; it was there when the data were opened: run again"
        ) from error
