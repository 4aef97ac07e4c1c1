"""What a report looks into besides the features: the student's stages, and an encoder that never learned anything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet
from mvmr.models.backbone import Backbone
from mvmr.models.student import Student
from mvmr.models.table import backbone_of
from mvmr.training.pretraining import recalibrate

_BATCH = 64


class Stages(nn.Module):
    """What leaves each stage of an encoder, side by side; shares the encoder's tensors.

    Shapes:
        images: [B, 3, H, W] float32, normalised -> [B, sum of the stages' widths] float32; the last columns are the
        features h.
    """

    def __init__(self, backbone: Backbone, encoder: nn.Module):
        super().__init__()
        self.stages = backbone.stages(encoder)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(list(self.stages(images).values()), dim=1)


def stages_of(backbone: Backbone, student: Student) -> tuple[Student, dict[str, int]]:
    """The stages of a student as one representation, computed in one pass, and the width of each by name.

    The student itself stays as it is; see :func:`split`.
    """
    module = Stages(backbone, student.encoder).eval()
    blank = torch.zeros(1, 3, student.preprocess.crop, student.preprocess.crop, device=student.device)
    with torch.no_grad():
        widths = {name: rows.shape[1] for name, rows in module.stages(blank).items()}
    identity = hashlib.sha256(f"stages of {student.identity}".encode()).hexdigest()
    stages = Student(
        module, student.preprocess, dim=sum(widths.values()), name=f"{student.name}-stages", identity=identity
    )
    return stages, widths


def split(rows: np.ndarray, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Rows of :func:`stages_of` by stage: [N, sum(widths)] -> name -> [N, width]."""
    parts = np.split(rows, np.cumsum(list(widths.values()))[:-1], axis=1)
    return {name: np.ascontiguousarray(part) for name, part in zip(widths, parts, strict=True)}


def build_untrained(
    bundle: Bundle, images: ImageSet, *, device: str = "cpu", workers: int = 0, seed: int = 0
) -> Student:
    """An encoder like the bundle's before its first step, its batch-norm statistics set on ``images``.

    The global random state is left alone.
    """
    manifest, backbone = bundle.manifest, backbone_of(bundle.manifest)
    preprocess = manifest.preprocessing
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = backbone.build().to(device).requires_grad_(False)
    recalibrate(encoder, images, preprocess, batch_size=_BATCH, workers=workers, device=torch.device(device))
    description = repr((backbone, preprocess, seed, _BATCH, images.fingerprint))
    identity = hashlib.sha256(description.encode()).hexdigest()
    return Student(
        encoder, preprocess, dim=manifest.embedding_dim, name=f"untrained-{manifest.backbone}", identity=identity
    )
