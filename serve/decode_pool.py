"""Decoding in processes of their own, where it can be stopped: each image has a limit of time and of memory.

Where many images wait, a process is handed some at once, which costs less; one of those that takes too much is found
out when they are handed over again, each alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from mvmr.errors import MvmrError
from mvmr.preprocess import Preprocess
from mvmr.serve.decode import AT_ONCE, Limits, Prepared, Rejected

logger = logging.getLogger(__name__)

Outcome = Prepared | Rejected
_TICK = 0.1  # seconds between looks at what takes long
_PATIENCE = 0.1  # seconds of a processor after which an image must leave the others the way
_LOW_PRIORITY = 10
_WALL = 6  # times the seconds of a processor: a process that sleeps or starves is ended, too
_START_SECONDS = 60.0
_FAILED_STARTS = 3
_TRIES = 2
_TOGETHER = 2**20  # bytes of the images that are handed over at once
_COMMAND = (sys.executable, "-P", "-m", "mvmr.serve.decode_process")


@dataclass(eq=False)
class _Job:
    data: bytes
    client: str
    answer: Future[Outcome] = field(default_factory=Future)
    begun: int = 0
    alone: bool = False


class DecodePool:
    """Processes that decode, each an image at a time; an image that takes too much ends its process and no other.

    One client has at most `processes` of them at a time, so that `spare` more are left to the others whatever it sends;
    those who wait take turns. What takes more than a tenth of a second goes on with less of the processor.

    Args:
        preprocess: of the bundle.
        limits: of an image.
        processes, spare: how many; with spare = 0 there is one client.
        hashed: whether the SHA-256 of files is wanted.
    """

    def __init__(
        self, preprocess: Preprocess, limits: Limits, *, processes: int, spare: int = 0, hashed: bool = False
    ) -> None:
        self._preprocess, self.limits, self._hashed = preprocess, limits, hashed
        self._most, self._size = processes, processes + spare
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()  # by client, whose turn is next first
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._mother: _Mother | None = None
        self._processes: list[_Process] = []
        self._large: deque[_Job] = deque()  # take much memory: the first has it, the others wait
        self._failed_starts, self._not_before = 0, 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="mvmr-decode", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes; returns when one of them is ready.

        Raises: MvmrError when none can be started.
        """
        self._thread.start()
        end = time.monotonic() + _START_SECONDS
        while not any(each.ready for each in self._processes):
            if self._failed_starts >= _FAILED_STARTS or time.monotonic() > end:
                self.close()
                raise MvmrError(f"the processes that decode images don't start; `{' '.join(_COMMAND)}` shows why")
            time.sleep(0.01)

    def close(self) -> None:
        """End all processes; what waits, or is being decoded, is cancelled."""
        self._closed = True
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, data: bytes, client: str = "") -> Future[Outcome]:
        """Decode one image file. A future that is cancelled is not begun, and ended where it takes long."""
        job = _Job(data, client)
        with self._lock:
            if self._closed:
                job.answer.cancel()
                return job.answer
            self._waiting.setdefault(client, deque()).append(job)
            self._assign()
        return job.answer

    def _watch(self) -> None:
        looked = -_TICK
        while not self._closed:
            if (now := time.monotonic()) - looked >= _TICK:
                looked = now
                with self._lock:
                    for process in [each for each in self._processes if each.jobs]:
                        self._look(process)
                    self._fill()
                    self._assign()
                    self._admit()
            for key, _ in self._selector.select(_TICK):
                self._hear(key.data)
        with self._lock:
            for process in self._processes:
                for job in process.jobs:
                    job.answer.cancel()
                process.kill()
                process.close()
            for waiting in self._waiting.values():
                for job in waiting:
                    job.answer.cancel()
        if self._mother:
            self._mother.close()
        self._selector.close()

    def _fill(self) -> None:
        """Start what is missing, from the thread that watches: the mother ends with the thread that started her."""
        while len(self._processes) < self._size and time.monotonic() > self._not_before:
            try:
                self._mother = self._mother or _Mother(self._preprocess, self.limits, self._hashed)
                process = _Process(self._mother, self._preprocess.crop)
            except OSError as error:
                self._has_failed(str(error))
                if self._mother:
                    self._mother.close()
                    self._mother = None
                return
            self._processes.append(process)
            self._selector.register(process.socket, selectors.EVENT_READ, process)

    def _has_failed(self, reason: str) -> None:
        self._failed_starts += 1
        self._not_before = time.monotonic() + self._failed_starts
        logger.error("no process that decodes images could be started: %s", reason)

    def _assign(self) -> None:
        """Give waiting images to idle processes; the lock is held."""
        idle = [process for process in self._processes if process.idle]
        while idle and (jobs := self._next(len(idle))):
            process = idle.pop()
            try:
                process.begin(jobs)
            except OSError as error:  # it has just ended, or there is no memory to share
                logger.error("a decoder failed: %s", error)
                process.kill()

    def _admit(self) -> None:
        """Let one large image have the memory; the lock is held."""
        at = {process.jobs[0]: process for process in self._processes if process.jobs and not process.killed}
        while self._large and self._large[0] not in at:
            self._large.popleft()
        if self._large and (process := at[self._large[0]]).waits:
            process.admit()

    def _next(self, idle: int) -> list[_Job]:
        """The next images of the client whose turn it is: its share of them, for one of so many idle processes."""
        busy = [process.jobs[0].client for process in self._processes if process.jobs]
        for client in list(self._waiting):
            if busy.count(client) >= self._most:
                continue
            waiting = self._waiting[client]
            most, jobs, size = min(AT_ONCE, -(-len(waiting) // idle)), list[_Job](), 0
            while waiting and len(jobs) < most:
                size += len(waiting[0].data)
                if jobs and (waiting[0].alone or size > _TOGETHER):
                    break
                job = waiting.popleft()
                if job.answer.cancelled():
                    continue
                jobs.append(job)
                if job.alone:
                    break
            if waiting:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            if jobs:
                return jobs
        return []

    def _hear(self, process: _Process) -> None:
        lines = process.lines()
        if lines is None:
            self._remove(process)
            return
        for kind, *rest in lines:
            if kind == "large":
                with self._lock:
                    process.waits = True
                    self._large.append(process.jobs[0])
                    self._admit()
                continue
            if kind == "ready":
                process.ready, process.thread = True, rest[0]
                self._failed_starts = 0
                continue
            with self._lock:
                jobs, outcomes = process.jobs, [process.outcome(number, *one) for number, one in enumerate(rest[0])]
                process.jobs = []
                self._assign()
            for job, outcome in zip(jobs, outcomes, strict=False):  # none where it has been killed
                _settle(job, outcome)

    def _look(self, process: _Process) -> None:
        """End a process whose images have taken all their time, or are of no more use; the lock is held."""
        used = process.used()
        if used > _PATIENCE:
            process.yield_to_others()
        late = not process.waits and time.monotonic() - process.since > _WALL * self.limits.seconds
        if used > self.limits.seconds or late:
            reason = f"decoding it takes more than the {self.limits.seconds:g} s of a processor that are allowed"
            self._try_again(process.jobs, Rejected("too-slow", reason), tries=1)
        elif not (all(job.answer.cancelled() for job in process.jobs) and (used > _PATIENCE or process.waits)):
            return
        process.jobs = []
        process.kill()

    def _try_again(self, jobs: list[_Job], outcome: Rejected, *, tries: int) -> None:
        """Let images that were decoded together be decoded alone; one that was alone has so many tries."""
        for job in reversed(jobs):
            if job.alone and job.begun >= tries:
                logger.warning("an image of %d bytes: %s", len(job.data), outcome.reason)
                _settle(job, outcome)
                continue
            job.begun, job.alone = (job.begun, True) if job.alone else (0, True)
            self._waiting.setdefault(job.client, deque()).appendleft(job)

    def _remove(self, process: _Process) -> None:
        with self._lock:
            self._selector.unregister(process.socket)
            self._processes.remove(process)
            process.close()
            if not (process.ready or process.killed):
                self._has_failed("it ended at once")
            # what ended it may have been another thing than an image
            self._try_again(process.jobs, Rejected("undecodable", "its decoder ended before it was done"), tries=_TRIES)


@dataclass(eq=False)
class _Process:
    """One of them, seen from outside.

    ready: it has started; killed: it will end; thread: that decodes there; jobs: what it is at
    waits: for the memory that a large image takes
    since: when it began, by the clock; base: what it had taken of a processor before, in seconds
    """

    mother: _Mother
    side: int
    ready: bool = False
    killed: bool = False
    thread: int = 0
    jobs: list[_Job] = field(default_factory=list)
    waits: bool = False
    since: float = 0.0
    base: float = 0.0

    def __post_init__(self) -> None:
        self._memory = _shared_memory()
        self._unread = b""
        self._yields = False
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._number = self.mother.bear(theirs.fileno(), self._memory)
        except OSError:
            self.close()
            raise
        self.socket.setblocking(False)

    @property
    def idle(self) -> bool:
        """Whether it can be given an image."""
        return self.ready and not self.killed and not self.jobs

    def begin(self, jobs: list[_Job]) -> None:
        """Hand over images; raises OSError where the process has ended or memory lacks."""
        self.jobs, self.waits, self.since, self.base, self._yields = jobs, False, time.monotonic(), 0.0, False
        self.base = self.used()
        place = AT_ONCE * 3 * self.side**2
        for job in jobs:
            job.begun += 1
            job.alone = job.alone or len(jobs) == 1
            place += os.pwrite(self._memory, job.data, place)
        self.socket.sendall(json.dumps([len(job.data) for job in jobs]).encode() + b"\n")

    def admit(self) -> None:
        """Let it take the memory that a large image takes."""
        self.waits, self.since = False, time.monotonic()
        with contextlib.suppress(OSError):  # it has ended
            self.socket.sendall(b"\n")

    def lines(self) -> list[list[Any]] | None:
        """What it has said since; None: it has ended."""
        try:
            said = self.socket.recv(2**16)
        except BlockingIOError:
            return []
        except OSError:
            said = b""
        if not said:
            return None
        *whole, self._unread = (self._unread + said).split(b"\n")
        return [json.loads(line) for line in whole]

    def outcome(self, number: int, kind: str, *rest: Any) -> Outcome:
        """What became of one of the images."""
        if kind == "rejected":
            return Rejected(*rest)
        pixels = np.empty((self.side, self.side, 3), np.uint8)
        os.preadv(self._memory, [pixels.data], number * pixels.nbytes)
        return Prepared(pixels, *rest)

    def used(self) -> float:
        """Seconds of a processor that the present images have taken."""
        try:
            return time.clock_gettime(_clock_of(self._number)) - self.base
        except OSError:  # it has ended, or the system has no such clock
            return time.monotonic() - self.since if self.jobs else 0.0

    def yield_to_others(self) -> None:
        """Let other images have more of the processors."""
        if not self._yields:
            self._yields = True
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.thread, _LOW_PRIORITY)

    def kill(self) -> None:
        """End it; the pool hears of that as of any other end."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._number, signal.SIGKILL)

    def close(self) -> None:
        """Give back what it held; it ends as it reads on."""
        self.socket.close()
        os.close(self._memory)


class _Mother:
    """The process whose forks decode."""

    def __init__(self, preprocess: Preprocess, limits: Limits, hashed: bool) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._program = subprocess.Popen(
                [*_COMMAND, str(theirs.fileno()), json.dumps(preprocess.to_dict()), limits.to_json(), str(int(hashed))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libtiff writes to it what it thinks of strangers' files
                start_new_session=True,  # Ctrl-C is for the parent
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self._lines = self._socket.makefile("rb")

    def bear(self, *files: int) -> int:
        """The number of a new process, which is given these; raises OSError when there can be none."""
        socket.send_fds(self._socket, [b"+"], files)
        if not (line := self._lines.readline()):
            raise BrokenPipeError(f"it ended with exit code {self._program.wait()}")
        return int(line)

    def close(self) -> None:
        """End it, and with it all that it has borne."""
        self._lines.close()
        self._socket.close()
        self._program.kill()
        self._program.wait()


def _shared_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mvmr-decode")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _clock_of(process: int) -> int:
    """The clock of another process's time on processors (Linux: see clock_getcpuclockid(3))."""
    if sys.platform != "linux":
        raise OSError("no such clock")
    return (~process << 3) | 2


def _settle(job: _Job, outcome: Outcome) -> None:
    with contextlib.suppress(InvalidStateError):  # its client has gone meanwhile
        job.answer.set_result(outcome)
