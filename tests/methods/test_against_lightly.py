"""Losses against those of the `lightly` package, which share no line with ours."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SIGReg,
    SwaVLoss,
    VICRegLoss,
)
from lightly.loss.lejepa_loss import lejepa_invariance_loss
from torch import Tensor

from mvmr.bundles.preprocess import Preprocess
from mvmr.methods.barlow import correlation_terms
from mvmr.methods.dino import self_distillation
from mvmr.methods.lejepa import Lejepa, LejepaConfig
from mvmr.methods.method import Setting
from mvmr.methods.moco import queue_loss
from mvmr.methods.parts.gaussianity import sigreg
from mvmr.methods.parts.sinkhorn import sinkhorn
from mvmr.methods.simclr import nt_xent
from mvmr.methods.simsiam import unlikeness
from mvmr.methods.swav import swapped_loss
from mvmr.methods.vicreg import Vicreg, VicregConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def views(count: int, batch: int = 12, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, batch, width, generator=generator))


def test_simclr() -> None:
    first, second = views(2)
    torch.testing.assert_close(nt_xent(first, second, 0.3), NTXentLoss(temperature=0.3)(first, second))


def test_moco() -> None:
    query, key, queue = views(3)
    query, key, queue = (torch.nn.functional.normalize(rows, dim=1) for rows in (query, key, queue))
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(len(queue), queue.shape[1]))
    theirs.memory_bank.bank = queue  # type: ignore[attr-defined]
    torch.testing.assert_close(queue_loss(query, key, queue, 0.2), theirs(query, key))


def test_simsiam() -> None:
    prediction, projection = views(2)
    torch.testing.assert_close(unlikeness(prediction, projection), NegativeCosineSimilarity()(prediction, projection))


def test_barlow() -> None:
    first, second = views(2)
    invariance, redundancy = correlation_terms(first, second)
    torch.testing.assert_close(invariance + 0.01 * redundancy, BarlowTwinsLoss(lambda_param=0.01)(first, second))


def test_vicreg() -> None:
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6))
    method = Vicreg(VicregConfig(projector=()), encoder, Setting(6, Preprocess.for_size(8), 12, {}))
    images = torch.randint(0, 256, (2, 12, 3, 8, 8), dtype=torch.uint8)
    losses = method({"first": images[0], "second": images[1]}, {}).losses
    h = [method.features(view) for view in images]
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), VICRegLoss()(*h))


def test_swav() -> None:
    scores = [torch.tanh(view) for view in views(4)]
    assignments = [sinkhorn(view, 0.05, 3) for view in scores[:2]]
    expected = SwaVLoss(temperature=0.1)(scores[:2], scores[2:])
    torch.testing.assert_close(swapped_loss(scores, assignments, 0.1), expected[0], rtol=1e-4, atol=1e-5)


def test_dino() -> None:
    student, centre = views(4), torch.linspace(-1, 1, 6)[None]
    teacher = [2 * view for view in views(2)]
    theirs = DINOLoss(output_dim=6, teacher_temp=0.05, student_temp=0.1)
    theirs.center = centre[None].clone()
    loss = self_distillation(student, teacher, centre, 0.1, 0.05)
    torch.testing.assert_close(loss, theirs(teacher, student))


def test_sigreg() -> None:
    """On the same slices, and with knots on both sides of 0, which lightly counts once."""
    (z,) = views(1, batch=40)
    torch.manual_seed(5)
    expected = SIGReg(knots=9, t_max=5.0, num_vectors=64)(z)
    torch.testing.assert_close(sigreg(z, 64, torch.Generator().manual_seed(5)), expected)


def test_lejepas_prediction() -> None:
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6))
    config = LejepaConfig(projector=(), trade=0.0, local=1, local_scale=1.0)
    method = Lejepa(config, encoder, Setting(6, Preprocess.for_size(8), 12, {}))
    images = torch.randint(0, 256, (3, 12, 3, 8, 8), dtype=torch.uint8)
    named = dict(zip(("global0", "global1", "local0"), images, strict=True))
    z = torch.stack([method.features(view) for view in images])
    expected = lejepa_invariance_loss(all_proj=z, global_proj=z[:2])
    torch.testing.assert_close(method(named, {}).losses["prediction"], expected)
