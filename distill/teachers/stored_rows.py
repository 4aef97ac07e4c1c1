"""Embeddings made elsewhere as teacher, `rows:FILE.parquet[?KEY=VALUE&...]`: by an API, or another team's model.

A row belongs to an image by a column of names (the image's path below the data's folder, a longer path that ends so, or
its file name) or of content hashes (sha256 of the file, in hex). What `mvmr embed` writes, a folder of parts too, is of
this form. Columns are found by themselves, or named:

    key        of names or hashes
    embedding  of lists of numbers, all of one length
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from PIL import Image
from torch import Tensor

from mvmr.bundles.preprocess import Background, describe_background
from mvmr.data import ImageSet
from mvmr.distillation.teachers.contents import Contents
from mvmr.distillation.teachers.row_matching import compare_contents, match
from mvmr.distillation.teachers.rows_file import Floats, Numbers, RowsFile
from mvmr.distillation.teachers.teacher import NoTextTower, read_settings
from mvmr.errors import MvmrError

_KEYS = ("key", "embedding")
_SHOWN = 3


def load(what: str, *, device: str | torch.device, text: bool) -> StoredRows:
    """Read a Parquet file of embeddings, or the parts of a folder.

    Raises: MvmrError for a file that is missing or damaged, columns that aren't there or could be several, rows without
        an embedding, of several widths or not finite, or two rows of one name.
    """
    file, options = read_settings("rows", what, _KEYS)
    if text:
        raise NoTextTower(f"teacher rows:{file} has no text tower: zero-shot takes a CLIP, such as ViT-B-16")
    return StoredRows(Path(file), what, options.get("key"), options.get("embedding"))


class StoredRows:
    """See `mvmr.distillation.teachers.teacher.Teacher`; it knows the images of its file and no others.

    dim: of an embedding
    """

    parameters = None

    def __init__(self, file: Path, what: str, key: str | None, embedding: str | None) -> None:
        self.name, self.weights = f"rows:{file.name}", str(file)
        self.origin = {"kind": "rows", "what": what}
        self._file = RowsFile(file, key, embedding)
        self.identity = hashlib.sha256(f"{self._file.digest} {key} {embedding}".encode()).hexdigest()
        self.dim = self._file.width
        self._contents = Contents()
        self._known: dict[str, Numbers] = {}  # by fingerprint

    def prepare(self, image: Image.Image) -> Tensor:
        raise MvmrError(f"teacher {self.name} is a file of embeddings: it knows its own images and embeds no others")

    def __call__(self, batch: Tensor) -> Tensor:
        raise MvmrError(f"teacher {self.name} is a file of embeddings: it knows its own images and embeds no others")

    def numbers(self, images: ImageSet, *, progress: bool = False) -> Numbers:
        """The number of each image's row, [N], -1 where there is none, by the column that knows most of them.

        Raises: MvmrError: none knows any, two rows could be of one image, a row's hash is of another file than the
            image of its name, or transparent images were laid on another background.
        """
        for background in self._file.backgrounds - {images.background}:
            raise self._other_background(background, images.background)
        if images.fingerprint not in self._known:
            read_contents = partial(self._contents.of, images, progress=progress)
            self._known[images.fingerprint] = match(self._file, images, read_contents)
        return self._known[images.fingerprint]

    def check(self, images: ImageSet, *, progress: bool = False) -> None:
        """Refuse images of which some have no row.

        Raises: MvmrError: that says which; as `numbers`.
        """
        if missing := describe_missing(images, self.numbers(images, progress=progress)):
            raise MvmrError(f"{self.weights} lacks {missing}")

    def batches(self, images: ImageSet, start: int) -> Iterator[Floats]:
        """Rows of the images from number `start` on, in order, [b, dim] at a time.

        Raises: MvmrError: as `numbers`, or an image has none.
        """
        self.check(images)
        return self._file.gather(self.numbers(images)[start:])

    def hashes(self, images: ImageSet) -> pa.Array:
        """The sha256 of each image's file where its row has the same, large strings [N], else null."""
        contents = self._contents.of(images) if self._file.hashes else pa.nulls(len(images), pa.large_string())
        compared = compare_contents(self._file, self.numbers(images), lambda: contents)
        checked = (
            np.any([agree == 1 for agree in compared.values()], axis=0) if compared else np.zeros(len(images), bool)
        )
        return pa.compute.if_else(pa.array(checked), contents, pa.scalar(None, pa.large_string()))

    def _other_background(self, background: Background, wanted: Background) -> MvmrError:
        option = "none" if wanted is None else ",".join(map(str, wanted))
        cure = f"embed these by `mvmr embed --teacher ... --background {option}`"
        if background is not None:
            cure += f", or distil with --set views.background=[{','.join(map(str, background))}]"
        return MvmrError(
            f"{self.weights} was made of images {describe_background(background)} where they are transparent, these "
            f"are {describe_background(wanted)}; {cure}"
        )


def describe_missing(images: ImageSet, numbers: Numbers) -> str | None:
    """How many images have no row, and some of them; None where all have one."""
    missing = np.flatnonzero(numbers < 0)
    if not len(missing):
        return None
    shown = ", ".join(images.keys[int(index)] for index in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
    return f"{len(missing):,} of the {len(images):,} images of {images.name} ({shown}{more})"
