"""From images to a student bundle: what `mvmr pretrain` does, and `mvmr distill` with a teacher beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset

from mvmr.bundles import bundle
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.manifest import WEIGHTS
from mvmr.bundles.preprocess import Preprocess
from mvmr.bundles.tensors import Normalise, channels_first
from mvmr.config import to_mapping
from mvmr.cores import usable_cores
from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError, one_line
from mvmr.methods.method import Method, Setting
from mvmr.methods.table import build_method
from mvmr.models.backbone import Backbone
from mvmr.models.initial import read_init
from mvmr.models.student import save_student
from mvmr.models.table import open_backbone
from mvmr.progress import is_wanted, say
from mvmr.representations import Pretrained
from mvmr.storage.atomic import write_text
from mvmr.storage.lock import LOCK
from mvmr.training import checkpoint
from mvmr.training.checks import check_recipe, check_trainable, settle, side
from mvmr.training.recipe import Recipe, load_recipe
from mvmr.training.runs import RunFolder, claim, find_run, give_up
from mvmr.training.shorthands import Shorthands, assignments
from mvmr.training.targets import Batch, Targets, WithRows
from mvmr.training.trainer import Precision, Watch, leave_the_group, read, train
from mvmr.training.views import Views, view_sides

_RECALIBRATION_IMAGES = 16384


def pretrain(
    data: str,
    out: str | Path,
    *,
    recipe: str | Path = "default",
    assign: Sequence[str] = (),
    init: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    devices: int = 1,
    max_unreadable: float = 0.01,
    progress: bool | None = None,
    **settings: Unpack[Shorthands],
) -> Bundle:
    """Train a student without labels and without a teacher (self-supervised), and write its bundle.

    Args:
        data: a folder of images, or a name such as ``stl10:ROOT`` or ``sample:patches`` (docs/data.md).
        out: folder of the bundle; while the run goes on its files are in ``out`` + ``.partial``.
        recipe: name of a shipped recipe, or a TOML file.
        assign: changes to the recipe, such as ``"train.lr=3e-4"``.
        init: bundle or state-dict file the encoder starts from.
        resume: go on with the interrupted run of ``out``; of a finished one, return its bundle.
        overwrite: replace the bundle in ``out``, and forget an interrupted run there.
        device, devices: Lightning Fabric's accelerator name and number of devices (under torchrun: per node).
        max_unreadable: the run stops when a larger share of the images can't be read.
        progress: show progress on standard error.
        settings: keys of the recipe that have a name of their own, such as ``epochs=5``; ``assign`` comes after them.

    Raises:
        MvmrError: anything a user can mend, from an unknown recipe to a loss that is not finite.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; ``resume`` goes on.
    """
    progress = is_wanted(progress)
    resolved = load_recipe(recipe, "mvmr", (*assignments(settings), *assign))
    check_recipe(resolved, (), None if resume else init)
    images = open_images(
        data, "unlabelled", background=resolved.views.background, max_unreadable=max_unreadable, progress=progress
    )
    return fit(
        images, out, resolved, init=init, resume=resume, overwrite=overwrite, device=device, devices=devices,
        progress=progress,
    )  # fmt: skip


def fit(
    images: ImageSet,
    out: str | Path,
    recipe: Recipe,
    *,
    teachers: Mapping[str, Pretrained] | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    devices: int = 1,
    watch: Watch | None = None,
    progress: bool | None = None,
) -> Bundle:
    """Train a student of ``images`` by ``recipe``; never reads a label. Arguments as in :func:`pretrain`.

    Args:
        teachers: further representations by the name the recipe calls them. Each is shown what ``images`` give: the
            original image, RGB, upright, on the background of the recipe.
        watch: called after every step with the method, the step and the number of steps; training waits for it.
    """
    progress = is_wanted(progress)
    teachers = teachers or {}
    if images.background != recipe.views.background:
        raise MvmrError(
            f"{images.name} was opened on background {images.background}, and [views] background = "
            f"{recipe.views.background}: open the images on the recipe's"
        )
    recipe = settle(recipe, images, device)
    fabric = launch(device, devices, recipe.train.precision)
    # Refuse what can't be before anything is computed.
    check_trainable(recipe, len(images), teachers, fabric.world_size)
    size = side(recipe, images)
    result, preprocess, backbone = (
        Path(out),
        Preprocess.for_size(size, images.background),
        open_backbone(recipe.student, size),
    )
    run = find_run(result, _describe(images, recipe, teachers, init, result), resume=resume, overwrite=overwrite)

    def make() -> None:
        if not run.finished:
            weights = None if init is None else read_init(backbone, init)
            _train(
                images, recipe, backbone, preprocess, run, fabric,
                teachers=teachers, init=weights, watch=watch, progress=progress,
            )  # fmt: skip

    return carry_out(run, result, fabric, make)


def carry_out(run: RunFolder, out: Path, fabric: Fabric, make: Callable[[], None]) -> Bundle:
    """Let ``make`` write a bundle's files into the folder of ``run``, claimed for it, and publish them as ``out``.

    Args:
        make: called on every rank; does what an earlier, killed run has left to do, which may be nothing.
    """
    if run.published:
        return bundle.load(out)
    fabric.barrier()
    with claim(run) if fabric.is_global_zero else nullcontext():
        fabric.barrier()
        try:
            make()
        except MvmrError:
            if fabric.is_global_zero:
                give_up(run)
            raise
        if fabric.is_global_zero:
            for name in (checkpoint.NAME, LOCK):
                (run.path / name).unlink(missing_ok=True)
            bundle.publish(run.path, out)
        fabric.barrier()
    return bundle.load(out)


def _train(
    images: ImageSet,
    recipe: Recipe,
    backbone: Backbone,
    preprocess: Preprocess,
    run: RunFolder,
    fabric: Fabric,
    *,
    teachers: Mapping[str, Pretrained],
    init: Mapping[str, Tensor] | None,
    watch: Watch | None,
    progress: bool,
) -> None:
    """Train, and write the bundle's files into the run's folder."""
    if fabric.is_global_zero:
        write_text(run.path / "skipped.txt", "".join(f"{skipped}\n" for skipped in images.skipped))
    say(images.describe(preprocess.crop), shown=progress and fabric.is_global_zero)
    workers = usable_cores() if recipe.train.workers is None else recipe.train.workers
    targets = Targets(
        recipe.targets, images, preprocess, teachers=teachers, cache_gb=recipe.train.cache_gb,
        device=fabric.device, workers=workers, progress=progress,
    )  # fmt: skip
    views: Dataset[Batch] = WithRows(
        Views(images, preprocess, recipe.view_specs, recipe.views.policy, seed=recipe.train.seed), targets.rows
    )
    learner = build_learner(recipe, backbone, preprocess, len(images), targets, init)
    steps = train(
        learner, views, targets.of, recipe.train, recipe.objective, fabric=fabric, folder=run.path,
        watch=watch, progress=progress,
        no_weight_decay={f"encoder.{name}" for name in backbone.no_weight_decay(learner.encoder)},
        features=partial(features_of, learner, images, preprocess, batch_size=recipe.train.batch_size, workers=workers),
    )  # fmt: skip
    served: nn.Module = learner.encoder
    if recipe.method.has_classes and learner.projector is not None:
        served = nn.Sequential(learner.encoder, learner.projector)
    recalibrate(served, images, preprocess, batch_size=recipe.train.batch_size, workers=workers, device=fabric.device)
    if fabric.is_global_zero:
        save_student(
            run.path, learner.encoder, backbone, preprocess=preprocess,
            training=run.description | {"steps": steps}, projector=learner.projector,
        )  # fmt: skip


def launch(device: str, devices: int, precision: Precision | None) -> Fabric:
    """Start Fabric on every device.

    Raises:
        MvmrError: there is no such device, or not so many.
    """
    try:
        fabric = Fabric(accelerator=device, devices=devices, precision=precision)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:  # Fabric has one for each kind of mistake
        raise MvmrError(f"cannot use {devices} of device {device!r} ({one_line(error)}); see `mvmr doctor`") from error
    fabric.launch()
    return fabric


def teacher_device(device: str) -> str:
    """Where a teacher is computed, before any device of the training is taken."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def build_learner(
    recipe: Recipe, backbone: Backbone, preprocess: Preprocess, images: int, targets: Targets,
    init: Mapping[str, Tensor] | None = None,
) -> Method:  # fmt: skip
    """Encoder and method of ``recipe``, drawn from its seed; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        encoder = backbone.build(view_sides(recipe.view_specs, preprocess.crop))
        if init is not None:
            encoder.load_state_dict({**encoder.state_dict(), **init})
        rows = {name: targets.stored(name) for name in recipe.method.stored_targets}
        return build_method(recipe.method, encoder, Setting(backbone.width, preprocess, images, rows))


@torch.no_grad()
def features_of(learner: Method, images: ImageSet, preprocess: Preprocess, *, batch_size: int, workers: int) -> Tensor:
    """Features of all original views as they are now, [N, D] float32 on the CPU; training goes on as if never asked."""
    device = next(learner.parameters()).device
    loader = DataLoader(
        Originals(images, preprocess), batch_size=batch_size, num_workers=workers, worker_init_fn=leave_the_group,
        generator=torch.Generator(),
    )  # fmt: skip
    learner.eval()
    rows = [learner.features(batch.to(device)).float().cpu() for batch in read(loader)]
    learner.train()
    return torch.cat(rows)


def recalibrate(
    encoder: nn.Module, images: ImageSet, preprocess: Preprocess, *, batch_size: int, workers: int, device: torch.device
) -> None:
    """Set an encoder's batch-norm statistics to those of original views, the only kind it is served.

    In training they are running averages over both views, and lag behind the weights.
    """
    indices = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_RECALIBRATION_IMAGES].tolist()
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    if len(batches) > 1:
        batches = [batch for batch in batches if len(batch) == batch_size]  # a short last one would count too much
    originals = Originals(images, preprocess)
    loader = DataLoader(originals, batch_sampler=batches, num_workers=workers, generator=torch.Generator())
    update_bn(map(Normalise(preprocess), read(loader)), encoder, device=device)
    encoder.eval()


class Originals(Dataset[Tensor]):
    """The original view of each image alone, uint8 [3, S, S]."""

    def __init__(self, images: ImageSet, preprocess: Preprocess):
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return channels_first(self.preprocess.image(self.images.load(index)))


def _describe(
    images: ImageSet, recipe: Recipe, teachers: Mapping[str, Pretrained], init: str | Path | None, out: Path
) -> dict[str, Any]:
    return {
        "method": recipe.method.name,
        "teachers": {
            name: {"name": teacher.name, "identity": teacher.identity}
            | _place(teacher.weights, getattr(teacher, "origin", {}), out)
            for name, teacher in teachers.items()
        },
        "data": {"name": images.name, "split": images.split, "images": len(images), "fingerprint": images.fingerprint},
        "init": None if init is None else str(init),
        "seed": recipe.train.seed,
        "recipe": to_mapping(recipe),
    }


def _place(weights: str, origin: Mapping[str, str], out: Path) -> dict[str, Any]:
    """How a teacher is had again: where its file lies from the bundle on, if below the bundle's own folder, or wholly.

    weights: a file, or words for people; origin: kind and what was typed, of a teacher that is no CLIP
    """
    if os.sep not in weights and not os.path.isfile(weights):  # a path stays one where the file is gone meanwhile
        return {"weights": weights, **origin}
    file, folder = Path(weights).resolve(), out.resolve()
    beside = file.is_relative_to(folder.parent)
    place = {"weights": os.path.relpath(file, folder) if beside else str(file)} | ({"beside": True} if beside else {})
    return place | ({**origin, "what": origin["what"].replace(weights, WEIGHTS)} if origin else {})
