"""A bundle is whole or not there, whoever reads it meanwhile, and at whatever step its writer dies."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mvmr.bundles import bundle
from mvmr.errors import MvmrError
from mvmr.storage import staging
from tests.bundles.written import with_head, write_stub

KILLS = Path(__file__).with_name("kills.py")


# Writers and readers beside one another


def test_writers_beside_one_another_lose_nothing(sample):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: with_head(sample, i, name=f"h{i}"), range(8)))
    now = bundle.load(sample.path)
    assert now.heads == tuple(f"h{i}" for i in range(8))
    assert [now.head(f"h{i}").weight[0, 0] for i in range(8)] == list(range(8))


def test_a_reader_beside_a_writer_sees_whole_bundles(sample):
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                bundle.load(sample.path)
            except MvmrError as error:
                failures.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(20):
        with_head(sample, float(value))
    stop.set()
    reader.join()
    assert not failures


def test_a_file_that_is_moved_to_its_place_while_it_is_looked_at_is_not_missing(sample, monkeypatch):
    changed = with_head(sample)
    names = [name for name in changed.manifest.files if name.startswith("heads/")]
    for name in names:
        staging.stage(changed.path, name, changed.file(name).read_bytes())
        (changed.path / name).unlink()
    real = staging.digest

    def moved_after(path):
        result = real(path)
        if staging.FOLDER in path.parts and path.exists():
            os.replace(path, changed.path / path.relative_to(changed.path / staging.FOLDER))
        return result

    monkeypatch.setattr(staging, "digest", moved_after)
    changed.verify()


# Publishing


def test_publish_moves_the_folder_into_place(tmp_path):
    partial = write_stub(tmp_path / "b.partial")
    bundle.publish(partial, tmp_path / "b")
    assert bundle.load(tmp_path / "b").path == tmp_path / "b"
    assert os.listdir(tmp_path) == ["b"]


def test_publish_replaces_an_older_bundle(tmp_path):
    old = bundle.load(write_stub(tmp_path / "b", content=b"old"))
    with_head(old)
    bundle.publish(write_stub(tmp_path / "b.partial", content=b"new"), tmp_path / "b")
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"new"
    assert bundle.load(tmp_path / "b").heads == ()
    assert os.listdir(tmp_path) == ["b"]


def test_publish_through_a_link_replaces_what_it_points_to(tmp_path):
    write_stub(tmp_path / "disk/b", content=b"old")
    (tmp_path / "b").symlink_to(tmp_path / "disk/b")
    bundle.publish(write_stub(tmp_path / "b.partial", content=b"new"), tmp_path / "b")
    assert (tmp_path / "b").is_symlink()
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"new"


def test_publish_never_replaces_what_is_not_a_bundle(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(b"x")
    with pytest.raises(MvmrError, match="stays untouched"):
        bundle.publish(write_stub(tmp_path / "b.partial"), tmp_path / "photos")
    assert (tmp_path / "photos/one.jpg").exists()
    assert bundle.load(tmp_path / "b.partial")


def test_publish_fills_an_empty_folder(tmp_path):
    (tmp_path / "b").mkdir()
    bundle.publish(write_stub(tmp_path / "b.partial"), tmp_path / "b")
    assert bundle.load(tmp_path / "b")


def test_half_written_is_never_published(tmp_path):
    partial = tmp_path / "b.partial"
    partial.mkdir()
    (partial / "encoder.safetensors").write_bytes(b"half")
    write_stub(tmp_path / "b", content=b"old")
    with pytest.raises(MvmrError, match="has not finished"):
        bundle.publish(partial, tmp_path / "b")
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"old"


def test_a_failed_rename_puts_the_old_bundle_back(tmp_path, monkeypatch):
    write_stub(tmp_path / "b", content=b"old")
    partial, rename = write_stub(tmp_path / "b.partial", content=b"new"), os.rename

    def refuse(source, target):
        if Path(source) == partial:
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(MvmrError, match="cross-device"):
        bundle.publish(partial, tmp_path / "b")
    monkeypatch.undo()
    assert bundle.load(tmp_path / "b").file("encoder.safetensors").read_bytes() == b"old"
    assert bundle.load(partial)


# Death and full disks, at every step


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["add_head", "replace_head", "publish", "publish_over"])
def test_killed_at_any_step_the_bundle_is_the_old_or_the_new_one(operation, tmp_path):
    """kills.py ends a child process (as kill -9 would) before each of its file operations in turn."""
    command = [sys.executable, str(KILLS), operation, str(tmp_path)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # no threads: the script forks
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    outcomes = json.loads(answer.stdout)
    seen = [outcome["after_kill"] for outcome in outcomes]
    expected = {"publish": "nothing", "publish_over": "old", "add_head": "nothing", "replace_head": "old"}[operation]
    assert len(outcomes) > 3
    assert set(seen) == {expected, "new"}, outcomes
    assert seen == sorted(seen, key=lambda state: state == "new"), "once new, it must stay new"
    assert all(outcome["after_retry"] == "new" and not outcome["left_over"] for outcome in outcomes), outcomes


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("step", range(12))
def test_a_full_disk_at_any_step_leaves_a_whole_bundle(step, replacing, sample, monkeypatch):
    if replacing:
        with_head(sample, 1.0)
    before, calls, replace_file = bundle.load(sample.path), [], os.replace

    def fail(source, target):
        calls.append(target)
        if len(calls) == step + 1:
            raise OSError(28, "No space left on device", str(source))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", fail)
    try:
        with_head(sample, 2.0)
        failed = False
    except MvmrError:
        failed = True
    monkeypatch.undo()
    assert failed == (step < len(calls))
    now = bundle.load(sample.path)
    if now != before:
        assert now.head("x").weight[0, 0] == 2.0
    after = with_head(sample, 3.0)
    assert after.head("x").weight[0, 0] == 3.0
    assert sorted(os.listdir(sample.path)) == ["README.md", "bundle.json", "encoder.safetensors", "heads"]
