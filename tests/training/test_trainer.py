"""The loop: what a step is, where a stopped run goes on, what stops it, and that two ranks compute what one does."""

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.method import Method, Setting
from mvmr.methods.mvmr import Mvmr, MvmrConfig
from mvmr.methods.objective import Embeddings, Objective, ObjectiveConfig
from mvmr.training import checkpoint
from mvmr.training.trainer import BatchOrder, TrainConfig, learning_rate, train

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, IMAGES = 8, 24
Batch = dict[str, Tensor]


class Noise(Dataset[Batch]):
    """Views of images that exist nowhere else; image 13 can't be read when told so."""

    def __init__(self, unreadable: bool = False):
        self.unreadable = unreadable

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch, index = item
        if self.unreadable and index == 13:
            raise MvmrError("cannot read image 13.jpg: it is gone")
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        original, augmented = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        return {"index": torch.tensor(index), "original": original, "augmented": augmented}


def learner(seed: int = 0, **config: Any) -> Mvmr:
    """A linear encoder without batch norm, and a linear projector."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 12))
        settings = MvmrConfig(**({"representations": {"pixels": 1.0}, "projector": (6,)} | config))
        return Mvmr(settings, encoder, Setting(12, Preprocess.for_size(SIZE), IMAGES, {}))


def pixels(batch: Batch) -> dict[str, Tensor]:
    return {"pixels": batch["original"].flatten(1).float()}


def run(
    folder: Path,
    *,
    method: Method | None = None,
    targets: Callable[[Batch], dict[str, Tensor]] = pixels,
    views: Dataset[Batch] | None = None,
    **train_config: Any,
) -> dict[str, Tensor]:
    """Train in ``folder`` with 3 steps to an epoch and return the weights."""
    folder.mkdir(exist_ok=True)
    settings = {"epochs": 4, "batch_size": 8, "workers": 0, "warmup_steps": 2, "log_steps": 1, "checkpoint_steps": 5}
    config = TrainConfig(**(settings | train_config))
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    method = method or learner()
    train(method, views or Noise(), targets, config, fabric=fabric, folder=folder, features=lambda: torch.empty(0))
    return method.state_dict()


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def stop_at(call: int, action: Callable[[], object]) -> Callable[[Batch], dict[str, Tensor]]:
    """Targets that act when they are asked for the n-th time, counted from 1."""
    calls = 0

    def targets(batch: Batch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return pixels(batch)

    return targets


# -- same seed, same weights


def test_one_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    assert same(first, run(tmp_path / "b"))
    assert not same(first, run(tmp_path / "c", seed=1))
    assert not same(first, learner().state_dict())


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    assert same(run(tmp_path / "a"), run(tmp_path / "b", workers=2))


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    run(tmp_path / "a", epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


# -- stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", targets=stop_at(7, lambda: os.kill(os.getpid(), number)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoint.saved_step(tmp_path / "a") == 7
    assert same(run(tmp_path / "a"), run(tmp_path / "b"))
    assert [line["step"] for line in metrics(tmp_path / "a")] == list(range(1, 13))


def test_a_signal_in_the_last_step_does_not_spoil_the_end(tmp_path: Path) -> None:
    stopped = run(tmp_path / "a", targets=stop_at(12, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert same(stopped, run(tmp_path / "b"))


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 5, 6, 9, 12])
def test_a_dead_run_goes_on_from_its_checkpoint(tmp_path: Path, call: int) -> None:
    def die() -> None:
        raise SystemExit(9)

    with pytest.raises(SystemExit):
        run(tmp_path / "a", targets=stop_at(call, die))
    assert checkpoint.saved_step(tmp_path / "a") == {1: None, 5: None, 6: 5, 9: 5, 12: 10}[call]
    assert same(run(tmp_path / "a"), run(tmp_path / "b"))
    assert [line["step"] for line in metrics(tmp_path / "a")] == list(range(1, 13))
    timed = {"images_per_s", "seconds"}
    went_on, undisturbed = (
        [{k: v for k, v in line.items() if k not in timed} for line in metrics(tmp_path / name)] for name in "ab"
    )
    assert went_on == undisturbed


def test_a_line_cut_by_the_kill_is_written_again(tmp_path: Path) -> None:
    run(tmp_path / "a")
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 13, "epo')
    checkpoint.truncate_metrics(file, 5)
    assert [line["step"] for line in metrics(tmp_path / "a")] == [1, 2, 3, 4, 5]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    assert same(first, run(tmp_path / "a", targets=stop_at(1, pytest.fail)))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path / "a")
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(MvmrError, match=r"checkpoint\.pt can't be read .*: start over with --overwrite"):
        run(tmp_path / "a")


# -- accumulation, clipping, metrics


def test_accumulation_counts_in_optimiser_steps(tmp_path: Path) -> None:
    run(tmp_path / "a", epochs=6, batch_size=4, accumulate=2, lr=1.0, warmup_steps=2, clip_grad=1e-9)
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == list(range(1, 19))
    config = TrainConfig(lr=1.0, warmup_steps=2)
    assert [line["lr"] for line in lines] == pytest.approx([learning_rate(config, k, 18) for k in range(18)], rel=1e-4)
    assert lines[2]["epoch"] == 1
    assert lines[-1]["epoch"] == 6


def gradient(folder: Path) -> Tensor:
    """The first step's whole gradient, out of Adam's first moment in the checkpoint."""
    moments = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    return torch.cat([state["exp_avg"].flatten() for state in moments.values()]) / 0.1


def first_step(folder: Path, **config: Any) -> Tensor:
    with pytest.raises(KeyboardInterrupt):
        run(folder, targets=stop_at(1, lambda: os.kill(os.getpid(), signal.SIGINT)), **config)
    return gradient(folder)


def test_accumulation_averages_the_gradients_of_its_batches(tmp_path: Path) -> None:
    both = first_step(tmp_path / "a", accumulate=2)
    items = [
        [Noise()[item] for item in batch] for batch in BatchOrder(24, 8, 2, seed=0, start=0, stop=2, rank=0, world=1)
    ]
    expected = []
    for batch in items:
        fresh = learner()
        stacked = {key: torch.stack([item[key] for item in batch]) for key in batch[0]}
        torch.stack(list(fresh(stacked, pixels(stacked)).losses.values())).sum().backward()
        expected.append(torch.cat([p.grad.flatten() for p in fresh.parameters() if p.grad is not None]))
    torch.testing.assert_close(both, (expected[0] + expected[1]) / 2, rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_norm_of_the_gradient(tmp_path: Path) -> None:
    free = first_step(tmp_path / "a")
    clipped = first_step(tmp_path / "b", clip_grad=1e-3)
    assert free.norm() > 2e-3
    assert clipped.norm() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-6)


def test_metrics_tell_the_terms_the_null_and_the_rank(tmp_path: Path) -> None:
    run(tmp_path / "a", log_steps=5)
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [5, 10, 12]  # and the last
    terms = ("invariance", "variance", "dependence", "dcor.pixels")
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-4)
        assert line["biased.pixels"] == pytest.approx(1 - line["dcor.pixels"], abs=1e-4)
        assert {"epoch", "lr", "images_per_s", "seconds", "rank_h", "rank_z", "std_z"} <= line.keys()
        assert {"biased.views.null", "unbiased.views", "unbiased.views.null", "unbiased.pixels.null"} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())


# -- what stops a run


class Broken(Objective):
    """Its term "dcor.pixels" is not a number from a given step on."""

    def __init__(self, good_steps: int):
        super().__init__(ObjectiveConfig(representations={"pixels": 1.0}))
        self.left = good_steps

    def __call__(self, views: Embeddings, targets: Any) -> dict[str, Tensor]:
        terms = super().__call__(views, targets)
        self.left -= 1
        return terms if self.left >= 0 else terms | {"dcor.pixels": terms["dcor.pixels"] * math.nan}


def test_a_loss_that_is_not_finite_names_term_and_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    broken = learner()
    broken.objective = Broken(8)
    with pytest.raises(MvmrError) as caught:
        run(tmp_path / "a", method=broken)
    message = str(caught.value)
    assert message.startswith("dcor.pixels is not finite at step 8 (invariance = ")
    assert f"the checkpoint of step 5 in {tmp_path / 'a'} is kept: --resume with a lower learning rate" in message
    assert "\n" not in message
    assert checkpoint.saved_step(tmp_path / "a") == 5
    assert same(run(tmp_path / "a"), run(tmp_path / "b"))


def test_before_the_first_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    broken = learner()
    broken.objective = Broken(2)
    with pytest.raises(MvmrError, match=r"not finite at step 2 .*nothing was saved: --overwrite with a lower"):
        run(tmp_path / "a", method=broken)


def test_a_learning_rate_out_of_this_world_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"is not finite (at|after) step \d+"):
        run(tmp_path / "a", lr=1e30, checkpoint_steps=1)
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["learner"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_checkpoint_never_holds_weights_that_are_not_finite(tmp_path: Path) -> None:
    method = learner()
    method.encoder[1].weight.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[index]
    with pytest.raises(MvmrError, match=r"encoder\.1\.weight is not finite after step 1; nothing was saved"):
        run(tmp_path / "a", method=method, checkpoint_steps=1)
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


@pytest.mark.parametrize("full", ["torch.save", "os.replace"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MvmrError, match=r"^disk full while writing .*checkpoint\.pt; free some space and run again$"):
        run(tmp_path / "a", targets=stop_at(6, lambda: monkeypatch.setattr(full, refuse)))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "a")) == ["checkpoint.pt", "metrics.jsonl"]
    assert checkpoint.saved_step(tmp_path / "a") == 5
    assert same(run(tmp_path / "a"), run(tmp_path / "b"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanished_is_one_line(tmp_path: Path, workers: int) -> None:
    with pytest.raises(MvmrError) as caught:
        run(tmp_path / "a", views=Noise(unreadable=True), workers=workers)
    assert str(caught.value) == "cannot read image 13.jpg: it is gone"
