"""Decoding in processes: the same pixels as here, and no file that holds up, fills up or ends more than itself."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from mvmr.data import decoding
from mvmr.data.image_bytes import Limits, Prepared, Rejected, prepare
from mvmr.data.readable import LocalFile
from mvmr.errors import MvmrError
from mvmr.serve.decoding import decoder
from mvmr.serve.decoding import pool as decode_pool
from mvmr.serve.decoding.pool import DecodePool
from tests.serve.serving import PREPROCESS, SLOW, encoded, jpeg, wait_until

LIMITS = Limits(seconds=0.5)
_SECONDS = 60


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    with DecodePool(PREPROCESS, LIMITS, processes=2, spare=1) as opened:
        yield opened


def decoders() -> list[psutil.Process]:
    """The processes of pools of this one, without what they are forks of."""
    return [
        process
        for server in psutil.Process().children()
        for process in server.children()
        if "mvmr.serve.decoding.process" in _command_line(process)
    ]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def decode(pool: DecodePool, data: bytes, client: str = "") -> Prepared:
    outcome = pool.submit(data, client).result(_SECONDS)
    assert isinstance(outcome, Prepared), outcome
    return outcome


def rejection(pool: DecodePool, data: bytes) -> str:
    outcome = pool.submit(data).result(_SECONDS)
    assert isinstance(outcome, Rejected)
    return outcome.code


@pytest.mark.slow
@pytest.mark.parametrize("kind", decoding.select_formats(decoding.COMMON))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_pixels_are_those_of_decoding_here(pool: DecodePool, kind: str, mode: str) -> None:
    picture = Image.open(io.BytesIO(jpeg("astronaut"))).convert(mode)
    if kind in ("JPEG", "MPO") and mode == "RGBA":
        picture = picture.convert("CMYK")
    data = encoded(picture, kind)
    expected = prepare(data, PREPROCESS, LIMITS)
    assert isinstance(expected, Prepared)
    image = decode(pool, data)
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    assert (image.width, image.height) == picture.size


def test_formats_that_few_use_are_read_where_they_are_asked_for(pool: DecodePool) -> None:
    data = encoded(Image.new("RGB", (9, 9), "red"), "PPM")
    assert rejection(pool, data) == "not-an-image"
    with DecodePool(PREPROCESS, Limits(formats=(*decoding.COMMON, "PPM")), processes=1) as wider:
        assert decode(wider, data).width == 9
    with pytest.raises(MvmrError, match="unknown format 'JPG'; did you mean 'JPEG'"):
        Limits(formats=("JPG",))


def test_many_images_keep_apart(pool: DecodePool) -> None:
    sizes = [(width, 41) for width in range(41, 141)]
    files = [encoded(Image.new("RGB", size, (size[0], 0, 0)), "PNG") for size in sizes]
    answers = [pool.submit(data, str(number % 3)) for number, data in enumerate(files)]
    for size, answer in zip(sizes, answers, strict=True):
        image = answer.result(_SECONDS)
        assert isinstance(image, Prepared)
        assert (image.width, image.height) == size
        assert np.unique(image.pixels[..., 0]).tolist() == [size[0]]


def test_an_image_that_takes_too_long_costs_its_time_and_no_more(pool: DecodePool) -> None:
    assert rejection(pool, SLOW) == "too-slow"
    assert decode(pool, jpeg()).width


def test_one_client_s_slow_images_leave_decoders_to_the_others() -> None:
    with DecodePool(PREPROCESS, Limits(seconds=_SECONDS), processes=2, spare=1) as pool:
        slow = [pool.submit(SLOW, "a") for _ in range(9)]
        assert decode(pool, jpeg(), "b").width
        assert not any(answer.done() for answer in slow)


def test_slow_images_of_many_clients_make_way_for_another() -> None:
    with DecodePool(PREPROCESS, Limits(seconds=60), processes=2, spare=2) as pool:
        slow = [pool.submit(SLOW, f"client {number}") for number in range(8)]
        for number in range(3):
            assert decode(pool, jpeg(), f"another {number}").width
        assert not any(answer.done() for answer in slow)


def test_whose_images_have_taken_least_is_next() -> None:
    order: list[str] = []
    with DecodePool(PREPROCESS, LIMITS, processes=1) as pool:
        answers = [pool.submit(SLOW, "much")]
        for client in ("much", "much", "none"):
            answers.append(pool.submit(jpeg(), client))
            answers[-1].add_done_callback(lambda _, client=client: order.append(client))
        assert [type(answer.result(_SECONDS)) for answer in answers] == [Rejected, Prepared, Prepared, Prepared]
    assert order == ["none", "much", "much"]


@pytest.mark.slow
def test_what_takes_long_and_makes_way_has_its_time_in_all() -> None:
    with DecodePool(PREPROCESS, Limits(seconds=2), processes=1, spare=1) as pool:
        slow = [pool.submit(SLOW, f"client {number}") for number in range(3)]
        while not all(answer.done() for answer in slow):
            assert decode(pool, jpeg(), "another").width
        outcomes = [answer.result() for answer in slow]
    assert all(isinstance(outcome, Rejected) and outcome.code == "too-slow" for outcome in outcomes)


@pytest.mark.slow
def test_small_images_are_decoded_while_large_ones_wait_for_memory() -> None:
    order: list[int] = []
    large = encoded(Image.new("L", (6000, 6000)), "PNG")
    with DecodePool(PREPROCESS, Limits(seconds=_SECONDS), processes=2) as pool:
        answers = [pool.submit(large if number < 12 else jpeg()) for number in range(14)]
        for number, answer in enumerate(answers):
            answer.add_done_callback(lambda _, number=number: order.append(number))
        sizes = [answer.result(_SECONDS).width for answer in answers]  # type: ignore[union-attr]
    assert sizes == [6000] * 12 + [240] * 2
    assert order.index(13) < 6


def test_images_of_who_has_gone_are_kept_no_longer() -> None:
    with DecodePool(PREPROCESS, Limits(seconds=60), processes=1, spare=1) as pool:
        pool.submit(SLOW, "one")
        waiting = [pool.submit(jpeg(), "one") for _ in range(100)]
        for answer in waiting:
            answer.cancel()
        wait_until(lambda: not pool._queue._jobs, "their end")


def test_what_takes_long_gets_less_of_the_processors() -> None:
    with DecodePool(PREPROCESS, Limits(seconds=_SECONDS), processes=1) as pool:
        answer = pool.submit(SLOW)
        (process,) = decoders()
        until(lambda: any(os.getpriority(os.PRIO_PROCESS, thread.id) > 0 for thread in process.threads()))
        answer.cancel()


@pytest.mark.slow
def test_a_large_image_leaves_no_less_memory_to_those_after_it() -> None:
    large = encoded(Image.new("L", (7000, 7000)), "PNG")
    with DecodePool(PREPROCESS, Limits(seconds=_SECONDS, memory=450 * 2**20), processes=1) as pool:
        for _ in range(4):
            assert decode(pool, large).width == 7000
            assert decode(pool, jpeg()).width


def test_a_cancelled_image_is_not_decoded_on() -> None:
    with DecodePool(PREPROCESS, Limits(seconds=_SECONDS), processes=1) as pool:
        slow, waiting = pool.submit(SLOW), pool.submit(SLOW)
        (process,) = decoders()
        until(lambda: process.cpu_times().user > 0.2)
        waiting.cancel()
        slow.cancel()
        assert decode(pool, jpeg()).width
        assert process not in decoders()


@pytest.mark.slow
def test_an_image_that_takes_too_much_memory_is_told_so(pool: DecodePool) -> None:
    """A third of the memory is for images of fewer than a quarter of the pixels."""
    grey = encoded(Image.new("LA", (3150, 3150)), "PNG", compress_level=1)
    large = encoded(Image.new("LA", (3170, 3170)), "PNG", compress_level=1)
    with DecodePool(PREPROCESS, Limits(pixels=40e6, memory=360 * 2**20), processes=2) as small:
        assert rejection(small, grey) == "too-much-memory"
        answers = [small.submit(large) for _ in range(4)]  # one at a time
        assert all(isinstance(answer.result(_SECONDS), Prepared) for answer in answers)
        for answer in [small.submit(large) for _ in range(4)]:  # waiting for memory, or at work
            answer.cancel()
        assert decode(small, jpeg()).width
        assert decode(small, large).width == 3170
    assert decode(pool, grey).width == 3150


def test_files_are_read_where_they_are_decoded(pool: DecodePool, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff \n.jpg"
    Path(os.fsdecode(path)).write_bytes(jpeg())
    answers = [pool.submit(LocalFile(path, most)) for most in (1e9, len(jpeg()) - 1)]
    answers += [pool.submit(LocalFile(path + b"x", 1e9)), pool.submit(LocalFile(b"/dev/zero", 1e9))]
    read, large, missing, device = (answer.result(_SECONDS) for answer in answers)
    assert isinstance(read, Prepared)
    np.testing.assert_array_equal(read.pixels, decode(pool, jpeg()).pixels)
    assert [getattr(outcome, "code", "") for outcome in (large, missing, device)] == [
        "too-many-bytes", "unreadable", "unreadable"
    ]  # fmt: skip


def test_a_file_that_memory_does_not_hold_costs_itself_alone(pool: DecodePool, tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**30)
    outcome = pool.submit(LocalFile(os.fsencode(file.name), 2**31)).result(_SECONDS)
    assert outcome == Rejected("too-much-memory", "its bytes take more memory than is allowed (--decode-memory-mb)")
    assert decode(pool, jpeg()).width


_WITH_A_SLOW_DISK = """
import time
from mvmr.serve.decoding import process
from mvmr.data.readable import LocalFile
read = LocalFile.__call__
LocalFile.__call__ = lambda file: (time.sleep(3), read(file))[1]
process.main()
"""


@pytest.mark.slow
def test_waiting_for_a_disk_takes_none_of_an_image_s_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode_pool, "_WALL", 1 / LIMITS.seconds)
    monkeypatch.setattr(decoder, "COMMAND", (sys.executable, "-c", _WITH_A_SLOW_DISK))
    (tmp_path / "a.jpg").write_bytes(jpeg())
    with DecodePool(PREPROCESS, LIMITS, processes=1) as pool:
        answer = pool.submit(LocalFile(os.fsencode(tmp_path / "a.jpg"), 1e9))
        assert isinstance(answer.result(_SECONDS), Prepared)
        for server in psutil.Process().children():
            for process in server.children():
                process.suspend()
                until(lambda process=process: process.status() == psutil.STATUS_STOPPED)
        assert rejection(pool, jpeg()) == "too-slow"


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_with_too_many_pixels_is_refused_before_its_reader_takes_memory(
    options: dict[str, object], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.new(mode, (301, 207)), "WEBP", **options)
    outcome = prepare(data, PREPROCESS, Limits(pixels=301 * 207))
    assert isinstance(outcome, Prepared)
    assert (outcome.width, outcome.height) == (301, 207)
    monkeypatch.setattr(Image, "open", None)
    refused = prepare(data, PREPROCESS, Limits(pixels=301 * 207 - 1))
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.reason.partition(",")[0]) == ("too-many-pixels", "301 x 207 pixels")


def test_a_decoder_that_is_killed_costs_nothing(pool: DecodePool) -> None:
    """As when the system is out of memory: the image is tried once more."""
    for process in decoders():
        process.send_signal(signal.SIGSTOP)
    answer = pool.submit(jpeg())
    for process in decoders():
        process.kill()
    assert isinstance(answer.result(_SECONDS), Prepared)


def test_an_image_that_ends_its_decoder_is_rejected_in_the_end(
    pool: DecodePool, caplog: pytest.LogCaptureFixture
) -> None:
    answer = pool.submit(SLOW)
    while not answer.done():
        for process in decoders():
            if process.cpu_times().user > 0.05:
                process.kill()
    assert answer.result() == Rejected("undecodable", "its decoder ended before it was done")
    assert f"{len(SLOW)} bytes: its decoder ended" in caplog.text
    assert decode(pool, jpeg()).width


def test_the_server_whose_forks_they_are_is_replaced_when_it_is_killed(pool: DecodePool) -> None:
    assert decode(pool, jpeg()).width
    before = decoders()
    for server in psutil.Process().children():
        if "mvmr.serve.decoding.process" in _command_line(server):
            server.kill()
    until(lambda: all(not process.is_running() for process in before))
    assert decode(pool, jpeg()).width


def test_all_end_with_the_pool_and_what_waits_is_cancelled() -> None:
    with DecodePool(PREPROCESS, LIMITS, processes=1) as pool:
        answers = [pool.submit(SLOW) for _ in range(3)]
    assert all(answer.cancelled() for answer in answers)
    assert pool.submit(jpeg()).cancelled()
    until(lambda: not decoders())


@pytest.mark.slow
def test_decoders_that_do_not_start_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(MvmrError, match=r"don't start; `.*` shows why"):
        DecodePool(PREPROCESS, LIMITS, processes=1).start()


_PARENT = """
import sys, time
from mvmr.data.image_bytes import Limits
from mvmr.serve.decoding.pool import DecodePool
from tests.serve.serving import PREPROCESS, SLOW
pool = DecodePool(PREPROCESS, Limits(seconds=60), processes=2)
pool.start()
answers = [pool.submit(SLOW) for _ in range(2)]
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they end after the image they are at")
def test_they_end_with_their_parent_whatever_they_are_at() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"started\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 3
        parent.kill()
    until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in children))


def until(condition: object) -> None:
    end = time.monotonic() + _SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)
