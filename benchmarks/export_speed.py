"""How fast is an exported ResNet50 at 224 px? `python benchmarks/export_speed.py`.

The weights are random: they decide what int8 costs in accuracy, not how long it takes, so its gates are opened here and
no layer is kept in float. Engines have their turns as in `mvmr bench export`, which measures a bundle of your own.

On a GPU (`--device cuda`) the question is another: in which way torch runs the student best there, and onnxruntime
where it can use the GPU. Images come from host memory, and features go back to it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
import torch
from jpegs import write_jpegs
from rich.console import Console
from students import Engine, half, onnx_engines, random_bundle, torch_engine

from mvmr.bundles import bundle as bundles
from mvmr.data import open_images
from mvmr.errors import MvmrError

DATA = "sample:patches"
OPEN = ("centred_cosine_mean=-1", "overlap=-1")
_ENOUGH_SECONDS = 0.2  # a sample is the mean of as many batches as take so long
EAGER = "torch eager"


@click.command()
@click.option("--size", default=224, show_default=True, help="Side of the images in pixels.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", multiple=True, type=click.IntRange(1), default=(1, 2), show_default=True)
@click.option("--compiled/--no-compiled", default=False, show_default=True, help="Also measure torch.compile.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 64), help="On a GPU.")
@click.option("--quick", is_flag=True, help="What is done on a GPU, in small and without compiling, on any device.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(
    size: int, rounds: int, threads: tuple[int, ...], compiled: bool, device: str, batches: tuple[int, ...],
    quick: bool, out: Path,
) -> None:  # fmt: skip
    """Export a ResNet50 with random weights to fp32 and int8, and time both beside torch; on a GPU, torch's ways."""
    if quick:
        measure.begin(device, 1)
        _on_device(device, "resnet18", 32, (4,), 2, False, out)
    elif device == "cuda":
        measure.begin(device, None)
        _on_device(device, "resnet50", size, batches, rounds, compiled, out)
    else:
        _exported(size, rounds, threads, compiled, out)


def _exported(size: int, rounds: int, threads: tuple[int, ...], compiled: bool, out: Path) -> None:
    from mvmr.export.bench import bench  # here: torch's ways can be measured without onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = export_resnet50(Path(folder), size)
        wait = measure.CoreWait()
        found = bench(path, rounds=rounds, threads=threads, compiled=compiled, progress=True)
        found |= {"matmul_gflops": _matmul_gflops(max(threads))}
        found |= {"machine": measure.machine("cpu"), "core_wait": wait.share()}
    console = measure.output()
    for row in found["rows"]:
        case = f"threads {row['threads']}, batch {row['batch']:<3}"
        faster = f"{row['times_faster']:.2f} times as fast as the float32 ONNX"
        console.print(
            f"{row['engine']:<15} {case} {row['wall_ms']:>6.4g} ms {faster}, "
            f"{row['times_less_processor']:.2f} by processor time"
        )
    console.print(f"multiplying 2048 x 2048 matrices: {found['matmul_gflops']:.0f} GFLOP/s on {max(threads)} threads")
    measure.save("export", found, out, console)


def export_resnet50(folder: Path, size: int) -> Path:
    """A bundle with a ResNet50 of random weights, exported in float32 and in 8 bits."""
    from mvmr.export.export import export

    images = open_images(DATA, "train").subset(range(0, 1360, 20))
    path = random_bundle(folder, images, backbone="resnet50", size=size)
    export(path, formats=["onnx", "int8"], data=DATA, calibration=DATA, images=64, gates=OPEN, progress=True)
    return path


def _on_device(
    device: str, backbone: str, size: int, batches: Sequence[int], rounds: int, compiled: bool, out: Path
) -> None:
    wait, console = measure.CoreWait(), measure.output()
    with tempfile.TemporaryDirectory() as folder:
        data = write_jpegs(Path(folder) / "images", 64)[0].parent
        images = open_images(str(data), "unlabelled")
        path = random_bundle(Path(folder), images, backbone=backbone, size=size, device=device)
        found: dict[str, Any] = {"settings": {"backbone": backbone, "size": size, "rounds": rounds}}
        found |= {"machine": measure.machine(device), "not_measured": {}}
        engines = _torch_engines(path, device, compiled=False)
        try:
            engines |= onnx_engines(path, device, data)
        except MvmrError as error:
            found["not_measured"]["onnxruntime"] = str(error)
        found |= {"rows": _time(engines, device, size, batches, rounds), "core_wait": wait.share()}
        for name, engine in _torch_engines(path, device, compiled=True).items() if compiled else ():
            # Compiling may take longer than somebody is ready to wait: what is known by now is kept.
            measure.save("export", found, out, console)
            try:
                rows = _time({EAGER: engines[EAGER], name: engine}, device, size, batches, rounds)
                found["rows"] += [row for row in rows if row["engine"] == name]
            except Exception as error:  # a compiler that is not there, and whatever else inductor may stumble over
                found["not_measured"][name] = (str(error).strip() or repr(error)).splitlines()[0][:200]
            found["core_wait"] = wait.share()
    show(found, console)
    measure.save("export", found, out, console)


def _torch_engines(path: Path, device: str, *, compiled: bool) -> dict[str, Engine]:
    bundle, dtype = bundles.load(path), half(device)
    name = "fp16" if dtype == torch.float16 else "bf16"
    if compiled:
        return {
            f"torch compiled, {name}, channels_last": torch_engine(
                bundle, device, dtype=dtype, channels_last=True, compiled=True
            ),
            "torch compiled": torch_engine(bundle, device, compiled=True),
        }
    return {
        EAGER: torch_engine(bundle, device),
        f"torch {name}, channels_last": torch_engine(bundle, device, dtype=dtype, channels_last=True),
    }


def _time(
    engines: dict[str, Engine], device: str, size: int, batches: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """A row to a batch and engine; times faster: than torch eager, the first, round by round."""
    rows, random = [], np.random.default_rng(0)
    for batch in batches:
        images = random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        works = {name: partial(engine, images) for name, engine in engines.items()}
        calls = {name: measure.enough_calls(work, device, _ENOUGH_SECONDS) for name, work in works.items()}
        turns = {name: partial(measure.seconds_of, work, device, calls[name]) for name, work in works.items()}
        seconds = measure.interleave(turns, rounds, f"batch {batch}")
        rows += [
            {
                "engine": name,
                "batch": batch,
                "wall_ms": spread.map(lambda s: s * 1e3),
                "images_per_s": spread.map(lambda s, batch=batch: batch / s),
                "times_faster": measure.ratio(seconds[EAGER], spread),
            }
            for name, spread in seconds.items()
        ]
    return rows


def show(found: dict[str, Any], console: Console) -> None:
    """A line to an engine and batch, and why others are missing."""
    for row in found["rows"]:
        console.print(
            f"{row['engine']:<38} batch {row['batch']:<3} {row['wall_ms'].median:>6.4g} ms, "
            f"{row['images_per_s'].median:>7,.0f} images/s, {row['times_faster'].median:.2f} times as fast as {EAGER}"
        )
    for name, why in found["not_measured"].items():
        console.print(f"{name}: not measured, {why}")


def _matmul_gflops(threads: int) -> float:
    """What the cores can do at all, in float32: the best of ten products of two large matrices."""
    torch.set_num_threads(threads)
    a, b, seconds = torch.rand(2048, 2048), torch.rand(2048, 2048), []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds) / 1e9


if __name__ == "__main__":
    main()
