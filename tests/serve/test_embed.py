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
from tests.serve.jobs import BAD, CLASSES, COUNT, DIM, contents, picture, refused, rows, run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_are_the_students_embeddings_with_their_paths_sizes_and_hashes(
    bundle: Path, photos: Path, undisturbed: Path
) -> None:
    good = [path for path in sorted(photos.iterdir()) if path.name not in BAD]
    found = rows(undisturbed)
    assert [row["path"] for row in found] == [str(path) for path in good]
    student = bundles.load(bundle).student()
    wanted = student.embed(good).numpy()
    seen = np.array([row["embedding"] for row in found], np.float32)
    np.testing.assert_allclose(seen, wanted, rtol=1e-3, atol=1e-4)
    assert [row["sha256"] for row in found] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in good]
    sizes = [picture(int(path.stem)).size for path in good]
    assert [(row["width"], row["height"]) for row in found] == sizes
    assert {row["space_id"] for row in found} == {bundles.load(bundle).space_id}
    head = bundles.load(bundle).head("photos")
    likely = torch.softmax(torch.from_numpy(wanted @ head.weight.T + head.bias), 1).max(1)
    assert [row["photos"] for row in found] == [CLASSES[int(number)] for number in likely.indices]
    np.testing.assert_allclose([row["photos_probability"] for row in found], likely.values, rtol=1e-2)


def test_what_cannot_be_read_is_in_errors_with_its_reason(photos: Path, undisturbed: Path) -> None:
    found = pq.read_table(undisturbed / "errors.parquet").to_pylist()
    assert [row["path"] for row in found] == [str(photos / name) for name in BAD]
    assert [row["code"] for row in found] == ["empty", "not-an-image", "unreadable"]
    assert all(row["reason"] for row in found)


def test_the_schema_says_what_the_docs_promise(bundle: Path, undisturbed: Path) -> None:
    schema = pq.read_schema(undisturbed / "part-00000.parquet")
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
    said = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert (said["space_id"], said["precision"]) == (bundles.load(bundle).space_id, "fp32")
    assert json.loads(said["preprocessing"]) == Preprocess.for_size(16).to_dict()


def test_parts_hold_their_stretch_and_the_manifest_lists_them(undisturbed: Path) -> None:
    says = json.loads((undisturbed / "manifest.json").read_text())
    assert says["state"] == "finished"
    assert (says["rows"], says["errors"]) == (COUNT - 3, 3)
    assert [part["rows"] + part["errors"] for part in says["parts"]] == [5, 5, 5, 5, 3]
    for part in says["parts"]:
        content = (undisturbed / part["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part["bytes"], part["sha256"])
        assert pq.read_metadata(undisturbed / part["file"]).num_rows == part["rows"]


def test_the_number_of_cores_and_the_size_of_parts_leave_the_rows_as_they_are(
    bundle: Path, photos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run(bundle, photos, tmp_path / "one", threads=1)
    assert contents(tmp_path / "one") == contents(undisturbed)
    run(bundle, photos, tmp_path / "large", part_rows=1000)
    for mine, other in zip(rows(tmp_path / "large"), rows(undisturbed), strict=True):
        np.testing.assert_allclose(mine.pop("embedding"), other.pop("embedding"), rtol=1e-4, atol=1e-5)
        assert mine.pop("photos_probability") == pytest.approx(other.pop("photos_probability"), rel=1e-3)
        assert mine == other


def test_one_parquet_file_holds_all_rows(bundle: Path, photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    made = run(bundle, photos, tmp_path / "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == rows(undisturbed)
    assert (made.rows, made.errors) == (COUNT - 3, 3)
    assert made.errors_file.read_bytes() == (undisturbed / "errors.parquet").read_bytes()
    names = {"all.parquet", "all.errors.parquet", "all.manifest.json", "undisturbed"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "holds finished embeddings (20 rows)" in refused(bundle, photos, tmp_path / "all.parquet")
    again = run(bundle, photos, tmp_path / "all.parquet", resume=True)
    assert (again.added, again.rows) == (0, COUNT - 3)
    assert "dtype" in refused(bundle, photos, tmp_path / "all.parquet", resume=True, dtype="float16")


def test_one_npy_file_comes_with_its_paths(bundle: Path, photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    run(bundle, photos, tmp_path / "all.npy", heads=())
    found = np.load(tmp_path / "all.npy", mmap_mode="r")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([row["embedding"] for row in rows(undisturbed)], np.float32))
    paths = (tmp_path / "all.paths.txt").read_text().splitlines()
    assert paths == [row["path"] for row in rows(undisturbed)]
    assert "give FILE.parquet" in refused(bundle, photos, tmp_path / "other.npy")


def test_half_precision_is_the_rounded_float32(bundle: Path, photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    run(bundle, photos, tmp_path / "half", dtype="float16")
    schema = pq.read_schema(tmp_path / "half" / "part-00000.parquet")
    assert str(schema.field("embedding").type) == f"fixed_size_list<element: halffloat>[{DIM}]"
    halves = np.array([row["embedding"] for row in rows(tmp_path / "half")], np.float16)
    wanted = np.array([row["embedding"] for row in rows(undisturbed)], np.float32).astype(np.float16)
    np.testing.assert_array_equal(halves, wanted)


def test_what_float16_cannot_hold_is_refused(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_check_engine", lambda engine: None)
    real = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, pixels: real(self, pixels) + np.float32(1e6))
    message = refused(bundle, photos, tmp_path / "half", dtype="float16")
    assert f"the embedding of {photos}/00.png holds NaN or infinity in float16; take --dtype float32" in message


def test_shards_make_up_the_whole(bundle: Path, photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        run(bundle, photos, tmp_path / "out", shard=(number, 3))
    folders = sorted((tmp_path / "out").iterdir())
    assert [folder.name for folder in folders] == [f"shard-0000{number}-of-00003" for number in range(3)]
    paths = [row["path"] for folder in folders for row in rows(folder)]
    assert paths == [row["path"] for row in rows(undisturbed)]
    assert open_embeddings(tmp_path / "out").count == COUNT - 3
    assert "counted from 0" in refused(bundle, photos, tmp_path / "out", shard=(3, 3))
    assert "give a folder" in refused(bundle, photos, tmp_path / "all.parquet", shard=(0, 3))
    assert read_shard("0/4") == (0, 4)
    for wrong in ("4/4", "1", "a/b", "-1/3", "1/0"):
        with pytest.raises(MvmrError, match="is not i/n"):
            read_shard(wrong)


def test_tar_shards_and_addresses_give_the_same_rows(
    bundle: Path, photos: Path, undisturbed: Path, tmp_path: Path
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
    for found in (rows(tmp_path / "tars"), rows(tmp_path / "memory")):
        assert [Path(row["path"]).name for row in found] == [Path(row["path"]).name for row in rows(undisturbed)]
        assert [row["sha256"] for row in found] == [row["sha256"] for row in rows(undisturbed)]
        for row, other in zip(found, rows(undisturbed), strict=True):
            np.testing.assert_allclose(row["embedding"], other["embedding"], rtol=1e-4, atol=1e-5)
    assert rows(tmp_path / "tars")[-1]["path"] == f"{tmp_path}/s-1.tar/22.png"
    (tmp_path / "tars" / "part-00003.parquet").unlink()
    before = contents(tmp_path / "memory")
    run(bundle, f"shards:{tmp_path}/s-{{0..1}}.tar", tmp_path / "tars", resume=True)
    assert contents(tmp_path / "tars").keys() == before.keys()


def test_a_data_set_is_embedded_whole_under_its_keys(bundle: Path, tmp_path: Path) -> None:
    write_stl10(tmp_path)
    run(bundle, f"stl10:{tmp_path}", tmp_path / "out")
    made = rows(tmp_path / "out")
    assert [row["path"] for row in made] == [
        *(f"unlabelled/{number:05d}" for number in range(11)),
        *(f"test/{number:05d}" for number in range(5)),
    ]
    assert {(row["width"], row["height"]) for row in made} == {(96, 96)}
    engine, test = Engine.load(bundle), open_images(f"stl10:{tmp_path}", "test")
    expected = engine(np.stack([engine.preprocess.image(test.load(number)) for number in range(5)]))
    np.testing.assert_allclose([row["embedding"] for row in made[11:]], expected, rtol=1e-4, atol=1e-5)


def test_other_settings_are_refused_by_name(bundle: Path, photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    before = contents(undisturbed)
    assert "holds finished embeddings (20 rows); give another --out" in refused(bundle, photos, undisturbed)
    assert "dtype ('float32' there, 'float16' now)" in refused(
        bundle, photos, undisturbed, resume=True, dtype="float16"
    )
    assert "part_rows (5 there, 6 now)" in refused(bundle, photos, undisturbed, resume=True, part_rows=6)
    assert "heads" in refused(bundle, photos, undisturbed, resume=True, heads=())
    shutil.copytree(photos, tmp_path / "changed", symlinks=True)
    message = refused(bundle, tmp_path / "changed", undisturbed, resume=True)
    assert f"{undisturbed} holds another run, it differs in images (" in message
    assert contents(undisturbed) == before


def test_bad_arguments_are_one_line_and_leave_nothing(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "unknown head 'phtos'; did you mean 'photos'?" in refused(bundle, photos, out, heads=["phtos"])
    assert "unknown dtype 'float8'" in refused(bundle, photos, out, dtype="float8")
    assert "has no int8 file; make it by `mvmr export" in refused(bundle, photos, out, precision="int8")
    assert "no bundle at" in refused(tmp_path / "none", photos, out)
    assert "no images at" in refused(bundle, tmp_path / "none", out)
    assert "part_rows = 0" in refused(bundle, photos, out, part_rows=0)
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refused(bundle, tmp_path / "empty", out)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert "no images in" in refused(bundle, tmp_path / "empty.tar", out)
    (tmp_path / "file").write_text("x")
    assert "is a file; give a folder" in refused(bundle, photos, tmp_path / "file")
    (tmp_path / "taken.parquet").write_text("x")
    assert "no taken.manifest.json beside it" in refused(bundle, photos, tmp_path / "taken.parquet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "holds 'thesis.tex' and no run of mvmr embed" in refused(bundle, photos, tmp_path / "mine", resume=True)
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    assert "is not the manifest of a run" in refused(bundle, photos, tmp_path / "mine", resume=True)
    names = {"empty", "empty.tar", "file", "taken.parquet", "mine"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_damaged_bundle_is_named_with_its_file(bundle: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    with (tmp_path / "copy" / "onnx" / "encoder.fp32.onnx").open("ab") as file:
        file.write(b"x")
    assert "onnx/encoder.fp32.onnx has changed" in refused(tmp_path / "copy", photos, tmp_path / "out")


def test_an_engine_that_does_not_do_what_was_verified_is_refused(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, pixels: real(self, pixels) * np.float32(1.5))
    assert "is off by 0.5 from what was verified" in refused(bundle, photos, tmp_path / "out")


def test_two_processes_do_not_share_a_folder(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out" / ".lock", make=True):
        assert "another process is writing in" in refused(bundle, photos, tmp_path / "out", resume=True)
    run(bundle, photos, tmp_path / "out")


def test_the_command_says_what_it_made_and_what_to_run_next(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["embed", str(bundle), str(photos), "--out", str(out), "--head", "all"])
    assert done.exit_code == 0, done.output
    assert f"{out}: 20 embeddings of width 512, 23 images now, " in done.stdout
    assert f"3 images could not be read: {out}/errors.parquet" in done.stderr
    assert "img/s  eta" in done.stderr
    assert "photos" in pq.read_schema(out / "part-00000.parquet").names
    again = CliRunner().invoke(main, ["embed", str(bundle), str(photos), "--out", str(out)])
    assert again.exit_code == 1
    assert again.stderr.splitlines()[-1].startswith(f"error: {out} holds finished embeddings")
    made = CliRunner().invoke(main, ["index", str(out), "--out", str(tmp_path / "index")])
    assert made.exit_code == 0, made.output
    assert "20 vectors of width 512, exact" in made.stdout
    found = CliRunner().invoke(main, ["search", str(tmp_path / "index"), str(photos / "05.png"), "-k", "3"])
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0] == f"1.0000  {photos}/05.png"
    assert len(lines) == 3
    hits = CliRunner().invoke(main, ["search", str(tmp_path / "index"), str(photos / "05.png"), "--json"])
    assert len(json.loads(hits.stdout)) == 10
    assert json.loads(hits.stdout)[0]["path"] == f"{photos}/05.png"


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
    says = json.loads((tmp_path / "index" / "index.json").read_text()) | {"space_id": "f" * 32}
    (tmp_path / "index" / "index.json").write_text(json.dumps(says))
    with pytest.raises(MvmrError, match=r"gives vectors of another embedding space \(\w{12}\) than the index .*ffff"):
        search(tmp_path / "index", photos / "05.png", bundle=bundle)


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
