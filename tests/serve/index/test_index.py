"""An index finds the neighbours that a float64 comparison of all vectors finds, and says so where it does not."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvmr.errors import MvmrError
from mvmr.serve.batch.stored import open_embeddings
from mvmr.serve.index import faiss_kinds
from mvmr.serve.index.index import Index, build
from mvmr.serve.vectors import normalized_space, unit
from tests.serve.index.indexes import (
    DIM,
    OTHER,
    SPACE,
    folder,
    make_clusters,
    manifest,
    oracle,
    parquet,
    recall,
    refusal,
)


def test_an_exact_index_finds_what_float64_finds(tmp_path: Path) -> None:
    vectors, queries = make_clusters(2000), make_clusters(30, seed=1)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    assert (len(index), index.dim, index.kind, index.space_id, index.recall) == (2000, DIM, "exact", SPACE, 1.0)
    assert (index.bundle, index.precision) == ("/runs/mine", "fp32")
    wanted, cosines = oracle(vectors, queries, 10)
    for neighbours in (index.search(queries, 10), Index.load(tmp_path / "index").search(queries, 10)):
        assert [[hit.row for hit in hits] for hits in neighbours] == wanted.tolist()
        assert [[hit.path for hit in hits] for hits in neighbours] == [
            [f"photos/{row}.jpg" for row in numbers] for numbers in wanted
        ]
        np.testing.assert_allclose([[hit.score for hit in hits] for hits in neighbours], cosines, atol=1e-6)


def test_one_query_is_answered_as_many_are(tmp_path: Path) -> None:
    vectors, queries = make_clusters(500), make_clusters(40, seed=1)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    together = [[hit.row for hit in hits] for hits in index.search(queries, 5)]
    assert [[hit.row for hit in index.search(query[None], 5)[0]] for query in queries] == together
    assert index.search(np.empty((0, DIM), np.float32), 5) == []
    scaled = [[hit.row for hit in hits] for hits in index.search(queries * np.float32(1000), 5)]
    assert scaled == together


def test_more_neighbours_than_vectors_gives_all_of_them(tmp_path: Path) -> None:
    vectors = make_clusters(7)
    for kind in ("exact", "hnsw"):
        index = build(folder(tmp_path / kind, vectors), tmp_path / f"{kind}-index", kind=kind)
        assert sorted(hit.row for hit in index.search(vectors[:1], 100)[0]) == list(range(7))


def test_a_vector_of_zeros_is_near_to_nothing(tmp_path: Path) -> None:
    vectors = make_clusters(20)
    vectors[3] = 0
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    scores = {hit.row: hit.score for hit in index.search(vectors[:1], 20)[0]}
    assert scores[3] == 0
    assert max(scores, key=lambda row: scores[row]) == 0


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_no_cosine_leaves_its_range(tmp_path: Path, kind: str) -> None:
    vectors = make_clusters(300)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index", kind=kind)
    both = np.concatenate([vectors, -vectors])
    scores = [hit.score for hits in index.search(both, 300, ef_search=300) for hit in hits]
    assert (min(scores), max(scores)) == (-1, 1)
    scores_as_computed, _ = index.searcher(unit(both), 300)
    assert scores_as_computed.max() > 1  # what is cut off


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_most_and_says_how_many(tmp_path: Path, kind: str) -> None:
    vectors, queries = make_clusters(4000), make_clusters(100, seed=1)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index", kind=kind, lists=40)
    assert recall(index, vectors, queries) > 0.9
    assert index.recall > 0.9
    assert recall(index, vectors, queries, probes=40, ef_search=2000) > 0.99
    fewer = recall(index, vectors, queries, probes=1, ef_search=1)
    assert fewer < recall(index, vectors, queries)
    scores = [hit.score for hit in index.search(queries[:1], 10)[0]]
    assert scores == sorted(scores, reverse=True)


def test_the_recall_that_is_told_is_the_recall_there_is(tmp_path: Path) -> None:
    vectors = make_clusters(4000)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index", kind="ivf", lists=100, probes=1)
    sample = np.unique(np.linspace(0, 3999, 100).round().astype(int))
    wanted, _ = oracle(vectors, vectors[sample], 11)
    rows = [[hit.row for hit in hits] for hits in index.search(vectors[sample], 11)]
    share = [len(set(a) & set(b[1:])) / 10 for a, b in zip(rows, wanted.tolist(), strict=True)]
    assert index.recall == pytest.approx(np.mean(share), abs=1e-3)
    assert index.recall < 0.9


def test_lists_are_sized_by_the_data_and_refused_where_it_is_too_few(tmp_path: Path) -> None:
    assert faiss_kinds.choose_numbers("ivf", faiss_kinds.Options(), 10**6) == {"lists": 4000, "probes": 250}
    assert faiss_kinds.choose_numbers("ivf", faiss_kinds.Options(), 25_000)["lists"] == 632
    options = faiss_kinds.Options(lists=4, probes=99)
    assert faiss_kinds.choose_numbers("ivf", options, 10**4) == {"lists": 4, "probes": 4}
    embeddings = folder(tmp_path / "out", make_clusters(5000))
    message = refusal(embeddings, tmp_path / "index", kind="ivf")
    assert "5000 embeddings are too few for an ivf index of 283 lists, 39 to each; take --kind exact" in message
    assert "--lists 128" in message
    assert len(build(embeddings, tmp_path / "index", kind="ivf", lists=128)) == 5000


def test_several_threads_may_search_at_once(tmp_path: Path) -> None:
    vectors = make_clusters(3000)
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
    vectors = make_clusters(50)
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
        neighbours = index.search(vectors[:5], 8)
        wanted = wanted or neighbours
        assert neighbours == wanted
        assert index.space_id == SPACE
    halves = folder(tmp_path / "halves", vectors.astype(np.float16))
    assert build(halves, tmp_path / "halves-index").search(vectors[:1], 1)[0][0].row == 0


def test_another_space_is_refused_by_name(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(50)), tmp_path / "index")
    index.check_space(SPACE, "runs/mine")
    with pytest.raises(
        MvmrError, match=r"runs/x gives vectors of another embedding space \(bbbbbbbbbbbb\) than the ind"
    ):
        index.check_space(OTHER, "runs/x")
    for number, space in enumerate((SPACE, OTHER)):
        folder(tmp_path / "mixed" / f"shard-{number:05d}-of-00002", make_clusters(50), space=space)
    assert "mixes embedding spaces: shard-00000-of-00002 is of space aaaaaaaaaaaa" in refusal(tmp_path / "mixed", "x")


def test_queries_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(50)), tmp_path / "index")
    for wrong in (np.zeros((1, DIM + 1), np.float32), np.zeros(DIM, np.float32)):
        with pytest.raises(MvmrError, match=rf"takes vectors \[Q, {DIM}\], these are "):
            index.search(wrong, 3)
    with pytest.raises(MvmrError, match="NaN or infinity"):
        index.search(np.full((1, DIM), np.nan, np.float32), 3)
    with pytest.raises(MvmrError, match="k = 0"):
        index.search(np.ones((1, DIM), np.float32), 0)


def test_raw_and_normalised_vectors_of_a_student_are_not_mixed(tmp_path: Path) -> None:
    vectors, space = make_clusters(50), normalized_space(SPACE)
    raw = build(folder(tmp_path / "raw", vectors), tmp_path / "raw-index")
    unit_index = build(folder(tmp_path / "unit", unit(vectors), space=space), tmp_path / "unit-index")
    unit_index.check_space(space, "runs/mine")
    with pytest.raises(MvmrError, match=r"runs/mine gives raw vectors and the index .* holds normalised ones of the"):
        unit_index.check_space(SPACE, "runs/mine")
    with pytest.raises(MvmrError, match=r"runs/mine gives normalised vectors and the index .* holds raw ones of the"):
        raw.check_space(space, "runs/mine")
    with pytest.raises(MvmrError, match="of another embedding space"):
        raw.check_space(normalized_space(OTHER), "runs/x")
    for number, (rows, name) in enumerate([(vectors, SPACE), (unit(vectors), space)]):
        folder(tmp_path / "mixed" / f"shard-0000{number}-of-00002", rows, space=name)
    assert "mixes embedding spaces" in refusal(tmp_path / "mixed", tmp_path / "mixed-index")


def test_what_stands_at_out_is_replaced_only_when_asked_and_only_an_index(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a", make_clusters(50)), folder(tmp_path / "b", make_clusters(60))
    build(first, tmp_path / "index")
    assert "holds an index; give another --out, or --overwrite" in refusal(second, tmp_path / "index")
    assert len(Index.load(tmp_path / "index")) == 50
    assert len(build(second, tmp_path / "index", overwrite=True)) == 60
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"index.json", "paths.arrow", "vectors.npy"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "exists and is no index" in refusal(first, tmp_path / "mine", overwrite=True)
    (tmp_path / "mine").rename(tmp_path / "new.partial")
    assert "holds 'thesis.tex'; give another --out" in refusal(first, tmp_path / "new")
    assert (tmp_path / "new.partial" / "thesis.tex").exists()


def test_a_build_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = folder(tmp_path / "out", make_clusters(50))
    (tmp_path / "index.partial").mkdir()
    for name in (".lock", "vectors.npy", "paths.arrow", "index.json"):
        (tmp_path / "index.partial" / name).write_text("half")
    assert len(build(embeddings, tmp_path / "index")) == 50
    assert not (tmp_path / "index.partial").exists()


def test_the_largest_and_the_smallest_numbers_keep_their_direction(tmp_path: Path) -> None:
    vectors = make_clusters(50)
    for row, size in ((3, 3e38), (4, 1e-40)):
        vectors[row] = vectors[row] / np.abs(vectors[row]).max() * np.float32(size)
    index = build(folder(tmp_path / "out", vectors), tmp_path / "index")
    for row in (3, 4):
        (hit,) = index.search(vectors[row : row + 1], 1)[0]
        assert (hit.row, hit.score) == (row, pytest.approx(1, abs=1e-3))


def test_an_exact_index_is_built_and_opened_without_holding_its_vectors(tmp_path: Path) -> None:
    stored = open_embeddings(folder(tmp_path / "out", make_clusters(9000), parts=2))
    assert max(len(vectors) for _, vectors in stored.chunks(1000)) == 1000
    assert sum(len(paths) for paths, _ in stored.chunks(1000)) == 9000
    index = build(tmp_path / "out", tmp_path / "index")
    assert isinstance(index.searcher.vectors, np.memmap)
