"""What all benchmarks share: interleaved rounds, medians with their spread, peak memory, the machine, the JSON."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import track

from mvmr import __version__
from mvmr.comparison.memory import Memory
from mvmr.cores import usable_cores
from mvmr.storage.atomic import write_json

P = ParamSpec("P")
T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
_BUSY = 0.05
_ENOUGH_SECONDS = 0.1  # of matrix products, to a sample of their rate
_PACKAGES = ("lightning-fabric", "numpy", "open_clip_torch", "torch", "torchvision")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one value to a round, and the rounds themselves."""

    median: float
    q25: float
    q75: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        """Summarise the rounds; one round is its own quartiles."""
        q25, median, q75 = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else [rounds[0]] * 3
        return cls(_short(median), _short(q25), _short(q75), tuple(_short(value) for value in rounds))

    def map(self, function: Callable[[float], float]) -> Spread:
        """The same rounds in another unit."""
        return Spread.of([function(value) for value in self.rounds])

    def __str__(self) -> str:
        """Median and, in brackets, the quartiles."""
        return f"{self.median:.3g} ({self.q25:.3g}-{self.q75:.3g})"


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def ratio(values: Spread, against: Spread) -> Spread:
    """Round by round, so that a machine that slows down during the run slows down both sides of the ratio."""
    return Spread.of([value / other for value, other in zip(values.rounds, against.rounds, strict=True)])


def interleave(cases: Mapping[str, Callable[[], float]], rounds: int, label: str) -> dict[str, Spread]:
    """Every case once a round, each round starting with the next case: seconds, as each call returns them."""
    names, seconds = list(cases), {name: [0.0] * rounds for name in cases}
    for r in shown(range(rounds), label):
        for k in range(len(names)):
            name = names[(r + k) % len(names)]
            seconds[name][r] = cases[name]()
    return {name: Spread.of(values) for name, values in seconds.items()}


def seconds_of(work: Callable[[], object], device: str, calls: int = 1) -> float:
    """Seconds of one call, over ``calls`` of them, with the device's queue empty before and after."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def enough_calls(work: Callable[[], object], device: str, at_least: float) -> int:
    """How many calls take ``at_least`` seconds together; warms up on the way."""
    seconds_of(work, device)
    return max(1, round(at_least / max(1e-6, seconds_of(work, device))))


def matrix_tflops(device: str, dtype: torch.dtype) -> float:
    """What the device can do at all, in 1e12 operations a second: the median rate of products of two large matrices.

    They are random, for products of zeros run faster than those of anything else.
    """
    side = 8192 if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    work = partial(torch.mm, a, b)
    calls = enough_calls(work, device, _ENOUGH_SECONDS)
    seconds = statistics.median(seconds_of(work, device, calls) for _ in range(5))
    return _short(2 * side**3 / seconds / 1e12)


def synchronize(device: str) -> None:
    """Wait for all that was asked of the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def alone(device: str, preload: Sequence[str], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``work`` in a fresh process, so that no earlier case has touched its heap; on CUDA in this one.

    CUDA's allocator counts exactly what is alive, and a context for every case would take minutes.

    Args:
        preload: modules that are imported once, in the clean process that every fresh one is forked from.
    """
    if device == "cuda":
        return work(*args, **kwargs)
    # glibc then maps every larger block by itself and returns it when it is freed: the resident set is what is alive.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *args, **kwargs).result()


def best_device() -> str:
    """``cuda`` where torch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def options(command: Callable[P, T]) -> Callable[P, T]:
    """The options every benchmark has."""
    for option in (
        click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the JSON."),
        click.option("--threads", type=click.IntRange(1), help="Threads of the processor; default: the usable cores."),
        click.option("--rounds", type=click.IntRange(1), help="How often every case has its turn."),
        click.option("--quick", is_flag=True, help="Small sizes and few rounds, to try it out on a processor."),
        click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), default=best_device(), show_default=True),
    ):
        command = option(command)
    return command


class CoreWait:
    """How long this process was ready to run while other jobs had the cores: the doubt in a time taken here."""

    def __init__(self) -> None:
        self.waited, self.began = _seconds_in_queue(), time.perf_counter()

    def share(self) -> float | None:
        """Share of the time since this object was made that the main thread waited for a core; none off Linux."""
        now = _seconds_in_queue()
        if now is None or self.waited is None:
            return None
        return round((now - self.waited) / (time.perf_counter() - self.began), 3)


def _seconds_in_queue() -> float | None:
    status = Path("/proc/self/schedstat")
    return int(status.read_text().split()[1]) / 1e9 if status.exists() else None


def begin(device: str, threads: int | None) -> int:
    """Let torch use so many threads (none: one to a usable core), and keep the libraries' remarks off the screen.

    Raises:
        click.ClickException: this machine has no such device.
    """
    if (device == "cuda" and not torch.cuda.is_available()) or (device == "mps" and not torch.mps.is_available()):
        raise click.ClickException(f"this machine has no {device} device (or torch can't use it); try --device cpu")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads or usable_cores())
    return torch.get_num_threads()


def shown(items: Iterable[T], label: str) -> Iterable[T]:
    """The items, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    return track(list(items), label, console=console, transient=True, disable=not console.is_terminal)


def output() -> Console:
    """Standard output; wide enough for a table where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on; no name of a host, a user or a folder."""
    cores, processor = usable_cores(), _processor()
    name = f"cpu {processor} {cores}cores" if device == "cpu" else _accelerator(device)
    facts: dict[str, Any] = {
        "slug": re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-"),
        "device": device,
        "processor": processor,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "mvmr": __version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device == "cpu":
        facts["bf16_in_hardware"] = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        }
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _accelerator(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else f"{device} {_processor()}"


def save(name: str, result: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Write ``folder``/<machine>-<name>.json, dataclasses as mappings, and say so."""
    path = folder / f"{result['machine']['slug']}-{name}.json"
    write_json(path, {"benchmark": name, **_plain(result)})
    if (waited := result["core_wait"] or 0) > _BUSY:
        console.print(f"This machine was busy: {waited:.0%} of the time was spent waiting for a core. Measure again.")
    console.print(f"written: {path}", soft_wrap=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Spread | Memory):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
