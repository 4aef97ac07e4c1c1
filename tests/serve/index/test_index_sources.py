"""An index is made of whole embeddings of one run alone: what is damaged, elsewhere or no number is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvmr.serve.index.index import build
from tests.serve.index.indexes import DIM, folder, loading_refusal, make_clusters, manifest, parquet, refusal


def test_embeddings_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert "no embeddings at" in refusal(tmp_path / "none", out)
    assert "has not finished; go on with it by `mvmr embed --resume`" in refusal(
        folder(tmp_path / "running", make_clusters(50), state="running"), out
    )
    folder(tmp_path / "some" / "shard-00001-of-00002", make_clusters(50))
    assert "lacks shard-00000-of-00002, 1 of 2 shards" in refusal(tmp_path / "some", out)
    (tmp_path / "all.parquet.partial").mkdir()
    assert "has not finished" in refusal(tmp_path / "all.parquet", out)
    assert "every image was unreadable" in refusal(folder(tmp_path / "empty", make_clusters(0), parts=1), out)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "strange.parquet")
    assert "no Parquet file of embeddings that names their space" in refusal(tmp_path / "strange.parquet", out)
    np.save(tmp_path / "bare.npy", make_clusters(50))
    assert "no bare.manifest.json beside it" in refusal(tmp_path / "bare.npy", out)
    short = folder(tmp_path / "short", make_clusters(50))
    (short / "manifest.json").write_text(manifest(60, ["part-00000.parquet"]))
    assert "holds 16 rows and its manifest says 60" in refusal(short, out)
    (short / "part-00000.parquet").write_bytes(b"PAR1")
    assert f"cannot read {short}/part-00000.parquet" in refusal(short, out)
    assert "unknown kind 'exakt'; did you mean 'exact'?" in refusal(short, out, kind="exakt")
    assert "lists = 0 must be 1 or more" in refusal(short, out, kind="ivf", lists=0)
    assert not out.exists()
    assert not out.with_name("index.partial").exists()


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    vectors = make_clusters(2000)
    vectors[[70, 71, 1900], [0, 3, 15]] = np.nan, np.inf, -np.inf
    message = refusal(folder(tmp_path / "out", vectors), tmp_path / "index", kind=kind, lists=40)
    assert "3 of the 2000 embeddings of " in message
    assert "NaN or infinity, the first is that of photos/70.jpg; embed the images again" in message
    assert not (tmp_path / "index").exists()
    wide = make_clusters(2000).astype(np.float64)
    wide[5] = 1e300
    assert "the first is that of photos/5.jpg" in refusal(
        folder(tmp_path / "wide", wide), tmp_path / "index", kind=kind, lists=40
    )


@pytest.mark.parametrize(
    "name", ["../outside.parquet", "/tmp/outside.parquet", "a/b.parquet", "..", "", "a\0b", 7, None]
)
def test_a_part_in_another_folder_is_refused(tmp_path: Path, name: Any) -> None:
    parquet(tmp_path / "outside.parquet", make_clusters(50))
    embeddings = folder(tmp_path / "out", make_clusters(50))
    (embeddings / "manifest.json").write_text(manifest(50, [name]))
    message = refusal(embeddings, tmp_path / "index")
    assert f"manifest.json names the part {str(name)!r}, which is no file beside it" in message


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    embeddings = folder(tmp_path / "out", make_clusters(50))
    part = embeddings / "part-00001.parquet"
    part.rename(tmp_path / "outside.parquet")
    part.symlink_to(tmp_path / "outside.parquet")
    assert f"{part} is a link out of {embeddings}" in refusal(embeddings, tmp_path / "index")
    part.unlink()
    (tmp_path / "outside.parquet").rename(embeddings / "other.parquet")
    part.symlink_to("other.parquet")
    assert len(build(embeddings, tmp_path / "index")) == 50
    part.unlink()
    assert f"{embeddings} lacks part-00001.parquet" in refusal(embeddings, tmp_path / "again")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-00000-of-00001").symlink_to(folder(tmp_path / "elsewhere", make_clusters(50)))
    assert "is a link out of" in refusal(tmp_path / "shards", tmp_path / "again")
    np.save(tmp_path / "one.npy", make_clusters(50))
    (tmp_path / "one.manifest.json").write_text(manifest(50, ["one.npy"]))
    (tmp_path / "one.paths.txt").symlink_to("/etc/hostname")
    assert "one.paths.txt is a link out of" in refusal(tmp_path / "one.npy", tmp_path / "again")


def column_of(*rows: Any, kind: pa.DataType = pa.list_(pa.float32(), DIM)) -> pa.Array:  # noqa: B008
    return pa.array(rows, kind)


ROW = [0.5] * DIM
PATHS = pa.array(["a", "b"])


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"embedding": column_of(ROW, ROW)}, "has not one column 'path'"),
        ({"path": PATHS}, "has not one column 'embedding'"),
        ({"path": pa.array([1, 2]), "embedding": column_of(ROW, ROW)}, "a column 'path' of int64 instead of strings"),
        ({"path": pa.array([b"a", b"\xff"]), "embedding": column_of(ROW, ROW)}, "'path' of binary instead of strings"),
        ({"path": pa.array(["a", None]), "embedding": column_of(ROW, ROW)}, "rows without a path or an embedding"),
        ({"path": PATHS, "embedding": column_of(ROW, None)}, "rows without a path or an embedding"),
        ({"path": PATHS, "embedding": column_of(ROW, [*ROW[1:], None])}, "rows without a path or an embedding"),
        ({"path": PATHS, "embedding": PATHS}, "a column 'embedding' of string instead of lists of 16 floats"),
        ({"path": PATHS, "embedding": column_of(ROW, ROW[1:], kind=pa.list_(pa.float32()))}, "of list<"),
        (
            {"path": PATHS, "embedding": column_of([1] * DIM, [2] * DIM, kind=pa.list_(pa.int32(), DIM))},
            "of fixed_size_",
        ),
        ({"path": PATHS, "embedding": column_of([1], [2], kind=pa.list_(pa.float32(), 1))}, "1 wide instead of 16"),
    ],
)
def test_a_parquet_file_of_other_columns_is_refused(tmp_path: Path, columns: dict[str, pa.Array], fault: str) -> None:
    embeddings = folder(tmp_path / "out", make_clusters(2), parts=1)
    pq.write_table(pa.table(columns), embeddings / "part-00000.parquet")
    message = refusal(embeddings, tmp_path / "index")
    assert fault in message
    assert "part-00000.parquet" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
        *(
            b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            for header in (
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 16)}",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 16)}",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -16)}",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': ()}",
                b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 16)}",
                b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 16)}",
                b"(" * 5000,
            )
        ),
    ],
)
def test_a_damaged_npy_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "one.npy").write_bytes(content)
    (tmp_path / "one.manifest.json").write_text(manifest(2, ["one.npy"]))
    (tmp_path / "one.paths.txt").write_text("a\nb\n")
    message = refusal(tmp_path / "one.npy", tmp_path / "index")
    assert "one.npy" in message
    assert "make it again" in message


def test_an_npy_file_that_does_not_fit_its_manifest_or_its_paths_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", make_clusters(2))
    (tmp_path / "one.manifest.json").write_text(manifest(2, ["one.npy"], dim=8))
    (tmp_path / "one.paths.txt").write_text("a\n")
    assert "one.npy has embeddings 16 wide, its manifest says 8" in refusal(tmp_path / "one.npy", tmp_path / "index")
    (tmp_path / "one.manifest.json").write_text(manifest(2, ["one.npy"]))
    assert "has fewer lines than" in refusal(tmp_path / "one.npy", tmp_path / "index")
    (tmp_path / "one.paths.txt").write_bytes(b"a\n\xff\n")
    assert "one.paths.txt is not UTF-8 text" in refusal(tmp_path / "one.npy", tmp_path / "index")
    (tmp_path / "one.paths.txt").unlink()
    assert f"{tmp_path / 'one.npy'} lacks one.paths.txt" in refusal(tmp_path / "one.npy", tmp_path / "index")
    np.save(tmp_path / "one.npy", np.asfortranarray(make_clusters(2)))
    (tmp_path / "one.paths.txt").write_text("a\nb\n")
    assert "not rows of float32 or float16" in refusal(tmp_path / "one.npy", tmp_path / "index")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": -1},
        {"rows": True},
        {"rows": 10**400},
        {"rows": "2"},
        {"errors": 0.5},
        {"dim": 0},
        {"dim": "16"},
        {"dim": 2**40},
        {"state": 7},
        {"settings": []},
        {"settings": {}},
        {"parts": 3},
        {"parts": [3]},
        {"parts": [{"file": "part-00000.parquet"}]},
        {"parts": None},
        {"format": [1]},
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    embeddings = folder(tmp_path / "out", make_clusters(2), parts=1)
    document = json.loads((embeddings / "manifest.json").read_text()) | changes
    (embeddings / "manifest.json").write_text(json.dumps(document))
    assert str(embeddings) in refusal(embeddings, tmp_path / "index")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "1e999", '{"format": 1e999}', '"\\ud800"']
)
def test_json_that_python_chokes_on_is_refused(tmp_path: Path, text: str) -> None:
    embeddings = folder(tmp_path / "out", make_clusters(2), parts=1)
    index = build(embeddings, tmp_path / "index")
    (embeddings / "manifest.json").write_text(text)
    assert "manifest.json is not the manifest of a run" in refusal(embeddings, tmp_path / "other")
    (index.path / "index.json").write_text(text)
    assert "index.json is not the description of an index" in loading_refusal(index.path)
