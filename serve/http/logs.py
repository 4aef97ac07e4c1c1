"""A log that nobody who reads it too slowly can hold the service up with."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator

_LINES = 1000  # that wait to be written
_LAST_WORDS = 1.0  # seconds for them at the end


class _Lines(logging.Handler):
    """Writes to a file descriptor from a thread of its own; what comes while too much waits is counted, not kept."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="mvmr-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:  # it is full, or what was to be said can't be formatted
            self._dropped += 1

    def finish(self) -> None:
        """Write what waits, as far as somebody reads it."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
            self._thread.join(_LAST_WORDS)

    def _write(self) -> None:
        while (line := self._waiting.get()) is not None:
            # past sys.stderr, whose lock would be held while nobody reads, and waited for at the end of the process
            while line:
                try:
                    line = line[os.write(self._file, line) :]
                except BrokenPipeError:  # nobody reads it any more
                    return
                except OSError:  # a disk that is full, perhaps not for long
                    self._dropped += 1
                    break
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                with contextlib.suppress(queue.Full):
                    self._waiting.put_nowait(b"%d lines of the log were dropped: nobody read them\n" % dropped)


@contextlib.contextmanager
def log_to(file: int) -> Iterator[None]:
    """Log to a file descriptor, a line each with its time, while the block runs."""
    handler = _Lines(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells which of its own builds it could not import
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.finish()
