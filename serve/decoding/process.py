"""The program of a decoding process: one image after the other, until its parent ends or ends it.

A file is damaged or made to do harm in ways that no reader foresees: decoding it may take hours or all memory, or end
the process. Here that costs one image (`mvmr.serve.decoding.pool`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mvmr.bundles.preprocess import Preprocess
from mvmr.data.image_bytes import Limits, Prepared, Rejected, prepare, room_for_pixels
from mvmr.data.readable import Content, LocalFile

_KEPT = 2**23  # bytes of shared memory that stay between images
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Make a decoding process for each pair of file descriptors, of a socket and of memory, that comes.

    Made by a fork of this one, which has imported all that they need and does nothing else, they start in milliseconds.
    Arguments: the file descriptor of the socket on which they come, the preprocessing and the limits as JSON, and
    whether hashes are wanted, 0 or 1.
    """
    connection, preprocess, limits, hashed = sys.argv[1:]
    warnings.simplefilter("ignore")  # Pillow's, about odd metadata
    preprocessing = Preprocess.from_dict(json.loads(preprocess))
    bounds = Limits.from_json(limits)
    Image.MAX_IMAGE_PIXELS = int(bounds.pixels)  # for images inside images, whose size is read late
    _end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = socket.socket(fileno=int(connection))
    while True:
        data, files, _, _ = socket.recv_fds(control, 1, 2)
        if not data:
            return
        process = os.fork()
        if not process:
            control.close()
            _decode(files[0], files[1], preprocessing, bounds, hashed == "1")
            return
        for file in files:
            os.close(file)
        control.sendall(b"%d\n" % process)


def _decode(connection: int, memory: int, preprocess: Preprocess, limits: Limits, hashed: bool) -> None:
    """Read of some images how many bytes there are, and answer with what became of each; lines of JSON.

    The bytes come in the shared memory (`room_for_pixels`), in which the pixels go back. They are the image's, or the
    path of a file and beside their number how many bytes it may have.
    """
    _end_with_parent()
    _end_first()
    with socket.socket(fileno=connection) as parent:
        reader = _Reader(parent, memory, preprocess, limits, hashed)
        while not reader.ended:
            # the parent lowers the priority of a thread that takes long, and it can't be raised again
            thread = threading.Thread(target=reader.run)
            reader.allow(resource.RLIM_INFINITY)  # one that finds no memory to begin with would be waited for for ever
            thread.start()
            thread.join()


class _Later(BaseException):
    """There is no memory for a large image now. No Exception, for those are of the image's own doing."""


class _Reader:
    def __init__(
        self, parent: socket.socket, memory: int, preprocess: Preprocess, limits: Limits, hashed: bool
    ) -> None:
        self.parent, self.memory, self.preprocess, self.limits = parent, memory, preprocess, limits
        self.hashed = hashed
        self.lines = parent.makefile("rb")
        self.ended, self.pixels = False, 0

    def run(self) -> None:
        """Answer until the parent ends, or has lowered this thread's priority."""
        priority = os.getpriority(os.PRIO_PROCESS, 0)
        self.allow(self.limits.memory / 3)
        self._say("ready", threading.get_native_id())
        while os.getpriority(os.PRIO_PROCESS, 0) == priority:
            line = self.lines.readline()
            if not line:
                self.ended = True
                return
            self._answer(json.loads(line))

    def _answer(self, sizes: list[tuple[int, float | None]]) -> None:
        room = room_for_pixels(self.preprocess.crop)
        offset, reports = room + 1, list[list[Any]]()
        for number, (size, most) in enumerate(sizes):
            content = self._content(offset, size, most)
            offset += size
            try:
                outcome = content if isinstance(content, Rejected) else self._prepare(content)
            except _Later:
                reports.append(["later"])
                continue
            if isinstance(outcome, Prepared):
                os.pwrite(self.memory, outcome.pixels.data, number * outcome.pixels.nbytes)
                reports.append(["prepared", outcome.width, outcome.height, outcome.sha256])
            else:
                reports.append(["rejected", outcome.code, outcome.reason])
        if offset > _KEPT:
            os.ftruncate(self.memory, room + 1)
        self._say("done", reports)

    def _content(self, offset: int, size: int, most: float | None) -> Content:
        mark = room_for_pixels(self.preprocess.crop)
        try:
            data = os.pread(self.memory, size, offset)
            if most is None:
                return data
            os.pwrite(self.memory, b"\1", mark)
            return LocalFile(data, most)()
        except MemoryError:
            return Rejected("too-much-memory", "its bytes take more memory than is allowed (--decode-memory-mb)")
        finally:
            os.pwrite(self.memory, b"\0", mark)

    def _prepare(self, data: bytes) -> Prepared | Rejected:
        outcome = prepare(data, self.preprocess, self.limits, before=self._ask)
        if self.limits.is_large(self.pixels):
            self.allow(self.limits.memory / 3)
        if self.hashed and isinstance(outcome, Prepared):
            return replace(outcome, sha256=hashlib.sha256(data).hexdigest())
        return outcome

    def _ask(self, pixels: int) -> None:
        self.pixels = pixels
        if self.limits.is_large(pixels):
            self._say("large")
            if self.lines.readline() != b"1\n":
                raise _Later
            self.allow(self.limits.memory)

    def allow(self, memory: float) -> None:
        """Set how much memory this process may have."""
        with contextlib.suppress(OSError, ValueError):  # a system that has no such limit
            resource.setrlimit(resource.RLIMIT_DATA, (int(memory), resource.RLIM_INFINITY))

    def _say(self, *message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.parent.sendall(json.dumps(message).encode() + b"\n")


def _end_with_parent() -> None:
    if sys.platform == "linux":  # elsewhere it ends after the image it is at
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_first() -> None:
    with contextlib.suppress(OSError):  # no such file elsewhere
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
