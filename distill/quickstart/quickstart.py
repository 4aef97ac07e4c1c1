"""The whole path on sample images: a teacher, a student distilled from it, one trained alone, and what they know."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet, open_images
from mvmr.distillation.quickstart.picture import draw_neighbours
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.tiny_clip import TinyClip, train_tiny_clip
from mvmr.distillation.zeroshot import templates_for, zero_shot_logits
from mvmr.evaluation.neighbours import nearest
from mvmr.evaluation.protocols import Labelled, Measured
from mvmr.evaluation.scores import top_k
from mvmr.models.student import Student
from mvmr.models.table import open_backbone
from mvmr.progress import is_wanted
from mvmr.representations import Representation, hand_crafted
from mvmr.storage.atomic import write_json
from mvmr.training.pretraining import fit, recalibrate
from mvmr.training.recipe import Recipe, load_recipe

DATA = "sample:patches"
ROWS = ("pixels", "scattering", "random", "ssl", "student", "teacher")
STAND_IN = TinyClip()  # the teacher where no real one is given: less than a minute on two cores
_QUERIES, _NEIGHBOURS = 8, 5
_BATCH, _ROUNDS = 64, 10  # images to a batch, and how often it is timed

logger = logging.getLogger(__name__)


def quickstart(
    out: str | os.PathLike[str] = "runs/quickstart",
    *,
    teacher: str | None = None,
    pretrained: str | None = None,
    seeds: int = 1,
    overwrite: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Run the whole path on ``sample:patches`` and compare what each representation knows.

    Trains a tiny CLIP on captions made of the class names (a stand-in for real CLIP weights), distils a student from
    it without labels, trains another without any teacher, and measures both beside raw pixels, scattering features, a
    random encoder and the teacher. What an interrupted run has finished is not done again.

    Args:
        out: folder for ``teacher/``, the bundles ``student/`` and ``ssl/``, ``neighbours.png`` and ``results.json``.
        teacher, pretrained: a real teacher in place of the tiny one, as ``mvmr distill`` takes it.
        seeds: repeat with seeds 0 to ``seeds`` - 1; further ones go to ``out``/seed-N.
        overwrite: train the students again, though ``out`` holds them or those of another run.

    Returns:
        The content of ``results.json``: mean over seeds and per seed; accuracies in percent, ``ms`` in milliseconds an
        image (:func:`time_representations`), ``parameters`` of the networks.
    """
    progress = is_wanted(progress)
    folder = Path(out)
    data = Labelled.of(open_images(DATA, "train"), open_images(DATA, "test"))
    runs = []
    for seed in range(seeds):
        subfolder = folder if seed == 0 else folder / f"seed-{seed}"
        runs.append(_run(subfolder, data, seed, teacher, pretrained, overwrite, progress))
    names = list(runs[0]["rows"])
    results = {
        "data": DATA,
        "teacher": runs[0]["teacher"],
        "student": runs[0]["student"],
        "stand_in": teacher is None,
        "seeds": seeds,
        "rows": {name: _spread([run["rows"][name] for run in runs]) for name in names},
        "runs": runs,
    }
    write_json(folder / "results.json", results)
    return results


def _run(
    folder: Path,
    data: Labelled,
    seed: int,
    teacher: str | None,
    pretrained: str | None,
    overwrite: bool,
    progress: bool,
) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    with _timing("teacher", seconds):
        source = teacher or train_tiny_clip(
            data.train, folder / "teacher", config=STAND_IN, seed=seed, progress=progress
        )
        teaching = ClipTeacher.load(source, pretrained, text=True)
    unlabelled = open_images(DATA, "unlabelled")
    train = partial(fit, unlabelled, resume=not overwrite, overwrite=overwrite, device="cpu", progress=progress)
    with _one_thread():
        with _timing("ssl", seconds):
            ssl = train(folder / "ssl", load_recipe("quickstart", "mvmr", [f"train.seed={seed}"]))
        with _timing("student", seconds):
            recipe = load_recipe("quickstart", "mvmr.distillation", [f"train.seed={seed}"])
            distilled = train(folder / "student", recipe, teachers={"teacher": teaching})
        with _timing("evaluation", seconds):
            random = _random_encoder(recipe, distilled.manifest.preprocessing, data.train, seed)
            students = {"random": random, "ssl": ssl.student(), "student": distilled.student()}
            rows, measured = _measure({**students, "teacher": teaching}, data, random.preprocess, progress)
    rows["teacher"]["zero_shot"] = _zero_shot(teaching, measured["teacher"])
    _picture(folder / "neighbours.png", data, measured)
    return {
        "seed": seed,
        "teacher": f"{teaching.name} ({teaching.weights})",
        "student": recipe.student.backbone,
        "rows": rows,
        "seconds": seconds,
    }


def _measure(
    networks: Mapping[str, Student | ClipTeacher], data: Labelled, preprocess: Preprocess, progress: bool
) -> tuple[dict[str, dict[str, float]], dict[str, Measured]]:
    """What each network knows and costs, after two representations that nothing was trained for."""
    representations: dict[str, Representation] = {
        "pixels": hand_crafted("pixels", preprocess),
        "scattering": hand_crafted("scattering", Preprocess.for_size(32)),
        **networks,
    }
    measured = {
        name: Measured(representation, data, progress=progress) for name, representation in representations.items()
    }
    milliseconds = time_representations(representations, data.test)
    rows = {name: {**_accuracies(measured[name]), "ms": milliseconds[name]} for name in representations}
    for name, network in networks.items():
        rows[name]["parameters"] = network.parameters
    return rows, measured


def _random_encoder(recipe: Recipe, preprocess: Preprocess, images: ImageSet, seed: int) -> Student:
    """The student before its first step, its batch-norm statistics set as those of a trained one are."""
    backbone = open_backbone(recipe.student, preprocess.crop)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = backbone.build()
    recalibrate(encoder, images, preprocess, batch_size=recipe.train.batch_size, workers=0, device=torch.device("cpu"))
    identity = hashlib.sha256(repr((backbone, preprocess, seed, images.fingerprint)).encode()).hexdigest()
    return Student(encoder, preprocess, dim=backbone.width, name="random-encoder", identity=identity)


def time_representations(representations: Mapping[str, Representation], images: ImageSet) -> dict[str, float]:
    """Milliseconds an image that each takes for a batch of prepared images: the median of rounds, in turns.

    Decoding, resizing and cropping are not in it.
    """
    pictures = [images.load(index) for index in range(min(_BATCH, len(images)))]
    batches = {
        name: torch.stack([representation.prepare(picture) for picture in pictures])
        for name, representation in representations.items()
    }
    rounds: dict[str, list[float]] = {name: [] for name in representations}
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):  # in turns, so that what slows the machine meanwhile slows them all
            for name, representation in representations.items():
                began = time.perf_counter()
                representation(batches[name])
                rounds[name].append(1000 * (time.perf_counter() - began) / len(pictures))
    return {name: float(np.median(values[1:])) for name, values in rounds.items()}  # the first warms up


def _accuracies(measured: Measured) -> dict[str, float]:
    return {"linear": measured.linear()["top1"], "knn": measured.knn(ks=(5,))["top1_weighted_k5"]}


def _zero_shot(teacher: ClipTeacher, measured: Measured) -> float:
    columns = teacher.zero_shot_classifier(measured.data.classes, templates_for(teacher))
    return top_k(zero_shot_logits(measured.test_features, columns), measured.data.test_labels, 1)


def _picture(path: Path, data: Labelled, measured: dict[str, Measured]) -> None:
    # the first test image of every second class: chosen by number, not by how well it does
    queries = [int(np.flatnonzero(data.test_labels == c)[0]) for c in range(0, len(data.classes), 2)][:_QUERIES]
    columns = {}
    for title in ("teacher", "student"):
        features, test_features = measured[title].features, measured[title].test_features
        columns[f"nearest under the {title}"] = nearest(features, test_features[queries], _NEIGHBOURS)[1]
    draw_neighbours(path, data.test, data.train, queries, columns)


def _spread(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds of each figure, and its sample standard deviation where there are several."""
    result = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    if len(rows) > 1:
        result |= {f"{key}_std": float(np.std([row[key] for row in rows], ddof=1)) for key in rows[0]}
    return result


@contextmanager
def _timing(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For a network so small that a second thread brings nothing, and costs ten times as much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
