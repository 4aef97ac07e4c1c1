"""What tests of maps to a teacher's space share: features, and what is refused about them."""

from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from mvmr.distillation.zeroshot import SpaceMap
from mvmr.errors import MvmrError

WIDTH = 128  # of tests.making.SMALL


def rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Features that are correlated, of unequal scale and far from the origin; the last one is dead."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(count, width)) / np.arange(1, width + 1)
    mixed = factors @ rng.normal(size=(width, width)) * rng.uniform(0.01, 5, width)
    mixed += rng.normal(size=width) * 10
    mixed[:, -1] = 0.1
    return mixed.astype(np.float32)


def noisy_targets(features: np.ndarray, width: int = 6, noise: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(1)
    standard = StandardScaler().fit_transform(features)
    targets = standard @ rng.normal(size=(features.shape[1], width)) / np.sqrt(features.shape[1])
    return (targets + noise * rng.normal(size=targets.shape) + 1.5).astype(np.float32) * 7


def a_map(outputs: int = 12, inputs: int = WIDTH, value: float = 1.0) -> SpaceMap:
    weight = np.random.default_rng(0).normal(size=(outputs, inputs)).astype(np.float32) * np.float32(value)
    return SpaceMap(weight=weight, bias=np.ones(outputs, np.float32), strength=0.1, r2=0.5)


def refusal(function: Any, *args: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        function(*args)
    message = str(excinfo.value)
    assert "\n" not in message
    return message
