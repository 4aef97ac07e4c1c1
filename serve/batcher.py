"""Batching without a timer: while the engine works, images wait; a worker that is free takes what has come."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mvmr.serve.metrics import Metrics
from mvmr.serve.problems import busy

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_JOIN_SECONDS = 0.01
_MEMORY = 0.8  # of the measured rate: the share that each new batch leaves of what was known


@dataclass(eq=False)
class _Waiting:
    pixels: Pixels
    answer: asyncio.Future[Floats]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """An engine in threads of its own, behind a bounded queue.

    Rooms are taken when a request is accepted and given back when it is answered, so that everything between, bodies
    and decoded images too, is bounded.

    Args:
        run: embeds a batch: uint8 [N, S, S, 3] -> float32 [N, D]; called from all workers at a time.
        at_once: images to a batch at most; bound: images accepted and not yet answered at most; workers: threads.
    """

    def __init__(
        self, run: Callable[[Pixels], Floats], *, at_once: int, bound: int, workers: int, metrics: Metrics
    ) -> None:
        self._run, self._at_once, self._bound, self._metrics = run, at_once, bound, metrics
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._taken = 0
        self._rate = 0.0  # images a second
        self._busy_since: dict[int, float] = {}  # by number of the worker
        self._workers = [
            threading.Thread(target=self._work, args=(number,), name=f"mvmr-engine-{number}", daemon=True)
            for number in range(workers)
        ]

    def start(self) -> None:
        """Start the workers; to be called in the running event loop."""
        self._loop = asyncio.get_running_loop()
        for worker in self._workers:
            worker.start()

    async def stop(self, seconds: float) -> None:
        """End the workers, after what they are doing now; one that takes longer than `seconds` is left behind."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        while any(worker.is_alive() for worker in self._workers):
            if time.monotonic() > end:
                logger.error("the engine is still at a batch after %g s; it is left behind", seconds)
                return
            await asyncio.sleep(_JOIN_SECONDS)

    @property
    def busy_seconds(self) -> float:
        """How long the slowest worker has been at its present batch."""
        since = list(self._busy_since.values())
        return time.perf_counter() - min(since) if since else 0.0

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Hold room for `count` images while the block runs; raises Problem when there is none."""
        if self._taken + count > self._bound:
            seconds = max(1, math.ceil(self._taken / self._rate if self._rate else 1))
            raise busy(f"no room for {count} more images now", seconds)
        self._taken += count
        self._metrics.queue.set(self._taken)
        try:
            yield
        finally:
            self._taken -= count
            self._metrics.queue.set(self._taken)

    async def embed(self, pixels: Pixels, *, first: bool = False) -> Floats:
        """Embed one prepared image; when the caller is cancelled before its turn, it is not run at all.

        Shapes: uint8 [S, S, 3] -> float32 [D]. `first`: before all others that wait.
        Raises: whatever the engine raises.
        """
        item = _Waiting(pixels, self._loop.create_future())
        with self._changed:
            (self._waiting.appendleft if first else self._waiting.append)(item)
            self._changed.notify()
        return await item.answer

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                batch = self._next()
            if batch:
                self._answer(batch, number)

    def _next(self) -> list[_Waiting]:
        """What this worker takes: its share of what waits, so that no other is left idle."""
        idle = max(1, len(self._workers) - len(self._busy_since))
        most = min(self._at_once, math.ceil(len(self._waiting) / idle))
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < most:
            item = self._waiting.popleft()
            if item.answer.cancelled():
                self._metrics.images.labels("dropped").inc()
            else:
                batch.append(item)
        return batch

    def _answer(self, batch: list[_Waiting], number: int) -> None:
        began = self._busy_since[number] = time.perf_counter()
        for item in batch:
            self._metrics.stage_seconds.labels("wait").observe(began - item.since)
        rows: Floats | Exception
        try:
            rows = self._run(np.stack([item.pixels for item in batch]))
        except Exception as error:  # a lost GPU, no memory: whoever waits is told, the next batch may fare better
            logger.exception("the engine failed on a batch of %d", len(batch))
            rows = error
        seconds = time.perf_counter() - began
        del self._busy_since[number]
        self._metrics.stage_seconds.labels("infer").observe(seconds)
        self._metrics.batch.observe(len(batch))
        now = len(self._workers) * len(batch) / max(1e-6, seconds)
        self._rate = now if not self._rate else _MEMORY * self._rate + (1 - _MEMORY) * now
        self._loop.call_soon_threadsafe(_settle, batch, rows)


def _settle(batch: list[_Waiting], rows: Floats | Exception) -> None:
    for number, item in enumerate(batch):
        if item.answer.done():  # its client has gone meanwhile
            continue
        if isinstance(rows, Exception):
            item.answer.set_exception(rows)
        else:
            item.answer.set_result(rows[number])
