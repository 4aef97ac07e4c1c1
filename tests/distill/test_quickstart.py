"""The quickstart, cut short: every part runs and what it promises to leave is there."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mvmr.bundles import bundle
from mvmr.data import open_images
from mvmr.distillation.quickstart import quickstart as module
from mvmr.distillation.tables import print_results
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.tiny_clip import TinyClip, train_tiny_clip
from mvmr.errors import MvmrError
from mvmr.training import pretraining
from mvmr.training.recipe import Recipe, load_recipe

pytestmark = pytest.mark.slow


def short_recipe(name: str, package: str, assignments: list[str]) -> Recipe:
    brief = ["train.epochs=1", "train.batch_size=256", "views.size=32"]
    brief += ["method.projector=[32]"] if package == "mvmr" else []
    return load_recipe(name, package, [*assignments, *brief])


@pytest.fixture
def short(few_patches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_recipe", short_recipe)
    monkeypatch.setattr(module, "STAND_IN", TinyClip(image_size=32, width=8, steps=4, text_width=32))


def a_teacher(folder: Path) -> Path:
    return train_tiny_clip(open_images("sample:patches"), folder, config=module.STAND_IN, seed=5)


def test_leaves_bundles_figures_and_a_picture(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "quickstart"
    results = module.quickstart(out)
    assert json.loads((out / "results.json").read_text()) == results
    assert tuple(results["rows"]) == module.ROWS
    for row in results["rows"].values():
        assert 0 < row["linear"] <= 100
        assert 0 < row["knn"] <= 100
    # the hard facts of the data hold however short the training, and of a quarter of the images
    assert 25 < results["rows"]["pixels"]["linear"] < 50
    assert 50 < results["rows"]["scattering"]["linear"] < 75
    networks = {name for name, row in results["rows"].items() if "parameters" in row}
    assert networks == {"random", "ssl", "student", "teacher"}
    assert all(row["ms"] > 0 for row in results["rows"].values())
    assert bundle.load(out / "student").manifest.training["teachers"]["teacher"]["identity"]
    assert not bundle.load(out / "ssl").manifest.training["teachers"]
    assert ClipTeacher.load(out / "teacher").dim == 128
    with Image.open(out / "neighbours.png") as picture:
        assert picture.width > 400

    print_results(results, str(out))
    shown = capsys.readouterr().out
    assert f"{results['rows']['student']['linear']:.1f}" in shown
    assert "stand-in" in shown
    assert "mvmr distill --teacher ViT-B-16 --data" in shown

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("what is finished must not be trained again")

    monkeypatch.setattr(pretraining, "train", refuse)
    monkeypatch.setattr(module, "_accuracies", lambda measured: {"linear": 50.0, "knn": 50.0})  # once is enough
    module.quickstart(out)
    with pytest.raises(MvmrError, match=r"student holds another run, it differs in teachers\.teacher\.identity"):
        module.quickstart(out, teacher=str(a_teacher(tmp_path / "another")))
    with pytest.raises(AssertionError, match="must not be trained again"):
        module.quickstart(out, overwrite=True)


def test_takes_a_real_teacher_and_several_seeds(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter(range(20))  # what they are is for the test above, and probes take most of the time
    monkeypatch.setattr(module, "_accuracies", lambda measured: {"linear": float(next(values)), "knn": 50.0})
    results = module.quickstart(tmp_path / "out", teacher=str(a_teacher(tmp_path / "mine")), seeds=2)
    assert results["stand_in"] is False
    assert len(results["runs"]) == 2
    one, other = (run["rows"]["student"]["linear"] for run in results["runs"])
    assert one != other
    assert results["rows"]["student"]["linear"] == (one + other) / 2
    assert results["rows"]["student"]["linear_std"] == pytest.approx(abs(one - other) / 2**0.5)
    assert results["rows"]["student"]["knn_std"] == 0
    assert (tmp_path / "out" / "seed-1" / "student" / "bundle.json").exists()
    assert not (tmp_path / "out" / "teacher").exists()
