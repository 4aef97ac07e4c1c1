"""Any of timm's models that pools to a vector, without its classifier; weights travel both ways."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from mvmr.errors import MvmrError, one_line, unknown
from mvmr.models.backbone import TIMM
from mvmr.models.folding import fold_batch_norm, plain_copy


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A model by the name that timm gives it, for images of one size.

    name: with ``timm:`` before it; image_size: side S in pixels, of which the weights of some models depend

    Raises: MvmrError for a name that timm doesn't know, a model that does not take such images, or gives no vector.
    """

    name: str
    image_size: int

    def __post_init__(self) -> None:
        _width(self.name, self.image_size)

    @property
    def options(self) -> Mapping[str, Any]:
        """fixed: whether the weights are for images of this size alone."""
        return {"image_size": self.image_size, "fixed": _is_fixed(self.name)}

    @property
    def width(self) -> int:
        return _width(self.name, self.image_size)

    def build(self, sides: Collection[int] = ()) -> nn.Module:
        others = tuple(sorted(set(sides) - {self.image_size}))
        if not (others and _is_fixed(self.name)):
            return _create(self.name, self.image_size)
        _check_sides(self.name, self.image_size, others)
        return _create(self.name, self.image_size, dynamic_img_size=True)

    def stages(self, encoder: nn.Module) -> nn.Module:
        return _Stages(encoder)

    def no_weight_decay(self, encoder: nn.Module) -> Collection[str]:
        """Norms and biases, as timm's own training has it, and what a model names itself: positions, tokens."""
        ask: Any = getattr(encoder, "no_weight_decay", set)
        names = ask()
        return {name for name, value in encoder.named_parameters() if value.ndim <= 1 or name in names}

    def copy_for_export(self, encoder: nn.Module) -> nn.Module:
        network = plain_copy(encoder)
        if not any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
            return network
        _part_activations(network)
        return fold_batch_norm(network)


def _part_activations(module: nn.Module) -> None:
    """Put a plain batch norm and its activation in the place of timm's layer that is both: only it can be folded."""
    for name, part in list(module.named_children()):
        if isinstance(part, BatchNormAct2d):
            norm = nn.BatchNorm2d(part.num_features, part.eps)
            norm.load_state_dict(part.state_dict())
            setattr(module, name, nn.Sequential(norm.eval().requires_grad_(False), part.drop, part.act))
        else:
            _part_activations(part)


class _Stages(nn.Module):
    """What timm calls intermediates, of a transformer its blocks, and the features."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        intermediates: Any = getattr(self.encoder, "forward_intermediates", None)
        if intermediates is None:
            return {"features": self.encoder(images)}
        last, maps = intermediates(images)
        stages = {f"stage{number}": activation.mean((-2, -1)) for number, activation in enumerate(maps, 1)}
        head: Any = self.encoder.forward_head
        return stages | {"features": head(last)}


def _create(name: str, size: int, **more: Any) -> nn.Module:
    model = name.removeprefix(TIMM)
    if model not in timm.list_models():
        raise unknown("timm model", model, timm.list_models())
    options: dict[str, Any] = {"img_size": size, **more} if _is_fixed(name) else more
    try:
        encoder: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # a dozen authors, as many habits
        raise MvmrError(f"{name} can't be built for images of {size} px ({one_line(error)}); {_CURE}") from error
    return encoder


def _is_fixed(name: str) -> bool:
    config = timm.models.get_pretrained_cfg(name.removeprefix(TIMM), allow_unregistered=True)
    return bool(getattr(config, "fixed_input_size", False))


_CURE = "give another --size, or another model"


@lru_cache
def _check_sides(name: str, size: int, sides: tuple[int, ...]) -> None:
    """Whether a model for images of one size takes others, by interpolating its positions; nothing is computed."""
    try:
        with torch.device("meta"):
            encoder = _create(name, size, dynamic_img_size=True).eval()
            for side in sides:
                encoder(torch.empty(2, 3, side, side))
    except Exception as error:  # as above
        raise MvmrError(
            f"{name} for images of {size} px does not take views of {', '.join(map(str, sides))} px "
            f"({one_line(error)}); give [method] local_scale = 1, or one that makes them fit its patches"
        ) from error


@lru_cache
def _width(name: str, size: int) -> int:
    """Of the features; found out without computing anything."""
    with torch.device("meta"):
        encoder = _create(name, size).eval()
        try:
            features = encoder(torch.empty(2, 3, size, size))
        except Exception as error:  # as above
            raise MvmrError(f"{name} does not take images of {size} px ({one_line(error)}); {_CURE}") from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        seen = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise MvmrError(f"{name} gives {seen} for two images, no vector each; take a model that pools")
    return int(features.shape[1])
