"""Fine-tuning on few labels: what it brings, what it leaves alone, and that it ends the same however often it dies."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import top_k_accuracy_score

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.classifiers import linear_probe
from mvmr.evaluation.protocols import Values
from mvmr.models.student import Student
from mvmr.training import finetuning, trainer
from mvmr.training.finetuning import finetune
from mvmr.training.pretraining import recalibrate
from tests.making import SMALL, build_encoder

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

COLOURS = {"blue": (50, 60, 210), "green": (40, 200, 60), "red": (220, 40, 40)}
TRAIN, TEST = 8, 4  # images of each colour
TINY = (
    "train.epochs=2", "train.batch_size=6", "train.lr=1e-3", "train.warmup_steps=1", "train.workers=0",
    "train.precision=32-true", "train.log_steps=1", "train.checkpoint_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of an untrained encoder, its batch-norm statistics those of digits."""
    torch.set_num_threads(1)
    encoder = build_encoder()
    size, digits = Preprocess.for_size(16), open_images("sample:digits", "unlabelled").subset(range(200))
    recalibrate(encoder, digits, size, batch_size=200, workers=0, device=torch.device("cpu"))
    folder = tmp_path_factory.mktemp("start") / "student"
    folder.mkdir()
    teachers = {"teacher": {"name": "big", "weights": "w", "identity": "i" * 64}}
    return bundles.write(
        folder, backbone=SMALL.name, options=SMALL.options, embedding_dim=SMALL.width, preprocessing=size,
        training={"method": "distillation", "teachers": teachers}, encoder_state=encoder.state_dict(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images of one colour each, in train/COLOUR and test/COLOUR."""
    root, random = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + random.integers(-35, 35, (18, 21, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}-{name}.png")
    return root


def tune(start: Bundle, data: Path | str, out: Path, *assign: str, **options: Any) -> tuple[Bundle, Values]:
    options = {"labels": "50%", "device": "cpu", "assign": [*TINY, *assign], "head": "colours"} | options
    return finetune(start.path, str(data), out, **options)


@pytest.fixture(scope="module")
def reference(start: Bundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Values]:
    return tune(start, photos, tmp_path_factory.mktemp("runs") / "undisturbed")


def hashes(bundle: Bundle) -> dict[str, str]:
    files = sorted(file for file in bundle.path.rglob("*") if file.is_file())
    return {str(file.relative_to(bundle.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weight_hashes(bundle: Bundle) -> tuple[str, str]:
    """Hashes of the encoder's and the head's weights."""
    return bundle.manifest.files["encoder.safetensors"], bundle.manifest.files["heads/colours/head.safetensors"]


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- what it brings


@pytest.mark.slow
def test_a_tuned_encoder_beats_the_frozen_probe_of_an_untrained_one(start: Bundle, tmp_path: Path) -> None:
    schedule = ("train.epochs=12", "train.batch_size=30", "train.lr=4e-3", "views.policy=none")
    sample, values = tune(start, "sample:digits", tmp_path / "out", *schedule, labels="10%", head=None)
    assert values["images"] == 120
    assert values["top1"] > values["top1_frozen"] + 5
    assert sample.heads == ("sample-digits",)
    test = open_images("sample:digits", "test")
    head, h = sample.head("sample-digits"), sample.student().embed([test.load(i) for i in range(len(test))]).numpy()
    logits = h @ head.weight.T + head.bias
    for k in (1, 5):  # of all 597 images, by the encoder that is in the bundle
        expected = 100 * top_k_accuracy_score(test.labels, logits, k=k)
        assert values[f"top{k}"] == pytest.approx(expected, abs=0.2)


# -- what comes out


def test_the_new_bundle_is_whole_and_says_what_it_is(
    start: Bundle, photos: Path, reference: tuple[Bundle, Values]
) -> None:
    sample, values = reference
    assert os.listdir(sample.path.parent) == ["undisturbed"]
    assert set(os.listdir(sample.path)) == {
        "README.md", "bundle.json", "encoder.safetensors", "heads", "metrics.jsonl", "run.json"
    }  # fmt: skip
    again = bundles.load(sample.path)
    assert again.heads == ("colours",)
    assert again.head("colours").classes == tuple(COLOURS)
    assert again.space_id != start.space_id
    assert again.manifest.preprocessing == start.manifest.preprocessing
    assert values.keys() == {
        "top1",
        "balanced_accuracy",
        "macro_f1",
        "images",
        "top1_frozen",
    }  # of three classes there is no top 5
    assert values["images"] == 12
    (record,) = again.manifest.metrics
    assert (record["protocol"], record["head"], record["values"]) == ("fewshot 50%", "colours", values)
    command = f"mvmr finetune {start.path} --data {photos} --labels 50% --recipe default --head colours"
    assert record["command"].startswith(command)
    assert record["command"].endswith(f"--out {sample.path}")
    training = again.manifest.training
    assert training["method"] == "fine-tuning"
    assert training["start"] == {"path": str(start.path), "space_id": start.space_id}
    assert training["teachers"] == start.manifest.training["teachers"]
    assert {key: training["subset"][key] for key in ("labels", "seed", "images")} == {
        "labels": "50%", "seed": 0, "images": 12
    }  # fmt: skip
    assert training["recipe"]["name"] == "default"
    assert training["steps"] == 4
    line = json.loads((sample.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "cross_entropy", "top1", "lr"} <= line.keys()


@pytest.mark.slow
def test_one_seed_gives_the_same_bundle_and_the_start_stays_as_it_was(
    start: Bundle, photos: Path, reference: tuple[Bundle, Values], tmp_path: Path
) -> None:
    before = hashes(start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        state = torch.random.get_rng_state()
        again, values = tune(start, photos, tmp_path / "a", "train.workers=1")
        assert torch.equal(state, torch.random.get_rng_state())
    assert weight_hashes(again) == weight_hashes(reference[0])
    assert values == reference[1]
    another, _ = tune(start, photos, tmp_path / "b", "train.seed=1")
    assert weight_hashes(another)[0] != weight_hashes(again)[0]
    assert another.manifest.training["subset"]["keys"] != again.manifest.training["subset"]["keys"]
    assert hashes(start) == before


@pytest.mark.slow
def test_no_weight_depends_on_a_label_outside_the_subset(
    start: Bundle, photos: Path, reference: tuple[Bundle, Values], tmp_path: Path
) -> None:
    first, values = reference
    moved = shutil.copytree(photos, tmp_path / "photos")
    (moved / "test" / "red").rename(moved / "test" / "away")
    (moved / "test" / "blue").rename(moved / "test" / "red")
    (moved / "test" / "away").rename(moved / "test" / "blue")
    permuted, worse = tune(start, moved, tmp_path / "a")
    assert weight_hashes(permuted) == weight_hashes(first)
    assert worse != values
    file = tmp_path / "list.txt"
    train = open_images(photos, "train")
    file.write_text("\n".join(os.path.basename(train.keys[row]) for row in finetuning.draw(train, 0.5, 0)))
    listed, same = tune(start, photos, tmp_path / "b", labels=str(file))
    assert weight_hashes(listed) == weight_hashes(first)
    assert same == values
    assert listed.manifest.metrics[0]["protocol"] == "fewshot 12 files"


@pytest.mark.slow
def test_training_starts_where_the_recipe_says(start: Bundle, photos: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, what is found at the end is what training started from."""
    still = ("train.lr=1e-30", "train.weight_decay=0")
    theirs = start.student().encoder.state_dict()
    settled = SMALL.build()
    settled.load_state_dict(theirs)
    train, size = open_images(photos, "train"), start.manifest.preprocessing
    recalibrate(settled, train, size, batch_size=99, workers=0, device=torch.device("cpu"))

    unmoved, _ = tune(start, photos, tmp_path / "a", *still)
    torch.testing.assert_close(unmoved.student().encoder.state_dict(), settled.state_dict(), check_stride=False)
    rows = finetuning.draw(train, 0.5, 0)
    student = Student(settled, size, dim=SMALL.width, name="settled", identity="")
    h = student.embed([train.load(int(row)) for row in rows])
    assert train.labels is not None
    probe = linear_probe(h.numpy(), train.labels[rows], 3)  # not of the features of the bundle: see its fixture
    assert np.allclose(unmoved.head("colours").weight, probe.weight, rtol=1e-3, atol=1e-3 * np.abs(probe.weight).max())

    reference, _ = tune(start, photos, tmp_path / "b", *still, "head=zero", "recalibrate=false", "views.policy=none")
    weights = reference.student().encoder.state_dict()
    torch.testing.assert_close(weights["conv1.weight"], theirs["conv1.weight"])
    for state in (theirs, settled.state_dict()):  # what the batches of the subset have left
        assert not torch.allclose(weights["bn1.running_mean"], state["bn1.running_mean"])
    assert np.abs(reference.head("colours").weight).max() < 1e-20


# -- stopped, killed, gone on with


def die(monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int) -> None:
    """End the process, as far as Python can see, at the n-th call of ``place.name``."""
    real, calls = getattr(target, name), 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise SystemExit(9)
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, function)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        pytest.param(finetuning, "Measured", 1, marks=pytest.mark.slow),  # before anything was embedded
        (trainer, "learning_rate", 4),  # after the checkpoint of step 2
        pytest.param(finetuning, "recalibrate", 2, marks=pytest.mark.slow),  # after the last step
        (bundles, "add_head", 1),  # the encoder is written, its head is not
        pytest.param(bundles, "publish", 1, marks=pytest.mark.slow),  # whole, but not in its place
    ],
)
def test_a_dead_run_ends_as_an_undisturbed_one(
    start: Bundle,
    photos: Path,
    reference: tuple[Bundle, Values],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: object,
    name: str,
    call: int,
) -> None:
    die(monkeypatch, target, name, call)
    with pytest.raises(SystemExit):
        tune(start, photos, tmp_path / "out")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["out.partial"]
    with pytest.raises(MvmrError, match="holds an interrupted run: give --resume"):
        tune(start, photos, tmp_path / "out")
    sample, values = tune(start, photos, tmp_path / "out", resume=True)
    assert weight_hashes(sample) == weight_hashes(reference[0])
    assert values == reference[1]
    assert steps(sample.path) == [1, 2, 3, 4]
    assert set(os.listdir(sample.path)) == set(os.listdir(reference[0].path))
    assert os.listdir(tmp_path) == ["out"]
    assert tune(start, photos, tmp_path / "out", resume=True)[1] == values  # nothing is left to do


@pytest.mark.slow
def test_ctrl_c_saves_and_another_run_is_not_gone_on_with(
    start: Bundle, photos: Path, reference: tuple[Bundle, Values], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.learning_rate

    def interrupt(config: trainer.TrainConfig, step: int, total: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(config, step, total)

    monkeypatch.setattr(trainer, "learning_rate", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"step 3 of 4 is saved in .*out\.partial; go on with --resume"):
        tune(start, photos, tmp_path / "out")
    monkeypatch.undo()
    for options, message in [
        ({"labels": "25%"}, r"subset\.labels \('50%' there, '25%' now\)"),
        ({"head": "tints"}, r"head \('colours' there, 'tints' now\)"),
        ({"recipe": "few-label-paper"}, r"recipe\.head \('probe' there, 'zero' now\)"),
    ]:
        with pytest.raises(MvmrError, match=message):
            tune(start, photos, tmp_path / "out", resume=True, **options)
    assert weight_hashes(tune(start, photos, tmp_path / "out", resume=True)[0]) == weight_hashes(reference[0])


# -- what stops a run


@pytest.mark.parametrize(
    ("options", "assign", "message"),
    [
        ({"labels": "0%"}, (), r"^labels '0%': give a share of the training images above 0 and up to 100"),
        ({"labels": "none.txt"}, (), r"^labels 'none\.txt': give a share .* or a file that lists images"),
        ({"labels": "5%"}, (), r"3 labelled images are too few to fine-tune on, a step takes 4 or more: give a larger"),
        ({}, ("train.accumulate=4",), r"12 labelled images are too few to fine-tune on, a step takes 16 or more"),
        ({"recipe": "defualt"}, (), r"^unknown recipe 'defualt'; did you mean 'default'\? Known: default, few-label-"),
        ({"recipe": "none.toml"}, (), r"^recipe file none\.toml does not exist$"),
        ({}, ("views.size=32",), r"unknown key 'views\.size', known: policy"),
        ({}, ("views.policy=papr",), r"unknown view policy or step 'papr'; did you mean 'paper'\?"),
        ({}, ("head=probes",), r"head = 'probes' should be one of probe, zero; did you mean 'probe'\?"),
        ({"head": "my head"}, (), r"^head name 'my head' is not allowed"),
        ({"device": "cpuu"}, (), r"^cannot use 1 of device 'cpuu'"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    start: Bundle, photos: Path, tmp_path: Path, options: dict[str, Any], assign: tuple[str, ...], message: str
) -> None:
    with pytest.raises(MvmrError, match=message) as caught:
        tune(start, photos, tmp_path / "out", *assign, **options)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_data_that_cannot_be_learned_from_are_refused(start: Bundle, photos: Path, tmp_path: Path) -> None:
    flat = shutil.copytree(photos / "train" / "red", tmp_path / "flat")
    partly = shutil.copytree(photos, tmp_path / "partly")
    shutil.rmtree(partly / "train" / "red")
    missing = tmp_path / "list.txt"
    missing.write_text("0-red.png\n99-red.png\n0-blue.png\n")
    for data, options, message in [
        (flat, {}, "has no labels to measure with"),
        (partly, {}, "class 'red' is in the test split and has no image in the training split"),
        (tmp_path / "nowhere", {}, "does not exist; give a folder of images"),
        (photos, {"labels": str(missing)}, r"names 1 of 3 images that are not .*: 99-red\.png; list names such as"),
    ]:
        with pytest.raises(MvmrError, match=message):
            tune(start, data, tmp_path / "out", **options)
    assert not (tmp_path / "out.partial").exists()


def test_nothing_that_stands_is_replaced_unasked(
    start: Bundle, photos: Path, reference: tuple[Bundle, Values], tmp_path: Path
) -> None:
    sample, _ = reference
    with pytest.raises(MvmrError, match="holds a finished bundle: give another --out, or --overwrite"):
        tune(start, photos, sample.path)
    with pytest.raises(MvmrError, match="is the bundle to start from, which is kept as it is: give another --out"):
        tune(start, photos, start.path, overwrite=True)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(MvmrError, match="nothing of it is touched"):
        tune(start, photos, tmp_path, overwrite=True)


@pytest.mark.slow
def test_batches_larger_than_the_subset_are_lowered_and_that_is_said(
    start: Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, _ = tune(start, photos, tmp_path / "out", "train.batch_size=64", "train.epochs=1", progress=True)
    assert "12 labelled images: batches of 12, not 64\n" in capsys.readouterr().err
    assert sample.manifest.training["recipe"]["train"]["batch_size"] == 12
    assert sample.manifest.training["steps"] == 1
