"""The objective against its formulas, and the sign of every term."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from mvmr.errors import MvmrError
from mvmr.methods.objective import Embeddings, Objective, ObjectiveConfig


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mix(signal: Tensor, share: float, seed: int) -> Tensor:
    """A copy of `signal` of which only `share` is left in the noise: the dependence grows with it."""
    return share * signal + (1 - share) * draw(*signal.shape, seed=seed)


def off(**weights: object) -> ObjectiveConfig:
    """All terms of the paper off but those named."""
    return ObjectiveConfig(**({"invariance": 0.0, "variance": 0.0, "dependence": 0.0} | weights))  # type: ignore[arg-type]


def total(config: ObjectiveConfig, views: Embeddings, targets: dict[str, Tensor]) -> float:
    return float(sum(Objective(config)(views, targets).values()))


@pytest.mark.slow
def test_terms_are_the_papers_formulas(dcor: ModuleType) -> None:
    z, za, target = draw(32, 6), draw(32, 6, seed=1), draw(32, 11, seed=2)
    config = ObjectiveConfig(
        invariance=0.7, variance=0.3, gamma=1.5, dependence=0.9, representations={"hog": 0.4}, eps=1e-4
    )
    terms = Objective(config)(Embeddings(z, za, z, za), {"hog": target})
    a, b, t = z.double().numpy(), za.double().numpy(), target.double().numpy()

    def hinge(x: np.ndarray) -> float:
        return float(np.maximum(0, 1.5 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean())

    expected = {
        "invariance": 0.7 * ((a - b) ** 2).mean(),
        "variance": 0.3 * (hinge(a) + hinge(b)),
        "dependence": 0.9 * (1 - dcor.distance_correlation(b, a)),
        "dcor.hog": 0.4 * (1 - dcor.distance_correlation(b, t)),
    }
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, abs=1e-5)


def test_decorrelation_is_vicregs_covariance_term() -> None:
    z, za = draw(64, 5), draw(64, 5, seed=1)
    terms = Objective(off(decorrelation=2.0))(Embeddings(z, za, z, za), {})

    def penalty(x: np.ndarray) -> float:
        c = np.cov(x, rowvar=False)
        return float((c**2).sum() - (np.diag(c) ** 2).sum()) / 5

    expected = 2 * (penalty(z.double().numpy()) + penalty(za.double().numpy()))
    assert float(terms["decorrelation"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("term", ["dependence", "representations", "invariance"])
def test_every_term_falls_as_dependence_grows(term: str, estimator: str) -> None:
    weights = {"representations": {"hog": 1.0}} if term == "representations" else {term: 1.0}
    config = off(**weights, estimator=estimator)
    z, target = draw(128, 8), draw(128, 20, seed=1)
    losses = []
    for share in (0.0, 0.3, 0.6, 0.9):
        za = mix(target[:, :8] if term == "representations" else z, share, seed=2)
        losses.append(total(config, Embeddings(z, za, z, za), {"hog": target}))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2


def test_variance_falls_as_the_spread_of_a_dimension_grows() -> None:
    z = draw(128, 8)
    losses = [total(off(variance=1.0), Embeddings(z * s, z * s, z * s, z * s), {}) for s in (0.0, 0.3, 0.6, 2.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


@pytest.mark.parametrize("space", ["projection", "features"])
def test_a_step_down_the_gradient_raises_the_dependence_on_the_representation(space: str) -> None:
    za, target = draw(64, 8).requires_grad_(), draw(64, 20, seed=1)
    config = off(representations={"hog": 1.0}, space=space)
    objective = Objective(config)
    z = draw(64, 8, seed=3)
    views = Embeddings(z, za, z, za)
    before = objective(views, {"hog": target})["dcor.hog"]
    before.backward()
    assert za.grad is not None
    moved = (za - 5.0 * za.grad).detach()
    after = objective(Embeddings(z, moved, z, moved), {"hog": target})["dcor.hog"]
    assert after < before


def test_only_needed_terms_are_computed() -> None:
    views = Embeddings(*(draw(8, 4, seed=s) for s in range(4)))
    assert set(Objective(off(invariance=1.0))(views, {})) == {"invariance"}
    assert ObjectiveConfig(representations={"hog": 0.0, "pixels": 1.0}).targets == ("pixels",)


def test_diagnosis_tells_rank_and_null() -> None:
    h = draw(64, 1) @ torch.ones(1, 16)
    z = draw(64, 16, seed=1)
    objective = Objective(off(dependence=1.0))
    report = objective.diagnose(Embeddings(h, h, z, z), {"hog": h}, torch.Generator().manual_seed(0))
    assert report["rank_h"] == pytest.approx(1.0, abs=0.05)
    assert report["rank_z"] > 14
    assert report["unbiased.views"] == pytest.approx(1.0, abs=1e-4)
    assert abs(report["unbiased.views.null"]) < 0.1
    assert abs(report["unbiased.hog"]) < 0.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"invariance": -1.0}, "invariance = -1.0"),
        ({"representations": {"hog": float("nan")}}, "representations.hog = nan"),
        ({"representations": {"teacher": -1.0, "hog": 1.0}}, "representations.teacher = -1.0"),
        ({"invariance": 0.0, "variance": 0.0, "dependence": 0.0}, "nothing to learn"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        ObjectiveConfig(**weights)  # type: ignore[arg-type]
