"""Which layers of an int8 graph to keep in float: those that hurt most, and no more than it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mvmr.export.artifacts import EMBEDDING
from mvmr.export.onnx.session import Session
from mvmr.progress import track

Floats = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]
Quantise = Callable[[Collection[str]], bytes]
Judge = Callable[[bytes], Mapping[str, Any]]
Step = dict[str, Any]  # JSON values, as far as the judge's are


def keep_worst(
    quantise: Quantise, layers: Sequence[str], judge: Judge, sample: Images, wanted: Floats, *, progress: bool = False
) -> tuple[bytes, list[str], list[Step]]:
    """Quantise all layers, then all but the worst 1, 2, 4, 8, ... of them until `judge` is content.

    A layer is as bad as the noise in the embedding when it alone is quantised. Where it is the activation between two
    layers that suffers, both are found so, and it takes both in float to mend it.

    Args:
        quantise: makes a file of which the layers given are in int8.
        judge: takes such a file; says `passed`, beside any figures.

    Shapes:
        sample: uint8 [N, S, S, 3], as an exported file takes them; wanted: their embedding in float, float32 [N, D].

    Returns:
        The first file that passes or, if none does, the one with the least noise; the layers it keeps in float, the
        worst first; and every step, as :func:`mvmr.export.onnx.int8.search` says.
    """
    ranking: dict[str, float] = {}
    best: tuple[bytes, list[str]] = b"", []
    trail: list[Step] = []
    for count in (0, *(2**power for power in range((len(layers) - 1).bit_length()))):
        if count == 1:
            ranking = _rank(quantise, layers, sample, wanted, progress)
        worst = list(ranking)[:count]
        model = quantise([name for name in layers if name not in worst])
        step = {"kept_float": {name: ranking[name] for name in worst}, **_measure(model, sample, wanted)}
        if not trail or step["noise"] < min(earlier["noise"] for earlier in trail):
            best = model, worst
        verdict = dict(judge(model))
        trail.append({**step, "passed": bool(verdict["passed"]), "verdict": verdict})
        if verdict["passed"]:
            return model, worst, trail
    return *best, trail


def noise(actual: Floats, wanted: Floats) -> float:
    """Squared error of embeddings [N, D] over the variance of those wanted: 0 for a copy, 1 for their mean."""
    signal = float(np.square(wanted - wanted.mean(0), dtype=np.float64).sum())
    return float(np.square(actual - wanted, dtype=np.float64).sum()) / max(signal, np.finfo(np.float64).tiny)


def _rank(
    quantise: Quantise, layers: Sequence[str], sample: Images, wanted: Floats, progress: bool
) -> dict[str, float]:
    """The noise of each layer when it alone is quantised, the most first."""
    noises = {}
    with track("int8, layer by layer", 0, len(layers), unit="layers", shown=progress) as advance:
        for done, name in enumerate(layers, 1):
            noises[name] = noise(Session(quantise([name]))(sample)[EMBEDDING], wanted)
            advance(done, name)
    return dict(sorted(noises.items(), key=lambda item: -item[1]))


def _measure(model: bytes, sample: Images, wanted: Floats) -> Step:
    session, seconds = Session(model), []
    embedding = session(sample)[EMBEDDING]
    for image in sample:
        began = time.perf_counter()
        session(image[None])
        seconds.append(time.perf_counter() - began)
    return {"bytes": len(model), "latency_ms": 1000 * float(np.median(seconds)), "noise": noise(embedding, wanted)}
