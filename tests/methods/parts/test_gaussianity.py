"""Distances of a batch to a Gaussian against scipy, sampling and the definition; and LeJEPA, which is made of them."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.lejepa import Lejepa, LejepaConfig
from mvmr.methods.method import Setting
from mvmr.methods.parts.gaussianity import distance_to_gaussian, gaussian_energy, sigreg


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("width", [1, 2, 16, 128])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
def test_the_distance_to_a_gaussian_is_the_closed_form(width: int, scale: float) -> None:
    """E|x - g| = sqrt(2) Gamma((D + 1) / 2) / Gamma(D / 2) 1F1(-1/2; D / 2; -|x|^2 / 2), Székely and Rizzo (2005)."""
    rows = scale * draw(5, width)
    factor = math.sqrt(2) * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2))
    expected = [factor * float(mpmath.hyp1f1(-0.5, width / 2, -float(row @ row) / 2)) for row in rows.double()]
    np.testing.assert_allclose(distance_to_gaussian(rows).numpy(), expected, rtol=1e-4)


def test_its_gradient_is_that_of_differences() -> None:
    rows = draw(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(distance_to_gaussian, (rows,), eps=1e-5, atol=1e-5)


def test_gaussian_rows_have_an_energy_of_about_0_and_others_more() -> None:
    normal = torch.stack([gaussian_energy(draw(300, 8, seed=seed)) for seed in range(20)])
    assert abs(float(normal.mean())) < 2e-3
    least = float(normal.max())
    rows = draw(300, 8)
    for other in (torch.zeros(300, 8), 2 * rows, rows / 2, rows + 1, rows[:, :1].expand(-1, 8), rows.sign()):
        assert float(gaussian_energy(other)) > least


def test_sigreg_is_the_test_of_epps_and_pulley_on_each_slice() -> None:
    rows = draw(7, 3) * 1.5 + 0.3
    directions = torch.randn(3, 4, generator=generator())
    directions /= directions.norm(dim=0)
    total = 0.0
    for slice_ in (rows @ directions).double().numpy().T:

        def difference(t: float, x: np.ndarray = slice_) -> float:
            return float(abs(np.exp(1j * t * x).mean() - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2))

        total += 7 * quad(difference, -5, 5)[0] / 4
    assert float(sigreg(rows, 4, generator())) == pytest.approx(total, rel=1e-2)  # 17 knots


def test_sigreg_of_gaussian_rows_is_small_and_of_a_collapse_grows_with_the_batch() -> None:
    assert float(sigreg(draw(500, 6), 64, generator())) < 2
    small, large = (float(sigreg(torch.zeros(count, 6), 64, generator())) for count in (50, 500))
    assert large == pytest.approx(10 * small, rel=1e-5)
    assert small > 10


@pytest.mark.parametrize("spread", ["sigreg", "energy"])
def test_descending_makes_rows_gaussian(spread: str) -> None:
    """From a cloud beside it, narrow and stretched."""
    rows = (draw(128, 4) * torch.tensor([0.1, 0.1, 1.5, 1.0]) + 0.5).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.05)
    for step in range(400):
        slices = torch.Generator().manual_seed(step)
        loss = sigreg(rows, 32, slices) if spread == "sigreg" else gaussian_energy(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    covariance = torch.cov(rows.detach().T)
    torch.testing.assert_close(rows.detach().mean(0), torch.zeros(4), atol=0.15, rtol=0)
    torch.testing.assert_close(covariance, torch.eye(4), atol=0.3, rtol=0)


def test_a_cloud_is_pulled_back_by_its_energy_however_far_it_is() -> None:
    """Equally from anywhere, where the phases that SIGReg sees of a far cloud say nothing of where it is."""

    def pull(distance: float) -> float:
        rows = (draw(100, 4) + distance).requires_grad_()
        (gradient,) = torch.autograd.grad(gaussian_energy(rows), rows)
        return float(gradient.mean(1).sum())

    assert pull(1000) == pytest.approx(pull(10), rel=0.05)
    assert pull(10) > 0.4


# LeJEPA


def lejepa(**settings: object) -> Lejepa:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    config = LejepaConfig(**{"projector": (4, 3), "slices": 8, "local": 0} | settings)  # type: ignore[arg-type]
    return Lejepa(config, encoder, Setting(5, Preprocess.for_size(8), 20, {}))


def views(count: int) -> dict[str, torch.Tensor]:
    pixels = torch.randint(0, 256, (count, 6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {f"global{number}": images for number, images in enumerate(pixels)}


@pytest.mark.parametrize("spread", ["sigreg", "energy"])
def test_prediction_is_the_distance_to_the_mean_of_the_views(spread: str) -> None:
    method = lejepa(crops=3, trade=0.2, spread=spread)
    images = views(3)
    losses = method(images, {}).losses
    z = np.stack([method.projector(method.features(view)).detach().double().numpy() for view in images.values()])
    expected = 0.8 * ((z - z.mean(0)) ** 2).mean()
    assert float(losses["prediction"].detach()) == pytest.approx(expected, rel=1e-4)
    assert losses.keys() == {"prediction", spread}


def test_local_views_tell_the_mean_of_the_global_ones_and_stay_out_of_it() -> None:
    method = lejepa(local=2, trade=0.0)
    images = views(4)
    images = {spec.name: pixels for spec, pixels in zip(method.config.views, images.values(), strict=True)}
    assert list(images) == ["global0", "global1", "local0", "local1"]
    z = np.stack([method.projector(method.features(view)).detach().double().numpy() for view in images.values()])
    expected = ((z - z[:2].mean(0)) ** 2).mean()
    assert float(method(images, {}).losses["prediction"].detach()) == pytest.approx(expected, rel=1e-4)


def test_equal_views_leave_the_spread_alone() -> None:
    images = views(1)["global0"]
    losses = lejepa()({"global0": images, "global1": images}, {}).losses
    assert float(losses["prediction"].detach()) == 0


def test_slices_are_drawn_anew_at_each_step_and_are_a_function_of_its_number() -> None:
    method, images = lejepa(), views(2)
    first = float(method(images, {}).losses["sigreg"].detach())
    assert float(method(images, {}).losses["sigreg"].detach()) == first
    method.after_step(1, 10)
    assert float(method(images, {}).losses["sigreg"].detach()) != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trade": 1.5}, r"trade = 1\.5: must lie between 0 and 1"),
        ({"slices": 0}, "slices = 0: must be 1 or more"),
        ({"crops": 1}, "crops = 1: a view is told from others of its image; give 2 or more"),
        ({"local": -1}, "local = -1: give a number of smaller crops, or 0 for none"),
        ({"local_scale": 1.5}, r"local_scale = 1\.5: local views are smaller than global ones; at most 1"),
        (
            {"local_area": (0.5, 0.1)},
            r"local_area = \[0\.5, 0\.1\]: give two shares of the image, the smaller",
        ),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        LejepaConfig(**settings)  # type: ignore[arg-type]
