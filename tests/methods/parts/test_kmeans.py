"""Clusters on the sphere: found whatever their length, the same for the same seed, and none of them empty."""

import pytest
import torch
import torch.nn.functional as F

from mvmr.methods.parts.kmeans import balance, fill_empty, kmeans

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.arange(4).repeat_interleave(15)


def groups() -> torch.Tensor:
    """Four directions, rows of all lengths."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(60, 6, generator=generator)
    return (F.one_hot(LABELS, 6) + noise) * torch.rand(60, 1, generator=generator).add(0.1)


def test_groups_are_found_whatever_their_length() -> None:
    means, assigned = kmeans(groups(), 4, seed=0)
    assert len({(int(label), int(cluster)) for label, cluster in zip(LABELS, assigned, strict=True)}) == 4
    torch.testing.assert_close(means.norm(dim=1), torch.ones(4))
    for cluster in range(4):
        mean = F.normalize(F.normalize(groups(), dim=1)[assigned == cluster].mean(0), dim=0)
        torch.testing.assert_close(means[cluster], mean, rtol=1e-4, atol=1e-4)
    again = kmeans(groups(), 4, seed=0)
    assert torch.equal(again[0], means)
    assert torch.equal(again[1], assigned)


def test_an_empty_cluster_becomes_a_copy_of_the_fullest_a_little_perturbed() -> None:
    rows = F.normalize(groups(), dim=1)[:40]  # 15, 15 and 10 of three groups
    planted = -F.one_hot(torch.tensor(5), 6).float()  # where no row is
    means = torch.stack([rows[:30].mean(0), rows[30:].mean(0), planted])
    filled, assigned = fill_empty(F.normalize(means, dim=1), rows)
    assert torch.bincount(assigned, minlength=3).min() > 0
    torch.testing.assert_close(filled[1], F.normalize(means, dim=1)[1])
    for number in (0, 2):
        assert 0 < (filled[number] - F.normalize(means, dim=1)[0]).norm() < 0.01
    assert torch.equal(assigned, (rows @ filled.T).argmax(1))


def test_as_many_clusters_as_rows_are_all_taken() -> None:
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    assert len(set(kmeans(rows, 12, seed=0)[1].tolist())) == 12


def test_equal_rows_stay_in_one_cluster() -> None:
    means, assigned = kmeans(torch.ones(10, 3), 4, seed=0)
    assert len(set(assigned.tolist())) == 1
    assert means.isfinite().all()


def test_balanced_clusters_count_alike_and_all_rows_1_on_average() -> None:
    assigned = torch.tensor([0] * 6 + [2] * 3 + [3])
    weights = balance(assigned, 5)
    assert float(weights.mean()) == pytest.approx(1)
    sums = [float(weights[assigned == cluster].sum()) for cluster in (0, 2, 3)]
    assert sums == pytest.approx([10 / 3] * 3)
