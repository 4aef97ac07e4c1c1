"""A teacher beside the student: with its text tower or without, named or as the bundle records it."""

import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
from safetensors.torch import save_file

from mvmr.app.embedders.teacher import load_teacher
from mvmr.bundles.bundle import Bundle
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.representations.cache import represent
from tests.app.embedders.encoders import ODD, load, patches, refusal
from tests.distill.test_report import a_bundle
from tests.distill.test_teacher import SMALL, build, write_folder

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.mark.slow
def test_a_teacher_gives_the_digits_of_a_report_with_its_text_tower(tmp_path: Path) -> None:
    images = patches()
    write_folder(tmp_path / "small")
    side = load_teacher(None, tmp_path / "small", None)
    alone = ClipTeacher.load(tmp_path / "small")
    assert np.array_equal(side.embed(load(images)), represent(images, alone))
    assert side.has_text
    assert side.teacher.zero_shot_classifier(["a", "b"], ["a photo of {}"]).shape == (12, 2)
    assert (side.key, side.label, side.dim) == ("teacher", "small (open_clip_model.safetensors)", 12)
    assert side.nbytes == (tmp_path / "small" / "open_clip_model.safetensors").stat().st_size
    assert side.embed(ODD).shape == (len(ODD), 12)


def test_a_teacher_without_a_text_tower_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_folder(tmp_path / "small")
    tower = {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}
    save_file(tower, tmp_path / "small" / "open_clip_model.safetensors")
    side = load_teacher(None, tmp_path / "small", None)
    assert not side.has_text
    assert side.embed(ODD[:1]).shape == (1, 12)
    assert "without its text tower" in refusal(side.teacher.zero_shot_classifier, ["a", "b"], ["{}"])
    # one whose tokenizer needs a package that is not there
    shutil.rmtree(tmp_path / "small")
    write_folder(tmp_path / "small")
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: (_ for _ in ()).throw(ImportError("transformers")))
    assert not load_teacher(None, tmp_path / "small", None).has_text


def test_the_teacher_that_a_bundle_records_is_loaded(tmp_path: Path) -> None:
    write_folder(tmp_path / "small")
    teacher = ClipTeacher.load(tmp_path / "small")
    recorded = {key: getattr(teacher, key) for key in ("name", "weights", "identity")}
    bundle = a_bundle(tmp_path / "student", {"teachers": {"teacher": recorded}})
    side = load_teacher(bundle, None, None)
    assert side.teacher.identity == teacher.identity
    shutil.rmtree(tmp_path / "small")
    write_folder(tmp_path / "small", seed=1)
    assert "is not the one" in refusal(load_teacher(bundle, None, None).load)
    second = load_teacher(bundle, tmp_path / "small", None)
    assert second.identity != side.identity
    shutil.rmtree(tmp_path / "small")
    gone = load_teacher(bundle, None, None)  # embeddings of a gallery that are kept are found by its identity
    assert (gone.identity, gone.has_text) == (side.identity, False)
    assert "small/open_clip_model.safetensors any more" in refusal(gone.embed, ODD[:1])


def test_a_teacher_that_can_not_be_had_is_one_sentence(plain_bundle: Bundle, tmp_path: Path) -> None:
    assert "names no teacher to compare with; give one: --teacher" in refusal(load_teacher, plain_bundle, None, None)
    assert "name it: --teacher" in refusal(load_teacher, None, None, None)
    assert "gone.pt of teacher ViT-B-32 does not exist" in refusal(load_teacher, None, "ViT-B-32", tmp_path / "gone.pt")
    save_file(build(SMALL).state_dict(), tmp_path / "w.safetensors")
    reason = refusal(load_teacher, None, "ViT-B-32", tmp_path / "w.safetensors")
    assert "as the image tower of ViT-B-32, does not" in reason
