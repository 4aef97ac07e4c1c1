"""Which recipe? Every trial behind docs/method.md: `python benchmarks/recipes.py distil|pretrain [--seeds 0,1,2]`.

Students are trained on patches from the left 38 % of each photograph of `sample:patches` and scored on patches from
40 to 60 %: both inside the training part, so the test split decides nothing. The student is a ResNet18 of half width,
at 32 px, for these are many runs; the winner is confirmed at full size by `mvmr quickstart --seeds 3`. Results are
appended to benchmarks/results/recipes.jsonl; `--table` prints them.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from lightning_fabric import Fabric
from torchvision.models.resnet import BasicBlock, ResNet

from mvmr.config import assign, parse
from mvmr.data import ImageSet
from mvmr.data.samples import strip
from mvmr.distillation.teacher import Teacher
from mvmr.distillation.tiny_clip import TinyClip, train_tiny_clip
from mvmr.encoder import build_projector
from mvmr.learner import Learner
from mvmr.neighbours import knn_predict
from mvmr.objective import Objective
from mvmr.preprocess import Preprocess
from mvmr.pretraining import recalibrate
from mvmr.protocols import Labelled, Measured
from mvmr.recipe import Recipe
from mvmr.representations import Representation
from mvmr.student import Student
from mvmr.targets import Targets, WithRows
from mvmr.trainer import train
from mvmr.views import Views

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
TEACHER = TinyClip(width=16, steps=60)
WIDTH = 256
COMMON = {"train": {"epochs": 20, "batch_size": 64, "optimizer": "adam", "precision": "bf16-mixed", "workers": 0}}

_off = "objective.invariance=0 objective.variance=0 objective.dependence=0"
_h = f"{_off} objective.space=features"
_reg = f"{_h} objective.regression.teacher=1"
_z = "projector=[1024,1024,1024]"
_all = " ".join(
    f"objective.representations.{name}=1" for name in ("augmented_pixels", "pixels", "scattering", "hog", "local_std")
)
_cf = "views.policy=crop+flip"
_T, _S, _H = (f"objective.representations.{name}" for name in ("teacher", "scattering", "hog"))
# label -> assignments to an empty recipe; the paper's weights are the defaults
TRIALS: dict[str, dict[str, str | None]] = {
    "distil": {
        "the teacher itself": None,
        "paper": f"{_z} {_T}=1",
        "paper, views crop+flip": f"{_z} {_T}=1 {_cf}",
        "paper, unbiased, crop+flip": f"{_z} {_T}=1 {_cf} objective.estimator=unbiased",
        "paper, invariance 0.1, crop+flip": f"{_z} {_T}=1 {_cf} objective.invariance=0.1",
        "dCor on h": f"{_h} {_T}=1 {_cf}",
        "dCor on h, unbiased": f"{_h} {_T}=1 {_cf} objective.estimator=unbiased",
        "dCor on h + decorrelation 0.04": f"{_h} {_T}=1 {_cf} objective.decorrelation=0.04",
        "regression": f"{_reg} {_cf}",
        "regression, paper's views": f"{_reg}",
        "regression, batch 256": f"{_reg} {_cf} train.batch_size=256",
        "regression, lr 3e-4": f"{_reg} {_cf} train.lr=3e-4",
        "regression, lr 3e-3": f"{_reg} {_cf} train.lr=3e-3",
        "regression, 60 epochs": f"{_reg} {_cf} train.epochs=60",
        "regression + 0.3 dCor(teacher)": f"{_reg} {_T}=0.3 {_cf}",
        "regression + 1.0 dCor(teacher)": f"{_reg} {_T}=1 {_cf}",
        "regression + 0.3 dCor(teacher), unbiased": f"{_reg} {_T}=0.3 {_cf} objective.estimator=unbiased",
        "regression + 1.0 dCor(teacher), unbiased": f"{_reg} {_T}=1 {_cf} objective.estimator=unbiased",
        "regression + 1.0 dCor(teacher), lr 3e-3": f"{_reg} {_T}=1 {_cf} train.lr=3e-3",
        "regression + 1.0 dCor(teacher), 60 epochs": f"{_reg} {_T}=1 {_cf} train.epochs=60",
        "regression + 1.0 dCor(teacher) + 1.0 dCor(views)": f"{_reg} {_T}=1 {_cf} objective.dependence=1",
        "regression + 3.0 dCor(teacher)": f"{_reg} {_T}=3 {_cf}",
        "regression + 3.0 dCor(teacher), unbiased": f"{_reg} {_T}=3 {_cf} objective.estimator=unbiased",
        "regression + 0.3 dCor(teacher, HOG)": f"{_reg} {_T}=0.3 {_H}=0.3 {_cf}",
        "regression + 0.3 dCor(teacher, HOG, scattering)": f"{_reg} {_T}=0.3 {_H}=0.3 {_S}=0.3 {_cf}",
        "regression + 0.3 dCor(teacher) + decorrelation 0.04": f"{_reg} {_T}=0.3 {_cf} objective.decorrelation=0.04",
    },
    "pretrain": {
        "paper": f"{_z} {_all}",
        "paper, unbiased": f"{_z} {_all} objective.estimator=unbiased",
        "paper, invariance 0.1": f"{_z} {_all} objective.invariance=0.1",
        "paper, no L3": f"{_z}",
        "paper, views crop+flip": f"{_z} {_all} {_cf}",
        "paper, invariance 0.1, crop+flip": f"{_z} {_all} {_cf} objective.invariance=0.1",
        "paper, scattering and HOG only": f"{_z} {_S}=1 {_H}=1",
        "paper, invariance 0.1 + decorrelation": f"{_z} {_all} objective.invariance=0.1 objective.decorrelation=0.04",
        "paper, batch 256": f"{_z} {_all} train.batch_size=256",
        "paper, lr 3e-4": f"{_z} {_all} train.lr=3e-4",
    },
}
BASELINE = {"distil": "regression", "pretrain": "paper"}


class Narrow(ResNet):
    """torchvision's ResNet18 with half as many channels after the stem: 256 features."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], zero_init_residual=True)
        self.fc = torch.nn.Identity()  # type: ignore[assignment]

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        return super()._make_layer(block, planes // 2, *args, **kwargs)


@click.command()
@click.argument("kind", type=click.Choice(list(TRIALS)))
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--only", help="Trials whose name holds this text.")
@click.option("--threads", default=1, show_default=True)
@click.option("--table", is_flag=True, help="Print what has been measured, as Markdown, and stop.")
def main(kind: str, seeds: str, only: str | None, threads: int, table: bool) -> None:
    """Run the trials of KIND that have not been run yet, and append their results."""
    if table:
        print_table(kind)
        return
    torch.set_num_threads(threads)
    fit, val = strip(0.0, 0.38, 80, seed=0), strip(0.40, 0.60, 40, seed=1)
    for seed in (int(seed) for seed in seeds.split(",")):
        for label, text in TRIALS[kind].items():
            if (only and only not in label) or any(r["trial"] == label and r["seed"] == seed for r in read(kind)):
                continue
            measured = run(text.split(), fit, val, seed) if text else score(teacher_of(fit, seed), fit, val)
            record = {"kind": kind, "trial": label, "seed": seed, **measured}
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(record, flush=True)


def run(assignments: list[str], fit: ImageSet, val: ImageSet, seed: int) -> dict[str, Any]:
    """Train one student and score its frozen features."""
    recipe = parse(Recipe, assign(COMMON, [*assignments, f"train.seed={seed}"]), where="trial")
    preprocess, cpu = Preprocess.for_size(32), torch.device("cpu")
    teachers: dict[str, Representation] = (
        {"teacher": teacher_of(fit, seed)} if "teacher" in recipe.objective.targets else {}
    )
    targets = Targets(
        recipe.objective.targets, fit, preprocess, teachers=teachers, cache_gb=4, device=cpu, workers=0, progress=False
    )
    views = WithRows(Views(fit, preprocess, recipe.views.policy, seed=seed, second=targets.second), targets.rows)
    torch.manual_seed(seed)
    regressed = {name: targets.statistics(name) for name in recipe.objective.regression}
    objective = Objective(recipe.objective, WIDTH, regressed)
    learner = Learner(Narrow(), build_projector(WIDTH, recipe.projector), objective, preprocess)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        fabric = Fabric(accelerator="cpu", precision=recipe.train.precision)
        train(learner, views, targets.of, recipe.train, fabric=fabric, folder=Path(name))
        last = json.loads((Path(name) / "metrics.jsonl").read_text().splitlines()[-1])
    seconds = time.perf_counter() - began
    recalibrate(learner.encoder, fit, preprocess, batch_size=256, workers=0, device=cpu)
    student = Student(learner.encoder, preprocess, dim=WIDTH, name="trial", identity=f"{time.time_ns():x}")
    kept = {key: last[key] for key in last if key.startswith(("rank", "biased", "unbiased"))}
    return score(student, fit, val) | {"seconds": round(seconds), "steps": int(last["step"])} | kept


def teacher_of(images: ImageSet, seed: int) -> Teacher:
    """The tiny CLIP of this seed, trained once."""
    place = RESULTS.parent.parent.parent / "runs" / "trials" / f"teacher-{seed}"
    return Teacher.load(train_tiny_clip(images, place, config=TEACHER, seed=seed))


def score(representation: Representation, fit: ImageSet, val: ImageSet) -> dict[str, float]:
    """Linear probe and kNN, top-1 on the validation part in percent."""
    data = Labelled.of(fit, val)
    measured = Measured(representation, data)
    voted = knn_predict(measured.features, data.labels, measured.test_features, len(data.classes), temperature=0.1)
    knn = 100 * float((voted == data.test_labels).mean())
    return {"linear": round(measured.linear()["top1"], 1), "knn": round(knn, 1)}


def read(kind: str) -> list[dict[str, Any]]:
    """The results so far."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def print_table(kind: str) -> None:
    """Mean and sample standard deviation over seeds, best first by linear probe and kNN together.

    Differences are taken seed by seed: the teacher of a seed is the same in all its trials.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for record in read(kind):
        rows.setdefault(record["trial"], {})[record["seed"]] = record
    base = rows[BASELINE[kind]]
    print(f"| trial | seeds | linear | kNN | linear, against `{BASELINE[kind]}` | kNN, against it | rank h / z |")
    print("|---|---|---|---|---|---|---|")

    def merit(item: tuple[str, dict[int, dict[str, Any]]]) -> float:
        return -statistics.mean(run["linear"] + run["knn"] for run in item[1].values())

    for label, runs in sorted(rows.items(), key=merit):
        figures = [_mean([run[key] for run in runs.values()]) for key in ("linear", "knn")]
        for key in ("linear", "knn"):
            figures.append(_mean([run[key] - base[seed][key] for seed, run in runs.items() if seed in base], "+"))
        ranks = [statistics.mean(run.get(key, 0) for run in runs.values()) for key in ("rank_h", "rank_z")]
        shown = " / ".join(f"{rank:.0f}" for rank in ranks if rank)
        print(f"| {label} | {len(runs)} | {' | '.join(figures)} | {shown} |")


def _mean(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


if __name__ == "__main__":
    main()
