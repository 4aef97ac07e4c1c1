"""Our distillation beside that of others: the common start, what is not run again, refusals, and the table."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.bundles.preprocess import Preprocess
from mvmr.data.image_set import Arrays, ImageSet
from mvmr.errors import MvmrError
from mvmr.evaluation.protocols import Labelled
from mvmr.models.backbone import StudentConfig
from mvmr.models.student import Student
from mvmr.models.table import open_backbone

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("distil_peers")


def record(**values: Any) -> dict[str, Any]:
    of = {"set": "emoji", "teacher": "lite2", "peer": "mvmr", "version": "1", "lr": 0.001, "seed": 0, "steps": 400}
    return of | {"linear": 70.0, "knn": 60.0, "seconds": 120} | values


@pytest.mark.slow
def test_a_peer_starts_from_the_very_student_and_counts_what_trains_it(peers: ModuleType, tmp_path: Path) -> None:
    job = importlib.import_module("peers.job")
    torch.manual_seed(0)
    ours = open_backbone(StudentConfig(backbone="resnet18"), 32).build().eval()
    torch.save(ours.state_dict(), tmp_path / job.START)
    theirs = job.Student(tmp_path)
    images = torch.randn(3, 3, 32, 32)
    theirs.train()(images)
    assert theirs.seen == 3
    theirs.encoder.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.eval()(images), ours(images))
    theirs.hand_back(tmp_path, 1.0)
    assert json.loads((tmp_path / job.DONE).read_text()) == {"images_seen": 3, "seconds": 1.0}
    assert torch.load(tmp_path / job.STUDENT, weights_only=True).keys() == ours.state_dict().keys()


def test_a_job_comes_back_as_it_was(peers: ModuleType, tmp_path: Path) -> None:
    of = peers.PEERS["lightly-train"]
    job = peers.Job(
        images=str(tmp_path), teacher="t", weights="w", code="c", teacher_side=260, side=32, mean=of.mean, std=of.std,
        batch=64, epochs=2, rate=5e-4, seed=1,
    )  # fmt: skip
    job.save(tmp_path)
    assert peers.Job.load(tmp_path) == job
    for index in (10, 2):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index:06}.png")
    assert [file.name for file in job.files()] == ["000002.png", "000010.png"]


class Stub:
    """A peer's run, whose student has seen so many images."""

    threads = 1

    def __init__(self, peers: ModuleType, images_seen: int) -> None:
        settings = [*peers._RECIPE, "train.epochs=1", "train.batch_size=4"]
        self.recipe = peers.parse(peers.Recipe, peers.assign(peers.COMMON, settings), where="recipe")
        rng = np.random.default_rng(0)
        pixels, labels = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), np.arange(8) % 2
        images = ImageSet(
            name="noise", split="train", source=Arrays(pixels, list("abcdefgh")), fingerprint="noise", native_size=32,
            read_labels=lambda: labels, classes=("a", "b"),
        )  # fmt: skip
        self.data = Labelled.of(images, images)
        encoder = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten())
        student = Student(encoder, Preprocess.for_size(32), dim=3, name="stub", identity="stub")
        self.trained = peers.Trained(student, 60.0, images_seen)
        self.runs = 0

    def theirs(self, name: str, rate: float, python: Path) -> Any:
        self.runs += 1
        return self.trained

    def refitted(self, student: Student) -> Student:
        return student


def test_what_is_there_is_not_run_again(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "score", lambda student, data: {"linear": 50.0, "knn": 40.0})
    work, results = Stub(peers, images_seen=8), tmp_path / "results.jsonl"
    key = {"set": "noise", "teacher": "lite0", "seed": 0, "peer": "lightly-train", "version": "1", "lr": 1e-3}
    for _ in range(2):
        peers.carry_out(results, work, dict(key), Path())
    assert work.runs == 1
    (found,) = peers.read(results)
    assert (found["steps"], found["images_seen"], found["linear"], found["refitted_knn"]) == (2, 8, 50.0, 40.0)
    peers.carry_out(results, work, key | {"lr": 1e-2}, Path())
    assert work.runs == 2


def test_a_peer_that_saw_other_images_is_refused(peers: ModuleType, tmp_path: Path) -> None:
    key = {"set": "noise", "teacher": "lite0", "seed": 0, "peer": "lightly-train", "version": "1", "lr": 1e-3}
    with pytest.raises(MvmrError, match="lightly-train has seen 12 images in 2 steps"):
        peers.carry_out(tmp_path / "results.jsonl", Stub(peers, images_seen=12), key, Path())
    assert peers.read(tmp_path / "results.jsonl") == []


def test_only_teachers_that_peers_can_take(peers: ModuleType) -> None:
    assert list(peers.combos(["patches", "digits"], None)) == [("patches", "lite2"), ("digits", "lite0")]
    with pytest.raises(MvmrError, match="digits has no teacher 'clip' that peers can take; it has lite0"):
        list(peers.combos(["digits"], ["clip"]))
    with pytest.raises(MvmrError, match="there is no set 'emojis'"):
        list(peers.combos(["emojis"], None))


def test_a_peer_that_fails_says_why(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.environments, "HERE", tmp_path)
    (tmp_path / "peer.py").write_text(
        "import os\nraise SystemExit(os.environ['LIGHTLY_TRAIN_EVENTS_DISABLED'] + ' no')"
    )
    with pytest.raises(MvmrError, match=r"peer.py failed: 1 no"):
        peers._run(Path(sys.executable), "peer.py", tmp_path, 1)


def test_the_table_has_each_at_its_best_rate(peers: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = {"peer": "lightly-train", "version": "2", "refitted_linear": 50.0, "refitted_knn": 45.0}
    peers.print_table(
        [
            record(),
            record(seed=1, linear=72.0),
            record(**theirs, lr=0.1, linear=40.0, knn=40.0),
            record(**theirs, lr=0.2, linear=50.0, knn=39.0),
            record(**theirs, lr=0.1, seed=1, linear=40.0, knn=40.0),
            record(**theirs, lr=0.2, seed=1, linear=52.0, knn=39.0),
            record(**theirs, lr=0.4, linear=99.0, knn=99.0),  # one seed of two
        ]
    )
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| emoji | lite2 | 400 | mvmr 1 | 0.001 of 1 | 2 | 71.0 ± 1.4 | 60.0 ± 0.0 |  |  | 2.0 |",
        "| emoji | lite2 | 400 | lightly-train 2 | 0.2 of 2 | 2 | 51.0 ± 1.4 | 39.0 ± 0.0 | 50.0 ± 0.0 | 45.0 ± 0.0 "
        "| 2.0 |",
    ]
