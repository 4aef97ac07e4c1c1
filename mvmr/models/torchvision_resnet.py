"""torchvision's own ResNets without their classifier, so that weights travel both ways; and narrower ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

from mvmr.models.folding import fold_batch_norm, plain_copy


class _NarrowResnet18(ResNet):
    """A ResNet18 whose layers all have the same share of its channels."""

    inplanes: int  # torchvision's own name for the channels of the layer before
    bn1: nn.BatchNorm2d

    def __init__(self, share: float, *, zero_init_residual: bool) -> None:
        self.share = share
        super().__init__(BasicBlock, [2, 2, 2, 2], zero_init_residual=zero_init_residual)
        self.conv1 = nn.Conv2d(3, self.bn1.num_features, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == self.inplanes:  # the first layer, made just after a stem of full width
            self.inplanes = round(planes * self.share)
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        return super()._make_layer(block, round(planes * self.share), blocks, stride, dilate)


_FACTORIES: dict[str, Callable[..., ResNet]] = {
    "resnet18": partial(resnet18, weights=None),
    "resnet18_050": partial(_NarrowResnet18, 0.5),
    "resnet18_025": partial(_NarrowResnet18, 0.25),
    "resnet50": partial(resnet50, weights=None),
}
_WIDTHS = {"resnet18": 512, "resnet18_050": 256, "resnet18_025": 128, "resnet50": 2048}
_STAGES = {"maxpool": "stem", "layer1": "layer1", "layer2": "layer2", "layer3": "layer3", "layer4": "layer4"}

NAMES = tuple(_FACTORIES)


@dataclass(frozen=True, kw_only=True)
class Resnet:
    """A ResNet; the last batch norm of every residual block starts at zero: each block starts as the identity.

    name: `resnet18_025` has a quarter of a ResNet18's channels in every layer

    With `small_kernel` the stem is a 3 x 3 convolution of stride 1 without max-pooling; all key names stay.
    Features are non-negative: they leave a ReLU and an average.
    """

    name: str
    small_kernel: bool = False

    @property
    def options(self) -> Mapping[str, Any]:
        return {"small_kernel": self.small_kernel}

    @property
    def width(self) -> int:
        """512 for resnet18, or its share of them; 2048 for resnet50."""
        return _WIDTHS[self.name]

    def build(self, sides: Collection[int] = ()) -> nn.Module:
        encoder = _FACTORIES[self.name](zero_init_residual=True)
        encoder.fc = nn.Identity()
        if self.small_kernel:
            stem = nn.Conv2d(3, encoder.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
            encoder.conv1 = stem
            encoder.maxpool = nn.Identity()
        return encoder

    def stages(self, encoder: nn.Module) -> nn.Module:
        return _Stages(encoder)

    def dense(self, encoder: nn.Module) -> nn.Module:
        """What `layer4` gives, of which the features are the mean: C = D."""
        return _Dense(encoder)

    def no_weight_decay(self, encoder: nn.Module) -> Collection[str]:
        """None: the paper decays batch norms, too."""
        return ()

    def copy_for_export(self, encoder: nn.Module, *, dense: bool = False) -> nn.Module:
        network = plain_copy(encoder)
        network.avgpool = _SpatialMean()
        return fold_batch_norm(self.dense(network) if dense else network)


class _Stages(nn.Module):
    """The stem and the four layers, of which the last gives the features."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.extractor = create_feature_extractor(encoder, _STAGES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.extractor(images)
        return {name: F.adaptive_avg_pool2d(activation, 1).flatten(1) for name, activation in maps.items()}


class _Dense(nn.Module):
    """torchvision's own forward pass, which gives the map on its way, too."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = self.encoder
        stem = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        maps = network.layer4(network.layer3(network.layer2(network.layer1(stem))))
        return network.fc(network.avgpool(maps).flatten(1)), maps.permute(0, 2, 3, 1)


class _SpatialMean(nn.Module):
    """The average pool of a ResNet as one mean: torch exports its own, and the flattening after it, as eleven nodes."""

    def forward(self, maps: Tensor) -> Tensor:
        """[N, D, h, w] -> [N, D]."""
        return torch.mean(maps, (-2, -1))
