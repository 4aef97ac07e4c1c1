"""What is measured of a run: accuracies of frozen features, as it goes on and at its end, and whether it collapsed."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.comparison.memory import HighWater
from mvmr.data.image_set import ImageSet
from mvmr.errors import MvmrError
from mvmr.evaluation.protocols import Labelled, Measured
from mvmr.methods.method import AUGMENTED, ORIGINAL, Method
from mvmr.methods.parts.dependence import centred_distances, correlate, effective_rank, permutation_null
from mvmr.models.student import Student
from mvmr.training.checkpoint import METRICS
from mvmr.training.pretraining import recalibrate
from mvmr.training.views import Views

_POINTS = 4  # of the curve, the last being the end
_NEIGHBOURS = 5
_COMPARED = 512  # test images of which every pair is compared
_BATCH = 64
_LAST = ("rank_h", "rank_z", "loss")  # of the last training batch, where the method tells them

Figures = dict[str, Any]


def measure(bundle: Bundle, labelled: Labelled, device: str, *, progress: bool) -> Figures:
    """Figures of a finished run, on the test split.

    linear, knn: top-1 in percent; knn_k: of how many neighbours
    rank, spread, dcor, dcor_null: see :func:`collapse`
    rank_h, rank_z, loss: of the last training batch, where its method tells them
    steps, images: that it was trained by; train_seconds: what they took, without any measuring
    """
    student = bundle.student(device)
    policy = bundle.manifest.training["recipe"]["views"]["policy"]
    figures = accuracies(student, labelled, device, linear=True, progress=progress)
    figures |= collapse(student, labelled.test, policy) | {"steps": bundle.manifest.training["steps"]}
    if lines := read_lines(bundle.path / METRICS):
        last, train = lines[-1], bundle.manifest.training["recipe"]["train"]
        figures |= {key: last[key] if math.isfinite(last[key]) else None for key in _LAST if key in last}
        figures["images"] = figures["steps"] * train["batch_size"] * train["accumulate"]
        figures["train_seconds"] = round(figures["images"] / last["images_per_s"], 1)
    return figures


class Curve:
    """Measures a run at shares of its steps, for :func:`mvmr.training.pretraining.fit` to call.

    Each measurement is a line of `file`: step, and kNN accuracy in percent. One that is made again after a kill is the
    same again.
    """

    def __init__(
        self, file: Path, images: ImageSet, labelled: Labelled, preprocess: Preprocess, width: int, water: HighWater
    ) -> None:
        self.file, self.images, self.labelled, self.water = file, images, labelled, water
        self.preprocess, self.width = preprocess, width

    def __call__(self, learner: Method, step: int, steps: int) -> None:
        """Measure the encoder as it would be served now; the learner stays as it is."""
        if step not in {round(steps * part / _POINTS) for part in range(1, _POINTS)}:
            return
        if distributed.is_initialized() and distributed.get_rank():
            return
        with self.water.leave_out():
            self._measure(copy.deepcopy(learner.encoder), step)

    def _measure(self, encoder: nn.Module, step: int) -> None:
        device = next(encoder.parameters()).device
        recalibrate(encoder, self.images, self.preprocess, batch_size=_BATCH, workers=0, device=device)
        weights = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in encoder.state_dict().values()))
        student = Student(encoder, self.preprocess, dim=self.width, name="unfinished", identity=weights.hexdigest())
        try:
            figures = accuracies(student, self.labelled, str(device), linear=False, progress=False)
        except MvmrError:  # features that are not finite, of which the training's own end says more
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        cut(self.file)
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "knn": figures["knn"]}) + "\n")

    def read(self) -> list[tuple[int, float]]:
        """(step, percent) of all measurements, each step once."""
        return sorted({line["step"]: line["knn"] for line in read_lines(self.file)}.items())


def accuracies(student: Student, labelled: Labelled, device: str, *, linear: bool, progress: bool) -> Figures:
    """``knn`` and, where asked for, ``linear``; features are computed anew and not kept."""
    measurement = Measured(student, labelled, device=device, progress=progress)
    k = min(_NEIGHBOURS, len(labelled.labels))
    figures: Figures = {"linear": measurement.linear()["top1"]} if linear else {}
    figures |= {"knn": measurement.knn(ks=(k,))[f"top1_weighted_k{k}"], "knn_k": k}
    for rows in (measurement.features, measurement.test_features):
        for file in (path := Path(str(rows.filename))).parent.glob(f"{path.name}*"):
            file.unlink(missing_ok=True)
    return figures


def collapse(student: Student, images: ImageSet, policy: str) -> Figures:
    """Whether features say anything: of up to 512 images, by their original and an augmented view.

    rank: effective rank of the features; spread: see :func:`spread`
    dcor: unbiased dependence of both views' features; dcor_null: the same with pairs shuffled, which is what chance
        gives; a collapse has no more
    """
    count = min(len(images), _COMPARED)
    views = Views(images, student.preprocess, (ORIGINAL, AUGMENTED), policy, seed=0)
    batches = [[(0, i) for i in range(start, min(start + _BATCH, count))] for start in range(0, count, _BATCH)]
    loader = DataLoader(views, batch_sampler=batches, generator=torch.Generator())
    rows = [[student(batch[name].to(student.device)).cpu() for name in ("original", "augmented")] for batch in loader]
    h, augmented = (torch.cat(part) for part in zip(*rows, strict=True))
    figures = {"rank": effective_rank(h), "spread": spread(h)}
    if count >= 4:
        a, b = centred_distances(augmented, "unbiased"), centred_distances(h, "unbiased")
        null = permutation_null(a, b, "unbiased", torch.Generator().manual_seed(0))
        figures |= {"dcor": float(correlate(a, b, "unbiased")), "dcor_null": float(null)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def spread(h: Tensor) -> float:
    """Standard deviation of directions: 1 where they are even over the sphere, 0 where they are one.

    Source: Chen and He, "Exploring simple Siamese representation learning" (2021), section 4.1, times sqrt(D).
    Shapes: [N, D] -> a number.
    """
    return float(F.normalize(h, dim=1).std(0, correction=0).mean() * math.sqrt(h.shape[1]))


def cut(path: Path) -> None:
    """Take a last line away that was cut by a kill."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON; a last one that was cut by a kill is left out."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
