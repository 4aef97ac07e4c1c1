"""Rows of all devices, so that a loss over the batch is one over the global batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, keeping gradients, so that N ranks of B compute the loss of one rank of N * B.

    The backward pass sums over ranks and DDP averages over them: together exactly the gradient of the global batch.
    """
    if world_size() == 1:
        return x
    rows: Tensor = _Gather.apply(x)
    return rows


def first_row(count: int) -> int:
    """Where this rank's `count` rows begin among those that `gather` gives."""
    return distributed.get_rank() * count if distributed.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())
        ]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]
