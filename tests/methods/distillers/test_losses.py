"""Each distiller's loss against its formula in double precision, its gradient, and what it is of copies."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import repsim
import scipy
import torch
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.distillers.table import DISTILLERS
from mvmr.methods.parts.standardising import Bank, Standard

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, TEACHER, BATCH, IMAGES = 5, 7, 10, 24
MAPPED_NOWHERE = ("dcor", "cka", "rkd", "gram", "procrustes")  # 0 for any scaled, turned and shifted copy
every = pytest.mark.parametrize("name", DISTILLERS)


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def config(name: str, **settings: object) -> DistillerConfig:
    return DISTILLERS[name](name=name, **settings)  # type: ignore[arg-type]


def build(name: str, width: int = WIDTH, bank: np.ndarray | None = None, **settings: object) -> nn.Module:
    """A loss in double precision, of a teacher whose rows are as they are."""
    torch.manual_seed(0)
    bank = rows(IMAGES, TEACHER, seed=5) if bank is None else bank
    return config(name, **settings).loss(width, Bank(bank.astype(np.float32), Standard(bank, "raw"))).double()


def example() -> tuple[np.ndarray, np.ndarray]:
    return rows(BATCH, WIDTH, seed=1), rows(BATCH, TEACHER, seed=2) @ rows(TEACHER, TEACHER, seed=3)


def value(loss: nn.Module, h: np.ndarray, target: np.ndarray) -> float:
    return float(loss(torch.from_numpy(h), torch.from_numpy(target)).detach())


def mapped(loss: nn.Module, h: np.ndarray) -> np.ndarray:
    linear = loss.linear
    assert isinstance(linear, nn.Linear)
    weight, bias = (parameter.detach().numpy() for parameter in (linear.weight, linear.bias))
    return np.asarray(h @ weight.T + bias)


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(scipy.special.softmax(x, axis=1))


def huber(x: np.ndarray) -> float:
    return float(np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5).mean())


def between(x: np.ndarray) -> np.ndarray:
    return np.asarray(scipy.spatial.distance.cdist(x, x))


def others(matrix: np.ndarray) -> np.ndarray:
    """Without the diagonal, [B, B - 1]."""
    return np.asarray([np.delete(row, number) for number, row in enumerate(matrix)])


# -- formulas


def test_regression() -> None:
    loss, (h, target) = build("regression"), example()
    assert value(loss, h, target) == pytest.approx(((mapped(loss, h) - target) ** 2).mean())


def test_cosine() -> None:
    loss, (h, target) = build("cosine"), example()
    assert value(loss, h, target) == pytest.approx(1 - (unit(mapped(loss, h)) * unit(target)).sum(1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_dcor(dcor: ModuleType, estimator: str) -> None:
    h, target = example()
    oracle = dcor.distance_correlation if estimator == "biased" else dcor.u_distance_correlation_sqr
    assert value(build("dcor", estimator=estimator), h, target) == pytest.approx(1 - oracle(h, target))


def test_cka() -> None:
    h, target = example()
    theirs = repsim.cka([h, target], kernel_type="linear", estimator="gretton")[0, 1]
    assert value(build("cka"), h, target) == pytest.approx(1 - theirs)


def test_rkd() -> None:
    h, target = example()
    d, t = (between(x) / others(between(x)).mean() for x in (h, target))
    angles = []
    for x in (h, target):
        cosines = np.zeros((BATCH, BATCH, BATCH))
        for j in range(BATCH):
            for i in range(BATCH):
                for k in range(BATCH):
                    if i != j and k != j:
                        a, b = x[i] - x[j], x[k] - x[j]
                        cosines[j, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        angles.append(cosines)
    expected = 0.5 * huber(d - t) + 3 * huber(angles[0] - angles[1])
    assert value(build("rkd", distance=0.5, angle=3.0), h, target) == pytest.approx(expected)


def test_the_angles_of_a_large_batch_are_taken_in_groups() -> None:
    h, target = rows(70, WIDTH, seed=1), rows(70, TEACHER, seed=2)
    loss = build("rkd", distance=0.0, angle=1.0)
    parts = [value(loss, h[part], target[part]) for part in (slice(64), slice(64, None))]
    assert value(loss, h, target) == pytest.approx((64 * parts[0] + 6 * parts[1]) / 70)


def test_seed_compares_with_the_whole_bank() -> None:
    bank, (h, target) = rows(IMAGES, TEACHER, seed=5), example()
    loss = build("seed", bank=bank, teacher_temperature=0.2, student_temperature=0.3)
    p, q = softmax(unit(target) @ unit(bank).T / 0.2), softmax(unit(mapped(loss, h)) @ unit(bank).T / 0.3)
    assert value(loss, h, target) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)


def test_seed_takes_an_even_sample_of_a_large_bank() -> None:
    loss = config("seed", bank=4).loss(WIDTH, Bank(rows(10, TEACHER), Standard(rows(10, TEACHER), "raw")))
    assert torch.is_tensor(loss.anchors)
    np.testing.assert_allclose(loss.anchors.numpy(), unit(rows(10, TEACHER)[[0, 3, 6, 9]]), rtol=1e-5)


def test_relational_forgives_what_is_nearer_than_near_and_farther_than_far() -> None:
    loss, (h, target) = build("relational"), example()
    theirs = others(between(target))
    mine, theirs = others(between(mapped(loss, h))) / theirs.mean(), theirs / theirs.mean()
    near = theirs <= np.median(theirs)
    excess = np.maximum(0, np.where(near, mine - theirs, theirs - mine))
    assert value(loss, h, target) == pytest.approx((excess**2).mean())


def test_gram() -> None:
    h, target = (unit(x - x.mean(0)) for x in example())
    expected = ((others(h @ h.T) - others(target @ target.T)) ** 2).mean()
    assert value(build("gram"), *example()) == pytest.approx(expected)


def test_procrustes_is_the_distance_to_the_best_turned_copy() -> None:
    h, target = (x - x.mean(0) for x in example())
    h, target = h / np.linalg.norm(h), target / np.linalg.norm(target)
    wide = np.pad(h, ((0, 0), (0, TEACHER - WIDTH)))
    turn, _ = scipy.linalg.orthogonal_procrustes(wide, target)
    assert value(build("procrustes"), *example()) == pytest.approx(((wide @ turn - target) ** 2).sum())


def test_cospress() -> None:
    loss, (h, target) = build("cospress", temperatures=(0.2, 1.0)), example()
    assert isinstance(loss.press, nn.Linear)
    pressed = target @ loss.press.weight.detach().numpy().T
    kept = []
    for t in (0.2, 1.0):
        p, q = (softmax(others(unit(x) @ unit(x).T) / t) for x in (target, pressed))
        kept.append((p * np.log(p / q)).sum(1).mean())
    matched = 1 - (unit(h - h.mean(0)) * unit(pressed)).sum(1).mean()
    assert value(loss, h, target) == pytest.approx(np.mean(kept) + matched)


def test_cospress_trains_its_press_to_keep_cosines_alone() -> None:
    loss, (h, target) = build("cospress"), example()
    gradients = []
    for features in (h, -h):
        (gradient,) = torch.autograd.grad(
            loss(torch.from_numpy(features), torch.from_numpy(target)), list(loss.parameters())
        )
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


# -- gradients and directions


@every
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    loss, (h, target) = build(name), example()
    features = torch.from_numpy(h).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.from_numpy(target)), features)


@every
def test_it_falls_as_the_features_come_to_depend_on_the_teacher(name: str) -> None:
    """The trained map is the best linear one of each mixture, as after long training; the press does not hang on h."""
    target = rows(96, 6, seed=2) @ np.diag([3, 2, 2, 1, 1, 1])
    losses = []
    for share in (0.0, 0.4, 0.7, 0.95):
        h = share * target + (1 - share) * 2 * rows(96, 6, seed=4)
        loss = build(name, 6, target)
        with torch.no_grad():
            if isinstance(linear := getattr(loss, "linear", None), nn.Linear):
                solution = np.linalg.lstsq(np.hstack([h, np.ones((96, 1))]), target, rcond=None)[0]
                linear.weight.copy_(torch.from_numpy(solution[:-1].T))
                linear.bias.copy_(torch.from_numpy(solution[-1]))
            if isinstance(press := getattr(loss, "press", None), nn.Linear):
                press.weight.copy_(torch.eye(6))
        losses.append(value(loss, h, target))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", MAPPED_NOWHERE)
def test_a_turned_scaled_and_shifted_copy_costs_nothing(name: str) -> None:
    target = rows(16, 6, seed=2)
    turn, _ = np.linalg.qr(rows(6, 6, seed=3))
    assert value(build(name, 6), 3 * target @ turn + rows(6, seed=4), target) == pytest.approx(0, abs=1e-6)
    assert value(build(name, 6), rows(16, 6, seed=5), target) > 0.01


@every
def test_equal_images_leave_its_gradient_finite(name: str) -> None:
    h, target = (np.repeat(x[:5], 2, axis=0) for x in example())
    features = torch.from_numpy(h).requires_grad_()
    loss: Tensor = build(name)(features, torch.from_numpy(target))
    loss.backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@every
def test_images_that_only_the_student_sees_as_equal_do_not_break_out(name: str) -> None:
    """As at the start of training, when half of a batch may have the same features."""
    h, target = np.repeat(rows(8, 5, seed=1), 2, axis=0), rows(16, 5, seed=2)
    loss = build(name, 5, target)
    gradients = []
    for features in (h, h + 1e-6 * rows(16, 5, seed=3), rows(16, 5, seed=4)):
        x = torch.from_numpy(features).requires_grad_()
        loss(x, torch.from_numpy(target)).backward()
        assert x.grad is not None
        gradients.append(float(x.grad.norm()))
    assert max(gradients) < 20 * gradients[-1]


@pytest.mark.parametrize("name", MAPPED_NOWHERE)
def test_features_of_any_size_are_judged_alike(name: str) -> None:
    h, target = rows(16, 6, seed=5), rows(16, 6, seed=2)
    large = value(build(name, 6), h, target)
    for size in (1e-6, 1e6):
        assert value(build(name, 6), size * h, target) == pytest.approx(large, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("seed", {"bank": 1}, r"bank = 1: an image is compared with others; give 2 or more"),
        ("seed", {"teacher_temperature": 0.0}, r"teacher_temperature = 0\.0: must be above 0"),
        ("cospress", {"temperatures": ()}, r"temperatures = \[\]: give one or more"),
        ("rkd", {"distance": 0.0, "angle": 0.0}, "0 or more, not both 0"),
        ("cosine", {"teachers": {"teacher": -1.0}}, r"teachers\.teacher = -1\.0: a weight must be 0 or more"),
        ("cosine", {"teachers": {}}, "every weight is 0, so there is nothing to learn"),
        ("cosine", {"drop": 1.0}, r"drop = 1\.0: a probability below 1"),
    ],
)
def test_settings_that_can_not_be_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        config(name, **settings)
