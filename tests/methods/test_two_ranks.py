"""Two devices with half a batch each learn what one learns of the whole, whatever the method compares."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.methods.distillers.table import DISTILLERS
from mvmr.methods.method import Method, Setting
from mvmr.methods.regulariser import RegulariserConfig, regularise
from mvmr.methods.table import CONFIGS, METHODS, build_method
from tests.methods.two_ranks import RANKS, WIDTH

SIZE, BATCH, TARGET = 8, 8, 24
# Any batch norm is in evaluation mode: each device has statistics of its own.
SETTINGS: dict[str, dict[str, Any]] = {
    "mvmr": {"projector": (8,), "representations": {"pixels": 1.0}, "decorrelation": 0.5},
    "simclr": {"projector": (6,)},
    "moco": {"projector": (6,), "queue": BATCH},
    "byol": {"projector": (6,), "predictor": (6,)},
    "barlow": {"projector": (6,)},
    "vicreg": {"projector": (6,)},
    "swav": {"projector": (6,), "prototypes": 4, "local": 1, "local_scale": 1.0},
    "dino": {"head": (6,), "outputs": 5, "local": 1, "local_scale": 1.0},
    "isd": {"projector": (6,), "predictor": (6,), "queue": BATCH},
    "simsiam": {"projector": (6,), "predictor": (6,)},
    "twist": {"hidden": (6,), "classes": 4, "local": 1, "local_scale": 1.0},
    "deepcluster": {"projector": (6,), "clusters": 3, "heads": 2, "local": 0},
    "deepercluster": {"clusters": 2, "subclusters": 2},
    "selflabel": {"classes": 4, "heads": 2},
    "lejepa": {"projector": (6,), "slices": 16, "local": 0},
    **{name: {"teachers": {"hog": 1.0, "pixels": 0.5}} for name in (*DISTILLERS, "combination")},
}
HOG = RegulariserConfig(representations={"hog": 0.5})
CASES = {name: (name, settings, RegulariserConfig()) for name, settings in SETTINGS.items()} | {
    "moco-without-a-queue": ("moco", {"projector": (6,), "queue": 0}, RegulariserConfig()),
    "lejepa-energy": ("lejepa", {"projector": (6,), "spread": "energy", "local": 0}, RegulariserConfig()),
    "twist-labelling": ("twist", SETTINGS["twist"] | {"labelling": 1.0, "momentum": 0.9}, RegulariserConfig()),
    "simclr-and-hog": ("simclr", SETTINGS["simclr"], HOG),
    "deepcluster-and-hog": ("deepcluster", SETTINGS["deepcluster"], HOG),
}


Example = tuple[Method, RegulariserConfig, dict[str, Tensor], dict[str, Tensor]]


def example(name: str, settings: dict[str, Any], regulariser: RegulariserConfig) -> Example:
    """A method in evaluation mode, what is beside it, and a batch for both."""
    config = CONFIGS[name](**settings)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, WIDTH), nn.ReLU())
    rows = {
        name: np.random.default_rng(0).normal(size=(16, TARGET)).astype(np.float32) for name in config.stored_targets
    }
    method = build_method(config, encoder, Setting(WIDTH, Preprocess.for_size(SIZE), 16, rows))
    method.before_epoch(0, lambda: torch.rand(16, WIDTH))
    method.eval()
    views = {spec.name: torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8) for spec in config.views}
    views["index"] = torch.randperm(16)[:BATCH]
    names = (*config.targets, *regulariser.targets)
    return method, regulariser, views, dict.fromkeys(names, torch.rand(BATCH, TARGET))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks found of each method."""
    folder = tmp_path_factory.mktemp("ranks")
    for case, settings in CASES.items():
        torch.save(example(*settings), folder / f"{case}.pt")
    subprocess.run([sys.executable, Path(__file__).with_name("two_ranks.py"), folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_the_gradient_of_the_whole_batch(folder: Path, case: str) -> None:
    method, regulariser, views, targets = example(*CASES[case])
    terms, h, _ = method(views, targets)
    loss = torch.stack(list((terms | regularise(regulariser, h, targets)).values())).sum()
    loss.backward()
    for rank in range(RANKS):
        theirs, gradients, _ = torch.load(folder / f"{case}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(theirs, loss.detach(), rtol=1e-5, atol=1e-5)
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_found_between_epochs_is_the_same_on_all_ranks(folder: Path, case: str) -> None:
    states = [torch.load(folder / f"{case}-{rank}.pt", weights_only=True)[2] for rank in range(RANKS)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_every_method_is_here() -> None:
    assert SETTINGS.keys() == METHODS.keys()
