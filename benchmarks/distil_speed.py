"""Two minutes of `mvmr distill`, nothing left out: the rates of teacher and student, and what they wait for.

    python benchmarks/distil_speed.py            # sizes for this machine's device
    python benchmarks/distil_speed.py --quick    # half a minute on a processor

The teacher's weights are read from a file, images are decoded from JPEG files, the recipe is the
default. Weights and images are random. The run ends as by Ctrl-C: with a checkpoint, after the step under way.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
import measure
import open_clip
import torch
from jpegs import HEIGHT, WIDTH, write_jpegs
from rich.console import Console

from mvmr.bundles import weights
from mvmr.cores import usable_cores
from mvmr.distillation.distill import distill
from mvmr.errors import MvmrError
from mvmr.training import targets, trainer

_EPOCHS = 1_000_000  # never reached: the clock ends the run


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that mean something on a kind of device and end in reasonable time."""

    teacher: str
    student: str
    size: int
    batch: int
    images: int
    seconds: float
    warmup: int  # steps that don't count


SIZES = {
    "cuda": Sizes(
        teacher="ViT-B-16", student="resnet50", size=224, batch=256, images=4096, seconds=110, warmup=10
    ),
    "cpu": Sizes(teacher="ViT-B-32", student="resnet50", size=64, batch=16, images=256, seconds=110, warmup=2),
    "quick": Sizes(teacher="ViT-S-32", student="resnet18", size=32, batch=8, images=32, seconds=10, warmup=1),
}  # fmt: skip


@dataclass
class Clock:
    """Looks on while a run is made: how long the teacher took, and when each batch was asked for and came.

    ends_at: on the performance counter; then the run is stopped, though not before it has made one step that counts
    asked, came: on the performance counter; idle: pairs of CUDA events around each wait, in the device's own queue
    """

    device: str
    warmup: int
    ends_at: float
    teacher: float = 0.0
    asked: list[float] = field(default_factory=list)
    came: list[float] = field(default_factory=list)
    idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def represent(self, *arguments: Any, **options: Any) -> Any:
        """In the place of `mvmr.training.targets.represent`."""
        began = time.perf_counter()
        rows = _represent(*arguments, **options)
        self.teacher += time.perf_counter() - began
        return rows

    def read(self, batches: Iterable[Any]) -> Iterator[Any]:
        """In the place of `mvmr.training.trainer.read`."""
        reader = _read(batches)
        stopped = False
        while True:
            before = self._event()
            self.asked.append(time.perf_counter())
            batch = next(reader, None)
            if batch is None:
                return
            self.came.append(time.perf_counter())
            after = self._event()
            if before and after:
                self.idle.append((before, after))
            if not stopped and self.came[-1] > self.ends_at and len(self.came) > self.warmup + 1:
                stopped = True
                signal.raise_signal(signal.SIGTERM)  # the trainer ends this step and keeps a checkpoint
            yield batch

    def _event(self) -> torch.cuda.Event | None:
        if self.device != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def figures(self, batch: int) -> dict[str, Any]:
        """Rate and waiting of all steps but the first; the last batch that came is not trained on within the time."""
        first, last = self.warmup, len(self.came) - 1
        seconds = self.asked[last] - self.asked[first]
        waited = sum(came - asked for asked, came in zip(self.asked[first:last], self.came[first:last], strict=True))
        idle = waited
        if self.idle:
            torch.cuda.synchronize()
            idle = sum(before.elapsed_time(after) for before, after in self.idle[first:last]) / 1e3
        return {
            "steps": last - first,
            "images_per_s": _rounded((last - first) * batch / seconds),
            "step_ms": _rounded(1e3 * seconds / (last - first)),
            "input_share": round(idle / seconds, 4),
            "loop_input_share": round(waited / seconds, 4),
        }


_represent, _read = targets.represent, trainer.read


def run(sizes: Sizes, device: str, folder: Path) -> dict[str, Any]:
    """Make files and weights in ``folder``, distil for the given seconds, and say how it went.

    Returns:
        ``input_share``: of the steps' time, that for which the device had nothing to do until the next images lay on
        it; ``loop_input_share``: the same of the training loop, which asks for images once it has read the loss.
    """
    files = write_jpegs(folder / "images", sizes.images)
    teacher = folder / "teacher.safetensors"
    weights.save(teacher, open_clip.create_model(sizes.teacher).state_dict())
    assign = [f"student.backbone={sizes.student}", f"views.size={sizes.size}", f"train.epochs={_EPOCHS}"]
    assign += [f"train.batch_size={sizes.batch}", "train.log_steps=10"]
    began = time.perf_counter()
    clock = Clock(device, sizes.warmup, began + sizes.seconds)
    with mock.patch.object(targets, "represent", clock.represent), mock.patch.object(trainer, "read", clock.read):
        try:
            distill(
                sizes.teacher, str(files[0].parent), folder / "student", pretrained=teacher, assign=assign,
                device=device, progress=True,
            )  # fmt: skip
        except KeyboardInterrupt as stopped:
            end = str(stopped).replace(f"{folder}{os.sep}", "")
    return {
        "seconds": _rounded(time.perf_counter() - began),
        "teacher_s": _rounded(clock.teacher),
        "teacher_images_per_s": _rounded(sizes.images / clock.teacher),
        "first_batch_s": _rounded(clock.came[0] - began),
        "jpeg_bytes": round(sum(file.stat().st_size for file in files) / len(files)),
        "decoding_processes": usable_cores(),
        "end": end,
    } | clock.figures(sizes.batch)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def show(result: dict[str, Any], console: Console) -> None:
    """A line for each figure."""
    settings = result["settings"]
    console.print(
        "{teacher} into {student}, {size} px, batch {batch}, {images} JPEG files of {width} x {height}".format(
            **settings, width=WIDTH, height=HEIGHT
        )
    )
    for key in (
        "teacher_images_per_s", "images_per_s", "step_ms", "input_share", "loop_input_share", "first_batch_s", "steps",
        "seconds", "end",
    ):  # fmt: skip
        console.print(f"{key:<22} {result[key]}")


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=measure.best_device(), show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, to try it out on a processor.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(device: str, quick: bool, out: Path) -> None:
    """Distil a CLIP of random weights from JPEG files on disk, and measure what each stage does."""
    measure.begin(device, 1 if quick else None)
    sizes = SIZES["quick" if quick else device]
    wait = measure.CoreWait()
    # A cache of its own: the teacher's embeddings of an earlier run would leave nothing to measure.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, MVMR_CACHE=f"{folder}/cache"):
        try:
            figures = run(sizes, device, Path(folder))
        except MvmrError as error:
            raise click.ClickException(str(error)) from error
    settings = {name: getattr(sizes, name) for name in ("teacher", "student", "size", "batch", "images", "warmup")}
    result = {"machine": measure.machine(device), "settings": settings | {"quick": quick}, "core_wait": wait.share()}
    console = measure.output()
    show(result | figures, console)
    measure.save("distil", result | figures, out, console)


if __name__ == "__main__":
    main()
