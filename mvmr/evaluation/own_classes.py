"""The classes that a method has found without labels, and tells by the projector it leaves in the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from mvmr.bundles import weights
from mvmr.bundles.bundle import PROJECTOR, Bundle
from mvmr.config import parse
from mvmr.methods.method import Setting
from mvmr.methods.table import CONFIGS, build_method

Classify = Callable[[np.ndarray], np.ndarray]


def own_classes(bundle: Bundle) -> Classify | None:
    """What gives features [N, D] float32 their classes, int64 [N]; None where the bundle's method has found none.

    Raises: MvmrError: the projector is damaged, or not of the method that the bundle names.
    """
    recipe = bundle.manifest.training.get("recipe")
    settings = recipe.get("method") if isinstance(recipe, Mapping) else None
    if not isinstance(settings, Mapping):
        return None
    kind = CONFIGS.get(str(settings.get("name")))
    if kind is None or not kind.has_classes or PROJECTOR not in bundle.manifest.files:
        return None
    origin = f"bundle {bundle.path}, {PROJECTOR},"
    config = parse(kind, settings, where=origin)
    setting = Setting(bundle.manifest.embedding_dim, bundle.manifest.preprocessing, 1, {})
    with torch.random.fork_rng(devices=[]):
        projector = build_method(config, nn.Identity(), setting).projector
    assert projector is not None
    weights.fit(projector, weights.read(bundle.file(PROJECTOR)), origin=origin)
    projector.eval()

    def classify(features: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = projector(torch.tensor(features))
        return np.asarray(logits.argmax(1).numpy())

    return classify
