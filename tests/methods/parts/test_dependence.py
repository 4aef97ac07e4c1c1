"""Distance correlation against the `dcor` package, closed cases and degenerate batches."""

from types import ModuleType

import numpy as np
import pytest
import torch

import mvmr
from mvmr.methods.parts.dependence import (
    centred_distances,
    correlate,
    distance_correlation,
    effective_rank,
    permutation_null,
)

ESTIMATORS = ("biased", "unbiased")
ORACLES = {"biased": "distance_correlation", "unbiased": "u_distance_correlation_sqr"}


def draw_pair(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 7))
    return x, np.tanh(x[:, :3]) + 0.5 * rng.normal(size=(n, 3))


def with_duplicates(x: np.ndarray) -> np.ndarray:
    y = x.copy()
    y[: len(y) // 2] = y[0]
    return y


CASES = {
    "random": lambda x: x,
    "duplicate rows": with_duplicates,
    "constant": np.ones_like,
    "constant but for rounding of its mean": lambda x: np.full_like(x, 0.1),
    "one column": lambda x: x[:, :1],
    "tiny": lambda x: 1e-6 * x,
    "huge": lambda x: 1e6 * x,
    "far from the origin": lambda x: 1e-3 * x + 100,
    "wide": lambda x: np.random.default_rng(1).normal(size=(len(x), 4096)),
    "zeros and a block": lambda x: np.where(np.arange(len(x))[:, None] < 20, x, 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_with_dcor(dcor: ModuleType, case: str, estimator: str) -> None:
    x, y = draw_pair()
    x = CASES[case](x)
    ours = distance_correlation(torch.from_numpy(x), torch.from_numpy(y), estimator=estimator)
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(float(getattr(dcor, ORACLES[estimator])(x, y)), abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_one_for_scaled_rotated_shifted_copies(dtype: torch.dtype, scale: float, estimator: str) -> None:
    x = torch.from_numpy(draw_pair()[0]).to(dtype)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=dtype, generator=torch.Generator().manual_seed(1)))[0]
    copy = scale * (x @ rotation + 3.0)
    assert distance_correlation(x, copy, estimator=estimator).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_is_zero_for_a_constant_batch_with_zero_gradient(estimator: str) -> None:
    x = torch.full((16, 5), 0.1, requires_grad=True)
    y = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = distance_correlation(x, y, estimator=estimator)
    value.backward()
    assert value.item() == 0.0
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_finite_is_never_called_independent(estimator: str, bad: float) -> None:
    x, y = (torch.from_numpy(part).float() for part in draw_pair(16))
    x[3, 2] = bad
    for pair in ((x, y), (y, x), (x, x), (x, torch.ones_like(y))):
        assert distance_correlation(*pair, estimator=estimator).isnan()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_finite_for_duplicate_rows(estimator: str) -> None:
    rows = with_duplicates(draw_pair()[0])
    x = torch.from_numpy(rows).float().requires_grad_()
    y = torch.from_numpy(draw_pair()[1]).float()
    distance_correlation(x, y, estimator=estimator).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_that_of_finite_differences(estimator: str) -> None:
    x, y = (torch.from_numpy(a[:12]).requires_grad_() for a in draw_pair())
    torch.autograd.gradcheck(lambda a, b: distance_correlation(a, b, estimator=estimator), (x, y))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16_is_computed_in_float32(estimator: str) -> None:
    x, y = (torch.from_numpy(a).to(torch.bfloat16) for a in draw_pair())
    value = distance_correlation(x, y, estimator=estimator)
    assert value.dtype == torch.float32
    exact = distance_correlation(x.double(), y.double(), estimator=estimator)
    assert value.item() == pytest.approx(exact.item(), abs=1e-5)


def test_wide_independent_batches_show_why_the_null_is_logged() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, 8192, generator=generator) for _ in range(2))
    assert distance_correlation(x, y, estimator="biased").item() > 0.95
    assert abs(distance_correlation(x, y, estimator="unbiased").item()) < 0.02


def test_permutation_null_is_near_zero_where_the_statistic_is_one() -> None:
    x = torch.from_numpy(draw_pair(200)[0])
    a = centred_distances(x, "unbiased")
    assert correlate(a, a, "unbiased").item() == pytest.approx(1.0)
    assert abs(permutation_null(a, a, "unbiased", torch.Generator().manual_seed(0)).item()) < 0.05


def test_images_are_flattened() -> None:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distance_correlation(x, x), distance_correlation(x.flatten(1), x.flatten(1)))


def test_batches_that_do_not_pair_or_are_too_small_are_refused() -> None:
    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match="8 and 7"):
        distance_correlation(x, x[:7])
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        distance_correlation(x[:3], x[:3], estimator="unbiased")
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        distance_correlation(x[:1], x[:1])


def test_is_public() -> None:
    assert mvmr.distance_correlation is distance_correlation


def test_effective_rank_counts_directions_not_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(256, 1, generator=generator) @ torch.ones(1, 64)
    sphere = torch.linalg.qr(torch.randn(256, 64, generator=generator))[0]
    assert line.std(0).min() > 0.9  # every dimension has its standard deviation, and yet
    assert effective_rank(line) == pytest.approx(1.0, abs=0.01)
    assert effective_rank(sphere) > 63
    assert effective_rank(torch.ones(8, 4)) == 0.0
