"""Fixed representations of every image, computed once and kept."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mvmr.data.image_set import ImageSet
from mvmr.errors import MvmrError, summarise
from mvmr.representations import Representation, Stored
from mvmr.storage.atomic import cache_dir
from mvmr.storage.row_store import Floats, cached_rows, is_whole

logger = logging.getLogger(__name__)


def represent(
    images: ImageSet,
    representation: Representation,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: bool = False,
) -> np.memmap:
    """Return the representation of every image, computed the first time and read from the cache afterwards.

    A run that was stopped, even by `kill -9`, goes on where it was. Draws nothing from the global random state.

    Returns: float32 [N, K], read-only, row i for image i.
    Raises: MvmrError when an image cannot be read, a row is not finite, or the cache folder cannot be written.
    """

    def batches(start: int) -> Iterable[Floats]:
        return representation.batches(images, start) if isinstance(representation, Stored) else compute(start)

    def compute(start: int) -> Iterator[Floats]:
        loader = DataLoader(
            _Prepared(images, representation.prepare, start, representation.name),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=partial(_stack, name=representation.name),
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # else the loader draws a seed from the global generator
        )
        for batch in loader:
            if isinstance(batch, MvmrError):
                raise batch
            yield _rows(representation, batch.to(device, non_blocking=True))

    return cached_rows(
        _file(images, representation),
        key=_key(images, representation),
        count=len(images),
        batches=batches,
        progress=progress,
        label=f"{representation.name} of {images.name}",
    )


def has_rows(images: ImageSet, representation: Representation) -> bool:
    """Whether `represent` would read every row from the cache."""
    return is_whole(_file(images, representation), key=_key(images, representation), count=len(images))


def _file(images: ImageSet, representation: Representation) -> Path:
    name = re.sub(r"[^\w.-]+", "_", representation.name)
    file = f"{name}-{representation.identity[:16]}-{images.fingerprint[:16]}.npy"
    return cache_dir() / "representations" / file


def _key(images: ImageSet, representation: Representation) -> dict[str, str]:
    return {"representation": representation.identity, "images": images.fingerprint}


def _rows(representation: Representation, batch: Tensor) -> Floats:
    try:
        return representation(batch).detach().to("cpu", torch.float32).numpy()
    except (MvmrError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's own code
        shape = list(batch.shape)
        raise MvmrError(f"{representation.name} failed on images {shape}: {summarise(error)}") from error


class _Prepared(Dataset[Tensor | MvmrError]):
    """Prepared images from `start` on. An error is returned, for workers wrap what they raise in a long trace."""

    def __init__(self, images: ImageSet, prepare: Callable[[Image.Image], Tensor], start: int, name: str) -> None:
        self.images, self.prepare, self.start, self.name = images, prepare, start, name

    def __len__(self) -> int:
        return len(self.images) - self.start

    def __getitem__(self, index: int) -> Tensor | MvmrError:
        number = self.start + index
        try:
            image = self.images.load(number)
        except MvmrError as error:
            return error
        try:
            return self.prepare(image)
        except MvmrError as error:
            return error
        except Exception as error:  # a user's own code
            what = f"the preprocessing of {self.name} failed on {self.images.keys[number]}"
            return MvmrError(f"{what}: {summarise(error)}")


def _stack(items: Sequence[Tensor | MvmrError], *, name: str) -> Tensor | MvmrError:
    if errors := [item for item in items if isinstance(item, MvmrError)]:
        return errors[0]
    tensors = [item for item in items if isinstance(item, Tensor)]
    if odd := [list(tensor.shape) for tensor in tensors if tensor.shape != tensors[0].shape]:
        first = list(tensors[0].shape)
        return MvmrError(f"the preprocessing of {name} gives {first} for one image and {odd[0]} for another")
    return torch.stack(tensors)
