"""The script that measures on a GPU says in one line what it lacks, and brings what the package needs."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


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
