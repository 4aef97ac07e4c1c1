"""How fast is an exported ResNet50 at 224 px? `python benchmarks/export_speed.py`.

The weights are random: they decide what int8 costs in accuracy, not how long it takes, so its gates are opened here and
no layer is kept in float. Engines have their turns as in `mvmr bench export`, which measures a bundle of your own.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import measure
import torch

from mvmr import bundle as bundles
from mvmr.data import open_images
from mvmr.encoder import EncoderConfig, build_encoder
from mvmr.export.bench import bench
from mvmr.export.run import export
from mvmr.preprocess import Preprocess
from mvmr.pretraining import recalibrate

DATA = "sample:patches"
OPEN = ("centred_cosine_mean=-1", "overlap=-1")


@click.command()
@click.option("--size", default=224, show_default=True, help="Side of the images in pixels.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", multiple=True, type=click.IntRange(1), default=(1, 2), show_default=True)
@click.option("--compiled/--no-compiled", default=False, show_default=True, help="Also measure torch.compile.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(size: int, rounds: int, threads: tuple[int, ...], compiled: bool, out: Path) -> None:
    """Export a ResNet50 with random weights to fp32 and int8, and time both beside torch."""
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
    path = _bundle(folder, size)
    export(path, formats=["onnx", "int8"], data=DATA, calibration=DATA, images=64, gates=OPEN, progress=True)
    return path


def _matmul_gflops(threads: int) -> float:
    """What the cores can do at all, in float32: the best of ten products of two large matrices."""
    torch.set_num_threads(threads)
    a, b, seconds = torch.rand(2048, 2048), torch.rand(2048, 2048), []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds) / 1e9


def _bundle(folder: Path, size: int) -> Path:
    torch.manual_seed(0)
    encoder, preprocess = build_encoder(EncoderConfig(architecture="resnet50")), Preprocess.for_size(size)
    images = open_images(DATA, "train").subset(range(0, 1360, 20))
    for part in encoder.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.2, 0.5)  # else each block is the identity
    recalibrate(encoder, images, preprocess, batch_size=16, workers=0, device=torch.device("cpu"))
    working = folder / "student.partial"
    working.mkdir()
    bundles.write(
        working, architecture="resnet50", small_kernel=False, embedding_dim=2048, preprocessing=preprocess,
        training={"data": {"name": DATA}}, encoder_state=encoder.state_dict(),
    )  # fmt: skip
    bundles.publish(working, folder / "student")
    return folder / "student"


if __name__ == "__main__":
    main()
