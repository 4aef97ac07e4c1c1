"""A teacher's units: means, deviations, and PHI-S, whose every dimension varies alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvmr.methods.parts.standardising import Bank, Standard, statistics

HOWS = ("dimension", "scale", "phi-s", "raw")


def rows(width: int = 12, images: int = 300, seed: int = 0) -> np.ndarray:
    """Dimensions that vary by very different amounts, and together."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(images, width)) * random.lognormal(0, 2, width) @ random.normal(size=(width, width))
    return (mixed + random.normal(size=width)).astype(np.float32)


def standardised(x: np.ndarray, how: str) -> np.ndarray:
    return Standard(x, how)(torch.from_numpy(x)).double().numpy()  # type: ignore[arg-type]


def test_statistics_are_those_of_all_rows() -> None:
    mean, std = statistics(rows())
    np.testing.assert_allclose(mean, rows().mean(0, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(std, rows().std(0, dtype=np.float64), rtol=1e-5)


def test_by_dimension_each_has_deviation_one() -> None:
    x = standardised(rows(), "dimension")
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, rtol=1e-5)


@pytest.mark.parametrize("how", ["scale", "phi-s"])
@pytest.mark.parametrize("width", [2, 3, 7, 12, 20, 65])
def test_scaled_or_turned_distances_keep_their_ratios_and_the_mean_variance_is_one(how: str, width: int) -> None:
    x, y = rows(width), standardised(rows(width), how)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    assert y.var(0).mean() == pytest.approx(1, rel=1e-4)
    before, after = (np.linalg.norm(z[:-1].astype(np.float64) - z[1:], axis=1) for z in (x, y))
    np.testing.assert_allclose(after / after.mean(), before / before.mean(), rtol=1e-3)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 12, 20, 65])
def test_phi_s_gives_every_dimension_variance_one_whatever_the_width(width: int) -> None:
    np.testing.assert_allclose(standardised(rows(width), "phi-s").var(0), 1, rtol=1e-3)


@pytest.mark.parametrize("how", ["dimension", "scale", "phi-s"])
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_units_do_not_hang_on_the_size_of_embeddings(how: str, size: float) -> None:
    np.testing.assert_allclose(standardised(rows() * np.float32(size), how), standardised(rows(), how), atol=1e-2)


def test_a_dimension_that_does_not_vary_is_nothing() -> None:
    x = rows(4)
    x[:, 2] = 1000.1
    y = standardised(x, "dimension")
    assert not y[:, 2].any()
    np.testing.assert_allclose(y[:, [0, 1, 3]].std(0), 1, rtol=1e-5)


def test_as_they_are() -> None:
    np.testing.assert_array_equal(standardised(rows(), "raw"), rows().astype(np.float64))


@pytest.mark.parametrize("how", HOWS)
def test_a_teacher_that_says_the_same_of_every_image_stays_finite(how: str) -> None:
    assert np.isfinite(standardised(np.full((5, 3), 2.5, np.float32), how)).all()


def test_a_bank_gives_all_its_rows_or_an_even_sample_in_the_teachers_units() -> None:
    bank = Bank(rows(4, 10), Standard(rows(4, 10), "dimension"))
    everything = standardised(rows(4, 10), "dimension")
    assert bank.width == 4
    np.testing.assert_allclose(bank.sample(10), everything, rtol=1e-5)
    np.testing.assert_allclose(bank.sample(4), everything[[0, 3, 6, 9]], rtol=1e-5)
