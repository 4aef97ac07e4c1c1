"""Bundles for tests, made as training makes them, but for the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.models.backbone import Backbone
from mvmr.models.student import save_student
from mvmr.models.torchvision_resnet import Resnet

SMALL = Resnet(name="resnet18_025")  # a sixteenth of the weights: most tests are not about width


def build_encoder(backbone: Backbone = SMALL, seed: int = 0) -> nn.Module:
    """An encoder that never learned anything; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return backbone.build()


def write_bundle(
    out: Path,
    encoder: nn.Module | None = None,
    backbone: Backbone = SMALL,
    *,
    preprocess: Preprocess | None = None,
    training: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Bundle:
    """A bundle in the folder `out`, of an untrained encoder for images of 16 px where none is given."""
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True)
    save_student(
        partial, encoder or build_encoder(backbone, seed), backbone,
        preprocess=preprocess or Preprocess.for_size(16), training=training or {},
    )  # fmt: skip
    bundles.publish(partial, out)
    return bundles.load(out)
