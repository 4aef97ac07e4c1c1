"""A minute of more load than a GPU can bear: does the rate hold, does memory grow, is every answer right?

    python benchmarks/soak.py            # a ResNet50 at 224 px, 60 seconds
    python benchmarks/soak.py --quick    # seconds on a processor

It is the service without HTTP: its decoding, its bounded queue and its batches, in one process with the clients, twice
as many as the queue has room for. The student runs on onnxruntime where that can use the GPU, else in torch, in half
precision and channels_last. (`serve_overload.py` is the test of the whole service, on a processor.)
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
import psutil
import torch
from jpegs import write_jpegs
from students import Engine, half, onnx_engines, random_bundle, torch_engine

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.cores import usable_cores
from mvmr.data import open_images
from mvmr.data.image_bytes import Prepared, prepare
from mvmr.errors import MvmrError
from mvmr.serve.http.batcher import Batcher
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.problems import Problem

_PAUSE = 0.1  # seconds of a client that was refused, before it asks again
_LOOK = 0.5  # seconds between two looks at the memory
_WARM_UP = 2.0  # seconds that don't count
_CHECKED = 16  # an answer of so many is compared with all that it could be
_PICTURES = 64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What runs, and how much is put on it; `at_once` is what the service gives an engine of that kind."""

    backbone: str
    size: int
    at_once: int
    queue: int
    seconds: float


SIZES = {
    "cuda": Sizes(backbone="resnet50", size=224, at_once=32, queue=256, seconds=60),
    "cpu": Sizes(backbone="resnet50", size=224, at_once=4, queue=64, seconds=60),
    "quick": Sizes(backbone="resnet18", size=32, at_once=4, queue=16, seconds=9),
}


@dataclass
class Count:
    """What the clients got; arrays, for lists of numbers would look like a leak."""

    answered: array[float] = field(default_factory=lambda: array("d"))  # when, on the performance counter
    latencies: array[float] = field(default_factory=lambda: array("d"))  # seconds
    memory: list[tuple[float, float, float]] = field(default_factory=list)  # when, MiB of the process, of the device
    refused: int = 0
    wrong: int = 0
    checked: int = 0


async def soak(engine: Engine, preprocess: Preprocess, bodies: Sequence[bytes], sizes: Sizes, device: str) -> Count:
    """Let clients ask for the embedding of one picture after the other, until the time is over."""
    batcher = Batcher(engine, at_once=sizes.at_once, bound=sizes.queue, workers=1, metrics=Metrics())
    count, loop, wanted = Count(), asyncio.get_running_loop(), _alone(engine, preprocess, bodies)
    decoders = ThreadPoolExecutor(usable_cores())
    batcher.start()
    end = time.perf_counter() + _WARM_UP + sizes.seconds

    async def client(place: int) -> None:
        while (asked := time.perf_counter()) < end:
            body, place = place % len(bodies), place + 1
            try:
                with batcher.room(1):
                    prepared = await loop.run_in_executor(decoders, prepare, bodies[body], preprocess)
                    assert isinstance(prepared, Prepared)
                    row = await batcher.embed(prepared.pixels)
            except Problem:
                count.refused += 1
                await asyncio.sleep(_PAUSE)
                continue
            now = time.perf_counter()
            count.answered.append(now)
            count.latencies.append(now - asked)
            if len(count.answered) % _CHECKED == 0:
                count.checked += 1
                nearest = int(np.linalg.norm(wanted - row, axis=1).argmin())
                count.wrong += nearest != body or not np.isfinite(row).all()

    async def look() -> None:
        while time.perf_counter() < end:
            count.memory.append((time.perf_counter(), *_memory(device)))
            await asyncio.sleep(_LOOK)
        count.memory.append(
            (time.perf_counter(), *_memory(device))
        )  # else a busy machine may have seen the start alone

    await asyncio.gather(look(), *(client(number) for number in range(2 * sizes.queue)))
    await batcher.stop(5.0)
    decoders.shutdown()
    return count


def _alone(engine: Engine, preprocess: Preprocess, bodies: Sequence[bytes]) -> Any:
    """What each picture's embedding is when no other is in the batch."""
    prepared = [prepare(body, preprocess) for body in bodies]
    return np.concatenate([engine(each.pixels[None]) for each in prepared if isinstance(each, Prepared)])


def _memory(device: str) -> tuple[float, float]:
    resident = psutil.Process().memory_info().rss
    free, total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
    return resident / 2**20, (total - free) / 2**20


def figures(count: Count, seconds: float, device: str) -> dict[str, Any]:
    """Rates at the beginning and the end, latencies in ms, memory in MiB after a sixth of the time and at its end."""
    answered = np.array(count.answered)
    start = count.memory[0][0] + _WARM_UP
    of_second = [int(((answered >= start + k) & (answered < start + k + 1)).sum()) for k in range(int(seconds))]
    window = max(1, min(10, len(of_second) // 3))
    first, last = statistics.median(of_second[:window]), statistics.median(of_second[-window:])
    early = next((look for look in count.memory if look[0] >= start + seconds / 6), count.memory[-1])
    found: dict[str, Any] = {
        "images_per_s": round(float((answered >= start).sum() / (answered[-1] - start)), 1),
        "each_second": of_second,
        "first_seconds": first,
        "last_seconds": last,
        "last_against_first": round(last / max(1, first), 3),
        "latency_ms": {f"p{p}": round(1e3 * float(np.percentile(count.latencies, p)), 1) for p in (50, 99, 100)},
        "refused": count.refused,
        "checked": count.checked,
        "wrong": count.wrong,
    }
    for place, name in ((1, "resident_mib"), (2, "device_mib")):
        if place == 1 or device == "cuda":
            end, most = count.memory[-1][place], max(look[place] for look in count.memory)
            found[name] = {"early": round(early[place]), "end": round(end), "most": round(most)}
    return found


def _engine(path: Path, device: str, data: Path) -> tuple[str, Engine, str | None]:
    """What runs the student, and why not onnxruntime."""
    why = "on a processor `mvmr serve` is measured by serve_overload.py"
    if device == "cuda":
        try:
            return "onnxruntime fp16", onnx_engines(path, device, data)["onnxruntime fp16"], None
        except MvmrError as error:
            why = str(error)
    dtype = half(device) if device == "cuda" else torch.float32
    engine = torch_engine(bundles.load(path), device, dtype=dtype, channels_last=True)
    return f"torch {str(dtype).removeprefix('torch.')}, channels_last", engine, why


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=measure.best_device(), show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, to try it out on a processor.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(device: str, quick: bool, out: Path) -> None:
    """Embed under more load than can be borne, and look at rate, memory and answers."""
    measure.begin(device, 1 if quick else None)
    sizes = SIZES["quick" if quick else device]
    with tempfile.TemporaryDirectory() as folder:
        files = write_jpegs(Path(folder) / "images", _PICTURES)
        path = random_bundle(
            Path(folder), open_images(str(files[0].parent), "unlabelled"), backbone=sizes.backbone,
            size=sizes.size, device=device,
        )  # fmt: skip
        name, engine, why = _engine(path, device, files[0].parent)
        bodies = [file.read_bytes() for file in files]
        wait = measure.CoreWait()
        count = asyncio.run(soak(engine, bundles.load(path).manifest.preprocessing, bodies, sizes, device))
        core_wait = wait.share()
    settings = {key: getattr(sizes, key) for key in ("backbone", "size", "at_once", "queue", "seconds")}
    result: dict[str, Any] = {"machine": measure.machine(device), "settings": settings | {"quick": quick}}
    result |= {"engine": name, "not_onnxruntime": why, "core_wait": core_wait} | figures(count, sizes.seconds, device)
    console = measure.output()
    for key, value in result.items():
        if key not in ("machine", "settings", "each_second"):
            console.print(f"{key:<20} {value}")
    measure.save("soak", result, out, console)
    if count.wrong:
        raise click.ClickException(f"{count.wrong} of {count.checked} answers were another picture's, or not finite")


if __name__ == "__main__":
    main()
