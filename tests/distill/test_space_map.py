"""The map from a student's features to its teacher's space is scikit-learn's ridge solution."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mvmr.distillation.zeroshot import (
    STRENGTHS,
    SpaceMap,
    fit_space_map,
)
from tests.distill.maps import a_map, noisy_targets, refusal, rows


@pytest.mark.parametrize("shape", [(300, 20), (60, 150), (40, 40)], ids=["N > D", "N < D", "N = D"])
def test_the_map_is_scikit_learns_ridge_on_standardised_features(shape: tuple[int, int]) -> None:
    x = rows(*shape)
    y = noisy_targets(x)
    space_map = fit_space_map(x, y)
    unit = y.astype(np.float64) / np.linalg.norm(y, axis=1, keepdims=True)
    oracle = make_pipeline(StandardScaler(), Ridge(alpha=space_map.strength * len(x), solver="svd"))
    expected = oracle.fit(x.astype(np.float64), unit).predict(x.astype(np.float64))
    assert STRENGTHS[-1] < space_map.strength < STRENGTHS[0]
    np.testing.assert_allclose(space_map(x), expected, rtol=0, atol=1e-5)
    assert space_map(x).dtype == space_map.weight.dtype == space_map.bias.dtype == np.float32
    assert space_map.weight.shape == (6, shape[1])
    assert np.abs(space_map.weight[:, -1]).max() < 1e-6  # the dead feature's


@pytest.mark.parametrize("shape", [(300, 20), (60, 150)], ids=["N > D", "N < D"])
def test_strength_and_r2_are_those_of_a_search_by_scikit_learn(shape: tuple[int, int]) -> None:
    x = rows(*shape).astype(np.float64)
    y = noisy_targets(x)
    space_map = fit_space_map(x, y, seed=3)
    unit = y.astype(np.float64) / np.linalg.norm(y, axis=1, keepdims=True)
    order = np.random.default_rng(3).permutation(len(x))
    held, fitting = order[: len(x) // 5], order[len(x) // 5 :]

    def score(strength: float) -> float:
        model = make_pipeline(StandardScaler(), Ridge(alpha=strength * len(fitting), solver="svd")).fit(
            x[fitting], unit[fitting]
        )
        return float(r2_score(unit[held], model.predict(x[held]), multioutput="variance_weighted"))

    scores = {strength: score(strength) for strength in STRENGTHS}
    assert space_map.strength == max(scores, key=scores.__getitem__)
    assert space_map.r2 == pytest.approx(scores[space_map.strength], abs=1e-8)
    assert 0.05 < space_map.r2 < 0.95


def test_a_map_depends_on_its_seed_alone_and_not_on_the_scale_of_anything() -> None:
    x = rows(100, 10)
    y = noisy_targets(x)
    first, same = fit_space_map(x, y), fit_space_map(torch.tensor(x), torch.tensor(y))
    assert np.array_equal(first.weight, same.weight)
    assert fit_space_map(x, y, seed=1).r2 != first.r2
    scales = 2.0 ** np.arange(-5, 5, dtype=np.float32)
    scaled = fit_space_map(x * scales, y * np.linspace(0.5, 3, 100)[:, None])
    assert scaled.strength == first.strength
    np.testing.assert_allclose(scaled(x * scales), first(x), rtol=0, atol=1e-5)


def test_a_collapsed_student_explains_nothing_and_is_no_error() -> None:
    space_map = fit_space_map(np.full((50, 8), 0.3, np.float32), noisy_targets(rows(50, 8)))
    assert space_map.r2 <= 0
    assert space_map.strength == STRENGTHS[0]


def test_a_fit_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    x, y = rows(20, 4), noisy_targets(rows(20, 4))
    assert "20 rows of features and 19 of embeddings are no pairs" in refusal(fit_space_map, x, y[1:])
    assert "10 images or more, here are 9" in refusal(fit_space_map, x[:9], y[:9])
    assert fit_space_map(x[:10], y[:10]).weight.shape == (6, 4)
    broken = x.copy()
    broken[7, 2] = np.nan
    assert "features: row 7 holds NaN or infinity" in refusal(fit_space_map, broken, y)
    assert "embeddings: row 7 holds NaN or infinity" in refusal(fit_space_map, x, broken)
    assert "embeddings must be rows of numbers" in refusal(fit_space_map, x, y[0])
    assert "are all the same" in refusal(fit_space_map, x, np.ones((20, 3)) * np.arange(1, 21)[:, None])


def test_a_map_refuses_what_does_not_fit() -> None:
    space_map = a_map(3, 5)
    assert "features 5 wide, these are 4 wide" in refusal(space_map, np.ones((2, 4)))
    assert "features: row 1 holds NaN" in refusal(space_map, [[1.0] * 5, [np.inf] * 5])
    assert space_map(np.empty((0, 5))).shape == (0, 3)

    def build(weight: object, bias: object, strength: float = 1.0, r2: float = 0.5) -> SpaceMap:
        return SpaceMap(weight=np.array(weight), bias=np.array(bias), strength=strength, r2=r2)

    assert "weight [1, 2] and bias [2] make no map" in refusal(build, [[1.0, 2.0]], [1.0, 2.0])
    assert "make no map" in refusal(build, [1.0, 2.0], [1.0, 2.0])
    assert "not finite" in refusal(build, [[1.0, np.nan]], [1.0])
    assert "not finite" in refusal(build, [[1.0, 1.0]], [np.inf])
    assert "not finite" in refusal(build, [[1.0, 1.0]], [1.0], np.nan)
    assert "not finite" in refusal(build, [[1.0, 1.0]], [1.0], 1.0, -np.inf)
