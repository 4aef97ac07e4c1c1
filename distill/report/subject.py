"""What a report is about: bundle, teacher, images and labels, all opened and checked before anything is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.distillation.report.images import SEED, Open, draw, open_evaluation_images
from mvmr.distillation.teachers.recorded import recorded_teachers, teacher_of
from mvmr.distillation.teachers.remembered import RememberedTeacher
from mvmr.distillation.teachers.stored_rows import StoredRows
from mvmr.distillation.teachers.teacher import Teacher
from mvmr.errors import MvmrError
from mvmr.evaluation.protocols import Labelled
from mvmr.models.student import Student
from mvmr.training.checkpoint import METRICS

T = TypeVar("T")
_FEWEST = 4  # images; the unbiased estimator is not defined below
_RECORDS = 300


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The parts of a report's input; None for what is not there, with the reason in ``missing``.

    images: those evaluated, of ``available`` ones: the test split, or all images of data without labels
    labels, classes: of ``images``; None where there is not one label to an image
    labelled: both splits, for the probe
    training: records of the training, evenly thinned
    missing: what can't be measured -> why
    """

    bundle: Bundle
    student: Student
    teacher: Teacher | None
    images: ImageSet
    available: int
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    labelled: Labelled | None
    training: list[dict[str, Any]] | None
    missing: Mapping[str, str]

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        data: str,
        *,
        teacher: str | Path | None,
        pretrained: str | Path | None,
        limit: int,
        k: int,
        device: str,
        max_unreadable: float,
        progress: bool,
    ) -> Subject:
        """Open all of it; arguments as of :func:`mvmr.distillation.report.report.report`.

        Raises:
            MvmrError: no images or too few; a teacher that was named and can't be had.
        """
        missing: dict[str, str] = {}
        background = bundle.manifest.preprocessing.background
        open_split: Open = partial(
            open_images, data, background=background, max_unreadable=max_unreadable, progress=progress
        )
        pool = open_evaluation_images(open_split)
        images = _choose(pool, limit, k)
        single = pool.labels is not None and pool.labels.ndim == 1
        unlabelled = "the probe" if single else "the probe, and figures by label"
        labelled = _attempt(unlabelled, partial(_open_labelled, open_split, pool), missing)

        def load() -> Teacher:
            loaded = teacher_of(bundle, teacher, pretrained, device, text=False)
            if isinstance(loaded, StoredRows | RememberedTeacher):
                for each in (images, labelled.train, labelled.test) if labelled is not None else (images,):
                    loaded.check(each, progress=progress)
            return loaded

        recorded = teacher is None or str(teacher) in recorded_teachers(bundle)
        return cls(
            bundle=bundle,
            student=bundle.student(device),
            teacher=_attempt("all that takes a teacher", load, missing) if recorded else load(),
            images=images,
            available=len(pool),
            labels=images.labels if single else None,
            classes=images.classes if single else None,
            labelled=labelled,
            training=_attempt("training curves", partial(_records, bundle.path / METRICS), missing),
            missing=missing,
        )

    def describe(self) -> dict[str, Any]:
        """The parts of report.json that name what was measured: bundle, teacher and data."""
        training = self.bundle.manifest.training

        def look_up(*keys: str) -> Any:  # a bundle may come from a stranger, or be made by hand
            value: Any = training
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            return value

        return {
            "bundle": {
                "path": str(self.bundle.path),
                "space_id": self.bundle.space_id,
                "backbone": self.bundle.manifest.backbone,
                "embedding_dim": self.bundle.manifest.embedding_dim,
                "method": str(look_up("method") or "not recorded"),
                "recipe": str(look_up("recipe", "name") or "not recorded"),
                "trained_on": str(look_up("data", "name") or "not recorded"),
                "steps": look_up("steps") if isinstance(look_up("steps"), int) else None,
            },
            "teacher": None
            if self.teacher is None
            else {key: getattr(self.teacher, key) for key in ("name", "weights", "identity", "dim")},
            "data": {
                "name": self.images.name,
                "split": self.images.split,
                "images": len(self.images),
                "available": self.available,
                "classes": None if self.classes is None else list(self.classes),
                "seed": SEED,
            },
        }


def _choose(images: ImageSet, limit: int, k: int) -> ImageSet:
    """The images of a report; refused where there are too few of them."""
    count, fewest = min(len(images), limit), max(_FEWEST, k + 1)
    if k < 1 or count < fewest:
        amount = f"{count} of the {len(images)}" if count < len(images) else f"{count}"
        raise MvmrError(
            f"{amount} images of {images.name} and k = {k} nearest neighbours: a report takes k of 1 or more, and "
            f"{fewest} images or more"
        )
    return draw(images, limit)


def _open_labelled(open_split: Open, test: ImageSet) -> Labelled:
    if test.labels is not None and test.labels.ndim > 1:
        raise MvmrError(f"an image of {test.name} has several labels, and these take one: see mvmr evaluate")
    return Labelled.of(test if test.labels is None else open_split("train"), test)


def _records(file: Path) -> list[dict[str, Any]]:
    """Records of the training, evenly thinned; the first and the last stay. Values that aren't finite are left out."""
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        numbers = np.unique(np.linspace(0, len(records) - 1, _RECORDS).round().astype(int))
        return [{key: value for key, value in records[i].items() if math.isfinite(value)} for i in numbers]
    except OSError as error:
        raise MvmrError(f"the bundle holds no {file.name} ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise MvmrError(f"{file} holds no records of a training ({type(error).__name__}: {error})") from error


def _attempt(what: str, make: Callable[[], T], missing: dict[str, str]) -> T | None:
    """Make it, or note why it can't be made."""
    try:
        return make()
    except MvmrError as error:
        missing[what] = str(error)
        return None
