"""Whether a service does what was verified: a canary goes through decoding and engine, and must come back right."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import Future

from PIL import Image

from mvmr.data.image_bytes import Prepared
from mvmr.errors import one_line
from mvmr.export.artifacts import canary
from mvmr.serve.decoding.pool import DecodePool
from mvmr.serve.engine import TOLERANCE, Engine
from mvmr.serve.http.batcher import Batcher

_PROBES = "probes"  # a client of their own
_FRESH = 1.0  # seconds that a verdict stands: probes must not cost the engine more than an image a second


class Readiness:
    """Asks the canary, in a thread of its own, so that an event loop with much to do keeps no probe waiting.

    Args:
        seconds: that decoding and engine may each take.
    """

    def __init__(self, engine: Engine, decoders: DecodePool, batcher: Batcher, seconds: float) -> None:
        self._engine, self._decoders, self._batcher, self._seconds = engine, decoders, batcher, seconds
        self._pixels = canary(engine.size)[0]
        file = io.BytesIO()
        Image.fromarray(self._pixels).save(file, "PNG")
        self._file = file.getvalue()
        self._lock = threading.Lock()
        self._verdict: Future[str | None] | None = None
        self._asked_at = 0.0

    def fault(self) -> Future[str | None]:
        """What is wrong, None where nothing is; the canary is asked once, however many ask for it at a time."""
        with self._lock:
            verdict = self._verdict
            if verdict is None or (verdict.done() and time.monotonic() - self._asked_at > _FRESH):
                verdict = self._verdict = Future()
                self._asked_at = time.monotonic()
                threading.Thread(target=self._ask, args=(verdict,), name="mvmr-canary", daemon=True).start()
            return verdict

    def _ask(self, verdict: Future[str | None]) -> None:
        try:
            verdict.set_result(self._look())
        except Exception as error:  # whatever a GPU raises
            verdict.set_result(f"the engine fails: {one_line(error)}")

    def _look(self) -> str | None:
        try:
            decoded = self._decoders.submit(self._file, _PROBES, urgent=True).result(self._seconds)
        except TimeoutError:
            return f"no image has been decoded for {self._seconds:g} s"
        if not isinstance(decoded, Prepared):
            return f"images can't be decoded: {decoded.reason}"
        if self._batcher.busy_seconds > self._seconds:
            return f"the engine has been at one batch for {self._batcher.busy_seconds:.0f} s"
        try:
            embedding = self._batcher.embed_first(self._pixels).result(self._seconds)
        except TimeoutError:
            return f"the engine has not answered for {self._seconds:g} s"
        off = self._engine.canary_error(embedding)
        if not off <= TOLERANCE[self._engine.precision]:  # NaN, too
            return f"the engine's embedding of the canary is off by {off:.2g} of its length: it has drifted"
        return None
