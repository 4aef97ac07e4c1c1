"""A teacher is open_clip's model with open_clip's preprocessing, frozen; what does not fit is said in one line."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import mvmr
from mvmr.distillation.teachers import clip_source as source
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.clip_source import default_tag, find_source
from mvmr.errors import MvmrError
from mvmr.representations.cache import represent

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
SMALL: dict[str, Any] = {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
BATCH = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(config: dict[str, Any], seed: int = 0) -> CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**deepcopy(config)).eval()


def encode(model: CLIP) -> Tensor:
    """open_clip's own embedding; without gradients attention takes another path, with other rounding."""
    with torch.no_grad():
        return model.encode_image(BATCH)


def write_folder(folder: Path, config: dict[str, Any] = SMALL, seed: int = 0) -> CLIP:
    model = build(config, seed)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> CLIP:
    """A small architecture among open_clip's own names, as "ViT-small-test", and its model."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-small-test", SMALL)
    return build(SMALL)


def photo() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((90, 61), Image.Resampling.BICUBIC)


FILES: dict[str, Callable[[Path], object]] = {
    "photo.jpg": lambda path: photo().save(path, quality=90),
    "grey.png": lambda path: photo().convert("L").save(path),
    "palette.png": lambda path: photo().quantize(32).save(path),
    "alpha.png": lambda path: photo().convert("RGBA").save(path),
}


@pytest.mark.parametrize("name", FILES)
def test_prepare_equals_open_clips_own_preprocessing_bit_for_bit(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "small")
    FILES[name](tmp_path / name)
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'small'}")
    teacher = ClipTeacher.load(tmp_path / "small")
    with Image.open(tmp_path / name) as ours, Image.open(tmp_path / name) as same:
        assert torch.equal(teacher.prepare(ours), theirs(same))
    assert teacher.preprocess_cfg.interpolation == "bilinear"
    assert teacher.preprocess_cfg.size == (32, 32)


@pytest.mark.parametrize("name", ["photo.jpg", "grey.png"])
def test_what_an_image_set_hands_the_teacher_is_what_open_clip_would(tmp_path: Path, small: CLIP, name: str) -> None:
    torch.save(small.state_dict(), tmp_path / "small.pt")
    (tmp_path / "photos").mkdir()
    FILES[name](tmp_path / "photos" / name)
    _, _, theirs = open_clip.create_model_and_transforms("ViT-small-test", pretrained=str(tmp_path / "small.pt"))
    teacher = ClipTeacher.load("ViT-small-test", tmp_path / "small.pt")
    with Image.open(tmp_path / "photos" / name) as image:
        expected = theirs(image)
    prepared = teacher.prepare(mvmr.open_images(str(tmp_path / "photos"), "unlabelled").load(0))
    assert torch.equal(prepared, expected)


def as_safetensors(model: CLIP, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors"


def save(state: object, folder: Path) -> Path:
    torch.save(state, folder / "w.pt")
    return folder / "w.pt"


FORMS: dict[str, Callable[[CLIP, Path], Path]] = {
    "safetensors": as_safetensors,
    "state dict": lambda model, folder: save(model.state_dict(), folder),
    "training checkpoint": lambda model, folder: save(
        {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, folder
    ),
    "image tower only": lambda model, folder: save(
        {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}, folder
    ),
    "bare image tower": lambda model, folder: save(model.visual.state_dict(), folder),
    "half precision": lambda model, folder: save(build(SMALL).bfloat16().state_dict(), folder),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_every_form_give_open_clips_embeddings(tmp_path: Path, small: CLIP, form: str) -> None:
    teacher = ClipTeacher.load("ViT-small-test", FORMS[form](small, tmp_path))
    if form == "half precision":
        small.bfloat16().float()
    embeddings = teacher(BATCH)
    assert torch.equal(embeddings, encode(small))
    assert embeddings.shape == (3, teacher.dim) == (3, 12)
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad


@pytest.mark.parametrize(
    "vision",
    [
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        VIT | {"output_tokens": True},
        {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "linear"}
        | {"timm_pool": "avg", "timm_model_pretrained": True},
    ],
    ids=["ModifiedResNet", "tokens handed out", "timm"],
)
def test_other_image_towers(tmp_path: Path, vision: dict[str, Any]) -> None:
    model = build(SMALL | {"vision_cfg": vision | {"timm_model_pretrained": False}})
    folder = tmp_path / "other"
    folder.mkdir()
    config = {"model_cfg": SMALL | {"vision_cfg": vision}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    with torch.no_grad():
        out = model.visual(BATCH)
    assert torch.equal(ClipTeacher.load(folder)(BATCH), out[0] if isinstance(out, tuple) else out)


def test_a_teacher_never_trains_and_stays_out_of_a_module_that_holds_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "small", SMALL | {"vision_cfg": VIT | {"patch_dropout": 0.5}})

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = ClipTeacher.load(tmp_path / "small")

    student = Student().train()
    assert not student.state_dict()
    assert not list(student.parameters())
    assert torch.equal(student.teacher(BATCH), student.teacher(BATCH))  # patches would be dropped in training mode
    assert torch.equal(student.teacher(BATCH)[1:2], student.teacher(BATCH[1:2]))
    assert not student.teacher(BATCH.clone().requires_grad_()).requires_grad


def test_identity_names_weights_preprocessing_architecture_and_precision(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "same")
    write_folder(tmp_path / "weights", seed=1)
    write_folder(tmp_path / "gelu", SMALL | {"quick_gelu": True})
    write_folder(tmp_path / "mean")
    config = tmp_path / "mean" / "open_clip_config.json"
    config.write_text(config.read_text().replace("0.3", "0.31"))
    identity = ClipTeacher.load(tmp_path / "a").identity
    assert identity == ClipTeacher.load(tmp_path / "same").identity
    assert identity == ClipTeacher.load(tmp_path / "a", text=True).identity
    identities = {ClipTeacher.load(tmp_path / name).identity for name in ("weights", "gelu", "mean")}
    identities.add(ClipTeacher.load(tmp_path / "a", weights_dtype=torch.bfloat16).identity)
    assert len(identities | {identity}) == 5


def test_low_precision_is_close_and_handed_out_as_float32(tmp_path: Path) -> None:
    write_folder(tmp_path / "small")
    exact = ClipTeacher.load(tmp_path / "small")(BATCH)
    rough = ClipTeacher.load(tmp_path / "small", weights_dtype=torch.bfloat16)(BATCH)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


def test_embeddings_are_cached_by_identity(tmp_path: Path, cache: Path) -> None:
    write_folder(tmp_path / "small")
    images = mvmr.open_images("sample:digits", "test").subset(range(5))
    teacher = ClipTeacher.load(tmp_path / "small")
    expected = teacher(torch.stack([teacher.prepare(images.load(i)) for i in range(5)]))
    rows = represent(images, teacher, batch_size=5)
    assert np.array_equal(rows, expected)
    assert len(list((cache / "representations").glob(f"small-{teacher.identity[:16]}-*.npy"))) == 1


def test_zero_shot_classifier_is_open_clips(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "small")
    classes, templates = ["cat", "coffee cup"], ["a photo of {}.", "{}."]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'small'}")
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
    teacher = ClipTeacher.load(tmp_path / "small", text=True)
    columns = teacher.zero_shot_classifier(classes, templates)
    assert torch.equal(columns, expected)
    assert columns.shape == (12, 2)
    assert torch.equal(teacher(BATCH), encode(model))


def test_zero_shot_needs_the_text_tower(tmp_path: Path, small: CLIP) -> None:
    file = FORMS["image tower only"](small, tmp_path)
    with pytest.raises(MvmrError, match="text=True"):
        ClipTeacher.load("ViT-small-test", file).zero_shot_classifier(["cat"], ["{}"])
    with pytest.raises(MvmrError, match="holds no text tower that fits ViT-small-test") as excinfo:
        ClipTeacher.load("ViT-small-test", file, text=True)
    assert "\n" not in str(excinfo.value)
    complete = FORMS["state dict"](small, tmp_path)
    assert ClipTeacher.load("ViT-small-test", complete, text=True).zero_shot_classifier(["cat"], ["{}"]).shape == (
        12,
        1,
    )


def refusal(name: str | Path, pretrained: str | Path | None = None) -> str:
    with pytest.raises(MvmrError) as excinfo:
        ClipTeacher.load(name, pretrained)
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def test_unknown_names_are_answered_with_the_nearest() -> None:
    assert "unknown teacher 'ViT-B16'; did you mean 'ViT-B-16'?" in refusal("ViT-B16")
    assert "did you mean 'laion2b_s34b_b88k'?" in refusal("ViT-B-16", "laion2b_s34b")
    assert "neither a folder here nor a model" in refusal("no/such/teacher")
    assert "open_clip knows no weights for ViT-S-16; give a file: --pretrained FILE" in refusal("ViT-S-16")


@pytest.mark.slow
def test_missing_and_broken_files_are_one_line(tmp_path: Path) -> None:
    assert "weights file nowhere.safetensors of teacher ViT-B-16 does not exist" in refusal(
        "ViT-B-16", "nowhere.safetensors"
    )
    (tmp_path / "text.pt").write_text("not weights")
    assert "text.pt is not a plain state dict" in refusal("ViT-B-16", tmp_path / "text.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    assert "cut.safetensors is not a whole safetensors file" in refusal("ViT-B-16", tmp_path / "cut.safetensors")
    assert "has no open_clip_config.json" in refusal(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    assert "is not a configuration of open_clip's hub format" in refusal(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    assert "put open_clip_model.safetensors or open_clip_pytorch_model.bin there" in refusal(tmp_path)
    assert "leave out --pretrained openai" in refusal(tmp_path, "openai")


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (VIT | {"width": 48}, "of another shape (visual.class_embedding [48] instead of [32]"),
        (VIT | {"layers": 3}, "12 unexpected (visual.transformer.resblocks.2."),
        (VIT | {"layers": 1}, "12 missing (visual.transformer.resblocks.1."),
        (VIT | {"patch_size": 16}, "1 of another shape (visual.conv1.weight [32, 3, 16, 16] instead of [32, 3, 8, 8])"),
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, "unexpected"),
    ],
    ids=["width", "deeper", "shallower", "patch size", "resnet"],
)
def test_weights_of_another_architecture_name_the_keys(
    tmp_path: Path, small: CLIP, vision: dict[str, Any], message: str
) -> None:
    file = save(build(SMALL | {"vision_cfg": vision}).state_dict(), tmp_path)
    reason = refusal("ViT-small-test", file)
    assert f"{file}, as the image tower of ViT-small-test, does not fit" in reason
    assert message in reason
    assert "--small-kernel" not in reason


def test_no_network_is_one_sentence_with_the_file_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_find_cached", lambda repository, files: None)
    monkeypatch.setattr(source, "_offline", lambda: True)
    message = refusal("ViT-B-16")
    assert "weights 'datacomp_xl_s13b_b90k' of ViT-B-16 are not in the cache and there is no network" in message
    assert "fetch open_clip_model.safetensors of laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K" in message
    assert message.endswith("--pretrained FILE")
    assert "give that: --teacher FOLDER" in refusal("hf-hub:someone/model")


def test_a_failing_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> str:
        raise ConnectionResetError("a\nlong\nstory")

    monkeypatch.setattr(source, "_find_cached", lambda repository, files: None)
    monkeypatch.setattr(source, "_offline", lambda: False)
    monkeypatch.setattr(source.tags, "download_pretrained", refuse)
    monkeypatch.setattr(source.tags, "download_pretrained_from_hf", refuse)
    assert "weights 'openai' of ViT-B-32 could not be downloaded (ConnectionResetError)" in refusal(
        "ViT-B-32", "openai"
    )
    assert "hf-hub:someone/model could not be downloaded (ConnectionResetError)" in refusal("hf-hub:someone/model")


def test_a_name_that_does_not_resolve_means_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(source.urllib.request, "getproxies", dict)
    monkeypatch.setattr(source.socket, "getaddrinfo", fail)
    assert source._offline()
    monkeypatch.setattr(source.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr(source.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not source._offline()


def test_a_hub_repository_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_folder(tmp_path / "snapshot")
    monkeypatch.setattr(source, "_find_cached", lambda repository, files: tmp_path / "snapshot" / files[0])
    teacher = ClipTeacher.load("hf-hub:someone/small")
    assert teacher.name == "hf-hub:someone/small"
    assert torch.equal(teacher(BATCH), encode(model))


@pytest.mark.parametrize(
    ("model", "tag"),
    [
        ("ViT-B-16", "datacomp_xl_s13b_b90k"),
        ("ViT-B/32", "datacomp_xl_s13b_b90k"),
        ("ViT-H-14", "laion2b_s32b_b79k"),
        ("ViT-B-16-plus-240", "laion400m_e32"),
        ("RN50", "openai"),
        ("ViT-B-16-SigLIP", "webli"),
    ],
)
def test_the_default_tag_is_the_documented_one(model: str, tag: str) -> None:
    assert default_tag(model) == tag


def test_a_tag_brings_its_activation_and_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_fetch", lambda model, tag, tag_cfg: Path("weights.safetensors"))
    openai, datacomp = find_source("ViT-B-16", "openai"), find_source("ViT-B-16", "datacomp-xl-s13b-b90k")
    assert openai.model_cfg["quick_gelu"]  # open_clip would only warn and compute something else
    assert not datacomp.model_cfg["quick_gelu"]
    assert find_source("ViT-L-14", "laion2b_s32b_b82k").preprocess["mean"] == (0.5, 0.5, 0.5)


def test_a_file_of_siglip_weights_gets_siglips_preprocessing(tmp_path: Path) -> None:
    file = save({}, tmp_path)
    assert find_source("ViT-B-16-SigLIP", file).preprocess["resize_mode"] == "squash"
    assert find_source("ViT-B-16-SigLIP", file).preprocess["mean"] == (0.5, 0.5, 0.5)
    assert find_source("ViT-B-16", file).preprocess["mean"] == open_clip.OPENAI_DATASET_MEAN


@pytest.mark.slow
def test_a_full_size_vit_b_16(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-16")
    model.eval()
    model_file, tower_file = tmp_path / "whole.pt", tmp_path / "tower.safetensors"
    torch.save(model.state_dict(), model_file)
    save_file({key: value for key, value in model.state_dict().items() if key.startswith("visual.")}, tower_file)
    images = [photo(), photo().convert("L")]
    batch = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        expected: Tensor = model.encode_image(batch)
    del model
    for file in (model_file, tower_file):
        teacher = ClipTeacher.load("ViT-B-16", pretrained=file)
        embeddings = teacher(torch.stack([teacher.prepare(image) for image in images]))
        assert embeddings.shape == (2, 512)
        assert torch.equal(embeddings, expected)
