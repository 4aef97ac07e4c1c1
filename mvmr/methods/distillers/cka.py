"""CKA: batches of features and embeddings have the same Gram matrix, but for its scale; nothing is mapped.

    L = 1 - <K, L> / (|K| |L|),   K and L the Gram matrices of the centred batches

Sources: Kornblith et al., "Similarity of neural network representations revisited" (2019), equation 4, with the linear
kernel; as a loss Zhou et al., "Rethinking centered kernel alignment in knowledge distillation" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.relations import centre
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class CkaConfig(DistillerConfig):
    """No settings beside those of every distiller."""

    name: Literal["cka"] = "cka"

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Cka()


class Cka(nn.Module):
    """0 for a scaled, turned or shifted copy; nothing in it is trained."""

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(_gram(h), _gram(target), dim=0)


def _gram(x: Tensor) -> Tensor:
    centred = centre(x)
    norm = torch.linalg.vector_norm(centred)  # else very small features vanish in the smallest denominator allowed
    centred = centred / torch.where(norm == 0, torch.ones_like(norm), norm)
    return (centred @ centred.T).flatten()
