"""What looks at a service in threads while something is done to it: a normal client, a probe, its memory."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from typing import Any

import psutil  # type: ignore[import-untyped]

_EVERY = 0.1  # seconds between two requests of the normal client
_PROBE_EVERY = 0.25
_WAIT = 60.0
_MIB = 2**20


class Watcher:
    """Looks again and again in a thread while the context is entered."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        raise NotImplementedError


class Client(Watcher):
    """A normal client: an image at a time, at a connection that stays; what it got since the last `reset`."""

    def __init__(self, port: int, picture: bytes) -> None:
        super().__init__()
        self._port, self._picture = port, picture
        self._seconds: list[float] = []
        self._statuses: dict[str, int] = {}
        self._began = 0.0  # of the request that waits for its answer

    def reset(self) -> dict[str, Any]:
        """Seconds of the requests that were answered with 200, and all by status.

        One that has been waiting for a second counts as if it were answered now: it may never be.
        """
        with self._lock:
            found = {"seconds": self._seconds, "statuses": self._statuses}
            self._seconds, self._statuses = [], {}
            if self._began and (waited := time.perf_counter() - self._began) > 1:
                found["seconds"].append(waited)
                found["statuses"]["waiting"] = 1
        return found

    def _run(self) -> None:
        headers = {"content-type": "image/jpeg", "accept": "application/x-mvmr-float32"}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_WAIT)
        while not self._stop.is_set():
            began = self._began = time.perf_counter()
            try:
                connection.request("POST", "/v1/embed", self._picture, headers)
                answer = connection.getresponse()
                answer.read()
                status = str(answer.status)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                status = type(error).__name__
            seconds = time.perf_counter() - began
            with self._lock:
                self._began = 0.0
                self._statuses[status] = self._statuses.get(status, 0) + 1
                if status == "200":
                    self._seconds.append(seconds)
            self._stop.wait(max(0.0, _EVERY - seconds))


class Probe(Watcher):
    """Asks /healthz on a new connection each time."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._seconds: list[float] = []
        self._failed = 0

    def reset(self) -> dict[str, Any]:
        """The longest since the last `reset`, in seconds, of how many, and how many were not answered with 200."""
        with self._lock:
            seconds, failed = self._seconds, self._failed
            self._seconds, self._failed = [], 0
        return {"longest_s": round(max(seconds, default=0.0), 3), "count": len(seconds), "failed": failed}

    def _run(self) -> None:
        while not self._stop.is_set():
            began, failed = time.perf_counter(), 0
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_WAIT)
            try:
                connection.request("GET", "/healthz")
                failed = int(connection.getresponse().status != 200)
            except (OSError, http.client.HTTPException):
                failed = 1
            connection.close()
            with self._lock:
                self._seconds.append(time.perf_counter() - began)
                self._failed += failed
            self._stop.wait(_PROBE_EVERY)


class Memory(Watcher):
    """MiB of the service and its processes: their proportional sets, for forks share pages."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__()
        self._process = process
        self._seen: list[float] = [0.0]

    def reset(self) -> dict[str, float]:
        """The last and the most since the last `reset`."""
        with self._lock:
            found = {"last": self._seen[-1], "most": max(self._seen)}
            self._seen = self._seen[-1:]
        return found

    def _run(self) -> None:
        while not self._stop.wait(2 * _EVERY):
            total = 0.0
            with contextlib.suppress(psutil.Error):
                for process in [self._process, *self._process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_full_info().pss / _MIB
            with self._lock:
                self._seen.append(round(total, 1))
