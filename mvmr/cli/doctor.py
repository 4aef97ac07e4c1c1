"""`mvmr doctor`: what this machine has, and what each command still lacks.

Looks only, installs and downloads nothing, and works where torch is missing or broken.
"""

import dataclasses
import json
import os
import platform
import shutil
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mvmr import __version__
from mvmr.cli.support import Support
from mvmr.cli.table import COMMANDS
from mvmr.cores import busy_cores, usable_cores
from mvmr.errors import EXTRAS
from mvmr.storage.atomic import cache_dir

# Import name -> distribution name, where they differ.
DISTRIBUTIONS = {
    "faiss": "faiss-cpu",
    "lightning_fabric": "lightning-fabric",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "open_clip": "open_clip_torch",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
    "umap": "umap-learn",
}

TEACHER_NOTE = (
    "Teacher weights are downloaded by open_clip when first used; the network is not tried here. "
    "Where it is closed, fetch the file elsewhere: mvmr distill --teacher NAME --pretrained FILE"
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The computer: cores this process may use, and how many of them others are busy on now; memory in bytes.

    memory, memory_available: that it may fill, None where that is not known
    """

    system: str
    python: str
    cores: int
    busy: float
    memory: int | None
    memory_available: int | None


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator; `memory` in bytes, None where it is shared with the processor."""

    name: str
    kind: str
    memory: int | None


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The cache folder, whether it can be written to, and the free bytes of the disk that holds it."""

    path: str
    exists: bool
    writable: bool
    free: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that `examine` found.

    A version is None where the package is missing, a command's entry what it lacks (None: ready),
    `onnxruntime` its providers, `tensorrt` that of data centres, `tensorrt_rtx` that of RTX cards, `problems` what is
    there and broken.
    """

    mvmr: str
    machine: Machine
    devices: tuple[Device, ...]
    extras: dict[str, dict[str, str | None]]
    onnxruntime: tuple[str, ...] | None
    tensorrt: Support
    tensorrt_rtx: Support
    cache: Cache
    commands: dict[str, str | None]
    problems: tuple[str, ...]


def examine() -> Report:
    """Look at this machine and return what was found; never raises for what is missing or broken."""
    tensorrt = import_module("mvmr.export.tensorrt.check")  # by name: export stands above the core
    problems: list[str] = []
    extras = {extra: {package: _version(package) for package in packages} for extra, packages in EXTRAS.items()}
    return Report(
        mvmr=__version__,
        machine=_machine(),
        devices=_devices(problems),
        extras=extras,
        onnxruntime=_onnx_providers(problems),
        tensorrt=tensorrt.data_centre(_version("tensorrt")),
        tensorrt_rtx=tensorrt.rtx(),
        cache=_cache(),
        commands={name: _lacks(entry.extra, extras) for name, entry in COMMANDS.items()},
        problems=tuple(problems),
    )


def _lacks(extra: str | None, extras: dict[str, dict[str, str | None]]) -> str | None:
    """Return what a command lacks and how to get it, None when it can run."""
    missing = [package for package, version in extras[extra].items() if version is None] if extra else []
    if not missing:
        return None
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"lacks {', '.join(missing[:3])}{more}: pip install 'mvmr[{extra}]'"


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _version(package: str) -> str | None:
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:  # another build under another name, such as a faiss with GPU support
        return "installed"


def _machine() -> Machine:
    total, available = _memory()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=usable_cores(),
        busy=round(busy_cores(), 1),
        memory=total,
        memory_available=available,
    )


def _memory() -> tuple[int | None, int | None]:
    """Return (total, available) bytes as Linux reports them, held to the container's limit if there is one."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        figures = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, available = figures["MemTotal"], figures["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        usage = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no limit reads "max"
        return total, available
    return min(total, limit), min(available, max(0, limit - usage))


def _devices(problems: list[str]) -> tuple[Device, ...]:
    if util.find_spec("torch") is None:
        return ()
    try:
        import torch

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
        problems.extend(f"CUDA: {warning.message}" for warning in caught)
        devices = [
            Device(name=gpu.name, kind=f"cuda, compute capability {gpu.major}.{gpu.minor}", memory=gpu.total_memory)
            for gpu in gpus
        ]
        if torch.backends.mps.is_available():
            devices.append(Device(name="Apple GPU", kind="mps", memory=None))
    except Exception as error:  # a half-installed torch fails in many ways, and reporting that is the task
        problems.append(f"torch is installed but does not work: {type(error).__name__}: {error}")
        return ()
    return tuple(devices)


def _onnx_providers(problems: list[str]) -> tuple[str, ...] | None:
    if all(_is_installed(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite one another's files: "
            "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"
        )
    if util.find_spec("onnxruntime") is None:
        return None
    try:
        return tuple(import_module("onnxruntime").get_available_providers())
    except Exception as error:  # as for torch
        problems.append(f"onnxruntime is installed but does not work: {type(error).__name__}: {error}")
        return None


def _cache() -> Cache:
    path = cache_dir()
    present = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return Cache(
        path=str(path),
        exists=path.is_dir(),
        writable=present.is_dir() and os.access(present, os.W_OK | os.X_OK),
        free=shutil.disk_usage(present).free,
    )


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _show(report: Report, console: Console) -> None:
    machine, cache = report.machine, report.cache
    facts = Table("machine", "", title=f"mvmr {report.mvmr}", title_justify="left")
    facts.add_row("system", f"{machine.system}, Python {machine.python}")
    facts.add_row("cores", f"{machine.cores}, {machine.busy:.1f} busy with other work")
    facts.add_row("memory", f"{_gigabytes(machine.memory)}, {_gigabytes(machine.memory_available)} available")
    for device in report.devices:
        facts.add_row(device.kind.partition(",")[0], f"{device.name} ({device.kind}), {_gigabytes(device.memory)}")
    if not report.devices:
        facts.add_row("accelerator", "none found; training runs on the processor")
    facts.add_row("onnxruntime", "not installed" if report.onnxruntime is None else ", ".join(report.onnxruntime))
    # Text, not a string: rich would read the brackets of `mvmr[rtx]` as markup.
    facts.add_row("TensorRT", Text(str(report.tensorrt)))
    facts.add_row("TensorRT for RTX", Text(str(report.tensorrt_rtx)))
    state = "" if cache.writable else ", NOT WRITABLE: set MVMR_CACHE to another folder"
    facts.add_row("cache", f"{cache.path}, {_gigabytes(cache.free)} free{state}")
    console.print(facts)

    packages = Table("extra", "package", "version")
    for extra, versions in report.extras.items():
        for package, version in versions.items():
            packages.add_row(extra, package, version or "[red]missing[/]")
    console.print(packages)

    commands = Table("command", "")
    for command, lacks in report.commands.items():
        # Text, not a string: rich would read the brackets of `mvmr[train]` as markup.
        commands.add_row(f"mvmr {command}", Text(lacks, style="red") if lacks else Text("ready", style="green"))
    console.print(commands)
    for problem in report.problems:
        console.print(f"problem: {problem}", markup=False, style="red")
    console.print(TEACHER_NOTE, markup=False)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON (sizes in bytes).")
def doctor(as_json: bool) -> None:
    """Show what this machine has, and what each command lacks."""
    report = examine()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _show(report, Console(file=sys.stdout))
