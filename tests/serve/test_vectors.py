"""Vectors are normalised as NumPy does it in float64, and are of a space of their own then."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mvmr.errors import MvmrError
from mvmr.serve import Engine
from mvmr.serve.vectors import normalized_space, unit
from tests.serve.inprocess import PHOTOGRAPHS, embeddings_of
from tests.serve.serving import DIM, jpeg


def normalize_by_hand(vectors: np.ndarray) -> np.ndarray:
    """The oracle: each row by its length in float64; rows of zeros stay."""
    wide = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e37])
def test_any_vector_becomes_one_of_length_one(size: float) -> None:
    vectors = (np.random.default_rng(0).normal(size=(50, 300)) * size).astype(np.float32)
    result = unit(vectors)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, normalize_by_hand(vectors), atol=1e-7)


def test_zeros_stay_zeros_and_none_are_no_fault() -> None:
    vectors = np.array([[0, 0, 0], [0, -2, 0]], np.float32)
    np.testing.assert_array_equal(unit(vectors), [[0, 0, 0], [0, -1, 0]])
    assert unit(np.empty((0, 3), np.float32)).shape == (0, 3)


def test_what_is_not_finite_does_not_become_finite() -> None:
    vectors = np.array([[np.inf, 1], [np.nan, 1]], np.float32)
    assert not np.isfinite(unit(vectors)).all(axis=1).any()


def test_an_id_is_that_of_raw_vectors_or_of_normalised_ones() -> None:
    first, second = "a" * 32, "b" * 32
    spaces = [first, second, normalized_space(first), normalized_space(second)]
    assert len(set(spaces)) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", space) for space in spaces)


def test_the_engine_normalises_when_asked(engine: Engine) -> None:
    images = [jpeg(name) for name in PHOTOGRAPHS]
    wanted = embeddings_of(*PHOTOGRAPHS)
    np.testing.assert_allclose(engine.embed(images), wanted, atol=1e-5)
    np.testing.assert_allclose(engine.embed(images, normalize=True), normalize_by_hand(wanted), atol=1e-6)
    assert engine.embed([], normalize=True).shape == (0, DIM)
    assert engine.space_of(normalize=False) == engine.space_id
    assert engine.space_of(normalize=True) == normalized_space(engine.space_id)
    with pytest.raises(MvmrError, match="normalize is for embeddings"):
        engine.embed(images, normalize=True, dense=True)
