"""Claim: over HTTP the service embeds nearly as many images as the same decoding and engine do in one process.

Two ways of doing it in one process: the service's own threads and queue without HTTP, and the plainest there is, a
thread to a core that decodes a batch and runs the engine on it. All have the same cores, JPEGs and exported file, and
take turns; the clients that put the load on have a process of their own, on the same cores.

With `--against PYTHON` the service is measured beside that of another version of mvmr instead, on the same bundle.
"""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
import psutil
import skimage.data
import versions
from export_speed import export_resnet50
from PIL import Image

from mvmr.cores import usable_cores
from mvmr.data.image_bytes import Prepared, prepare
from mvmr.serve import Engine
from mvmr.serve.http.service import Service as Pipeline
from mvmr.serve.http.settings import Settings

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
CLIENTS = 16
_WARM_UP = 1.0  # seconds


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Exported bundle; left out, a ResNet50 at 224 px, int8."
)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=8.0, show_default=True, help="Of each turn.")
@click.option("--flag", "flags", multiple=True, help="Of `mvmr serve`: --flag=--decoders=1.")
@click.option("--accept", default="application/x-mvmr-float32", show_default=True, help="What clients ask for.")
@versions.against
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(
    bundle: Path | None,
    rounds: int,
    seconds: float,
    flags: tuple[str, ...],
    accept: str,
    against: Path | None,
    out: Path,
) -> None:
    """Measure throughput over HTTP beside that of the same work in process."""
    with tempfile.TemporaryDirectory() as folder:
        path = bundle or export_resnet50(Path(folder), 224)
        files = photographs(Path(folder))
        wait = measure.CoreWait()
        if against:
            services = [Service(path, *flags, python=python) for python in (None, against)]
            works = [partial(_cost, each, files, seconds, accept) for each in services]
            compared = versions.compare(*works, rounds, "serve")
            settings = {"bundle": path.name, "seconds": seconds, "clients": CLIENTS, "accept": accept, "flags": flags}
            versions.save("serve", {"http": compared}, settings, wait, out)
            return
        with Service(path, *flags) as service:
            found = _rounds(path, service, files, rounds, seconds, accept)
        found["core_wait"] = wait.share()
    found |= {"benchmark": "serve", "machine": measure.machine("cpu"), "accept": accept, "clients": CLIENTS}
    console = measure.output()
    for key, value in found.items():
        if key not in ("machine", "core_wait"):
            console.print(f"{key:<32} {value}")
    measure.save("serve", found, out, console)


def _rounds(
    path: Path, service: Service, files: list[Path], rounds: int, seconds: float, accept: str
) -> dict[str, Any]:
    engine, bodies = Engine.load(path, threads=1), [file.read_bytes() for file in files]
    inside, piped, over, extra = [], [], [], []
    in_process(engine, bodies, 2.0)
    for _ in range(rounds):
        own = psutil.Process()
        before = sum(own.cpu_times()[:2])
        rate, count = in_process(engine, bodies, seconds)
        inside.append(rate)
        cost = (sum(own.cpu_times()[:2]) - before) / count
        piped.append(asyncio.run(without_http(engine, bodies, seconds)))
        before = service.processor_seconds()
        answers = put_load(service, files, seconds, CLIENTS, accept)
        done = answers["statuses"]["200"]
        over.append(done / answers["seconds"])
        extra.append(1000 * ((service.processor_seconds() - before) / done - cost))
    return {
        "rounds": rounds,
        "images_per_s_http": str(measure.Spread.of(over)),
        "images_per_s_same_without_http": str(measure.Spread.of(piped)),
        "images_per_s_thread_to_a_core": str(measure.Spread.of(inside)),
        "http_to_same_without_http": str(measure.Spread.of([a / b for a, b in zip(over, piped, strict=True)])),
        "http_to_thread_to_a_core": str(measure.Spread.of([a / b for a, b in zip(over, inside, strict=True)])),
        "http_processor_ms_per_image": str(measure.Spread.of(extra)),
        "batches": service.batches(),
    }


def _cost(service: Service, files: list[Path], seconds: float, accept: str) -> versions.Cost:
    """Of a service that is started anew: how fast one decodes depends on where its memory happens to lie."""
    with service:
        put_load(service, files, _WARM_UP, CLIENTS, accept)
        before = service.processor_seconds()
        answers = put_load(service, files, seconds, CLIENTS, accept)
        done = answers["statuses"]["200"]
        return versions.Cost(done / answers["seconds"], 1000 * (service.processor_seconds() - before) / done)


def in_process(engine: Engine, bodies: list[bytes], seconds: float) -> tuple[float, int]:
    """Images a second, and how many: a thread to a core, each decoding a batch and running the engine on it."""
    began, done = time.perf_counter(), [0] * usable_cores()

    def work(number: int) -> None:
        place = number
        while time.perf_counter() - began < seconds:
            batch = [prepare(bodies[(place + i) % len(bodies)], engine.preprocess) for i in range(engine.at_once)]
            engine(np.stack([each.pixels for each in batch if isinstance(each, Prepared)]))
            place += engine.at_once
            done[number] += engine.at_once

    with ThreadPoolExecutor(len(done)) as pool:
        for worker in [pool.submit(work, number) for number in range(len(done))]:
            worker.result()
    return sum(done) / (time.perf_counter() - began), sum(done)


async def without_http(engine: Engine, bodies: list[bytes], seconds: float) -> float:
    """Images a second of the service's own decoding, queue and engine, asked by as many clients, without HTTP."""
    service = Pipeline(engine, Settings(workers=usable_cores()))
    await service.start()
    began, done = time.perf_counter(), 0

    async def client(place: int) -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await service.embed([bodies[place % len(bodies)]], "")
            place, done = place + 1, done + 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    rate = done / (time.perf_counter() - began)
    await service.stop()
    return rate


def photographs(folder: Path, count: int = 32) -> list[Path]:
    """JPEGs of about 500 x 375 pixels, all different."""
    random, files = np.random.default_rng(0), []
    for number in range(count):
        base = Image.fromarray(getattr(skimage.data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])())
        size = (500 + int(random.integers(40)), 375 + int(random.integers(40)))
        content = io.BytesIO()
        base.resize(size).save(content, "JPEG", quality=90)
        files.append(folder / f"{number:02d}.jpg")
        files[-1].write_bytes(content.getvalue())
    return files


class Service:
    """`mvmr serve` in a process of its own."""

    def __init__(self, bundle: Path, *flags: str, python: Path | None = None) -> None:
        self._command = versions.command(python, "-m", "mvmr", "serve", str(bundle), "--port", "0", *flags)

    def __enter__(self) -> Service:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if " at http" in line:
                self.port = int(line.rsplit(":", 1)[1])
            if "startup complete" in line:
                break
        self.process = psutil.Process(self._process.pid)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def processor_seconds(self) -> float:
        """Of all its threads and the processes that decode, so far."""
        return sum(versions.processor_seconds(self.process).values())

    def batches(self) -> dict[str, int]:
        """How many batches had at most so many images."""
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        rows = [line for line in lines if line.startswith("mvmr_batch_images_bucket")]
        return {line.split('"')[1]: int(float(line.rsplit(" ", 1)[1])) for line in rows}


def put_load(service: Service, files: list[Path], seconds: float, clients: int, accept: str) -> dict[str, Any]:
    """Clients that ask again and again; what they got."""
    load = {
        "host": "127.0.0.1", "port": service.port, "path": "/v1/embed", "clients": clients, "seconds": seconds,
        "headers": {"content-type": "image/jpeg", "accept": accept}, "files": [str(file) for file in files],
    }  # fmt: skip
    script = str(Path(__file__).with_name("load.py"))
    done = subprocess.run([sys.executable, script], input=json.dumps(load), capture_output=True, text=True, check=True)
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


if __name__ == "__main__":
    main()
