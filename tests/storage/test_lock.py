"""A lock keeps other processes and threads out, and dies with its process, whatever workers that one has forked."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mvmr.errors import MvmrError
from mvmr.storage.lock import claim, hold


def is_free(path: Path) -> bool:
    try:
        with hold(path, refusal="held"):
            return True
    except MvmrError:
        return False


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_held_is_refused_until_the_block_ends(tmp_path: Path, kind: str) -> None:
    path, make = (tmp_path, False) if kind == "folder" else (tmp_path / "rows.lock", True)
    again = hold(path, make=make, refusal="held by another")
    with hold(path, make=make), pytest.raises(MvmrError, match="held by another"), again:
        pass
    with hold(path, make=make, refusal="held by another"):
        pass
    assert list(tmp_path.iterdir()) == ([] if kind == "folder" else [path])


def test_a_folder_that_is_gone_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), hold(tmp_path / "gone"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_a_refusal_it_is_waited_for_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    got = threading.Event()

    def wait() -> None:
        with hold(tmp_path, waiting="waiting for the other"):
            got.set()

    thread = threading.Thread(target=wait)
    with hold(tmp_path):
        thread.start()
        assert not got.wait(0.3)
    thread.join(10)
    assert got.is_set()
    assert caplog.messages == ["waiting for the other"]


@pytest.mark.slow
def test_kill_9_frees_it_though_a_worker_lives_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    context = multiprocessing.get_context("fork")

    def work() -> None:
        with hold(tmp_path):
            worker = context.Process(target=time.sleep, args=(60,))
            worker.start()
            os.write(write, b"%d\n" % worker.pid)
            time.sleep(60)

    process = context.Process(target=work)
    process.start()
    with os.fdopen(read) as answers:
        worker = int(answers.readline())
    os.close(write)
    assert not is_free(tmp_path)
    process.kill()
    process.join(10)
    os.kill(worker, 0)  # it lives
    try:
        assert is_free(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_process_that_leaves_the_block_does_not_free_it(tmp_path: Path) -> None:
    held = hold(tmp_path)
    with held:
        child = os.fork()
        if child == 0:
            held.__exit__(None, None, None)
            os._exit(is_free(tmp_path))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not is_free(tmp_path)


def test_a_claimed_folder_is_made_and_says_what_is_done_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with claim(folder, "writing"):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        with pytest.raises(MvmrError) as caught, claim(folder, "writing"):
            pass
    assert str(caught.value) == f"another process is writing in {folder}: wait for it, or give another --out"
    with claim(folder, "writing"):
        pass


def test_a_folder_that_cannot_be_made_is_one_line_and_other_errors_keep_their_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = r"cannot make .*file/out: Not a directory; give another --out"
    with pytest.raises(MvmrError, match=message), claim(tmp_path / "file" / "out", "training"):
        pass
    with pytest.raises(OSError, match="of the job"), claim(tmp_path / "out", "training"):
        raise OSError("of the job")
