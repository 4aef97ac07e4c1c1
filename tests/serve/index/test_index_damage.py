"""An index whose files lie or lead astray is refused by name, before it costs memory or harms anything."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from mvmr.serve.index import faiss_kinds
from mvmr.serve.index.index import Index, build
from tests.serve.index.indexes import DIM, folder, loading_refusal, make_clusters, redescribe


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    embeddings = folder(tmp_path / "out", make_clusters(2000))
    assert "no index at" in loading_refusal(tmp_path / "none")
    build(embeddings, tmp_path / "index", kind="hnsw")
    description = json.loads((tmp_path / "index" / "index.json").read_text())
    file = tmp_path / "index" / "hnsw.faiss"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert "hnsw.faiss has not the" in loading_refusal(tmp_path / "index")
    file.write_bytes(b"\x00" * len(content))
    assert "hnsw.faiss has changed since it was written" in loading_refusal(tmp_path / "index")
    file.unlink()
    assert "it has no hnsw.faiss" in loading_refusal(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text(json.dumps(description | {"format": 2}))
    assert "has format 2, this mvmr reads 1" in loading_refusal(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text("[]")
    assert "index.json is not the description of an index" in loading_refusal(tmp_path / "index")


def test_an_index_of_before_which_has_no_hashes_is_read(tmp_path: Path) -> None:
    vectors = make_clusters(2000)
    for kind in ("exact", "ivf", "hnsw"):
        index = build(folder(tmp_path / kind, vectors), tmp_path / f"{kind}-index", kind=kind, lists=40)
        wanted = index.search(vectors[:3], 4)
        assert Index.load(redescribe(index.path, sha256=None)).search(vectors[:3], 4) == wanted


def test_paths_that_would_be_read_beyond_their_end_are_refused(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(200), parts=1), tmp_path / "index")
    file = index.path / "paths.arrow"
    content = file.read_bytes()
    ends = np.cumsum([0, *(len(f"photos/{number}.jpg") for number in range(200))]).astype("<i4").tobytes()
    assert content.count(ends) == 1
    for wrong in ([2**31 - 1], [-5]):
        file.write_bytes(content.replace(ends[400:404], np.array(wrong, "<i4").tobytes()))
        assert "paths.arrow has changed since it was written" in loading_refusal(index.path)
    redescribe(index.path, sha256=None)
    assert f"cannot read the index {index.path} (" in loading_refusal(index.path)
    file.write_bytes(content.replace(b"photos/7.jpg", b"photos/\xff.jpg"))
    assert f"cannot read the index {index.path} (" in loading_refusal(index.path)


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
    index = build(folder(tmp_path / "out", make_clusters(200)), tmp_path / "index")
    file = index.path / "paths.arrow"
    table = pa.table({"path": column})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    redescribe(index.path, sha256=None, files={"vectors.npy": 200 * DIM * 4 + 128, "paths.arrow": file.stat().st_size})
    assert "the index" in loading_refusal(index.path)


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
    index = build(folder(tmp_path / "out", make_clusters(200)), tmp_path / "index")
    assert str(index.path) in loading_refusal(redescribe(index.path, **changes))


def test_a_pipe_in_an_index_is_not_waited_for(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(200)), tmp_path / "index")
    for name in ("vectors.npy", "index.json"):
        (index.path / name).unlink()
        os.mkfifo(index.path / name)
        assert name in loading_refusal(index.path)


def rewrite(index: Index, change: Callable[[Any], None]) -> str:
    """Why an index is refused whose FAISS file was changed by `change`, with a description that vouches for it."""
    file = index.path / faiss_kinds.FILES[index.kind]
    opened = faiss.read_index(str(file))
    change(opened)
    faiss.write_index(opened, str(file))
    files = {name: (index.path / name).stat().st_size for name in (file.name, "paths.arrow")}
    return loading_refusal(redescribe(index.path, sha256=None, files=files))


def test_lists_that_lead_astray_are_refused(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(2000)), tmp_path / "index", kind="ivf", lists=40)

    def number(row: int) -> Callable[[Any], None]:
        def change(index: Any) -> None:
            lists = faiss.downcast_InvertedLists(index.invlists)
            faiss.rev_swig_ptr(lists.get_ids(0), lists.list_size(0))[0] = row

        return change

    for row in (2000, -1, 2**40):
        assert "its row numbers don't fit one another" in rewrite(index, number(row))
    assert "ivf.faiss" in loading_refusal(redescribe(index.path, sha256={"ivf.faiss": "0" * 64}))
    redescribe(index.path, sha256=None, numbers={"lists": 41, "probes": 3})
    assert "its cells don't fit one another" in loading_refusal(index.path)


def test_links_that_lead_astray_are_refused(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(2000)), tmp_path / "index", kind="hnsw")
    file = index.path / "hnsw.faiss"
    content, opened = file.read_bytes(), faiss.read_index(str(file))
    graph = opened.hnsw
    links, levels, starts = map(faiss.vector_to_array, (graph.neighbors, graph.levels, graph.offsets))
    high, low = int(np.argmax(levels)), int(np.argmin(levels))
    upper = int(starts[high]) + 2 * 32  # the first link of the level above the lowest
    redescribe(index.path, sha256=None)
    for position, row in ((5, 2000), (5, -2), (upper, low)):
        wrong = links.copy()
        wrong[position] = row
        assert content.count(links.tobytes()) == 1
        file.write_bytes(content.replace(links.tobytes(), wrong.tobytes()))
        assert f"cannot read the index {index.path} (" in loading_refusal(index.path)
    wrong = levels.copy()
    wrong[low] += 1
    file.write_bytes(content.replace(levels.tobytes(), wrong.tobytes()))
    assert f"cannot read the index {index.path} (" in loading_refusal(index.path)
    file.write_bytes(content)
    assert len(Index.load(index.path)) == 2000


@pytest.mark.skipif(
    not hasattr(faiss, "set_deserialization_vector_byte_limit"), reason="this FAISS can't be told how much is too much"
)
def test_a_list_longer_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(2000)), tmp_path / "index", kind="hnsw")
    file = index.path / "hnsw.faiss"
    content, opened = file.read_bytes(), faiss.read_index(str(file))
    levels = faiss.vector_to_array(opened.hnsw.levels).tobytes()
    count = np.array([2000], "<u8").tobytes()
    assert content.count(count + levels) == 1
    file.write_bytes(content.replace(count + levels, np.array([2**28], "<u8").tobytes() + levels))
    redescribe(index.path, sha256=None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    assert f"cannot read the index {index.path} (" in loading_refusal(index.path)
    status = Path("/proc/self/status").read_text()
    peak, now = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) for name in ("VmHWM", "VmRSS"))
    assert peak - now < 200_000


def test_another_kind_of_faiss_file_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(folder(tmp_path / "out", make_clusters(2000)), tmp_path / "index", kind="hnsw")
    file = index.path / "hnsw.faiss"
    faiss.write_index(faiss.index_factory(DIM, "PCA8,Flat"), str(file))
    files = {name: (index.path / name).stat().st_size for name in (file.name, "paths.arrow")}
    monkeypatch.setattr(faiss, "read_index", lambda name: pytest.fail("FAISS has read it"))
    assert "its kind is not as FAISS writes it" in loading_refusal(redescribe(index.path, sha256=None, files=files))


@pytest.mark.slow
def test_vectors_of_any_bytes_are_harmless(tmp_path: Path) -> None:
    index = build(folder(tmp_path / "out", make_clusters(2000)), tmp_path / "index")
    file = index.path / "vectors.npy"
    content = file.read_bytes()
    size = 2000 * DIM * 4
    for filling in (b"\xff" * size, np.random.default_rng(0).bytes(size), np.full(size // 4, np.inf, "<f4").tobytes()):
        file.write_bytes(content[:-size] + filling)
        for k in (1, 10, 2000):
            for hits in Index.load(index.path).search(make_clusters(25, seed=1), k):
                assert all(0 <= hit.row < 2000 for hit in hits)
