"""Which recipe? The trials behind docs/method.md: `python benchmarks/recipes.py distil|pretrain [--table]`.

A trial trains a ResNet18 by `mvmr.pretraining.fit` on a part of a set's training split and scores its frozen features
on the rest of it, so that no test split decides anything; `--test` trains on the whole training split and reads the
test split, at the end. Each result is a line of benchmarks/results/recipes.jsonl: what is there is not run again, so
a run that was stopped goes on by the same command. Sets, teachers and trials: benchmarks/trials.py.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from objectives import Observed
from trials import DISTIL, PRETRAIN, SETS, Trial, splits_of, teacher_of

from mvmr import pretraining, views
from mvmr.config import assign, parse
from mvmr.encoder import build_encoder, feature_dim
from mvmr.errors import MvmrError
from mvmr.preprocess import Preprocess
from mvmr.protocols import Labelled, Measured
from mvmr.recipe import Recipe
from mvmr.representations import Pretrained, Representation
from mvmr.student import Student

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
RUNS = Path(__file__).resolve().parents[1] / "runs" / "trials"
TRIALS = {"distil": DISTIL, "pretrain": PRETRAIN}
BASELINE = {"distil": "regression", "pretrain": "paper"}
COMMON = {
    "model": {"architecture": "resnet18"},
    "train": {"batch_size": 64, "lr": 1e-3, "workers": 0, "checkpoint_steps": 10**9},
}
_NEIGHBOURS = 5
_KEY = ("kind", "set", "teacher", "trial", "seed", "size", "split")


@click.command()
@click.argument("kind", type=click.Choice(list(TRIALS)))
@click.option("--sets", default=",".join(SETS), show_default=True)
@click.option("--teachers", help="Only these, such as lite2.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--only", multiple=True, help="Trials of this name; may be given several times.")
@click.option("--size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--test", is_flag=True, help="Train on the whole training split, and read the test split.")
@click.option("--threads", default=1, show_default=True)
@click.option("--table", is_flag=True, help="Print what has been measured, as Markdown, and stop.")
def main(
    kind: str, sets: str, teachers: str | None, seeds: str, only: tuple[str, ...], size: int, test: bool,
    threads: int, table: bool,
) -> None:  # fmt: skip
    """Run the trials of KIND that have not been run yet, and append their results."""
    split, chosen = "test" if test else "validation", sets.split(",")
    if table:
        print_tables(kind, size, split)
        return
    torch.set_num_threads(threads)
    try:
        for name in chosen:
            if name not in SETS:
                raise MvmrError(f"there is no set {name!r}; there are {', '.join(SETS)}")
        if unknown := [trial for trial in only if trial not in TRIALS[kind]]:
            raise MvmrError(f"there is no trial {unknown[0]!r} of {kind}; see TRIALS in benchmarks/trials.py")
        for seed in map(int, seeds.split(",")):
            for label in only or TRIALS[kind]:
                for name in chosen:
                    named = SETS[name].teachers if kind == "distil" else ("none",)
                    for teacher in named if teachers is None else [t for t in named if t in teachers.split(",")]:
                        key = dict(zip(_KEY, (kind, name, teacher, label, seed, size, split), strict=True))
                        carry_out(key, TRIALS[kind][label])
    except MvmrError as error:
        raise click.ClickException(str(error)) from error


def carry_out(key: dict[str, Any], trial: Trial | None) -> None:
    """Run a trial unless its result is there, and append it."""
    if any(all(record[k] == key[k] for k in _KEY) for record in read()):
        return
    record = key | measure(key, trial)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print({k: record[k] for k in (*_KEY, "linear", "knn", "seconds") if k in record}, flush=True)


def measure(key: dict[str, Any], trial: Trial | None) -> dict[str, Any]:
    """Train one student and score its frozen features; without a trial score the teacher, or a random encoder."""
    train, held = splits_of(key["set"], test=key["split"] == "test")
    data, seed = Labelled.of(train, held), key["seed"]
    teacher = None if key["teacher"] == "none" else teacher_of(key["teacher"], train, seed, RUNS)
    if trial is None:
        return score(teacher or random_encoder(key["size"], seed, data), data)
    epochs = SETS[key["set"]].epochs * trial.epochs
    where = [f"train.seed={seed}", f"train.epochs={epochs}", f"views.size={key['size']}"]
    recipe = parse(Recipe, assign(COMMON, [*trial.assign.split(), *where]), where="trial")
    teachers: dict[str, Pretrained] = {}
    if teacher is not None:
        teachers = {name: change(teacher, train) for name, change in trial.teachers.items()}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as patches:
        observed = partial(Observed, steps=recipe.train.steps(len(train)), **trial.objective)
        patches.enter_context(patch.object(pretraining, "Objective", observed))
        if trial.crop is not None:
            patches.enter_context(patch.object(views, "CROP_AREA", (trial.crop, 1.0)))
        bundle = pretraining.fit(train, Path(scratch) / "bundle", recipe, teachers=teachers, device="cpu")
        seconds = time.perf_counter() - began
        last = json.loads((bundle.path / "metrics.jsonl").read_text().splitlines()[-1])
        found = score(bundle.student(), data)
    kept = ("rank", "biased", "unbiased", "regression", "dcor", "pull", "std_h")
    return (
        found
        | {"seconds": round(seconds), "steps": last["step"]}
        | {k: v for k, v in last.items() if k.startswith(kept)}
    )


def random_encoder(size: int, seed: int, data: Labelled) -> Student:
    """A student that was not trained but for its batch-norm statistics."""
    model, preprocess = parse(Recipe, COMMON, where="trial").model, Preprocess.for_size(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(model)
    pretraining.recalibrate(encoder, data.train, preprocess, batch_size=64, workers=0, device=torch.device("cpu"))
    identity = hashlib.sha256(f"random {model} {size} {seed} {data.train.fingerprint}".encode()).hexdigest()
    return Student(encoder, preprocess, dim=feature_dim(model), name="random", identity=identity)


def score(representation: Representation, data: Labelled) -> dict[str, float]:
    """Linear probe and kNN, top-1 in percent, by the protocols of `mvmr evaluate`."""
    measured = Measured(representation, data)
    knn = measured.knn([_NEIGHBOURS])[f"top1_weighted_k{_NEIGHBOURS}"]
    return {"linear": round(measured.linear()["top1"], 1), "knn": round(knn, 1)}


def read() -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


Runs = dict[str, dict[int, dict[str, Any]]]  # trial -> seed -> result


def print_tables(kind: str, size: int, split: str) -> None:
    """A table over all sets and teachers, then one for each of them, best first."""
    combos: dict[tuple[str, str], Runs] = defaultdict(lambda: defaultdict(dict))
    for record in read():
        if (record["kind"], record["size"], record["split"]) == (kind, size, split):
            combos[record["set"], record["teacher"]][record["trial"]][record["seed"]] = record
    labels = [label for label in TRIALS[kind] if any(label in runs for runs in combos.values())]
    ranks: dict[str, list[int]] = defaultdict(list)
    shared = [label for label in labels if all(label in runs for runs in combos.values())]
    for runs in combos.values():
        for rank, label in enumerate(sorted(shared, key=lambda label: -merit(runs[label])), 1):
            ranks[label].append(rank)
    names = [f"{name}, {teacher}" if kind == "distil" else name for name, teacher in combos]
    print(f"Linear / kNN minus `{BASELINE[kind]}`'s, seed by seed, mean ± deviation; its own line: accuracies.\n")
    print(f"| trial | {' | '.join(names)} | mean | mean rank |\n|{'---|' * (len(names) + 3)}")
    order = sorted(labels, key=lambda label: statistics.mean(ranks[label]) if label in ranks else len(labels))
    for label in order:
        cells = [_cell(runs, label, BASELINE[kind]) for runs in combos.values()]
        gains = [gain for runs in combos.values() for gain in _gains(runs, label, BASELINE[kind])]
        mean = f"{statistics.mean(gains):+.1f}" if gains and label in shared else ""
        rank = f"{statistics.mean(ranks[label]):.1f}" if label in ranks else ""
        print(f"| {label} | {' | '.join(cells)} | {mean} | {rank} |")


def merit(runs: dict[int, dict[str, Any]]) -> float:
    """Linear and kNN together, over the seeds."""
    return statistics.mean((run["linear"] + run["knn"]) / 2 for run in runs.values())


def _cell(runs: Runs, label: str, baseline: str) -> str:
    if label not in runs:
        return ""
    differ = label != baseline and baseline in runs
    texts = []
    for measure in ("linear", "knn"):
        values = [
            run[measure] - (runs[baseline][seed][measure] if differ else 0)
            for seed, run in runs[label].items()
            if not differ or seed in runs[baseline]
        ]
        texts.append(_mean(values, "+" if differ else ""))
    return " / ".join(texts)


def _gains(runs: Runs, label: str, baseline: str) -> list[float]:
    if label not in runs or baseline not in runs:
        return []
    both = runs[label].keys() & runs[baseline].keys()
    return [merit({0: runs[label][seed]}) - merit({0: runs[baseline][seed]}) for seed in both]


def _mean(values: Sequence[float], sign: str) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


if __name__ == "__main__":
    main()
