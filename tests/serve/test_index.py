"""An index finds the neighbours that a float64 comparison of all vectors finds, and says so where it does not."""

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvmr.errors import MvmrError
from mvmr.serve.batch.stored import open_embeddings
from mvmr.serve.index import faiss_kinds
from mvmr.serve.index.index import Index, build

SPACE, OTHER = "a" * 32, "b" * 32
DIM = 16


def clustered(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Vectors of different lengths in a few dozen clusters, as embeddings of photographs are."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(40, dim))
    vectors = centres[generator.integers(0, 40, count)] + 0.5 * generator.normal(size=(count, dim))
    return (vectors * generator.uniform(0.1, 10, size=(count, 1))).astype(np.float32)


def manifest(rows: int, files: list[str], *, space: str = SPACE, state: str = "finished", dim: int = DIM) -> str:
    parts = [{"file": file, "rows": 0, "errors": 0, "bytes": 0, "sha256": ""} for file in files]
    says = {"format": 1, "state": state, "settings": {"precision": "fp32"}, "rows": rows, "errors": 0, "parts": parts}
    return json.dumps({**says, "space_id": space, "dim": dim, "bundle": "/runs/mine"})


def parquet(path: Path, vectors: np.ndarray, first: int = 0, space: str = SPACE) -> None:
    kind = pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    columns = {
        "path": pa.array([f"photos/{number}.jpg" for number in range(first, first + len(vectors))], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), type=kind),
    }
    said = {"space_id": space, "precision": "fp32"}
    pq.write_table(pa.table(columns).replace_schema_metadata(said), path)


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
    wide, asked = vectors.astype(np.float64), queries.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    cosines = asked @ wide.T
    best = np.argsort(-cosines, axis=1)[:, :k]
    return best, np.take_along_axis(cosines, best, 1)


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recall(index: Index, vectors: np.ndarray, queries: np.ndarray, **options: Any) -> float:
    wanted, _ = oracle(vectors, queries, 10)
    found = [[hit.row for hit in hits] for hits in index.search(queries, 10, **options)]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, wanted.tolist(), strict=True)]))


def test_an_exact_index_finds_what_float64_finds(tmp_path: Path) -> None:
    vectors, queries = clustered(2000), clustered(30, seed=1)
    made = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    assert (len(made), made.dim, made.kind, made.space_id, made.recall) == (2000, DIM, "exact", SPACE, 1.0)
    assert (made.bundle, made.precision) == ("/runs/mine", "fp32")
    wanted, cosines = oracle(vectors, queries, 10)
    for found in (made.search(queries, 10), Index.load(tmp_path / "index").search(queries, 10)):
        assert [[hit.row for hit in hits] for hits in found] == wanted.tolist()
        assert [[hit.path for hit in hits] for hits in found] == [
            [f"photos/{row}.jpg" for row in each] for each in wanted
        ]
        np.testing.assert_allclose([[hit.score for hit in hits] for hits in found], cosines, atol=1e-6)


def test_one_query_is_answered_as_many_are(tmp_path: Path) -> None:
    vectors, queries = clustered(500), clustered(40, seed=1)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    together = [[hit.row for hit in hits] for hits in index.search(queries, 5)]
    assert [[hit.row for hit in index.search(query[None], 5)[0]] for query in queries] == together
    assert index.search(np.empty((0, DIM), np.float32), 5) == []
    scaled = [[hit.row for hit in hits] for hits in index.search(queries * np.float32(1000), 5)]
    assert scaled == together


def test_more_neighbours_than_vectors_gives_all_of_them(tmp_path: Path) -> None:
    vectors = clustered(7)
    for kind in ("exact", "hnsw"):
        index = build(folder(tmp_path / kind, vectors), tmp_path / f"{kind}-index", kind=kind)
        assert sorted(hit.row for hit in index.search(vectors[:1], 100)[0]) == list(range(7))


def test_a_vector_of_zeros_is_near_to_nothing(tmp_path: Path) -> None:
    vectors = clustered(20)
    vectors[3] = 0
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    scores = {hit.row: hit.score for hit in index.search(vectors[:1], 20)[0]}
    assert scores[3] == 0
    assert max(scores, key=lambda row: scores[row]) == 0


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_most_and_says_how_many(tmp_path: Path, kind: str) -> None:
    vectors, queries = clustered(4000), clustered(100, seed=1)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index", kind=kind, lists=40)
    assert recall(index, vectors, queries) > 0.9
    assert index.recall > 0.9
    assert recall(index, vectors, queries, probes=40, ef_search=2000) > 0.99
    fewer = recall(index, vectors, queries, probes=1, ef_search=1)
    assert fewer < recall(index, vectors, queries)
    scores = [hit.score for hit in index.search(queries[:1], 10)[0]]
    assert scores == sorted(scores, reverse=True)


def test_the_recall_that_is_told_is_the_recall_there_is(tmp_path: Path) -> None:
    vectors = clustered(4000)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index", kind="ivf", lists=100, probes=1)
    asked = np.unique(np.linspace(0, 3999, 100).round().astype(int))
    wanted, _ = oracle(vectors, vectors[asked], 11)
    found = [[hit.row for hit in hits] for hits in index.search(vectors[asked], 11)]
    share = [len(set(a) & set(b[1:])) / 10 for a, b in zip(found, wanted.tolist(), strict=True)]
    assert index.recall == pytest.approx(np.mean(share), abs=1e-3)
    assert index.recall < 0.9


def test_lists_are_sized_by_the_data_and_refused_where_it_is_too_few(tmp_path: Path) -> None:
    assert faiss_kinds.sized("ivf", faiss_kinds.Options(), 10**6) == {"lists": 4000, "probes": 250}
    assert faiss_kinds.sized("ivf", faiss_kinds.Options(), 25_000)["lists"] == 632
    assert faiss_kinds.sized("ivf", faiss_kinds.Options(lists=4, probes=99), 10**4) == {"lists": 4, "probes": 4}
    made = folder(tmp_path / "out", clustered(5000))
    message = refused(made, tmp_path / "index", kind="ivf")
    assert "5000 embeddings are too few for an ivf index of 283 lists, 39 to each; take --kind exact" in message
    assert "--lists 128" in message
    assert len(build(made, tmp_path / "index", kind="ivf", lists=128)) == 5000


def test_several_threads_may_search_at_once(tmp_path: Path) -> None:
    vectors = clustered(3000)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index", kind="ivf", lists=30)
    wanted = [index.search(vectors[i : i + 1], 5, probes=1 + i % 3) for i in range(60)]
    seen: dict[int, Any] = {}

    def ask(first: int) -> None:
        for i in range(first, 60, 4):
            seen[i] = index.search(vectors[i : i + 1], 5, probes=1 + i % 3)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [seen[i] for i in range(60)] == wanted


def test_every_form_of_embeddings_makes_the_same_index(tmp_path: Path) -> None:
    vectors = clustered(50)
    parquet(tmp_path / "one.parquet", vectors)
    np.save(tmp_path / "one.npy", vectors)
    (tmp_path / "one.paths.txt").write_text("".join(f"photos/{number}.jpg\n" for number in range(50)))
    (tmp_path / "one.manifest.json").write_text(manifest(50, ["one.npy"]))
    for number in range(2):
        piece = tmp_path / "shards" / f"shard-{number:05d}-of-00002"
        folder(piece, vectors[25 * number : 25 * (number + 1)])
        for file in sorted(piece.glob("*.parquet")) if number else ():
            table = pq.read_table(file)
            names = pa.array([f"photos/{int(Path(str(path)).stem) + 25}.jpg" for path in table["path"]])
            pq.write_table(table.set_column(0, "path", names), file)
    folder(tmp_path / "parts", vectors)
    wanted = None
    for name in ("parts", "one.parquet", "one.npy", "shards"):
        index = build(tmp_path / name, tmp_path / f"{name}-index")
        found = index.search(vectors[:5], 8)
        wanted = wanted or found
        assert found == wanted
        assert index.space_id == SPACE
    halves = folder(tmp_path / "halves", vectors.astype(np.float16))
    assert build(halves, tmp_path / "halves-index").search(vectors[:1], 1)[0][0].row == 0


def test_another_space_is_refused_by_name(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", clustered(50)), tmp_path / "index")
    index.check_space(SPACE, "runs/mine")
    with pytest.raises(
        MvmrError, match=r"runs/x gives vectors of another embedding space \(bbbbbbbbbbbb\) than the ind"
    ):
        index.check_space(OTHER, "runs/x")
    for number, space in enumerate((SPACE, OTHER)):
        folder(tmp_path / "mixed" / f"shard-{number:05d}-of-00002", clustered(50), space=space)
    assert "mixes embedding spaces: shard-00000-of-00002 is of space aaaaaaaaaaaa" in refused(tmp_path / "mixed", "x")


def test_queries_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", clustered(50)), tmp_path / "index")
    for wrong in (np.zeros((1, DIM + 1), np.float32), np.zeros(DIM, np.float32)):
        with pytest.raises(MvmrError, match=rf"takes vectors \[Q, {DIM}\], these are "):
            index.search(wrong, 3)
    with pytest.raises(MvmrError, match="NaN or infinity"):
        index.search(np.full((1, DIM), np.nan, np.float32), 3)
    with pytest.raises(MvmrError, match="k = 0"):
        index.search(np.ones((1, DIM), np.float32), 0)


def test_embeddings_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert "no embeddings at" in refused(tmp_path / "none", out)
    assert "has not finished; go on with it by `mvmr embed --resume`" in refused(
        folder(tmp_path / "running", clustered(50), state="running"), out
    )
    folder(tmp_path / "some" / "shard-00001-of-00002", clustered(50))
    assert "lacks shard-00000-of-00002, 1 of 2 shards" in refused(tmp_path / "some", out)
    (tmp_path / "all.parquet.partial").mkdir()
    assert "has not finished" in refused(tmp_path / "all.parquet", out)
    assert "every image was unreadable" in refused(folder(tmp_path / "empty", clustered(0), parts=1), out)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "strange.parquet")
    assert "no Parquet file of embeddings that names their space" in refused(tmp_path / "strange.parquet", out)
    np.save(tmp_path / "bare.npy", clustered(50))
    assert "no bare.manifest.json beside it" in refused(tmp_path / "bare.npy", out)
    short = folder(tmp_path / "short", clustered(50))
    (short / "manifest.json").write_text(manifest(60, ["part-00000.parquet"]))
    assert "holds 16 rows and its manifest says 60" in refused(short, out)
    (short / "part-00000.parquet").write_bytes(b"PAR1")
    assert f"cannot read {short}/part-00000.parquet" in refused(short, out)
    assert "unknown kind 'exakt'; did you mean 'exact'?" in refused(short, out, kind="exakt")
    assert "lists = 0 must be 1 or more" in refused(short, out, kind="ivf", lists=0)
    assert not out.exists()
    assert not out.with_name("index.partial").exists()


def test_what_stands_at_out_is_replaced_only_when_asked_and_only_an_index(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a", clustered(50)), folder(tmp_path / "b", clustered(60))
    build(first, tmp_path / "index")
    assert "holds an index; give another --out, or --overwrite" in refused(second, tmp_path / "index")
    assert len(Index.load(tmp_path / "index")) == 50
    assert len(build(second, tmp_path / "index", overwrite=True)) == 60
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"index.json", "paths.arrow", "vectors.npy"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "exists and is no index" in refused(first, tmp_path / "mine", overwrite=True)
    (tmp_path / "mine").rename(tmp_path / "new.partial")
    assert "holds 'thesis.tex'; give another --out" in refused(first, tmp_path / "new")
    assert (tmp_path / "new.partial" / "thesis.tex").exists()


def test_a_build_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(tmp_path / "out", clustered(50))
    (tmp_path / "index.partial").mkdir()
    for name in (".lock", "vectors.npy", "paths.arrow", "index.json"):
        (tmp_path / "index.partial" / name).write_text("half")
    assert len(build(made, tmp_path / "index")) == 50
    assert not (tmp_path / "index.partial").exists()


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    made = folder(tmp_path / "out", clustered(2000))
    assert "no index at" in loading(tmp_path / "none")
    build(made, tmp_path / "index", kind="hnsw")
    says = json.loads((tmp_path / "index" / "index.json").read_text())
    file = tmp_path / "index" / "hnsw.faiss"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert "hnsw.faiss has not the" in loading(tmp_path / "index")
    file.write_bytes(b"\x00" * len(content))
    assert "hnsw.faiss has changed since it was written" in loading(tmp_path / "index")
    file.unlink()
    assert "it has no hnsw.faiss" in loading(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text(json.dumps(says | {"format": 2}))
    assert "has format 2, this mvmr reads 1" in loading(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text("[]")
    assert "index.json is not the description of an index" in loading(tmp_path / "index")


def loading(path: Path) -> str:
    with pytest.raises(MvmrError) as caught:
        Index.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def described(index: Path, **changes: Any) -> Path:
    """An index whose description says other things; what is None is not in it."""
    file = index / "index.json"
    says = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in says.items() if value is not None}))
    return index


def test_an_index_of_before_which_has_no_hashes_is_read(tmp_path: Path) -> None:
    vectors = clustered(2000)
    for kind in ("exact", "ivf", "hnsw"):
        made = build(folder(tmp_path / kind, vectors), tmp_path / f"{kind}-index", kind=kind, lists=40)
        wanted = made.search(vectors[:3], 4)
        assert Index.load(described(made.path, sha256=None)).search(vectors[:3], 4) == wanted


def test_paths_that_would_be_read_beyond_their_end_are_refused(tmp_path: Path) -> None:
    made = build(folder(tmp_path / "out", clustered(200), parts=1), tmp_path / "index")
    file = made.path / "paths.arrow"
    content = file.read_bytes()
    ends = np.cumsum([0, *(len(f"photos/{number}.jpg") for number in range(200))]).astype("<i4").tobytes()
    assert content.count(ends) == 1
    for wrong in ([2**31 - 1], [-5]):
        file.write_bytes(content.replace(ends[400:404], np.array(wrong, "<i4").tobytes()))
        assert "paths.arrow has changed since it was written" in loading(made.path)
    described(made.path, sha256=None)
    assert f"cannot read the index {made.path} (" in loading(made.path)
    file.write_bytes(content.replace(b"photos/7.jpg", b"photos/\xff.jpg"))
    assert f"cannot read the index {made.path} (" in loading(made.path)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, *["a"] * 199], pa.string()),
        pa.array([b"a"] * 200, pa.binary()),
        pa.array([7] * 200),
        pa.array(["a"] * 200).dictionary_encode(),
        pa.array(["a"] * 199),
    ],
    ids=["null", "bytes", "numbers", "words", "fewer"],
)
def test_paths_that_are_none_are_refused(tmp_path: Path, column: pa.Array) -> None:
    made = build(folder(tmp_path / "out", clustered(200)), tmp_path / "index")
    file = made.path / "paths.arrow"
    table = pa.table({"path": column})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    described(made.path, sha256=None, files={"vectors.npy": 200 * DIM * 4 + 128, "paths.arrow": file.stat().st_size})
    assert "the index" in loading(made.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "exakt"},
        {"kind": ["exact"]},
        {"kind": "hnsw"},
        {"numbers": {"lists": 5}},
        {"numbers": []},
        {"vectors": 201},
        {"vectors": "200"},
        {"dim": 0},
        {"dim": 10**15},
        {"dim": 2**80},
        {"space_id": 7},
        {"space_id": None},
        {"recall": "all"},
        {"files": {"../out/manifest.json": 5}},
        {"files": {}},
        {"sha256": {"/etc/passwd": ""}},
        {"sha256": {"paths.arrow": ""}},
        {"sha256": {"paths.arrow": 3}},
    ],
)
def test_a_description_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = build(folder(tmp_path / "out", clustered(200)), tmp_path / "index")
    assert str(made.path) in loading(described(made.path, **changes))


def test_a_pipe_in_an_index_is_not_waited_for(tmp_path: Path) -> None:
    made = build(folder(tmp_path / "out", clustered(200)), tmp_path / "index")
    for name in ("vectors.npy", "index.json"):
        (made.path / name).unlink()
        os.mkfifo(made.path / name)
        assert name in loading(made.path)


def rewritten(index: Index, change: Callable[[Any], None]) -> str:
    """Why an index is refused whose FAISS file was changed by `change`, with a description that vouches for it."""
    file = index.path / faiss_kinds.FILES[index.kind]
    opened = faiss.read_index(str(file))
    change(opened)
    faiss.write_index(opened, str(file))
    files = {name: (index.path / name).stat().st_size for name in (file.name, "paths.arrow")}
    return loading(described(index.path, sha256=None, files=files))


def test_lists_that_lead_astray_are_refused(tmp_path: Path) -> None:
    made = build(folder(tmp_path / "out", clustered(2000)), tmp_path / "index", kind="ivf", lists=40)

    def number(row: int) -> Callable[[Any], None]:
        def change(index: Any) -> None:
            lists = faiss.downcast_InvertedLists(index.invlists)
            faiss.rev_swig_ptr(lists.get_ids(0), lists.list_size(0))[0] = row

        return change

    for row in (2000, -1, 2**40):
        assert "its row numbers don't fit one another" in rewritten(made, number(row))
    assert "ivf.faiss" in loading(described(made.path, sha256={"ivf.faiss": "0" * 64}))
    described(made.path, sha256=None, numbers={"lists": 41, "probes": 3})
    assert "its cells don't fit one another" in loading(made.path)


def test_links_that_lead_astray_are_refused(tmp_path: Path) -> None:
    made = build(folder(tmp_path / "out", clustered(2000)), tmp_path / "index", kind="hnsw")
    file = made.path / "hnsw.faiss"
    content, opened = file.read_bytes(), faiss.read_index(str(file))
    graph = opened.hnsw
    links, levels, starts = map(faiss.vector_to_array, (graph.neighbors, graph.levels, graph.offsets))
    high, low = int(np.argmax(levels)), int(np.argmin(levels))
    upper = int(starts[high]) + 2 * 32  # the first link of the level above the lowest
    described(made.path, sha256=None)
    for place, row in ((5, 2000), (5, -2), (upper, low)):
        wrong = links.copy()
        wrong[place] = row
        assert content.count(links.tobytes()) == 1
        file.write_bytes(content.replace(links.tobytes(), wrong.tobytes()))
        assert f"cannot read the index {made.path} (" in loading(made.path)
    wrong = levels.copy()
    wrong[low] += 1
    file.write_bytes(content.replace(levels.tobytes(), wrong.tobytes()))
    assert f"cannot read the index {made.path} (" in loading(made.path)
    file.write_bytes(content)
    assert len(Index.load(made.path)) == 2000


@pytest.mark.skipif(
    not hasattr(faiss, "set_deserialization_vector_byte_limit"), reason="this FAISS can't be told how much is too much"
)
def test_a_list_longer_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    made = build(folder(tmp_path / "out", clustered(2000)), tmp_path / "index", kind="hnsw")
    file = made.path / "hnsw.faiss"
    content, opened = file.read_bytes(), faiss.read_index(str(file))
    levels = faiss.vector_to_array(opened.hnsw.levels).tobytes()
    count = np.array([2000], "<u8").tobytes()
    assert content.count(count + levels) == 1
    file.write_bytes(content.replace(count + levels, np.array([2**28], "<u8").tobytes() + levels))
    described(made.path, sha256=None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    assert f"cannot read the index {made.path} (" in loading(made.path)
    status = Path("/proc/self/status").read_text()
    peak, now = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) for name in ("VmHWM", "VmRSS"))
    assert peak - now < 200_000


def test_another_kind_of_faiss_file_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(folder(tmp_path / "out", clustered(2000)), tmp_path / "index", kind="hnsw")
    file = made.path / "hnsw.faiss"
    faiss.write_index(faiss.index_factory(DIM, "PCA8,Flat"), str(file))
    files = {name: (made.path / name).stat().st_size for name in (file.name, "paths.arrow")}
    monkeypatch.setattr(faiss, "read_index", lambda name: pytest.fail("FAISS has read it"))
    assert "its kind is not as FAISS writes it" in loading(described(made.path, sha256=None, files=files))


def test_vectors_of_any_bytes_are_harmless(tmp_path: Path) -> None:
    made = build(folder(tmp_path / "out", clustered(2000)), tmp_path / "index")
    file = made.path / "vectors.npy"
    content = file.read_bytes()
    size = 2000 * DIM * 4
    for filling in (b"\xff" * size, np.random.default_rng(0).bytes(size), np.full(size // 4, np.inf, "<f4").tobytes()):
        file.write_bytes(content[:-size] + filling)
        for k in (1, 10, 2000):
            for hits in Index.load(made.path).search(clustered(25, seed=1), k):
                assert all(0 <= hit.row < 2000 for hit in hits)


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    vectors = clustered(2000)
    vectors[[70, 71, 1900], [0, 3, 15]] = np.nan, np.inf, -np.inf
    message = refused(folder(tmp_path / "out", vectors), tmp_path / "index", kind=kind, lists=40)
    assert "3 of the 2000 embeddings of " in message
    assert "NaN or infinity, the first is that of photos/70.jpg; embed the images again" in message
    assert not (tmp_path / "index").exists()
    wide = clustered(2000).astype(np.float64)
    wide[5] = 1e300
    assert "the first is that of photos/5.jpg" in refused(
        folder(tmp_path / "wide", wide), tmp_path / "index", kind=kind, lists=40
    )


def test_the_largest_and_the_smallest_numbers_keep_their_direction(tmp_path: Path) -> None:
    vectors = clustered(50)
    for row, size in ((3, 3e38), (4, 1e-40)):
        vectors[row] = vectors[row] / np.abs(vectors[row]).max() * np.float32(size)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    for row in (3, 4):
        (hit,) = index.search(vectors[row : row + 1], 1)[0]
        assert (hit.row, hit.score) == (row, pytest.approx(1, abs=1e-3))


@pytest.mark.parametrize(
    "name", ["../outside.parquet", "/tmp/outside.parquet", "a/b.parquet", "..", "", "a\0b", 7, None]
)
def test_a_part_in_another_folder_is_refused(tmp_path: Path, name: Any) -> None:
    parquet(tmp_path / "outside.parquet", clustered(50))
    made = folder(tmp_path / "out", clustered(50))
    (made / "manifest.json").write_text(manifest(50, [name]))
    message = refused(made, tmp_path / "index")
    assert f"manifest.json names the part {str(name)!r}, which is no file beside it" in message


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    made = folder(tmp_path / "out", clustered(50))
    part = made / "part-00001.parquet"
    part.rename(tmp_path / "outside.parquet")
    part.symlink_to(tmp_path / "outside.parquet")
    assert f"{part} is a link out of {made}" in refused(made, tmp_path / "index")
    part.unlink()
    (tmp_path / "outside.parquet").rename(made / "other.parquet")
    part.symlink_to("other.parquet")
    assert len(build(made, tmp_path / "index")) == 50
    part.unlink()
    assert f"{made} lacks part-00001.parquet" in refused(made, tmp_path / "again")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-00000-of-00001").symlink_to(folder(tmp_path / "elsewhere", clustered(50)))
    assert "is a link out of" in refused(tmp_path / "shards", tmp_path / "again")
    np.save(tmp_path / "one.npy", clustered(50))
    (tmp_path / "one.manifest.json").write_text(manifest(50, ["one.npy"]))
    (tmp_path / "one.paths.txt").symlink_to("/etc/hostname")
    assert "one.paths.txt is a link out of" in refused(tmp_path / "one.npy", tmp_path / "again")


def listed(*rows: Any, kind: pa.DataType = pa.list_(pa.float32(), DIM)) -> pa.Array:  # noqa: B008
    return pa.array(rows, kind)


ROW = [0.5] * DIM
PATHS = pa.array(["a", "b"])


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"embedding": listed(ROW, ROW)}, "has not one column 'path'"),
        ({"path": PATHS}, "has not one column 'embedding'"),
        ({"path": pa.array([1, 2]), "embedding": listed(ROW, ROW)}, "a column 'path' of int64 instead of strings"),
        ({"path": pa.array([b"a", b"\xff"]), "embedding": listed(ROW, ROW)}, "'path' of binary instead of strings"),
        ({"path": pa.array(["a", None]), "embedding": listed(ROW, ROW)}, "rows without a path or an embedding"),
        ({"path": PATHS, "embedding": listed(ROW, None)}, "rows without a path or an embedding"),
        ({"path": PATHS, "embedding": listed(ROW, [*ROW[1:], None])}, "rows without a path or an embedding"),
        ({"path": PATHS, "embedding": PATHS}, "a column 'embedding' of string instead of lists of 16 floats"),
        ({"path": PATHS, "embedding": listed(ROW, ROW[1:], kind=pa.list_(pa.float32()))}, "of list<"),
        ({"path": PATHS, "embedding": listed([1] * DIM, [2] * DIM, kind=pa.list_(pa.int32(), DIM))}, "of fixed_size_"),
        ({"path": PATHS, "embedding": listed([1], [2], kind=pa.list_(pa.float32(), 1))}, "1 wide instead of 16"),
    ],
)
def test_a_parquet_file_of_other_columns_is_refused(tmp_path: Path, columns: dict[str, pa.Array], told: str) -> None:
    made = folder(tmp_path / "out", clustered(2), parts=1)
    pq.write_table(pa.table(columns), made / "part-00000.parquet")
    message = refused(made, tmp_path / "index")
    assert told in message
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
    message = refused(tmp_path / "one.npy", tmp_path / "index")
    assert "one.npy" in message
    assert "make it again" in message


def test_an_npy_file_that_does_not_fit_its_manifest_or_its_paths_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", clustered(2))
    (tmp_path / "one.manifest.json").write_text(manifest(2, ["one.npy"], dim=8))
    (tmp_path / "one.paths.txt").write_text("a\n")
    assert "one.npy has embeddings 16 wide, its manifest says 8" in refused(tmp_path / "one.npy", tmp_path / "index")
    (tmp_path / "one.manifest.json").write_text(manifest(2, ["one.npy"]))
    assert "has fewer lines than" in refused(tmp_path / "one.npy", tmp_path / "index")
    (tmp_path / "one.paths.txt").write_bytes(b"a\n\xff\n")
    assert "one.paths.txt is not UTF-8 text" in refused(tmp_path / "one.npy", tmp_path / "index")
    (tmp_path / "one.paths.txt").unlink()
    assert f"{tmp_path / 'one.npy'} lacks one.paths.txt" in refused(tmp_path / "one.npy", tmp_path / "index")
    np.save(tmp_path / "one.npy", np.asfortranarray(clustered(2)))
    (tmp_path / "one.paths.txt").write_text("a\nb\n")
    assert "not rows of float32 or float16" in refused(tmp_path / "one.npy", tmp_path / "index")


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
    made = folder(tmp_path / "out", clustered(2), parts=1)
    says = json.loads((made / "manifest.json").read_text()) | changes
    (made / "manifest.json").write_text(json.dumps(says))
    assert str(made) in refused(made, tmp_path / "index")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "1e999", '{"format": 1e999}', '"\\ud800"']
)
def test_json_that_python_chokes_on_is_refused(tmp_path: Path, text: str) -> None:
    made = folder(tmp_path / "out", clustered(2), parts=1)
    index = build(made, tmp_path / "index")
    (made / "manifest.json").write_text(text)
    assert "manifest.json is not the manifest of a run" in refused(made, tmp_path / "other")
    (index.path / "index.json").write_text(text)
    assert "index.json is not the description of an index" in loading(index.path)


def test_an_exact_index_is_built_and_opened_without_holding_its_vectors(tmp_path: Path) -> None:
    stored = open_embeddings(folder(tmp_path / "out", clustered(9000), parts=2))
    assert max(len(vectors) for _, vectors in stored.chunks(1000)) == 1000
    assert sum(len(paths) for paths, _ in stored.chunks(1000)) == 9000
    index = build(tmp_path / "out", tmp_path / "index")
    assert isinstance(index.searcher.vectors, np.memmap)
