"""What stands behind the endpoints: one engine, its queue, its heads, and whether all is well."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mvmr.cores import usable_cores
from mvmr.data.image_bytes import Prepared, Rejected
from mvmr.errors import MvmrError
from mvmr.serve.concurrency import gather_or_cancel
from mvmr.serve.decoding.pool import DecodePool
from mvmr.serve.engine import Engine
from mvmr.serve.http.batcher import Batcher
from mvmr.serve.http.heap import trim
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.problems import Problem, busy
from mvmr.serve.http.readiness import Readiness
from mvmr.serve.http.request_body import Payload, Take, warm_up
from mvmr.serve.http.settings import Settings
from mvmr.serve.shares import Shares

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_LARGE = "bodies under way take all the memory they may (four of --max-body-mb)"
_BODIES = 4  # of the largest size, in memory at once
_SPARE = 2  # decoders that one client leaves to the others
_LARGE_BYTES = 2**20  # of bodies under way, after which memory is given back to the system
_TRIMS = 10  # half a second apart: a thread may still be at what its client no longer waits for
_LAST_SECONDS = 2.0
_BEAT = 0.5  # seconds between two signs of life of the event loop


@dataclass(frozen=True)
class EmbeddedImage:
    """embedding: float32 [D]; width, height: of the image, in pixels."""

    embedding: Floats
    width: int
    height: int


Outcome = EmbeddedImage | Rejected


class Service:
    """Embeds the images of requests, each with its own outcome.

    draining: set when no more is to be accepted for long: the service then says that it is not ready.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings, self.metrics = engine, settings, Metrics()
        self.metrics.describe(precision=engine.precision, provider=engine.provider, space_id=engine.space_id)
        self.draining = False
        decoders = settings.decoders or usable_cores()
        self._decoders = DecodePool(
            engine.preprocess, settings.limits, processes=decoders, spare=max(_SPARE, decoders // 4)
        )
        self._batcher = Batcher(
            engine,
            at_once=settings.max_batch or engine.at_once,
            bound=settings.queue,
            workers=settings.workers or 1,
            metrics=self.metrics,
        )
        self._readiness = Readiness(engine, self._decoders, self._batcher, settings.stuck_seconds)
        self._bytes = Shares(_BODIES * settings.max_body)
        self._trims = 0  # that are due, because of large bodies
        self._heart: asyncio.Task[None] | None = None
        self._beat = time.monotonic()

    async def start(self) -> None:
        """Start threads and processes, and have them do what is slow for the first time."""
        await asyncio.to_thread(self._decoders.start)
        warm_up()
        self._batcher.start()
        self._heart = asyncio.create_task(self._live())
        blank = np.zeros((self.engine.size, self.engine.size, 3), np.uint8)
        await self._batcher.warm_up(blank, self.settings.stuck_seconds)
        if fault := await self.fault():
            logger.error("not ready: %s", fault)

    async def stop(self) -> None:
        """End all threads; to be called when nothing is under way any more."""
        if self._heart:
            self._heart.cancel()
        await self._batcher.stop(_LAST_SECONDS)  # --grace is over
        await asyncio.to_thread(self._decoders.close)

    def reload_heads(self) -> None:
        """Read the bundle's heads again; where they can't be had, those of before stay in use, and the log says why."""
        try:
            self.engine = self.engine.with_heads_of_now()
        except MvmrError as error:
            logger.error("heads not reloaded: %s", error)
            return
        logger.info("heads reloaded: %s", ", ".join(self.engine.heads) or "none")

    def refusal(self, client: str, size: int) -> Problem | None:
        """Why a request with a body of so many bytes can't be accepted now, before the body is read; None: it can."""
        if refusal := self._batcher.refusal(client):
            return refusal
        size = min(size, self.settings.max_body)  # more is another fault, and told as such
        return None if self._bytes.fits(client, size) else busy(_LARGE, 1)

    @contextmanager
    def memory(self, client: str) -> Iterator[Take]:
        """Yield ``take(bytes)``, for a request to call as its body arrives; given back when the block ends.

        The call raises Problem where the bodies under way would take more memory than they may.
        """
        total = 0

        def take(count: int) -> None:
            nonlocal total
            if self._bytes.total > _LARGE_BYTES:
                self._trims = _TRIMS
            if not self._bytes.take(client, count):
                raise busy(_LARGE, 1)
            total += count

        try:
            yield take
        finally:
            self._bytes.give(client, total)

    async def embed(self, payloads: Sequence[Payload], client: str) -> list[Outcome]:
        """Decode and embed the images of one request.

        client: who sent it; one client's images never take all decoders, nor all places in the queue.

        Raises: Problem when there is no room for them, or the engine fails.
        """
        with self._batcher.room(len(payloads), client):
            return await gather_or_cancel([self._outcome(payload, client) for payload in payloads])

    async def infer(self, pixels: Pixels, client: str) -> Floats:
        """Embed prepared images: uint8 [N, S, S, 3] -> float32 [N, D]. client, Raises: as for `embed`."""
        with self._batcher.room(len(pixels), client):
            rows = await gather_or_cancel([self._embed(image, client) for image in pixels])
        self.metrics.images.labels("embedded").inc(len(pixels))
        return np.stack(rows) if rows else np.empty((0, self.engine.dim), np.float32)

    def silence(self) -> float:
        """Seconds since the event loop last gave a sign of life; from any thread."""
        return time.monotonic() - self._beat

    async def fault(self) -> str | None:
        """Why the service is not ready, None when it is; in any event loop."""
        fault = await asyncio.shield(asyncio.wrap_future(self.look()))
        return "draining: it has been told to stop" if self.draining else fault

    def look(self) -> Future[str | None]:
        """See whether it is ready, without waiting for it."""
        verdict = self._readiness.fault()
        verdict.add_done_callback(lambda future: self.metrics.ready.set(future.result() is None and not self.draining))
        return verdict

    async def _live(self) -> None:
        while True:
            self._beat = time.monotonic()
            if self._trims and not self._bytes.total:
                self._trims -= 1
                asyncio.get_running_loop().run_in_executor(None, trim)
            await asyncio.sleep(_BEAT)

    async def _outcome(self, payload: Payload, client: str) -> Outcome:
        prepared = payload if isinstance(payload, Rejected) else await self._prepare(payload, client)
        if isinstance(prepared, Rejected):
            self.metrics.images.labels("rejected").inc()
            return prepared
        row = await self._embed(prepared.pixels, client)
        self.metrics.images.labels("embedded").inc()
        return EmbeddedImage(row, prepared.width, prepared.height)

    async def _prepare(self, data: bytes, client: str) -> Prepared | Rejected:
        with self.metrics.stage_seconds.labels("decode").time():
            return await asyncio.wrap_future(self._decoders.submit(data, client))

    async def _embed(self, pixels: Pixels, client: str) -> Floats:
        try:
            row = await self._batcher.embed(pixels, client)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever a GPU raises; the log has the trace
            raise Problem("engine-failed", f"{type(error).__name__}; the service's log says more") from error
        if not np.isfinite(row).all():
            raise Problem("engine-failed", "an embedding is not finite; see /readyz")
        return row
