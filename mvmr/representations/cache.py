"""Fixed representations of every image, computed once and kept."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mvmr.data.image_set import ImageSet
from mvmr.errors import MvmrError
from mvmr.representations import Representation, Stored
from mvmr.storage.atomic import cache_dir
from mvmr.storage.row_store import Floats, cached_rows

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
            _Prepared(images, representation.prepare, start),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # else the loader draws a seed from the global generator
        )
        for batch in loader:
            if isinstance(batch, MvmrError):
                raise batch
            rows = representation(batch.to(device, non_blocking=True))
            yield rows.detach().to("cpu", torch.float32).numpy()

    name = re.sub(r"[^\w.-]+", "_", representation.name)
    file = f"{name}-{representation.identity[:16]}-{images.fingerprint[:16]}.npy"
    return cached_rows(
        cache_dir() / "representations" / file,
        key={"representation": representation.identity, "images": images.fingerprint},
        count=len(images),
        batches=batches,
        progress=progress,
        label=f"{representation.name} of {images.name}",
    )


class _Prepared(Dataset[Tensor | MvmrError]):
    """Prepared images from `start` on. An error is returned, for workers wrap what they raise in a long trace."""

    def __init__(self, images: ImageSet, prepare: Callable[[Image.Image], Tensor], start: int) -> None:
        self.images, self.prepare, self.start = images, prepare, start

    def __len__(self) -> int:
        return len(self.images) - self.start

    def __getitem__(self, index: int) -> Tensor | MvmrError:
        try:
            return self.prepare(self.images.load(self.start + index))
        except MvmrError as error:
            return error


def _stack(items: Sequence[Tensor | MvmrError]) -> Tensor | MvmrError:
    tensors = [item for item in items if isinstance(item, Tensor)]
    errors = [item for item in items if isinstance(item, MvmrError)]
    return errors[0] if errors else torch.stack(tensors)
