"""What a user types: a folder of all sorts of images to a bundle, real signals, and one line for what can't be."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.cli.commands import slug
from mvmr.cli.main import main
from mvmr.cli.options import SHORTHANDS
from mvmr.training import pretraining

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

RECIPE = """
[student]
backbone = "resnet18"
[views]
size = 16
[method]
projector = [16, 16]
representations = { pixels = 1.0, augmented_pixels = 1.0 }
[train]
epochs = 4
batch_size = 8
warmup_steps = 2
workers = 0
precision = "32-true"
log_steps = 1
checkpoint_steps = 5
"""
STEPS = 16
BROKEN = ("--max-unreadable", "0.1")
COLOURS = {"blue": (50, 60, 210), "green": (40, 200, 60), "red": (220, 40, 40)}
# what may stand on standard error beside an error: the plan, and progress
BESIDES = ("data ", "recipe ", "out ", "teacher ", "weights ", "checking images ", "training ")


def a_photo(colour: str, random: np.random.Generator, size: tuple[int, int] = (26, 20)) -> Image.Image:
    pixels = np.array(COLOURS[colour]) + random.integers(-35, 35, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 images of three colours, some in odd formats, and three files that are none."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "photos"
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(9):
            a_photo(colour, random).save(folder / colour / f"{number}.jpg")
    red, green, blue = (folder / colour for colour in ("red", "green", "blue"))
    a_photo("red", random).convert("CMYK").save(red / "print.jpg")
    a_photo("red", random, (5, 4)).save(red / "tiny.png")
    a_photo("red", random, (90, 60)).save(red / "large.WEBP")
    frames = [a_photo("green", random) for _ in range(3)]
    frames[0].save(green / "moving.gif", save_all=True, append_images=frames[1:])
    a_photo("green", random).quantize(16).save(green / "palette.png")
    a_photo("green", random).convert("RGBA").save(green / "alpha.png")
    Image.fromarray(random.integers(0, 65536, (20, 26), dtype=np.uint16)).save(blue / "deep.png")
    a_photo("blue", random).save(blue / "scan.tiff")
    whole = BytesIO()
    a_photo("blue", random, (200, 150)).save(whole, "JPEG")
    (blue / "truncated.jpg").write_bytes(whole.getvalue()[:900])
    (green / "empty.png").write_bytes(b"")
    (red / "letter.jpg").write_text("Dear diary")
    (red / "notes.txt").write_text("not even meant as one")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def trained(photos: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished bundle and what the command said; not to be changed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "mine"
    return out, mvmr("pretrain", *arguments(photos, recipe, out))


@pytest.fixture
def copied(trained: tuple[Path, Result], tmp_path: Path) -> Path:
    shutil.copytree(trained[0], tmp_path / "runs" / "mine")
    return tmp_path / "runs" / "mine"


def arguments(photos: Path, recipe: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", photos, "--recipe", recipe, "--out", out, "--device", "cpu", "--max-unreadable", "0.2"]
    return [*map(str, given), *more]


def mvmr(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, [str(each) for each in argv])


def refusal(result: Result) -> str:
    """The one line about what is wrong; besides there are the plan and progress, and standard output is empty."""
    assert result.exit_code == 1, result.stderr
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(BESIDES) and " images, " not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def steps(folder: Path) -> list[int]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


# -- the way through


def test_a_folder_of_all_sorts_becomes_a_bundle(trained: tuple[Path, Result], photos: Path) -> None:
    out, said = trained
    assert said.exit_code == 0, said.output
    assert said.stdout == f"{out}\n"
    lines = said.stderr.splitlines()
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
    assert bundle.manifest.backbone == "resnet18"
    assert torch.isfinite(bundle.student().embed([photos / "red" / "print.jpg", photos / "blue" / "deep.png"])).all()


def test_info_probe_and_evaluate_read_it(copied: Path, photos: Path) -> None:
    told = mvmr("info", copied)
    assert told.exit_code == 0
    assert "mvmr, recipe tiny, 16 steps" in told.stdout
    assert "teacher   none" in told.stdout
    assert f"{photos}, 35 images" in told.stdout
    assert json.loads(mvmr("info", copied, "--json").stdout)["embedding_dim"] == 512

    probed = mvmr("probe", copied, "--data", photos, "--head", "colours", "--max-unreadable", "0.2")
    assert probed.exit_code == 0, probed.output
    assert probed.stdout.startswith(f"{copied}: heads colours; on the test split top1 ")
    measured = mvmr("evaluate", copied, "--data", photos, "--max-unreadable", "0.2", "--protocol", "knn,linear")
    assert measured.exit_code == 0, measured.output
    assert [line.split()[3] for line in measured.stdout.splitlines()] == ["knn", "linear"]
    told = mvmr("info", copied)
    assert "heads     colours" in told.stdout
    assert told.stdout.count("measured  ") == 3
    assert bundles.load(copied).head("colours").classes == ("blue", "green", "red")


def test_finetune_and_report_read_it(copied: Path, photos: Path, tmp_path: Path) -> None:
    before = (copied / "bundle.json").read_bytes()
    tuned = mvmr(
        "finetune", copied, "--data", photos, "--labels", "50%", "--epochs", "1", "--workers", "0", "--device", "cpu",
        "--out", tmp_path / "tuned", "--head", "colours", *BROKEN,
    )  # fmt: skip
    assert tuned.exit_code == 0, tuned.output
    assert re.search(r"tuned: heads colours; on the test split top1 [\d.]+ %, images \d+, top1_frozen", tuned.stdout)
    assert (copied / "bundle.json").read_bytes() == before
    reported = mvmr("report", copied, "--data", photos, "--k", "3", "--out", tmp_path / "report", *BROKEN)
    assert reported.exit_code == 0, reported.output
    assert reported.stdout.splitlines()[-1] == f"{tmp_path}/report/index.html"
    assert "names no teacher" in reported.stderr
    assert "--k 3" in json.loads((tmp_path / "report" / "report.json").read_text())["command"]


@pytest.mark.slow
def test_ablate_prints_its_table_and_goes_on(photos: Path, recipe: Path, tmp_path: Path) -> None:
    asked = ["ablate", "--grid", "losses", "--only", "L2", "--data", photos, "--recipe", recipe, *BROKEN]
    for seeds in ("1", "2"):
        result = mvmr(*asked, "--seeds", seeds, "--device", "cpu", "--out", tmp_path / "grid")
        assert result.exit_code == 0, result.output
        assert re.search(rf"^\| L2 \|.*\| {seeds} \|$", result.stdout, re.M)
    lines = (tmp_path / "grid" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]


def test_numbers_of_neighbours_are_whole() -> None:
    result = mvmr("evaluate", "somewhere", "--data", "sample:digits", "--k", "5,many")
    assert result.exit_code == 2
    assert "--k 5,many: give whole numbers separated by commas" in result.stderr


def test_the_newest_bundle_is_meant_when_none_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent.parent)
    assert mvmr("info").stdout.splitlines()[0] == "bundle    runs/mine"


def test_info_reads_a_bundle_that_records_nothing(trained: tuple[Path, Result], tmp_path: Path) -> None:
    (tmp_path / "odd.partial").mkdir()
    state = bundles.load(trained[0]).student().encoder.state_dict()
    records: tuple[dict[str, Any], ...] = (
        {},
        {"teachers": ["x"], "recipe": 3, "data": None},
        {"teachers": {"teacher": {}}},
    )
    for training in records:
        shutil.rmtree(tmp_path / "odd", ignore_errors=True)
        (tmp_path / "odd.partial").mkdir(exist_ok=True)
        bundles.write(
            tmp_path / "odd.partial", backbone="resnet18", options={"small_kernel": False}, embedding_dim=512,
            preprocessing=Preprocess.for_size(16), training=training, encoder_state=state,
        )  # fmt: skip
        bundles.publish(tmp_path / "odd.partial", tmp_path / "odd")
        told = mvmr("info", tmp_path / "odd")
        assert told.exit_code == 0, told.exception
        assert "not recorded" in told.stdout


def test_options_are_assignments_to_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def recorded(data: str, out: str, **options: Any) -> None:
        called.update(options, data=data, out=out)
        raise Stop

    monkeypatch.setattr(pretraining, "pretrain", recorded)
    values = {"student": "resnet18", "size": "32", "epochs": "3", "batch-size": "64", "accumulate": "2", "lr": "1e-3",
              "clip-grad": "1", "precision": "32-true", "workers": "0", "seed": "0"}  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    monkeypatch.chdir(tmp_path)
    result = mvmr("pretrain", "--small-kernel", *flags, "--set", "train.seed=5", "--data", "My Photos/2024")
    assert isinstance(result.exception, Stop)
    assert set(called["assign"]) == {
        "student.small_kernel=true",
        *(f"{SHORTHANDS[name][0]}={value}" for name, value in values.items()),
        "train.seed=5",
    }
    assert called["assign"][-1] == "train.seed=5"  # what is said most exactly comes last, and wins
    assert called["out"] == "runs/pretrain-my-photos-2024"
    assert called["data"] == "My Photos/2024"
    assert called["device"] == "auto"
    mvmr("pretrain")
    assert (called["data"], called["assign"], called["recipe"]) == ("sample:patches", (), "default")


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


# -- what can't be


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--recipe", "papr"], "unknown recipe 'papr'; did you mean 'paper'?"),
        (["--recipe", "gone.toml"], "recipe file gone.toml does not exist"),
        (["--set", "train.lrr=1"], "unknown key 'train.lrr', did you mean 'lr'?"),
        (["--set", "train.lrr=1", "--epochs", "many"], "train.epochs = 'many' should be a whole number"),
        (["--set", "nonsense"], "cannot read assignment 'nonsense'; write KEY=VALUE"),
        (["--data", "gone"], "gone does not exist"),
        (["--data", "sample:patch"], "did you mean 'sample:patches'?"),
        (["--data", "stl10:gone"], "is missing"),
        (["--data", "nothing"], "holds nothing; give a folder with images"),
        (["--data", "texts"], "holds 1 other files, but no images"),
        (["--data", "recipe.toml"], "is a file, not a folder"),
        (["--max-unreadable", "0.01"], "3 of 38 image files"),
        (["--max-unreadable", "7"], "max_unreadable = 7.0 must lie between 0 and 1"),
        (["--batch-size", "1"], "batch_size = 1: the method compares the images of a batch"),
        (["--batch-size", "36"], "a step takes 36 images and the data have 35: give --batch-size 35 or less"),
        (["--student", "resnet19"], "unknown student 'resnet19'; did you mean 'resnet18'?"),
        (["--size", "0"], "crop = 0 must lie between 1 and"),
        (["--workers=-1"], "workers = -1: must be 0 or more"),
        (["--seed=-1"], "seed = -1: must lie between 0 and"),
        (["--precision", "fp8"], "should be one of 32-true, bf16-mixed, 16-mixed"),
        (["--device", "cpuu"], "cannot use 1 of device 'cpuu'"),
        (["--init", "gone.pt"], "weights file gone.pt not found"),
        (["--init", "texts"], "texts is not a bundle"),
        (["--out", "texts"], "texts exists and is no bundle; nothing of it is touched"),
        (["--out", "recipe.toml"], "recipe.toml exists and is no bundle; nothing of it is touched"),
        (["--out", "recipe.toml/x"], "cannot make"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--set", "method.representations={hgo=1}"], "unknown representation 'hgo'; did you mean 'hog'?"),
        (["--set", "views.policy=crop+fip"], "unknown view policy or step 'fip'; did you mean 'flip'?"),
        (["--lr", "1e30", "--epochs", "1"], "is not finite"),
    ],
)  # fmt: skip
def test_pretrain_says_what_is_wrong_in_one_line(
    photos: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("mine")
    shutil.copy(recipe, "recipe.toml")
    assert said in refusal(mvmr("pretrain", *arguments(photos, recipe, tmp_path / "out", *more)))
    left = set(os.listdir(tmp_path)) - {"out.partial"} if "--lr" in more else set(os.listdir(tmp_path))
    assert left == {"nothing", "texts", "recipe.toml"}
    assert os.listdir(tmp_path / "texts") == ["a.txt"]


@pytest.mark.parametrize("command", ["info", "evaluate", "probe"])
@pytest.mark.parametrize(
    ("bundle", "said"),
    [
        ("gone", "no bundle at gone: there is no such folder"),
        ("empty", "empty is not a bundle"),
        ("half.partial", "its run has not finished"),
        (None, "no bundle below runs; give one, or make one with"),
    ],
)
def test_a_bundle_that_is_not_there_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, bundle: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.partial").mkdir()
    data = [] if command == "info" else ["--data", str(photos)]
    assert said in refusal(mvmr(command, *([bundle] if bundle else []), *data))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["evaluate", "--data", "flat"], "flat has no labels to measure with"),
        (["probe", "--data", "flat"], "flat has no labels to measure with"),
        (["evaluate", "--data", "gone"], "gone does not exist"),
        (["evaluate", "--data", "sample:digits", "--protocol", "linaer"], "'linaer'; did you mean 'linear'?"),
        (["evaluate", "--data", "sample:digits", "--device", "cudda"], "cannot use device 'cudda'"),
    ],
)  # fmt: skip
def test_measuring_says_what_is_wrong_in_one_line(
    copied: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.chdir(copied.parent)
    shutil.copytree(photos / "red", "flat", ignore=shutil.ignore_patterns("letter.jpg"))
    before = (copied / "bundle.json").read_bytes()
    assert said in refusal(mvmr(argv[0], copied, *argv[1:]))
    assert (copied / "bundle.json").read_bytes() == before


def test_a_changed_file_is_named(copied: Path) -> None:
    with (copied / "encoder.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    assert "encoder.safetensors has changed since it was written" in refusal(mvmr("info", copied))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--teacher", "ViT-B-61"], "unknown teacher 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        (["--teacher", "ViT-B-16", "--pretrained", "opnai"], "'opnai'; did you mean 'openai'?"),
        (["--teacher", "nothing"], "has no open_clip_config.json"),
        (["--teacher", "ViT-B-16", "--pretrained", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_distill_says_what_is_wrong_in_one_line(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    result = mvmr("distill", *argv, "--recipe", "paper", "--data", "sample:digits", "--out", "out", "--device", "cpu")
    assert said in refusal(result)
    assert os.listdir(tmp_path) == ["nothing"]


# -- real processes and real signals

_FORKED = """
import multiprocessing, os, torch
multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as ever
os.setpgrp()
os.environ["MVMR_CACHE"] = cache
for descriptor, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
os.fsync = lambda descriptor: None
torch.set_num_threads(1)
from mvmr.cli.main import main
main(argv)
"""


@pytest.fixture
def start(tmp_path: Path, cache: Path) -> Callable[..., Any]:
    """Run `mvmr` in a process and a process group of its own; torch is imported by their common parent."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvmr.training.pretraining", "mvmr.cli.commands"])

    def begin(*argv: str) -> Any:
        given = {"argv": list(argv), "folder": str(tmp_path), "cache": str(cache)}
        process = context.Process(target=exec, args=(_FORKED, given))
        process.start()
        return process

    return begin


def wait_for(folder: Path, step: int, alive: Callable[[], bool]) -> None:
    while step not in steps(folder):
        assert alive(), "the run ended too soon"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "group", "workers", "code"),
    [
        pytest.param(signal.SIGINT, False, "0", 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, "2", 130, marks=pytest.mark.slow),  # as a scheduler does it
        (signal.SIGKILL, False, "2", -signal.SIGKILL),
    ],
)  # fmt: skip
def test_a_stopped_run_is_kept_and_ends_like_an_undisturbed_one(
    start: Callable[..., Any], trained: tuple[Path, Result], photos: Path, recipe: Path, tmp_path: Path,
    number: signal.Signals, group: bool, workers: str, code: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    given = arguments(photos, recipe, out, "--workers", workers)
    process = start("pretrain", *given)
    wait_for(tmp_path / "out.partial", 6, process.is_alive)
    (os.killpg if group else os.kill)(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said or code == -signal.SIGKILL  # workers may complain that their parent is gone
    assert (f"is saved in {out}.partial; go on with --resume" in said) == (code == 130)
    assert not out.exists()

    assert f"{out}.partial holds an interrupted run: give --resume" in refusal(mvmr("pretrain", *given))
    assert "differs in recipe.train.seed (0 there, 7 now)" in refusal(
        mvmr("pretrain", *given, "--resume", "--seed", "7")
    )
    resumed = mvmr("pretrain", *arguments(photos, recipe, out, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    assert steps(out) == list(range(1, STEPS + 1))
    for name in ("encoder.safetensors", "projector.safetensors"):
        assert (out / name).read_bytes() == (trained[0] / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(photos: Path, recipe: Path, tmp_path: Path, cache: Path) -> None:
    """Nothing forked or replaced: the command as a shell starts it, its whole group signalled as a terminal does."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "mvmr", "pretrain", *arguments(photos, recipe, out, "--workers", "2", "--epochs", "40")],
        env={**os.environ, "MVMR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(tmp_path / "out.partial", 3, lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output == ""
    saved = steps(tmp_path / "out.partial")[-1]
    assert errors.splitlines()[-1].startswith(f"stopped: step {saved} of ")
    assert not [line for line in errors.splitlines()[:-1] if not line.startswith(BESIDES) and " images, " not in line]
    state = torch.load(tmp_path / "out.partial" / "checkpoint.pt", weights_only=True)
    assert state["step"] == steps(tmp_path / "out.partial")[-1]


@pytest.mark.slow
@pytest.mark.cluster
def test_two_devices_make_one_bundle(photos: Path, recipe: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    given = [sys.executable, "-m", "mvmr", "pretrain", *arguments(photos, recipe, out, "--devices", "2")]
    environment = {**os.environ, "MVMR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*given, *more], env=environment, capture_output=True, text=True, timeout=300)

    done = run("--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert steps(out) == [1, 2, 3, 4]
    assert bundles.load(out).manifest.training["steps"] == 4
    assert os.listdir(tmp_path) == ["out"]
    assert "multiple of the 2 devices" in run("--batch-size", "7", "--overwrite").stderr
