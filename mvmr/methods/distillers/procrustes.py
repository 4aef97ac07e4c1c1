"""Procrustes: the batch of features is a turned copy of the batch of embeddings; the best turn is found in each step.

    L = min over R of |H R - T|^2 = 2 - 2 |H'T|_*,   R'R = 1, H and T the batches, centred and of Frobenius norm 1

with |.|_* the nuclear norm, the sum of singular values.

Source: "Knowledge distillation through geometry-aware representational alignment" (arXiv 2509.25253, 2025); the
distance is that of Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.relations import centre
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class ProcrustesConfig(DistillerConfig):
    """No settings beside those of every distiller."""

    name: Literal["procrustes"] = "procrustes"

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Procrustes()


class Procrustes(nn.Module):
    """From 0, for a scaled, turned or shifted copy, to 2; nothing in it is trained."""

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        mine, theirs = _unit(h), _unit(target)
        if not mine.isfinite().all():  # an SVD would raise, and the trainer has a sentence for such a loss
            return mine.sum() * torch.nan
        # The nuclear norm is <H'T, UV'>, whose gradient is that with the turn UV' held: no gradient of an SVD is taken.
        turned = _turn(mine.detach(), theirs.detach())
        return 2 - 2 * (mine * turned).sum()


def _unit(x: Tensor) -> Tensor:
    centred = centre(x)
    return centred / centred.norm().clamp(min=torch.finfo(x.dtype).tiny)


def _turn(h: Tensor, target: Tensor) -> Tensor:
    """The target turned onto h, [B, D]: T V U' of H'T = U S V', by matrices no larger than the batch."""
    q, r = torch.linalg.qr(h.T)  # [D, m], [m, B]
    s = torch.linalg.qr(target.T, mode="r").R  # [n, B]
    u, values, vh = torch.linalg.svd(r @ s.T, full_matrices=False)
    # directions of no length, such as the mean's, have no turn
    u = u * (values > torch.finfo(values.dtype).eps * max(r.shape) * values[:1])
    turned: Tensor = s.T @ vh.T @ u.T @ q.T
    return turned
