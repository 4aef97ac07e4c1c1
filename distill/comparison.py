"""Teacher and student by the same protocols on the same images: the paper's table of a distillation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.distillation.teachers.recorded import names_to_open, teacher_of
from mvmr.distillation.teachers.remembered import RememberedTeacher
from mvmr.distillation.teachers.stored_rows import StoredRows
from mvmr.distillation.teachers.teacher import NoTextTower, Teacher, TextTeacher
from mvmr.distillation.zeroshot import SpaceMap, fit_space_map, store_map, templates_for, zero_shot_logits
from mvmr.errors import MvmrError
from mvmr.evaluation.evaluate import open_labelled, record
from mvmr.evaluation.protocols import Labelled, Measured, Values, protocols_for
from mvmr.evaluation.scores import top_k
from mvmr.progress import is_wanted, say

STUDENT, ZERO_SHOT = "student", "zeroshot"
_BY = " by "  # before the name of one of several teachers
Comparison = dict[str, dict[str, Values]]


def compare(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    teacher: str | Path | None = None,
    pretrained: str | Path | None = None,
    protocols: Sequence[str] | None = None,
    ks: Sequence[int] | None = None,
    keep_map: bool = False,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> Comparison:
    """Measure a student and its teachers by the same protocols, and note the figures in the bundle.

    ``zeroshot`` is the teacher's text tower against its image embeddings, and against the student's features after a
    linear map to the teacher's space, fitted on the training images without their labels (``distill/zeroshot.py``).

    Args:
        teacher, pretrained: left out, those the student was distilled from, as the bundle records them: all of them.
        protocols: ``zeroshot`` and those of :func:`mvmr.evaluate`; left out, ``zeroshot`` (for one label to an image)
            and those that suit the data.
        ks: numbers of neighbours for ``knn``, as in :func:`mvmr.evaluate`.
        keep_map: store the map in the bundle, so that text search works on the student.

    Returns:
        Figures by protocol under ``"teacher"`` and ``"student"``, as :func:`mvmr.evaluate` names them. Of several
        teachers each is under its own name, and zero-shot is ``"zeroshot by NAME"``.

    Raises:
        MvmrError: as :func:`mvmr.evaluate`; or the bundle names no teacher, or its teacher can't be had.
    """
    progress = is_wanted(progress)
    opened = bundles.load(bundle)
    background = opened.manifest.preprocessing.background
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    measures, with_text = _split(labelled, protocols, ks)
    names = names_to_open(opened, teacher)
    teachers = {}
    for label, named in names.items():
        asked = protocols is not None or keep_map
        try:
            loaded, has_text = _open(opened, named, pretrained, device, with_text or keep_map, asked=asked)
            if isinstance(loaded, StoredRows | RememberedTeacher):
                for images in (labelled.train, labelled.test):
                    loaded.check(images, progress=progress)
            teachers[label] = loaded, has_text
        except MvmrError as error:
            if len(names) == 1 or isinstance(error, NoTextTower):
                raise
            say(f"without teacher {label}: {error}", shown=progress)
    representations = {label: loaded for label, (loaded, _) in teachers.items()} | {STUDENT: opened.student(device)}
    sides = {
        name: Measured(representation, labelled, device=device, progress=progress)
        for name, representation in representations.items()
    }
    comparison: Comparison = {name: {} for name in sides}
    for label, (loaded, has_text) in teachers.items():
        if not (has_text or keep_map):
            continue
        space_map = fit_space_map(sides[STUDENT].features, sides[label].features)
        if keep_map:
            opened = store_map(opened, space_map, loaded)
        if has_text and with_text:
            protocol = ZERO_SHOT if len(names) == 1 else f"{ZERO_SHOT}{_BY}{label}"
            both = sides[label], sides[STUDENT]
            values = _zero_shot(cast(TextTeacher, loaded), space_map, *both, labelled)
            comparison[label][protocol], comparison[STUDENT][protocol] = values
    for protocol, measure in measures.items():
        for name, side in sides.items():
            comparison[name][protocol] = measure(side)
    for name, by_protocol in comparison.items():
        whose = None if name == STUDENT else (name if len(names) > 1 else teachers[name][0].name)
        option = name if len(names) > 1 and name != STUDENT else teacher
        opened = _note(opened, by_protocol, data, whose, ks, {"teacher": option, "pretrained": pretrained})
    return comparison


def _open(
    bundle: Bundle, name: str | Path | None, pretrained: str | Path | None, device: str, text: bool, *, asked: bool
) -> tuple[Teacher, bool]:
    """A teacher, and whether it has its text tower; one without any will do where zero-shot was not asked for."""
    try:
        return teacher_of(bundle, name, pretrained, device, text=text), text
    except NoTextTower:
        if asked:
            raise
        return teacher_of(bundle, name, pretrained, device, text=False), False


def _zero_shot(
    teacher: TextTeacher, space_map: SpaceMap, of_teacher: Measured, of_student: Measured, labelled: Labelled
) -> tuple[Values, Values]:
    """Accuracies of the teacher's text tower on its own embeddings, and on the student's features once mapped."""
    columns = teacher.zero_shot_classifier(labelled.classes, templates_for(teacher))
    tops = [k for k in (1, 5) if k < len(labelled.classes)]

    def measure(rows: np.ndarray) -> Values:
        logits = zero_shot_logits(rows, columns)
        return {f"top{k}": top_k(logits, labelled.test_labels, k) for k in tops}

    student = measure(space_map(of_student.test_features)) | {"map_r2": space_map.r2}
    return measure(of_teacher.test_features), student


def _note(
    bundle: Bundle,
    by_protocol: Mapping[str, Values],
    data: str,
    teacher: str | None,
    ks: Sequence[int] | None,
    options: dict[str, object],
) -> Bundle:
    """Put the figures of a side into the bundle, with the command that measures each.

    teacher: whose they are, None for the student's; options: of the command, where not None
    """
    for protocol, values in by_protocol.items():
        bare, _, by = protocol.partition(_BY)
        chosen = options | ({"teacher": by} if by else {})
        table = " --table" + "".join(f" --{key} {value}" for key, value in chosen.items() if value)
        command = f"mvmr evaluate {bundle.path} --data {data} --protocol {bare}"
        if ks is not None and protocol == "knn":
            command += f" --k {','.join(map(str, ks))}"
        if teacher is not None or protocol.startswith(ZERO_SHOT):
            command += table
        label = protocol if teacher is None else f"{protocol}, teacher {teacher}"
        bundle = bundles.add_metrics(bundle, record(command, data, label, values))
    return bundle


def _split(
    labelled: Labelled, protocols: Sequence[str] | None, ks: Sequence[int] | None
) -> tuple[dict[str, Callable[[Measured], Values]], bool]:
    """The protocols that take features alone, and whether zero-shot is wanted; refused here if they don't fit."""
    if protocols is None:
        return protocols_for(labelled, None, ks=ks), not labelled.several
    if ZERO_SHOT in protocols and labelled.several:
        raise MvmrError(f"protocol {ZERO_SHOT} takes one label to an image, {labelled.train.name} has several")
    feature_protocols = [name for name in protocols if name != ZERO_SHOT]
    return protocols_for(labelled, feature_protocols, ks=ks), ZERO_SHOT in protocols
