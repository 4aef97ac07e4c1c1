"""A model of timm's as teacher, `timm:NAME[:FILE]`, with the preprocessing of its weights."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from mvmr.bundles import weights
from mvmr.distillation.teachers.teacher import NetworkTeacher, NoTextTower, TeacherGone
from mvmr.errors import summarise, unknown


class _Prepare:
    """timm's own evaluation transform of a model, RGB first."""

    def __init__(self, network: nn.Module) -> None:
        self.config = resolve_model_data_config(network)
        self.transform = create_transform(**self.config, is_training=False)

    def __call__(self, image: Image.Image) -> Tensor:
        prepared: Tensor = self.transform(image.convert("RGB"))
        return prepared


def load(what: str, *, device: str | torch.device, text: bool) -> NetworkTeacher:
    """Load a model by timm's name, or name and tag: its published weights, or those of a state-dict file.

    Raises: MvmrError for an unknown name, weights that can't be downloaded or don't fit, a model that gives no vector
        for an image, or `text`, which none has.
    """
    name, _, file = what.partition(":")
    architecture = name.partition(".")[0]
    if architecture not in timm.list_models():
        raise unknown("timm model", architecture, timm.list_models())
    if text:
        raise NoTextTower(f"teacher timm:{name} has no text tower: zero-shot takes a CLIP, such as ViT-B-16")
    if file and not Path(file).is_file():
        raise TeacherGone(f"weights file {file} of teacher timm:{name} does not exist")
    try:
        network: nn.Module = timm.create_model(name, pretrained=not file, num_classes=0)
    except Exception as error:  # timm, huggingface_hub and urllib each raise their own
        cure = f"fetch its weights on a machine with network and give them here: timm:{name}:FILE"
        raise TeacherGone(f"teacher timm:{name} can't be had ({summarise(error)}); {cure}") from error
    if file:
        state = weights.drop_classifier(network, weights.read(Path(file)))
        weights.fit(network, state, origin=f"{file}, as weights of timm:{name},")
    prepare = _Prepare(network)
    return NetworkTeacher(
        network, prepare, kind="timm", what=what, name=f"timm:{name}", weights=file or "timm's own",
        description={"timm": name, "preprocessing": prepare.config}, device=device,
    )  # fmt: skip
