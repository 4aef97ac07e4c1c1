"""The optimisers that a recipe may name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_MOMENTUM = 0.9  # of SGD and LARS


def build_optimizer(
    name: str, module: nn.Module, *, lr: float, weight_decay: float, no_weight_decay: Collection[str], fused: bool
) -> Optimizer:
    """The optimiser of all that is trained: ``adam``, ``adamw``, ``sgd`` (momentum 0.9) or ``lars`` (the same).

    Args:
        no_weight_decay: names of parameters that weight decay leaves alone. LARS leaves alone biases and batch norms,
            too, and adapts the rate of all others (You et al. 2017; as SimCLR, BYOL and SwAV have it).
        fused: one kernel for a step, where there is one.
    """
    trained = [(key, value) for key, value in module.named_parameters() if value.requires_grad]
    exempt = {key for key, value in trained if key in no_weight_decay or (name == "lars" and value.ndim < 2)}
    groups: list[dict[str, Any]] = [{"params": [value for key, value in trained if key not in exempt]}]
    if exempt:
        groups.append({"params": [value for key, value in trained if key in exempt], "weight_decay": 0.0})
    if name == "lars":
        groups[0]["always_adapt"] = True  # else timm adapts what is decayed alone
        from timm.optim.lars import Lars  # here: timm takes a second to import

        optimizer: Optimizer = Lars(groups, lr=lr, weight_decay=weight_decay, momentum=_MOMENTUM)
        return optimizer
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay, momentum=_MOMENTUM, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, weight_decay=weight_decay, fused=fused)
