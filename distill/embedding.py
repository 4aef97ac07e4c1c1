"""A teacher's embeddings of images as a file, which is a teacher itself: `mvmr embed --teacher SPEC`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mvmr import __version__
from mvmr.cores import usable_cores
from mvmr.data import ImageSet, open_images
from mvmr.distillation.teachers.remembered import open_or_recall
from mvmr.distillation.teachers.spec import parse_specs
from mvmr.distillation.teachers.stored_rows import HASH, content_hash
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
    device: str = "auto",
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> tuple[int, int]:
    """Write a teacher's embeddings of all images to a Parquet file, for ``--teacher rows:FILE``.

    Columns: path, the image's name below the folder; embedding, a fixed-size list of float32, not normalised; sha256,
    of its file in hex, null where an image has none of its own. They are computed once: a stopped run goes on, and a
    distillation on the same images finds them in the cache.

    Args:
        teacher, pretrained: as in :func:`mvmr.distill`, one of them.
        images: as ``data`` there.
        out: a file that is not there yet, ending in ``.parquet``.

    Returns:
        How many images there are, and the width of the embeddings.

    Raises:
        MvmrError: a teacher or images that can't be had, or ``out`` is taken or can't be written.
    """
    progress = is_wanted(progress)
    target = Path(out)
    if target.suffix != ".parquet":
        raise MvmrError(f"embeddings of a teacher go into one file: {out} should end in .parquet")
    if target.exists():
        raise MvmrError(f"{out} is there already; remove it, or give another name")
    specs = parse_specs(teacher)
    computing = teacher_device(device)
    network = open_or_recall(specs[0], pretrained, device=computing, progress=progress)
    source = open_images(images, "unlabelled", max_unreadable=max_unreadable, progress=progress)
    rows = represent(source, network, device=computing, workers=usable_cores(), progress=progress)
    schema = pa.schema(
        [("path", pa.string()), ("embedding", pa.list_(pa.float32(), rows.shape[1])), (HASH, pa.string())],
        metadata={"teacher": network.name, "identity": network.identity, "mvmr_version": __version__},
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for table in _tables(source, rows, schema):
            writer.write_table(table)
    return rows.shape


def _tables(images: ImageSet, rows: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
    for start in range(0, len(rows), _BLOCK):
        numbers = range(start, min(start + _BLOCK, len(rows)))
        arrays = [
            pa.array(images.keys[number] for number in numbers),
            pa.FixedSizeListArray.from_arrays(
                pa.array(np.asarray(rows[start : start + _BLOCK]).reshape(-1)), type=schema.field("embedding").type
            ),
            pa.array((content_hash(images, number) for number in numbers), pa.string()),
        ]
        yield pa.Table.from_arrays(arrays, schema=schema)
