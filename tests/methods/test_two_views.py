"""SimSiam, Barlow Twins and VICReg: their losses written out in double precision, and cases of which all is known."""

import numpy as np
import pytest
import torch
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.barlow import BarlowConfig, correlation_terms
from mvmr.methods.method import Setting
from mvmr.methods.parts.heads import build_projector
from mvmr.methods.simsiam import Simsiam, SimsiamConfig, unlikeness
from mvmr.methods.vicreg import Vicreg, VicregConfig


def pair(rows: int = 9, width: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(1, 2, size=(2, rows, width))


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (2, 9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))


# SimSiam


def test_unlikeness_is_minus_the_cosine_and_holds_the_projection_still() -> None:
    p, z = (torch.tensor(rows).float().requires_grad_() for rows in pair())
    loss = unlikeness(p, z)
    cosines = [float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(*pair(), strict=True)]
    assert float(loss.detach()) == pytest.approx(-np.mean(cosines), rel=1e-5)
    loss.backward()
    assert z.grad is None
    assert p.grad is not None


def test_simsiam_is_symmetric() -> None:
    config = SimsiamConfig(projector=(4, 3), predictor=(2, 3))
    method = Simsiam(config, encoder(), Setting(5, Preprocess.for_size(8), 20, {}))
    first, second = pictures()
    losses = [method({"first": a, "second": b}, {}).losses["unlikeness"] for a, b in ((first, second), (second, first))]
    torch.testing.assert_close(losses[0], losses[1])


def test_its_projections_have_mean_0_and_variance_1() -> None:
    z = build_projector(5, (4, 3), last_norm=True)(torch.randn(200, 5))
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, unbiased=False), torch.ones(3), atol=1e-2, rtol=0)


def test_a_predictor_of_another_width_is_refused() -> None:
    with pytest.raises(MvmrError, match="the last widths of both must be there, and the same"):
        SimsiamConfig(projector=(64,), predictor=(16, 32))


# Barlow Twins


def test_the_terms_are_those_of_equation_1() -> None:
    a, b = pair()
    correlations = np.corrcoef(a, b, rowvar=False)[:4, 4:]
    diagonal = np.diag(correlations)
    invariance, redundancy = correlation_terms(*(torch.tensor(rows).float() for rows in (a, b)))
    assert float(invariance) == pytest.approx(((1 - diagonal) ** 2).sum(), rel=1e-4)
    assert float(redundancy) == pytest.approx((correlations**2).sum() - (diagonal**2).sum(), rel=1e-4)


def test_equal_views_of_dimensions_that_do_not_correlate_cost_nothing() -> None:
    rows = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    invariance, redundancy = correlation_terms(rows, 3 * rows + 1)
    assert float(invariance) < 1e-8
    assert float(redundancy) < 1e-8
    invariance, redundancy = correlation_terms(rows[:, :1].repeat(1, 2), rows[:, :1].repeat(1, 2))
    assert (float(invariance), float(redundancy)) == (pytest.approx(0, abs=1e-8), pytest.approx(2, rel=1e-4))


def test_a_weight_below_0_is_refused() -> None:
    with pytest.raises(MvmrError, match=r"redundancy = -1\.0: a weight must be 0 or more"):
        BarlowConfig(redundancy=-1.0)


# VICReg


def test_vicregs_terms_are_equations_1_to_5() -> None:
    config = VicregConfig(invariance=2.0, variance=3.0, covariance=0.5, gamma=1.5, projector=(4, 3))
    method = Vicreg(config, encoder(), Setting(5, Preprocess.for_size(8), 20, {}))
    first, second = pictures()
    losses = method({"first": first, "second": second}, {}).losses
    a, b = (method.projector(method.features(images)).detach().double().numpy() for images in (first, second))

    def spread(z: np.ndarray) -> float:
        return float(np.maximum(0, 1.5 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean())

    def covariance(z: np.ndarray) -> float:
        c = np.cov(z, rowvar=False)
        return float((c**2).sum() - (np.diag(c) ** 2).sum()) / 3

    assert float(losses["invariance"].detach()) == pytest.approx(2 * ((a - b) ** 2).mean(), rel=1e-3)
    assert float(losses["variance"].detach()) == pytest.approx(3 * (spread(a) + spread(b)) / 2, rel=1e-3)
    assert float(losses["covariance"].detach()) == pytest.approx(0.5 * (covariance(a) + covariance(b)), rel=1e-3)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(MvmrError, match=r"covariance = -0\.5: a weight must be 0 or more"):
        VicregConfig(covariance=-0.5)
