"""SimCLR's loss against its definition, written out in double precision."""

import math

import numpy as np
import pytest
import torch

from mvmr.errors import MvmrError
from mvmr.methods.simclr import SimclrConfig, nt_xent


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_equation_1_over_both_views(temperature: float) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 7, 5))
    rows = np.concatenate([first, second])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    total = 0.0
    for i in range(14):
        similarities = [math.exp(float(rows[i] @ rows[k]) / temperature) for k in range(14)]
        partner = similarities[(i + 7) % 14]
        total -= math.log(partner / (sum(similarities) - similarities[i]))
    loss = nt_xent(torch.tensor(first).float(), torch.tensor(second).float(), temperature)
    assert float(loss) == pytest.approx(total / 14, rel=1e-5)


def test_views_that_agree_and_differ_from_all_others_cost_nothing() -> None:
    rows = torch.eye(6)
    assert float(nt_xent(rows, rows, 0.01)) < 1e-6
    assert float(nt_xent(rows, rows.roll(1, 0), 0.01)) > 50


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(MvmrError, match=r"temperature = 0\.0: must be above 0"):
        SimclrConfig(temperature=0.0)
