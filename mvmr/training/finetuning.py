"""From a bundle and a few labels to a fine-tuned bundle: what `mvmr finetune` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn.utils import skip_init

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.head import Head
from mvmr.config import to_mapping
from mvmr.cores import usable_cores
from mvmr.data import ImageSet
from mvmr.data.image_set import digest
from mvmr.errors import MvmrError
from mvmr.evaluation.classifiers import LinearHead, class_weights, linear_probe
from mvmr.evaluation.evaluate import head_name, open_labelled, record
from mvmr.evaluation.protocols import Labelled, Measured, Values, classification
from mvmr.methods.supervised import Supervised, SupervisedConfig
from mvmr.models.student import Student, save_student
from mvmr.models.table import backbone_of
from mvmr.progress import is_wanted, say
from mvmr.representations.cache import represent
from mvmr.training.precision import native_precision
from mvmr.training.pretraining import carry_out, features_of, launch, recalibrate
from mvmr.training.recipe import FinetuneRecipe, read_recipe
from mvmr.training.runs import RunFolder, find_run
from mvmr.training.shorthands import Tuning, assignments
from mvmr.training.subsets import draw, find_listed_images, parse_labels
from mvmr.training.targets import WithRows
from mvmr.training.trainer import TrainConfig, train
from mvmr.training.views import Views, make_policy

_RECALIBRATION_BATCH = 256
_SMALLEST_BATCH = 4  # batch normalisation of fewer says little


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A fine-tuning run: what it starts from, what it learns from, how, and what its head is called."""

    start: Bundle
    labelled: Labelled
    few: Labelled  # as `labelled`, with the labelled subset as its training split
    labels: str  # "1%", or "100 files"
    recipe: FinetuneRecipe
    head: str


def finetune(
    bundle: str | os.PathLike[str],
    data: str,
    out: str | Path,
    *,
    labels: str = "10%",
    recipe: str | Path = "default",
    assign: Sequence[str] = (),
    head: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    devices: int = 1,
    max_unreadable: float = 0.01,
    progress: bool | None = None,
    **settings: Unpack[Tuning],
) -> tuple[Bundle, Values]:
    """Train a whole encoder and a linear classifier on a few labelled images, and write both as a new bundle.

    Args:
        bundle: what training starts from; it stays as it is.
        data: labelled data. Training reads the labels of the subset alone; the test split is scored once, at the end.
        labels: a share such as "1%", the same number of images of every class drawn by the recipe's ``train.seed``,
            or a file that lists images, one name a line (see :mod:`mvmr.training.subsets`).
        recipe, assign: ``default``, ``few-label-paper`` or a TOML file, and changes to it.
        head: name of the head; made from the name of the data when left out.

    The other arguments: as in :func:`mvmr.training.pretraining.pretrain`.

    Returns:
        The new bundle, and its figures: on the test split, in percent, what protocol ``linear`` gives, and
        ``top1_frozen``, the linear probe of the starting encoder on the same subset; ``images``, the subset's size.

    Raises:
        MvmrError: anything a user can mend, before training starts; or a loss that is not finite.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; ``resume`` goes on.
    """
    progress = is_wanted(progress)
    assign = (*assignments(settings), *assign)
    plan = _plan(bundle, data, out, labels, recipe, assign, head, max_unreadable=max_unreadable, progress=progress)
    precision = native_precision(plan.recipe.train.precision, device, plan.start.manifest.preprocessing.crop)
    fabric = launch(device, devices, precision)
    config = _fit_batch_size(plan.recipe.train, plan.few.train, fabric, progress=progress)
    plan = replace(plan, recipe=replace(plan.recipe, train=replace(config, precision=precision)))
    run = find_run(Path(out), _describe(plan), resume=resume, overwrite=overwrite)
    command = f"mvmr finetune {plan.start.path} --data {data} --labels {labels} --recipe {recipe} --head {plan.head}"
    command += "".join(f" --set {assignment}" for assignment in assign) + f" --out {out}"

    def make() -> None:
        if not (run.finished and plan.head in bundles.load(run.path).heads):  # the head is written last
            _finetune(plan, run, fabric, command=command, progress=progress)

    result = carry_out(run, Path(out), fabric, make)
    return result, dict(result.head(plan.head).metrics["values"])


def _plan(
    bundle: str | os.PathLike[str],
    data: str,
    out: str | Path,
    labels: str,
    recipe: str | Path,
    assign: Sequence[str],
    head: str | None,
    *,
    max_unreadable: float,
    progress: bool,
) -> _Plan:
    """Refuse what can't be before anything is computed."""
    choice, start = parse_labels(labels), bundles.load(bundle)
    resolved = read_recipe(FinetuneRecipe, recipe, resources.files("mvmr") / "recipes" / "finetune", assign)
    make_policy(resolved.views.policy, start.manifest.preprocessing.crop, start.manifest.preprocessing)
    if Path(out).resolve() == start.path.resolve():
        raise MvmrError(f"{out} is the bundle to start from, which is kept as it is: give another --out")
    background = start.manifest.preprocessing.background
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    if isinstance(choice, Path):
        rows = find_listed_images(labelled.train, choice)
        label_text = f"{len(rows)} files"
    else:
        rows = draw(labelled.train, choice, resolved.train.seed)
        label_text = f"{100 * choice:g}%"
    few = replace(labelled, train=labelled.train.subset(rows), labels=labelled.labels[rows])
    name = head or head_name(data)
    _check_head(name, few.classes, start.manifest.embedding_dim)
    return _Plan(start=start, labelled=labelled, few=few, labels=label_text, recipe=resolved, head=name)


def _check_head(name: str, classes: tuple[str, ...], width: int) -> None:
    """Make a head, only to see that it can be made: a bad name is known now, not after training."""
    weight, bias = np.zeros((len(classes), width), np.float32), np.zeros(len(classes), np.float32)
    Head(name=name, weight=weight, bias=bias, classes=classes, metrics={})


def _fit_batch_size(config: TrainConfig, images: ImageSet, fabric: Fabric, *, progress: bool) -> TrainConfig:
    """``config`` with batches no larger than a small subset can fill."""
    largest = len(images) // config.accumulate // fabric.world_size * fabric.world_size
    if largest < _SMALLEST_BATCH:
        raise MvmrError(
            f"{images.name}: {len(images)} labelled images are too few to fine-tune on, a step takes "
            f"{_SMALLEST_BATCH * config.accumulate} or more: give a larger share or a longer list"
        )
    if largest < config.batch_size:
        shown = progress and fabric.is_global_zero
        say(f"{len(images)} labelled images: batches of {largest}, not {config.batch_size}", shown=shown)
        config = replace(config, batch_size=largest)
    config.steps(len(images), fabric.world_size)
    return config


def _finetune(plan: _Plan, run: RunFolder, fabric: Fabric, *, command: str, progress: bool) -> None:
    """Train, and write the bundle's files into the run's folder, the head with its figures last."""
    recipe, images, manifest = plan.recipe, plan.few.train, plan.start.manifest
    preprocess, shown = manifest.preprocessing, progress and fabric.is_global_zero
    say(images.describe(preprocess.crop), shown=shown)
    with torch.random.fork_rng(devices=[]):
        student = plan.start.student(str(fabric.device))
    top1_frozen = Measured(student, plan.few, device=str(fabric.device), progress=shown).linear()["top1"]
    say(f"top1 of the frozen encoder's linear probe: {top1_frozen:.1f} %", shown=shown)
    workers = usable_cores() if recipe.train.workers is None else recipe.train.workers
    settle = partial(
        recalibrate, images=plan.labelled.train, preprocess=preprocess, batch_size=_RECALIBRATION_BATCH,
        workers=workers, device=fabric.device,
    )  # fmt: skip
    weights = torch.from_numpy(class_weights(plan.few.labels, len(plan.few.classes))) if recipe.balanced else None
    learner = Supervised(
        student.encoder.requires_grad_(True), _head(plan, student, settle, shown), preprocess,
        weights,
    )  # fmt: skip
    views = Views(images, preprocess, SupervisedConfig().views, recipe.views.policy, seed=recipe.train.seed)
    backbone = backbone_of(manifest)
    steps = train(
        learner, WithRows(views, {"label": plan.few.labels}), lambda batch: {"label": batch["target.label"]},
        recipe.train, fabric=fabric, folder=run.path, progress=progress,
        no_weight_decay={f"encoder.{name}" for name in backbone.no_weight_decay(learner.encoder)},
        features=partial(features_of, learner, images, preprocess, batch_size=recipe.train.batch_size, workers=workers),
    )  # fmt: skip
    if recipe.recalibrate:
        settle(learner.encoder)
    if fabric.is_global_zero:
        description = run.description | {"steps": steps}
        bundle = save_student(run.path, learner.encoder, backbone, preprocess=preprocess, training=description)
        final = Student(learner.encoder, preprocess, dim=student.dim, name=student.name, identity=bundle.space_id)
        head = LinearHead(learner.head.weight.detach().cpu().numpy(), learner.head.bias.detach().cpu().numpy(), {})
        values = _score(final, head, plan.few, shown)
        values |= {"images": len(images), "top1_frozen": top1_frozen}
        metrics = record(command, plan.few.test.name, f"fewshot {plan.labels}", values)
        bundles.add_head(bundle, plan.head, head.weight, head.bias, plan.few.classes, metrics)


def _head(plan: _Plan, student: Student, settle: Callable[[nn.Module], None], progress: bool) -> nn.Linear:
    """The classifier that training starts from: zero, or the linear probe of the subset.

    In training, features are normalised by the statistics of the data themselves. Under those of the images the
    encoder was made from they may be quite others, and a probe of them worth nothing: so ``settle`` comes first.
    """
    few = plan.few
    linear = skip_init(nn.Linear, student.dim, len(few.classes), device=student.device)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        if plan.recipe.head == "probe":
            settle(student.encoder)
            identity = digest([student.identity.encode(), plan.labelled.train.fingerprint.encode()])
            variant = Student(
                student.encoder, student.preprocess, dim=student.dim, name=student.name, identity=identity
            )
            features = _features(few.train, variant, progress)
            probe = linear_probe(
                features, few.labels, len(few.classes), balanced=plan.recipe.balanced, progress=progress
            )
            linear.weight.copy_(torch.from_numpy(probe.weight))
            linear.bias.copy_(torch.from_numpy(probe.bias))
    return linear


def _score(student: Student, head: LinearHead, data: Labelled, progress: bool) -> Values:
    """What `classification` says of the test split, of which every image counts."""
    return classification(head.logits(_features(data.test, student, progress)), data.test_labels, data.classes)


def _features(images: ImageSet, student: Student, progress: bool) -> np.ndarray:
    workers = 0 if images.native_size else usable_cores()  # arrays in memory need no help
    return represent(images, student, device=student.device, workers=workers, progress=progress)


def _describe(plan: _Plan) -> dict[str, Any]:
    train, few = plan.labelled.train, plan.few.train
    return {
        "method": "fine-tuning",
        "teachers": plan.start.manifest.training.get("teachers", {}),  # their licences still apply
        "start": {"path": str(plan.start.path), "space_id": plan.start.space_id},
        "data": {"name": train.name, "split": train.split, "images": len(train), "fingerprint": train.fingerprint},
        "subset": {
            "labels": plan.labels,
            "seed": plan.recipe.train.seed,
            "images": len(few),
            "keys": digest(key.encode() for key in few.keys),
        },
        "head": plan.head,
        "seed": plan.recipe.train.seed,
        "recipe": to_mapping(plan.recipe),
    }
