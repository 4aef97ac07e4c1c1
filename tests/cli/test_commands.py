"""What a user types: from a folder of all sorts of images to a bundle, and what can be done with it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from mvmr.bundles import bundle as bundles
from mvmr.cli.commands import slug
from mvmr.cli.options import SHORTHANDS
from mvmr.training import pretraining
from mvmr.training.shorthands import KEYS
from tests.cli.commands import BROKEN, STEPS, mvmr, refusal, steps
from tests.making import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


def test_a_folder_of_all_sorts_becomes_a_bundle(finished_run: tuple[Path, Result], photos: Path) -> None:
    out, result = finished_run
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["data", "recipe", "out"]
    assert f"{photos}: 35 images, 1 smaller than 16 px (enlarged), 3 skipped" in lines
    assert any(f"next: mvmr info {out}" in line for line in lines)
    skipped = dict(line.split("\t") for line in (out / "skipped.txt").read_text().splitlines())
    assert skipped.keys() == {"blue/truncated.jpg", "green/empty.png", "red/letter.jpg"}
    assert all(skipped.values())
    assert steps(out) == list(range(1, STEPS + 1))
    bundle = bundles.load(out)
    assert bundle.manifest.training["data"]["images"] == 35
    assert bundle.manifest.training["recipe"]["name"] == "tiny"
    assert bundle.manifest.backbone == "resnet18_025"
    assert torch.isfinite(bundle.student().embed([photos / "red" / "print.jpg", photos / "blue" / "deep.png"])).all()


def test_info_probe_and_evaluate_read_it(bundle_copy: Path, photos: Path) -> None:
    info = mvmr("info", bundle_copy)
    assert info.exit_code == 0
    assert "mvmr, recipe tiny, 16 steps" in info.stdout
    assert "teacher   none" in info.stdout
    assert f"{photos}, 35 images" in info.stdout
    assert json.loads(mvmr("info", bundle_copy, "--json").stdout)["embedding_dim"] == 128

    probed = mvmr("probe", bundle_copy, "--data", photos, "--head", "colours", "--max-unreadable", "0.2")
    assert probed.exit_code == 0, probed.output
    assert probed.stdout.startswith(f"{bundle_copy}: heads colours; on the test split top1 ")
    measured = mvmr("evaluate", bundle_copy, "--data", photos, "--max-unreadable", "0.2", "--protocol", "knn,linear")
    assert measured.exit_code == 0, measured.output
    assert [line.split()[3] for line in measured.stdout.splitlines()] == ["knn", "linear"]
    info = mvmr("info", bundle_copy)
    assert "heads     colours" in info.stdout
    lines = [line for line in info.stdout.splitlines() if line.startswith("measured  ")]
    assert len(lines) == len(set(lines)) == 2  # the head was measured by the same protocol
    assert bundles.load(bundle_copy).head("colours").classes == ("blue", "green", "red")


@pytest.mark.slow
def test_finetune_and_report_read_it(bundle_copy: Path, photos: Path, tmp_path: Path) -> None:
    before = (bundle_copy / "bundle.json").read_bytes()
    tuned = mvmr(
        "finetune", bundle_copy, "--data", photos, "--labels", "50%", "--epochs", "1", "--workers", "0",
        "--device", "cpu", "--out", tmp_path / "tuned", "--head", "colours", *BROKEN,
    )  # fmt: skip
    assert tuned.exit_code == 0, tuned.output
    figures = r"top1 [\d.]+ %, balanced_accuracy [\d.]+ %, macro_f1 [\d.]+ %, images \d+, top1_frozen"
    assert re.search(rf"tuned: heads colours; on the test split {figures}", tuned.stdout)
    assert (bundle_copy / "bundle.json").read_bytes() == before
    reported = mvmr("report", bundle_copy, "--data", photos, "--k", "3", "--out", tmp_path / "report", *BROKEN)
    assert reported.exit_code == 0, reported.output
    assert reported.stdout.splitlines()[-1] == f"{tmp_path}/report/index.html"
    assert "names no teacher" in reported.stderr
    assert "--k 3" in json.loads((tmp_path / "report" / "report.json").read_text())["command"]


@pytest.mark.slow
def test_ablate_prints_its_table_and_goes_on(photos: Path, recipe: Path, tmp_path: Path) -> None:
    arguments = ["ablate", "--grid", "losses", "--only", "L2", "--data", photos, "--recipe", recipe, *BROKEN]
    for seeds in ("1", "2"):
        result = mvmr(*arguments, "--seeds", seeds, "--device", "cpu", "--out", tmp_path / "grid")
        assert result.exit_code == 0, result.output
        assert re.search(rf"^\| L2 \|.*\| {seeds} \|$", result.stdout, re.M)
    lines = (tmp_path / "grid" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]


@pytest.mark.slow
def test_compare_prints_its_table_and_where_the_rest_is(photos: Path, tmp_path: Path) -> None:
    result = mvmr(
        "compare", "--methods", "simclr projector=[8,8],selflabel heads=1", "--data", photos, "--epochs", "1",
        "--student", "resnet18_025", "--size", "16", "--batch-size", "8", "--workers", "0", "--device", "cpu",
        "--out", tmp_path / "table", *BROKEN,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for row in ("random encoder", r"simclr projector=\[8,8\]", "selflabel heads=1"):
        assert re.search(rf"^\| {row} \|.*\| 1 \|$", result.stdout, re.M)
    files = result.stdout.splitlines()[-1].split()
    assert [Path(file).name for file in files] == ["table.md", "plot.svg", "curves.svg", "results.jsonl"]
    assert all(Path(file).is_file() for file in files)


def test_numbers_of_neighbours_are_whole() -> None:
    result = mvmr("evaluate", "somewhere", "--data", "sample:digits", "--k", "5,many")
    assert result.exit_code == 2
    assert "--k 5,many: give whole numbers separated by commas" in result.stderr


def test_the_newest_bundle_is_meant_when_none_is_named(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle_copy.parent.parent)
    assert mvmr("info").stdout.splitlines()[0] == "bundle    runs/mine"


def test_info_reads_a_bundle_that_records_nothing(tmp_path: Path) -> None:
    records: tuple[dict[str, Any], ...] = (
        {},
        {"teachers": ["x"], "recipe": 3, "data": None},
        {"teachers": {"teacher": {}}},
    )
    for number, training in enumerate(records):
        odd = write_bundle(tmp_path / f"odd-{number}", training=training)
        info = mvmr("info", odd.path)
        assert info.exit_code == 0, info.exception
        assert "not recorded" in info.stdout


def test_options_are_assignments_to_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def record(data: str, out: str, **options: Any) -> None:
        call.update(options, data=data, out=out)
        raise Stop

    monkeypatch.setattr(pretraining, "pretrain", record)
    values = {"student": "resnet18", "size": "32", "epochs": "3", "batch-size": "64", "accumulate": "2", "lr": "1e-3",
              "clip-grad": "1", "precision": "32-true", "workers": "0", "seed": "0"}  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    monkeypatch.chdir(tmp_path)
    Path("My Photos/2024").mkdir(parents=True)
    result = mvmr("pretrain", "--small-kernel", *flags, "--set", "train.seed=5", "--data", "My Photos/2024")
    assert isinstance(result.exception, Stop)
    assert set(call["assign"]) == {
        "student.small_kernel=true",
        *(f"{KEYS[name.replace('-', '_')]}={value}" for name, value in values.items()),
        "train.seed=5",
    }
    assert call["assign"][-1] == "train.seed=5"  # what is said most exactly comes last, and wins
    assert call["out"] == "runs/pretrain-my-photos-2024"
    assert call["data"] == "My Photos/2024"
    assert call["device"] == "auto"
    mvmr("pretrain")
    assert (call["data"], call["assign"], call["recipe"]) == ("sample:patches", (), "default")


def test_an_option_without_its_value_is_a_usage_error() -> None:
    for name in SHORTHANDS.keys() - {"small-kernel"}:
        result = mvmr("pretrain", f"--{name}")
        assert result.exit_code == 2
        assert f"Option '--{name}' requires an argument." in result.stderr


@pytest.mark.parametrize(
    ("data", "name"),
    [("stl10:/data/stl", "stl10-data-stl"), ("../Ünï/", "n"), ("...", "data"), ("sample:patches", "sample-patches")],
)
def test_a_folder_name_is_made_of_the_data(data: str, name: str) -> None:
    assert slug(data) == name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "--data", "flat"], "flat has no labels to measure with"),
        (["probe", "--data", "flat"], "flat has no labels to measure with"),
        (["evaluate", "--data", "gone"], "gone does not exist"),
        (["evaluate", "--data", "sample:digits", "--protocol", "linaer"], "'linaer'; did you mean 'linear'?"),
        (["evaluate", "--data", "sample:digits", "--device", "cudda"], "cannot use device 'cudda'"),
    ],
)  # fmt: skip
def test_measuring_says_what_is_wrong_in_one_line(
    bundle_copy: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(bundle_copy.parent)
    shutil.copytree(photos / "red", "flat", ignore=shutil.ignore_patterns("letter.jpg"))
    before = (bundle_copy / "bundle.json").read_bytes()
    assert message in refusal(mvmr(argv[0], bundle_copy, *argv[1:]))
    assert (bundle_copy / "bundle.json").read_bytes() == before


def test_a_changed_file_is_named(bundle_copy: Path) -> None:
    with (bundle_copy / "encoder.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    assert "encoder.safetensors has changed since it was written" in refusal(mvmr("info", bundle_copy))
