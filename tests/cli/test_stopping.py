"""Commands in real processes, stopped by real signals, go on and end like undisturbed ones."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from mvmr.bundles import bundle as bundles
from tests.cli.commands import BESIDES, STEPS, arguments, mvmr, refusal, steps

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


_FORKED = """
import multiprocessing, os, torch
multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as ever
os.setpgrp()
os.environ["MVMR_CACHE"] = cache
for descriptor, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
os.fsync = lambda descriptor: None
torch.set_num_threads(1)
from mvmr.cli.main import main
main(argv)
"""


@pytest.fixture
def start(tmp_path: Path, cache: Path) -> Callable[..., Any]:
    """Run `mvmr` in a process and a process group of its own; torch is imported by their common parent."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvmr.training.pretraining", "mvmr.cli.commands"])

    def begin(*argv: str) -> Any:
        variables = {"argv": list(argv), "folder": str(tmp_path), "cache": str(cache)}
        process = context.Process(target=exec, args=(_FORKED, variables))
        process.start()
        return process

    return begin


def wait_for(folder: Path, step: int, alive: Callable[[], bool]) -> None:
    while step not in steps(folder):
        assert alive(), "the run ended too soon"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group", "workers", "code"),
    [
        pytest.param(signal.SIGINT, False, "0", 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, "2", 130, marks=pytest.mark.slow),  # as a scheduler does it
        (signal.SIGKILL, False, "2", -signal.SIGKILL),
    ],
)  # fmt: skip
def test_a_stopped_run_is_kept_and_ends_like_an_undisturbed_one(
    start: Callable[..., Any], finished_run: tuple[Path, Result], photos: Path, recipe: Path, tmp_path: Path,
    number: signal.Signals, group: bool, workers: str, code: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    options = arguments(photos, recipe, out, "--workers", workers)
    process = start("pretrain", *options)
    wait_for(tmp_path / "out.partial", 6, process.is_alive)
    (os.killpg if group else os.kill)(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    errors = (tmp_path / "stderr").read_text()
    assert "Traceback" not in errors or code == -signal.SIGKILL  # workers may complain that their parent is gone
    assert (f"is saved in {out}.partial; go on with --resume" in errors) == (code == 130)
    assert not out.exists()

    assert f"{out}.partial holds an interrupted run: give --resume" in refusal(mvmr("pretrain", *options))
    assert "differs in recipe.train.seed (0 there, 7 now)" in refusal(
        mvmr("pretrain", *options, "--resume", "--seed", "7")
    )
    resumed = mvmr("pretrain", *arguments(photos, recipe, out, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    assert steps(out) == list(range(1, STEPS + 1))
    for name in ("encoder.safetensors", "projector.safetensors"):
        assert (out / name).read_bytes() == (finished_run[0] / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(photos: Path, recipe: Path, tmp_path: Path, cache: Path) -> None:
    """Nothing forked or replaced: the command as a shell starts it, its whole group signalled as a terminal does."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "mvmr", "pretrain", *arguments(photos, recipe, out, "--workers", "2", "--epochs", "40")],
        env={**os.environ, "MVMR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(tmp_path / "out.partial", 3, lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output == ""
    saved = steps(tmp_path / "out.partial")[-1]
    assert errors.splitlines()[-1].startswith(f"stopped: step {saved} of ")
    assert not [line for line in errors.splitlines()[:-1] if not line.startswith(BESIDES) and " images, " not in line]
    state = torch.load(tmp_path / "out.partial" / "checkpoint.pt", weights_only=True)
    assert state["step"] == steps(tmp_path / "out.partial")[-1]


@pytest.mark.slow
@pytest.mark.cluster
def test_two_devices_make_one_bundle(photos: Path, recipe: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mvmr", "pretrain", *arguments(photos, recipe, out, "--devices", "2")]
    environment = {**os.environ, "MVMR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=600)

    done = run("--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert steps(out) == [1, 2, 3, 4]
    assert bundles.load(out).manifest.training["steps"] == 4
    assert os.listdir(tmp_path) == ["out"]
    assert "multiple of the 2 devices" in run("--batch-size", "7", "--overwrite").stderr
