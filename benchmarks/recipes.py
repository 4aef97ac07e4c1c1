"""Which recipe? The trials behind docs/method.md: `python benchmarks/recipes.py distil|pretrain [--table]`.

A trial trains a ResNet18 by `mvmr.training.pretraining.fit` on a part of a set's training split and scores its frozen
features on the rest of it, so that no test split decides anything; `--test` trains on the whole training split and
reads the test split, at the end. Each result is a line of benchmarks/results/recipes.jsonl: what is there is not run
again, so a run that was stopped goes on by the same command. Sets, teachers and trials: benchmarks/trials.py.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from trials import DISTIL, PRETRAIN, SETS, Trial, splits_of, teacher_of

from mvmr import __version__
from mvmr.bundles.preprocess import Preprocess
from mvmr.config import assign, parse
from mvmr.errors import MvmrError
from mvmr.evaluation.protocols import Labelled, Measured
from mvmr.models.student import Student
from mvmr.models.table import open_backbone
from mvmr.representations import Pretrained, Representation
from mvmr.training import pretraining, views
from mvmr.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
RUNS = Path(__file__).resolve().parents[1] / "runs" / "trials"
TRIALS = {"distil": DISTIL, "pretrain": PRETRAIN}
BASELINE = {"distil": "regression", "pretrain": "paper"}
COMMON = {
    "train": {"batch_size": 64, "lr": 1e-3, "workers": 0, "checkpoint_steps": 10**9},
}
_NEIGHBOURS = 5
_MEASURED = ("linear", "knn")
_KEY = ("kind", "set", "teacher", "trial", "seed", "size", "split", "device", "student")
_STUDENT = "resnet18"  # of results that name none


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@click.command()
@click.argument("kind", type=click.Choice(list(TRIALS)))
@click.option("--sets", default=",".join(SETS), show_default=True)
@click.option("--teachers", help="Only these, such as lite2; lite2+lite0: both at once.")
@click.option("--seeds", default="0,1,2", show_default=True, type=_numbers)
@click.option("--only", multiple=True, help="Trials of this name; may be given several times.")
@click.option("--size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--student", default=_STUDENT, show_default=True, help="Its backbone.")
@click.option("--test", is_flag=True, help="Train on the whole training split, and read the test split.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--table", is_flag=True, help="Print what has been measured, of --only or of all, as Markdown.")
def main(
    kind: str, sets: str, teachers: str | None, seeds: tuple[int, ...], only: tuple[str, ...], size: int,
    student: str, test: bool, device: str, threads: int, table: bool,
) -> None:  # fmt: skip
    """Run the trials of KIND that have not been run yet, and append their results."""
    split, chosen = "test" if test else "validation", sets.split(",")
    if table:
        print_tables(kind, size, split, student, only)
        return
    torch.set_num_threads(threads)
    try:
        for name in chosen:
            if name not in SETS:
                raise MvmrError(f"there is no set {name!r}; there are {', '.join(SETS)}")
        if unknown := [trial for trial in only if trial not in TRIALS[kind]]:
            raise MvmrError(f"there is no trial {unknown[0]!r} of {kind}; see TRIALS in benchmarks/trials.py")
        if test and not only:
            raise MvmrError("--test reads test splits: say for which trials, --only NAME")
        known = {teacher for each in SETS.values() for teacher in each.teachers}
        wanted = teachers.split(",") if teachers else []
        if strange := sorted({name for several in wanted for name in several.split("+")} - known):
            raise MvmrError(f"there is no teacher {strange[0]!r}; there are {', '.join(sorted(known))}")
        for seed in seeds:
            for label in only or TRIALS[kind]:
                for name in chosen:
                    named = SETS[name].teachers if kind == "distil" else ("none",)
                    for teacher in [t for t in wanted if "+" in t or t in named] if wanted else named:
                        key = dict(
                            zip(_KEY, (kind, name, teacher, label, seed, size, split, device, student), strict=True)
                        )
                        carry_out(key, TRIALS[kind][label])
    except MvmrError as error:
        raise click.ClickException(str(error)) from error


def carry_out(key: dict[str, Any], trial: Trial | None) -> None:
    """Run a trial unless its result is there, and append it."""
    if any(all(record[k] == key[k] for k in _KEY) for record in read()):
        return
    record = key | measure(key, trial, device=key["device"])
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print({k: record[k] for k in (*_KEY, "linear", "knn", "seconds") if k in record}, flush=True)


def measure(key: dict[str, Any], trial: Trial | None, *, device: str = "cpu") -> dict[str, Any]:
    """Train one student and score its frozen features; without a trial score the teacher, or a random encoder."""
    train, held = splits_of(key["set"], test=key["split"] == "test")
    data, seed = Labelled.of(train, held), key["seed"]
    names = [] if key["teacher"] == "none" else key["teacher"].split("+")
    each = {name: teacher_of(name, train, seed, RUNS) for name in names}
    if trial is None:
        return score(each[names[0]] if names else random_encoder(key, data), data)
    epochs = SETS[key["set"]].epochs * trial.epochs
    where = [f"train.seed={seed}", f"train.epochs={epochs}", f"views.size={key['size']}"]
    where.append(f"student.backbone={key['student']}")
    teachers: dict[str, Pretrained] = {}
    if len(names) > 1:
        teachers = each
        where.append(f"method.teachers={{{', '.join(f'{name} = {1 / len(names)}' for name in names)}}}")
    elif names:
        teachers = {name: change(each[names[0]], train) for name, change in trial.teachers.items()}
    recipe = parse(Recipe, assign(COMMON, [*trial.assign.split(), *where]), where="trial")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as patches:
        if trial.crop is not None:
            patches.enter_context(patch.object(views, "CROP_AREA", (trial.crop, 1.0)))
        bundle = pretraining.fit(train, Path(scratch) / "bundle", recipe, teachers=teachers, device=device)
        seconds = time.perf_counter() - began
        last = json.loads((bundle.path / "metrics.jsonl").read_text().splitlines()[-1])
        found = score(bundle.student(), data)
    ran = {"assign": trial.assign, "epochs": epochs, "images": train.fingerprint[:16], "mvmr": __version__}
    left_out = {"step", "epoch", "lr", "images_per_s", "seconds"}
    return (
        found
        | {"seconds": round(seconds), "steps": last["step"]}
        | ran
        | {name: value for name, value in last.items() if name not in left_out}
    )


def random_encoder(key: Mapping[str, Any], data: Labelled) -> Student:
    """A student that was not trained but for its batch-norm statistics."""
    size, seed = key["size"], key["seed"]
    recipe = parse(Recipe, assign(COMMON, [f"student.backbone={key['student']}"]), where="trial")
    backbone = open_backbone(recipe.student, size)
    preprocess = Preprocess.for_size(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = backbone.build()
    pretraining.recalibrate(encoder, data.train, preprocess, batch_size=64, workers=0, device=torch.device("cpu"))
    identity = hashlib.sha256(f"random {backbone} {size} {seed} {data.train.fingerprint}".encode()).hexdigest()
    return Student(encoder, preprocess, dim=backbone.width, name="random", identity=identity)


def score(representation: Representation, data: Labelled) -> dict[str, float]:
    """Linear probe and kNN, top-1 in percent, by the protocols of `mvmr evaluate`."""
    measured = Measured(representation, data)
    knn = measured.knn([_NEIGHBOURS])[f"top1_weighted_k{_NEIGHBOURS}"]
    return {"linear": round(measured.linear()["top1"], 1), "knn": round(knn, 1)}


def read() -> list[dict[str, Any]]:
    """The results so far."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [{"student": _STUDENT} | json.loads(line) for line in lines]


Run = tuple[str, int]  # device and seed
Runs = dict[str, dict[Run, dict[str, Any]]]  # trial -> run -> result


def print_tables(kind: str, size: int, split: str, student: str, only: Sequence[str] = ()) -> None:
    """What each trial gains over the baseline, then the same set by set for those that have run on every set.

    only: these trials and the baseline; all, left out

    Gains are taken run by run, on the same device and seed; a set with its teacher counts once, however often it ran.
    """
    everything: dict[tuple[str, str], Runs] = defaultdict(lambda: defaultdict(dict))
    for record in read():
        is_of = (record["kind"], record["size"], record["split"], record["student"]) == (kind, size, split, student)
        if is_of and (not only or record["trial"] in (*only, BASELINE[kind])):
            run = record["device"], record["seed"]
            everything[record["set"], record["teacher"]][record["trial"]][run] = record
    combos = {name: runs for name, runs in everything.items() if "+" not in name[1]}
    base = BASELINE[kind]
    gains = {label: {name: _gain(runs, label, base) for name, runs in combos.items()} for label in TRIALS[kind]}
    found = {label: {name: gain for name, gain in of.items() if gain} for label, of in gains.items()}
    everywhere = [label for label in found if len(found[label]) == len(combos)]
    ranks = {
        label: statistics.mean(
            _rank([sum(found[other][name]) for other in everywhere], sum(found[label][name])) for name in combos
        )
        for label in everywhere
    }
    print("| trial | sets | runs | linear | kNN | worst set | mean rank |\n|---|---|---|---|---|---|---|")
    for label in sorted(
        (label for label in found if found[label]), key=lambda label: _order(found[label], ranks, label)
    ):
        values = found[label]
        runs = sum(len(_pairs(combos[name], label, base)) for name in values)
        means = " | ".join(f"{statistics.mean(value[k] for value in values.values()):+.1f}" for k in range(2))
        worst = min(values, key=lambda name: sum(values[name]))
        shown = f"{' '.join(_named(worst))}: {values[worst][0]:+.1f} / {values[worst][1]:+.1f}"
        rank = f"{ranks[label]:.1f}" if label in ranks else ""
        print(f"| {label} | {len(values)} | {runs} | {means} | {shown} | {rank} |")
    shown_labels = [label for label in everywhere if label != base]
    print(f"\n| set | {base} | {' | '.join(shown_labels)} |\n|{'---|' * (len(shown_labels) + 2)}")
    for name, of in combos.items():
        cells = [_cell(of, label, base) for label in (base, *shown_labels)]
        print(f"| {', '.join(_named(name))} | {' | '.join(cells)} |")
    if several := {name for name, teacher in everything if "+" in teacher}:
        print_teachers({name: runs for name, runs in everything.items() if name[0] in several})


def print_teachers(combos: Mapping[tuple[str, str], Runs]) -> None:
    """Linear / kNN, mean ± deviation (runs), of students of one teacher and of several at once, by trial."""
    labels = sorted({label for (_, teacher), runs in combos.items() if "+" in teacher for label in runs})
    print(f"\n| set, teachers | {' | '.join(labels)} |\n|{'---|' * (len(labels) + 1)}")
    for (name, teacher), runs in sorted(combos.items()):
        cells = [_cell(runs, label, label) if label in runs else "" for label in labels]
        print(f"| {name}, {teacher} | {' | '.join(cells)} |")


def _named(combo: tuple[str, str]) -> list[str]:
    return [part for part in combo if part != "none"]


def _order(values: dict[tuple[str, str], tuple[float, float]], ranks: dict[str, float], label: str) -> tuple[Any, ...]:
    return label not in ranks, ranks.get(label, 0.0), -statistics.mean(sum(value) for value in values.values())


def _rank(gains: Sequence[float], gain: float) -> float:
    """1 for the largest; equal ones share the mean of their places."""
    return 1 + sum(other > gain for other in gains) + (sum(other == gain for other in gains) - 1) / 2


def _pairs(runs: Runs, label: str, base: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The results of a trial, each with the baseline's of the same run."""
    both = sorted(runs.get(label, {}).keys() & runs.get(base, {}).keys())
    return [(runs[label][run], runs[base][run]) for run in both]


def _gain(runs: Runs, label: str, base: str) -> tuple[float, float] | None:
    """Linear and kNN, in points above the baseline; None where no run can be compared."""
    pairs = _pairs(runs, label, base)
    if not pairs:
        return None
    linear, knn = (statistics.mean(run[of] - against[of] for run, against in pairs) for of in _MEASURED)
    return linear, knn


def _cell(runs: Runs, label: str, base: str) -> str:
    texts, pairs = [], _pairs(runs, label, base)
    if not pairs:
        return ""
    for of in _MEASURED:
        values = [run[of] - (0 if label == base else against[of]) for run, against in pairs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):{'' if label == base else '+'}.1f}{spread}")
    return f"{' / '.join(texts)} ({len(pairs)})"


if __name__ == "__main__":
    main()
