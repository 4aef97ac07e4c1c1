"""The encoder (image -> features h), and starting it from other weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from mvmr.bundles import weights
from mvmr.bundles.bundle import encoder_file, load
from mvmr.bundles.manifest import Manifest
from mvmr.errors import unknown

_FACTORIES = {"resnet18": resnet18, "resnet50": resnet50}
_FEATURE_DIMS = {"resnet18": 512, "resnet50": 2048}
_CLASSIFIERS = ("fc.", "classifier.", "head.")


Architecture = Literal["resnet18", "resnet50"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which ResNet, and whether its stem keeps the resolution of small images (32 to 64 px)."""

    architecture: Architecture = "resnet50"
    small_kernel: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in _FACTORIES:
            raise unknown("architecture", self.architecture, _FACTORIES)


def config_of(manifest: Manifest) -> EncoderConfig:
    """What the encoder of a bundle is; raises MvmrError for an architecture that this version doesn't know."""
    return EncoderConfig(architecture=cast(Architecture, manifest.architecture), small_kernel=manifest.small_kernel)


def feature_dim(config: EncoderConfig) -> int:
    """Return the width D of the features h: 512 for resnet18, 2048 for resnet50."""
    return _FEATURE_DIMS[config.architecture]


def build_encoder(config: EncoderConfig) -> nn.Module:
    """Build torchvision's own ResNet without its classifier, so that weights travel both ways.

    The last batch norm of every residual block starts at zero: each block starts as the identity.
    With `small_kernel` the stem is a 3 x 3 convolution of stride 1 without max-pooling; all key names stay.

    Shapes:
        images: [B, 3, H, W] float32, already normalised by the bundle's preprocessing.
        returns features h: [B, D] float32, not normalised, non-negative (they leave a ReLU and an average).
    """
    encoder: nn.Module = _FACTORIES[config.architecture](weights=None, zero_init_residual=True)
    encoder.fc = nn.Identity()
    if config.small_kernel:
        stem = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        encoder.conv1 = stem
        encoder.maxpool = nn.Identity()
    return encoder


def check_state(config: EncoderConfig, state: Mapping[str, Tensor]) -> None:
    """Check that `state` are the finite weights of such an encoder, all of them; raises MvmrError naming what isn't."""
    with torch.device("meta"):
        encoder = build_encoder(config)
    kind = f"{config.architecture} (small_kernel {config.small_kernel})"
    weights.check_fit(encoder, state, origin=f"encoder weights for {kind}")


def load_init(encoder: nn.Module, source: str | Path) -> None:
    """Start `encoder` from a bundle folder, or from a torchvision or timm state-dict file.

    A classifier's keys are dropped; of a bundle, the hash of the weights is checked first. Nothing is loaded
    when anything does not fit.

    Raises: MvmrError when the source cannot be read, is of another architecture (naming keys), or holds
        a value that is not finite.
    """
    path = Path(source)
    if path.is_dir():
        origin, path = f"init {path}", encoder_file(load(path, verify=False))
    else:
        origin = f"init {path}"
    state = weights.read(path)
    weights.fit(encoder, {k: v for k, v in state.items() if not k.startswith(_CLASSIFIERS)}, origin=origin)
