"""Speed of every artifact of a bundle, and of torch, on this machine: interleaved, as ratios to the float32 ONNX."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mvmr import __version__
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.tensors import channels_first
from mvmr.cores import usable_cores
from mvmr.errors import MvmrError, one_line
from mvmr.export.artifacts import ARTIFACTS
from mvmr.export.runtimes import open_artifact, provider_on
from mvmr.progress import is_wanted, track
from mvmr.storage.atomic import write_json

Images = npt.NDArray[np.uint8]
Engine = Callable[[Images], object]
_BASE = ARTIFACTS["onnx"]  # what all others are compared with
BASE = _BASE.label.lower()
_SECONDS = 0.3  # of work to a measurement


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one batch, a value to a round: wall time, and processor time of all threads."""

    wall: tuple[float, ...]
    processor: tuple[float, ...]


def bench(
    bundle: str | os.PathLike[str],
    *,
    batches: Sequence[int] = (1, 16),
    threads: Sequence[int] = (),
    rounds: int = 7,
    compiled: bool = True,
    device: str = "cpu",
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure torch (eager, compiled) and every artifact of a bundle on this device, and write JSON where asked to.

    Every engine has its turn in every round, each round starting with the next one, so that a machine that slows down
    slows down all of them. Images are random bytes: the time does not depend on them.

    Args:
        batches: images to a batch.
        threads: of the processor, for every engine; several counts are measured one after the other, and none given
            stands for all cores.
        compiled: also measure ``torch.compile``, which takes a minute or more to compile.
        device: ``cpu`` or ``cuda``.
        out: file of the JSON.

    Returns:
        ``rows``: engine, threads, batch, medians ``wall_ms`` and ``processor_ms`` of a batch, ``images_per_s``, and
        the medians of ``times_faster`` and ``times_less_processor`` against the float32 ONNX on as many threads, round
        by round; ``not_measured``: engine -> why.

    Raises:
        MvmrError: the bundle has no float32 ONNX to compare with, or the device is not there.
    """
    progress = is_wanted(progress)
    opened = bundles.load(bundle)
    if not _BASE.files(opened.manifest.files):
        raise MvmrError(f"{opened.path} has no ONNX to compare with: make it with `mvmr export {opened.path} --onnx`")
    cases = [(count, batch) for count in (threads or (usable_cores(),)) for batch in batches]
    rows, missing = _measure(opened, cases, rounds, compiled=compiled, device=device, progress=progress)
    result = {
        "benchmark": "export",
        "mvmr": __version__,
        "bundle": {
            "backbone": opened.manifest.backbone,
            "size": opened.manifest.preprocessing.crop,
            "space_id": opened.space_id,
        },
        "machine": {"device": device, "cores": usable_cores()},
        "rounds": rounds,
        "rows": rows,
        "not_measured": missing,
    }
    if out is not None:
        write_json(Path(out), result)
    return result


def _measure(
    bundle: Bundle, cases: Sequence[tuple[int, int]], rounds: int, *, compiled: bool, device: str, progress: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of every case, (threads, batch), and why some engines have none."""
    size, random = bundle.manifest.preprocessing.crop, np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        with track("measuring", 0, len(cases) * rounds, unit="rounds", shown=progress) as advance:
            for number, (count, batch) in enumerate(cases):
                torch.set_num_threads(count)
                engines, missing = _engines(bundle, compiled, device, count)
                images = random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
                step = partial(_advance, advance, number * rounds, f"{count} threads, batch {batch}")
                times = _measure_in_turn(engines, images, rounds, step)
                rows += [_row(name, count, batch, measurement, times[BASE]) for name, measurement in times.items()]
    finally:
        torch.set_num_threads(before)
    return rows, missing


def _engines(bundle: Bundle, compiled: bool, device: str, threads: int) -> tuple[dict[str, Engine], dict[str, str]]:
    student = bundle.student(device)

    def run_eager(images: Images) -> object:
        return student(channels_first(images).to(student.device)).cpu()

    engines: dict[str, Engine] = {"torch eager": run_eager}
    missing: dict[str, str] = {}
    if compiled:
        twin = bundle.student(device)
        twin.encoder = torch.compile(twin.encoder, dynamic=False)  # type: ignore[assignment]

        def run_compiled(images: Images) -> object:
            return twin(channels_first(images).to(twin.device)).cpu()

        try:
            size = bundle.manifest.preprocessing.crop
            run_compiled(np.zeros((1, size, size, 3), np.uint8))
            engines["torch compiled"] = run_compiled
        except Exception as error:  # a compiler that is not there, and whatever else inductor may stumble over
            missing["torch compiled"] = one_line(error)
    for row in ARTIFACTS.values():
        name, provider = row.label.lower(), provider_on(row, "cpu" if row.device == "cpu" else device)
        if not row.machine and not row.files(bundle.manifest.files):
            missing[name] = "not exported"
            continue
        try:
            engines[name] = open_artifact(row, bundle, provider=provider, threads=threads)
        except MvmrError as error:
            if not row.machine:
                raise
            missing[name] = str(error)  # what this machine lacks, beside the file perhaps
    return engines, missing


def _advance(advance: Callable[[int, str], None], before: int, note: str, done: int) -> None:
    advance(before + done, note)


def _measure_in_turn(
    engines: Mapping[str, Engine], images: Images, rounds: int, advance: Callable[[int], None]
) -> dict[str, Measurement]:
    calls = {name: _count_calls(engine, images) for name, engine in engines.items()}
    names = list(engines)
    walls: dict[str, list[float]] = {name: [] for name in engines}
    processors: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds):
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            wall, processor = _time_calls(engines[name], images, calls[name])
            walls[name].append(wall)
            processors[name].append(processor)
        advance(number + 1)
    return {name: Measurement(tuple(walls[name]), tuple(processors[name])) for name in names}


def _count_calls(engine: Engine, images: Images) -> int:
    """How many calls make a measurement; warms up on the way."""
    engine(images)
    wall, _ = _time_calls(engine, images, 1)
    return max(1, round(1000 * _SECONDS / max(1e-3, wall)))


def _time_calls(engine: Engine, images: Images, calls: int) -> tuple[float, float]:
    """Milliseconds of a call, wall and processor; an engine returns host memory, so that no work is pending."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        engine(images)
    return 1000 * (time.perf_counter() - wall) / calls, 1000 * (time.process_time() - processor) / calls


def _row(name: str, threads: int, batch: int, measurement: Measurement, base: Measurement) -> dict[str, Any]:
    def median(values: Sequence[float]) -> float:
        return float(f"{statistics.median(values):.4g}")

    def ratios(values: Sequence[float], references: Sequence[float]) -> float:
        return median([reference / max(1e-9, value) for value, reference in zip(values, references, strict=True)])

    return {
        "engine": name,
        "threads": threads,
        "batch": batch,
        "wall_ms": median(measurement.wall),
        "processor_ms": median(measurement.processor),
        "images_per_s": median([1000 * batch / wall for wall in measurement.wall]),
        "times_faster": ratios(measurement.wall, base.wall),
        "times_less_processor": ratios(measurement.processor, base.processor),
        "wall_ms_rounds": [float(f"{value:.4g}") for value in measurement.wall],
    }
