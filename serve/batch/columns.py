"""The columns of embedded images, as Arrow and Parquet hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from mvmr import __version__
from mvmr.data.image_bytes import Rejected
from mvmr.errors import MvmrError, unknown
from mvmr.serve.engine import Engine, Floats

DType = Literal["float32", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "float16")
FIXED = ("path", "embedding", "width", "height", "sha256", "space_id")
ERRORS = pa.schema([("path", pa.string()), ("code", pa.string()), ("reason", pa.string())])
_WORDS = pa.dictionary(pa.int32(), pa.string())


def schema(engine: Engine, heads: Sequence[str], dtype: DType, *, normalize: bool = False) -> pa.Schema:
    """The columns of an engine's embeddings.

    path: string; embedding: fixed-size list of D float32 or float16, raw or of length 1; width, height: int32, the
    file's in pixels; sha256: string, of the file's bytes, hex; space_id: dictionary of strings; for each head its class
    as ``<head>``, dictionary of strings, and that class's probability as ``<head>_probability``, float32. The schema's
    metadata say space_id, normalize (true or false), mvmr's version, precision, provider and, as JSON, preprocessing.

    Raises: MvmrError for an unknown head or type, or a head whose name another column has.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    fields = [
        ("path", pa.string()),
        ("embedding", pa.list_(pa.float16() if dtype == "float16" else pa.float32(), engine.dim)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("space_id", _WORDS),
    ]
    for head in heads:
        if head not in engine.heads:
            raise unknown("head", head, engine.heads)
        fields += [(head, _WORDS), (f"{head}_probability", pa.float32())]
    names = [name for name, _ in fields]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise MvmrError(f"two columns would be named {doubled[0]!r}: leave out the head of that name, or rename it")
    metadata = {
        "space_id": engine.space_of(normalize=normalize),
        "normalize": json.dumps(normalize),
        "mvmr_version": __version__,
        "precision": engine.precision,
        "provider": engine.provider,
        "preprocessing": json.dumps(engine.preprocess.to_dict()),
    }
    return pa.schema(fields, metadata=metadata)


@dataclass
class Rows:
    """Some images' values, in order: lists as long as there are readable images, and the unreadable ones beside.

    embeddings: float32 [b, D] each, some batches; labels, probabilities: by head, int64 [b] and float32 [b] each
    """

    paths: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    embeddings: list[Floats] = field(default_factory=list)
    labels: dict[str, list[npt.NDArray[np.int64]]] = field(default_factory=dict)
    probabilities: dict[str, list[Floats]] = field(default_factory=dict)
    rejected: list[tuple[str, Rejected]] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        """Append what another has."""
        for name in ("paths", "sizes", "hashes", "embeddings", "rejected"):
            getattr(self, name).extend(getattr(rows, name))
        for head in rows.labels:
            self.labels.setdefault(head, []).extend(rows.labels[head])
            self.probabilities.setdefault(head, []).extend(rows.probabilities[head])


def to_table(rows: Rows, columns: pa.Schema, engine: Engine) -> pa.Table:
    """Rows as a table of the schema `columns`; raises MvmrError where float16 can't hold an embedding."""
    count = len(rows.paths)
    kind = columns.field("embedding").type.value_type.to_pandas_dtype()
    values = np.empty((count, engine.dim), kind)
    with np.errstate(over="ignore"):
        np.concatenate(rows.embeddings or [values], out=values, casting="same_kind")
    if not (finite := np.isfinite(values).all(axis=1)).all():
        path = rows.paths[int(np.argmin(finite))]
        cure = "take --dtype float32" if kind is np.float16 else "take --precision fp32, or export again"
        raise MvmrError(f"the embedding of {path} holds NaN or infinity in {np.dtype(kind)}; {cure}")
    sizes = np.array(rows.sizes, np.int32).reshape(count, 2)
    arrays = {
        "path": pa.array(rows.paths, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(values.reshape(-1), type=columns.field("embedding").type),
        "width": pa.array(sizes[:, 0]),
        "height": pa.array(sizes[:, 1]),
        "sha256": pa.array(rows.hashes, pa.string()),
        "space_id": _words(np.zeros(count, np.int32), [columns.metadata[b"space_id"].decode()]),
    }
    for head in (name for name in columns.names if name not in FIXED and f"{name}_probability" in columns.names):
        labels = np.concatenate(rows.labels[head]) if count else np.empty(0)
        probabilities = np.concatenate(rows.probabilities[head]) if count else np.empty(0)
        arrays[head] = _words(labels.astype(np.int32), engine.heads[head].classes)
        arrays[f"{head}_probability"] = pa.array(probabilities.astype(np.float32))
    return pa.Table.from_arrays([arrays[name] for name in columns.names], schema=columns)


def errors(rejected: Sequence[tuple[str, Rejected]]) -> pa.Table:
    """Unreadable images as a table of ERRORS."""
    lines = [{"path": path, "code": why.code, "reason": why.reason} for path, why in rejected]
    return pa.Table.from_pylist(lines, schema=ERRORS)


def writer(path: Path, columns: pa.Schema) -> parquet.ParquetWriter:
    """A writer of tables of the schema `columns`; embeddings, which don't shrink, are left as they are."""
    words = [column.name for column in columns if pa.types.is_dictionary(column.type)]
    compression = {column.name: "NONE" if pa.types.is_fixed_size_list(column.type) else "ZSTD" for column in columns}
    if "embedding" in compression:
        compression["embedding.list.element"] = compression.pop("embedding")
    return parquet.ParquetWriter(
        path,
        columns,
        compression=compression,
        use_dictionary=words,
        write_statistics=[name for name in compression if "." not in name],
    )


def _words(indices: npt.NDArray[np.int32], words: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(words, pa.string()))
