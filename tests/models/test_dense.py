"""The map of features before they are pooled, of each kind of network, against what hooks and other packages see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.models import timm_model as timm_models
from mvmr.models.backbone import Backbone, StudentConfig
from mvmr.models.student import Student
from mvmr.models.table import open_backbone
from mvmr.models.torchvision_resnet import NAMES, Resnet
from tests.making import SMALL, build_encoder, write_bundle
from tests.models.test_backbones import build_seasoned_encoder

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

SIZE = 64  # as test_backbones has it


def images(count: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def timm_model(name: str, size: int = SIZE) -> Backbone:
    return open_backbone(StudentConfig(backbone=f"timm:{name}"), size)


@torch.no_grad()
def hooked(encoder: nn.Module, layer: str, batch: torch.Tensor) -> torch.Tensor:
    """What leaves a layer while the encoder embeds."""
    seen: list[torch.Tensor] = []
    handle = encoder.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    encoder(batch)
    handle.remove()
    return seen[0]


@torch.no_grad()
def dense(backbone: Backbone, encoder: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features, maps = backbone.dense(encoder).eval()(batch)
    return features, maps


@pytest.mark.parametrize("small_kernel", [False, True])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "resnet50" else name for name in NAMES]
)
def test_a_resnets_map_is_layer4_and_its_mean_the_features(name: str, small_kernel: bool) -> None:
    backbone = Resnet(name=name, small_kernel=small_kernel)
    encoder, batch = build_encoder(backbone).eval(), images(size=48 if small_kernel else 160)
    features, maps = dense(backbone, encoder, batch)
    with torch.no_grad():
        layer4 = create_feature_extractor(encoder, ["layer4"])(batch)["layer4"]
        torch.testing.assert_close(features, encoder(batch))
    assert maps.shape == (2, *((6, 6) if small_kernel else (5, 5)), backbone.width)
    torch.testing.assert_close(maps[1, 4, 2], layer4[1, :, 4, 2])
    torch.testing.assert_close(maps, layer4.permute(0, 2, 3, 1))
    torch.testing.assert_close(maps.mean((1, 2)), features, rtol=1e-4, atol=1e-6)
    assert features.std() > 0


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet10t", "layer4"), ("mobilenetv3_small_050", "blocks"), ("convnext_atto", "stages")]
)
def test_a_timm_convnets_map_is_what_leaves_its_last_layer_before_pooling(name: str, layer: str) -> None:
    backbone = timm_model(name)
    encoder = build_seasoned_encoder(backbone)
    features, maps = dense(backbone, encoder, images())
    torch.testing.assert_close(maps, hooked(encoder, layer, images()).permute(0, 2, 3, 1))
    with torch.no_grad():
        torch.testing.assert_close(features, encoder(images()))
    assert maps.shape[:3] == (2, 2, 2)


def test_the_mean_of_a_map_is_the_features_exactly_where_no_layer_follows_the_pooling() -> None:
    for name, plain in (("resnet10t", True), ("convnext_atto", False)):
        backbone = timm_model(name)
        features, maps = dense(backbone, build_seasoned_encoder(backbone), images())
        scale = features.abs().max()
        assert torch.allclose(maps.mean((1, 2)) / scale, features / scale, atol=1e-4) == plain
    backbone = timm_model("mobilenetv3_small_050")
    features, maps = dense(backbone, build_seasoned_encoder(backbone), images())
    assert (features.shape[1], maps.shape[3]) == (1024, 288)


@pytest.mark.parametrize(
    ("name", "size", "prefix", "grid"),
    [
        pytest.param("vit_tiny_patch16_224", 80, 1, (5, 5), marks=pytest.mark.slow),
        # four registers, and no class token
        pytest.param("vit_medium_patch16_reg4_gap_256", 64, 4, (4, 4), marks=pytest.mark.slow),
    ],
)
def test_a_transformers_map_is_the_tokens_of_its_patches_row_by_row(
    name: str, size: int, prefix: int, grid: tuple[int, int]
) -> None:
    backbone = timm_model(name, size)
    encoder, batch = build_encoder(backbone).eval(), images(size=size)
    model: Any = encoder
    features, maps = dense(backbone, encoder, batch)
    tokens = hooked(encoder, "norm", batch)
    assert tokens.shape[1] == prefix + grid[0] * grid[1]
    assert maps.shape == (2, *grid, backbone.width)
    torch.testing.assert_close(maps[1, 2, 3], tokens[1, prefix + 2 * grid[1] + 3])
    with torch.no_grad():
        _, intermediates = model.forward_intermediates(batch, norm=True)
        torch.testing.assert_close(features, encoder(batch))
    torch.testing.assert_close(maps, intermediates[-1].permute(0, 2, 3, 1))


@pytest.mark.slow
def test_a_map_that_timm_has_with_channels_last_stays_as_it_is() -> None:
    backbone = timm_model("swin_tiny_patch4_window7_224", 224)
    features, maps = dense(backbone, build_encoder(backbone).eval(), images(1, 224))
    assert maps.shape == (1, 7, 7, 768)
    torch.testing.assert_close(maps.mean((1, 2)), features)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("pit_ti_224", 224, r"gives \[2, 1, 256\] of two images"),  # a class token alone
        ("volo_d1_224", 224, r"gives \[2, 197, 384\] of two images"),  # and timm doesn't say which one is no patch's
        ("coat_tiny", 224, "gives a list of two images"),  # tokens at several scales
    ],
)
@pytest.mark.slow
def test_a_model_without_one_map_is_refused_in_one_line(name: str, size: int, reason: str) -> None:
    backbone = timm_model(name, size)
    with pytest.raises(MvmrError, match=rf"timm:{name} has no one map of features .*{reason}") as caught:
        backbone.dense(nn.Identity())
    assert "\n" not in str(caught.value)


class FewTokens(nn.Module):
    """A transformer in timm's manner for nine patches, of which it leaves five tokens."""

    num_prefix_tokens = 1

    def forward_features(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.new_zeros(len(batch), 5, 8)

    def forward_intermediates(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.forward_features(batch), [batch.new_zeros(len(batch), 8, 3, 3)]


@pytest.mark.parametrize(
    ("model", "reason"),
    [(FewTokens(), r"gives \[2, 5, 8\] of two images"), (nn.Conv2d(3, 4, 1), "no attribute 'forward_features'")],
)
def test_tokens_that_are_not_one_to_a_patch_are_refused(
    model: nn.Module, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = timm_model("mobilenetv3_small_050", 48)
    monkeypatch.setattr(timm_models, "_create", lambda name, size: model)
    timm_models._layout.cache_clear()
    with pytest.raises(MvmrError, match=f"has no one map of features before it pools .*{reason}") as caught:
        backbone.dense(model)
    assert "\n" not in str(caught.value)
    timm_models._layout.cache_clear()


@pytest.mark.parametrize("name", [None, "mobilenetv3_small_050", "convnext_atto"])
def test_what_is_exported_does_the_same_without_a_batch_norm(name: str | None) -> None:
    backbone = timm_model(name) if name else SMALL
    encoder = build_seasoned_encoder(backbone)
    exported = backbone.copy_for_export(encoder, dense=True)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in exported.modules())
    with torch.no_grad():
        folded = exported(images())
    for actual, wanted in zip(folded, dense(backbone, encoder, images()), strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(actual / scale, wanted / scale, rtol=0, atol=1e-5)


# Of a student


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    encoder = build_seasoned_encoder(SMALL)
    out = tmp_path_factory.mktemp("dense") / "student"
    return write_bundle(out, encoder, preprocess=Preprocess.for_size(SIZE)).student()


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 70, 90, 3), dtype=np.uint8)


def test_embed_gives_float32_maps_whose_mean_is_the_embedding(student: Student) -> None:
    maps = student.embed(pictures(5), dense=True)
    assert (maps.dtype, maps.shape, maps.device.type) == (torch.float32, (5, 2, 2, SMALL.width), "cpu")
    torch.testing.assert_close(maps.mean((1, 2)), student.embed(pictures(5)), rtol=1e-4, atol=1e-6)


def test_a_map_is_of_the_resized_and_cropped_image_whatever_batch_it_is_in(student: Student) -> None:
    maps = student.embed(pictures(5), dense=True, batch_size=2)
    prepared = student.preprocess.normalise(student.preprocess.batch(map(Image.fromarray, pictures(5))))
    layer4 = hooked(student.encoder, "layer4", torch.from_numpy(prepared))
    torch.testing.assert_close(maps, layer4.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_maps_of_no_images_have_their_shape(student: Student) -> None:
    assert student.embed([], dense=True).shape == (0, 2, 2, SMALL.width)


def test_maps_survive_somebody_training_the_encoder_and_can_be_trained_on(student: Student) -> None:
    before = student.embed(pictures(3), dense=True)
    student.encoder.train()
    assert torch.equal(student.embed(pictures(3), dense=True), before)
    head = nn.Linear(SMALL.width, 2)
    head(before).sum().backward()
    assert head.weight.grad is not None


def test_an_encoder_of_no_known_backbone_has_no_map(student: Student) -> None:
    stranger = Student(student.encoder, student.preprocess, dim=SMALL.width, name="mine", identity="0")
    for ask in (lambda: stranger.embed(pictures(1), dense=True), lambda: stranger.copy_for_export(dense=True)):
        with pytest.raises(MvmrError, match="where mine pools its features is not known") as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_model_without_a_map_is_refused_by_embed(tmp_path: Path) -> None:
    backbone = timm_model("pit_ti_224", 224)
    sample = write_bundle(tmp_path / "pit", backbone=backbone, preprocess=Preprocess.for_size(224))
    with pytest.raises(MvmrError, match="timm:pit_ti_224 has no one map of features"):
        sample.student().embed(pictures(1), dense=True)
