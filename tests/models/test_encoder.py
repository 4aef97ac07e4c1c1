"""The encoder is torchvision's own ResNet, and other people's weights fit it or are refused by name."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from mvmr.bundles import bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.parts.heads import build_projector
from mvmr.models.backbone import StudentConfig
from mvmr.models.initial import read_init
from mvmr.models.table import open_backbone
from mvmr.models.torchvision_resnet import Resnet

SMALL = Resnet(name="resnet18", small_kernel=True)
PLAIN = Resnet(name="resnet18")


def write(folder: Path, config: Resnet, encoder: nn.Module) -> bundle.Bundle:
    return bundle.write(
        folder,
        backbone=config.name,
        options=config.options,
        embedding_dim=config.width,
        preprocessing=Preprocess.for_size(32),
        training={"method": "test"},
        encoder_state=encoder.state_dict(),
    )


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return PLAIN.build()


@pytest.fixture(scope="module")
def resnet50_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Resnet(name="resnet50")
    folder = tmp_path_factory.mktemp("resnet50")
    return write(folder, config, config.build()).file("encoder.safetensors")


@pytest.mark.parametrize(("architecture", "width"), [("resnet18", 512), ("resnet18_025", 128), ("resnet50", 2048)])
@pytest.mark.parametrize("small_kernel", [False, True])
def test_features_have_the_width_that_is_promised(architecture, width, small_kernel):
    config = Resnet(name=architecture, small_kernel=small_kernel)
    with torch.no_grad():
        features = config.build().eval()(torch.randn(2, 3, 16, 16))
    assert features.shape == (2, width)
    assert config.width == width


@pytest.mark.parametrize(("name", "share"), [("resnet18_050", 0.5), ("resnet18_025", 0.25)])
def test_every_layer_of_a_narrow_resnet18_has_its_share_of_the_channels(name: str, share: float) -> None:
    full, narrow = PLAIN.build().state_dict(), Resnet(name=name).build().state_dict()
    assert narrow.keys() == full.keys()
    for key, values in full.items():
        inner = [round(size * share) if size >= 64 else size for size in values.shape]
        assert list(narrow[key].shape) == inner, key


def test_small_kernel_keeps_the_resolution_of_the_image():
    encoder = SMALL.build()
    stem = nn.Sequential(encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool)
    assert stem(torch.randn(1, 3, 32, 32)).shape == (1, 64, 32, 32)


def test_every_residual_block_starts_as_the_identity():
    encoder = Resnet(name="resnet50").build()
    assert all(not block.bn3.weight.any() for layer in (encoder.layer1, encoder.layer4) for block in layer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backbone": "resnet5"}, "unknown student 'resnet5'; did you mean 'resnet50'"),
        ({"backbone": "timm:convnext_ato"}, "unknown timm model 'convnext_ato'; did you mean 'convnext_atto'"),
        (
            {"backbone": "timm:convnext_atto", "small_kernel": True},
            "small_kernel is of ResNets, not of timm",
        ),
        ({"backbone": "timm:inception_v3"}, "does not take images of 18 px"),
    ],
)
def test_a_student_that_there_is_not_is_one_line(config, message):
    with pytest.raises(MvmrError, match=message) as caught:
        open_backbone(StudentConfig(**config), 18)
    assert "\n" not in str(caught.value)


def test_projector_ends_in_a_plain_linear_layer_and_has_no_bias():
    projector = build_projector(512, (64, 32, 16))
    names = [type(layer).__name__ for layer in projector]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert projector(torch.randn(4, 512)).shape == (4, 16)


def test_projector_without_sizes_is_the_identity():
    features = torch.randn(4, 512)
    assert build_projector(512, ())(features) is features


def test_projector_refuses_an_empty_layer():
    with pytest.raises(MvmrError, match="below 1"):
        build_projector(512, (8, 0))


def test_weights_load_strictly_into_torchvision(resnet50_file):
    state = load_file(resnet50_file)
    backbone = torchvision.models.resnet50()
    loose = backbone.load_state_dict(state, strict=False)
    assert set(loose.missing_keys) == {"fc.weight", "fc.bias"}
    assert not loose.unexpected_keys
    backbone.fc = nn.Identity()
    backbone.load_state_dict(state, strict=True)


def test_weights_load_strictly_into_timm_and_give_the_same_features(resnet50_file):
    state = load_file(resnet50_file)
    theirs = timm.create_model("resnet50", num_classes=0).eval()
    theirs.load_state_dict(state, strict=True)
    ours = Resnet(name="resnet50").build().eval()
    ours.load_state_dict(state, strict=True)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


def test_weights_load_into_a_detection_backbone(resnet50_file):
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    mismatch = detector.backbone.body.load_state_dict(load_file(resnet50_file), strict=True)
    assert not mismatch.missing_keys


def _torchvision_pth(folder: Path, plain: nn.Module) -> Path:
    state = {**plain.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, folder / "resnet18.pth")
    return folder / "resnet18.pth"


def _wrapped_pth(folder: Path, plain: nn.Module) -> Path:
    state = {f"module.{key}": value.half() for key, value in plain.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "wrapped.pth")
    return folder / "wrapped.pth"


def _timm_safetensors(folder: Path, plain: nn.Module) -> Path:
    model = timm.create_model("resnet18")
    model.load_state_dict(plain.state_dict(), strict=False)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def _without_counters(folder: Path, plain: nn.Module) -> Path:
    state = {key: value for key, value in plain.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, folder / "old.pth")
    return folder / "old.pth"


def _bundle(folder: Path, plain: nn.Module) -> Path:
    return write(folder / "b", PLAIN, plain).path


@pytest.mark.parametrize(
    "writer",
    [_torchvision_pth, _wrapped_pth, _timm_safetensors, _without_counters, _bundle],
    ids=lambda f: f.__name__,
)
def test_init_takes_the_weights_of(writer, tmp_path, plain):
    encoder = PLAIN.build()
    encoder.load_state_dict({**encoder.state_dict(), **read_init(PLAIN, writer(tmp_path, plain))})
    tolerance = 1e-3 if writer is _wrapped_pth else 0.0
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[key], value, rtol=tolerance, atol=tolerance)


def test_init_takes_published_weights_that_are_in_the_cache(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    with pytest.raises(MvmrError, match=f"is not there; download it once: {url}"):
        read_init(PLAIN, "torchvision:IMAGENET1K_V1")
    (tmp_path / "checkpoints").mkdir()
    _torchvision_pth(tmp_path, plain).rename(tmp_path / "checkpoints" / url.rpartition("/")[2])
    for tag in ("IMAGENET1K_V1", "DEFAULT"):
        state = read_init(PLAIN, f"torchvision:{tag}")
        assert torch.equal(state["layer4.1.conv2.weight"], plain.state_dict()["layer4.1.conv2.weight"])
    with pytest.raises(MvmrError, match="did you mean 'IMAGENET1K_V1'"):
        read_init(PLAIN, "torchvision:IMAGENET1K_V9")
    with pytest.raises(MvmrError, match="torchvision has no weights for resnet18_025"):
        read_init(Resnet(name="resnet18_025"), "torchvision:DEFAULT")


def test_init_from_another_architecture_names_the_keys(tmp_path, plain):
    source = _torchvision_pth(tmp_path, plain)
    with pytest.raises(MvmrError) as caught:
        read_init(Resnet(name="resnet50"), source)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    assert "missing (layer1.0.conv3.weight, layer1.0.bn3.weight, layer1.0.bn3.bias, ...)" in message
    assert "layer1.0.conv1.weight [64, 64, 3, 3] instead of [64, 64, 1, 1]" in message


def test_init_with_another_stem_names_the_switch(tmp_path, plain):
    with pytest.raises(MvmrError, match=r"conv1\.weight \[64, 3, 7, 7\] instead of \[64, 3, 3, 3\].*--small-kernel"):
        read_init(SMALL, _torchvision_pth(tmp_path, plain))


def test_init_from_a_transformer_names_unexpected_keys(tmp_path):
    save_file({"visual.class_embedding": torch.zeros(8)}, tmp_path / "vit.safetensors")
    with pytest.raises(MvmrError, match=r"1 unexpected \(visual\.class_embedding\)"):
        read_init(SMALL, tmp_path / "vit.safetensors")


def test_init_refuses_weights_that_are_not_finite(tmp_path, plain):
    state = plain.state_dict() | {"bn1.weight": torch.full((64,), float("nan"))}
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(MvmrError, match=r"not finite in 1 keys \(bn1\.weight\)"):
        read_init(PLAIN, tmp_path / "nan.pth")


class Payload:
    """What `weights_only` must refuse: a class of somebody's own."""


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.pth", None, "not found"),
        ("text.pth", b"hello", "not a plain state dict"),
        ("empty.pth", b"", "not a plain state dict"),
        ("text.safetensors", b"hello", "not a whole safetensors file"),
        ("payload.pth", {"fc": Payload()}, "not a plain state dict"),
        ("list.pth", [1, 2], "holds no tensors but a list"),
        ("numbers.pth", {"epoch": 3}, "not a state dict of tensors: see epoch"),
        ("nothing.pth", {}, "holds no tensors but a dict"),
    ],
)
def test_init_from_something_else_says_what_it_is(name, content, text, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(MvmrError, match=text) as caught:
        read_init(SMALL, path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_init_from_a_folder_that_is_no_bundle_says_so(tmp_path):
    with pytest.raises(MvmrError, match=r"holds no bundle\.json"):
        read_init(SMALL, tmp_path)


def test_init_from_a_truncated_file_says_so(tmp_path, plain):
    content = _timm_safetensors(tmp_path, plain).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(MvmrError, match="not a whole safetensors file"):
        read_init(PLAIN, tmp_path / "cut.safetensors")


def test_two_encoders_of_one_seed_are_equal():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(SMALL.build().state_dict())
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
