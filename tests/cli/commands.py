"""What tests of the commands share: a small recipe, photographs, and how a command is run and refuses."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from mvmr.cli.main import main

RECIPE = """
[student]
backbone = "resnet18_025"
[views]
size = 16
[method]
projector = [16, 16]
representations = { pixels = 1.0, augmented_pixels = 1.0 }
[train]
epochs = 4
batch_size = 8
warmup_steps = 2
workers = 0
precision = "32-true"
log_steps = 1
checkpoint_steps = 5
"""
STEPS = 16
BROKEN = ("--max-unreadable", "0.1")
COLOURS = {"blue": (50, 60, 210), "green": (40, 200, 60), "red": (220, 40, 40)}
# what may stand on standard error beside an error: the plan, and progress
BESIDES = ("data ", "recipe ", "out ", "teacher ", "weights ", "checking images ", "training ")


def a_photo(colour: str, random: np.random.Generator, size: tuple[int, int] = (26, 20)) -> Image.Image:
    pixels = np.array(COLOURS[colour]) + random.integers(-35, 35, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def arguments(photos: Path, recipe: Path, out: Path, *more: str) -> list[str]:
    options = ["--data", photos, "--recipe", recipe, "--out", out, "--device", "cpu", "--max-unreadable", "0.2"]
    return [*map(str, options), *more]


def mvmr(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, [str(part) for part in argv])


def refusal(result: Result) -> str:
    """The one line about what is wrong; besides there are the plan and progress, and standard output is empty."""
    assert result.exit_code == 1, result.stderr
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(BESIDES) and " images, " not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def steps(folder: Path) -> list[int]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]
