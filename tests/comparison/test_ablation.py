"""Every run a line, whatever happens in between; a table of means and deviations; and nothing left but the figures."""

import json
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.comparison import engine
from mvmr.comparison.ablation import ablate
from mvmr.comparison.results import plot, plot_curves, read_results, table
from mvmr.errors import MvmrError
from mvmr.evaluation.evaluate import evaluate
from mvmr.training import trainer
from mvmr.training.pretraining import pretrain
from mvmr.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

TINY = (
    "student.backbone=resnet18_025", "method.projector=[16,16]", "views.size=16", "views.policy=crop+flip",
    "train.batch_size=20", "train.lr=1e-3", "train.warmup_steps=2", "train.workers=0", "train.precision=32-true",
)  # fmt: skip
ONLY = "L[12]"  # two rows that take no representation
ORDER = [("L1", 0), ("L2", 0), ("L1", 1), ("L2", 1)]
LEFT = ["ablation.json", "curves.svg", "plot.svg", "results.jsonl", "table.md"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_photos(tmp_path_factory.mktemp("data") / "photos"))


def write_photos(folder: Path) -> Path:
    """Three classes of 20 noisy images; the colours overlap, so that an accuracy says something."""
    random = np.random.default_rng(0)
    for name, colour in {"red": (140, 100, 110), "green": (110, 130, 110), "blue": (110, 110, 140)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.array(colour) + random.normal(0, 40, 3) + random.integers(-40, 40, (16, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def run(out: Path, data: str, *assign: str, **options: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {"epochs": 1, "seeds": 2, "only": ONLY, "device": "cpu"} | options
    return ablate("losses", data, out, assign=[*TINY, *assign], **arguments)


@pytest.fixture(scope="module")
def reference(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVMR_CACHE", str(folder / "cache"))
        run(folder / "undisturbed", photos, seeds=1, only="L1")
    return folder / "undisturbed"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that take no time, for what does not hang on the figures."""

    def fit(images: object, folder: Path, recipe: Recipe, **_: object) -> Recipe:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "encoder.safetensors").write_text("large")
        return recipe

    def figures(recipe: Recipe, *_: object, **__: object) -> dict[str, float]:
        first = 50.0 + 10 * recipe.method.dependence + recipe.train.seed
        return {"linear": first, "knn": first / 2, "knn_k": 5, "rank": 3.0, "loss": 1.0, "steps": 3}

    monkeypatch.setattr(engine, "fit", fit)
    monkeypatch.setattr(engine, "measure", figures)
    for name in ("plot", "plot_curves"):
        monkeypatch.setattr(engine, name, lambda results, path, order: path.write_text("drawn"))


def lasting(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    passing = {"seconds", "train_seconds", "peak_mb"}
    return [{key: value for key, value in result.items() if key not in passing} for result in results]


def keys(out: Path) -> list[tuple[str, int]]:
    return [(result["row"], result["seed"]) for result in read_results(out)]


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> Any:
        raise error

    return function


def interrupt(monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int, error: BaseException) -> None:
    """Make the n-th call of ``place.name`` end in ``error``."""
    real, calls = getattr(target, name), 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, function)


# -- what comes out


def test_a_grid_leaves_its_figures_and_nothing_else(reference: Path) -> None:
    results = read_results(reference)
    assert sorted(os.listdir(reference)) == LEFT
    # neither targets, for they are off, nor the features of a student that is gone
    assert not list((reference.parent / "cache" / "representations").iterdir())
    (result,) = results
    assert (result["grid"], result["row"], result["seed"]) == ("losses", "L1", 0)
    assert "method.representations={}" in result["assignments"]
    assert (result["steps"], result["knn_k"]) == (3, 5)
    assert 0 < result["linear"] <= 100
    assert 1 <= result["rank_h"] <= 20
    assert result["loss"] > 0
    settings = json.loads((reference / "ablation.json").read_text())
    assert (settings["grid"], settings["epochs"]) == ("losses", 1)
    assert settings["recipe"]["train"]["lr"] == 1e-3
    text = (reference / "table.md").read_text()
    assert text.startswith(table(results))
    assert "`mvmr ablate --grid losses --data " in text
    assert "--seeds 1`" in text


@pytest.mark.slow
def test_figures_are_those_of_a_run_trained_and_measured_by_hand(reference: Path, photos: str, tmp_path: Path) -> None:
    (result,) = read_results(reference)
    changes = [*TINY, "train.epochs=1", *result["assignments"]]
    bundle = pretrain(photos, tmp_path / "out", recipe="paper", assign=changes, device="cpu")
    figures = evaluate(bundle.path, photos)
    assert (result["linear"], result["knn"]) == (figures["linear"]["top1"], figures["knn"]["top1_weighted_k5"])
    last = json.loads((bundle.path / "metrics.jsonl").read_text().splitlines()[-1])
    for key in ("rank_h", "rank_z", "loss"):
        assert result[key] == last[key]


def test_bundles_are_kept_where_that_was_asked(no_training: None, photos: str, tmp_path: Path) -> None:
    run(tmp_path / "out", photos, keep=True)
    folders = sorted((tmp_path / "out" / "runs").glob("*/*"))
    assert [str(path.relative_to(tmp_path / "out" / "runs")) for path in folders] == [
        "l1/seed-0", "l1/seed-1", "l2/seed-0", "l2/seed-1",
    ]  # fmt: skip


# -- stopped, killed, gone on with


@pytest.mark.slow
def test_a_dead_run_goes_on_where_it_was(
    reference: Path, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, trainer, "learning_rate", 3, SystemExit(9))
        with pytest.raises(SystemExit):
            run(out, photos, "train.checkpoint_steps=1", seeds=1, only="L1")
    assert keys(out) == []
    interrupt(monkeypatch, trainer, "learning_rate", 2, SystemExit("a step was done again"))
    assert lasting(run(out, photos, seeds=1, only="L1")) == lasting(read_results(reference))
    assert sorted(os.listdir(out)) == LEFT


@pytest.mark.parametrize(
    ("name", "call", "written"),
    [
        ("fit", 4, 3),
        ("measure", 1, 0),
        ("_append", 2, 1),  # when a run is measured, and its line not there
        ("_publish", 3, 3),  # when its line is there, and its bundle, too
        ("_discard", 4, 4),
        ("_publish", 5, 4),
    ],
)
def test_a_dead_ablation_goes_on_where_it_was(
    no_training: None, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, written: int
) -> None:
    results = lasting(run(tmp_path / "whole", photos))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, engine, name, call, SystemExit(9))
        with pytest.raises(SystemExit):
            run(out, photos)
    assert keys(out) == ORDER[:written]  # all rows of a seed before the next, a line to a run as it ends
    with (out / "results.jsonl").open("a") as file:
        file.write('{"grid": "losses", "row": "L')
    assert keys(out) == ORDER[:written]
    assert lasting(run(out, photos)) == results
    assert sorted(os.listdir(out)) == LEFT
    tables = [(tmp_path / name / "table.md").read_text().partition("\n\n")[0] for name in ("whole", "out")]
    assert tables[0] == tables[1]


def test_a_run_that_is_there_is_not_done_again(reference: Path, photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (reference / "results.jsonl").read_bytes()
    monkeypatch.setattr(engine, "fit", raising(SystemExit("trained again")))
    for name in ("table.md", "plot.svg"):
        (reference / name).unlink()
    assert run(reference, photos, "train.workers=1", seeds=1, only="L1") == read_results(reference)
    assert (reference / "results.jsonl").read_bytes() == before
    assert "| L1 |" in (reference / "table.md").read_text()
    assert (reference / "plot.svg").exists()
    with pytest.raises(SystemExit, match="trained again"):
        run(reference, photos, seeds=2, only="L1")
    with pytest.raises(SystemExit, match="trained again"):
        run(reference, photos, seeds=1, only="L2")


def test_ctrl_c_says_how_to_go_on(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "fit", raising(KeyboardInterrupt("step 1 of 3")))
    with pytest.raises(KeyboardInterrupt, match="4 of 4 runs are left; type the same command to go on"):
        run(tmp_path / "out", photos)


def test_progress_names_the_run_and_estimates_the_rest(
    no_training: None, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "out", photos, seeds=1, progress=True)
    output = capsys.readouterr().err
    assert "1 of 2: L1, seed 0" in output
    assert "2 of 2: L2, seed 0" in output
    assert len(re.findall(r"about \d min to go: 1 more at \d s each", output)) == 1


# -- what is refused


def test_other_settings_are_refused_by_name(reference: Path, photos: str, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in reference.iterdir()}
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (["train.lr=1e-2"], {}, r"recipe\.train\.lr \(0\.001 there, 0\.01 now\)"),
        ([], {"epochs": 2}, r"epochs \(1 there, 2 now\)"),
        ([], {"keep": True}, r"keep \(False there, True now\)"),
    ]
    for assign, options, message in cases:
        with pytest.raises(MvmrError, match=f"holds another ablation, it differs in .*{message}"):
            run(reference, photos, *assign, **options)
    with pytest.raises(MvmrError, match=r"data\.fingerprint\.unlabelled"):
        run(reference, str(write_photos(tmp_path / "more")))
    with pytest.raises(MvmrError, match=r"grid \('losses' there, 'projector' now\)"):
        small = [assignment for assignment in TINY if not assignment.startswith("method.projector")]
        ablate("projector", photos, reference, epochs=1, assign=small, device="cpu")
    assert {path.name: path.read_bytes() for path in reference.iterdir()} == before


@pytest.mark.parametrize(
    ("assign", "options", "message"),
    [
        (["train.batch_size=61"], {}, "a step takes 61 images and the data have 60"),
        (["views.policy=crp"], {}, "unknown view policy or step 'crp'"),
        (["train.lrr=1"], {}, "unknown key 'train.lrr'"),
        (["method.dependence=1"], {}, "cannot set method.dependence"),
        ([], {"only": "L7"}, "no row of grid losses matches 'L7'"),
        ([], {"seeds": 0}, "seeds = 0: give 1 or more"),
        ([], {"device": "cpuu"}, "cannot use 1 of device 'cpuu'"),
    ],
)
def test_what_cannot_be_is_one_line(
    photos: str, tmp_path: Path, assign: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MvmrError, match=message) as caught:
        run(tmp_path / "out", photos, *assign, **options)
    assert "\n" not in str(caught.value)
    assert read_results(tmp_path / "out") == []
    with pytest.raises(MvmrError, match="61 images"):  # nothing was learned: the mended command may differ
        run(tmp_path / "out", photos, "train.batch_size=61")


def test_data_without_labels_are_refused_before_training(photos: str, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted(Path(photos).rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(image.read_bytes())
    with pytest.raises(MvmrError, match="has no labels to measure with"):
        run(tmp_path / "out", str(flat))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_never_touched(photos: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MvmrError, match="is no ablation; nothing of it is touched"):
        run(tmp_path, photos)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"row": "L1", "seed": 0}\n{"row": "L\n{"row": "L2", "seed": 0}\n')
    with pytest.raises(MvmrError, match=r"results\.jsonl, line 2, is no result: delete the line"):
        read_results(tmp_path)


# -- what fails


def test_a_diverging_row_is_recorded_and_the_grid_goes_on(photos: str, tmp_path: Path) -> None:
    out, diverging = tmp_path / "out", ("train.lr=1e30", "train.warmup_steps=0")
    results = run(out, photos, *diverging, seeds=1)
    assert [result["row"] for result in results] == ["L1", "L2"]
    assert all("not finite" in result["error"] for result in results)
    assert sorted(os.listdir(out)) == LEFT
    assert (out / "table.md").read_text().count("| failed (") == 2
    assert run(out, photos, *diverging, seeds=1) == results  # it would only fail again


def test_any_other_error_stops_the_grid(
    no_training: None, photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, engine, "fit", 2, MvmrError("disk full"))
    with pytest.raises(MvmrError, match="disk full"):
        run(tmp_path / "out", photos)
    assert keys(tmp_path / "out") == ORDER[:1]


# -- table and picture


def a_result(row: str, seed: int, linear: float, knn: float, rank: float | None = 3.0) -> dict[str, Any]:
    run = {"grid": "losses", "row": row, "seed": seed, "assignments": [], "seconds": 1.0}
    return run | {
        "linear": linear, "knn": knn, "knn_k": 5, "rank": rank, "spread": 0.5, "dcor": 0.25, "dcor_null": -0.01,
        "loss": 0.5, "steps": 3, "images": 60, "train_seconds": 2.0, "peak_mb": 100, "curve": [[1, knn / 2], [3, knn]],
    }  # fmt: skip


def a_failure(row: str, seed: int) -> dict[str, Any]:
    reason = "variance is not finite at step 7 (variance = nan)"
    return {"grid": "losses", "row": row, "seed": seed, "assignments": [], "error": reason, "seconds": 1.0}


LINEAR, KNN = [60.0, 61.5, 64.25], [50.0, 40.0, 45.5]
MIXED = [
    a_result("L1 + L2", 0, 70.0, 30.0, rank=None),
    *(a_result("L1", seed, *values) for seed, values in enumerate(zip(LINEAR, KNN, strict=True))),
    a_failure("L3", 0),
    a_result("L2", 0, 10.0, 20.0),
    a_failure("L2", 1),
]


ALONE = ["0.50", "0.25 (-0.01)", "2", "100"]


def test_the_table_has_means_deviations_the_best_in_bold_and_what_failed() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(MIXED, ["L1", "L2"]).splitlines()]
    assert lines[0] == [
        "row", "linear top-1 (%)", "kNN top-1 (%)", "rank", "spread", "dCor", "seconds", "peak MB", "seeds",
    ]  # fmt: skip
    linear, knn = (f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in (LINEAR, KNN))
    assert lines[2:] == [  # in the order that is asked for, then in their own
        ["L1", linear, f"**{knn}**", "3.0 ± 0.0", "0.50 ± 0.00", "0.25 ± 0.00 (-0.01)", "2 ± 0", "100 ± 0", "3"],
        ["L2", "10.0", "20.0", "3.0", *ALONE, "1, 1 failed"],
        ["L1 + L2", "**70.0**", "30.0", "", *ALONE, "1"],
        ["L3", "failed (variance is not finite at step 7)", *[""] * 6, "0, 1 failed"],
    ]


def test_the_picture_is_the_same_bytes_again_and_names_every_row(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot(MIXED, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = [element.text for element in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"L1", "L2", "L3", "L1 + L2", "failed", "linear", "kNN"} <= set(texts)
    plot_curves(MIXED, tmp_path / "curves.svg")
    curves = (tmp_path / "curves.svg").read_text()
    assert all(text in curves for text in (">L1<", ">L2<", ">L1 + L2<", ">images seen<", ">seconds of training<"))
    assert ">L3<" not in curves
    plot([a_failure("L3", 0)], tmp_path / "c.svg")
    plot_curves([a_failure("L3", 0)], tmp_path / "d.svg")
    assert "failed" in (tmp_path / "c.svg").read_text()
