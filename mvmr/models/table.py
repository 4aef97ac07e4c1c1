"""The backbones, by the name that recipes, `--student` and bundles call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvmr.bundles.manifest import Manifest
from mvmr.errors import MvmrError, missing_extra, unknown
from mvmr.models import torchvision_resnet
from mvmr.models.backbone import TIMM, Backbone, StudentConfig
from mvmr.models.torchvision_resnet import Resnet


def open_backbone(config: StudentConfig, size: int) -> Backbone:
    """The backbone of a recipe's `[student]` table, for images of `size` px.

    Raises: MvmrError for one that there is not, or that can't be as asked.
    """
    if config.backbone in torchvision_resnet.NAMES:
        return Resnet(name=config.backbone, small_kernel=config.small_kernel)
    if not config.backbone.startswith(TIMM):
        raise _unknown_student(config.backbone)
    if config.small_kernel:
        raise MvmrError(f"[student] small_kernel is of ResNets, not of {config.backbone}: leave it out")
    return _timm(config.backbone, size)


def backbone_of(manifest: Manifest) -> Backbone:
    """The backbone of a bundle's student.

    Raises: MvmrError for one that this version doesn't know, or whose width is another than the manifest's.
    """
    name, options = manifest.backbone, manifest.options
    backbone: Backbone
    if name in torchvision_resnet.NAMES:
        backbone = Resnet(name=name, small_kernel=_option(name, options, "small_kernel", bool))
    elif name.startswith(TIMM):
        size = _option(name, options, "image_size", int)
        if size != manifest.preprocessing.crop:
            raise MvmrError(
                f"{name} is for images of {size} px, but the preprocessing gives {manifest.preprocessing.crop}"
            )
        backbone = _timm(name, size)
    else:
        raise _unknown_student(name)
    if manifest.embedding_dim != backbone.width:
        raise MvmrError(f"embedding_dim = {manifest.embedding_dim}, but {name} has {backbone.width} features")
    return backbone


def _unknown_student(name: str) -> MvmrError:
    return unknown("student", name, (*torchvision_resnet.NAMES, f"{TIMM}NAME"))


def _timm(name: str, size: int) -> Backbone:
    try:
        from mvmr.models.timm_model import TimmModel  # timm takes its time to import
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from error
    return TimmModel(name=name, image_size=size)


def _option(name: str, options: Mapping[str, Any], key: str, kind: type) -> Any:
    value = options.get(key)
    if type(value) is not kind:
        raise MvmrError(f"student {name} with {key} = {value!r}: it must be of type {kind.__name__}")
    return value
