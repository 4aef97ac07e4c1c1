"""What tests of an index share: embeddings as the batch job leaves them, and what is refused about them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvmr.errors import MvmrError
from mvmr.serve.index.index import Index, build

SPACE, OTHER = "a" * 32, "b" * 32
DIM = 16


def make_clusters(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Vectors of different lengths in a few dozen clusters, as embeddings of photographs are."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(40, dim))
    vectors = centres[generator.integers(0, 40, count)] + 0.5 * generator.normal(size=(count, dim))
    return (vectors * generator.uniform(0.1, 10, size=(count, 1))).astype(np.float32)


def manifest(rows: int, files: list[str], *, space: str = SPACE, state: str = "finished", dim: int = DIM) -> str:
    parts = [{"file": file, "rows": 0, "errors": 0, "bytes": 0, "sha256": ""} for file in files]
    run = {"format": 1, "state": state, "settings": {"precision": "fp32"}, "rows": rows, "errors": 0, "parts": parts}
    return json.dumps({**run, "space_id": space, "dim": dim, "bundle": "/runs/mine"})


def parquet(path: Path, vectors: np.ndarray, first: int = 0, space: str = SPACE) -> None:
    kind = pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    columns = {
        "path": pa.array([f"photos/{number}.jpg" for number in range(first, first + len(vectors))], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), type=kind),
    }
    metadata = {"space_id": space, "precision": "fp32"}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def folder(path: Path, vectors: np.ndarray, *, parts: int = 3, **options: Any) -> Path:
    """What `mvmr embed` leaves, with parts of different sizes."""
    path.mkdir(parents=True)
    cuts = np.linspace(0, len(vectors), parts + 1).astype(int)
    names = [f"part-{number:05d}.parquet" for number in range(parts)]
    for name, start, end in zip(names, cuts, cuts[1:], strict=False):
        parquet(path / name, vectors[start:end], start)
    (path / "manifest.json").write_text(manifest(len(vectors), names, **options))
    return path


def oracle(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines of the k nearest, by float64."""
    wide, directions = vectors.astype(np.float64), queries.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = directions @ wide.T
    best = np.argsort(-cosines, axis=1)[:, :k]
    return best, np.take_along_axis(cosines, best, 1)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recall(index: Index, vectors: np.ndarray, queries: np.ndarray, **options: Any) -> float:
    wanted, _ = oracle(vectors, queries, 10)
    rows = [[hit.row for hit in hits] for hits in index.search(queries, 10, **options)]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, wanted.tolist(), strict=True)]))


def loading_refusal(path: Path) -> str:
    with pytest.raises(MvmrError) as caught:
        Index.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def redescribe(index: Path, **changes: Any) -> Path:
    """An index whose description says other things; what is None is not in it."""
    file = index / "index.json"
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return index
