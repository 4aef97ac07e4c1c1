"""Two devices with half a batch each learn what one learns of the whole, whatever the method compares."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.methods.table import CONFIGS, METHODS, build_method
from tests.methods.two_ranks import RANKS

SIZE, WIDTH, BATCH = 8, 12, 8
# Without batch norm, which a run over several devices makes one over all of them.
LINEAR: dict[str, dict[str, Any]] = {
    "mvmr": {"projector": (8,), "representations": {"pixels": 1.0}, "decorrelation": 0.5},
    "simclr": {"projector": (6,)},
    "moco": {"projector": (6,), "queue": BATCH},
    "byol": {"projector": (6,), "predictor": (6,)},
    "barlow": {"projector": (6,)},
    "vicreg": {"projector": (6,)},
    "swav": {"projector": (6,), "prototypes": 4, "local": 1, "local_scale": 1.0},
    "dino": {"head": (6,), "outputs": 5, "local": 1, "local_scale": 1.0},
    "isd": {"projector": (6,), "predictor": (6,), "queue": BATCH},
    "lejepa": {"projector": (6,), "slices": 16, "local": 0},
}
WITH_A_NORM = {"simsiam", "twist"}  # their projectors end in one
CASES = {name: (name, settings) for name, settings in LINEAR.items()} | {
    "moco-without-a-queue": ("moco", {"projector": (6,), "queue": 0}),
    "lejepa-energy": ("lejepa", {"projector": (6,), "spread": "energy", "local": 0}),
}


def example(name: str, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A method in evaluation mode, and a batch for it."""
    config = CONFIGS[name](**settings)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, WIDTH), nn.ReLU())
    method = build_method(config, encoder, WIDTH, Preprocess.for_size(SIZE), {})
    views = {spec.name: torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8) for spec in config.views}
    return method, views, dict.fromkeys(config.targets, torch.rand(BATCH, 3 * SIZE * SIZE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks found of each method."""
    folder = tmp_path_factory.mktemp("ranks")
    for case, (name, settings) in CASES.items():
        torch.save(example(name, settings), folder / f"{case}.pt")
    subprocess.run([sys.executable, Path(__file__).with_name("two_ranks.py"), folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_the_gradient_of_the_whole_batch(folder: Path, case: str) -> None:
    method, views, targets = example(*CASES[case])
    loss = torch.stack(list(method(views, targets).losses.values())).sum()
    loss.backward()
    for rank in range(RANKS):
        theirs, gradients = torch.load(folder / f"{case}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(theirs, loss.detach(), rtol=1e-5, atol=1e-5)
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-5)


def test_every_method_is_here() -> None:
    assert {*LINEAR, *WITH_A_NORM} == {*METHODS}
