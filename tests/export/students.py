"""Students to export."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images
from mvmr.models.torchvision_resnet import Resnet
from tests.making import SMALL

PATCHES = {"data": {"name": "sample:patches", "split": "unlabelled"}}


def patches(count: int, size: int = 32) -> np.ndarray:
    images = open_images("sample:patches", "test")
    numbers = np.random.default_rng(0).permutation(len(images))[:count]
    return Preprocess.for_size(size).batch(images.load(int(index)) for index in numbers)


def a_bundle(
    out: Path,
    *,
    seed: int = 0,
    size: int = 32,
    backbone: str = SMALL.name,
    training: Mapping[str, Any] = PATCHES,
    change: Callable[[nn.Module], None] = lambda encoder: None,
) -> Path:
    """An encoder whose batch norms have seen real images."""
    config, preprocess = Resnet(name=backbone), Preprocess.for_size(size)
    encoder = config.build()
    generator = torch.Generator().manual_seed(seed)
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, generator=generator)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.2, 0.5, generator=generator)
            part.momentum = None
    with torch.no_grad():
        encoder.train()(torch.from_numpy(preprocess.normalise(patches(32 if size < 100 else 8, size))))
        change(encoder)
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True)
    bundles.write(
        partial, backbone=backbone, options=config.options, embedding_dim=config.width, preprocessing=preprocess,
        training=training, encoder_state=encoder.state_dict(),
    )  # fmt: skip
    bundles.publish(partial, out)
    return out
