"""What tests of whole runs share: a tiny recipe, a teacher that counts, and what a run leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mvmr.bundles.bundle import Bundle
from mvmr.training.recipe import Recipe, load_recipe

IMAGES = 20  # two steps to an epoch


TINY = (
    "student.backbone=resnet18_025", "method.projector=[16,16]", "views.size=16",
    "method.representations={pixels=1.0,augmented_pixels=1.0}",
    "train.epochs=2", "train.batch_size=8", "train.lr=1e-3", "train.warmup_steps=2", "train.workers=0",
    "train.precision=32-true", "train.log_steps=1", "train.checkpoint_steps=3",
)  # fmt: skip
WEIGHTS = ("encoder.safetensors", "projector.safetensors")


def recipe(*assign: str) -> Recipe:
    return load_recipe("paper", "mvmr", [*TINY, *assign])


def weights(bundle: Bundle) -> list[bytes]:
    return [(bundle.path / name).read_bytes() for name in WEIGHTS]


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Brightness:
    """A teacher of two numbers per image that counts how many images it was shown."""

    name, weights, identity = "brightness", "none", "b" * 64

    def __init__(self) -> None:
        self.seen = 0

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1)

    def __call__(self, batch: Tensor) -> Tensor:
        self.seen += len(batch)
        return torch.stack([batch.mean((1, 2, 3)), batch.std((1, 2, 3))], dim=1)


def interrupt(monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int, error: BaseException) -> None:
    """Make the n-th call of ``place.name`` end in ``error``."""
    real, calls = getattr(target, name), 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, function)
