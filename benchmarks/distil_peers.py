"""Which distils better? Ours beside LightlyTrain and sentence-transformers: `python benchmarks/distil_peers.py`.

All start from the same weights of a ResNet18, have the same teacher and see the same images equally often, 64 to a
step, at 32 px; frozen, their students are scored on the validation part as in benchmarks/recipes.py. Ours has one
learning rate, that of its recipe; a peer has four, its own, a third and three times of that, and ours, and the best
counts. Peers run in environments of their own, see benchmarks/peers; what they do is described in their files there.

- Ours shows the student two views of an image to the peers' one.
- Ours and sentence-transformers read the teacher's rows, computed once before the clock starts; LightlyTrain has the
  teacher embed every view anew.
- Ours ends by fitting the batch norms' statistics to whole images; a peer's student is scored as it comes, and so
  fitted, too ("refitted").

Each result is a line of benchmarks/results/distil_peers.jsonl: what is there is not run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peers import environments
from peers.job import DONE, ROWS, START, STUDENT, Job
from recipes import COMMON, RUNS, score
from teachers import EfficientNetLite
from torch import nn
from trials import DATA, SETS, splits_of, teacher_of

from mvmr import __version__
from mvmr.bundles.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from mvmr.config import assign, parse
from mvmr.data import ImageSet
from mvmr.errors import MvmrError
from mvmr.evaluation.protocols import Labelled
from mvmr.models.backbone import Backbone
from mvmr.models.student import Student
from mvmr.models.table import open_backbone
from mvmr.representations.cache import represent
from mvmr.storage.atomic import cache_dir
from mvmr.training import pretraining
from mvmr.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "distil_peers.jsonl"
OURS = "mvmr"
SIDE = 32  # pixels of what a student sees
_RECIPE = ("method.name=regression", "views.policy=crop+flip", "student.backbone=resnet18", f"views.size={SIDE}")
_KEY = ("set", "teacher", "peer", "version", "lr", "seed", "steps")
_MEASURED = ("linear", "knn")


@dataclass(frozen=True)
class Peer:
    """script: in benchmarks/peers; rates: to try; mean, std: of the student's images, in units of [0, 1]."""

    script: str
    rates: tuple[float, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


PEERS = {
    # Multiplies its rate by sqrt(64 / 1536); what the student sees is normalised for the teacher, (x - 127) / 128.
    "lightly-train": Peer(
        "lightly_train_distil.py", (1.67e-4, 5e-4, 1.5e-3, 4.9e-3), (127 / 255,) * 3, (128 / 255,) * 3
    ),
    "sentence-transformers": Peer(
        "sentence_transformers_distil.py", (1.67e-5, 5e-5, 1.5e-4, 1e-3), IMAGENET_MEAN, IMAGENET_STD
    ),
}


@dataclass(frozen=True)
class Trained:
    """A student, the seconds of its training and the images it has seen, an image as often as it was drawn."""

    student: Student
    seconds: float
    images_seen: int


@dataclass(frozen=True)
class Work:
    """What all have in common: a set, a teacher, a seed, and how long."""

    data: Labelled
    teacher: EfficientNetLite
    recipe: Recipe
    threads: int

    @property
    def backbone(self) -> Backbone:
        return open_backbone(self.recipe.student, SIDE)

    def ours(self) -> Trained:
        """A student by `mvmr distill`'s own way."""
        represent(self.data.train, self.teacher)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            bundle = pretraining.fit(
                self.data.train, Path(scratch) / "bundle", self.recipe, teachers={"teacher": self.teacher}, device="cpu"
            )
            seconds = time.perf_counter() - began
            last = json.loads((bundle.path / "metrics.jsonl").read_text().splitlines()[-1])
            return Trained(bundle.student(), seconds, last["step"] * self.recipe.train.batch_size)

    def theirs(self, name: str, rate: float, python: Path) -> Trained:
        """A student that a peer has trained in its environment."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self._prepare(folder, PEERS[name], rate)
            _run(python, PEERS[name].script, folder, self.threads)
            done = json.loads((folder / DONE).read_text())
            content = (folder / STUDENT).read_bytes()
            encoder = self.backbone.build()
            encoder.load_state_dict(torch.load(folder / STUDENT, weights_only=True))
        preprocess = Preprocess(resize=SIDE, crop=SIDE, mean=PEERS[name].mean, std=PEERS[name].std)
        return Trained(self._student(encoder, preprocess, content), done["seconds"], done["images_seen"])

    def refitted(self, student: Student) -> Student:
        """The student with batch norms fitted to whole images, as ours are."""
        pretraining.recalibrate(
            student.encoder, self.data.train, student.preprocess,
            batch_size=self.recipe.train.batch_size, workers=0, device=torch.device("cpu"),
        )  # fmt: skip
        return self._student(student.encoder, student.preprocess, f"{student.identity} refitted".encode())

    def _student(self, encoder: nn.Module, preprocess: Preprocess, content: bytes) -> Student:
        identity = hashlib.sha256(content + repr(preprocess).encode()).hexdigest()
        return Student(encoder, preprocess, dim=self.backbone.width, name="peer", identity=identity)

    def _prepare(self, folder: Path, peer: Peer, rate: float) -> None:
        images, train = self.data.train, self.recipe.train
        (folder / "images").mkdir()
        for index in range(len(images)):
            images.load(index).save(folder / "images" / f"{index:06}.png")
        np.save(folder / ROWS, represent(images, self.teacher))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.seed)  # as `fit` draws its own encoder
            torch.save(self.backbone.build().state_dict(), folder / START)
        (weights,) = (DATA / "teachers").glob(f"*/models/{self.teacher.weights}")
        Job(
            images=str(folder / "images"), teacher=self.teacher.name, weights=str(weights), code=str(DATA / "teachers"),
            teacher_side=self.teacher.preprocess.crop, side=SIDE, mean=peer.mean, std=peer.std,
            batch=train.batch_size, epochs=train.epochs, rate=rate, seed=train.seed,
        ).save(folder)  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@click.command()
@click.option("--sets", default="emoji", show_default=True, help="Of benchmarks/trials.py, with commas.")
@click.option("--teachers", help="Only these, such as lite2; those of the sets, left out.")
@click.option("--seeds", default="0", show_default=True, type=_numbers)
@click.option("--only", multiple=True, type=click.Choice([OURS, *PEERS]), help="May be given several times.")
@click.option("--steps", type=click.IntRange(1), help="Rounded up to whole epochs; the set's own, left out.")
@click.option("--threads", default=1, show_default=True)
@click.option("--environments", "folder", type=click.Path(path_type=Path), help="Where the peers are installed.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Where the results are.")
@click.option("--table", is_flag=True, help="Print what has been measured, as Markdown, and stop.")
def main(
    sets: str, teachers: str | None, seeds: tuple[int, ...], only: tuple[str, ...], steps: int | None, threads: int,
    folder: Path | None, results: Path, table: bool,
) -> None:  # fmt: skip
    """Distil by ours and by each peer what has not been distilled yet, and append the results."""
    if table:
        print_table(read(results))
        return
    torch.set_num_threads(threads)
    place = (folder or cache_dir() / "benchmark-peers").resolve()
    try:
        chosen = list(combos(sets.split(","), teachers.split(",") if teachers else None))
        pythons = {name: environments.prepare_distiller(place, name) for name in PEERS if name in (only or PEERS)}
        for seed in seeds:
            for name, teacher in chosen:
                work = prepare(name, teacher, seed, steps, threads)
                of = {"set": name, "teacher": teacher, "seed": seed}
                if OURS in (only or (OURS,)):
                    rate = work.recipe.train.lr
                    carry_out(results, work, of | {"peer": OURS, "version": __version__, "lr": rate}, Path())
                for peer, python in pythons.items():
                    version = environments.DISTILLERS[peer][peer]
                    for rate in PEERS[peer].rates:
                        carry_out(results, work, of | {"peer": peer, "version": version, "lr": rate}, python)
    except MvmrError as error:
        raise click.ClickException(str(error)) from error


def combos(sets: list[str], teachers: list[str] | None) -> Iterator[tuple[str, str]]:
    """Sets with their teachers that every peer can take: not the stand-in CLIP, which needs mvmr to run.

    Raises: MvmrError: an unknown set or teacher.
    """
    for name in sets:
        if name not in SETS:
            raise MvmrError(f"there is no set {name!r}; there are {', '.join(SETS)}")
        there = [teacher for teacher in SETS[name].teachers if teacher != "clip"]
        if strange := sorted(set(teachers or ()) - set(there)):
            raise MvmrError(f"{name} has no teacher {strange[0]!r} that peers can take; it has {', '.join(there)}")
        yield from ((name, teacher) for teacher in there if teachers is None or teacher in teachers)


def prepare(name: str, teacher: str, seed: int, steps: int | None, threads: int) -> Work:
    """The work on a set with a teacher."""
    train, held = splits_of(name, test=False)
    epochs = SETS[name].epochs
    recipe = partial(parse, Recipe, where="recipe")
    if steps is not None:
        one = recipe(assign(COMMON, [*_RECIPE, "train.epochs=1"])).train.steps(len(train))
        epochs = math.ceil(steps / one)
    settings = assign(COMMON, [*_RECIPE, f"train.seed={seed}", f"train.epochs={epochs}"])
    return Work(Labelled.of(train, held), _opened(teacher, train, seed), recipe(settings), threads)


def carry_out(results: Path, work: Work, key: dict[str, Any], python: Path) -> None:
    """Train and score a student unless its result is there, and append it."""
    train = work.recipe.train
    key["steps"] = train.steps(len(work.data.train))
    if any(all(record[k] == key[k] for k in _KEY) for record in read(results)):
        return
    ours = key["peer"] == OURS
    trained = work.ours() if ours else work.theirs(key["peer"], key["lr"], python)
    if trained.images_seen != key["steps"] * train.batch_size:
        raise MvmrError(f"{key['peer']} has seen {trained.images_seen} images in {key['steps']} steps")
    record = key | score(trained.student, work.data)
    refitted = {} if ours else score(work.refitted(trained.student), work.data)
    record |= {f"refitted_{name}": value for name, value in refitted.items()}
    record |= {"seconds": round(trained.seconds), "images_seen": trained.images_seen, "threads": work.threads}
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record, flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def print_table(records: list[dict[str, Any]]) -> None:
    """Each at its best learning rate, which is that of the largest sum of both scores, on average over the seeds."""
    groups: dict[tuple[Any, ...], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        group = tuple(record[name] for name in ("set", "teacher", "steps", "peer", "version"))
        groups[group][record["lr"]].append(record)
    print("| set | teacher | steps | | learning rate | seeds | linear | kNN | refitted: linear | kNN | minutes |")
    print(f"|{'---|' * 11}")
    for (name, teacher, steps, peer, version), rates in groups.items():
        most = max(map(len, rates.values()))
        full = {rate: runs for rate, runs in rates.items() if len(runs) == most}
        rate = max(full, key=lambda rate: statistics.mean(sum(run[of] for of in _MEASURED) for run in full[rate]))
        runs = full[rate]
        scores = [_spread(runs, prefix + of) for prefix in ("", "refitted_") for of in _MEASURED]
        minutes = statistics.mean(run["seconds"] for run in runs) / 60
        cells = [name, teacher, steps, f"{peer} {version}", f"{rate:g} of {len(full)}", most, *scores, f"{minutes:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |")


def _spread(runs: list[dict[str, Any]], of: str) -> str:
    values = [run[of] for run in runs if of in run]
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _opened(teacher: str, train: ImageSet, seed: int) -> EfficientNetLite:
    found = teacher_of(teacher, train, seed, RUNS)
    assert isinstance(found, EfficientNetLite)
    return found


def _run(python: Path, script: str, folder: Path, threads: int) -> None:
    """A peer's script, on the CPU, with so many threads and without a word to anybody.

    Raises: MvmrError: it failed, with the end of what it wrote.
    """
    variables = environments.quiet(folder) | {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    variables |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [python, environments.HERE / script, folder]
    done = subprocess.run(list(map(os.fspath, command)), env=variables, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise MvmrError(f"{script} failed: {(done.stdout + done.stderr).strip()[-3000:]}")


if __name__ == "__main__":
    main()
