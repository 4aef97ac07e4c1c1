"""Does the batch job keep the cores at what counts? `python benchmarks/embed_speed.py`.

A ResNet50 with random weights at 224 px embeds JPEGs of 500 x 375 pixels cut from scikit-image's photographs. In turn
are measured: decoding alone (files read, decoded, resized and cropped on as many threads as there are cores); the
engine alone on pixels that are ready, as a user calls it (one batch after the other, each on all cores) and as the job
does (a batch to a core); and the whole job, from the first file to the finished manifest. The claim is about the job
beside the slower of decoding and the engine as a user calls it. Both take the same cores: beside an engine that wastes
nothing, the job can't do better than `within_reach`, its time over the sum of both times. Processor time is noted, too,
the job's with loading the engine.

With `--against PYTHON` the whole job is measured beside that of another version of mvmr instead, on the same images.
"""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import click
import measure
import numpy as np
import psutil
import skimage
import versions
from export_speed import export_resnet50
from PIL import Image

from mvmr.cores import usable_cores
from mvmr.data.image_bytes import Prepared, prepare
from mvmr.data.listing import open_source
from mvmr.serve.batch.job import embed
from mvmr.serve.batch.pipeline import in_order
from mvmr.serve.engine import Engine, Pixels

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "ihc.png")
WIDTH, HEIGHT, QUALITY = 500, 375, 90
PRECISIONS = ("fp32", "int8")
_SAMPLED = 0.1  # seconds
_JOB = """
import json, sys
from mvmr.serve.batch.job import embed
for line in sys.stdin:
    print(embed(**json.loads(line)).seconds, flush=True)
"""


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Exported bundle; left out, a ResNet50 of random weights."
)
@click.option("--size", default=224, show_default=True, help="Side of that ResNet50's images in pixels.")
@click.option("--images", default=1024, show_default=True)
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=PRECISIONS)
@click.option("--rounds", default=3, show_default=True)
@versions.against
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(
    bundle: Path | None,
    size: int,
    images: int,
    precisions: tuple[str, ...],
    rounds: int,
    against: Path | None,
    out: Path,
) -> None:
    """Time decoding, the engine and the whole job on the same images, in turn."""
    console = measure.output()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = bundle or export_resnet50(folder, size)
        make_photographs(folder / "images", images)
        wait = measure.CoreWait()
        if against:
            compared = {
                precision: _compared(path, folder, precision, images, rounds, against) for precision in precisions
            }
            versions.save("embed", compared, {"bundle": path.name, "images": images}, wait, out)
            return
        for precision in precisions:
            cases = cases_of(path, folder / "images", folder / "out", precision)
            busy: dict[str, list[float]] = {case: [] for case in cases}
            seconds = measure.interleave(
                {case: _counted(work, busy[case]) for case, work in cases.items()}, rounds, precision
            )
            rates = {case: spread.map(lambda value: images / value) for case, spread in seconds.items()}
            slower = min(("decode", "engine"), key=lambda case: rates[case].median)
            ideal = seconds["engine, a batch to a core"].median
            found[precision] = {
                "images_per_s": rates,
                "slower": slower,
                "ratio": measure.ratio(rates["job"], rates[slower]),
                "ratio_to_a_batch_to_a_core": measure.ratio(rates["job"], rates["engine, a batch to a core"]),
                "processor_ms_an_image": {
                    case: measure.Spread.of(values).map(lambda value: 1000 * value / images)
                    for case, values in busy.items()
                },
                "within_reach": round(ideal / (ideal + seconds["decode"].median), 3),
            }
            for case, rate in rates.items():
                busy_ms = found[precision]["processor_ms_an_image"][case]
                console.print(f"{precision}  {case:<26} {rate} images/s, {busy_ms} ms of a core to an image")
            for key in ("ratio", "ratio_to_a_batch_to_a_core", "within_reach"):
                console.print(f"{precision}  {key:<26} {found[precision][key]}")
        settings = {"size": size, "images": images, "rounds": rounds, "jpeg": [WIDTH, HEIGHT, QUALITY]}
        result = {"settings": settings, "cases": found, "machine": measure.machine("cpu"), "core_wait": wait.share()}
    measure.save("embed", result, out, console)


def _counted(work: Callable[[], float], busy: list[float]) -> Callable[[], float]:
    """The same work, its processor seconds (of all threads) noted: what other jobs on the machine disturb least."""

    def counted() -> float:
        began = time.process_time()
        seconds = work()
        busy.append(time.process_time() - began)
        return seconds

    return counted


def _compared(
    bundle: Path, folder: Path, precision: str, images: int, rounds: int, against: Path
) -> dict[str, dict[str, measure.Spread]]:
    """The whole job by this version and by another, each in a process of its own that has all imported."""
    asked = {
        "bundle": str(bundle), "images": str(folder / "images"), "out": str(folder / "out"), "precision": precision
    }  # fmt: skip
    with _Jobs(None) as here, _Jobs(against) as there:
        works = [partial(each.run, asked, images) for each in (here, there)]
        for work in works:
            work()
        return versions.compare(*works, rounds, precision)


class _Jobs:
    """Batch jobs one after the other, in a process of their own."""

    def __init__(self, python: Path | None) -> None:
        pipe = subprocess.PIPE
        self._process = psutil.Popen(versions.command(python, "-c", _JOB), stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def run(self, asked: dict[str, str], images: int) -> versions.Cost:
        """Run one. What ends with it is looked at until then: its last tenth of a second is not seen."""
        before = versions.processor_seconds(self._process)
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        after = dict(before)
        while not select.select([self._process.stdout], [], [], _SAMPLED)[0]:
            after |= versions.processor_seconds(self._process)
        seconds = float(self._process.stdout.readline())
        after |= versions.processor_seconds(self._process)
        shutil.rmtree(asked["out"])
        return versions.Cost(images / seconds, 1000 * (sum(after.values()) - sum(before.values())) / images)


def make_photographs(folder: Path, number: int) -> None:
    """JPEGs of the size that photographs have in ImageNet, all different."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    sources = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in PHOTOGRAPHS]
    for each in range(number):
        source = sources[each % len(sources)]
        scale = generator.uniform(0.6, 1.0) * min(source.width / WIDTH, source.height / HEIGHT)
        width, height = int(WIDTH * scale), int(HEIGHT * scale)
        left, top = generator.integers(0, source.width - width + 1), generator.integers(0, source.height - height + 1)
        cut = source.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        cut.save(folder / f"{each:05}.jpg", quality=QUALITY)


def cases_of(bundle: Path, images: Path, out: Path, precision: str) -> dict[str, Callable[[], float]]:
    """What is measured; each returns its seconds."""
    cores = usable_cores()
    engine = Engine.load(bundle, precision=precision)
    narrow = Engine.load(bundle, precision=precision, threads=1)
    items = list(open_source(str(images)).items())

    def decoded(read: Callable[[], object]) -> Pixels:
        outcome = prepare(read(), engine.preprocess)  # type: ignore[arg-type]
        if not isinstance(outcome, Prepared):
            raise TypeError(outcome.reason)
        return outcome.pixels

    with ThreadPoolExecutor(cores) as pool:
        ready = np.stack(list(pool.map(decoded, [item.read for item in items])))
    batches: Sequence[Pixels] = [ready[k : k + engine.at_once] for k in range(0, len(ready), engine.at_once)]
    number = count()

    def decode() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            for _ in in_order(partial(pool.submit, decoded), [item.read for item in items], 32):
                pass
        return time.perf_counter() - began

    def alone() -> float:
        began = time.perf_counter()
        for batch in batches:
            engine(batch)
        return time.perf_counter() - began

    def a_batch_to_a_core() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            for _ in in_order(partial(pool.submit, narrow), batches, 2 * cores):
                pass
        return time.perf_counter() - began

    def job() -> float:
        target = out / f"{precision}-{next(number)}"
        made = embed(bundle, images, out=target, precision=precision)
        shutil.rmtree(target)
        return made.seconds

    return {"decode": decode, "engine": alone, "engine, a batch to a core": a_batch_to_a_core, "job": job}


if __name__ == "__main__":
    main()
