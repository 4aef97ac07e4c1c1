"""DeepCluster, DeeperCluster and Self-Label: what images are labelled as, and the losses in double precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.deepcluster import Deepcluster, DeepclusterConfig
from mvmr.methods.deepercluster import Deepercluster, DeeperclusterConfig, hierarchical_loss, turn
from mvmr.methods.method import Setting
from mvmr.methods.parts.sinkhorn import equal_partition, sinkhorn
from mvmr.methods.selflabel import Selflabel, SelflabelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, IMAGES = 5, 40


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, WIDTH))


def setting() -> Setting:
    return Setting(WIDTH, Preprocess.for_size(8), IMAGES, {})


def features(seed: int = 0) -> Callable[[], Tensor]:
    return lambda: torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


# DeepCluster


def deepcluster(**options: int) -> Deepcluster:
    return Deepcluster(
        DeepclusterConfig(clusters=4, heads=2, projector=(6, 3), local=0, **options), encoder(), setting()
    )


def test_each_image_is_told_the_nearest_mean_of_all_projections() -> None:
    method = deepcluster()
    method.before_epoch(0, features())
    assert method.training
    assert method.projector.training
    z = F.normalize(method.projector.eval()[:-1](features()()), dim=1)
    for head, means in enumerate(method.means):
        torch.testing.assert_close(method.assigned[head], (z @ F.normalize(means.weight, dim=1).T).argmax(1))
        counts = torch.bincount(method.assigned[head], minlength=4)
        assert counts.min() > 0
        for cluster in range(4):  # each counts alike
            torch.testing.assert_close(
                method.weights[head][method.assigned[head] == cluster].sum(), torch.tensor(IMAGES / 4)
            )


def test_the_loss_is_the_weighted_cross_entropy_of_all_views_and_clusterings() -> None:
    method = deepcluster()
    method.before_epoch(0, features())
    index, views = torch.tensor([3, 17, 3, 39]), {f"global{k}": pictures(4, k) for k in range(2)}
    method.eval()  # the projector's batch norm is the same line for each view then
    loss = method(views | {"index": index}, {}).losses["cross_entropy"]
    terms = []
    for images in views.values():
        z = F.normalize(method.projector[:-1](method.features(images)), dim=1).detach().double().numpy()
        for head, means in enumerate(method.means):
            mu = F.normalize(means.weight, dim=1).double().numpy()
            logs = log_softmax(z @ mu.T / 0.1)[np.arange(4), method.assigned[head][index].numpy()]
            terms.append(-(method.weights[head][index].numpy() * logs).mean())
    assert float(loss.detach()) == pytest.approx(np.mean(terms), rel=1e-5)


def test_means_are_not_trained_and_come_anew_each_epoch() -> None:
    method = deepcluster()
    method.before_epoch(0, features())
    before = [means.weight.clone() for means in method.means]
    assert not torch.equal(before[0], before[1])  # clusterings from different starts
    views = {"global0": pictures(4), "global1": pictures(4, 2), "index": torch.arange(4)}
    method(views, {}).losses["cross_entropy"].backward()
    assert all(means.weight.grad is None for means in method.means)
    method.before_epoch(1, features(1))
    assert not torch.equal(before[0], method.means[0].weight)


# DeeperCluster


def test_super_classes_are_clusters_times_rotations() -> None:
    method = Deepercluster(DeeperclusterConfig(clusters=3, subclusters=4), encoder(), setting())
    assert method.outer.out_features == 12
    assert method.inner.out_features == 48
    method.before_epoch(0, features())
    assert set(method.cluster.tolist()) == {0, 1, 2}
    for cluster in range(3):
        rows = method.subcluster[method.cluster == cluster]
        assert set(rows.tolist()) == set(range(min(4, len(rows))))
    _, _, (h, outer, superclass) = method({"augmented": pictures(8), "index": torch.arange(8)}, {})
    assert (h.shape, outer.shape) == ((8, WIDTH), (8, 12))
    torch.testing.assert_close(superclass // 4, method.cluster[:8])
    assert len(set((superclass % 4).tolist())) > 1


def test_views_are_turned_as_pictures_are() -> None:
    images, turns = pictures(4), torch.tensor([0, 1, 2, 3])
    for image, quarter, turned in zip(images, turns, turn(images, turns), strict=True):
        expected = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).rotate(90 * int(quarter)))
        np.testing.assert_array_equal(turned.permute(1, 2, 0).numpy(), expected)


def test_turns_are_other_ones_in_each_step_and_a_function_of_its_number() -> None:
    method = Deepercluster(DeeperclusterConfig(clusters=2, subclusters=2), encoder(), setting())
    views = {"augmented": pictures(8), "index": torch.arange(8)}
    method.before_epoch(0, features())
    first, again = (method(views, {}).outputs[2] for _ in range(2))
    assert torch.equal(first, again)
    method.after_step(1, 10)
    assert not torch.equal(first, method(views, {}).outputs[2])


def test_images_are_clustered_every_so_many_epochs_with_fresh_classifiers() -> None:
    method = Deepercluster(DeeperclusterConfig(clusters=2, subclusters=3, every=2), encoder(), setting())
    states = []
    for epoch in range(4):
        method.before_epoch(epoch, features(epoch))
        states.append({key: value.clone() for key, value in method.state_dict().items()})
    for key in ("cluster", "subcluster", "outer.weight", "inner.weight"):
        assert torch.equal(states[0][key], states[1][key])
        assert not torch.equal(states[1][key], states[2][key])
        assert torch.equal(states[2][key], states[3][key])


def test_the_hierarchical_loss_asks_the_classifier_of_the_super_class_alone() -> None:
    random = np.random.default_rng(0)
    outer, inner, weights = random.normal(size=(6, 4)), random.normal(size=(6, 12)), random.uniform(1, 2, 6)
    superclass, subclass = random.integers(0, 4, 6), random.integers(0, 3, 6)
    losses = hierarchical_loss(*map(torch.tensor, (outer, inner, superclass, subclass, weights)))
    rows = np.arange(6)
    within = log_softmax(inner.reshape(6, 4, 3)[rows, superclass])[rows, subclass]
    expected = {
        "superclass": -(weights * log_softmax(outer)[rows, superclass]).mean(), "subclass": -(weights * within).mean(),
    }  # fmt: skip
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected)


# Self-Label


def test_labels_are_likely_and_used_equally_often() -> None:
    method = Selflabel(SelflabelConfig(classes=4, heads=3), encoder(), setting())
    with torch.no_grad():
        for head in method.heads:
            head.bias += torch.tensor([5.0, 0, 0, 0])  # left alone, all would be of one class
    method.before_epoch(0, features())
    for number, head in enumerate(method.heads):
        log = F.log_softmax(head(features()()), dim=1)
        assert (log.argmax(1) == 0).float().mean() > 0.9
        counts = torch.bincount(method.labels[number], minlength=4)
        assert counts.min() >= 8
        assert counts.max() <= 12
        # swapping the labels of any two images makes them less likely
        taken = log.gather(1, method.labels[number][:, None])[:, 0]
        swapped = log[:, method.labels[number]]
        assert (taken[:, None] + taken[None, :] - swapped - swapped.T).min() > -0.2
    assert not torch.equal(method.labels[0], method.labels[1])


@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0])
def test_the_partition_is_that_of_the_algorithm_in_logarithms(scale: float) -> None:
    log = F.log_softmax(scale * torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = equal_partition(log, 25.0)
    assert (labels == sinkhorn(log, 1 / 25, 1000).argmax(1)).float().mean() > 0.98
    assert torch.bincount(labels, minlength=8).min() > 12


def test_its_loss_is_the_mean_cross_entropy_of_the_heads() -> None:
    method = Selflabel(SelflabelConfig(classes=4, heads=2, every=2), encoder(), setting())
    method.before_epoch(0, features())
    index, images = torch.tensor([5, 1, 39]), pictures(3)
    h = method.features(images).detach().double().numpy()
    terms = []
    for number, head in enumerate(method.heads):
        logits = h @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
        terms.append(-log_softmax(logits)[np.arange(3), method.labels[number][index].numpy()].mean())
    loss = method({"augmented": images, "index": index}, {}).losses["cross_entropy"]
    assert float(loss.detach()) == pytest.approx(np.mean(terms), rel=1e-5)
    labels = method.labels.clone()
    method.before_epoch(1, features(1))
    assert torch.equal(labels, method.labels)
    method.before_epoch(2, features(1))
    assert not torch.equal(labels, method.labels)


# What can't be


def test_settings_that_can_not_be() -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: DeepclusterConfig(clusters=1), "clusters = 1: give 2 or more, or 0"),
        (lambda: DeepclusterConfig(heads=0), "heads = 0: give 1 or more"),
        (lambda: DeepclusterConfig(crops=1), "crops = 1: .* give 2 or more"),
        (lambda: DeepclusterConfig(clusters=41).check(8, 40), "clusters = 41, of 40 images: give 40 or fewer"),
        (lambda: DeeperclusterConfig(clusters=1), "clusters = 1: give 2 or more"),
        (lambda: DeeperclusterConfig(every=0), "every = 0: give a number of epochs"),
        (lambda: DeeperclusterConfig(subclusters=11).check(8, 40), "subclusters = 11 each are more than the 40 images"),
        (lambda: SelflabelConfig(classes=1), "classes = 1: give 2 or more"),
        (lambda: SelflabelConfig(classes=41).check(8, 40), "classes = 41, of 40 images"),
        (lambda: SelflabelConfig(sharpness=0.0), r"sharpness = 0\.0: must be above 0"),
    ]
    for make, message in cases:
        with pytest.raises(MvmrError, match=message):
            make()


def test_without_a_number_the_images_decide() -> None:
    for images, expected in ((10**6, 3000), (1360, 136), (5, 2)):
        assert DeepclusterConfig().settle(images).clusters == expected
        assert SelflabelConfig().settle(images).classes == expected
    assert DeeperclusterConfig().settle(1360).subclusters == 34
    assert DeeperclusterConfig().settle(10**8).subclusters == 20_000
