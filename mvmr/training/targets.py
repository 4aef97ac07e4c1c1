"""Targets of a run: representations of the original view, computed once where that pays, else in every step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet
from mvmr.errors import MvmrError, unknown
from mvmr.representations import AUGMENTED_PIXELS, HAND_CRAFTED, Representation, hand_crafted
from mvmr.representations.cache import represent

Batch = dict[str, Tensor]
_SLOW = ("scattering", "hog")  # slower than reading their rows back


def check_targets(names: Sequence[str], stored: Sequence[str], teachers: Collection[str], recipe: str) -> None:
    """Whether all that a method of `recipe` names is there, and all teachers are of use.

    Args:
        stored: those of ``names`` of which the rows of all images are needed.

    Raises:
        MvmrError: a name is neither a hand-crafted representation nor a teacher, one is not computed once but has to
            be, or a teacher is not named.
    """
    for name in names:
        if name == "teacher" and not teachers:
            raise MvmrError("this recipe has a teacher: run it with `mvmr distill --teacher NAME --recipe ...`")
        if name not in (*teachers, *HAND_CRAFTED, AUGMENTED_PIXELS):
            raise unknown("representation", name, (*HAND_CRAFTED, AUGMENTED_PIXELS, *teachers))
    for name in stored:
        if name not in (*teachers, *_SLOW):
            raise MvmrError(f"[method] {name}: only a teacher, {' or '.join(_SLOW)} can be distilled")
    if unused := sorted(set(teachers) - set(names)):
        raise MvmrError(
            f"recipe {recipe} has no use for a {unused[0]}: take another, or give it a weight, in [method] where the "
            "method takes teachers, else in [objective.representations]"
        )


class Targets:
    """The targets named by a recipe, for one set of images.

    Args:
        names: hand-crafted representations, ``augmented_pixels``, or keys of ``teachers``; see `check_targets`.
        teachers: representations with a preprocessing of their own; always computed once.
        cache_gb: slow hand-crafted representations are computed once as long as they fit, in 1e9 bytes together.

    Raises:
        MvmrError: an image can't be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        images: ImageSet,
        preprocess: Preprocess,
        *,
        teachers: Mapping[str, Representation],
        cache_gb: float,
        device: torch.device,
        workers: int,
        progress: bool,
    ):
        self.rows: dict[str, np.ndarray] = {}
        self.live: dict[str, Representation] = {}
        left = cache_gb * 1e9
        for name in names:
            if name == AUGMENTED_PIXELS:
                continue
            representation = teachers[name] if name in teachers else hand_crafted(name, preprocess)
            if name not in teachers:
                size = _bytes_per_image(representation, preprocess) * len(images)
                if name not in _SLOW or size > left:
                    self.live[name] = representation
                    continue
                left -= size
            self.rows[name] = represent(
                images, representation, batch_size=64, device=device, workers=workers, progress=progress
            )
        self.second = AUGMENTED_PIXELS in names

    def stored(self, name: str) -> np.ndarray:
        """Its rows, float32 [N, K].

        Raises:
            MvmrError: the representation is not computed once.
        """
        if name not in self.rows:
            raise MvmrError(f"[method] {name}: its rows are needed, and do not fit into [train] cache_gb; raise that")
        return self.rows[name]

    def of(self, batch: Batch) -> dict[str, Tensor]:
        """Name -> [B, K] float32, for a batch of :class:`WithRows`."""
        targets = {name: batch[f"target.{name}"] for name in self.rows}
        with torch.no_grad():
            targets |= {name: representation(batch["original"]) for name, representation in self.live.items()}
        if self.second:
            targets[AUGMENTED_PIXELS] = batch["second"].flatten(1).float() / 255
        return targets


class WithRows(Dataset[Batch]):
    """Views, with the rows computed once for their image beside them under ``target.<name>``."""

    def __init__(self, views: Dataset[Batch], rows: Mapping[str, np.ndarray]):
        self.views, self.rows = views, rows

    def __len__(self) -> int:
        return len(self.views)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        item = self.views[key]
        return item | {f"target.{name}": torch.from_numpy(np.array(rows[key[1]])) for name, rows in self.rows.items()}


def _bytes_per_image(representation: Representation, preprocess: Preprocess) -> int:
    blank = torch.zeros(1, 3, preprocess.crop, preprocess.crop, dtype=torch.uint8)
    return representation(blank).shape[1] * 4
