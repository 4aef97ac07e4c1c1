"""Starting an encoder from weights that are there."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import get_model_weights, list_models

from mvmr.bundles import weights
from mvmr.bundles.bundle import encoder_file, load
from mvmr.errors import MvmrError, unknown
from mvmr.models.backbone import Backbone

_PUBLISHED = "torchvision:"


def read_init(backbone: Backbone, source: str | Path) -> dict[str, Tensor]:
    """Weights to start a backbone's encoder from.

    source: a bundle folder; a torchvision or timm state-dict file; or ``torchvision:IMAGENET1K_V2``, published weights
        of the backbone that torchvision has downloaded before (``torchvision:DEFAULT``: the newest).

    A classifier's keys, which the encoder lacks, are dropped; of a bundle, the hash of the weights is checked first.

    Raises: MvmrError when the source cannot be read, is of another architecture (naming keys), or holds
        a value that is not finite.
    """
    path = _published(backbone, str(source)) if str(source).startswith(_PUBLISHED) else Path(source)
    if path.is_dir():
        origin, path = f"init {path}", encoder_file(load(path, verify=False))
    else:
        origin = f"init {path}"
    with torch.device("meta"):
        encoder = backbone.build()
    state = weights.drop_classifier(encoder, weights.read(path))
    weights.check_fit(encoder, state, origin=origin)
    return state


def _published(backbone: Backbone, source: str) -> Path:
    """The file in torch's cache of published weights."""
    if backbone.name not in list_models():
        raise MvmrError(f"init {source}: torchvision has no weights for {backbone.name}; give a state-dict file")
    known, tag = get_model_weights(backbone.name).__members__, source.removeprefix(_PUBLISHED)
    if tag not in known:
        raise unknown(f"weights of torchvision's {backbone.name}", tag, known)
    url = known[tag].url
    file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not file.is_file():
        raise MvmrError(f"init {source}: {file} is not there; download it once: {url}")
    return file
