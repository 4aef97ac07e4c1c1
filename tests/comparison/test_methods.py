"""Methods side by side: their rows and what each changes, a table that grows, and what is measured of each run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.comparison import engine
from mvmr.comparison.measuring import collapse, cut, measure, read_lines, spread
from mvmr.comparison.methods import compare, parse_methods
from mvmr.comparison.results import read_results
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.evaluate import evaluate, open_labelled
from mvmr.methods.simclr import Simclr
from mvmr.models.student import Student
from mvmr.training.pretraining import pretrain
from tests.comparison.test_ablation import write_photos

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

TINY = (
    "student.backbone=resnet18_025", "views.size=16", "views.policy=crop+flip", "train.batch_size=20", "train.lr=1e-3",
    "train.warmup_steps=2", "train.workers=0", "train.precision=32-true",
)  # fmt: skip
METHODS = "simclr projector=[16,8],byol projector=[16,8] predictor=[16,8] objective.representations.local_std=0.5"
LABELS = ["random encoder", *METHODS.replace(",byol", "|byol").split("|")]
LEFT = ["comparison.json", "curves.svg", "plot.svg", "results.jsonl", "table.md"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_photos(tmp_path_factory.mktemp("data") / "photos"))


def run(out: Path, data: str, methods: str = METHODS, **options: Any) -> list[dict[str, Any]]:
    return compare(methods, data, out, assign=TINY, **({"epochs": 2, "device": "cpu"} | options))


@pytest.fixture(scope="module")
def finished(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVMR_CACHE", str(folder / "cache"))
        run(folder / "out", photos, keep=True)
    return folder / "out"


# -- rows


def test_a_row_is_a_method_with_settings_of_its_own() -> None:
    rows = parse_methods("mvmr, lejepa spread=energy,byol projector=[16,8] objective.representations.hog=0.5")
    assert [(row.label, row.assignments) for row in rows] == [
        ("mvmr", ("method.name=mvmr",)),
        ("lejepa spread=energy", ("method.name=lejepa", "method.spread=energy")),
        (
            "byol projector=[16,8] objective.representations.hog=0.5",
            ("method.name=byol", "method.projector=[16,8]", "objective.representations.hog=0.5"),
        ),
    ]


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ("simclr,byoll", {}, "unknown method 'byoll'; did you mean 'byol'"),
        ("simclr,,byol", {}, "unknown method ''"),
        ("simclr,byol,simclr", {}, "'simclr' is named twice"),
        ("simclr hot", {}, "method simclr: 'hot' is no KEY=VALUE"),
        ("simclr projector=[8, 8]", {}, r"'8\]' is no KEY=VALUE, .* \(without a space\)"),
        ("simclr views.background=[0,0,0]", {}, r"views\.background is the same for all rows"),
        ("simclr train.seed=3", {}, r"train\.seed is the same for all rows"),
        ("simclr", {"devices": 3}, "batch_size = 20: give a multiple of the 3 devices"),
        ("simclr temprature=1", {}, "row 'simclr temprature=1': .*unknown key 'method.temprature', did you mean"),
        ("swav prototypes=61 local=0", {}, "prototypes = 61, of 60 images: give 60 or fewer"),
        ("simclr", {"seeds": 0}, "seeds = 0: give 1 or more"),
        ("simclr", {"device": "cpuu"}, "cannot use 1 of device 'cpuu'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_run(
    photos: str, tmp_path: Path, methods: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MvmrError, match=message):
        run(tmp_path / "out", photos, methods, **options)
    assert read_results(tmp_path / "out") == []


def test_what_rows_decide_cannot_be_set(photos: str, tmp_path: Path) -> None:
    for assignment in ("method.name=byol", "train.seed=3"):
        with pytest.raises(MvmrError, match="the rows of a comparison and their seeds decide it"):
            compare("simclr", photos, tmp_path / "out", assign=[*TINY, assignment], device="cpu")


# -- what comes out


@pytest.mark.slow
def test_all_methods_and_a_random_encoder_are_measured(finished: Path) -> None:
    results = read_results(finished)
    assert sorted(os.listdir(finished)) == sorted([*LEFT, "runs"])
    assert [result["row"] for result in results] == LABELS
    random, *trained = results
    assert (random["steps"], random["curve"]) == (0, [[0, random["knn"]]])
    assert "images" not in random
    for result in trained:
        assert (result["steps"], result["images"]) == (6, 120)
        assert [step for step, _ in result["curve"]] == [2, 3, 4, 6]
        assert result["curve"][-1][1] == result["knn"]
        assert result["peak_mb"] > 100
        assert result["train_seconds"] > 0
    for result in results:
        assert 1 <= result["rank"] <= 60
        assert 0 < result["spread"] <= 1
        assert result["dcor"] > result["dcor_null"]
    settings = json.loads((finished / "comparison.json").read_text())
    assert settings["epochs"] == 2
    assert "method" not in settings["recipe"]
    table = (finished / "table.md").read_text()
    assert all(f"\n| {label} |" in table for label in LABELS)
    assert "`mvmr compare --methods " in table


@pytest.mark.slow
def test_figures_are_those_of_a_run_trained_and_measured_by_hand(finished: Path, photos: str, tmp_path: Path) -> None:
    result = read_results(finished)[2]
    bundle = pretrain(photos, tmp_path / "out", assign=[*TINY, "train.epochs=2", *result["assignments"]], device="cpu")
    figures = evaluate(bundle.path, photos)
    assert (result["linear"], result["knn"]) == (figures["linear"]["top1"], figures["knn"]["top1_weighted_k5"])
    training = json.loads((bundle.path / "bundle.json").read_text())["training"]
    assert training["recipe"]["objective"]["representations"] == {"local_std": 0.5}


@pytest.mark.slow
def test_watching_a_run_changes_none_of_its_weights(finished: Path, photos: str, tmp_path: Path) -> None:
    assign = [*TINY, "train.epochs=2", *read_results(finished)[1]["assignments"]]
    alone = pretrain(photos, tmp_path / "out", assign=assign, device="cpu")
    watched = next((finished / "runs").glob("simclr*/seed-0"))
    assert (watched / "encoder.safetensors").read_bytes() == (alone.path / "encoder.safetensors").read_bytes()


@pytest.mark.slow
def test_methods_and_seeds_are_added_and_a_broken_method_loses_no_other(
    finished: Path, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert len(run(out, photos, LABELS[1])) == 2

    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(Simclr, "forward", broken)
        results = run(out, photos, f"{LABELS[1]},simclr,byol projector=[8,8] predictor=[8,8]", seeds=2)
    assert [(result["row"], result["seed"]) for result in results] == [
        ("random encoder", 0), (LABELS[1], 0), ("simclr", 0), ("byol projector=[8,8] predictor=[8,8]", 0),
        ("random encoder", 1), (LABELS[1], 1), ("simclr", 1), ("byol projector=[8,8] predictor=[8,8]", 1),
    ]  # fmt: skip
    failures = [(result["row"], result["seed"]) for result in results if "error" in result]
    assert failures == [("simclr", 0), (LABELS[1], 1), ("simclr", 1)]
    assert results[2]["error"] == "OutOfMemoryError: tried to allocate 80 GiB"
    table = (out / "table.md").read_text()
    assert "| failed" in table
    assert f"--methods '{LABELS[1]},simclr,byol projector=[8,8] predictor=[8,8]'" in table  # of both calls
    again = run(out, photos, "simclr projector=[8]", seeds=1)  # and simclr is not among these
    assert [result["row"] for result in again if "error" in result] == ["simclr", LABELS[1], "simclr"]
    mended = run(out, photos, f"{LABELS[1]}", seeds=2)
    assert [result["row"] for result in mended if "error" in result] == ["simclr", "simclr"]
    assert [(result["row"], result["seed"]) for result in mended[:8]] == [
        (result["row"], result["seed"]) for result in results
    ]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ImportError("no such module"),
    ],
)
def test_what_befalls_the_process_is_no_methods_fault(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(engine, "fit", broken)
    with pytest.raises(type(error), match=str(error.args[-1])[:12]):
        run(tmp_path / "out", photos, "simclr")
    assert read_results(tmp_path / "out") == []


def test_a_line_of_a_curve_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text('{"step": 1, "knn": 5.0}\n{"step": 2, "kn')
    assert read_lines(path) == [{"step": 1, "knn": 5.0}]
    cut(path)
    with path.open("a") as file:
        file.write('{"step": 2, "knn": 6.0}\n')
    assert [line["step"] for line in read_lines(path)] == [1, 2]


@pytest.mark.slow
def test_a_term_beside_the_methods_is_common_to_all(photos: str, tmp_path: Path) -> None:
    results = compare(
        "simclr projector=[16,8]", photos, tmp_path / "out", epochs=1, device="cpu",
        assign=[*TINY, "objective.representations.local_std=0.5"],
    )  # fmt: skip
    assert [result["row"] for result in results] == LABELS[:2]


# -- collapse


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.ones(len(images), 8)


class Projection(nn.Module):
    """Random directions of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 16 * 16, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight


def test_a_collapsed_encoder_has_no_rank_no_spread_and_no_more_dependence_than_chance(photos: str) -> None:
    images = open_images(photos, "test")
    whole, collapsed = (
        collapse(
            Student(encoder, Preprocess.for_size(16), dim=8, name="it", identity="it", backbone=None), images, "crop"
        )
        for encoder in (Projection(), Constant())
    )
    assert collapsed["rank"] == collapsed["dcor"] == 0
    assert collapsed["spread"] == pytest.approx(0, abs=1e-6)
    assert whole["rank"] > 2
    assert whole["spread"] > 0.1
    assert whole["dcor"] > whole["dcor_null"] + 0.1


def test_spread_is_one_where_directions_are_even() -> None:
    random = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert spread(random) == pytest.approx(1, abs=0.01)
    assert spread(random + 100) < 0.05
    expected = np.std((random / random.norm(dim=1, keepdim=True)).numpy(), axis=0).mean() * 4
    assert spread(random) == pytest.approx(float(expected), rel=1e-5)


def test_measuring_needs_no_metrics(photos: str, tmp_path: Path) -> None:
    bundle = pretrain(photos, tmp_path / "out", assign=[*TINY, "train.epochs=0", "method.name=simclr"], device="cpu")
    figures = measure(bundle, open_labelled(photos, background=(255, 255, 255)), "cpu", progress=False)
    assert figures["steps"] == 0
    assert "loss" not in figures
