"""What stands behind the endpoints: one engine, its queue, its heads, and whether all is well."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr import bundle as bundles
from mvmr.cores import usable_cores
from mvmr.errors import MvmrError
from mvmr.export.contract import canary
from mvmr.serve.batcher import Batcher
from mvmr.serve.decode import Prepared, Rejected
from mvmr.serve.decode_pool import DecodePool
from mvmr.serve.engine import TOLERANCE, Engine, read_heads
from mvmr.serve.metrics import Metrics
from mvmr.serve.payload import Payload, Take
from mvmr.serve.problems import Problem, busy
from mvmr.serve.settings import Settings
from mvmr.serve.together import together

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_BODIES = 4  # of the largest size, in memory at once
_SPARE = 2  # decoders that one client leaves to the others
_PROBES = "probes"  # a client of their own
_CANARY_SECONDS = 1.0  # a verdict stands that long: probes must not cost the engine more than an image a second


@dataclass(frozen=True)
class Embedded:
    """embedding: float32 [D]; width, height: of the image, in pixels."""

    embedding: Floats
    width: int
    height: int


Outcome = Embedded | Rejected


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
        self._canary = canary(engine.size)[0]
        self._canary_file = io.BytesIO()
        Image.fromarray(self._canary).save(self._canary_file, "PNG")
        self._verdict: tuple[float, str | None] = (-1e9, "not asked yet")
        self._asking = asyncio.Lock()
        self._bytes = 0

    async def start(self) -> None:
        """Start the engine's thread, and run it once: its first batch is slow."""
        await asyncio.to_thread(self._decoders.start)
        self._batcher.start()
        if fault := await self.fault():
            logger.error("not ready: %s", fault)

    async def stop(self) -> None:
        """End all threads; to be called when nothing is under way any more."""
        await self._batcher.stop(self.settings.grace)
        await asyncio.to_thread(self._decoders.close)

    def reload_heads(self) -> None:
        """Read the bundle's heads again; where one is damaged, those of before stay in use, and the log says so."""
        try:
            heads = read_heads(bundles.load(self.engine.path, verify=False))
        except MvmrError as error:
            logger.error("heads not reloaded: %s", error)
            return
        self.engine = dataclasses.replace(self.engine, heads=heads)
        logger.info("heads reloaded: %s", ", ".join(heads) or "none")

    @contextmanager
    def memory(self) -> Iterator[Take]:
        """Yield ``take(bytes)``, for a request to call as its body arrives; given back when the block ends.

        The call raises Problem where the bodies under way would take more memory than they may.
        """
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if self._bytes + count > _BODIES * self.settings.max_body:
                raise busy("too many large bodies are under way", 1)
            held += count
            self._bytes += count

        try:
            yield take
        finally:
            self._bytes -= held

    async def embed(self, payloads: Sequence[Payload], client: str) -> list[Outcome]:
        """Decode and embed the images of one request.

        client: who sent it; one client's images never take all decoders.

        Raises: Problem when there is no room for them, or the engine fails.
        """
        with self._batcher.room(len(payloads)):
            return await together([self._outcome(payload, client) for payload in payloads])

    async def infer(self, pixels: Pixels) -> Floats:
        """Embed prepared images: uint8 [N, S, S, 3] -> float32 [N, D]. Raises: as `embed`."""
        with self._batcher.room(len(pixels)):
            rows = await together([self._embed(each) for each in pixels])
        self.metrics.images.labels("embedded").inc(len(pixels))
        return np.stack(rows) if rows else np.empty((0, self.engine.dim), np.float32)

    async def fault(self) -> str | None:
        """Why the service is not ready, None when it is: the canary must come back in time and as it was exported."""
        async with self._asking:  # one at a time, however many probes ask
            if time.monotonic() - self._verdict[0] > _CANARY_SECONDS:
                self._verdict = (time.monotonic(), await self._ask_canary())
        fault = "draining: it has been told to stop" if self.draining else self._verdict[1]
        self.metrics.ready.set(fault is None)
        return fault

    async def _ask_canary(self) -> str | None:
        limit = self.settings.stuck_seconds
        try:
            async with asyncio.timeout(limit):
                decoded = await asyncio.wrap_future(self._decoders.submit(self._canary_file.getvalue(), _PROBES))
        except TimeoutError:
            return f"no image has been decoded for {limit:g} s"
        if not isinstance(decoded, Prepared):
            return f"images can't be decoded: {decoded.reason}"
        if self._batcher.busy_seconds > limit:
            return f"the engine has been at one batch for {self._batcher.busy_seconds:.0f} s"
        try:
            async with asyncio.timeout(limit):
                found = await self._batcher.embed(self._canary, first=True)
        except TimeoutError:
            return f"the engine has not answered for {limit:g} s"
        except Exception as error:  # whatever a GPU raises
            return f"the engine fails: {' '.join(str(error).split())[:200]}"
        off = self.engine.canary_error(found)
        if not off <= TOLERANCE[self.engine.precision]:  # NaN, too
            return f"the engine's embedding of the canary is off by {off:.2g} of its length: it has drifted"
        return None

    async def _outcome(self, payload: Payload, client: str) -> Outcome:
        prepared = payload if isinstance(payload, Rejected) else await self._prepare(payload, client)
        if isinstance(prepared, Rejected):
            self.metrics.images.labels("rejected").inc()
            return prepared
        row = await self._embed(prepared.pixels)
        self.metrics.images.labels("embedded").inc()
        return Embedded(row, prepared.width, prepared.height)

    async def _prepare(self, data: bytes, client: str) -> Prepared | Rejected:
        with self.metrics.stage_seconds.labels("decode").time():
            return await asyncio.wrap_future(self._decoders.submit(data, client))

    async def _embed(self, pixels: Pixels) -> Floats:
        try:
            row = await self._batcher.embed(pixels)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever a GPU raises; the log has the trace
            raise Problem("engine-failed", f"{type(error).__name__}; the service's log says more") from error
        if not np.isfinite(row).all():
            raise Problem("engine-failed", "an embedding is not finite; see /readyz")
        return row
