"""What an image shows: by the bundle's linear heads, and by the teacher's text tower for class names typed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from mvmr.errors import MvmrError
from mvmr.serve.engine import Floats

if TYPE_CHECKING:
    from mvmr.distillation.teachers.teacher import Teacher, TextTeacher

MOST_NAMES = 200
_LONGEST_NAME = 80
_SCALE = 100.0  # open_clip's, before its softmax


@dataclass(frozen=True)
class Guess:
    """A class and its probability in [0, 1]."""

    name: str
    probability: float


def best(probabilities: Floats, classes: tuple[str, ...], count: int = 5) -> list[Guess]:
    """The most probable classes, best first: probabilities float32 [C] of C classes."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [Guess(classes[i], float(probabilities[i])) for i in order]


def names_of(typed: str) -> tuple[str, ...]:
    """Class names from what was typed: a line to each, or commas between them where there is one line.

    Empty and repeated ones are left out.

    Raises: MvmrError for fewer than two, for too many, or for one that is too long to be a name.
    """
    names = tuple(dict.fromkeys(" ".join(name.split()) for name in _parts(typed) if name.strip()))
    if len(names) < 2:
        raise MvmrError("type two class names or more, with commas between them: an image is told from others")
    if len(names) > MOST_NAMES:
        raise MvmrError(f"{len(names)} class names are more than the {MOST_NAMES} that are compared at a time")
    if long := [name for name in names if len(name) > _LONGEST_NAME]:
        raise MvmrError(f"{long[0][:30]!r}... is longer than the {_LONGEST_NAME} characters of a class name")
    return names


def suggest_names(classes: Sequence[str]) -> str:
    """Class names as they may be typed for `names_of`: those that it takes, at most as many as it takes."""
    fit = [name for name in classes if len(name) <= _LONGEST_NAME][:MOST_NAMES]
    return ("\n" if any("," in name for name in fit) else ", ").join(fit)


def _parts(typed: str) -> list[str]:
    text = typed.strip()
    return text.split("\n" if "\n" in text else ",")


def zero_shot(teacher: Teacher, embedding: Floats, names: tuple[str, ...], count: int = 5) -> list[Guess]:
    """The teacher's most probable of the classes `names` for one image: a softmax of 100 x cosine, as open_clip does.

    Shapes: embedding float32 [K], the teacher's, not normalised.
    Raises: MvmrError where the teacher has no text tower.
    """
    from mvmr.distillation.zeroshot import templates_for, zero_shot_logits  # here, for torch takes seconds

    columns = cast("TextTeacher", teacher).zero_shot_classifier(names, templates_for(teacher))
    logits = _SCALE * zero_shot_logits(embedding[None], columns)[0]
    powers = np.exp(logits - logits.max())
    return best(np.asarray(powers / powers.sum(), np.float32), names, count)
