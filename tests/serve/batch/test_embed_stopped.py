"""Stopped at any moment, by a signal, a kill or a full disk, the batch job goes on to each row exactly once."""

import errno
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mvmr.bundles import bundle as bundles
from mvmr.data.image_bytes import LIMITS
from mvmr.serve.batch import job
from mvmr.serve.batch import parts as parts_module
from mvmr.serve.batch.job import embed
from mvmr.serve.decoding.pool import DecodePool
from mvmr.serve.engine import Engine
from tests.serve.batch.jobs import COUNT, PART, contents, picture, refusal, rows, run

pytestmark = pytest.mark.usefixtures("one_thread")


class Died(BaseException):
    """Like a death, and not caught by anything that catches errors."""


@pytest.fixture(scope="module")
def decoders(bundle: Path) -> Iterator[DecodePool]:
    """The decoders of a job, for jobs that end within a moment."""
    with DecodePool(bundles.load(bundle).manifest.preprocessing, LIMITS, processes=2, hashed=True) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "out.parquet", "out.npy"])
def test_stopped_before_any_renaming_it_goes_on_and_ends_alike(
    bundle: Path,
    photos: Path,
    decoders: DecodePool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_fsync: None,
    name: str,
) -> None:
    options: dict[str, Any] = {"heads": (), "part_rows": 10}
    engine = Engine.load(bundle, threads=1)
    monkeypatch.setattr(Engine, "load", lambda *arguments, **options: engine)  # loading takes most of the time
    monkeypatch.setattr(job, "DecodePool", lambda *arguments, **options: decoders)
    monkeypatch.setattr(DecodePool, "start", lambda pool: None)
    monkeypatch.setattr(DecodePool, "close", lambda pool: None)
    run(bundle, photos, tmp_path / "whole" / name, **options)
    real, left = os.replace, [0]

    def replace(*arguments: Any) -> None:
        if not left[0]:
            raise Died
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    deaths = 0
    while True:
        left[0] = deaths
        try:
            run(bundle, photos, tmp_path / f"{deaths}" / name, **options)
            break
        except Died:
            deaths += 1
        left[0] = 1000
        run(bundle, photos, tmp_path / f"{deaths - 1}" / name, resume=True, **options)
        for beside in (tmp_path / "whole").iterdir():
            again = tmp_path / f"{deaths - 1}" / beside.name
            if beside.is_dir():
                assert contents(again) == contents(beside)
            elif not beside.name.endswith("manifest.json"):
                assert again.read_bytes() == beside.read_bytes()
    assert deaths > 2 * 3
    assert len(list((tmp_path / "0").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_a_part_that_was_lost_damaged_or_never_listed_is_made_again(
    bundle: Path, photos: Path, finished_run: Path, tmp_path: Path
) -> None:
    wanted = contents(finished_run)
    (finished_run / "part-00002.parquet").unlink()
    (finished_run / "part-00003.parquet").write_bytes(b"cut")
    (finished_run / ".part-00009.0123abcd.partial.parquet").write_bytes(b"left over")
    assert run(bundle, photos, finished_run, resume=True).rows == COUNT - 3
    assert contents(finished_run) == wanted
    assert not list(finished_run.glob(".part*"))
    (finished_run / "errors.parquet").unlink()
    run(bundle, photos, finished_run, resume=True)
    assert contents(finished_run) == wanted


def test_a_finished_run_is_resumed_without_any_work(bundle: Path, photos: Path, finished_run: Path) -> None:
    before = contents(finished_run)
    summary = run(bundle, photos, finished_run, resume=True)
    assert (summary.added, summary.rows, summary.errors) == (0, COUNT - 3, 3)
    assert contents(finished_run) == before


@pytest.mark.slow
def test_a_full_disk_names_the_part_and_the_job_goes_on_later(
    bundle: Path, photos: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real = parts_module.columns.writer

        def full(path: Path, columns: Any) -> Any:
            if path.name.startswith(".part-00002."):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(path, columns)

        patch.setattr(parts_module.columns, "writer", full)
        message = refusal(bundle, photos, tmp_path / "out")
    where = tmp_path / "out" / "part-00002.parquet"
    assert f"cannot write {where}: the disk is full; the 2 parts before it are whole: mend this and go on" in message
    assert "holds an unfinished run; go on with it by --resume" in refusal(bundle, photos, tmp_path / "out")
    assert run(bundle, photos, tmp_path / "out", resume=True).added == COUNT - 2 * PART
    assert contents(tmp_path / "out") == contents(finished_run)


@pytest.mark.slow
def test_a_real_full_disk_is_one_line_too(bundle: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        images = tmp_path / "many"
        images.mkdir()
        for number in range(150):
            picture(number).save(images / f"{number:03}.png")
        message = refusal(bundle, images, disk / "out", part_rows=20)
        assert "the disk is full" in message
        assert "parts before it are whole" in message
        subprocess.run(["mount", "-o", "remount,size=5m", str(disk)], check=True)
        assert run(bundle, images, disk / "out", part_rows=20, resume=True).rows == 150
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_says_how_to_go_on(
    bundle: Path,
    photos: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    calls = iter(range(1000))
    real = Engine.__call__

    def signal_then_embed(self: Engine, pixels: np.ndarray) -> Any:
        if next(calls) == 6:
            os.kill(os.getpid(), number)
        return real(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "__call__", signal_then_embed)
        with pytest.raises(KeyboardInterrupt, match=r"\d+ images are saved in .*/out; go on with --resume"):
            run(bundle, photos, tmp_path / "out")
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name.startswith(("dec", "emb"))]
    run(bundle, photos, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(finished_run)


@pytest.mark.slow
def test_killed_at_ten_random_moments_rows_are_those_of_an_undisturbed_run(bundle: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for number in range(5000):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "BMP")
        content = b"broken" if number % 97 == 0 else buffer.getvalue()
        (images / f"{number:04}.bmp").write_bytes(content)
    options = {"heads": ["photos"], "part_rows": 50, "resume": True, "threads": 2}
    finished_run, out = tmp_path / "whole", tmp_path / "out"
    run(bundle, images, finished_run, part_rows=50)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvmr.serve.batch.job"])
    chance = random.Random(0)
    kills = 0
    while kills < 10:
        process = context.Process(target=embed, args=(str(bundle), str(images)), kwargs={"out": str(out), **options})
        process.start()
        wanted = len(list(out.glob("part-*"))) + chance.randrange(5)
        until = time.monotonic() + 30
        while len(list(out.glob("part-*"))) < wanted and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        assert process.is_alive(), "it must not end by itself yet"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert 3 < len(list(out.glob("part-*"))) < 100
    process = context.Process(target=embed, args=(str(bundle), str(images)), kwargs={"out": str(out), **options})
    process.start()
    process.join()
    assert process.exitcode == 0
    paths = [row["path"] for row in rows(out)]
    errors = pq.read_table(out / "errors.parquet")["path"].to_pylist()
    assert sorted(paths + errors) == [str(path) for path in sorted(images.iterdir())]
    assert len(errors) == 52
    assert contents(out) == contents(finished_run)
