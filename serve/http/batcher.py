"""Batching without a timer: while the engine works, images wait; a worker that is free takes what has come."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.problems import Problem, busy
from mvmr.serve.shares import Shares

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_SHARED = 1.0  # seconds after which a client counts no more
_SMALL = 4  # times: a quarter of the largest batch takes little longer on a GPU than a single image
_JOIN_SECONDS = 0.01
_WARM_UPS = 2  # onnxruntime plans its memory in the first batch of a size, and takes it in the second
_MEMORY = 0.8  # of the measured rate: the share that each new batch leaves of what was known


@dataclass(eq=False)
class _Waiting:
    pixels: Pixels
    answer: asyncio.Future[Floats] | futures.Future[Floats]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """An engine in threads of its own, behind a bounded queue.

    Rooms are taken when a request is accepted and given back when it is answered, so that everything between, bodies
    and decoded images too, is bounded. No client has all of them, and clients whose images wait take turns.

    Args:
        run: embeds a batch: uint8 [N, S, S, 3] -> float32 [N, D]; called from all workers at a time.
        at_once: images to a batch at most; bound: images accepted and not yet answered at most; workers: threads.
    """

    def __init__(
        self, run: Callable[[Pixels], Floats], *, at_once: int, bound: int, workers: int, metrics: Metrics
    ) -> None:
        self._run, self._at_once, self._metrics = run, at_once, metrics
        self._rooms = Shares(bound)
        self._urgent: deque[_Waiting] = deque()
        self._waiting: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # by client, whose turn is next first
        self._count = 0  # of those that wait
        self._latest = self._before = ("", -_SHARED)  # who asked last and when, and another before that
        self._changed = threading.Condition()
        self._stopped = False
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

    async def warm_up(self, image: Pixels, seconds: float) -> None:
        """Have the workers embed full batches of an image, for no longer than `seconds`.

        The first are slow, and take memory that is kept; the log tells of those that fail.
        """
        with self._changed:  # all at once, so that batches are full
            images = [self.embed_first(image) for _ in range(_WARM_UPS * self._at_once * len(self._workers))]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*map(asyncio.wrap_future, images), return_exceptions=True)

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

    def refusal(self, client: str) -> Problem | None:
        """Why a client's next image could not be accepted now; None: it could."""
        return None if self._rooms.fits(client, 1) else self._busy(1)

    @contextmanager
    def room(self, count: int, client: str = "") -> Iterator[None]:
        """Hold room for `count` images of a client while the block runs; raises Problem when there is none."""
        if not self._rooms.take(client, count):
            raise self._busy(count)
        self._metrics.queue.set(self._rooms.total)
        try:
            yield
        finally:
            self._rooms.give(client, count)
            self._metrics.queue.set(self._rooms.total)

    async def embed(self, pixels: Pixels, client: str = "") -> Floats:
        """Embed one prepared image; when the caller is cancelled before its turn, it is not run at all.

        Shapes: uint8 [S, S, 3] -> float32 [D].
        Raises: whatever the engine raises.
        """
        answer: asyncio.Future[Floats] = self._loop.create_future()
        with self._changed:
            if client != self._latest[0]:
                self._before = self._latest
            self._latest = client, time.perf_counter()
            self._waiting.setdefault(client, deque()).append(_Waiting(pixels, answer))
            self._count += 1
            self._changed.notify()
        return await answer

    def embed_first(self, pixels: Pixels) -> futures.Future[Floats]:
        """Embed one prepared image before all that wait, without the event loop; from any thread."""
        answer = futures.Future[Floats]()
        with self._changed:
            self._urgent.append(_Waiting(pixels, answer))
            self._count += 1
            self._changed.notify()
        return answer

    def _busy(self, count: int) -> Problem:
        seconds = max(1, math.ceil(self._rooms.total / self._rate if self._rate else 1))
        return busy(f"no room for {count} more images now (--queue)", seconds)

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                while not self._count and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                batch = self._next()
            if batch:
                self._answer(batch, number)

    def _next(self) -> list[_Waiting]:
        """What this worker takes: its share of what waits, so that no other is left idle.

        While several clients ask, it is a smaller one, of about an image of each: who sends one must not wait for many
        of another, not even for those that are on the engine when his comes.
        """
        idle = max(1, len(self._workers) - len(self._busy_since))
        most = min(self._at_once, math.ceil(self._count / idle))
        if self._is_shared():
            most = min(most, max(len(self._urgent) + len(self._waiting), self._at_once // _SMALL))
        batch: list[_Waiting] = []
        while self._count and len(batch) < most:
            item = self._pop()
            if item.answer.cancelled():
                self._metrics.images.labels("dropped").inc()
            else:
                batch.append(item)
        return batch

    def _is_shared(self) -> bool:
        """Whether another asks than the one whose images are next, or did so within a second."""
        recent = {client for client, moment in (self._latest, self._before) if time.perf_counter() - moment < _SHARED}
        return len(recent.union(self._waiting)) > 1

    def _pop(self) -> _Waiting:
        self._count -= 1
        if self._urgent:
            return self._urgent.popleft()
        client, waiting = next(iter(self._waiting.items()))
        item = waiting.popleft()
        if waiting:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return item

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
        rate = len(self._workers) * len(batch) / max(1e-6, seconds)
        self._rate = rate if not self._rate else _MEMORY * self._rate + (1 - _MEMORY) * rate
        answers: list[Floats | Exception] = [rows] * len(batch) if isinstance(rows, Exception) else list(rows)
        pairs = [(item.answer, answer) for item, answer in zip(batch, answers, strict=True)]
        for future, answer in pairs:
            if isinstance(future, futures.Future):
                _settle([(future, answer)])
        self._loop.call_soon_threadsafe(_settle, [pair for pair in pairs if not isinstance(pair[0], futures.Future)])


def _settle(answers: list[tuple[asyncio.Future[Floats] | futures.Future[Floats], Floats | Exception]]) -> None:
    for future, answer in answers:
        with suppress(asyncio.InvalidStateError, futures.InvalidStateError):  # its client has gone meanwhile
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
