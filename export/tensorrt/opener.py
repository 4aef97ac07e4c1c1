"""Open the engine that a bundle has for this machine, as the table of artifacts wants it: it takes any batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mvmr.bundles.bundle import Bundle
from mvmr.errors import MvmrError
from mvmr.export.artifacts import Artifact
from mvmr.export.tensorrt import engine as tensorrt

Outputs = Mapping[str, npt.NDArray[np.float32]]
Run = Callable[[npt.NDArray[np.uint8]], Outputs]


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineRunner:
    """An engine for batches of any size, and for several threads: see `mvmr.export.runtimes.Runner`."""

    size: int
    dim: int
    metadata: Mapping[str, Any]
    run: Run

    def __call__(self, images: npt.NDArray[np.uint8]) -> Outputs:
        """uint8 [N, size, size, 3] -> by output: float32 [N, D] or [N, C]; raises MvmrError for any other array."""
        return self.run(images)


def locate(artifact: Artifact, bundle: Bundle) -> str:
    """Name the bundle's engine for this machine; raises MvmrError saying why there is none and how to make it."""
    return tensorrt.find(bundle).name


def open_artifact(
    artifact: Artifact, bundle: Bundle, *, provider: str | None = None, threads: int | None = None
) -> EngineRunner:
    """Put the bundle's engine on the GPU, where there is no choice of provider and threads.

    Raises: MvmrError as `mvmr.export.tensorrt.engine.find` and `Engine` do.
    """
    stored = tensorrt.find(bundle)
    engine = tensorrt.Engine.load(stored.path, stored.sidecar, onnx_sha256=stored.onnx_sha256)
    run = any_batch(engine, *engine.batches)
    return EngineRunner(size=engine.size, dim=engine.dim, metadata=stored.sidecar, run=run)


def check_provider(provider: str) -> None:
    """Refuse any: an engine runs on the GPU that it was built on."""
    raise MvmrError(f"a TensorRT engine takes no provider, and {provider} is none; leave it out")


def any_batch(run: Run, low: int, high: int) -> Run:
    """An engine that takes `low` to `high` images, made to take any number, and to be called by one thread at a time.

    Where images lack, copies of the first are added, and cut off again.
    """
    lock = threading.Lock()

    def run_part(images: npt.NDArray[np.uint8]) -> Outputs:
        padding = max(0, low - len(images))
        with lock:
            outputs = run(np.concatenate([images, np.repeat(images[:1], padding, axis=0)]))
        return {name: rows[: len(images)] for name, rows in outputs.items()}

    def run_batch(images: npt.NDArray[np.uint8]) -> Outputs:
        if not len(images):
            blank = np.zeros((1, *images.shape[1:]), images.dtype)
            return {name: rows[:0] for name, rows in run_part(blank).items()}
        parts = [run_part(images[start : start + high]) for start in range(0, len(images), high)]
        return {name: np.concatenate([outputs[name] for outputs in parts]) for name in parts[0]}

    return run_batch
