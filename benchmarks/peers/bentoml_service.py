"""The bundle behind BentoML, set up as its documentation does for throughput; runs in BentoML's own environment.

- One service for a model and simple logic, as many workers as cores for work of a processor:
  docs.bentoml.com, "Run distributed Services" and "Parallelize requests handling".
- Adaptive batching by `batchable`, over a list, with `max_batch_size`, and `max_latency_ms` raised until it has no
  reason to answer 503; `concurrency` as large as a batch: "Adaptive batching" and "Concurrency".
- A batchable endpoint takes one list and can't take files without writing them to a disk: images come as base64 in
  JSON and go the same way. Without batches the body is the file itself and the answer the bytes: "Define input and
  output types".

The settings come by the environment, because `bentoml serve` imports this file in every process.
"""

from __future__ import annotations

import base64
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import ContentType

from mvmr.data.image_bytes import prepare
from mvmr.serve import Engine

WORKERS, THREADS, BATCH = (int(os.environ[f"PEER_{name}"]) for name in ("WORKERS", "THREADS", "BATCH"))
_LATENCY_MS = 10_000
SETTINGS = {
    "workers": WORKERS,
    "traffic": {"timeout": 60, "concurrency": WORKERS * BATCH},
    "logging": {"access": {"enabled": False}},
}


class _Embedding:
    def __init__(self) -> None:
        self._engine = Engine.load(os.environ["PEER_BUNDLE"], threads=THREADS)
        self._pool = ThreadPoolExecutor(THREADS)

    def rows(self, files: list[bytes]) -> list[bytes]:
        """float32 [D] of each file, as bytes."""
        prepared = self._pool.map(lambda file: prepare(file, self._engine.preprocess).pixels, files)
        return [row.tobytes() for row in self._engine(np.stack(list(prepared)))]


@bentoml.service(**SETTINGS)
class Batched:
    """JSON {"images": [base64]} -> JSON [base64 of float32 [D]]."""

    def __init__(self) -> None:
        self._embedding = _Embedding()

    @bentoml.api(batchable=True, max_batch_size=max(2, BATCH), max_latency_ms=_LATENCY_MS)
    def embed(self, images: list[str]) -> list[str]:
        rows = self._embedding.rows([base64.b64decode(image) for image in images])
        return [base64.b64encode(row).decode() for row in rows]


@bentoml.service(**SETTINGS)
class Single:
    """The bytes of a file -> float32 [D] as bytes."""

    def __init__(self) -> None:
        self._embedding = _Embedding()

    @bentoml.api
    def embed(
        self, image: Annotated[bytes, ContentType("image/jpeg")], /
    ) -> Annotated[bytes, ContentType("application/octet-stream")]:
        return self._embedding.rows([image])[0]
