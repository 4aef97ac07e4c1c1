"""The plan of a run: its learning rates, the order of its images, its steps, and what no run can be made with."""

import math
from typing import Any

import pytest

from mvmr.errors import MvmrError
from mvmr.training.trainer import BatchOrder, TrainConfig, learning_rate


def test_learning_rate_rises_linearly_then_falls_along_a_cosine() -> None:
    config = TrainConfig(lr=0.8, warmup_steps=4)
    rates = [learning_rate(config, step, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[14] == pytest.approx(0.4)  # half way down
    assert rates[9] == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(config, 24, 24) == pytest.approx(0)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 3), (10, 1), (10, 2), (10, 4)])
def test_a_short_run_has_a_learning_rate_in_every_step(warmup: int, steps: int) -> None:
    config = TrainConfig(lr=1.0, warmup_steps=warmup)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1


def order(start: int = 0, stop: int = 9, rank: int = 0, world: int = 1, seed: int = 5) -> list[list[tuple[int, int]]]:
    batches = BatchOrder(26, 8, 3, seed=seed, start=start, stop=stop, rank=rank, world=world)
    assert len(batches) == stop - start
    return list(batches)


def test_an_epoch_takes_no_image_twice_and_has_an_order_of_its_own() -> None:
    epochs = [order()[i : i + 3] for i in (0, 3, 6)]
    epochs_of_indices = []
    for number, epoch in enumerate(epochs):
        assert {seen for batch in epoch for seen, _ in batch} == {number}
        epochs_of_indices.append([index for batch in epoch for _, index in batch])
        assert len(set(epochs_of_indices[-1])) == 24  # of 26: two wait for another epoch
        assert set(epochs_of_indices[-1]) <= set(range(26))
    assert epochs_of_indices[0] != epochs_of_indices[1] != epochs_of_indices[2]
    batches = BatchOrder(24, 8, 3, seed=5, start=0, stop=3, rank=0, world=1)
    assert sorted(index for batch in batches for _, index in batch) == list(range(24))
    assert order(seed=6) != order()


@pytest.mark.parametrize("start", range(10))
def test_the_order_goes_on_from_any_batch(start: int) -> None:
    assert order(start=start) == order()[start:]


def test_ranks_share_each_batch() -> None:
    shares = [order(rank=rank, world=4) for rank in range(4)]
    for number, batch in enumerate(order()):
        parts = [share[number] for share in shares]
        assert [len(part) for part in parts] == [2, 2, 2, 2]
        assert sorted(item for part in parts for item in part) == sorted(batch)


def test_steps_are_optimiser_steps() -> None:
    config = TrainConfig(epochs=3, batch_size=8, accumulate=2)
    assert config.steps(16) == 3
    assert config.steps(47) == 6
    with pytest.raises(MvmrError, match=r"a step takes 16 images and the data have 15: give --batch-size 7 or less"):
        config.steps(15)
    with pytest.raises(MvmrError, match=r"takes 16 images and the data have 7: that is too few"):
        config.steps(7, smallest_batch=4)
    with pytest.raises(MvmrError, match=r"batch_size = 8: give a multiple of the 3 devices"):
        config.steps(100, devices=3)
    with pytest.raises(MvmrError, match=r"batch_size = 8: the method compares the images of a batch; give 9 or more"):
        config.steps(100, smallest_batch=9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: must be 1 or more"),
        ({"epochs": -1}, "epochs = -1: must be 0 or more"),
        ({"lr": 0.0}, "lr = 0.0: must be above 0"),
        ({"clip_grad": -1.0}, "clip_grad = -1.0: must be above 0"),
        ({"workers": -1}, "workers = -1: must be 0 or more"),
        ({"weight_decay": -1e-3}, "weight_decay = -0.001: must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps = -1: must be 0 or more"),
        ({"seed": -1}, "seed = -1: must lie between 0 and"),
        ({"seed": 2**62}, "must lie between 0 and 4294967295"),
    ],
)
def test_what_no_run_can_be_made_with_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        TrainConfig(**wrong)
