"""Starting an encoder from weights that are there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mvmr.bundles import weights
from mvmr.bundles.bundle import encoder_file, load
from mvmr.models.backbone import Backbone


def read_init(backbone: Backbone, source: str | Path) -> dict[str, Tensor]:
    """Weights to start a backbone's encoder from: of a bundle folder, or a torchvision or timm state-dict file.

    A classifier's keys, which the encoder lacks, are dropped; of a bundle, the hash of the weights is checked first.

    Raises: MvmrError when the source cannot be read, is of another architecture (naming keys), or holds
        a value that is not finite.
    """
    path = Path(source)
    if path.is_dir():
        origin, path = f"init {path}", encoder_file(load(path, verify=False))
    else:
        origin = f"init {path}"
    with torch.device("meta"):
        encoder = backbone.build()
    state = weights.drop_classifier(encoder, weights.read(path))
    weights.check_fit(encoder, state, origin=origin)
    return state
