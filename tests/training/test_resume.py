"""Killed with kill -9 and gone on with, a run ends with the weights of an undisturbed one, whatever its method."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.data import open_images
from mvmr.methods.distillers.table import DISTILLERS
from mvmr.methods.table import METHODS
from mvmr.training.pretraining import fit
from mvmr.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

TINY = (
    "student.backbone=resnet18_025", "views.size=32", "views.policy=crop+flip", "train.epochs=3", "train.batch_size=8",
    "train.workers=0", "train.precision=32-true", "train.checkpoint_steps=2", "train.log_steps=1",
)  # fmt: skip
SETTINGS = {
    "byol": ("method.name=byol", "method.projector=[16,8]", "method.predictor=[16,8]"),
    "mvmr": ("method.projector=[16]", "method.representations={pixels=1.0}"),
    "simclr": ("method.name=simclr", "method.projector=[16,8]"),
    "moco": ("method.name=moco", "method.projector=[16,8]", "method.queue=12"),
    "simsiam": ("method.name=simsiam", "method.projector=[16,8]", "method.predictor=[4,8]"),
    "barlow": ("method.name=barlow", "method.projector=[16,8]"),
    "vicreg": ("method.name=vicreg", "method.projector=[16,8]"),
    "swav": (
        "method.name=swav",
        "method.projector=[16,8]",
        "method.prototypes=4",
        "method.queue=12",
        "method.local=1",
        "method.local_scale=0.5",
    ),
    "dino": (
        "method.name=dino",
        "method.head=[16,8]",
        "method.outputs=6",
        "method.local=1",
        "method.local_scale=0.5",
    ),
    "isd": ("method.name=isd", "method.projector=[16,8]", "method.predictor=[16,8]", "method.queue=12"),
    "twist": ("method.name=twist", "method.classes=5", "method.hidden=[16]", "method.local=0", "method.labelling=0.5"),
    "deepcluster": (
        "method.name=deepcluster",
        "method.projector=[16,8]",
        "method.clusters=3",
        "method.heads=2",
        "method.local=0",
    ),
    "deepercluster": (
        "method.name=deepercluster",
        "method.clusters=2",
        "method.subclusters=2",
        "method.every=2",
    ),
    "selflabel": ("method.name=selflabel", "method.classes=3", "method.heads=2"),
    "combination": (  # of all distillers, which share everything but the loss
        "method.name=combination",
        "method.teachers={hog=1.0,scattering=0.5}",
        "method.drop=0.5",
        f"method.losses={{{','.join(f'{name}=1.0' for name in DISTILLERS)}}}",
    ),
    "lejepa": ("method.name=lejepa", "method.projector=[16,8]", "method.slices=8", "method.local=0"),
}
RUNS = {name: (*TINY, *settings) for name, settings in SETTINGS.items()} | {
    "a transformer that sees smaller views": (
        *TINY, *SETTINGS["dino"], "student.backbone=timm:vit_tiny_patch16_224",
    ),
    "a depthwise network": (
        *TINY, "student.backbone=timm:mobilenetv3_small_100", "method.projector=[16]",
        "method.representations={pixels=1.0}",
    ),
}  # fmt: skip
KILLED = """
import json, os, signal, sys
import torch
from mvmr.data import open_images
from mvmr.training import trainer
from mvmr.training.pretraining import fit
from mvmr.training.recipe import load_recipe
torch.set_num_threads(1)
data, folder, runs = sys.argv[1:]
real = trainer.learning_rate
def dying(config, step, steps):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(config, step, steps)
trainer.learning_rate = dying
for name, assign in json.loads(runs).items():
    child = os.fork()  # a process to a run, which begins with torch imported
    if child == 0:
        images, recipe = open_images(data, "unlabelled"), load_recipe("default", "mvmr", assign)
        fit(images, f"{folder}/{name}", recipe, device="cpu")
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(16):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return str(folder)


@pytest.fixture(scope="module")
def killed(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, each killed in its sixth step."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, photos, str(folder), json.dumps(RUNS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines() == [f"{name} {-signal.SIGKILL}" for name in RUNS]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_it_goes_on_to_the_weights_of_an_undisturbed_run(
    photos: str, killed: Path, tmp_path: Path, name: str
) -> None:
    recipe, images = load_recipe("default", "mvmr", RUNS[name]), open_images(photos, "unlabelled")
    reference = fit(images, tmp_path / "whole", recipe, device="cpu")
    assert torch.load(killed / f"{name}.partial" / "checkpoint.pt", weights_only=True)["step"] == 4
    again = fit(images, killed / name, recipe, device="cpu", resume=True)
    files = sorted(path.name for path in reference.path.glob("*.safetensors"))
    assert files == [
        "encoder.safetensors",
        *(["projector.safetensors"] if name not in ("deepercluster", "combination") else []),
    ]
    for file in files:
        assert (again.path / file).read_bytes() == (reference.path / file).read_bytes()


def test_every_method_is_here() -> None:
    assert SETTINGS.keys() | DISTILLERS.keys() == METHODS.keys()
