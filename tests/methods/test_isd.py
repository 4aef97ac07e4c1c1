"""ISD's loss in double precision and where all is equal, its anchors, and its slow network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.isd import Isd, IsdConfig, similarity_loss
from mvmr.methods.method import Setting


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def test_the_loss_is_the_divergence_of_similarities_to_the_anchors() -> None:
    student, teacher, anchors = rows(5, 4), unit(rows(6, 4)[:5]), unit(rows(9, 4))
    p, q = softmax(teacher @ anchors.T / 0.1), softmax(unit(student) @ anchors.T / 0.3)
    expected = (p * np.log(p / q)).sum(1).mean()
    loss = similarity_loss(*(torch.tensor(part).float() for part in (student, teacher, anchors)), 0.3, 0.1)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_equal_similarities_cost_nothing() -> None:
    teacher, anchors = (torch.tensor(unit(rows(count, 4))).float() for count in (5, 9))
    assert float(similarity_loss(7 * teacher, teacher, anchors, 0.2, 0.2)) == pytest.approx(0, abs=1e-6)
    assert float(similarity_loss(-teacher, teacher, anchors, 0.2, 0.2)) > 0.1


def method() -> Isd:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5), nn.BatchNorm1d(5))
    return Isd(
        IsdConfig(projector=(4, 3), predictor=(4, 3), queue=7), encoder, Setting(5, Preprocess.for_size(8), 20, {})
    )


def test_a_step_compares_with_the_anchors_as_they_were_and_then_adds_the_teachers_rows() -> None:
    isd, before = method(), method().queue.entries
    strong, weak = torch.randint(0, 256, (2, 6, 3, 8, 8), dtype=torch.uint8)
    halves = [isd.slow_projector(isd.slow_encoder(isd.normalise(weak)[start::2])) for start in (0, 1)]
    teacher = F.normalize(torch.stack(halves, 1).flatten(0, 1), dim=1)  # even and odd rows in turn
    student = isd.predictor(isd.projector(isd.features(strong)))
    loss = isd({"strong": strong, "weak": weak}, {}).losses["similarity"]
    torch.testing.assert_close(loss, similarity_loss(student, teacher, before, 0.1, 0.01))
    torch.testing.assert_close(isd.queue.entries[:6], teacher)
    assert torch.equal(isd.queue.entries[6], before[6])
    loss.backward()
    assert all(parameter.grad is None for parameter in isd.slow_encoder.parameters())


def test_the_slow_network_is_the_moving_average() -> None:
    isd = method()
    expected = isd.encoder[1].weight.detach().clone()  # type: ignore[index]
    for step in range(1, 4):
        with torch.no_grad():
            isd.encoder[1].weight.add_(1.0)  # type: ignore[index]
        isd.after_step(step, 3)
        expected = 0.99 * expected + 0.01 * isd.encoder[1].weight.detach()  # type: ignore[index]
    torch.testing.assert_close(isd.slow_encoder[1].weight, expected)  # type: ignore[index]


def test_the_teacher_sees_crops_and_flips_alone_unless_told_otherwise() -> None:
    assert [(spec.name, spec.policy) for spec in IsdConfig().views] == [("strong", None), ("weak", "crop+flip")]
    assert [spec.policy for spec in IsdConfig(weak=False).views] == [None, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue": 1}, "queue = 1: an image is compared with others; give 2 or more"),
        ({"teacher_temperature": 0.0}, r"teacher_temperature = 0\.0: must be above 0"),
        ({"student_temperature": -1.0}, r"student_temperature = -1\.0: must be above 0"),
        ({"momentum": 2.0}, r"momentum = 2\.0: must lie between 0 and 1"),
        ({"predictor": (8,)}, "the last widths of both must be there, and the same"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        IsdConfig(**settings)  # type: ignore[arg-type]


def test_fewer_anchors_than_images_of_a_batch_are_refused() -> None:
    with pytest.raises(MvmrError, match="queue = 64 holds less than a batch of 128 images: give 128 rows or more"):
        IsdConfig(queue=64).check(128, 10_000)
