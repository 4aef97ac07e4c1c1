"""Every measurement that wants a GPU, one after the other within eight minutes, and one table; started by gpu.sh.

A part that fails, or takes longer than its limit, is named in the table and stops no other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import measure
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parents[1]
WHOLE = 480.0  # seconds, with the installation, for which gpu.sh has a limit of its own
INSTALLATION = 45.0
_TABLE = 5.0  # seconds for this script itself
_PATIENCE = 3.0  # with a rehearsal, on a processor that may have other work
_TAIL = 12  # lines of what a part has printed that are shown where it did not end well
_GRACE = 3.0  # seconds between asking a part to end and ending it
LOG = "log.txt"
OK, FAILED, LATE = "ok", "failed", "out of time"

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One measurement.

    command: what Python is to run; {out} stands for the part's own folder
    limit: seconds that it may take for certain
    result: what it leaves in its folder; figures: what the table says of that, a line each
    """

    name: str
    command: tuple[str, ...]
    limit: float
    result: str
    figures: Callable[[Result], list[str]]


def parts(device: str, quick: bool) -> list[Part]:
    """All of them. Their limits fill the time that they have together: what one leaves, the others may take."""
    patience = _PATIENCE if quick else 1.0
    ways = ("--device", device, "--quick") if quick else ("--device", device)

    def script(name: str, limit: float, figures: Callable[[Result], list[str]], *options: str) -> Part:
        command = (str(ROOT / "benchmarks" / f"{name}.py"), *ways, "--out", "{out}", *options)
        return Part(name=name, command=command, limit=patience * limit, result="*.json", figures=figures)

    # a thread that waits for one that other work keeps off its core is what a rehearsal would else measure
    step = (
        ("--threads", "1", "--rounds", "1", "--size", "32", "--batch", "4")
        if quick
        else ("--rounds", "3", "--steps", "3")
    )
    grid = ("--threads", "1", "--batch", "64", "--width", "512") if quick else ("--batch", "256", "--batch", "1024")
    widths = () if quick else ("--width", "512", "--width", "2048", "--width", "8192")
    compiled = () if quick else ("--compiled", "--batch", "64")
    return [
        script("objective", 22, _of_objective, "--rounds", "2" if quick else "5", *grid, *widths),
        script("train_step", 100, _of_train_step, *step),
        script("export_speed", 70, _of_export, *compiled),
        script("distil_speed", 135, _of_distil),
        script("soak", 78, _of_soak),
        # last: how long their imports take differs most, and what the others leave is theirs
        Part(name="tests", command=_tests(), limit=patience * 25, result="junit.xml", figures=_of_tests),
    ]


def _tests() -> tuple[str, ...]:
    """The tests marked gpu, without collecting all others, which need more packages than a bare machine has.

    The versions there are not those that our tests are pinned to, so what these deprecate is no failure.
    """
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    settings = ("-c", str(ROOT / "pyproject.toml"), "-o", "addopts=--import-mode=importlib --strict-markers")
    more = ("--continue-on-collection-errors", "-W", "default", "-p", "no:cacheprovider")
    return ("-m", "pytest", "-q", "-m", "gpu", *settings, *more, "--junitxml", "{out}/junit.xml", *map(str, files))


def run(every: Sequence[Part], folder: Path, within: float, say: Callable[[str], None]) -> dict[str, Result]:
    """Run the parts in turn, each in a process and a folder of its own: in this one, `mvmr` is not the installed one.

    Returns: name -> ``outcome``, ``seconds``, ``why`` (None where all is well), ``result`` (what it wrote, or None).
    """
    began, found = time.perf_counter(), {}
    for number, part in enumerate(every):
        kept = sum(later.limit for later in every[number + 1 :])
        found[part.name] = one = _run(part, folder / part.name, within - kept - (time.perf_counter() - began))
        say(f"{part.name:<14} {one['seconds']:>5.0f} s  {one['outcome']}{': ' + one['why'] if one['why'] else ''}")
        if one["outcome"] != OK and (tail := _tail(folder / part.name)):
            say(tail)
    return found


def _run(part: Part, folder: Path, limit: float) -> Result:
    folder.mkdir(parents=True)
    log, began = folder / LOG, time.perf_counter()
    command = [sys.executable, *(word.replace("{out}", str(folder)) for word in part.command)]
    environment = os.environ | {"MVMR_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=folder, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(0.0, limit))
            outcome, why = (OK, "") if code == 0 else (FAILED, _last_line(folder) or f"exit code {code}, and no word")
        except subprocess.TimeoutExpired:
            outcome, why = LATE, f"stopped after {limit:.0f} s"
        finally:
            _end(process)
    result, unread = _read(folder, part.result)
    if outcome == OK and result is None:
        outcome, why = FAILED, unread
    return {
        "outcome": outcome,
        "seconds": round(time.perf_counter() - began, 1),
        "why": why or None,
        "result": result,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part, the processes that it has started too."""
    for number, seconds in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _last_line(folder: Path) -> str:
    """The last line that a part has printed; where on this machine it ran is nobody's business."""
    lines = [line.strip() for line in _log(folder) if line.strip()]
    return lines[-1].replace(f"{folder}{os.sep}", "")[:300] if lines else ""


def _tail(folder: Path) -> str:
    return "\n".join(f"    {line}" for line in _log(folder)[-_TAIL:])


def _log(folder: Path) -> list[str]:
    return (folder / LOG).read_text(errors="replace").splitlines()


def _read(folder: Path, pattern: str) -> tuple[Result | None, str]:
    """What a part has written, or why that can't be read."""
    file = next(folder.glob(pattern), None)
    if file is None:
        return None, f"it ended well, but left no {pattern}"
    try:
        return (_junit(file) if file.suffix == ".xml" else json.loads(file.read_text())), ""
    except (ValueError, ElementTree.ParseError) as error:
        return None, f"what it left can't be read: {error}"


def _junit(file: Path) -> Result:
    """Outcome and, where it didn't pass, the reason of each test."""
    tests = []
    for case in ElementTree.parse(file).iter("testcase"):
        marks = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = marks[0].tag if marks else "passed"
        said = f"{marks[0].get('message') or ''}\n{marks[0].text or ''}" if marks else ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        # what a file that can't be collected says first is only that; the error itself stands at the end
        why = (lines[-1].removeprefix("E ").strip() if outcome == "error" else lines[0])[:200] if lines else None
        tests.append({"name": case.get("name") or case.get("classname"), "outcome": outcome, "why": why})
    return {"tests": tests}


def _of_tests(result: Result) -> list[str]:
    count = Counter(test["outcome"] for test in result["tests"])
    lines = [", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items())) or "no test"]
    return lines + [f"{test['name']}: {test['why']}" for test in result["tests"] if test["why"]]


def _of_train_step(result: Result) -> list[str]:
    whole = result["trainer"]
    case = next(case for case in result["cases"] if case["name"] == whole["case"])
    rate, faster = case["images_per_s"]["median"], case["speed_against_plain"]["median"]
    share, matrix = whole["share_of_matrix_rate"]["median"], whole["matrix_tflops_bf16"]
    return [
        "{student}, {size} px, batch {batch}; {case}".format(**result["settings"], case=whole["case"]),
        f"{rate:,.0f} images/s, {faster:.2f} times the plain way",
        f"{whole['tflops']['median']:.3g} TFLOP/s: {share:.0%} of a bf16 matrix product's {matrix:.3g}",
        f"objective alone: {whole['objective_ms']['median']:.3g} ms, {whole['objective_share']:.1%} of the step",
    ]


def _of_objective(result: Result) -> list[str]:
    lines = []
    for cell in result["cells"]:
        time_ms, ratios = cell["losses"]["unbiased"]["milliseconds"]["median"], cell["time_ratios"]
        of = f"unbiased / biased {ratios['unbiased / biased']['median']:.2f}, biased / cdist"
        lines.append(
            f"{cell['batch']} x {cell['width']}: {time_ms:.3g} ms, {of} {ratios['biased / cdist']['median']:.2f}"
        )
    return lines


def _of_export(result: Result) -> list[str]:
    rows = [
        f"{row['engine']}, batch {row['batch']}: {row['images_per_s']['median']:,.0f} images/s, "
        f"{row['times_faster']['median']:.2f} times torch eager"
        for row in result["rows"]
    ]
    return rows + [f"{name}: not measured, {why}" for name, why in result["not_measured"].items()]


def _of_distil(result: Result) -> list[str]:
    return [
        "{teacher} into {student}, {size} px, batch {batch}, from JPEG files".format(**result["settings"]),
        f"teacher {result['teacher_images_per_s']:,.0f} images/s",
        f"student {result['images_per_s']:,.0f} images/s over {result['steps']} steps",
        f"{result['input_share']:.1%} of the time waiting for input ({result['decoding_processes']} processes decode)",
    ]


def _of_soak(result: Result) -> list[str]:
    grown = [
        f"{name} memory {result[key]['early']:,} to {result[key]['end']:,} MiB"
        for key, name in (("resident_mib", "process"), ("device_mib", "GPU"))
        if key in result
    ]
    return [
        f"{result['engine']}: {result['images_per_s']:,.0f} images/s, at the end {result['last_against_first']:.2f} "
        "of the beginning",
        f"p50 {result['latency_ms']['p50']:.0f} ms, p99 {result['latency_ms']['p99']:.0f} ms, "
        f"{result['wrong']} of {result['checked']} answers wrong",
        ", ".join(grown),
    ]


def show(summary: Mapping[str, Any], figures: Mapping[str, Callable[[Result], list[str]]], console: Console) -> None:
    """The table of all parts; figures: by the name of the part."""
    settings, found = summary["settings"], summary["parts"]
    table = Table(
        "part", "outcome", "seconds", "figures", show_lines=True, title_justify="left",
        title=f"{summary['machine']['slug']}{', small sizes: no figures of this machine' if settings['quick'] else ''}",
    )  # fmt: skip
    for name, one in found.items():
        lines = [one["why"]] if one["why"] else []
        if one["result"] is not None:
            try:
                lines += figures[name](one["result"])
            except (KeyError, TypeError, StopIteration) as error:  # of a part that was stopped halfway
                lines.append(f"its result lacks something: {error!r}")
        table.add_row(name, one["outcome"], f"{one['seconds']:.0f}", Text("\n".join(lines)))
    console.print(table)
    if bad := [name for name, one in found.items() if one["outcome"] != OK]:
        console.print(f"{len(bad)} of {len(found)} parts did not end well: {', '.join(bad)}")


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, to rehearse it on a processor.")
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(device: str, quick: bool, out: Path) -> None:
    """Run every part, print one table and write one JSON; exit code 1 where a part did not end well."""
    measure.begin(device, None)
    every, began = parts(device, quick), time.perf_counter()
    console = measure.output()
    folder = Path(tempfile.mkdtemp(prefix="mvmr-gpu-"))
    within = (WHOLE - INSTALLATION - _TABLE) * (_PATIENCE if quick else 1.0)
    found = run(every, folder, within, print)
    # the other parts keep all cores busy themselves
    results = [found[name]["result"] or {} for name in ("objective", "train_step") if name in found]
    summary: Result = {
        "machine": measure.machine(device),
        "settings": {"quick": quick},
        "seconds": round(time.perf_counter() - began, 1),
        "core_wait": max((result.get("core_wait") or 0 for result in results), default=0),
        "parts": found,
    }
    show(summary, {part.name: part.figures for part in every}, console)
    measure.save("gpu", summary, out, console)
    if any(one["outcome"] != OK for one in found.values()):
        console.print(f"all that the parts printed: {folder}/*/{LOG}", soft_wrap=True)
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
