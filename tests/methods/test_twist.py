"""TWIST's terms in double precision, the assignment that is their minimum, and its projector's batch norm."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.method import Setting
from mvmr.methods.parts.momentum import cosine_momentum
from mvmr.methods.twist import Twist, TwistConfig, labelling_loss, twin_terms


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(-1)


def total(first: torch.Tensor, second: torch.Tensor) -> float:
    consistency, sharpness, diversity = twin_terms([first, second], 2)
    return float(consistency + sharpness - diversity)


def test_the_terms_are_divergence_entropy_and_entropy_of_the_mean() -> None:
    first, second = np.random.default_rng(0).normal(0, 2, size=(2, 7, 5))
    p, q = softmax(first), softmax(second)
    expected = (
        ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)).mean() / 2,
        (entropy(p).mean() + entropy(q).mean()) / 2,
        (entropy(p.mean(0)) + entropy(q.mean(0))) / 2,
    )
    terms = twin_terms([torch.tensor(first).float(), torch.tensor(second).float()], 2)
    assert [float(term) for term in terms] == pytest.approx(expected, rel=1e-5)


def test_a_sharp_assignment_to_all_classes_alike_is_the_minimum() -> None:
    sure = 60 * torch.eye(5).repeat(4, 1)
    assert total(sure, sure) == pytest.approx(-math.log(5), abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    others = {
        "all of one class": torch.zeros(20, 5) + 60 * torch.eye(5)[0],
        "unsure": torch.zeros(20, 5),
        "uneven": 60 * torch.eye(5)[torch.tensor([0] * 12 + [1] * 4 + [2] * 4)],
        "random": torch.randn(20, 5, generator=generator),
    }
    for name, logits in others.items():
        assert total(logits, logits) > -math.log(5) + 0.1, name
    assert total(sure, sure.roll(1, 0)) > 10  # sure, and of different classes


def test_pairs_are_a_global_view_and_any_other() -> None:
    views = list(torch.tensor(np.random.default_rng(0).normal(0, 2, size=(4, 7, 5))).float())
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = np.mean([[float(term) for term in twin_terms([views[i], views[j]], 2)] for i, j in pairs], axis=0)
    assert [float(term) for term in twin_terms(views, 2)] == pytest.approx(expected, rel=1e-5)


def test_with_a_slow_network_views_agree_with_what_it_says_of_another_global_view() -> None:
    random = np.random.default_rng(0)
    views, slow = random.normal(size=(3, 6, 4)), random.normal(size=(2, 6, 4))
    q, p = [softmax(view) for view in views], [softmax(view) for view in slow]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    expected = (
        np.mean([(p[i] * np.log(p[i] / q[j])).sum(1).mean() for i, j in pairs]),
        np.mean([entropy(view).mean() for view in q]),
        np.mean([entropy(view.mean(0)) for view in q]),
    )
    terms = twin_terms([torch.tensor(view) for view in views], 2, [torch.tensor(view) for view in slow])
    assert [float(term) for term in terms] == pytest.approx(expected)


def test_the_surest_global_view_labels_the_other_views_of_the_surest_images() -> None:
    random = np.random.default_rng(0)
    views = random.normal(0, 2, size=(3, 8, 4))
    p = [softmax(view) for view in views]
    sure = np.stack([p[0].max(1), p[1].max(1)])
    chosen, labels = sure.argmax(0), np.stack([p[0].argmax(1), p[1].argmax(1)])
    images = sure.max(0).argsort()[::-1][:4]  # half of them
    terms = [
        -np.log(p[view][image, labels[chosen[image], image]])
        for image in images
        for view in range(3)
        if view != chosen[image]
    ]
    logits = [torch.tensor(view, requires_grad=True) for view in views]
    loss = labelling_loss(logits, logits[:2], 0.5)
    assert float(loss.detach()) == pytest.approx(np.mean(terms))
    loss.backward()
    for image in range(8):
        given = [bool(view.grad[image].any()) for view in logits if view.grad is not None]
        assert given == [image in images and view != chosen[image] for view in range(3)]


def test_the_last_steps_label_and_the_slow_network_follows() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    config = TwistConfig(classes=4, hidden=(5,), local=0, labelling=0.25, momentum=0.9)
    twist = Twist(config, encoder, Setting(6, Preprocess.for_size(8), 20, {}))
    images = torch.randint(0, 256, (2, 20, 3, 8, 8), dtype=torch.uint8)
    views = {"global0": images[0], "global1": images[1]}
    names = []
    for step in range(1, 9):
        step_of = twist(views, {})
        names.append(set(step_of.losses))
        torch.stack(list(step_of.losses.values())).sum().backward()
        twist.after_step(step, 8)
    assert names == [{"consistency", "sharpness", "diversity"}] * 6 + [{"labelling"}] * 2
    assert twist.slow is not None
    assert all(parameter.grad is None for parameter in twist.slow.parameters())
    slow, fast = twist.slow[0][1].weight, encoder[1].weight  # type: ignore[index]
    torch.testing.assert_close(slow, fast)  # nothing was descended: it follows what stays where it is
    with torch.no_grad():
        encoder[1].weight += 1.0
    twist.after_step(4, 8)
    torch.testing.assert_close(slow, fast - cosine_momentum(0.9, 4, 8))


def test_a_batch_norm_stands_before_the_softmax() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    twist = Twist(TwistConfig(classes=4, hidden=(5,), local=0), encoder, Setting(6, Preprocess.for_size(8), 20, {}))
    images = torch.randint(0, 256, (2, 50, 3, 8, 8), dtype=torch.uint8)
    step = twist({"global0": images[0], "global1": images[1]}, {})
    logits = step.outputs[1]
    assert logits.shape == (50, 4)
    torch.testing.assert_close(logits.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.std(0, unbiased=False), torch.ones(4), atol=1e-2, rtol=0)
    assert step.losses.keys() == {"consistency", "sharpness", "diversity"}


def test_settings_that_can_not_be() -> None:
    with pytest.raises(MvmrError, match="classes = 1: give 2 or more"):
        TwistConfig(classes=1)
    with pytest.raises(MvmrError, match=r"sharpness = -1\.0: a weight must be 0 or more"):
        TwistConfig(sharpness=-1.0)
    with pytest.raises(MvmrError, match="classes = 4096, of 1360 images: give 1360 or fewer"):
        TwistConfig(classes=4096).check(64, 1360)
