"""What a report looks into besides the features: the student's stages, and an encoder that never learned anything."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet
from mvmr.models.encoder import build_encoder, config_of
from mvmr.models.student import Student
from mvmr.training.pretraining import recalibrate

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
_BATCH = 64


class Stages(nn.Module):
    """A ResNet that gives what leaves each of its stages, averaged over space; shares the encoder's tensors.

    Shapes:
        images: [B, 3, H, W] float32, normalised -> [B, sum of the stages' widths] float32, in the order of `STAGES`;
        the last columns, of layer4, are the features h.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        nodes = {"maxpool" if name == "stem" else name: name for name in STAGES}
        self.stages = create_feature_extractor(encoder, nodes)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.averages(images), dim=1)

    def averages(self, images: Tensor) -> list[Tensor]:
        """One [B, width] to a stage."""
        return [F.adaptive_avg_pool2d(each, 1).flatten(1) for each in self.stages(images).values()]


def stages_of(student: Student) -> tuple[Student, tuple[int, ...]]:
    """The student's stages as one representation, computed in one pass, and the width of each; see :func:`split`.

    The student itself stays as it is.
    """
    module = Stages(student.encoder).eval()
    blank = torch.zeros(1, 3, student.preprocess.crop, student.preprocess.crop, device=student.device)
    with torch.no_grad():
        widths = tuple(each.shape[1] for each in module.averages(blank))
    identity = hashlib.sha256(f"stages of {student.identity}".encode()).hexdigest()
    stages = Student(module, student.preprocess, dim=sum(widths), name=f"{student.name}-stages", identity=identity)
    return stages, widths


def split(rows: np.ndarray, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Rows of :func:`stages_of` by stage: [N, sum(widths)] -> name -> [N, width]."""
    parts = np.split(rows, np.cumsum(widths)[:-1], axis=1)
    return {name: np.ascontiguousarray(part) for name, part in zip(STAGES, parts, strict=True)}


def untrained(bundle: Bundle, images: ImageSet, *, device: str = "cpu", workers: int = 0, seed: int = 0) -> Student:
    """An encoder like the bundle's before its first step, its batch-norm statistics set on ``images``.

    The global random state is left alone.
    """
    says = bundle.manifest
    config = config_of(says)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(config).to(device).requires_grad_(False)
    recalibrate(encoder, images, says.preprocessing, batch_size=_BATCH, workers=workers, device=torch.device(device))
    described = repr((config, says.preprocessing, seed, _BATCH, images.fingerprint))
    identity = hashlib.sha256(described.encode()).hexdigest()
    return Student(
        encoder, says.preprocessing, dim=says.embedding_dim, name=f"untrained-{says.architecture}", identity=identity
    )
