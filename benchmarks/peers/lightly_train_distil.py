"""LightlyTrain's distillation of our teacher, in LightlyTrain's own environment: `lightly_train_distil.py FOLDER`.

Its method `distillation` takes a custom teacher: `method_args={"teacher": ...}` may be any module with the methods of
its documented "custom models" (docs.lightly.ai/train, Pretrain & Distill, Models, Custom Models). `distillationv1` and
`distillationv2` don't: they insist on DINOv2 or DINOv3.

Both are shown the same view, mixed with another image's and normalised as the teacher takes it. Views have the side
that the teacher was trained at, and the student shrinks them to its own: with views of the student's side the teacher
would look at a blur. All else, losses, augmentation, optimiser and schedule, is as it comes.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightly_train
import torch
import torch.nn.functional as F
from job import Job, Student
from torch import Tensor, nn

_AT_ONCE = 4  # images: on two cores four times as fast as a batch of 64, which the caches don't hold


class _Wrapper(nn.Module):
    """The methods that LightlyTrain asks of a model of one's own, but for the features."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model, self._width = model, width

    def feature_dim(self) -> int:
        return self._width

    def forward_pool(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled_features": features["features"].mean((2, 3), keepdim=True)}

    def get_model(self) -> nn.Module:
        return self.model


class Teacher(_Wrapper):
    """An EfficientNet-Lite, which nothing sets to training: its batch norms would use the batch's statistics."""

    def __init__(self, job: Job) -> None:
        sys.path.append(job.code)
        package = importlib.import_module("efficientnet_lite_pytorch")
        model = package.EfficientNet.from_pretrained(job.teacher, weights_path=job.weights)
        super().__init__(model.to(memory_format=torch.channels_last), width=1280)

    def train(self, mode: bool = True) -> Teacher:
        super().train(False)
        return self

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        parts = x.to(memory_format=torch.channels_last).split(_AT_ONCE)
        return {"features": torch.cat([model.extract_features(part) for part in parts])}


class SmallStudent(_Wrapper):
    """The student, which shrinks what it is shown to its own side."""

    def __init__(self, student: Student, side: int) -> None:
        super().__init__(student, student.width)
        self._side = side

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        return {"features": model.maps(F.interpolate(x, (self._side, self._side), mode="bilinear", antialias=True))}


def main(folder: Path) -> None:
    """Train, and leave the student in the folder."""
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # where it is started by hand, too
    job = Job.load(folder)
    student = Student(folder)
    began = time.perf_counter()
    lightly_train.pretrain(
        out=folder / "run",
        data=job.images,
        model=SmallStudent(student, job.side),
        method="distillation",
        method_args={"teacher": Teacher(job)},
        epochs=job.epochs,
        batch_size=job.batch,
        num_workers=0,
        accelerator="cpu",
        devices=1,
        seed=job.seed,
        optim_args={"lr": job.rate},
        transform_args={
            "image_size": (job.teacher_side, job.teacher_side),
            "normalize": {"mean": job.mean, "std": job.std},
        },
        loggers={"tensorboard": None},
    )
    student.hand_back(folder, time.perf_counter() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
