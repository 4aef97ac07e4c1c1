"""sentence-transformers' EmbedDistillLoss on our teacher's stored rows, in its own environment: `... FOLDER`.

It has no image model of this kind, but takes modules of one's own: an `InputModule` whose modality is the image. What
`preprocess` gives must be called `pixel_values`: its trainer finds a column's features by such names. It has no
augmentation for images either, so the student gets our views, crop+flip, by torchvision's functions.

The loss with its default metric (cosine), its linear map to the teacher's width, and the trainer's optimiser and
schedule are as they come.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from job import ROWS, Job, Student
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from torch import Tensor
from torchvision.transforms import v2


class ImageStudent(InputModule):
    """Images -> the student's features."""

    def __init__(self, student: Student, job: Job) -> None:
        super().__init__()
        self.student = student
        self._views = v2.Compose(
            [
                v2.RandomResizedCrop(job.side, scale=(0.08, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(job.mean, job.std),
            ]
        )

    @property
    def modalities(self) -> list[Any]:
        return ["image"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        return {"pixel_values": torch.stack([self._views(image) for image in inputs])}

    def forward(self, features: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        return features | {"sentence_embedding": self.student(features["pixel_values"])}

    def get_embedding_dimension(self) -> int:
        return self.student.width

    def save(self, output_path: str, *arguments: Any, **options: Any) -> None:
        """Nothing: the student is handed back by itself, and no checkpoint is kept."""


def main(folder: Path) -> None:
    """Train, and leave the student in the folder."""
    job = Job.load(folder)
    student = Student(folder)
    torch.manual_seed(job.seed)  # the loss draws its map before the trainer sets its seed
    pictures = [Image.open(file).convert("RGB") for file in job.files()]
    rows = np.load(folder / ROWS)

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {
            "image": [pictures[index] for index in batch["index"]],
            "label": [rows[index] for index in batch["index"]],
        }

    images = datasets.Dataset.from_dict({"index": list(range(len(pictures)))}).with_transform(read)
    model = SentenceTransformer(modules=[ImageStudent(student, job)], device="cpu")
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch,
        learning_rate=job.rate,
        seed=job.seed,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    began = time.perf_counter()
    loss = EmbedDistillLoss(model, projection_dim=rows.shape[1])
    SentenceTransformerTrainer(model=model, args=settings, train_dataset=images, loss=loss).train()
    student.hand_back(folder, time.perf_counter() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
