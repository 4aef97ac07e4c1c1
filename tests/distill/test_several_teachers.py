"""A student of several teachers: its order, its line at the start, and what evaluation and report say of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import mvmr
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.cli.main import main
from mvmr.config import to_mapping
from mvmr.distillation.comparison import compare
from mvmr.distillation.distill import describe, share_weights
from mvmr.distillation.report.report import report
from mvmr.distillation.teachers.spec import parse_specs
from mvmr.errors import MvmrError
from mvmr.training.recipe import load_recipe
from tests.distill.small_onnx import small_onnx
from tests.distill.test_run import TINY, a_teacher

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

BRIEF = {"k": 3, "permutations": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three colours in class folders, below train/ and test/, and a model of mean colours."""
    folder, random = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 10)):
        for name, colour in {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}.items():
            place = folder / "photos" / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = (np.array(colour) + random.integers(-60, 60, (3, 4, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((24, 18), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    small_onnx(folder / "colours.onnx")
    return folder


@pytest.fixture(scope="module")
def student(folder: Path) -> Bundle:
    a_teacher(folder / "clip")
    specs = [f"clip={folder / 'clip'}", f"colours=onnx:{folder / 'colours.onnx'}"]
    return mvmr.distill(specs, str(folder / "photos"), folder / "student", assign=TINY, device="cpu")


@pytest.mark.slow
def test_the_order_in_which_teachers_are_given_does_not_matter(folder: Path, student: Bundle, tmp_path: Path) -> None:
    specs = [f"colours=onnx:{folder / 'colours.onnx'}", f"clip={folder / 'clip'}"]
    other = mvmr.distill(specs, str(folder / "photos"), tmp_path / "other", assign=TINY, device="cpu")
    first, second = ((bundle.path / "encoder.safetensors").read_bytes() for bundle in (student, other))
    assert first == second


@pytest.mark.slow
def test_a_teacher_under_two_names_is_that_teacher_with_both_weights(folder: Path, tmp_path: Path) -> None:
    def train(name: str, *teachers: str, **weights: float) -> np.ndarray:
        table = ",".join(f"{teacher}={weight}" for teacher, weight in weights.items())
        assign = (*TINY, f"method.teachers={{{table}}}")
        bundle = mvmr.distill(teachers, str(folder / "photos"), tmp_path / name, assign=assign, device="cpu")
        state = bundle.student().encoder.state_dict()
        return np.concatenate([value.double().flatten().numpy() for value in state.values()])

    spec = f"onnx:{folder / 'colours.onnx'}"
    two = train("two", f"a={spec}", f"b={spec}", a=1.5, b=0.5)
    np.testing.assert_allclose(two, train("one", f"a={spec}", a=2.0), rtol=1e-4, atol=1e-5)
    # AdamW minds the weight of the only teacher little, but more than that
    assert np.abs(two - train("half", f"a={spec}", a=1.0)).max() > 1e-4


def test_weights_are_given_to_every_teacher_or_shared_by_the_rest() -> None:
    def weights(*assign: str) -> tuple[dict[str, float], dict[str, float]]:
        resolved = share_weights(load_recipe("default", "mvmr.distillation", assign), ["a", "b"])
        return to_mapping(resolved)["method"]["teachers"], dict(resolved.objective.representations)

    assert weights() == ({"a": 0.5, "b": 0.5}, {})
    assert weights("method.teachers.a=2") == ({"a": 2.0, "b": 1.0}, {})
    assert weights("method.teachers.a=2", "method.teachers.b=1") == ({"a": 2.0, "b": 1.0}, {})
    both = weights("method.teachers.a=2", "objective.representations.teacher=0.1")
    assert both == ({"a": 2.0, "b": 1.0}, {"a": 0.05, "b": 0.05})
    assert weights("method.teachers.a=0")[0] == {"a": 0.0, "b": 1.0}
    assert weights("method.name=cosine", "method.teachers.a=2") == ({"a": 2.0, "b": 1.0}, {})
    by_byol = ["method.name=byol", "objective.representations.teacher=0.1"]
    line = describe(share_weights(load_recipe("default", "mvmr.distillation", by_byol), ["a", "b"]))
    assert line.startswith("learning by byol, and dependence on a (0.05), b (0.05): resnet50, ")
    assert describe(load_recipe("default", "mvmr.distillation")).startswith("learning by regression of teacher (1): ")
    objective = share_weights(load_recipe("default", "mvmr.distillation", ["method.name=mvmr"]), ["a", "b"]).method
    assert to_mapping(objective)["representations"] == {"a": 0.5, "b": 0.5}
    unnamed = share_weights(load_recipe("default", "mvmr.distillation"), ["teacher", "b"])
    assert to_mapping(unnamed)["method"]["teachers"] == {"teacher": 0.5, "b": 0.5}
    changed = load_recipe("default", "mvmr.distillation", ["method.name=combination", "method.losses.cosine=0.5"])
    assert to_mapping(changed)["method"]["losses"] == {"regression": 1.0, "relational": 1.0, "cosine": 0.5}
    assert describe(changed).startswith(
        "learning by combination (1 regression, 1 relational, 0.5 cosine) of teacher (1)"
    )
    with pytest.raises(MvmrError, match="'student' is what recipes and tables call something else"):
        parse_specs(["student=ViT-B-16"])


@pytest.mark.slow
def test_evaluation_measures_each_beside_the_student(folder: Path, student: Bundle) -> None:
    data = str(folder / "photos")
    comparison = compare(student.path, data)
    assert comparison.keys() == {"clip", "colours", "student"}
    assert comparison["clip"].keys() == {"zeroshot by clip", "linear", "knn"}
    assert comparison["colours"].keys() == {"linear", "knn"}
    assert comparison["student"].keys() == {"zeroshot by clip", "linear", "knn"}
    assert comparison["colours"]["linear"]["top1"] > 90  # the classes are colours
    records = {record["protocol"]: record for record in bundles.load(student.path).manifest.metrics}
    assert records["linear, teacher colours"]["values"] == comparison["colours"]["linear"]
    assert records["linear, teacher colours"]["command"].endswith("--protocol linear --table --teacher colours")
    assert records["zeroshot by clip"]["command"].endswith("--protocol zeroshot --table --teacher clip")
    alone = compare(student.path, data, teacher="colours", protocols=["linear"])
    assert alone["teacher"]["linear"] == comparison["colours"]["linear"]
    with pytest.raises(MvmrError, match="has no text tower"):
        compare(student.path, data, protocols=["zeroshot"])


@pytest.mark.slow
def test_the_report_has_a_page_for_each_and_one_that_leads_to_them(
    folder: Path, student: Bundle, tmp_path: Path
) -> None:
    data, out = str(folder / "photos"), tmp_path / "report"
    command = ["report", str(student.path), "--data", data, "--out", str(out), "--k", "3", "--permutations", "20"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "colours: neighbours of the teacher kept" in done.stdout
    assert "clip: linear probe: teacher" in done.stdout
    teachers = {name: json.loads((out / name / "report.json").read_text()) for name in ("clip", "colours")}
    overview = (out / "index.html").read_text()
    for name, each in teachers.items():
        assert (out / name / "index.html").is_file()
        assert f'href="{name}/index.html"' in overview
        assert f"{each['neighbours']['overlap']['mean']:.1f}</td>" in overview
        assert f"--teacher {name} " in each["command"]
    alone = report(student.path, data, teacher="colours", out=tmp_path / "alone", **BRIEF)
    assert alone["dependence"] == teachers["colours"]["dependence"]
    assert teachers["clip"]["dependence"] != alone["dependence"]
    (out / "notes.txt").touch()
    with pytest.raises(MvmrError, match=r"holds 'notes\.txt', which is no part of a report"):
        report(student.path, data, out=out, **BRIEF)
