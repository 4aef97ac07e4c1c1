"""Teacher and student by the same protocols on the same images: the paper's table of a distillation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.distillation.teachers.recorded import teacher_of
from mvmr.distillation.teachers.teacher import NoTextTower, TextTeacher
from mvmr.distillation.zeroshot import SpaceMap, fit_space_map, store_map, templates_for, zero_shot_logits
from mvmr.errors import MvmrError
from mvmr.evaluation.evaluate import open_labelled, record
from mvmr.evaluation.protocols import Labelled, Measured, Values, protocols_for
from mvmr.evaluation.scores import top_k
from mvmr.representations import Representation

ZERO_SHOT = "zeroshot"
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
    progress: bool = False,
) -> Comparison:
    """Measure a student and its teacher by the same protocols, and note the figures in the bundle.

    ``zeroshot`` is the teacher's text tower against its image embeddings, and against the student's features after a
    linear map to the teacher's space, fitted on the training images without their labels (``distill/zeroshot.py``).

    Args:
        teacher, pretrained: left out, those the student was distilled from, as the bundle records them.
        protocols: ``zeroshot`` and those of :func:`mvmr.evaluate`; left out, ``zeroshot`` (for one label to an image)
            and those that suit the data.
        ks: numbers of neighbours for ``knn``, as in :func:`mvmr.evaluate`.
        keep_map: store the map in the bundle, so that text search works on the student.

    Returns:
        Figures by protocol under ``"teacher"`` and ``"student"``, as :func:`mvmr.evaluate` names them.

    Raises:
        MvmrError: as :func:`mvmr.evaluate`; or the bundle names no teacher, or its teacher can't be had.
    """
    opened = bundles.load(bundle)
    background = opened.manifest.preprocessing.background
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    measures, with_text = _split(labelled, protocols, ks)
    try:
        loaded = teacher_of(opened, teacher, pretrained, device, text=with_text or keep_map)
    except NoTextTower:
        if protocols is not None or keep_map:  # asked for, not a default
            raise
        loaded, with_text = teacher_of(opened, teacher, pretrained, device, text=False), False
    representations: dict[str, Representation] = {"teacher": loaded, "student": opened.student(device)}
    sides = {
        name: Measured(representation, labelled, device=device, progress=progress)
        for name, representation in representations.items()
    }
    comparison: Comparison = {name: {} for name in sides}
    if with_text or keep_map:
        space_map = fit_space_map(sides["student"].features, sides["teacher"].features)
        if keep_map:
            opened = store_map(opened, space_map, loaded)
    if with_text:
        for name, values in _zero_shot(cast(TextTeacher, loaded), space_map, sides, labelled).items():
            comparison[name][ZERO_SHOT] = values
    for protocol, measure in measures.items():
        for name, side in sides.items():
            comparison[name][protocol] = measure(side)
    _note(opened, comparison, data, loaded.name, ks, {"teacher": teacher, "pretrained": pretrained})
    return comparison


def _zero_shot(
    teacher: TextTeacher, space_map: SpaceMap, sides: Mapping[str, Measured], labelled: Labelled
) -> dict[str, Values]:
    """Accuracies of the teacher's text tower on its own embeddings, and on the student's features once mapped."""
    columns = teacher.zero_shot_classifier(labelled.classes, templates_for(teacher))
    embeddings = {"teacher": sides["teacher"].test_features, "student": space_map(sides["student"].test_features)}
    tops = [k for k in (1, 5) if k < len(labelled.classes)]
    accuracies: dict[str, Values] = {}
    for name, rows in embeddings.items():
        logits = zero_shot_logits(rows, columns)
        accuracies[name] = {f"top{k}": top_k(logits, labelled.test_labels, k) for k in tops}
    accuracies["student"]["map_r2"] = space_map.r2
    return accuracies


def _note(
    bundle: Bundle,
    comparison: Comparison,
    data: str,
    teacher: str,
    ks: Sequence[int] | None,
    options: Mapping[str, object],
) -> None:
    """Put the figures into the bundle, each with the command that measures it; options: of that, where not None."""
    table = " --table" + "".join(f" --{name} {value}" for name, value in options.items() if value)
    for side, by_protocol in comparison.items():
        for protocol, values in by_protocol.items():
            command = f"mvmr evaluate {bundle.path} --data {data} --protocol {protocol}"
            if ks is not None and protocol == "knn":
                command += f" --k {','.join(map(str, ks))}"
            if side == "teacher" or protocol == ZERO_SHOT:
                command += table
            label = f"{protocol}, teacher {teacher}" if side == "teacher" else protocol
            bundle = bundles.add_metrics(bundle, record(command, data, label, values))


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
