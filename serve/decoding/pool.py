"""Decoding in processes of their own, where it can be stopped: each image has a limit of time and of memory.

Where many images wait, a process is handed some at once, which costs less; one of those that takes too much is found
out when they are handed over again, each alone.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Self

from mvmr.bundles.preprocess import Preprocess
from mvmr.data.image_bytes import Limits, Rejected
from mvmr.data.readable import LocalFile
from mvmr.errors import MvmrError
from mvmr.serve.decoding.decoder import COMMAND, Decoder, ForkServer, Job, Outcome
from mvmr.serve.decoding.queue import BATCH_BYTES, DecodeQueue

logger = logging.getLogger(__name__)

_TICK = 0.05  # seconds between looks at what takes long
_PATIENCE = 0.1  # seconds of a processor after which an image must leave the others the way
_MUCH_MORE = 2  # times what another has had: among equals, images that begin again and again would be all there is
_WALL = 6  # times the seconds of a processor: a process that sleeps or starves is ended, too
_START_SECONDS = 60.0
_FAILED_STARTS = 3
_TRIES = 2


class DecodePool:
    """Processes that decode, each an image at a time; an image that takes too much ends its process and no other.

    One client has at most `processes` of them at a time, so that `spare` more are left to the others whatever it sends;
    of those who wait, whose images have taken least of late is next. What takes more than a tenth of a second goes on
    with less of the processor.

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
        self._queue = DecodeQueue()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake: _Wake | None = None
        self._server: ForkServer | None = None
        self._processes: list[Decoder] = []
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
        self._wake = _Wake()
        self._selector.register(self._wake.socket, selectors.EVENT_READ, self._wake)
        self._thread.start()
        end = time.monotonic() + _START_SECONDS
        while not any(process.ready for process in self._processes):
            if self._failed_starts >= _FAILED_STARTS or time.monotonic() > end:
                self.close()
                raise MvmrError(f"the processes that decode images don't start; `{' '.join(COMMAND)}` shows why")
            time.sleep(0.01)

    def close(self) -> None:
        """End all processes; what waits, or is being decoded, is cancelled."""
        self._closed = True
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, content: bytes | LocalFile, client: str = "", *, urgent: bool = False) -> Future[Outcome]:
        """Decode one image file. A future that is cancelled is not begun, and ended where it takes long.

        urgent: before those of all other clients.
        """
        job = Job(content, client, urgent=urgent)
        with self._lock:
            if self._closed:
                job.answer.cancel()
                return job.answer
            self._queue.add(job)
            if len(job.data) <= BATCH_BYTES or self._wake is None:
                self._assign()
            else:
                self._wake.set()  # handing it over takes a while, which is not for an event loop
        return job.answer

    def _watch(self) -> None:
        looked = -_TICK
        while not self._closed:
            if (now := time.monotonic()) - looked >= _TICK:
                looked = now
                with self._lock:
                    for process in [process for process in self._processes if process.jobs]:
                        self._look(process)
                self._fill()
                with self._lock:
                    self._queue.forget_cancelled()
                    self._assign()
                    self._make_way()
            for key, _ in self._selector.select(_TICK):
                if isinstance(key.data, _Wake):
                    key.data.clear()
                    with self._lock:
                        self._assign()
                else:
                    self._hear(key.data)
                    self._fill()  # at once: after a large image, a process is missing
        with self._lock:
            for process in self._processes:
                for job in process.jobs:
                    job.answer.cancel()
                process.kill()
                process.close()
            self._queue.cancel()
        if self._server:
            self._server.close()
        self._selector.close()
        if self._wake:
            self._wake.close()

    def _fill(self) -> None:
        """Start what is missing, from the thread that watches; requests don't wait for it."""
        while len(self._processes) < self._size and time.monotonic() > self._not_before:
            try:
                self._server = self._server or ForkServer(self._preprocess, self.limits, self._hashed)
                process = Decoder(self._server, self._preprocess.crop)
            except OSError as error:
                self._has_failed(str(error))
                if self._server:
                    self._server.close()
                    self._server = None
                return
            with self._lock:
                self._processes.append(process)
            self._selector.register(process.socket, selectors.EVENT_READ, process)

    def _has_failed(self, reason: str) -> None:
        self._failed_starts += 1
        self._not_before = time.monotonic() + self._failed_starts
        logger.error("no process that decodes images could be started: %s", reason)

    def _assign(self) -> None:
        """Give waiting images to idle processes; the lock is held."""
        idle = [process for process in self._processes if process.idle]
        while idle:
            at_work = Counter(process.jobs[0].client for process in self._processes if process.jobs)
            busy = [client for client, count in at_work.items() if count >= self._most]
            jobs = self._queue.take(len(idle), running=self._running(), memory=self._has_memory(), busy=busy)
            if not jobs:
                return
            process = idle.pop()
            try:
                process.begin(jobs)
            except OSError as error:  # it has just ended, or there is no memory to share
                logger.error("a decoder failed: %s", error)
                process.kill()

    def _running(self) -> dict[str, float]:
        """Seconds of a processor that the images at work have taken so far, by client."""
        running = dict[str, float]()
        for process in self._processes:
            if process.jobs:
                client = process.jobs[0].client
                running[client] = running.get(client, 0.0) + process.used_seconds()
        return running

    def _has_memory(self, exempt: Decoder | None = None) -> bool:
        """Whether no image has, or is about to take, the memory that there is for a large one; of others than `of`."""
        return not any(
            process.jobs and not process.killed and process is not exempt and (process.large or process.jobs[0].large)
            for process in self._processes
        )

    def _hear(self, process: Decoder) -> None:
        lines = process.lines()
        if lines is None:
            self._remove(process)
            return
        for kind, *values in lines:
            if kind == "large":
                with self._lock:
                    process.admit(may=process.large or self._has_memory(exempt=process))
                continue
            if kind == "ready":
                process.ready, process.thread = True, values[0]
                self._failed_starts = 0
                with self._lock:
                    self._assign()
                continue
            with self._lock:
                jobs, outcomes = process.jobs, process.outcomes(values[0])
                for job in reversed([job for job, outcome in zip(jobs, outcomes, strict=False) if outcome is None]):
                    job.spent += process.used_seconds() if job.alone else 0.0
                    job.large = job.alone = True
                    job.begun -= 1
                    self._queue.add(job, first=True)
                self._release(process)
                if process.large:  # what it keeps of that memory others would lack: another takes its place
                    process.kill()
                self._assign()
            for job, outcome in zip(jobs, outcomes, strict=False):  # none where it has been killed
                if outcome:
                    _settle(job, outcome)

    def _look(self, process: Decoder) -> None:
        """End a process whose images have taken all their time, or are of no more use; the lock is held."""
        used = process.used_seconds() + (process.jobs[0].spent if len(process.jobs) == 1 else 0.0)
        if used > _PATIENCE:
            process.yield_to_others()
        late = time.monotonic() - process.since > _WALL * self.limits.seconds
        if late and process.is_reading():  # a disk that is slow, or away for a while, is not the image's fault
            process.since, late = time.monotonic(), False
        if used > self.limits.seconds or late:
            limit = f"the {self.limits.seconds:g} s of a processor that are allowed (--decode-seconds)"
            reason = f"decoding it takes more than {limit}"
            if used - process.used_seconds() > self.limits.seconds / 2:
                reason += ", for it has had to make way for others; try again later"
            self._try_again(process.jobs, Rejected("too-slow", reason), tries=1)
        elif used <= _PATIENCE or not all(job.answer.cancelled() for job in process.jobs):
            return
        self._release(process)
        process.kill()

    def _release(self, process: Decoder) -> None:
        """Take its images from it, and count what they have taken; the lock is held."""
        if process.jobs:
            self._queue.had.add(process.jobs[0].client, process.used_seconds())
        process.jobs = []

    def _make_way(self) -> None:
        """Where a client waits and has nothing, let one who has had much more lose what takes long; the lock is held.

        It begins again in its turn: without this, a few clients with images that take long would keep all others
        waiting. The image that has come furthest is left to its end, so that not all work is for nothing.
        """
        at_work = [process for process in self._processes if process.jobs and not process.killed]
        if len(at_work) < self._size:
            return
        running, queue = self._running(), self._queue
        clients = queue.clients(running=running, memory=self._has_memory())
        had = {client: queue.had.of(client) + running.get(client, 0.0) for client in {*running, *clients}}
        at_work.remove(max(at_work, key=Decoder.used_seconds))
        long = [process for process in at_work if process.used_seconds() > _PATIENCE]
        long.sort(key=lambda process: (-had[process.jobs[0].client], process.used_seconds()))
        for client, process in zip((client for client in clients if client not in running), long, strict=False):
            jobs = process.jobs
            if had[jobs[0].client] < _MUCH_MORE * (had[client] + _PATIENCE):
                return
            for job in jobs:
                job.spent += process.used_seconds() if job.alone else 0.0
                job.begun, job.alone = 0, True
                self._queue.add(job)
            self._release(process)
            process.kill()

    def _try_again(self, jobs: list[Job], outcome: Rejected, *, tries: int) -> None:
        """Let images that were decoded together be decoded alone; one that was alone has so many tries."""
        for job in reversed(jobs):
            if job.alone and job.begun >= tries:
                logger.warning("%s: %s", job.name, outcome.reason)
                _settle(job, outcome)
                continue
            job.begun, job.alone = (job.begun, True) if job.alone else (0, True)
            self._queue.add(job, first=True)

    def _remove(self, process: Decoder) -> None:
        with self._lock:
            self._selector.unregister(process.socket)
            self._processes.remove(process)
            process.close()
            if not (process.ready or process.killed):
                self._has_failed("it ended at once")
            # what ended it may have been another thing than an image
            self._try_again(process.jobs, Rejected("undecodable", "its decoder ended before it was done"), tries=_TRIES)
            process.jobs = []


class _Wake:
    """Wakes a thread that selects."""

    def __init__(self) -> None:
        self.socket, self._sender = socket.socketpair()
        self._sender.setblocking(False)

    def set(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been told
            self._sender.send(b"\0")

    def clear(self) -> None:
        self.socket.recv(4096)

    def close(self) -> None:
        self.socket.close()
        self._sender.close()


def _settle(job: Job, outcome: Outcome) -> None:
    with contextlib.suppress(InvalidStateError):  # its client has gone meanwhile
        job.answer.set_result(outcome)
