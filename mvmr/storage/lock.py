"""Hold a file or a folder against other processes, and other threads of this one, until a block ends (torch-free).

The lock is the system's: it goes when the process that took it goes, however that dies, and nothing has to be cleared
away. Whoever does not ask for it is not kept out.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from mvmr.errors import MvmrError

logger = logging.getLogger(__name__)

LOCK = ".lock"  # what is held of a folder in which a job works for hours; it stays there, for whoever comes next
_descriptors: set[int] = set()  # of what this process holds


@contextmanager
def hold(path: Path, *, make: bool = False, refusal: str | None = None, waiting: str | None = None) -> Iterator[None]:
    """Hold `path` until the block ends.

    make: `path` is a file, which is made where it is missing, and stays; otherwise it is a folder, and must be there.
    refusal: what to say to the user where another holds it; None waits until it is free.
    waiting: what to log before waiting.

    Raises: MvmrError with `refusal`; OSError for what can be neither opened nor locked.
    """
    # We do this ourselves because the package filelock can't hold a folder without leaving a file in it, and before
    # its release 3.32 left its locks to worker processes.
    import fcntl  # POSIX only: readers on other systems must not need it

    _register_release()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if make else os.O_RDONLY | os.O_DIRECTORY, 0o666)
    _descriptors.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if refusal is not None:
                raise MvmrError(refusal) from error
            if waiting is not None:
                logger.warning(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor in _descriptors:  # not so in a forked process
            _descriptors.remove(descriptor)
            os.close(descriptor)


@contextmanager
def claim(folder: Path, doing: str) -> Iterator[None]:
    """Make `folder` and hold it for a job, by the file ``.lock`` in it; `doing` says what the job does, as "training".

    Raises: MvmrError when it can't be made or written to, or another process works in it.
    """
    busy = f"another process is {doing} in {folder}: wait for it, or give another --out"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(folder / LOCK, make=True, refusal=busy))
        except OSError as error:
            raise MvmrError(f"cannot make {folder}: {error.strerror}; give another --out") from error
        yield


@cache
def _register_release() -> None:
    # A forked process shares the descriptors and so the lock. Worker processes outlive a kill -9 of their parent by
    # seconds, in which the run could not be resumed.
    os.register_at_fork(after_in_child=_release_in_child)


def _release_in_child() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
