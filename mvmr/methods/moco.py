"""MoCo: a view of an image finds the other among many, which a slowly moving copy of the network has encoded.

Sources: He et al., "Momentum contrast for unsupervised visual representation learning" (2020); its second version
(Chen et al., "Improved baselines with momentum contrastive learning", 2020) for projector and temperature; its third
(Chen et al., "An empirical study of training self-supervised vision transformers", 2021) for the form without a queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import PAIR, Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import first_row, gather
from mvmr.methods.parts.heads import build_projector, check_predictor
from mvmr.methods.parts.momentum import cosine_momentum, encode_in_halves, follow, make_follower
from mvmr.methods.parts.queue import Queue, check_queue


@dataclass(frozen=True, kw_only=True)
class MocoConfig(MethodConfig):
    """The second version's projector and temperature; its queue of 65,536 and its momentum are for ImageNet.

    With queue = 0 it is the third version, which both views tell in turn: of its settings for a ResNet50 are
    temperature = 1, momentum = 0.99, rising = true, projector = [4096, 4096, 256] and predictor = [4096, 256].
    """

    name: Literal["moco"] = "moco"
    queue: int = 4096  # rows of past batches; 0: the other images of the batch alone [rows, 0 or more]
    temperature: float = 0.2  # of the softmax: the lower, the sharper [above 0]
    momentum: float = 0.99  # of the slow network [0 to 1]
    rising: bool = False  # whether the momentum grows to 1 along a cosine
    projector: tuple[int, ...] = (2048, 128)  # widths of its layers [outputs, 1 or more each]
    predictor: tuple[int, ...] = ()  # widths, the last as the projector's; empty: none [outputs, 1 or more each]

    def __post_init__(self) -> None:
        if self.queue < 0:
            raise MvmrError(f"[method] queue = {self.queue}: give a number of rows, or 0 for none")
        if not self.temperature > 0:
            raise MvmrError(f"[method] temperature = {self.temperature}: must be above 0")
        if not 0 <= self.momentum <= 1:
            raise MvmrError(f"[method] momentum = {self.momentum}: must lie between 0 and 1")
        check_predictor(self.projector, self.predictor or self.projector)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return PAIR

    def check(self, batch_size: int, images: int) -> None:
        if self.queue:
            check_queue(self.queue, batch_size)


class Moco(Method):
    """Encoder, projector and predictor, the moving averages of the first two, and what these made of past batches."""

    projector: nn.Module

    def __init__(self, config: MocoConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = build_projector(setting.width, config.projector)
        self.predictor = build_projector(config.projector[-1], config.predictor)
        self.slow_encoder, self.slow_projector = make_follower(encoder), make_follower(self.projector)
        self.queue = Queue(config.queue, config.projector[-1]) if config.queue else None

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        images = [self.normalise(views[name]) for name in ("first", "second")]
        temperature = self.config.temperature
        if self.queue is None:
            h = [self.encoder(view) for view in images]
            queries = [self.predictor(self.projector(features)) for features in h]
            keys = [self._keys(view) for view in images]
            with torch.autocast(h[0].device.type, enabled=False):
                loss = in_batch_loss(queries[0], keys[1], temperature) + in_batch_loss(queries[1], keys[0], temperature)
        else:
            h = [self.encoder(images[0])]
            query, key = self.predictor(self.projector(h[0])), self._keys(images[1])
            with torch.autocast(h[0].device.type, enabled=False):
                loss = queue_loss(query, key, self.queue.entries.clone(), temperature)  # a copy, as it moves on below
            self.queue.push(gather(key))
        return Step({"info_nce": loss}, h[0], h[0].detach().float())

    def _keys(self, images: Tensor) -> Tensor:
        """Rows of norm 1 by the slow network."""
        keys = encode_in_halves(lambda half: self.slow_projector(self.slow_encoder(half)), images)
        return F.normalize(keys.float(), dim=1)

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        momentum = self.config.momentum
        if self.config.rising:
            momentum = cosine_momentum(momentum, step, steps)
        follow(self.slow_encoder, self.encoder, momentum)
        follow(self.slow_projector, self.projector, momentum)

    @torch.no_grad()
    def diagnose(self, outputs: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features: 1 is a collapse."""
        return {"rank_h": effective_rank(outputs)}


def queue_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The (K + 1)-way cross-entropy of a query that its key fits, and none of the queue (MoCo, equation 1).

    Shapes: query [B, D], key [B, D] and queue [K, D] of norm 1 -> scalar.
    """
    query = F.normalize(query.float(), dim=1)
    fitting = (query * key).sum(1, keepdim=True)
    logits = torch.cat([fitting, query @ queue.T], 1) / temperature  # [B, 1 + K]
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def in_batch_loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of a query that its key fits, and none of the other images' of all devices (MoCo v3, alg. 1).

    Times twice the temperature, as in the paper, so that gradients are of the same size for all temperatures.

    Shapes: query [B, D], key [B, D] of norm 1 -> scalar.
    """
    query, keys = F.normalize(query.float(), dim=1), gather(key)
    fitting = torch.arange(len(query), device=query.device) + first_row(len(query))
    return 2 * temperature * F.cross_entropy(query @ keys.T / temperature, fitting)
