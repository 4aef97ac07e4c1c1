"""What every kind of teacher must hold to, and how a spec, or a user's own code, may be wrong."""

from __future__ import annotations

import importlib
import linecache
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import skimage
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision import models

import mvmr
from mvmr.bundles import bundle as bundles
from mvmr.distillation.teachers.recorded import recorded_teachers, teacher_of
from mvmr.distillation.teachers.spec import KINDS, RESERVED, Spec, check_names, parse_specs
from mvmr.distillation.teachers.table import open_teacher, share_pretrained
from mvmr.distillation.teachers.teacher import NoTextTower, Teacher, canaries
from mvmr.errors import MvmrError
from mvmr.representations import AUGMENTED_PIXELS, HAND_CRAFTED
from tests.distill.small_onnx import small_onnx
from tests.distill.test_run import TINY, a_teacher, photos

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

MODULE = """
import torch
from torchvision.transforms.v2 import functional

class Colours(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 5)

    def prepare(self, image):
        return functional.pil_to_tensor(image.resize((4, 4))).float() / 255

    def forward(self, images):
        return self.linear(images.mean((2, 3)))

def colours():
    return Colours()

def pair():
    made = Colours()
    network = torch.nn.Sequential(torch.nn.Flatten(), made.linear)
    return network, lambda image: made.prepare(image).mean((1, 2)).reshape(3, 1, 1)

def broken():
    raise RuntimeError("no such weights")

def nothing():
    return 3

def bare():
    return torch.nn.Identity()

class Uneven(Colours):
    def forward(self, images):
        return torch.zeros(len(images), 4 + len(images))

class Tokens(Colours):
    def forward(self, images):
        return images.flatten(2)

class Fails(Colours):
    def forward(self, images):
        raise ValueError("of a kind of its own")

class Odd(Colours):
    def prepare(self, image):
        return functional.pil_to_tensor(image)

class Words(Colours):
    def prepare(self, image):
        return "pixels"

class Crowd(Colours):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5)

    def eval(self):
        return self

    def forward(self, images):
        return self.norm(super().forward(images)) if len(images) > 1 else super().forward(images)

class FarCrowd(Crowd):
    def forward(self, images):
        return super().forward(images) + 1000

class Endless(Colours):
    def forward(self, images):
        return super().forward(images) * float("inf")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of the user's own, my_teachers."""
    (tmp_path / "my_teachers.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    return tmp_path


def small_timm(folder: Path, seed: int = 0) -> Path:
    """Weights of a small model of timm's, with its classifier, as published ones have it."""
    torch.manual_seed(seed)
    file = folder / f"resnet10t-{seed}.safetensors"
    save_file({k: v.contiguous() for k, v in timm.create_model("resnet10t").state_dict().items()}, file)
    return file


def small_torchvision(folder: Path) -> Path:
    """Weights of a small model of torchvision's, with its classifier."""
    torch.manual_seed(0)
    file = folder / "shufflenet.pth"
    torch.save(models.get_model("shufflenet_v2_x0_5").state_dict(), file)
    return file


SPECS: dict[str, Callable[[Path], str]] = {
    "open_clip": lambda here: a_teacher(here / "clip"),
    "timm": lambda here: f"timm:resnet10t:{small_timm(here)}",
    "torchvision": lambda here: f"torchvision:shufflenet_v2_x0_5:{small_torchvision(here)}",
    "onnx": lambda here: f"onnx:{small_onnx(here / 'bytes.onnx')}",
    "python": lambda here: "python:my_teachers:colours",
}


@pytest.fixture(params=[kind for kind in KINDS if kind != "rows"])
def spec(request: pytest.FixtureRequest, here: Path) -> str:
    return SPECS[request.param](here)


def load_teacher(spec: str) -> Teacher:
    return open_teacher(parse_specs(spec)[0])


def rows(teacher: Teacher) -> Tensor:
    return teacher(torch.stack([teacher.prepare(image) for image in canaries()]))


def test_it_gives_a_row_of_its_width_for_an_image_of_any_size(spec: str) -> None:
    teacher = load_teacher(spec)
    embeddings = rows(teacher)
    assert (embeddings.shape, embeddings.dtype) == ((2, teacher.dim), torch.float32)
    assert embeddings.isfinite().all()
    assert not embeddings.requires_grad
    alone = torch.cat([teacher(teacher.prepare(image)[None]) for image in canaries()])
    torch.testing.assert_close(alone, embeddings, rtol=1e-4, atol=1e-5)
    assert teacher.parameters is None or teacher.parameters > 0
    assert teacher.name
    assert teacher.weights


def test_the_same_teacher_has_the_same_identity_and_embeddings(spec: str) -> None:
    first, second = load_teacher(spec), load_teacher(spec)
    assert len(first.identity) == 64
    assert first.identity == second.identity
    assert torch.equal(rows(first), rows(second))


def test_a_student_is_distilled_from_it_and_finds_it_again(spec: str, here: Path) -> None:
    student = mvmr.distill(spec, photos(here / "photos", 16), here / "out", assign=TINY, device="cpu")
    teacher = teacher_of(bundles.load(student.path), None, None, "cpu", text=False)
    assert teacher.identity == load_teacher(spec).identity == recorded_teachers(student)["teacher"]["identity"]
    assert (bundles.load(student.path).path / "metrics.jsonl").read_text().count("regression.teacher") == 4


# -- timm, and a user's own


def test_a_timm_model_is_timms_own_with_timms_preprocessing(tmp_path: Path) -> None:
    file = small_timm(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0).eval()
    model.load_state_dict({k: v for k, v in mvmr_weights(file).items() if not k.startswith("fc.")})
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    batch = torch.stack([transform(image) for image in canaries()])
    with torch.no_grad():
        wanted = model(batch)
    torch.testing.assert_close(rows(load_teacher(f"timm:resnet10t:{file}")), wanted)


def mvmr_weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_torchvision_model_is_torchvisions_own_with_torchvisions_preprocessing(tmp_path: Path) -> None:
    file = small_torchvision(tmp_path)
    model = models.get_model("shufflenet_v2_x0_5").eval()
    model.load_state_dict(torch.load(file, weights_only=True))
    model.fc = torch.nn.Identity()
    teacher = load_teacher(f"torchvision:shufflenet_v2_x0_5:{file}")
    with torch.no_grad():
        torch.testing.assert_close(rows(teacher), model(torch.stack([teacher.prepare(image) for image in canaries()])))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_inputs_are_those_of_the_librarys_own_evaluation_transform_to_the_bit(here: Path, mode: str) -> None:
    """Of a photograph's file; the training shows a teacher what it shows a student: upright, in RGB."""
    picture = Image.fromarray(skimage.data.astronaut()).crop((40, 10, 400, 300)).convert(mode)
    file = here / f"photo.{'tiff' if mode == 'CMYK' else 'png'}"
    picture.save(file)
    with Image.open(file) as image:
        rgb = image.convert("RGB")
    network = timm.create_model("resnet10t", num_classes=0)
    timms = create_transform(**resolve_model_data_config(network), is_training=False)
    torchvisions = models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms()
    for kind, own in (("timm", timms), ("torchvision", torchvisions)):
        teacher = load_teacher(SPECS[kind](here))
        assert torch.equal(teacher.prepare(rgb), own(rgb))


def test_other_weights_or_other_pixels_are_another_teacher(here: Path) -> None:
    identities = {load_teacher(f"timm:resnet10t:{small_timm(here, seed)}").identity for seed in range(2)}
    identities |= {load_teacher(f"python:my_teachers:{name}").identity for name in ("colours", "pair")}
    assert len(identities) == 4


def test_neither_has_a_text_tower(here: Path) -> None:
    for text in (f"timm:resnet10t:{small_timm(here)}", "python:my_teachers:colours"):
        with pytest.raises(NoTextTower, match=r"has no text tower: zero-shot takes a CLIP"):
            open_teacher(parse_specs(text)[0], text=True)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("python:my_teachers", r"give python:PACKAGE\.MODULE:FACTORY"),
        ("python:my_teacher:colours", "there is no module 'my_teacher', looked from /"),
        ("python:my_teachers:colour", r"unknown function of my_teachers 'colour'; did you mean 'colours'\?"),
        ("python:my_teachers:broken", r"broken\(\) failed \(RuntimeError: no such weights\)"),
        ("python:my_teachers:nothing", r"returns a int without prepare\(image\)"),
        ("python:my_teachers:bare", r"returns a Identity without prepare\(image\); return a torch module that has"),
        ("python:my_teachers:Uneven", "gives rows of 6 numbers in one batch and 5 in another"),
        (
            "python:my_teachers:Tokens",
            r"gives torch\.float32 \[2, 3, 16\] for a batch of 2, not rows of floats",
        ),
        ("python:my_teachers:Fails", r"failed on two images \(ValueError: of a kind of its own\)"),
        ("python:my_teachers:Odd", r"gives \[3, 64, 96\] and \[3, 300, 200\] for two images; all must have one shape"),
        ("python:my_teachers:Words", r"its preprocessing gives str, not a tensor \[C, H, W\]"),
        ("python:my_teachers:Endless", "gives values that are not finite"),
        ("python:my_teachers:Crowd", r"another row when it stands beside another: is a batch norm in training mode"),
        ("python:my_teachers:FarCrowd", "another row when it stands beside another"),
        ("torchvision:resnet1", r"unknown torchvision model 'resnet1'; did you mean"),
        ("torchvision:resnet18:IMAGENET", r"unknown weights of torchvision's resnet18 'IMAGENET'; did you mean"),
        ("torchvision:resnet18:gone.pth", "weights file gone.pth of teacher torchvision:resnet18 does not exist"),
        ("torchvision:squeezenet1_1:my_teachers.py", "does not end in a linear layer"),
        ("timm:resnet10", r"unknown timm model 'resnet10'; did you mean 'resnet10t'\?"),
        ("timm:resnet10t:gone.pth", "weights file gone.pth of teacher timm:resnet10t does not exist"),
        ("a b=ViT-B-16", "'a b' is no name"),
        ("hog=ViT-B-16", "'hog' is what recipes and tables call something else"),
        ("ViT-B-16:opena", "unknown weights of ViT-B-16: 'opena'; did you mean 'openai'"),
    ],
)
def test_what_can_not_teach_is_one_line(here: Path, what: str, message: str) -> None:
    with pytest.raises(MvmrError, match=message) as excinfo:
        load_teacher(what)
    assert "\n" not in str(excinfo.value)


def test_weights_of_another_model_name_the_keys(here: Path) -> None:
    with pytest.raises(MvmrError, match=r"as weights of timm:resnet18, does not fit: keys .* missing"):
        load_teacher(f"timm:resnet18:{small_timm(here)}")
    with pytest.raises(MvmrError, match=r"as weights of torchvision:resnet18, does not fit: keys .* missing"):
        load_teacher(f"torchvision:resnet18:{small_torchvision(here)}")


def test_another_network_of_the_same_weights_is_another_teacher(here: Path) -> None:
    """Which pooling, and what no state dict holds, are in a module's text."""
    spec, identities = "python:my_teachers:colours", set()
    for change in (
        ("mean((2, 3))", "mean((2, 3))"),
        ("mean((2, 3))", "amax((2, 3))"),
        (".float() / 255", ".float() / 254"),
    ):
        (here / "my_teachers.py").write_text(MODULE.replace(*change))
        sys.modules.pop("my_teachers", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        identities.add(load_teacher(spec).identity)
    assert len(identities) == 3


def test_names_that_mean_something_else_are_all_kept_from_teachers() -> None:
    assert set(RESERVED) == {"student", *HAND_CRAFTED, AUGMENTED_PIXELS}


def test_open_clips_models_are_known_without_open_clip() -> None:
    from mvmr.distillation.teachers import spec

    assert set(spec._open_clip_names()) == set(open_clip.list_models())
    names = ["ViT-B/16", "ViT-B-32:openai", "hf-hub:org/repo", "/no/such/folder", "timm:never"]
    check_names([spec.Spec.parse(name) for name in names])
    with pytest.raises(MvmrError, match="unknown teacher 'ViT-B-61'; did you mean 'ViT-B-16'"):
        check_names(parse_specs("ViT-B-61"))


def test_weights_given_once_are_those_of_open_clip_models_that_say_none() -> None:
    specs = parse_specs(["clip=ViT-B-16", "old=ViT-B-32:openai", "dino=timm:resnet10t"])
    assert share_pretrained(specs, "laion2b") == {"clip": "laion2b", "old": None, "dino": None}
    assert set(share_pretrained(specs, None).values()) == {None}
    with pytest.raises(MvmrError, match="every teacher says its weights itself; leave out --pretrained laion2b"):
        share_pretrained(specs[1:], "laion2b")


def test_weights_of_a_spec_are_not_given_twice(here: Path) -> None:
    with pytest.raises(MvmrError, match=r"teacher python:my_teachers:colours says its weights itself; leave out"):
        open_teacher(parse_specs("python:my_teachers:colours")[0], "laion2b")


# -- several


def test_specs_have_names_kinds_and_what_is_loaded() -> None:
    specs = parse_specs(["clip=ViT-B-16", "dino=timm:vit_small_patch16_224.dino:a=b.pth", "hf-hub:org/repo"])
    assert specs == [
        Spec("clip", "open_clip", "ViT-B-16"),
        Spec("dino", "timm", "vit_small_patch16_224.dino:a=b.pth"),
        Spec("teacher", "open_clip", "hf-hub:org/repo"),
    ]
    assert parse_specs("runs/a=b/clip") == [Spec("teacher", "open_clip", "runs/a=b/clip")]
    with pytest.raises(MvmrError, match="two teachers are called teacher: give each a name"):
        parse_specs(["ViT-B-16", "ViT-B-32"])


def test_a_student_of_two_teachers_learns_from_both_and_finds_each_again(here: Path) -> None:
    specs = [f"clip={a_teacher(here / 'clip')}", "mine=python:my_teachers:colours"]
    student = mvmr.distill(specs, photos(here / "photos", 16), here / "out", assign=TINY, device="cpu")
    training = student.manifest.training
    assert training["recipe"]["method"]["teachers"] == {"clip": 0.5, "mine": 0.5}
    assert list(recorded_teachers(student)) == ["clip", "mine"]
    for spec in parse_specs(specs):
        assert teacher_of(student, spec.name, None, "cpu", text=False).identity == open_teacher(spec).identity
    with pytest.raises(MvmrError, match=r"distilled from several teachers \(clip, mine\); give one: --teacher NAME"):
        teacher_of(student, None, None, "cpu", text=False)
    text = (student.path / "metrics.jsonl").read_text()
    assert text.count('"regression.clip"') == text.count('"regression.mine"') == 4
    second = mvmr.distill(specs, str(here / "photos"), here / "out", assign=TINY, device="cpu", resume=True)
    assert second.space_id == student.space_id


def test_weights_given_by_hand_stay_and_the_rest_is_shared(here: Path) -> None:
    specs = [f"clip={a_teacher(here / 'clip')}", "mine=python:my_teachers:colours"]
    assign = (*TINY, "method.teachers={clip=2.0,teacher=1.0}")
    student = mvmr.distill(specs, photos(here / "photos", 16), here / "out", assign=assign, device="cpu")
    assert student.manifest.training["recipe"]["method"]["teachers"] == {"clip": 2.0, "mine": 1.0}


@pytest.mark.parametrize(
    ("assign", "message"),
    [
        ("method.teachers={clip=1.0,dino=1.0}", "unknown representation 'dino'"),
        ("method.teachers={clip=1.0}", "recipe default has no use for a mine"),
    ],
)
def test_a_teacher_that_is_not_given_or_not_used_is_refused_before_anything_is_computed(
    here: Path, monkeypatch: pytest.MonkeyPatch, assign: str, message: str
) -> None:
    specs = [f"clip={a_teacher(here / 'clip')}", "mine=python:my_teachers:colours"]
    monkeypatch.setattr("mvmr.training.targets.represent", pytest.fail)
    with pytest.raises(MvmrError, match=message):
        mvmr.distill(specs, photos(here / "photos", 16), here / "out", assign=[*TINY, assign], device="cpu")
    assert not (here / "out.partial").exists()


@pytest.mark.slow
def test_the_command_takes_several(here: Path) -> None:
    photos(here / "photos", 16)
    command = [sys.executable, "-m", "mvmr", "distill", "--teacher", f"clip={a_teacher(here / 'clip')}"]
    command += ["--teacher", "mine=python:my_teachers:colours", "--data", "photos", "--out", "out", "--device", "cpu"]
    command += [part for setting in TINY for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python:my_teachers:colours" in done.stderr
    info = subprocess.run([sys.executable, "-m", "mvmr", "info", "out"], capture_output=True, text=True, check=True)
    line = next(line for line in info.stdout.splitlines() if line.startswith("teacher "))
    assert line.split(maxsplit=1)[1].startswith("clip: ")
    assert "; mine: python:my_teachers:colours, weights its own" in line
