"""The batch job's rows are the student's embeddings, in every form that they can have; what it can't do is one line."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.cli.main import main
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.serve.batch import job
from mvmr.serve.batch.job import read_shard
from mvmr.serve.batch.stored import open_embeddings
from mvmr.serve.engine import Engine
from mvmr.serve.index.index import build
from mvmr.storage.lock import hold
from tests.data.standard_sets import write_stl10
from tests.serve.batch.jobs import BAD, CLASSES, COUNT, DIM, contents, picture, refusal, rows, run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_are_the_students_embeddings_with_their_paths_sizes_and_hashes(
    bundle: Path, photos: Path, finished_run: Path
) -> None:
    good = [path for path in sorted(photos.iterdir()) if path.name not in BAD]
    table = rows(finished_run)
    assert [row["path"] for row in table] == [str(path) for path in good]
    student = bundles.load(bundle).student()
    wanted = student.embed(good).numpy()
    seen = np.array([row["embedding"] for row in table], np.float32)
    np.testing.assert_allclose(seen, wanted, rtol=1e-3, atol=1e-4)
    assert [row["sha256"] for row in table] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in good]
    sizes = [picture(int(path.stem)).size for path in good]
    assert [(row["width"], row["height"]) for row in table] == sizes
    assert {row["space_id"] for row in table} == {bundles.load(bundle).space_id}
    head = bundles.load(bundle).head("photos")
    likely = torch.softmax(torch.from_numpy(wanted @ head.weight.T + head.bias), 1).max(1)
    assert [row["photos"] for row in table] == [CLASSES[int(number)] for number in likely.indices]
    np.testing.assert_allclose([row["photos_probability"] for row in table], likely.values, rtol=1e-2)


def test_what_cannot_be_read_is_in_errors_with_its_reason(photos: Path, finished_run: Path) -> None:
    table = pq.read_table(finished_run / "errors.parquet").to_pylist()
    assert [row["path"] for row in table] == [str(photos / name) for name in BAD]
    assert [row["code"] for row in table] == ["empty", "not-an-image", "unreadable"]
    assert all(row["reason"] for row in table)


def test_the_schema_says_what_the_docs_promise(bundle: Path, finished_run: Path) -> None:
    schema = pq.read_schema(finished_run / "part-00000.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "path": "string",
        "embedding": f"fixed_size_list<element: float>[{DIM}]",
        "width": "int32",
        "height": "int32",
        "sha256": "string",
        "space_id": "dictionary<values=string, indices=int32, ordered=0>",
        "photos": "dictionary<values=string, indices=int32, ordered=0>",
        "photos_probability": "float",
    }
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert (metadata["space_id"], metadata["precision"]) == (bundles.load(bundle).space_id, "fp32")
    assert json.loads(metadata["preprocessing"]) == Preprocess.for_size(16).to_dict()


def test_parts_hold_their_stretch_and_the_manifest_lists_them(finished_run: Path) -> None:
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert (manifest["rows"], manifest["errors"]) == (COUNT - 3, 3)
    assert [part["rows"] + part["errors"] for part in manifest["parts"]] == [5, 5, 5, 5, 3]
    for part in manifest["parts"]:
        content = (finished_run / part["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part["bytes"], part["sha256"])
        assert pq.read_metadata(finished_run / part["file"]).num_rows == part["rows"]


@pytest.mark.slow
def test_the_number_of_cores_and_the_size_of_parts_leave_the_rows_as_they_are(
    bundle: Path, photos: Path, finished_run: Path, tmp_path: Path
) -> None:
    run(bundle, photos, tmp_path / "one", threads=1)
    assert contents(tmp_path / "one") == contents(finished_run)
    run(bundle, photos, tmp_path / "large", part_rows=1000)
    for mine, expected in zip(rows(tmp_path / "large"), rows(finished_run), strict=True):
        np.testing.assert_allclose(mine.pop("embedding"), expected.pop("embedding"), rtol=1e-4, atol=1e-5)
        assert mine.pop("photos_probability") == pytest.approx(expected.pop("photos_probability"), rel=1e-3)
        assert mine == expected


def test_one_parquet_file_holds_all_rows(bundle: Path, photos: Path, finished_run: Path, tmp_path: Path) -> None:
    summary = run(bundle, photos, tmp_path / "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == rows(finished_run)
    assert (summary.rows, summary.errors) == (COUNT - 3, 3)
    assert summary.errors_file.read_bytes() == (finished_run / "errors.parquet").read_bytes()
    names = {"all.parquet", "all.errors.parquet", "all.manifest.json", "finished_run"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "holds finished embeddings (20 rows)" in refusal(bundle, photos, tmp_path / "all.parquet")
    again = run(bundle, photos, tmp_path / "all.parquet", resume=True)
    assert (again.added, again.rows) == (0, COUNT - 3)
    assert "dtype" in refusal(bundle, photos, tmp_path / "all.parquet", resume=True, dtype="float16")


def test_one_npy_file_comes_with_its_paths(bundle: Path, photos: Path, finished_run: Path, tmp_path: Path) -> None:
    run(bundle, photos, tmp_path / "all.npy", heads=())
    embeddings = np.load(tmp_path / "all.npy", mmap_mode="r")
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, np.array([row["embedding"] for row in rows(finished_run)], np.float32))
    paths = (tmp_path / "all.paths.txt").read_text().splitlines()
    assert paths == [row["path"] for row in rows(finished_run)]
    assert "give FILE.parquet" in refusal(bundle, photos, tmp_path / "other.npy")


def test_half_precision_is_the_rounded_float32(bundle: Path, photos: Path, finished_run: Path, tmp_path: Path) -> None:
    run(bundle, photos, tmp_path / "half", dtype="float16")
    schema = pq.read_schema(tmp_path / "half" / "part-00000.parquet")
    assert str(schema.field("embedding").type) == f"fixed_size_list<element: halffloat>[{DIM}]"
    halves = np.array([row["embedding"] for row in rows(tmp_path / "half")], np.float16)
    wanted = np.array([row["embedding"] for row in rows(finished_run)], np.float32).astype(np.float16)
    np.testing.assert_array_equal(halves, wanted)


def test_what_float16_cannot_hold_is_refused(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_check_engine", lambda engine: None)
    real = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, pixels: real(self, pixels) + np.float32(1e6))
    message = refusal(bundle, photos, tmp_path / "half", dtype="float16")
    assert f"the embedding of {photos}/00.png holds NaN or infinity in float16; take --dtype float32" in message


@pytest.mark.slow
def test_shards_make_up_the_whole(bundle: Path, photos: Path, finished_run: Path, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        run(bundle, photos, tmp_path / "out", shard=(number, 3))
    folders = sorted((tmp_path / "out").iterdir())
    assert [folder.name for folder in folders] == [f"shard-0000{number}-of-00003" for number in range(3)]
    paths = [row["path"] for folder in folders for row in rows(folder)]
    assert paths == [row["path"] for row in rows(finished_run)]
    assert open_embeddings(tmp_path / "out").count == COUNT - 3
    assert "counted from 0" in refusal(bundle, photos, tmp_path / "out", shard=(3, 3))
    assert "give a folder" in refusal(bundle, photos, tmp_path / "all.parquet", shard=(0, 3))
    assert read_shard("0/4") == (0, 4)
    for wrong in ("4/4", "1", "a/b", "-1/3", "1/0"):
        with pytest.raises(MvmrError, match="is not i/n"):
            read_shard(wrong)


@pytest.mark.slow
def test_tar_shards_and_addresses_give_the_same_rows(
    bundle: Path, photos: Path, finished_run: Path, tmp_path: Path
) -> None:
    good = [path for path in sorted(photos.iterdir()) if path.exists()]
    fs = fsspec.filesystem("memory")
    for number in range(2):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as archive:
            for path in good[11 * number : 11 * (number + 1)]:
                archive.add(path, path.name)
    for path in good:
        fs.pipe_file(f"/photos/{path.name}", path.read_bytes())
    run(bundle, f"shards:{tmp_path}/s-{{0..1}}.tar", tmp_path / "tars")
    run(bundle, "memory://photos", tmp_path / "memory")
    fs.rm("/photos", recursive=True)
    for table in (rows(tmp_path / "tars"), rows(tmp_path / "memory")):
        assert [Path(row["path"]).name for row in table] == [Path(row["path"]).name for row in rows(finished_run)]
        assert [row["sha256"] for row in table] == [row["sha256"] for row in rows(finished_run)]
        for row, expected in zip(table, rows(finished_run), strict=True):
            np.testing.assert_allclose(row["embedding"], expected["embedding"], rtol=1e-4, atol=1e-5)
    assert rows(tmp_path / "tars")[-1]["path"] == f"{tmp_path}/s-1.tar/22.png"
    (tmp_path / "tars" / "part-00003.parquet").unlink()
    before = contents(tmp_path / "memory")
    run(bundle, f"shards:{tmp_path}/s-{{0..1}}.tar", tmp_path / "tars", resume=True)
    assert contents(tmp_path / "tars").keys() == before.keys()


def test_a_data_set_is_embedded_whole_under_its_keys(bundle: Path, tmp_path: Path) -> None:
    write_stl10(tmp_path)
    run(bundle, f"stl10:{tmp_path}", tmp_path / "out")
    table = rows(tmp_path / "out")
    assert [row["path"] for row in table] == [
        *(f"unlabelled/{number:05d}" for number in range(11)),
        *(f"test/{number:05d}" for number in range(5)),
    ]
    assert {(row["width"], row["height"]) for row in table} == {(96, 96)}
    engine, test = Engine.load(bundle), open_images(f"stl10:{tmp_path}", "test")
    expected = engine(np.stack([engine.preprocess.image(test.load(number)) for number in range(5)]))
    np.testing.assert_allclose([row["embedding"] for row in table[11:]], expected, rtol=1e-4, atol=1e-5)


def test_other_settings_are_refused_by_name(bundle: Path, photos: Path, finished_run: Path, tmp_path: Path) -> None:
    before = contents(finished_run)
    assert "holds finished embeddings (20 rows); give another --out" in refusal(bundle, photos, finished_run)
    assert "dtype ('float32' there, 'float16' now)" in refusal(
        bundle, photos, finished_run, resume=True, dtype="float16"
    )
    assert "part_rows (5 there, 6 now)" in refusal(bundle, photos, finished_run, resume=True, part_rows=6)
    assert "heads" in refusal(bundle, photos, finished_run, resume=True, heads=())
    shutil.copytree(photos, tmp_path / "changed", symlinks=True)
    message = refusal(bundle, tmp_path / "changed", finished_run, resume=True)
    assert f"{finished_run} holds another run, it differs in images (" in message
    assert contents(finished_run) == before


def test_bad_arguments_are_one_line_and_leave_nothing(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "unknown head 'phtos'; did you mean 'photos'?" in refusal(bundle, photos, out, heads=["phtos"])
    assert "unknown dtype 'float8'" in refusal(bundle, photos, out, dtype="float8")
    assert "has no int8 file; make it by `mvmr export" in refusal(bundle, photos, out, precision="int8")
    assert "no bundle at" in refusal(tmp_path / "none", photos, out)
    assert "no images at" in refusal(bundle, tmp_path / "none", out)
    assert "part_rows = 0" in refusal(bundle, photos, out, part_rows=0)
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refusal(bundle, tmp_path / "empty", out)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert "no images in" in refusal(bundle, tmp_path / "empty.tar", out)
    (tmp_path / "file").write_text("x")
    assert "is a file; give a folder" in refusal(bundle, photos, tmp_path / "file")
    (tmp_path / "taken.parquet").write_text("x")
    assert "no taken.manifest.json beside it" in refusal(bundle, photos, tmp_path / "taken.parquet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "holds 'thesis.tex' and no run of mvmr embed" in refusal(bundle, photos, tmp_path / "mine", resume=True)
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    assert "is not the manifest of a run" in refusal(bundle, photos, tmp_path / "mine", resume=True)
    names = {"empty", "empty.tar", "file", "taken.parquet", "mine"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_damaged_bundle_is_named_with_its_file(bundle: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    with (tmp_path / "copy" / "onnx" / "encoder.fp32.onnx").open("ab") as file:
        file.write(b"x")
    assert "onnx/encoder.fp32.onnx has changed" in refusal(tmp_path / "copy", photos, tmp_path / "out")


def test_an_engine_that_does_not_do_what_was_verified_is_refused(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, pixels: real(self, pixels) * np.float32(1.5))
    assert "is off by 0.5 from what was verified" in refusal(bundle, photos, tmp_path / "out")


def test_two_processes_do_not_share_a_folder(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out" / ".lock", make=True):
        assert "another process is writing in" in refusal(bundle, photos, tmp_path / "out", resume=True)
    run(bundle, photos, tmp_path / "out")


def test_the_command_says_what_it_made_and_what_to_run_next(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["embed", str(bundle), str(photos), "--out", str(out), "--head", "all"])
    assert done.exit_code == 0, done.output
    assert f"{out}: 20 embeddings of width {DIM}, 23 images now, " in done.stdout
    assert f"3 images could not be read: {out}/errors.parquet" in done.stderr
    assert "img/s  eta" in done.stderr
    assert "photos" in pq.read_schema(out / "part-00000.parquet").names
    again = CliRunner().invoke(main, ["embed", str(bundle), str(photos), "--out", str(out)])
    assert again.exit_code == 1
    assert again.stderr.splitlines()[-1].startswith(f"error: {out} holds finished embeddings")
    index_run = CliRunner().invoke(main, ["index", str(out), "--out", str(tmp_path / "index")])
    assert index_run.exit_code == 0, index_run.output
    assert f"20 vectors of width {DIM}, exact" in index_run.stdout
    search_run = CliRunner().invoke(main, ["search", str(tmp_path / "index"), str(photos / "05.png"), "-k", "3"])
    assert search_run.exit_code == 0, search_run.output
    lines = search_run.stdout.splitlines()
    assert lines[0] == f"1.0000  {photos}/05.png"
    assert len(lines) == 3
    hits = CliRunner().invoke(main, ["search", str(tmp_path / "index"), str(photos / "05.png"), "--json"])
    assert len(json.loads(hits.stdout)) == 10
    assert json.loads(hits.stdout)[0]["path"] == f"{photos}/05.png"


def test_a_run_in_which_every_image_fails_has_an_exit_of_its_own(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_text("not an image")
    command = ["embed", str(bundle), str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 3
    assert done.stderr.splitlines()[-2] == f"3 images could not be read: {tmp_path}/out/errors.parquet"
    assert done.stderr.splitlines()[-1].startswith("error: not one image was embedded")
    assert "next:" not in done.stderr
    assert pq.read_table(tmp_path / "out" / "errors.parquet").num_rows == 3


def test_search_refuses_another_space_and_a_bundle_that_is_gone(bundle: Path, photos: Path, tmp_path: Path) -> None:
    from mvmr.serve.index.search import search

    shutil.copytree(bundle, tmp_path / "moved")
    run(tmp_path / "moved", photos, tmp_path / "out")
    build(tmp_path / "out", tmp_path / "index")
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(MvmrError, match=r"moved, the bundle that made the index .* is not there; give it by --bundle"):
        search(tmp_path / "index", photos / "05.png")
    assert search(tmp_path / "index", photos / "05.png", bundle=bundle)[0].path == f"{photos}/05.png"
    with pytest.raises(MvmrError, match="cannot read image"):
        search(tmp_path / "index", photos / "08.png", bundle=bundle)
    description = json.loads((tmp_path / "index" / "index.json").read_text()) | {"space_id": "f" * 32}
    (tmp_path / "index" / "index.json").write_text(json.dumps(description))
    with pytest.raises(MvmrError, match=r"gives vectors of another embedding space \(\w{12}\) than the index .*ffff"):
        search(tmp_path / "index", photos / "05.png", bundle=bundle)


@pytest.mark.slow
def test_the_job_needs_no_torch(bundle: Path, photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from mvmr.serve import jobs_cli; from mvmr.serve.batch.job import embed; "
        "from mvmr.serve.index.index import build; from mvmr.serve.index.search import search; "
        "bundle, images, out = sys.argv[1:]; embed(bundle, images, out=out, heads=['all']); "
        "build(out, out + '-index', kind='hnsw'); search(out + '-index', images + '/05.png'); "
        "bad = {'torch', 'torchvision', 'scipy', 'sklearn', 'skimage', 's3fs'} & set(sys.modules); "
        "assert not bad, bad"
    )
    arguments = [str(bundle), str(photos), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
