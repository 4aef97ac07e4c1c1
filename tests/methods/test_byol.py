"""BYOL's loss in double precision, and its slow network: no gradient, and the moving average in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.byol import Byol, ByolConfig, regression_loss
from mvmr.methods.method import Setting
from mvmr.methods.parts.momentum import cosine_momentum, follow, make_follower


def test_the_loss_is_two_minus_twice_the_cosine() -> None:
    predictions, targets = np.random.default_rng(0).normal(size=(2, 9, 4))
    cosines = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(predictions, targets, strict=True)]
    loss = regression_loss(torch.tensor(predictions).float(), torch.tensor(targets).float())
    assert float(loss) == pytest.approx(2 - 2 * sum(cosines) / 9, rel=1e-5)


def test_the_momentum_grows_to_one_along_a_cosine() -> None:
    assert cosine_momentum(0.99, 0, 100) == 0.99
    assert cosine_momentum(0.99, 50, 100) == pytest.approx(0.995)
    assert cosine_momentum(0.99, 100, 100) == 1.0


def test_a_follower_is_the_moving_average_of_what_it_followed() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    slow, momenta = make_follower(module), (0.9, 0.5, 0.99, 0.7)
    expected = module.weight.detach().clone()
    for momentum in momenta:
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        follow(slow, module, momentum)
        expected = momentum * expected + (1 - momentum) * module.weight.detach()
    torch.testing.assert_close(slow.weight, expected)
    assert not slow.weight.requires_grad


def test_the_slow_network_begins_as_the_fast_one_and_is_told_of_by_the_other_view() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    config = ByolConfig(projector=(4, 3), predictor=(4, 3))
    method = Byol(config, encoder, Setting(5, Preprocess.for_size(8), 20, {}))
    for name, value in method.slow_encoder.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name])
    first, second = torch.randint(0, 256, (2, 6, 3, 8, 8), dtype=torch.uint8)
    images, other_images = method.normalise(first), method.normalise(second)
    predictions = [method.predictor(method.projector(encoder(view))) for view in (images, other_images)]
    slow = [method.slow_projector(method.slow_encoder(view)) for view in (other_images, images)]
    expected = sum(regression_loss(a, b) for a, b in zip(predictions, slow, strict=True))
    loss = method({"first": first, "second": second}, {}).losses["regression"]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.5}, r"momentum = 1\.5: must lie between 0 and 1"),
        ({"predictor": (8,)}, "the last widths of both must be there, and the same"),
        ({"projector": ()}, "the last widths of both must be there, and the same"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        ByolConfig(**settings)  # type: ignore[arg-type]
