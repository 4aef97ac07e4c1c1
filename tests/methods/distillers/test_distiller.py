"""What distillers share: weights of teachers, teachers that are the same, one that is left out, sums of losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.config import parse
from mvmr.errors import MvmrError
from mvmr.methods.method import Method, Setting
from mvmr.methods.parts.dependence import distance_correlation
from mvmr.methods.table import CONFIGS, build_method
from mvmr.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, WIDTH, IMAGES = 4, 6, 16
WIDTHS = {"a": 5, "b": 5, "c": 9}


def bank(name: str) -> np.ndarray:
    """Rows of all images; a and b are the same teacher."""
    seed = {"a": 1, "b": 1, "c": 3}[name]
    return np.random.default_rng(seed).normal(2, 3, (IMAGES, WIDTHS[name])).astype(np.float32)


def build(name: str, teachers: dict[str, float], *, seed: int = 0, **settings: Any) -> Method:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, WIDTH))
    config = CONFIGS[name](teachers=teachers, **settings)  # type: ignore[call-arg]
    rows = {teacher: bank(teacher) for teacher in teachers}
    return build_method(config, encoder, Setting(WIDTH, Preprocess.for_size(SIZE), IMAGES, rows))


def batch(teachers: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    views = {
        name: torch.randint(0, 256, (8, 3, SIZE, SIZE), generator=generator).byte()
        for name in ("original", "augmented")
    }
    return views, {name: torch.from_numpy(bank(name)[:8]) for name in teachers}


def losses(method: Method, teachers: dict[str, float]) -> dict[str, Tensor]:
    return method(*batch(teachers)).losses


def values(method: Method, teachers: dict[str, float]) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in losses(method, teachers).items()}


def train(method: Method, teachers: dict[str, float], steps: int = 4) -> Tensor:
    """The encoder's weights after some steps of gradient descent."""
    for _ in range(steps):
        loss = torch.stack(list(losses(method, teachers).values())).sum()
        gradients = torch.autograd.grad(loss, list(method.parameters()))
        with torch.no_grad():
            for (key, parameter), gradient in zip(method.named_parameters(), gradients, strict=True):
                # a head's own gradient grows with its weight: held still, so that what reaches the encoder is compared
                if key.startswith("encoder"):
                    parameter -= 0.05 * gradient
    return nn.utils.parameters_to_vector(method.encoder.parameters())


@pytest.mark.parametrize("name", ["regression", "combination", "seed"])
def test_a_teacher_under_two_names_is_that_teacher_with_both_weights(name: str) -> None:
    one, two = {"a": 2.0}, {"a": 1.5, "b": 0.5}
    torch.testing.assert_close(train(build(name, one), one), train(build(name, two), two), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["regression", "combination", "cospress"])
def test_the_order_of_teachers_does_not_matter(name: str) -> None:
    there, back = {"a": 1.0, "c": 0.7}, {"c": 0.7, "a": 1.0}
    assert torch.equal(train(build(name, there), there), train(build(name, back), back))


def test_a_term_is_the_mean_over_both_views_in_the_teachers_units_times_its_weight() -> None:
    teachers = {"c": 0.3}
    method = build("dcor", teachers, estimator="biased")
    views, targets = batch(teachers)
    (term,) = method(views, targets).losses.values()
    each = [1 - distance_correlation(method.features(views[view]), targets["c"]) for view in ("original", "augmented")]
    torch.testing.assert_close(term, 0.3 * (each[0] + each[1]) / 2)


def test_a_sum_has_a_term_for_every_loss_and_teacher() -> None:
    teachers = {"a": 2.0, "c": 1.0}
    weights = {"regression": 1.0, "cosine": 0.5, "gram": 0.0}
    terms = losses(build("combination", teachers, losses=weights), teachers)
    assert terms.keys() == {"regression.a", "regression.c", "cosine.a", "cosine.c"}
    regression = losses(build("regression", {"a": 2.0}), {"a": 2.0})
    torch.testing.assert_close(terms["regression.a"], regression["regression.a"])
    halves = losses(build("combination", teachers, losses={"regression": 0.5}), teachers)
    torch.testing.assert_close(2 * halves["regression.c"], terms["regression.c"])


def test_the_best_learnt_teacher_is_left_out_of_some_steps() -> None:
    """The same steps for everyone who counts them alike; and never in evaluation."""
    teachers = {"a": 1.0, "c": 1.0}
    method, plain = build("cosine", teachers, drop=0.5), build("cosine", teachers)
    whole = values(plain, teachers)
    best = min(whole, key=lambda name: whole[name])
    dropped = []
    for step in range(40):
        method.after_step(step, 40)
        terms = values(method, teachers)
        dropped.append(terms[best] == 0)
        assert terms == (whole | {best: 0.0} if dropped[-1] else whole)
        assert terms == values(method, teachers)
    assert 10 < sum(dropped) < 30
    method.eval()
    method.after_step(dropped.index(True), 40)
    assert values(method, teachers) == whole


def test_another_seed_leaves_out_teachers_in_other_steps() -> None:
    def steps_without(seed: int) -> list[bool]:
        method = build("cosine", {"a": 1.0, "c": 1.0}, seed=seed, drop=0.5)
        dropped = []
        for step in range(20):
            method.after_step(step, 20)
            dropped.append(0 in values(method, {"a": 1.0, "c": 1.0}).values())
        return dropped

    first, again, other = steps_without(1), steps_without(1), steps_without(2)
    assert first == again
    assert first[1:] != other[:-1]  # nor the same, a step later
    assert first != other


def test_an_only_teacher_is_never_left_out() -> None:
    method = build("cosine", {"a": 1.0}, drop=0.9)
    for step in range(10):
        method.after_step(step, 10)
        assert float(losses(method, {"a": 1.0})["cosine.a"].detach()) > 0


def test_a_sum_of_an_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(MvmrError, match=r"losses: unknown distiller 'regresion'; did you mean 'regression'\?"):
        parse(Recipe, {"method": {"name": "combination", "losses": {"regresion": 1.0}}}, where="test")
