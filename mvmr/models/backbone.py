"""What a student is: the contract between an architecture and the rest of the house, and the settings that name one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

TIMM = "timm:"  # before the name of one of timm's models


class Backbone(Protocol):
    """An architecture, which knows of itself what training, reports and export ask.

    name: as recipes and bundles call it; options: what else makes its weights fit, as JSON
    width: D of the features
    """

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @property
    def width(self) -> int: ...

    def build(self, sides: Collection[int] = ()) -> nn.Module:
        """The encoder, its weights drawn from torch's global generator.

        sides: S of images that it is to take in training beside its own; its weights don't depend on them

        Shapes: images [B, 3, S, S] float32, normalised -> features h [B, D] float32, not normalised.
        Raises: MvmrError for a side that it can't take.
        """
        ...

    def stages(self, encoder: nn.Module) -> nn.Module:
        """A module that shares the encoder's tensors and gives what leaves each of its stages.

        Shapes: images [B, 3, S, S] float32, normalised -> by name, in their order, [B, width of the stage], averaged
        over space. The last are the features.
        """
        ...

    def dense(self, encoder: nn.Module) -> nn.Module:
        """A module that shares the encoder's tensors and gives its features, and the map before they are pooled.

        The features are the map's mean where the encoder pools by a plain average and ends there. Where layers follow
        the pooling, the map is what the model itself has before it, and C may be another than D.

        Shapes: images [B, 3, S, S] float32, normalised -> features [B, D], map [B, h, w, C], not normalised.
        Raises: MvmrError for a model that has no such map.
        """
        ...

    def no_weight_decay(self, encoder: nn.Module) -> Collection[str]:
        """Names of the parameters that weight decay must leave alone."""
        ...

    def copy_for_export(self, encoder: nn.Module, *, dense: bool = False) -> nn.Module:
        """A copy as it is exported, on the CPU in float32: what can be folded is folded.

        dense: of what `dense` gives, features and map, in its attribute `encoder`

        Raises: MvmrError as `dense` does.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Which backbone a student is, the `[student]` table of a recipe."""

    backbone: str = "resnet50"  # resnet18, resnet18_050, resnet18_025 (half, a quarter as wide), resnet50, timm:NAME
    small_kernel: bool = False  # of a ResNet: a stem that keeps the resolution of small images (32 to 64 px)
