"""The bundle behind LitServe, set up as its documentation does for throughput; runs in LitServe's own environment.

- Batches by `max_batch_size` and `batch_timeout`: lightning.ai/docs/litserve/features/batching
- An image comes as base64 in JSON, `decode_request` only takes it out and `batch` decodes in a pool of threads:
  lightning.ai/docs/litserve/speed-up-serving-by-200x. There is no documented way for a raw body (its issue 732).
- On a processor as many workers as cores, as many HTTP servers as workers, `fast_queue` from about 100 requests a
  second on: the docstrings of LitServer and LitServer.run.
"""

from __future__ import annotations

import argparse
import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve
import numpy as np
import numpy.typing as npt
from fastapi import Response

from mvmr.data.image_bytes import prepare
from mvmr.serve import Engine

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_BATCH_SECONDS = 0.01


class Embedder(litserve.LitAPI):
    """JSON {"image": base64} -> float32 [D] as bytes."""

    def __init__(self, bundle: str, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self._bundle, self._threads = bundle, threads

    def setup(self, device: str) -> None:
        self._engine = Engine.load(self._bundle, threads=self._threads)
        self._pool = ThreadPoolExecutor(self._threads)

    def decode_request(self, request: dict[str, str]) -> str:
        return request["image"]

    def batch(self, inputs: list[str]) -> Pixels:
        return np.stack(list(self._pool.map(self._pixels, inputs)))

    def predict(self, x: Pixels | str) -> Floats:
        return self._engine(self._pixels(x)[None] if isinstance(x, str) else x)

    def unbatch(self, output: Floats) -> list[Floats]:
        return list(output)

    def encode_response(self, output: Floats) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")

    def _pixels(self, image: str) -> Pixels:
        return prepare(base64.b64decode(image), self._engine.preprocess).pixels


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", required=True)
    for name in ("port", "workers", "threads", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--fast-queue", action="store_true")
    asked = parser.parse_args()
    api = Embedder(
        asked.bundle,
        asked.threads,
        max_batch_size=asked.batch,
        batch_timeout=_BATCH_SECONDS if asked.batch > 1 else 0.0,
        api_path="/embed",
    )
    server = litserve.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=asked.workers, fast_queue=asked.fast_queue
    )
    server.run(host="127.0.0.1", port=asked.port, log_level="warning", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
