"""What every method must hold to, whatever it learns: one test file over the whole table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.cli.options import SHORTHANDS
from mvmr.config import parse, to_mapping
from mvmr.errors import MvmrError
from mvmr.methods.distillers.table import DISTILLERS
from mvmr.methods.method import Method, MethodConfig, Setting, ViewSpec
from mvmr.methods.table import CONFIGS, METHODS, build_method
from mvmr.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, WIDTH, BATCH = 8, 12, 6
SMALL: dict[str, dict[str, Any]] = {
    "mvmr": {"projector": (8,), "representations": {"pixels": 1.0}},
    "simclr": {"projector": (8, 6)},
    "moco": {"projector": (8, 6), "queue": BATCH + 2},
    "byol": {"projector": (8, 6), "predictor": (8, 6)},
    "simsiam": {"projector": (8, 6), "predictor": (4, 6)},
    "barlow": {"projector": (8, 6)},
    "vicreg": {"projector": (8, 6)},
    "swav": {"projector": (8, 6), "prototypes": 4, "queue": BATCH, "local": 1, "local_scale": 0.5},
    "dino": {"head": (8, 6), "outputs": 5, "local": 1, "local_scale": 0.5},
    "isd": {"projector": (8, 6), "predictor": (8, 6), "queue": BATCH + 2},
    "twist": {"hidden": (8,), "classes": 3, "local": 1, "local_scale": 0.5},
    "deepcluster": {"projector": (8, 6), "clusters": 3, "heads": 2, "local": 1, "local_scale": 0.5},
    "deepercluster": {"clusters": 2, "subclusters": 2},
    "selflabel": {"classes": 3, "heads": 2},
    "lejepa": {"projector": (8, 6), "slices": 16, "local": 1, "local_scale": 0.5},
    **{name: {"teachers": {"pixels": 1.0}} for name in (*DISTILLERS, "combination")},
}


class Encoder(nn.Module):
    """A small convolutional encoder with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images)
        return out


def config(name: str) -> MethodConfig:
    return CONFIGS[name](**SMALL[name])


def build(name: str, seed: int = 0) -> Method:
    rows = {"pixels": np.random.default_rng(0).uniform(0, 255, (2 * BATCH, 3 * SIZE * SIZE)).astype(np.float32)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = build_method(config(name), Encoder(), Setting(WIDTH, Preprocess.for_size(SIZE), BATCH, rows))
    method.before_epoch(0, lambda: torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return method


def batch(name: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Images of one colour each, with noise of their own in every view."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(40, 200, (BATCH, 3, 1, 1), generator=generator)
    views = {
        spec.name: (colours + torch.randint(-40, 40, (BATCH, 3, side(spec), side(spec)), generator=generator)).byte()
        for spec in config(name).views
    }
    pixels = torch.rand(BATCH, 3 * SIZE * SIZE, generator=generator) * 255
    views["index"] = torch.randperm(BATCH, generator=generator)
    return views, dict.fromkeys(config(name).targets, pixels)


def side(spec: ViewSpec) -> int:
    return round(spec.scale * SIZE)


def total(method: Method, name: str, seed: int = 0) -> Tensor:
    return torch.stack(list(method(*batch(name, seed)).losses.values())).sum()


def step(method: Method, name: str, seed: int = 0) -> float:
    """One step of plain gradient descent; returns the loss before it."""
    loss = total(method, name, seed)
    loss.backward()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    method.after_step(1, 10)
    return float(loss.detach())


every = pytest.mark.parametrize("name", METHODS)


@every
def test_its_settings_survive_a_recipe_and_back(name: str) -> None:
    recipe = Recipe(method=config(name))
    assert parse(Recipe, to_mapping(recipe), where="test") == recipe
    assert to_mapping(recipe)["method"]["name"] == name == config(name).name


@every
def test_its_views_have_names_of_their_own(name: str) -> None:
    names = [spec.name for spec in config(name).views]
    assert names
    assert len(set(names)) == len(names)
    assert set(config(name).stored_targets) <= set(config(name).targets)


@every
def test_terms_are_finite_scalars_in_float32_and_reach_all_that_is_trained(name: str) -> None:
    method = build(name)
    losses, h, _ = method(*batch(name))
    assert losses
    assert h.shape == (BATCH, WIDTH)
    assert h.requires_grad
    assert all(term.shape == () and term.dtype == torch.float32 and term.isfinite() for term in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        else:
            assert parameter.grad is None, key
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in method.encoder.parameters())


@every
def test_in_half_precision_the_loss_is_still_computed_in_float32(name: str) -> None:
    method = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(*batch(name)).losses
    assert all(term.dtype == torch.float32 for term in losses.values())
    exact = build(name)(*batch(name)).losses
    for key, term in losses.items():
        torch.testing.assert_close(term, exact[key], rtol=0.1, atol=0.05)


@every
def test_descending_lowers_the_loss_of_a_batch(name: str) -> None:
    """Whatever it remembers being as before: queues, centres and slow networks move on at each step."""
    method = build(name)
    for number in range(3):
        step(method, name, number)
    memory = {key: value.clone() for key, value in method.state_dict().items()}
    trained = {key: parameter for key, parameter in method.named_parameters() if parameter.requires_grad}
    values = []
    for _ in range(30):
        loss = total(method, name)
        values.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(trained.values()))
        method.load_state_dict(memory | {key: value.detach().clone() for key, value in trained.items()})
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= 0.01 * gradient
    assert values[-1] < values[0]


@every
def test_all_that_it_remembers_is_in_its_state(name: str) -> None:
    """Saved after two steps and gone on with by a fresh one, the third step is the same to the bit."""
    method = build(name)
    for seed in range(2):
        step(method, name, seed)
    fresh = build(name, seed=99)
    fresh.load_state_dict(method.state_dict())
    assert step(method, name, 2) == step(fresh, name, 2)
    assert all(torch.equal(mine, fresh.state_dict()[key]) for key, mine in method.state_dict().items())


@every
def test_looking_at_a_step_changes_nothing_and_gives_plain_numbers(name: str) -> None:
    method = build(name)
    outputs = method(*batch(name)).outputs
    before = {key: value.clone() for key, value in method.state_dict().items()}
    diagnoses = [method.diagnose(outputs, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert diagnoses[0] == diagnoses[1]
    assert all(isinstance(value, float) for value in diagnoses[0].values())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@every
def test_the_features_are_the_encoders(name: str) -> None:
    method = build(name).eval()
    images = next(iter(batch(name)[0].values()))
    normalised = torch.from_numpy(Preprocess.for_size(SIZE).normalise(images.permute(0, 2, 3, 1).numpy()))
    torch.testing.assert_close(method.features(images), method.encoder(normalised))


def test_an_unknown_method_names_the_nearest_and_an_unknown_setting_its_key() -> None:
    with pytest.raises(MvmrError, match=r"method\.name = 'simcrl' should be one of mvmr, .*did you mean 'simclr'\?"):
        parse(Recipe, {"method": {"name": "simcrl"}}, where="test")
    with pytest.raises(MvmrError, match=r"unknown key 'method\.temprature', did you mean 'temperature'\?"):
        parse(Recipe, {"method": {"name": "simclr", "temprature": 0.1}}, where="test")


@every
def test_the_help_and_the_docs_tell_of_it(name: str) -> None:
    assert name in SHORTHANDS["method"].text
    pages = Path(__file__).parents[2] / "docs"
    docs = "".join((pages / page).read_text() for page in ("methods.md", "distillers.md"))
    assert name == "mvmr" or f"\n## `{name}`\n" in docs
