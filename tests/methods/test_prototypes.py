"""SwAV and DINO: assignments with equal sums, losses in double precision, the queue, the centre, and what is frozen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.dino import Dino, DinoConfig, self_distillation
from mvmr.methods.method import Setting
from mvmr.methods.parts.sinkhorn import sinkhorn
from mvmr.methods.swav import Swav, SwavConfig, swapped_loss


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def pictures(views: int, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (views, count, 3, 8, 8), dtype=torch.uint8, generator=generator)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))


# Sinkhorn and Knopp


def test_rows_sum_up_to_1_and_columns_are_equal() -> None:
    q = sinkhorn(torch.tensor(rows(12, 4)).float(), 0.5, 100)
    torch.testing.assert_close(q.sum(1), torch.ones(12))
    torch.testing.assert_close(q.sum(0), torch.full((4,), 3.0), rtol=1e-4, atol=0)


def test_it_is_the_plain_algorithm() -> None:
    scores = rows(6, 3)
    q = np.exp(scores / 0.3)
    for _ in range(3):
        q /= q.sum(0, keepdims=True)
        q /= q.sum(1, keepdims=True)
    np.testing.assert_allclose(sinkhorn(torch.tensor(scores), 0.3, 3).numpy(), q, rtol=1e-6)


def test_scores_that_all_prefer_one_class_are_dealt_out_and_huge_ones_stay_finite() -> None:
    scores = torch.tensor(rows(8, 2)).float() + torch.tensor([100.0, 0.0])
    q = sinkhorn(scores, 0.01, 50)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(0), torch.full((2,), 4.0), rtol=0.05, atol=0)


# SwAV


def test_swaps_are_between_different_views_and_towards_global_ones() -> None:
    scores, q = rows(3, 5, 4), [softmax(rows(5, 4, seed=k)) for k in (1, 2)]
    terms = [-(q[s] * np.log(softmax(scores[v] / 0.2))).sum(1).mean() for s in (0, 1) for v in (0, 1, 2) if v != s]
    loss = swapped_loss([torch.tensor(s).float() for s in scores], [torch.tensor(a).float() for a in q], 0.2)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)


def swav(**settings: object) -> Swav:
    config = SwavConfig(**{"projector": (4, 3), "prototypes": 3, "local": 0} | settings)  # type: ignore[arg-type]
    return Swav(config, encoder(), Setting(5, Preprocess.for_size(8), 20, {}))


def test_a_full_queue_is_assigned_along_with_the_batch() -> None:
    method = swav(queue=8)
    first, second = pictures(2)
    for pushed in (6, 12):
        method({"global0": first, "global1": second}, {})
        assert int(method.pushed) == pushed
    with torch.no_grad():
        z = method.projector(method.features(first))
        scores = torch.cat([method.prototypes(z), method.prototypes(method.queues[0].entries)])
    _, assignments = method({"global0": first, "global1": second}, {}).outputs
    torch.testing.assert_close(assignments, sinkhorn(scores, 0.05, 3)[:6])


def test_prototypes_are_frozen_at_first_and_then_learn() -> None:
    method = swav(frozen=0.5)
    images = dict(zip(("global0", "global1"), pictures(2), strict=True))
    for step, still in ((1, True), (9, False)):
        method.after_step(step, 10)
        method.zero_grad()
        method(images, {}).losses["swapped"].backward()
        assert method.prototypes.weight.grad is not None
        assert bool((method.prototypes.weight.grad == 0).all()) == still


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prototypes": 1}, "prototypes = 1: give 2 or more"),
        ({"epsilon": 0.0}, r"epsilon = 0\.0: must be above 0"),
        ({"iterations": 0}, "iterations = 0: must be 1 or more"),
        ({"queue": -1}, "queue = -1: give a number of rows"),
        ({"crops": 1}, "crops = 1: a view is told from others"),
    ],
)
def test_settings_of_swav_that_can_not_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        SwavConfig(**settings)  # type: ignore[arg-type]


def test_more_prototypes_than_images_are_refused() -> None:
    with pytest.raises(MvmrError, match="prototypes = 300, of 100 images: give 100 or fewer"):
        SwavConfig(prototypes=300).check(64, 100)


def test_without_a_number_the_images_decide_how_many_prototypes_there_are() -> None:
    numbers = [SwavConfig().settle(images).prototypes for images in (10**6, 1200, 5)]
    assert numbers == [3000, 120, 2]
    assert SwavConfig(prototypes=300).settle(100).prototypes == 300


# DINO


def test_the_students_views_tell_the_centred_and_sharpened_teachers() -> None:
    student, teacher, centre = rows(3, 5, 4), rows(2, 5, 4, seed=1), rows(1, 4, seed=2)
    p = [softmax((output - centre) / 0.05) for output in teacher]
    terms = [-(p[s] * np.log(softmax(student[v] / 0.2))).sum(1).mean() for s in (0, 1) for v in (0, 1, 2) if v != s]
    parts = [[torch.tensor(output).float() for output in side] for side in (student, teacher)]
    loss = self_distillation(*parts, torch.tensor(centre).float(), 0.2, 0.05)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)


def dino(**settings: object) -> Dino:
    config = DinoConfig(**{"head": (4, 3), "outputs": 6, "local": 1, "local_scale": 1.0} | settings)  # type: ignore[arg-type]
    return Dino(config, encoder(), Setting(5, Preprocess.for_size(8), 20, {}))


def views(method: Dino) -> dict[str, torch.Tensor]:
    return dict(zip((spec.name for spec in method.config.views), pictures(3), strict=True))


def test_the_centre_is_the_moving_average_of_what_the_teacher_says() -> None:
    method, expected = dino(centre_momentum=0.7), torch.zeros(6)
    for _ in range(4):
        with torch.no_grad():
            outputs = [
                method.slow_last(method.slow_projector(method.slow_encoder(method.normalise(images))))
                for name, images in views(method).items()
                if name.startswith("global")
            ]
        method(views(method), {})
        method.after_step(1, 10)
        expected = 0.7 * expected + 0.3 * torch.cat(outputs).mean(0)
    torch.testing.assert_close(method.centre[0], expected)


def test_the_teachers_temperature_rises_and_stays() -> None:
    config = DinoConfig(first_temperature=0.04, teacher_temperature=0.08, warmup=0.5)
    assert [config.temperature(share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    assert DinoConfig(warmup=0.0).temperature(0.0) == pytest.approx(0.07)


def test_only_global_views_are_told_and_the_teacher_gets_no_gradient() -> None:
    method = dino()
    loss = method(views(method), {}).losses["cross_entropy"]
    loss.backward()
    slow = [*method.slow_encoder.parameters(), *method.slow_projector.parameters(), *method.slow_last.parameters()]
    assert all(parameter.grad is None for parameter in slow)
    weight = method.last.weight.grad
    assert weight is not None
    assert not weight.any()  # frozen at first
    method.after_step(5, 10)
    method(views(method), {}).losses["cross_entropy"].backward()
    assert method.last.weight.grad is not None
    assert method.last.weight.grad.any()


def test_the_slow_head_follows() -> None:
    method = dino(momentum=0.5)
    before = method.slow_last.weight.clone()
    with torch.no_grad():
        method.last.weight.add_(1.0)
    method.after_step(0, 10)
    torch.testing.assert_close(method.slow_last.weight, before + 0.5)
    z = torch.randn(4, 3)
    cosines = F.cosine_similarity(z[:, None], method.last.weight.detach()[None], dim=2)
    torch.testing.assert_close(method.last(z).detach(), cosines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outputs": 1}, "outputs = 1: give 2 or more"),
        ({"first_temperature": 0.0}, r"first_temperature = 0\.0: must be above 0"),
        ({"centre_momentum": 2.0}, r"centre_momentum = 2\.0: must lie between 0 and 1"),
        ({"head": ()}, "give its widths"),
        ({"local_scale": 2.0}, r"local_scale = 2\.0: local views are smaller than global ones; at most 1"),
    ],
)
def test_settings_of_dino_that_can_not_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        DinoConfig(**settings)  # type: ignore[arg-type]
