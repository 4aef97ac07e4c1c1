"""One training run of a distillation peer: what is asked of it and what it hands back, as files of one folder.

Imported on both sides, so it needs nothing that a peer's environment lacks: no mvmr.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

ROWS, START, STUDENT, DONE = "rows.npy", "start.pt", "student.pt", "done.json"
_JOB = "job.json"


@dataclass(frozen=True)
class Job:
    """What a peer is asked for.

    images: folder of PNG files, named in the order of the teacher's rows
    teacher, weights, code: name of an EfficientNet-Lite, its weights, and the folder of the package that builds it
    teacher_side, side: pixels that the teacher and the student look at
    mean, std: by which the student's images are normalised, in units of [0, 1]
    rate: the learning rate in the peer's own units
    """

    images: str
    teacher: str
    weights: str
    code: str
    teacher_side: int
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch: int
    epochs: int
    rate: float
    seed: int

    def save(self, folder: Path) -> None:
        (folder / _JOB).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Job:
        values = json.loads((folder / _JOB).read_text())
        return cls(**values | {name: tuple(values[name]) for name in ("mean", "std")})

    def files(self) -> list[Path]:
        """The images, in the order of the teacher's rows."""
        return sorted(Path(self.images).glob("*.png"))


class Student(nn.Module):
    """torchvision's ResNet18 without its classifier, as ours starts; counts the images that it is trained on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = resnet18(weights=None)
        self.encoder.fc = nn.Identity()
        self.encoder.load_state_dict(torch.load(folder / START, weights_only=True))
        self.width, self.seen = 512, 0

    def maps(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> the last feature maps [B, 512, S / 32, S / 32]."""
        if self.training:
            self.seen += len(x)
        encoder = self.encoder
        x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
        for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> features [B, 512]."""
        return self.maps(x).mean((2, 3))

    def hand_back(self, folder: Path, seconds: float) -> None:
        """The encoder's weights, and what the run was."""
        torch.save(self.encoder.state_dict(), folder / STUDENT)
        (folder / DONE).write_text(json.dumps({"images_seen": self.seen, "seconds": round(seconds, 1)}))
