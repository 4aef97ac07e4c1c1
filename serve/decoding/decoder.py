"""A process that decodes, seen from outside, and the server whose forks they are."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mvmr.bundles.preprocess import Preprocess
from mvmr.data.image_bytes import Limits, Prepared, Rejected, room_for_pixels
from mvmr.data.readable import LocalFile

Outcome = Prepared | Rejected
COMMAND = (sys.executable, "-P", "-m", "mvmr.serve.decoding.process")
_LOW_PRIORITY = 10
_FORK_SECONDS = 30.0


@dataclass(eq=False)
class Job:
    """An image that waits, or is being decoded: its bytes, or where they are.

    begun: how often it has been handed over; alone: it is to be, or has been, without others
    large: it takes memory that only one image at a time may have; urgent: it is next, whoever else waits
    spent: seconds of a processor that it had taken before it had to make way
    """

    content: bytes | LocalFile
    client: str
    answer: Future[Outcome] = field(default_factory=Future)
    begun: int = 0
    alone: bool = False
    large: bool = False
    urgent: bool = False
    spent: float = 0.0

    @property
    def data(self) -> bytes:
        """What is handed over: the bytes, or the path."""
        return self.content.path if isinstance(self.content, LocalFile) else self.content

    @property
    def name(self) -> str:
        """For the log."""
        if isinstance(self.content, LocalFile):
            return repr(os.fsdecode(self.content.path))
        return f"an image of {len(self.content)} bytes"


@dataclass(eq=False)
class Decoder:
    """A process that decodes.

    ready: it has started; killed: it will end; thread: that decodes there; jobs: what it is at
    large: it has had the memory that a large image takes, and keeps some of it
    since: when it began, by the clock; base: what it had taken of a processor before, in seconds
    """

    server: ForkServer
    side: int
    ready: bool = False
    killed: bool = False
    thread: int = 0
    jobs: list[Job] = field(default_factory=list)
    large: bool = False
    since: float = 0.0
    base: float = 0.0

    def __post_init__(self) -> None:
        self._memory = _shared_memory()
        self._unread = b""
        self._yields = False
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._number = self.server.fork(theirs.fileno(), self._memory)
        except OSError:
            self.close()
            raise
        self.socket.setblocking(False)

    @property
    def idle(self) -> bool:
        """Whether it can be given an image."""
        return self.ready and not self.killed and not self.jobs

    def begin(self, jobs: list[Job]) -> None:
        """Hand over images; raises OSError where the process has ended or memory lacks."""
        self.jobs, self.since, self.base, self._yields = jobs, time.monotonic(), 0.0, False
        self.base = self.used_seconds()
        offset, sizes = room_for_pixels(self.side) + 1, list[tuple[int, float | None]]()
        for job in jobs:
            job.begun += 1
            job.alone = job.alone or len(jobs) == 1
            offset += os.pwrite(self._memory, job.data, offset)
            sizes.append((len(job.data), job.content.most if isinstance(job.content, LocalFile) else None))
        self.socket.sendall(json.dumps(sizes).encode() + b"\n")

    def admit(self, *, may: bool) -> None:
        """Tell it whether it may take the memory that a large image takes now, or is to leave that image."""
        self.large = self.large or may
        with contextlib.suppress(OSError):  # it has ended
            self.socket.sendall(b"%d\n" % may)

    def lines(self) -> list[list[Any]] | None:
        """What it has said since; None: it has ended."""
        try:
            data = self.socket.recv(2**16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def outcomes(self, reports: list[list[Any]]) -> list[Outcome | None]:
        """What became of the images, from what it has said of each; None: left to a later time."""
        pixels = np.empty((len(reports), self.side, self.side, 3), np.uint8)
        os.preadv(self._memory, [pixels.data], 0)  # of those that were rejected, too: one call is cheaper than four
        outcomes: list[Outcome | None] = []
        for number, (kind, *values) in enumerate(reports):
            if kind == "later":
                outcomes.append(None)
            else:
                outcomes.append(Rejected(*values) if kind == "rejected" else Prepared(pixels[number], *values))
        return outcomes

    def used_seconds(self) -> float:
        """Seconds of a processor that the present images have taken."""
        try:
            return time.clock_gettime(_clock_of(self._number)) - self.base
        except OSError:  # it has ended, or the system has no such clock
            return time.monotonic() - self.since if self.jobs else 0.0

    def is_reading(self) -> bool:
        """Whether it is at reading a file."""
        return os.pread(self._memory, 1, room_for_pixels(self.side)) == b"\1"

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


class ForkServer:
    """The process whose forks decode; it ends with the thread that has made it."""

    def __init__(self, preprocess: Preprocess, limits: Limits, hashed: bool) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._program = subprocess.Popen(
                [*COMMAND, str(theirs.fileno()), json.dumps(preprocess.to_dict()), limits.to_json(), str(int(hashed))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libtiff writes to it what it thinks of strangers' files
                process_group=0,  # Ctrl-C is for the parent; across sessions Linux heeds no priorities
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self._socket.settimeout(_FORK_SECONDS)
        self._lines = self._socket.makefile("rb")

    def fork(self, *files: int) -> int:
        """The number of a new process, which is given these; raises OSError when there can be none."""
        socket.send_fds(self._socket, [b"+"], files)
        if not (line := self._lines.readline()):
            raise BrokenPipeError(f"it ended with exit code {self._program.wait()}")
        return int(line)

    def close(self) -> None:
        """End it, and with it all its forks."""
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
