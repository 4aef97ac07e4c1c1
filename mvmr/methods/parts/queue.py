"""A queue of rows of past batches: a dictionary larger than a batch, of which nothing gets a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError


class Queue(nn.Module):
    """The newest `length` rows, each of norm 1; at first random ones, so that it is full from the start.

    Source: He et al., "Momentum contrast for unsupervised visual representation learning" (2020), algorithm 1.
    """

    entries: Tensor  # [length, width]
    place: Tensor  # where the next row goes

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("entries", F.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put rows in the place of the oldest; [B, width] of norm 1, B at most its length."""
        length = len(self.entries)
        places = (self.place + torch.arange(len(rows), device=rows.device)) % length
        self.entries[places] = rows.to(self.entries.dtype)
        self.place.copy_((self.place + len(rows)) % length)


def check_queue(length: int, batch_size: int) -> None:
    """Refuse a queue that a batch, over all devices, would overrun.

    Raises: MvmrError, with both numbers.
    """
    if length < batch_size:
        raise MvmrError(
            f"[method] queue = {length} holds less than a batch of {batch_size} images: give {batch_size} rows or more"
        )
