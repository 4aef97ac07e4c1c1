"""What every backbone must hold to: one test file over all kinds, and timm's three unlike ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mvmr.bundles import bundle as bundles
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.models.backbone import Backbone, StudentConfig
from mvmr.models.student import save_student
from mvmr.models.table import backbone_of, open_backbone
from tests.making import build_encoder, write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

SIZE = 64
CONFIGS = {
    "resnet18": StudentConfig(backbone="resnet18"),
    "a narrow resnet18 with a small kernel": StudentConfig(backbone="resnet18_025", small_kernel=True),
    "depthwise": StudentConfig(backbone="timm:mobilenetv3_small_100"),
    "without batch norm": StudentConfig(backbone="timm:convnext_atto"),
    "transformer": StudentConfig(backbone="timm:vit_tiny_patch16_224"),
}


@pytest.fixture(params=CONFIGS, scope="module")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return open_backbone(CONFIGS[request.param], SIZE)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def build_seasoned_encoder(backbone: Backbone) -> nn.Module:
    """An encoder whose batch norms have seen images."""
    encoder = build_encoder(backbone)
    with torch.no_grad():
        for part in encoder.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.0, generator=torch.Generator().manual_seed(1))
                part.momentum = None
        encoder.train()(images(16))
    return encoder.eval()


def test_the_encoder_gives_vectors_of_its_width(backbone: Backbone) -> None:
    with torch.no_grad():
        assert build_encoder(backbone).eval()(images()).shape == (4, backbone.width)


def test_one_seed_gives_the_same_weights(backbone: Backbone) -> None:
    first, second = (build_encoder(backbone, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_last_stage_is_the_features_and_the_encoder_stays_as_it_is(backbone: Backbone) -> None:
    encoder = build_seasoned_encoder(backbone)
    with torch.no_grad():
        stages, features = backbone.stages(encoder).eval()(images()), encoder(images())
    assert len(stages) > 3
    assert all(rows.ndim == 2 and len(rows) == 4 for rows in stages.values())
    torch.testing.assert_close(list(stages.values())[-1], features)


def test_what_is_served_does_what_was_trained_without_a_batch_norm(backbone: Backbone) -> None:
    encoder = build_seasoned_encoder(backbone)
    with torch.no_grad():
        wanted, features = encoder(images()), backbone.copy_for_export(encoder)(images())
    scale = wanted.abs().max()
    torch.testing.assert_close(features / scale, wanted / scale, rtol=0, atol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in backbone.copy_for_export(encoder).modules())


def test_undecayed_parameters_are_there(backbone: Backbone) -> None:
    encoder = build_encoder(backbone)
    parameters = dict(encoder.named_parameters())
    assert set(backbone.no_weight_decay(encoder)) <= parameters.keys()
    if backbone.name.startswith("timm:"):
        assert all(parameters[name].ndim > 1 for name in parameters.keys() - set(backbone.no_weight_decay(encoder)))


def test_a_bundle_gives_the_same_backbone_and_the_same_features(backbone: Backbone, tmp_path: Path) -> None:
    encoder = build_seasoned_encoder(backbone)
    sample = write_bundle(tmp_path / "student", encoder, backbone, preprocess=Preprocess.for_size(SIZE))
    assert backbone_of(bundles.load(sample.path).manifest) == backbone
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    normalised = torch.from_numpy(Preprocess.for_size(SIZE).normalise(pixels))
    with torch.no_grad():
        torch.testing.assert_close(sample.student().embed(pixels), encoder(normalised))


@pytest.mark.slow
def test_weights_of_another_backbone_are_never_written(backbone: Backbone, tmp_path: Path) -> None:
    another = open_backbone(CONFIGS["resnet18" if "resnet" not in backbone.name else "transformer"], SIZE)
    with pytest.raises(MvmrError, match="does not fit"):
        save_student(tmp_path, build_encoder(another), backbone, preprocess=Preprocess.for_size(SIZE), training={})


def test_in_training_it_takes_smaller_views_with_the_same_weights(backbone: Backbone) -> None:
    encoders = []
    for sides in ((), (SIZE, SIZE // 2)):
        torch.manual_seed(0)
        encoders.append(backbone.build(sides).eval())
    plain, flexible = encoders
    for key, value in plain.state_dict().items():
        assert torch.equal(value, flexible.state_dict()[key])
    with torch.no_grad():
        torch.testing.assert_close(flexible(images()), plain(images()))
        half = flexible(torch.nn.functional.avg_pool2d(images(), 2))
    assert half.shape == (4, backbone.width)
    assert half.isfinite().all()


def test_views_that_do_not_fit_a_transformers_patches_are_one_line() -> None:
    backbone = open_backbone(CONFIGS["transformer"], SIZE)
    with pytest.raises(MvmrError, match=r"images of 64 px does not take views of 28, 30 px .*divisible") as caught:
        backbone.build({SIZE, 30, 28})
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_pool_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvmr.models import timm_model

    monkeypatch.setattr(timm_model, "_create", lambda name, size: nn.Conv2d(3, 4, 1))
    timm_model._width.cache_clear()
    with pytest.raises(MvmrError, match=r"gives \[2, 4, 48, 48\] for two images, no vector each"):
        open_backbone(CONFIGS["depthwise"], 48)
    timm_model._width.cache_clear()


def test_options_of_a_strangers_bundle_are_checked(tmp_path: Path) -> None:
    sample = write_bundle(tmp_path / "student")
    for options, message in (
        ({}, "small_kernel = None"),
        ({"small_kernel": 1}, "small_kernel = 1: it must be"),
    ):
        with pytest.raises(MvmrError, match=message):
            backbone_of(type(sample.manifest)(**{**vars(sample.manifest), "options": options}))
