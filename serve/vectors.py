"""Vectors of length 1: how they are made, and what names their space."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def unit(vectors: Floats) -> Floats:
    """Vectors of length 1, float32 [n, D], of finite ones of any length; a vector of zeros stays one."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)  # whose square may be more than float32 holds
    with np.errstate(invalid="ignore"):  # an infinite one becomes NaN, which whoever keeps vectors refuses
        scaled = (vectors / np.where(largest > 0, largest, 1)).astype(np.float32, copy=False)
    return np.ascontiguousarray(scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1), np.float32)


def normalized_space(space_id: str) -> str:
    """32 hex digits that name the space of normalised vectors, of the id of the space that they were normalised from.

    The two have ids of their own because a distance or an inner product between a raw and a normalised vector means
    nothing.
    """
    return hashlib.sha256(f"{space_id} normalized".encode()).hexdigest()[:32]
