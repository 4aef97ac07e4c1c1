"""What is measured on a GPU, on a machine without: options, parts that fail, the table; how fast is not tested."""

import asyncio
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks find each other as scripts do: beside themselves."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def gpu_run() -> ModuleType:
    return importlib.import_module("gpu_run")


# The door


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with the script, and a Python that has torch and no GPU."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS / "gpu.sh", tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$3" = cpu ] || exit 3\n')
    python.chmod(0o755)
    return tmp_path


def bring_wheels(machine: Path, *names: str) -> None:
    folder = machine / "build" / "gpu" / "wheels"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def refusal(machine: Path, *options: str) -> str:
    """The one line of a script that would not start."""
    script = ["bash", str(machine / "benchmarks" / "gpu.sh"), *options]
    done = subprocess.run(
        script, capture_output=True, text=True, env={"PYTHON": str(machine / "python"), "PATH": "/bin:/usr/bin"}
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--fast",), "unknown option --fast; there are --device cpu|cuda, --quick and --out FOLDER"),
        (("--quick", "cpu"), "unknown option cpu"),
        (("--device", "mps"), "--device takes cpu or cuda, not 'mps'"),
        (("--device",), "--device takes cpu or cuda, not ''"),
        (("--out",), "--out takes a folder"),
    ],
)
def test_an_option_that_is_none_is_refused_in_one_line(machine: Path, options: tuple[str, ...], says: str) -> None:
    bring_wheels(machine, "mvmr-0-py3-none-any.whl")
    assert says in refusal(machine, *options)


def test_without_wheels_it_says_how_to_get_them(machine: Path) -> None:
    assert "run 'make gpu-wheels' where there is a network" in refusal(machine)
    bring_wheels(machine, "numpy-2-py3-none-any.whl")
    assert "there are no wheels in build/gpu/wheels" in refusal(machine, "--device", "cpu", "--quick")


def test_without_a_gpu_it_says_how_to_rehearse(machine: Path) -> None:
    bring_wheels(machine, "mvmr-0-py3-none-any.whl")
    assert "torch finds no GPU here; to rehearse without one: --device cpu --quick" in refusal(machine)


def test_without_torch_it_asks_for_another_python(machine: Path) -> None:
    bring_wheels(machine, "mvmr-0-py3-none-any.whl")
    (machine / "python").write_text("#!/bin/sh\nexit 1\n")
    assert "can't import torch" in refusal(machine, "--device", "cpu", "--quick")


def test_of_two_wheels_of_mvmr_none_is_guessed(machine: Path) -> None:
    bring_wheels(machine, "mvmr-0-py3-none-any.whl", "mvmr-1-py3-none-any.whl")
    assert "several wheels of mvmr" in refusal(machine)


def test_what_travels_has_the_bounds_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {
        re.split(r"[<>=;]", line)[0].lower(): line
        for line in (*project["dependencies"], *extras["train"], *extras["dev"])
    }
    lines = [line for line in (BENCHMARKS / "gpu.txt").read_text().splitlines() if not line.startswith("#")]
    bounded = [line for line in lines if ">=" in line]
    assert len(bounded) > 12
    for line in bounded:
        assert line == known[line.split(">=")[0].lower()]


# The parts


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


# What the parts are made of


def test_jpegs_are_all_different_and_decode(tmp_path: Path) -> None:
    files = importlib.import_module("jpegs").write_jpegs(tmp_path, 5)
    assert len({file.read_bytes() for file in files}) == 5
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
            assert np.asarray(image).std() > 20


def test_a_clock_measures_the_steps_after_the_first_and_ends_the_run() -> None:
    distil_speed = importlib.import_module("distil_speed")
    clock = distil_speed.Clock("cpu", warmup=1, ends_at=0.0)
    asked, before = [], signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        assert list(clock.read(iter(range(6)))) == list(range(6))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGTERM]  # once, as a user would, and not before a step was measured
    clock = distil_speed.Clock(
        "cpu", warmup=1, ends_at=0.0, asked=[0.0, 10.0, 12.0, 14.0], came=[9.0, 10.5, 12.5, 14.5]
    )
    assert clock.figures(batch=8) == {
        "steps": 2, "images_per_s": 4.0, "step_ms": 2000.0, "input_share": 0.25, "loop_input_share": 0.25,
    }  # fmt: skip


@pytest.mark.slow
def test_distil_speed_distils_from_files_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    distil_speed = importlib.import_module("distil_speed")
    tiny = {"teacher": "ViT-S-32", "student": "resnet18", "size": 32, "batch": 4, "images": 8}
    found = distil_speed.run(distil_speed.Sizes(**tiny, seconds=1.0, warmup=1), "cpu", tmp_path)
    assert found["steps"] >= 1
    assert found["images_per_s"] > 0
    assert found["teacher_images_per_s"] > 0
    assert 0 <= found["input_share"] <= 1
    assert found["jpeg_bytes"] > 10_000
    assert str(tmp_path) not in json.dumps(found)
    assert (tmp_path / "student.partial" / "checkpoint.pt").exists()


@pytest.fixture
def bodies(tmp_path: Path) -> list[bytes]:
    files = importlib.import_module("jpegs").write_jpegs(tmp_path / "bodies", 6)
    return [file.read_bytes() for file in files]


def test_a_soak_counts_answers_refusals_and_what_is_wrong(bodies: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    soak = importlib.import_module("soak")
    monkeypatch.setattr(soak, "_WARM_UP", 0.0)
    monkeypatch.setattr(soak, "_CHECKED", 1)
    sizes = soak.Sizes(backbone="resnet18", size=32, at_once=4, queue=4, seconds=1.2)

    def right(images: Any) -> Any:
        return images[:, ::8, ::8].reshape(len(images), -1).astype(np.float32)

    def mixed_up(images: Any) -> Any:
        return right(images)[::-1]

    for engine, good in ((right, True), (mixed_up, False)):
        count = asyncio.run(soak.soak(engine, Preprocess.for_size(32), bodies, sizes, "cpu"))
        found = soak.figures(count, sizes.seconds, "cpu")
        assert found["checked"] == len(count.answered) > 0
        assert (found["wrong"] == 0) is good
        assert found["refused"] > 0
        assert found["images_per_s"] > 0
        assert found["resident_mib"]["end"] > 0
        assert "device_mib" not in found


def test_a_student_in_torch_embeds_as_the_library_does(tmp_path: Path, bodies: list[bytes]) -> None:
    students = importlib.import_module("students")
    images = open_images(str(tmp_path / "bodies"), "unlabelled")
    path = students.random_bundle(tmp_path, images, backbone="resnet18", size=32)
    bundle = bundles.load(path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    wanted = bundle.student()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(students.torch_engine(bundle, "cpu")(pixels), wanted, rtol=1e-3, atol=1e-3)
    halves = students.torch_engine(bundle, "cpu", dtype=torch.bfloat16, channels_last=True)(pixels)
    assert np.linalg.norm(halves - wanted) < 0.2 * np.linalg.norm(wanted)
    assert bundle.student().encoder.conv1.weight.dtype == torch.float32


def test_the_rate_of_matrix_products_is_measured() -> None:
    assert importlib.import_module("measure").matrix_tflops("cpu", torch.float32) > 0
