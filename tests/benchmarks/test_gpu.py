"""What is measured on a GPU, on a machine without: parts that fail, the table; how fast is not tested."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks find each other as scripts do: beside themselves."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def gpu_run() -> ModuleType:
    return importlib.import_module("gpu_run")


def part(gpu_run: ModuleType, name: str, code: str, limit: float = 20.0) -> Any:
    """A part that runs a few lines, with its folder in sys.argv[1]."""

    def figures(result: dict[str, Any]) -> list[str]:
        return [f"read {result['value']}"]

    return gpu_run.Part(name=name, command=("-c", code, "{out}"), limit=limit, result="*.json", figures=figures)


WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1], 'r.json').write_text('{\"value\": 7, \"core_wait\": 0.01}')"
# leaves a process behind that would write later, as a loader's workers are left by a run that is ended
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1], "child.txt").write_text(str(child.pid))
time.sleep(60)
"""


def fakes(gpu_run: ModuleType) -> list[Any]:
    return [
        part(gpu_run, "breaks", "raise ValueError('nothing to measure')"),
        part(gpu_run, "hangs", HANGS, limit=2.0),
        part(gpu_run, "dies", "import os; os.kill(os.getpid(), 9)"),
        part(gpu_run, "leaves nothing", "print('all well')"),
        part(gpu_run, "leaves rubbish", "import pathlib, sys; pathlib.Path(sys.argv[1], 'r.json').write_text('{')"),
        part(gpu_run, "train_step", WRITES),
    ]


@pytest.mark.slow
def test_a_failing_part_is_named_and_stops_no_other(
    gpu_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "parts", lambda device, quick: fakes(gpu_run))
    monkeypatch.setattr(gpu_run, "WHOLE", gpu_run.INSTALLATION + gpu_run._TABLE + 86.0)  # all limits and some
    done = CliRunner().invoke(gpu_run.main, ["--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "5 of 6 parts did not end well: breaks, hangs, dies, leaves nothing, leaves rubbish" in done.output
    (file,) = tmp_path.glob("cpu-*-gpu.json")
    assert str(file) in done.output
    summary = json.loads(file.read_text())
    assert summary["benchmark"] == "gpu"
    assert summary["settings"] == {"quick": False}
    assert summary["core_wait"] == 0.01
    assert {name: (one["outcome"], one["why"]) for name, one in summary["parts"].items()} == {
        "breaks": ("failed", "ValueError: nothing to measure"),
        "hangs": ("out of time", summary["parts"]["hangs"]["why"]),
        "dies": ("failed", "exit code -9, and no word"),
        "leaves nothing": ("failed", "it ended well, but left no *.json"),
        "leaves rubbish": ("failed", summary["parts"]["leaves rubbish"]["why"]),
        "train_step": ("ok", None),
    }
    assert summary["parts"]["train_step"]["result"] == {"value": 7, "core_wait": 0.01}
    assert "read 7" in done.output
    logs = Path(re.search(r"printed: (\S+)/\*/log.txt", done.output)[1])  # type: ignore[index]
    child = int((logs / "hangs" / "child.txt").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    shutil.rmtree(logs)


def test_when_all_is_well_the_exit_code_is_0(
    gpu_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "parts", lambda device, quick: [part(gpu_run, "train_step", WRITES)])
    done = CliRunner().invoke(gpu_run.main, ["--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "did not end well" not in done.output


@pytest.mark.slow
def test_a_part_may_take_what_those_before_it_left_and_no_more(gpu_run: ModuleType, tmp_path: Path) -> None:
    sleeps = "import time; time.sleep(1.5)\n" + WRITES
    every = [
        part(gpu_run, "quick", WRITES, 3.0),
        part(gpu_run, "slow", sleeps, 0.1),
        part(gpu_run, "slower", HANGS, 0.1),
    ]
    began = time.perf_counter()
    found = gpu_run.run(every, tmp_path, 5.0, lambda line: None)
    assert [one["outcome"] for one in found.values()] == ["ok", "ok", "out of time"]
    assert time.perf_counter() - began < 5.0 + 2 * gpu_run._GRACE


def test_the_whole_stays_within_eight_minutes(gpu_run: ModuleType) -> None:
    every = gpu_run.parts("cuda", False)
    assert [one.name for one in every] == ["objective", "train_step", "export_speed", "distil_speed", "soak", "tests"]
    assert sum(one.limit for one in every) == gpu_run.WHOLE - gpu_run.INSTALLATION - gpu_run._TABLE
    assert gpu_run.WHOLE == 8 * 60
    (limit,) = set(re.findall(r"timeout (\d+)", (BENCHMARKS / "gpu.sh").read_text()))
    assert 2 * int(limit) < gpu_run.INSTALLATION


def test_only_files_with_tests_for_a_gpu_are_collected(gpu_run: ModuleType) -> None:
    files = {Path(word).name for word in gpu_run.parts("cuda", False)[-1].command if word.endswith(".py")}
    assert {"test_student.py", "test_session.py", "test_tensorrt.py"} <= files
    assert "test_config.py" not in files


@pytest.mark.slow
def test_what_pytest_said_of_each_test_is_kept(gpu_run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 1 == 2\n\n"
        "@pytest.mark.skip(reason='no such device')\ndef test_not_here(): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import no_such_package\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    more = ["--continue-on-collection-errors", "--junitxml", str(tmp_path / "junit.xml"), "-p", "no:cacheprovider"]
    subprocess.run([*command, *more, str(tmp_path)], capture_output=True)
    result = gpu_run._junit(tmp_path / "junit.xml")
    assert {test["name"].rpartition(".")[2]: (test["outcome"], test["why"]) for test in result["tests"]} == {
        "test_good": ("passed", None),
        "test_bad": ("failure", "assert 1 == 2"),
        "test_not_here": ("skipped", "no such device"),
        "test_b": ("error", "ModuleNotFoundError: No module named 'no_such_package'"),
    }
    lines = gpu_run._of_tests(result)
    assert lines[0] == "1 error, 1 failure, 1 passed, 1 skipped"
    assert "test_not_here: no such device" in lines


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "q25": value, "q75": value, "rounds": [value]}


RESULTS: dict[str, Any] = {
    "tests": {"tests": [{"name": "test_one", "outcome": "passed", "why": None}]},
    "objective": {
        "cells": [
            {
                "batch": 256,
                "width": 2048,
                "losses": {"unbiased": {"milliseconds": spread(0.5)}},
                "time_ratios": {"unbiased / biased": spread(1.01), "biased / cdist": spread(0.4)},
            }
        ]
    },
    "train_step": {
        "settings": {"student": "resnet50", "size": 224, "batch": 256},
        "cases": [{"name": "fast", "images_per_s": spread(1300), "speed_against_plain": spread(4.2)}],
        "trainer": {
            "case": "fast",
            "tflops": spread(64),
            "matrix_tflops_bf16": 640,
            "share_of_matrix_rate": spread(0.1),
            "objective_ms": spread(2.5),
            "objective_share": 0.0125,
        },
    },
    "export_speed": {
        "rows": [{"engine": "torch fp16", "batch": 64, "images_per_s": spread(5000), "times_faster": spread(3.5)}],
        "not_measured": {"onnxruntime": "it has no cuda here"},
    },
    "distil_speed": {
        "settings": {"teacher": "ViT-B-16", "student": "resnet50", "size": 224, "batch": 256},
        "teacher_images_per_s": 1500,
        "images_per_s": 1200,
        "steps": 400,
        "input_share": 0.123,
        "decoding_processes": 16,
    },
    "soak": {
        "engine": "torch float16",
        "images_per_s": 3000,
        "last_against_first": 0.99,
        "latency_ms": {"p50": 80, "p99": 120, "p100": 200},
        "wrong": 0,
        "checked": 900,
        "resident_mib": {"early": 2000, "end": 2010, "most": 2011},
        "device_mib": {"early": 1500, "end": 1500, "most": 1500},
    },
}


def test_the_table_says_what_the_parts_found(gpu_run: ModuleType, tmp_path: Path) -> None:
    found = {
        name: {"outcome": "ok", "seconds": 12.3, "why": None, "result": result} for name, result in RESULTS.items()
    }
    found["soak"] |= {"outcome": "failed", "why": "Error: 3 of 900 [all] answers were wrong"}
    found["objective"] |= {"outcome": "out of time", "why": "stopped after 22 s", "result": None}
    del found["export_speed"]["result"]["rows"][0]["times_faster"]
    summary = json.loads(json.dumps({"machine": {"slug": "nvidia-x"}, "settings": {"quick": False}, "parts": found}))
    with (tmp_path / "table.txt").open("w") as file:
        figures = {one.name: one.figures for one in gpu_run.parts("cuda", False)}
        gpu_run.show(summary, figures, Console(file=file, width=200))
    table = (tmp_path / "table.txt").read_text()
    for line in (
        "1 passed",
        "stopped after 22 s",
        "resnet50, 224 px, batch 256; fast",
        "1,300 images/s, 4.20 times the plain way",
        "64 TFLOP/s: 10% of a bf16 matrix product's 640",
        "objective alone: 2.5 ms, 1.2% of the step",
        "its result lacks something: KeyError('times_faster')",
        "teacher 1,500 images/s",
        "student 1,200 images/s over 400 steps",
        "12.3% of the time waiting for input (16 processes decode)",
        "Error: 3 of 900 [all] answers were wrong",
        "torch float16: 3,000 images/s, at the end 0.99 of the beginning",
        "process memory 2,000 to 2,010 MiB, GPU memory 1,500 to 1,500 MiB",
        "2 of 6 parts did not end well: objective, soak",
    ):
        assert line in table
