"""The images that are searched and mapped, and their embeddings: computed once, kept beside the bundle."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from mvmr.app.embedders.embedder import BATCH, Encoder
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import WHITE, Background
from mvmr.cores import usable_cores
from mvmr.data import ImageSet, Skipped, open_images
from mvmr.data.image_set import background_mark, digest
from mvmr.data.scan import Files, Packed, stat_files
from mvmr.distillation.report.images import draw, open_evaluation_images
from mvmr.errors import MvmrError
from mvmr.serve.batch.manifest import MANIFEST, read_manifest
from mvmr.serve.batch.pipeline import in_order
from mvmr.serve.batch.single_file import SUFFIXES, manifest_file
from mvmr.serve.batch.stored import Stored, open_embeddings
from mvmr.serve.engine import Floats
from mvmr.storage.atomic import cache_dir
from mvmr.storage.row_store import cached_rows

logger = logging.getLogger(__name__)

LIMIT = 20_000
_THUMBNAILS = 4096  # kept in memory, of a few kilobytes each
_AHEAD = 2 * BATCH  # images that are decoded before it is their turn
_ESCAPE = re.compile(r"\\(\\|[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_ESCAPED = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


class Gallery:
    """Images in an order that stays the same while they do; threads may share it.

    images: those of the gallery; available: how many there were to draw them from
    labels: int64 [N], numbers into `classes`; both None where there is not one label to an image
    embedded: whether it was opened from what `mvmr embed` has made
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        available: int | None = None,
        stored_rows: _StoredRows | None = None,
        embedded: bool = False,
    ) -> None:
        """Take opened images; `Gallery.open` is the way to get one."""
        if len(images) < 2:
            raise MvmrError(f"the gallery {images.name} has {len(images)} image; give a folder of 2 images or more")
        self.images, self._stored_rows = images, stored_rows
        self.embedded = embedded
        self.available = len(images) if available is None else available
        single = images.labels is not None and images.labels.ndim == 1
        self.labels = images.labels if single else None
        self.classes = images.classes if single else None
        self._thumbnails = lru_cache(_THUMBNAILS)(self._thumbnail)

    @classmethod
    def open(
        cls,
        spec: str,
        *,
        background: Background = WHITE,
        limit: int = LIMIT,
        max_unreadable: float = 0.01,
        progress: bool = False,
    ) -> Gallery:
        """Open the images of `spec`, or `limit` of them, always the same.

        spec: images as :func:`mvmr.data.open_images` takes them, of which those are opened that `mvmr report` measures;
            or what `mvmr embed` has made of image files: a folder, ``FILE.parquet`` or ``FILE.npy``.

        Raises: MvmrError for no images or a single one, too many that can't be read, or image files that are gone.
        """
        if limit < 2:
            raise MvmrError(f"a gallery of {limit} images: give a limit of 2 or more")
        if _is_embedded(Path(spec)):
            return cls._from_embeddings(spec, background, limit)
        pool = open_evaluation_images(
            partial(open_images, spec, background=background, max_unreadable=max_unreadable, progress=progress)
        )
        return cls(draw(pool, limit), available=len(pool))

    @classmethod
    def _from_embeddings(cls, spec: str, background: Background, limit: int) -> Gallery:
        stored = open_embeddings(spec)
        files = _files_of(spec, stored)
        stamps = np.stack([files.sizes, files.times]).astype("<i8").tobytes()
        images = ImageSet(
            name=spec,
            split="unlabelled",
            source=files,
            fingerprint=digest([stamps, *files.names, *background_mark(background)]),
            background=background,
        )
        sample = draw(images, limit)
        numbers = np.arange(len(images)) if sample.chosen is None else sample.chosen
        stored_rows = _StoredRows.of(stored, numbers)
        if files.times.max() > min(file.stat().st_mtime_ns for file in stored.files):
            logger.warning("an image of %s is newer than its embedding: they are computed again", spec)
            stored_rows = None
        return cls(sample, available=len(images), stored_rows=stored_rows, embedded=True)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        """As it was given: a folder, a data set, a file of embeddings."""
        return self.images.name

    @property
    def keys(self) -> Sequence[str]:
        """The name of each image, for people: its path below the folder of all."""
        return self.images.keys

    @property
    def fingerprint(self) -> str:
        """Hex, changes when an image is added, removed, renamed or rewritten."""
        return self.images.fingerprint

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What could not be read and is not among the N."""
        return self.images.skipped

    def load(self, number: int) -> Image.Image:
        """Image `number` in RGB, upright; raises IndexError outside 0 to N - 1, MvmrError when it can't be read."""
        return self.images.load(number)

    def thumbnail(self, number: int, side: int = 128) -> bytes:
        """Image `number` as a WebP file of at most `side` pixels a side, of pixels alone; raises as `load`."""
        return self._thumbnails(number, side)

    def embeddings(
        self,
        encoder: Encoder,
        folder: Path,
        advance: Callable[[int, int], None] | None = None,
        *,
        progress: bool = False,
    ) -> Floats:
        """Embeddings of all images, computed the first time and read from `folder` afterwards.

        A run that was stopped, even by ``kill -9``, goes on where it was. Embeddings that the gallery was opened from
        are taken as they are, where this encoder would make the same.

        advance: called with how many are done, of how many.

        Shapes: float32 [N, D], not normalised, read-only.
        Raises: MvmrError for an image that can't be read any more, a disk that is full, a service out of reach.
        """
        count = len(self)

        def batches(start: int) -> Iterator[Floats]:
            done = start
            for rows in self._rows(encoder, start):
                yield rows
                done += len(rows)
                if advance is not None:
                    advance(done, count)

        return cached_rows(
            folder / f"{encoder.key}-{encoder.identity[:16]}-{self.fingerprint[:16]}.npy",
            key={"encoder": encoder.identity, "images": self.fingerprint},
            count=count,
            batches=batches,
            width=encoder.dim,
            progress=progress,
            label=f"{encoder.label} of {self.name}",
        )

    def _rows(self, encoder: Encoder, start: int) -> Iterator[Floats]:
        """Embeddings of the images from `start` on, a batch at a time."""
        if self._stored_rows is not None and self._stored_rows.equals(encoder):
            yield from self._stored_rows.rows(start)
            return
        pool = ThreadPoolExecutor(usable_cores(), "gallery")
        try:
            # from the start of a batch: its other images must not change with where a run was stopped
            begin = start - start % BATCH
            waiting = in_order(
                lambda i: pool.submit(lambda: encoder.prepare(self.load(i))), range(begin, len(self)), _AHEAD
            )
            for first in range(begin, len(self), BATCH):
                yield encoder.forward(list(islice(waiting, BATCH)))[max(0, start - first) :]
        finally:
            pool.shutdown(cancel_futures=True)

    def _thumbnail(self, number: int, side: int) -> bytes:
        image = self.load(number)
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        return file.getvalue()


def cache_folder(owner: Bundle | str) -> Path:
    """Where embeddings and maps are kept: beside a bundle as ``<bundle>.app/``, else, by space id, in the cache folder.

    of: a bundle, or the space id of a served model.
    """
    if isinstance(owner, str):
        return cache_dir() / "app" / owner[:16]
    path = owner.path.resolve()
    if not os.access(path.parent, os.W_OK):  # as in a container
        return cache_folder(owner.space_id)
    return path.with_name(f"{path.name}.app") / owner.space_id[:16]


@dataclass(frozen=True, eq=False)
class _StoredRows:
    """Rows that `mvmr embed` has written, of the images of a gallery.

    numbers: int64 [N], which of them, ascending; file: sha256 of the exported file, "" where nobody knows
    """

    stored: Stored
    numbers: npt.NDArray[np.int64]
    file: str

    @classmethod
    def of(cls, stored: Stored, numbers: npt.NDArray[np.int64]) -> _StoredRows | None:
        """None where they are not what an encoder would make: rounded to float16, or of several exported files."""
        files = {str(read_manifest(manifest)["settings"].get("exported file", "")) for manifest in _manifests(stored)}
        if len(files) > 1 or not all(map(_is_float32, stored.files)):
            return None
        return cls(stored, numbers, files.pop() if files else "")

    def equals(self, encoder: Encoder) -> bool:
        """Whether the encoder would make the same."""
        source = encoder.provenance
        if source is None or (source.space_id, source.precision) != (self.stored.space_id, self.stored.precision):
            return False
        return not (source.file and self.file) or source.file == self.file

    def rows(self, start: int) -> Iterator[Floats]:
        """The rows of the gallery's images from `start` on, in pieces."""
        numbers, offset = self.numbers[start:], 0
        for paths, values in self.stored.chunks():
            picks = numbers[(numbers >= offset) & (numbers < offset + len(paths))] - offset
            offset += len(paths)
            if len(picks):
                yield values[picks]


def _is_embedded(path: Path) -> bool:
    """Whether a gallery is given as the output of `mvmr embed`; a folder of images may hold a manifest.json, too."""
    if path.suffix in SUFFIXES and not path.is_dir():
        return True
    parts = (path / MANIFEST).is_file() and any(path.glob("part-*.parquet"))
    return parts or any(path.glob(f"shard-*/{MANIFEST}"))


def _files_of(spec: str, stored: Stored) -> Files:
    """The image files that embeddings were made of."""
    texts = [path for paths, _ in stored.chunks() for path in paths]
    if not texts:
        raise MvmrError(f"the gallery {spec} is empty: it holds no embedding; give another")
    # paths are relative to where `mvmr embed` was run: here, or where its output lies
    bases = (os.getcwdb(), os.fsencode(stored.path.resolve().parent))
    base = next((base for base in bases if os.path.lexists(_locate(base, texts[0]))), bases[0])
    locations = [_locate(base, text) for text in texts]
    root = os.path.commonpath([os.path.dirname(location) for location in locations])
    names = Packed.of(os.path.relpath(location, root) for location in locations)
    files = stat_files(root, names)
    if (gone := np.flatnonzero(files.sizes < 0)).size:
        raise MvmrError(
            f"image {texts[gone[0]]} of the gallery {spec} is not there ({gone.size:,} of {len(texts):,} are missing); "
            "start the app in the folder where `mvmr embed` was run, or give the folder of the images instead"
        )
    return files


def _locate(base: bytes, text: str) -> bytes:
    """The file that a path as `mvmr embed` writes it stands for; see `mvmr.data.scan.printable`."""
    # a byte that is no UTF-8 and a letter that does not print may look the same
    pieces = _ESCAPE.split(text)
    candidates = [
        os.path.normpath(os.path.join(base, b"".join(_unescape(pieces, bytes_first)))) for bytes_first in (True, False)
    ]
    return next((candidate for candidate in candidates if os.path.lexists(candidate)), candidates[0])


def _unescape(pieces: Sequence[str], bytes_first: bool) -> Iterable[bytes]:
    for number, piece in enumerate(pieces):
        if number % 2 == 0 or piece in _ESCAPED:
            yield os.fsencode(_ESCAPED.get(piece, piece) if number % 2 else piece)
        elif piece[0] == "x" and bytes_first:
            yield bytes([int(piece[1:], 16)])
        else:
            yield chr(int(piece[1:], 16)).encode("utf-8", "surrogatepass")


def _manifests(stored: Stored) -> list[Path]:
    """Manifests of the runs that wrote embeddings; a Parquet file may have come without one."""
    if stored.path.is_file():
        return [file for file in [manifest_file(stored.path)] if file.is_file()]
    return [folder / MANIFEST for folder in dict.fromkeys(file.parent for file in stored.files)]


def _is_float32(file: Path) -> bool:
    if file.suffix == ".npy":
        return True
    return bool(pa.types.is_float32(parquet.read_schema(file).field("embedding").type.value_type))
