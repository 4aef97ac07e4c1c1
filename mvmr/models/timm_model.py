"""Any of timm's models that pools to a vector, without its classifier; weights travel both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
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

    def dense(self, encoder: nn.Module) -> nn.Module:
        """What timm calls `forward_features`, of images of this size: a map, or the tokens of the patches.

        As the model leaves it: with the norm that it applies before pooling, without the layers that it has behind.
        """
        return _Dense(encoder, _layout(self.name, self.image_size))

    def no_weight_decay(self, encoder: nn.Module) -> Collection[str]:
        """Norms and biases, as timm's own training has it, and what a model names itself: positions, tokens."""
        ask: Any = getattr(encoder, "no_weight_decay", set)
        names = ask()
        return {name for name, value in encoder.named_parameters() if value.ndim <= 1 or name in names}

    def copy_for_export(self, encoder: nn.Module, *, dense: bool = False) -> nn.Module:
        network = plain_copy(encoder)
        network = self.dense(network) if dense else network
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


class _Dense(nn.Module):
    """timm's own forward pass, which gives the map on its way, too."""

    def __init__(self, encoder: nn.Module, lay_out: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.lay_out = encoder, lay_out

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = self.encoder
        unpooled = network.forward_features(images)
        return network.forward_head(unpooled), self.lay_out(unpooled)


def _from_channels_first(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1)


def _from_channels_last(maps: Tensor) -> Tensor:
    return maps


def _from_tokens(tokens: Tensor, *, prefix: int, height: int, width: int) -> Tensor:
    """[B, prefix + h w, C], row by row after the tokens that are no patch's -> [B, h, w, C]."""
    return tokens[:, prefix:].unflatten(1, (height, width))


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


@lru_cache
def _layout(name: str, size: int) -> Callable[[Tensor], Tensor]:
    """What makes a map [B, h, w, C] of a model's unpooled output; found out without computing anything."""
    with torch.device("meta"):
        encoder: Any = _create(name, size).eval()
        images = torch.empty(2, 3, size, size)
        try:
            unpooled = encoder.forward_features(images)
            if isinstance(unpooled, Tensor) and unpooled.ndim == 4:
                last_axis = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
                return _from_channels_last if last_axis else _from_channels_first
            # Tokens: one to a patch if, but for the prefix, they are as many as on timm's grid of the last block
            *_, height, width = encoder.forward_intermediates(images)[1][-1].shape
            prefix = getattr(encoder, "num_prefix_tokens", 0)
            if isinstance(unpooled, Tensor) and unpooled.shape[1] == prefix + height * width:
                return partial(_from_tokens, prefix=prefix, height=height, width=width)
            seen = list(unpooled.shape) if isinstance(unpooled, Tensor) else f"a {type(unpooled).__name__}"
            reason = f"timm's forward_features gives {seen} of two images"
        except Exception as error:  # as above
            reason = one_line(error)
    raise MvmrError(f"{name} has no one map of features before it pools ({reason}); leave out dense, or take another")
