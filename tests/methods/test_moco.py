"""MoCo's losses in double precision, its queue by hand, and its slow network, which sees a batch in halves."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.method import Setting
from mvmr.methods.moco import Moco, MocoConfig, in_batch_loss, queue_loss
from mvmr.methods.parts.momentum import cosine_momentum
from mvmr.methods.parts.queue import Queue


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, fitting: np.ndarray) -> float:
    """Mean over rows of -log softmax of the column that fits."""
    logits = logits - logits.max(1, keepdims=True)
    return float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), fitting]).mean())


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_with_a_queue_it_is_equation_1_over_the_key_and_all_of_the_queue(temperature: float) -> None:
    random = np.random.default_rng(0)
    query, key, queue = random.normal(size=(6, 4)), unit(random.normal(size=(6, 4))), unit(random.normal(size=(9, 4)))
    own = (unit(query) * key).sum(1, keepdims=True)
    expected = cross_entropy(np.hstack([own, unit(query) @ queue.T]) / temperature, np.zeros(6, int))
    loss = queue_loss(*(torch.tensor(rows).float() for rows in (query, key, queue)), temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_without_a_queue_the_other_images_of_the_batch_are_what_it_is_told_from() -> None:
    random = np.random.default_rng(0)
    query, key = random.normal(size=(6, 4)), unit(random.normal(size=(6, 4)))
    expected = 2 * 0.3 * cross_entropy(unit(query) @ key.T / 0.3, np.arange(6))
    loss = in_batch_loss(torch.tensor(query).float(), torch.tensor(key).float(), 0.3)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_queue_holds_the_newest_rows_in_the_place_of_the_oldest() -> None:
    queue = Queue(5, 2)
    assert queue.entries.norm(dim=1).allclose(torch.ones(5))
    rows = F.normalize(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), dim=1)
    for part in rows.split(3):
        queue.push(part)
    assert torch.equal(queue.entries, torch.stack([rows[i] for i in (5, 6, 7, 8, 4)]))
    assert int(queue.place) == 4
    assert not queue.entries.requires_grad


def method(**settings: object) -> Moco:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5), nn.BatchNorm1d(5))
    config = MocoConfig(projector=(4, 3), **settings)  # type: ignore[arg-type]
    return Moco(config, encoder, Setting(5, Preprocess.for_size(8), 20, {}))


def pictures(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (2, count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_a_step_asks_the_queue_as_it_was_and_then_puts_its_keys_there() -> None:
    moco = method(queue=7)
    assert moco.queue is not None
    before = moco.queue.entries.clone()
    first, second = pictures()
    query = moco.projector(moco.encoder(moco.normalise(first)))
    halves = [moco.slow_projector(moco.slow_encoder(moco.normalise(second)[start::2])) for start in (0, 1)]
    key = F.normalize(torch.stack(halves, 1).flatten(0, 1), dim=1)  # even and odd rows in turn
    loss = moco({"first": first, "second": second}, {}).losses["info_nce"]
    torch.testing.assert_close(loss, queue_loss(query, key, before, 0.2))
    torch.testing.assert_close(moco.queue.entries[:6], key)
    assert torch.equal(moco.queue.entries[6], before[6])
    loss.backward()
    assert all(parameter.grad is None for parameter in moco.slow_encoder.parameters())


@pytest.mark.parametrize("rising", [False, True])
def test_the_slow_network_is_the_moving_average(rising: bool) -> None:
    moco = method(queue=0, momentum=0.9, rising=rising)
    expected = moco.encoder[1].weight.detach().clone()  # type: ignore[union-attr, operator, index]
    for step in range(1, 5):
        with torch.no_grad():
            moco.encoder[1].weight.add_(torch.randn(5, 192))  # type: ignore[index]
        moco.after_step(step, 4)
        momentum = cosine_momentum(0.9, step, 4) if rising else 0.9
        expected = momentum * expected + (1 - momentum) * moco.encoder[1].weight.detach()  # type: ignore[index]
    torch.testing.assert_close(moco.slow_encoder[1].weight, expected)  # type: ignore[index]


def test_the_third_version_is_told_by_both_views() -> None:
    moco = method(queue=0, predictor=(4, 3), temperature=1.0).eval()
    first, second = pictures()
    loss = moco({"first": first, "second": second}, {}).losses["info_nce"]
    other = moco({"first": second, "second": first}, {}).losses["info_nce"]
    torch.testing.assert_close(loss, other)
    assert float(loss.detach()) == pytest.approx(4 * math.log(6), rel=0.2)  # untrained, it guesses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature = 0\.0: must be above 0"),
        ({"momentum": 1.5}, r"momentum = 1\.5: must lie between 0 and 1"),
        ({"queue": -1}, "queue = -1: give a number of rows"),
        ({"projector": ()}, "the last widths of both must be there, and the same"),
        ({"predictor": (8,)}, "the last widths of both must be there, and the same"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        MocoConfig(**settings)  # type: ignore[arg-type]


def test_a_queue_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(MvmrError, match="queue = 64 holds less than a batch of 128 images: give 128 rows or more"):
        MocoConfig(queue=64).check(128, 10_000)
    MocoConfig(queue=0).check(128, 10_000)
