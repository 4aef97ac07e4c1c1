"""What benchmarks/recipes.py tries: picture sets, their teachers, and the changes to a recipe that make a trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from teachers import EfficientNetLite, Standardised, Unit, Whitened, stand_in

from mvmr.data import ImageSet, open_images
from mvmr.data.image_set import Arrays, digest
from mvmr.data.samples import strip
from mvmr.distillation.teachers.tiny_clip import TinyClip
from mvmr.errors import MvmrError
from mvmr.representations import Pretrained
from mvmr.representations.cache import represent

DATA = Path(__file__).resolve().parents[1] / "data"
_LARGEST = 260  # pixels of the short side: what the largest teacher sees
_HELD_OUT = 0.3
_WHITENED = 64  # principal axes of a teacher that are kept
_CLIP = TinyClip(width=16, steps=60)


@dataclass(frozen=True)
class PictureSet:
    """A labelled set.

    open: gives its training and its test split; epochs: so many that its training part gives about 400 steps of 64
    teachers: those of its trials
    validation: makes two parts of the training split: to train on, and to score
    """

    open: Callable[[], tuple[ImageSet, ImageSet]]
    epochs: int
    teachers: tuple[str, ...]
    validation: Callable[[ImageSet], tuple[ImageSet, ImageSet]]


def splits_of(name: str, *, test: bool) -> tuple[ImageSet, ImageSet]:
    """What is trained on and what is scored: two parts of the training split, or training and test split.

    Raises: MvmrError: a set that was not fetched.
    """
    chosen = SETS[name]
    train, held = chosen.open()
    return (_in_memory(train), _in_memory(held)) if test else chosen.validation(_in_memory(train))


def teacher_of(name: str, images: ImageSet, seed: int, runs: Path) -> Pretrained:
    """The teacher called ``name``, such as ``lite2``, or ``clip``: one trained on the labels of ``images``."""
    if name == "clip":
        return stand_in(images, runs, _CLIP, seed)
    if name not in _opened:
        _opened[name] = EfficientNetLite(name, DATA / "teachers")
    return _opened[name]


def _fetched(name: str) -> tuple[ImageSet, ImageSet]:
    if not (DATA / name).is_dir():
        raise MvmrError(f"set {name} is not in {DATA / name}; fetch it: python benchmarks/data/fetch.py {name}")
    return open_images(DATA / name, "train"), open_images(DATA / name, "test")


def _sample(name: str) -> tuple[ImageSet, ImageSet]:
    return open_images(f"sample:{name}", "train"), open_images(f"sample:{name}", "test")


def _strips(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Patches of the training part, apart in space: two patches of one place are nearly the same picture."""
    return strip(0.0, 0.38, 80, seed=0), strip(0.40, 0.60, 40, seed=1)


def _by_class(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The same 30 % of each class held out in every trial."""
    assert images.labels is not None
    order = np.random.default_rng(0).permutation(len(images))
    held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        rows = order[images.labels[order] == label]
        held[rows[: round(_HELD_OUT * len(rows))]] = True
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))


@dataclass(frozen=True, eq=False)
class _Pictures:
    """A source in memory: RGB images of any size, each decoded once."""

    pictures: list[Image.Image] = field(repr=False)
    keys: list[str] = field(repr=False)

    def load(self, index: int) -> Image.Image:
        return self.pictures[index]


def _in_memory(images: ImageSet) -> ImageSet:
    """The same images, decoded once and no larger than any model here looks at."""
    if isinstance(images.source, Arrays):
        return images
    pictures = [_shrunk(images.load(index)) for index in range(len(images))]
    labels = images.labels
    return replace(
        images,
        source=_Pictures(pictures, list(images.keys)),
        fingerprint=digest(picture.tobytes() + str(picture.size).encode() for picture in pictures),
        chosen=None,
        read_labels=lambda: labels,  # type: ignore[arg-type, return-value]
    )


def _shrunk(picture: Image.Image) -> Image.Image:
    short = min(picture.size)
    if short <= _LARGEST:
        return picture
    return picture.resize([round(side * _LARGEST / short) for side in picture.size], Image.Resampling.LANCZOS)


_opened: dict[str, EfficientNetLite] = {}
SETS = {
    "patches": PictureSet(partial(_sample, "patches"), 20, ("clip", "lite2"), _strips),
    "digits": PictureSet(partial(_sample, "digits"), 30, ("lite0", "clip"), _by_class),
    "emoji": PictureSet(partial(_fetched, "emoji"), 20, ("lite2", "lite0"), _by_class),
    "stamps": PictureSet(partial(_fetched, "stamps"), 60, ("lite2", "lite0"), _by_class),
    "food": PictureSet(partial(_fetched, "food"), 90, ("lite2", "lite0"), _by_class),
}


Change = Callable[[Pretrained, ImageSet], Pretrained]


def _as_it_is(teacher: Pretrained, images: ImageSet) -> Pretrained:
    return teacher


def _unit(teacher: Pretrained, images: ImageSet) -> Pretrained:
    return Unit(teacher)


def _standardised(teacher: Pretrained, images: ImageSet) -> Pretrained:
    return Standardised(teacher, np.asarray(represent(images, teacher)))


def _whitened(teacher: Pretrained, images: ImageSet) -> Pretrained:
    return Whitened(teacher, np.asarray(represent(images, teacher)), _WHITENED)


@dataclass(frozen=True)
class Trial:
    """A change to the plainest recipe.

    assign: to the recipe
    teachers: what becomes of the teacher, by the name the recipe calls it
    crop: smallest share of the area that a crop keeps, where it is not the views' own 8 %
    epochs: times the set's
    """

    assign: str = ""
    teachers: dict[str, Change] = field(default_factory=lambda: {"teacher": _as_it_is})
    crop: float | None = None
    epochs: int = 1


_CF = "views.policy=crop+flip"
_BY = f"{_CF} method.name"
_SUM = f"{_BY}=combination method.losses"
_REG = f"{_BY}=regression objective.estimator=unbiased"
_BESIDE = {name: f"objective.representations.{name}" for name in ("teacher", "scattering", "hog")}
_D, _DS, _DH = _BESIDE["teacher"], _BESIDE["scattering"], _BESIDE["hog"]
_BIASED = "objective.estimator=biased"
_OFF = "method.invariance=0 method.variance=0 method.dependence=0 method.space=features"
_T, _S, _H = (f"method.representations.{name}" for name in ("teacher", "scattering", "hog"))
_Z = "method.projector=[1024,1024,1024]"
_ALL = " ".join(
    f"method.representations.{name}=1" for name in ("augmented_pixels", "pixels", "scattering", "hog", "local_std")
)
DISTIL: dict[str, Trial | None] = {
    "the teacher itself": None,
    "regression": Trial(_REG),
    "regression + 1.0 dCor": Trial(f"{_REG} {_D}=1"),
    "regression + 0.3 dCor": Trial(f"{_REG} {_D}=0.3"),
    "regression + 0.1 dCor": Trial(f"{_REG} {_D}=0.1"),
    "regression + 0.03 dCor": Trial(f"{_REG} {_D}=0.03"),
    "regression, crops of 25 % or more": Trial(_REG, crop=0.25),
    "regression, crops of 50 % or more": Trial(_REG, crop=0.5),
    "regression, views flip": Trial(f"{_REG} views.policy=flip"),
    "regression, targets of length 1": Trial(_REG, teachers={"teacher": _unit}),
    "regression, one scale": Trial(f"{_REG} method.standardise=scale"),
    "regression, targets whitened (64)": Trial(_REG, teachers={"teacher": _whitened}),
    "regression + 0.3 dCor, teacher standardised": Trial(
        f"{_REG} objective.representations.standardised=0.3",
        teachers={"teacher": _as_it_is, "standardised": _standardised},
    ),
    "regression + 0.3 dCor, teacher whitened": Trial(
        f"{_REG} objective.representations.whitened=0.3", teachers={"teacher": _as_it_is, "whitened": _whitened}
    ),
    "regression + 0.1 dCor, biased": Trial(f"{_REG} {_D}=0.1 {_BIASED}"),
    "regression + 1.0 dCor, biased": Trial(f"{_REG} {_D}=1 {_BIASED}"),
    "regression + 0.1 dCor(HOG)": Trial(f"{_REG} {_DH}=0.1"),
    "regression + 0.1 dCor(HOG, scattering)": Trial(f"{_REG} {_DH}=0.1 {_DS}=0.1"),
    "regression + 0.1 dCor(teacher, HOG, scattering)": Trial(f"{_REG} {_D}=0.1 {_DH}=0.1 {_DS}=0.1"),
    "regression, lr 3e-4": Trial(f"{_REG} train.lr=3e-4"),
    "regression, lr 3e-3": Trial(f"{_REG} train.lr=3e-3"),
    "regression, views crop+flip+jitter": Trial(f"{_REG} views.policy=crop+flip+jitter"),
    "regression, the paper's views": Trial(f"{_REG} views.policy=paper"),
    "dCor alone": Trial(f"{_OFF} {_CF} method.estimator=unbiased {_T}=1"),
    "paper": Trial(f"{_Z} {_T}=1"),
    "paper, crop+flip": Trial(f"{_Z} {_T}=1 {_CF}"),
    "regression, twice the epochs": Trial(_REG, epochs=2),
    "regression, lr 3e-3, twice the epochs": Trial(f"{_REG} train.lr=3e-3", epochs=2),
    "regression + 0.1 dCor, twice the epochs": Trial(f"{_REG} {_D}=0.1", epochs=2),
    "cosine": Trial(f"{_BY}=cosine"),
    "dcor": Trial(f"{_BY}=dcor"),
    "cka": Trial(f"{_BY}=cka"),
    "rkd": Trial(f"{_BY}=rkd"),
    "seed": Trial(f"{_BY}=seed"),
    "relational": Trial(f"{_BY}=relational"),
    "gram": Trial(f"{_BY}=gram"),
    "procrustes": Trial(f"{_BY}=procrustes"),
    "cospress": Trial(f"{_BY}=cospress"),
    "regression + cosine": Trial(_SUM + "={regression=1,cosine=1}"),
    "regression + relational": Trial(_SUM + "={regression=1,relational=1}"),
    "regression + 0.3 seed": Trial(_SUM + "={regression=1,seed=0.3}"),
    "regression + procrustes": Trial(_SUM + "={regression=1,procrustes=1}"),
    "regression + gram": Trial(_SUM + "={regression=1,gram=1}"),
    "regression + rkd": Trial(_SUM + "={regression=1,rkd=1}"),
    "regression, the best left out at times": Trial(f"{_BY}=regression method.drop=0.5"),
    "regression, phi-s": Trial(f"{_BY}=regression method.standardise=phi-s"),
    "cosine, by dimension": Trial(f"{_BY}=cosine method.standardise=dimension"),
    "seed, by dimension": Trial(f"{_BY}=seed method.standardise=dimension"),
}
PRETRAIN: dict[str, Trial | None] = {
    "a random encoder": None,
    "paper": Trial(f"{_Z} {_ALL}"),
    "paper, crop+flip": Trial(f"{_Z} {_ALL} {_CF}"),
    "paper, crop+flip+jitter": Trial(f"{_Z} {_ALL} views.policy=crop+flip+jitter"),
    "paper, crop+flip+jitter+grey": Trial(f"{_Z} {_ALL} views.policy=crop+flip+jitter+grey"),
    "paper, invariance 0.1": Trial(f"{_Z} {_ALL} method.invariance=0.1"),
    "paper, invariance 0.1, crop+flip": Trial(f"{_Z} {_ALL} method.invariance=0.1 {_CF}"),
    "paper, invariance 0.1, crop+flip+jitter": Trial(
        f"{_Z} {_ALL} method.invariance=0.1 views.policy=crop+flip+jitter"
    ),
    "paper, crop+flip, crops of 25 % or more": Trial(f"{_Z} {_ALL} {_CF}", crop=0.25),
    "paper, unbiased, crop+flip": Trial(f"{_Z} {_ALL} {_CF} method.estimator=unbiased"),
    "paper, scattering and HOG only, crop+flip": Trial(f"{_Z} {_S}=1 {_H}=1 {_CF}"),
    "paper, 4 times the epochs": Trial(f"{_Z} {_ALL}", epochs=4),
    "paper, crop+flip, 4 times the epochs": Trial(f"{_Z} {_ALL} {_CF}", epochs=4),
    "simclr": Trial("method.name=simclr"),
    "byol": Trial("method.name=byol"),
}
