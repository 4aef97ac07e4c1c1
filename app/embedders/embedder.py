"""Images in, embeddings out: what every engine of the student and the teacher have in common."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from mvmr.export.artifacts import Artifact
from mvmr.serve.engine import Floats

if TYPE_CHECKING:
    import torch

    from mvmr.representations import Representation

T = TypeVar("T")
BATCH = 64  # as `mvmr.representations.cache.represent` has it: figures equal those of `mvmr report` to the last digit
TORCH, SERVICE, TEACHER = "torch", "service", "teacher"


@dataclass(frozen=True)
class Provenance:
    """What `mvmr embed` says of embeddings that equal an encoder's: the exported file's sha256, "" if nobody knows."""

    space_id: str
    precision: str
    file: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """The student under some engine, or the teacher. Threads may share it.

    key: "torch", "service", "teacher", that of an artifact ("onnx-fp32"), or of a provider that is an engine of its own
    label: for people; identity: hex, changes with the weights, the engine and its file
    dim: width D of an embedding, None of a teacher that is not loaded yet
    nbytes: of the file it runs from, None where nobody knows
    prepare: an image of any mode and size -> what `forward` takes; may run in several threads
    forward: N prepared images -> float32 [N, D], not normalised
    provenance: None where `mvmr embed` does not write these embeddings
    """

    key: str
    label: str
    identity: str
    dim: int | None
    nbytes: int | None
    prepare: Callable[[Image.Image], Any]
    forward: Callable[[Sequence[Any]], Floats]
    provenance: Provenance | None = None

    def embed(self, images: Sequence[Image.Image]) -> Floats:
        """Embed N images of any mode and size: float32 [N, D], not normalised."""
        return self.forward([self.prepare(image) for image in images])


def embed_in_torch(representation: Representation, dim: int, device: str, prepared: Sequence[torch.Tensor]) -> Floats:
    """Embed prepared images in batches of `BATCH`: float32 [N, dim]."""
    import torch  # here, for the first page comes seconds earlier without

    rows = [np.empty((0, dim), np.float32)]
    for start in range(0, len(prepared), BATCH):
        batch = torch.stack(list(prepared[start : start + BATCH]))
        rows.append(representation(batch.to(device)).detach().to("cpu", torch.float32).numpy())
    return np.concatenate(rows)


def identity_of(*parts: str) -> str:
    """A hash of all that an encoder's values depend on."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def once(make: Callable[[], T]) -> Callable[[], T]:
    """A function that makes something at its first call and gives the same ever after, to any thread."""
    products: list[T] = []
    lock = threading.Lock()

    def get() -> T:
        with lock:
            if not products:
                products.append(make())
            return products[0]

    return get


def key_of(artifact: Artifact) -> str:
    """What the app calls an artifact: "onnx-fp32"."""
    return artifact.label.lower().replace(" ", "-")


def device_type(device: str) -> str:
    """ "cuda" of "cuda:1"."""
    return device.partition(":")[0]
