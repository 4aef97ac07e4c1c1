"""A teacher's embeddings of images as a file, which is a teacher itself: `mvmr embed --teacher SPEC`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mvmr import __version__
from mvmr.bundles.preprocess import WHITE, Background
from mvmr.cores import usable_cores
from mvmr.data import ImageSet, open_images
from mvmr.distillation.teachers.contents import Contents
from mvmr.distillation.teachers.remembered import RememberedTeacher, open_or_recall
from mvmr.distillation.teachers.rows_file import BACKGROUND, HASH
from mvmr.distillation.teachers.spec import parse_specs
from mvmr.distillation.teachers.stored_rows import StoredRows
from mvmr.distillation.teachers.teacher import Teacher
from mvmr.errors import MvmrError
from mvmr.progress import is_wanted
from mvmr.representations.cache import represent
from mvmr.storage.atomic import atomic
from mvmr.training.pretraining import teacher_device

_BLOCK = 4096


def embed(
    teacher: str | Path,
    images: str,
    out: str | Path,
    *,
    pretrained: str | Path | None = None,
    background: Background = WHITE,
    device: str = "auto",
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> tuple[int, int]:
    """Write a teacher's embeddings of all images to a Parquet file, for ``--teacher rows:FILE``.

    Columns: path, the image's name below the folder; embedding, a fixed-size list of float32, not normalised; sha256,
    of its file in hex, null where an image has none of its own, or ``teacher`` is a file of rows that doesn't say the
    same. They are computed once: a stopped run goes on, and a distillation on the same images finds them in the cache.

    Args:
        teacher, pretrained: as in :func:`mvmr.distill`, one of them.
        images, max_unreadable: as ``data`` and ``max_unreadable`` there.
        background: what transparent images are laid on, as ``views.background`` there, sRGB; None shows their hidden
            colours. The file records it, and teaches images on the same one.
        out: a file that is not there yet, ending in ``.parquet``.

    Returns:
        How many images there are, and the width of the embeddings.

    Raises:
        MvmrError: a teacher or images that can't be had, several teachers, or ``out`` is taken or can't be written.
    """
    progress = is_wanted(progress)
    target = Path(out)
    if target.suffix != ".parquet":
        raise MvmrError(f"embeddings of a teacher go into one file: {out} should end in .parquet")
    if target.exists():
        raise MvmrError(f"{out} is there already; remove it, or give another name")
    specs = parse_specs(teacher)
    if len(specs) > 1:
        raise MvmrError(f"a file holds the embeddings of one teacher, not of {len(specs)}: embed by each alone")
    computing = teacher_device(device)
    network = open_or_recall(specs[0], pretrained, device=computing, progress=progress)
    source = open_images(images, "unlabelled", background=background, max_unreadable=max_unreadable, progress=progress)
    if isinstance(network, StoredRows):
        network.check(source, progress=progress)
    rows = represent(source, network, device=computing, workers=usable_cores(), progress=progress)
    schema = pa.schema(
        [("path", pa.string()), ("embedding", pa.list_(pa.float32(), rows.shape[1])), (HASH, pa.string())],
        metadata={
            "teacher": network.name,
            "identity": network.identity,
            BACKGROUND: json.dumps(background),
            "mvmr_version": __version__,
        },
    )
    hashes = _hashes(source, network, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for table in _tables(source, rows, hashes, schema):
            writer.write_table(table)
    return rows.shape


def _hashes(images: ImageSet, teacher: Teacher, progress: bool) -> pa.Array:
    """Of the files that were embedded: where the rows are somebody else's, only what they say themselves and is so."""
    if isinstance(teacher, StoredRows):
        return teacher.hashes(images)
    if isinstance(teacher, RememberedTeacher) and teacher.origin.get("kind") == "rows":
        return pa.nulls(len(images), pa.large_string())
    return Contents().of(images, progress=progress)


def _tables(images: ImageSet, rows: np.ndarray, hashes: pa.Array, schema: pa.Schema) -> Iterator[pa.Table]:
    for start in range(0, len(rows), _BLOCK):
        numbers = range(start, min(start + _BLOCK, len(rows)))
        arrays = [
            pa.array(images.keys[number] for number in numbers),
            pa.FixedSizeListArray.from_arrays(
                pa.array(np.asarray(rows[start : start + _BLOCK]).reshape(-1)), type=schema.field("embedding").type
            ),
            hashes[start : start + _BLOCK].cast(pa.string()),
        ]
        yield pa.Table.from_arrays(arrays, schema=schema)
