"""A classifier of torchvision's as teacher, `torchvision:NAME[:WEIGHTS|FILE]`, without its last layer."""

from __future__ import annotations

from collections.abc import Callable
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from mvmr.bundles import weights
from mvmr.distillation.teachers.teacher import NetworkTeacher, NoTextTower, TeacherGone
from mvmr.errors import MvmrError, summarise, unknown

_WITHOUT_WEIGHTS: dict[str, Any] = {"weights": None}


def load(what: str, *, device: str | torch.device, text: bool) -> NetworkTeacher:
    """Load a model by torchvision's name: its newest weights, those of a name, or those of a state-dict file.

    Images are prepared by the evaluation transform of the weights, of a file by that of the newest ones.

    Raises: MvmrError for an unknown name, weights that can't be downloaded or don't fit, a model that doesn't end in a
        linear layer, or `text`, which none has.
    """
    name, _, source = what.partition(":")
    known = models.list_models(module=models)
    if name not in known:
        raise unknown("torchvision model", name, known)
    if text:
        raise NoTextTower(f"teacher torchvision:{name} has no text tower: zero-shot takes a CLIP, such as ViT-B-16")
    published = models.get_model_weights(name)
    chosen = _choose(name, source, published)
    prepare = _Prepare((chosen or published.DEFAULT).transforms())
    network = _load(name, chosen, Path(source))
    return NetworkTeacher(
        network, prepare, kind="torchvision", what=what, name=f"torchvision:{name}",
        weights=source if chosen is None else chosen.name,
        description={"torchvision": name, "preprocessing": repr(prepare.transform)}, device=device,
    )  # fmt: skip


class _Prepare:
    """torchvision's own evaluation transform of some weights, RGB first."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image.convert("RGB"))


def _choose(name: str, source: str, published: EnumType) -> Any:
    """The published weights that are meant; None for a file."""
    if not source:
        return published.__members__["DEFAULT"]
    if source in published.__members__:
        return published.__members__[source]
    if Path(source).is_file():
        return None
    if Path(source).suffix:
        raise TeacherGone(f"weights file {source} of teacher torchvision:{name} does not exist")
    raise unknown(f"weights of torchvision's {name}", source, list(published.__members__))


def _load(name: str, chosen: Any, file: Path) -> nn.Module:
    with torch.device("meta"):
        last = _last_linear(models.get_model(name, **_WITHOUT_WEIGHTS))
    if last is None:
        raise MvmrError(f"teacher torchvision:{name} does not end in a linear layer; give a model that does")
    # the published weights of these two are for inputs that they normalise again, which torchvision asks for with them
    changed = {"transform_input": True} if chosen is None and name in ("googlenet", "inception_v3") else {}
    try:
        network = models.get_model(name, **({"weights": chosen} if chosen else _WITHOUT_WEIGHTS), **changed)
    except Exception as error:  # torch.hub and urllib each raise their own
        cure = f"fetch its weights on a machine with network and give them here: torchvision:{name}:FILE"
        raise TeacherGone(f"teacher torchvision:{name} can't be had ({summarise(error)}); {cure}") from error
    network.set_submodule(last, nn.Identity())
    if chosen is None:
        keys = network.state_dict().keys()
        state = {key: tensor for key, tensor in weights.read(file).items() if key in keys or not _below(key, last)}
        weights.fit(network, state, origin=f"{file}, as weights of torchvision:{name},")
    return network


def _last_linear(network: nn.Module) -> str | None:
    """The name of the last layer, where that is linear: auxiliary classifiers come before it."""
    leaves = [(key, module) for key, module in network.named_modules() if not any(module.children())]
    weighted = [(key, module) for key, module in leaves if any(True for _ in module.parameters())]
    key, module = weighted[-1]
    return key if isinstance(module, nn.Linear) else None


def _below(key: str, module: str) -> bool:
    return key.startswith(f"{module}.")
