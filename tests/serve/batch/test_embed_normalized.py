"""The batch job's normalised rows are the raw ones by their lengths, of a space of their own, and mixed with none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mvmr.bundles import bundle as bundles
from mvmr.cli.main import main
from mvmr.errors import MvmrError
from mvmr.serve.batch import job
from mvmr.serve.batch.stored import open_embeddings
from mvmr.serve.engine import Engine
from mvmr.serve.index.index import build
from mvmr.serve.index.search import search
from mvmr.serve.vectors import normalized_space
from tests.serve.batch.jobs import COUNT, contents, refusal, rows, run
from tests.serve.test_vectors import normalize_by_hand

pytestmark = pytest.mark.usefixtures("one_thread")


HEADS = ("animals",)


@pytest.fixture(scope="module")
def raw(path: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the batch job makes of the photos without."""
    out = tmp_path_factory.mktemp("raw") / "out"
    run(path, photos, out, heads=HEADS)
    return out


@pytest.fixture(scope="module")
def unit_rows(path: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it makes of them with."""
    out = tmp_path_factory.mktemp("unit") / "out"
    summary = run(path, photos, out, normalize=True, heads=HEADS)
    assert summary.space_id == normalized_space(bundles.load(path).space_id)
    return out


def embeddings(folder: Path) -> np.ndarray:
    return np.array([row["embedding"] for row in rows(folder)], np.float64)


def test_rows_have_length_one_and_all_else_is_as_it_was(path: Path, raw: Path, unit_rows: Path) -> None:
    np.testing.assert_allclose(embeddings(unit_rows), normalize_by_hand(embeddings(raw)), atol=1e-6)
    space = normalized_space(bundles.load(path).space_id)
    for mine, expected in zip(rows(unit_rows), rows(raw), strict=True):
        assert mine["space_id"] == space
        assert {**mine, "embedding": 0, "space_id": 0} == {**expected, "embedding": 0, "space_id": 0}  # classes, too
    for folder, normalize in ((unit_rows, True), (raw, False)):
        manifest = json.loads((folder / "manifest.json").read_text())
        metadata = pq.read_schema(folder / "part-00000.parquet").metadata
        assert manifest["normalize"] is normalize is json.loads(metadata[b"normalize"])
        assert manifest["space_id"] == metadata[b"space_id"].decode() == open_embeddings(folder).space_id
        assert (manifest["space_id"] == space) == normalize


def test_halves_are_rounded_from_length_one(path: Path, photos: Path, unit_rows: Path, tmp_path: Path) -> None:
    run(path, photos, tmp_path / "half", normalize=True, dtype="float16", heads=())
    assert "halffloat" in str(pq.read_schema(tmp_path / "half" / "part-00000.parquet").field("embedding").type)
    np.testing.assert_array_equal(embeddings(tmp_path / "half"), embeddings(unit_rows).astype(np.float16))


@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_one_file_holds_them_too(path: Path, photos: Path, raw: Path, tmp_path: Path, name: str) -> None:
    run(path, photos, tmp_path / name, normalize=True, heads=())
    stored = open_embeddings(tmp_path / name)
    assert stored.space_id == normalized_space(bundles.load(path).space_id)
    vectors = np.concatenate([vectors for _, vectors in stored.chunks()])
    np.testing.assert_allclose(vectors, normalize_by_hand(embeddings(raw)), atol=1e-6)


@pytest.mark.parametrize(("factor", "length"), [(1e7, 1), (0, 0)])
def test_what_is_too_large_for_halves_or_zero(
    path: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, length: float
) -> None:
    scale(monkeypatch, factor)
    run(path, photos, tmp_path / "out", normalize=True, dtype="float16", heads=())
    np.testing.assert_allclose(np.linalg.norm(embeddings(tmp_path / "out"), axis=1), length, atol=1e-3)


def test_what_is_not_finite_is_refused(
    path: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale(monkeypatch, np.inf)
    assert "holds NaN or infinity" in refusal(path, photos, tmp_path / "out", normalize=True, heads=())


def scale(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Have the engine give so many times its embeddings, and none look whether they are right."""
    monkeypatch.setattr(job, "_check_engine", lambda engine: None)
    real = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, pixels: real(self, pixels) * np.float32(factor))


def test_a_run_goes_on_only_as_it_began(path: Path, photos: Path, raw: Path, unit_rows: Path) -> None:
    before = contents(unit_rows), contents(raw)
    assert "normalize (True there, None now)" in refusal(path, photos, unit_rows, resume=True, heads=HEADS)
    message = refusal(path, photos, raw, resume=True, normalize=True, heads=HEADS)
    assert "normalize (None there, True now)" in message
    assert run(path, photos, unit_rows, resume=True, normalize=True, heads=HEADS).added == 0
    assert (contents(unit_rows), contents(raw)) == before


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_normalised(path: Path, photos: Path, unit_rows: Path, tmp_path: Path) -> None:
    shutil.copytree(unit_rows, tmp_path / "out")
    (tmp_path / "out" / "part-00002.parquet").unlink()
    assert run(path, photos, tmp_path / "out", resume=True, normalize=True, heads=HEADS).added > 0
    assert contents(tmp_path / "out") == contents(unit_rows)
    run(path, photos, tmp_path / "all.npy", normalize=True, heads=())
    assert "normalize (True there, None now)" in refusal(path, photos, tmp_path / "all.npy", resume=True, heads=())


def test_an_index_of_them_is_searched_by_vectors_of_their_space(path: Path, photos: Path, tmp_path: Path) -> None:
    command = ["embed", str(path), str(photos), "--out", str(tmp_path / "out"), "--normalize"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    index, engine = build(tmp_path / "out", tmp_path / "index"), Engine.load(path, threads=1)
    index.check_space(engine.space_of(normalize=True), engine.name)
    with pytest.raises(MvmrError, match="gives raw vectors and the index"):
        index.check_space(engine.space_id, engine.name)
    hits = search(tmp_path / "index", photos / "05.png", k=COUNT)
    assert (hits[0].path, hits[0].score) == (f"{photos}/05.png", pytest.approx(1, abs=1e-6))
    assert max(hit.score for hit in hits) <= 1
    answer = CliRunner().invoke(main, ["embed", "--teacher", "clip:x", str(photos), "--out", "x.npy", "--normalize"])
    assert "--normalize is for bundles" in answer.output
