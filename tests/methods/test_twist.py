"""TWIST's terms in double precision, the assignment that is their minimum, and its projector's batch norm."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.method import Setting
from mvmr.methods.twist import Twist, TwistConfig, twin_terms


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(-1)


def total(first: torch.Tensor, second: torch.Tensor) -> float:
    consistency, sharpness, diversity = twin_terms([first, second], 2)
    return float(consistency + sharpness - diversity)


def test_the_terms_are_divergence_entropy_and_entropy_of_the_mean() -> None:
    first, second = np.random.default_rng(0).normal(0, 2, size=(2, 7, 5))
    p, q = softmax(first), softmax(second)
    expected = (
        ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)).mean() / 2,
        (entropy(p).mean() + entropy(q).mean()) / 2,
        (entropy(p.mean(0)) + entropy(q.mean(0))) / 2,
    )
    terms = twin_terms([torch.tensor(first).float(), torch.tensor(second).float()], 2)
    assert [float(term) for term in terms] == pytest.approx(expected, rel=1e-5)


def test_a_sharp_assignment_to_all_classes_alike_is_the_minimum() -> None:
    sure = 60 * torch.eye(5).repeat(4, 1)
    assert total(sure, sure) == pytest.approx(-math.log(5), abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    others = {
        "all of one class": torch.zeros(20, 5) + 60 * torch.eye(5)[0],
        "unsure": torch.zeros(20, 5),
        "uneven": 60 * torch.eye(5)[torch.tensor([0] * 12 + [1] * 4 + [2] * 4)],
        "random": torch.randn(20, 5, generator=generator),
    }
    for name, logits in others.items():
        assert total(logits, logits) > -math.log(5) + 0.1, name
    assert total(sure, sure.roll(1, 0)) > 10  # sure, and of different classes


def test_a_batch_norm_stands_before_the_softmax() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    twist = Twist(TwistConfig(classes=4, hidden=(5,), local=0), encoder, Setting(6, Preprocess.for_size(8), 20, {}))
    images = torch.randint(0, 256, (2, 50, 3, 8, 8), dtype=torch.uint8)
    step = twist({"global0": images[0], "global1": images[1]}, {})
    logits = step.outputs[1]
    assert logits.shape == (50, 4)
    torch.testing.assert_close(logits.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.std(0, unbiased=False), torch.ones(4), atol=1e-2, rtol=0)
    assert step.losses.keys() == {"consistency", "sharpness", "diversity"}


def test_settings_that_can_not_be() -> None:
    with pytest.raises(MvmrError, match="classes = 1: give 2 or more"):
        TwistConfig(classes=1)
    with pytest.raises(MvmrError, match=r"sharpness = -1\.0: a weight must be 0 or more"):
        TwistConfig(sharpness=-1.0)
    with pytest.raises(MvmrError, match="classes = 4096, of 1360 images: give 1360 or fewer"):
        TwistConfig(classes=4096).check(64, 1360)
