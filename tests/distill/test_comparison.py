"""A student beside its teacher: the same protocols, zero-shot for both, figures kept in the bundle."""

from pathlib import Path

import open_clip
import pytest
import torch
from click.testing import CliRunner

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.cli.main import main
from mvmr.data import open_images
from mvmr.distillation.comparison import compare
from mvmr.distillation.distill import distill
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.distillation.teachers.tiny_clip import TEMPLATES, TinyClip, train_tiny_clip
from mvmr.distillation.zeroshot import fit_space_map, read_map, zero_shot_logits
from mvmr.errors import MvmrError
from mvmr.evaluation.classifiers import linear_probe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "no_fsync")]

DATA = "sample:patches"
BRIEF = ("train.epochs=2", "train.batch_size=64")


@pytest.fixture(scope="module")
def tiny_pair(few_patches: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A tiny CLIP that knows something, and a student of it that has just begun."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    config = TinyClip(image_size=32, width=8, steps=30, text_width=32)
    teacher = train_tiny_clip(open_images(DATA, "train"), folder / "teacher", config=config)
    return teacher, distill(str(teacher), DATA, folder / "student", recipe="quickstart", assign=BRIEF, device="cpu")


def test_both_are_measured_alike_and_the_figures_are_kept(tiny_pair: tuple[Path, Bundle]) -> None:
    folder, student = tiny_pair
    comparison = compare(student.path, DATA, protocols=["zeroshot", "linear"], keep_map=True)
    train, test = open_images(DATA, "train"), open_images(DATA, "test")

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        x, y = (
            torch.cat([model.encode_image(transform(images.load(i))[None]) for i in range(len(images))])
            for images in (train, test)
        )
        classifier = open_clip.build_zero_shot_classifier(
            model, open_clip.get_tokenizer(f"local-dir:{folder}"), train.classes, TEMPLATES
        )
        zero_shot = (torch.nn.functional.normalize(y, dim=-1) @ classifier).argmax(1).numpy()
    assert train.labels is not None
    assert test.labels is not None
    assert comparison["teacher"]["zeroshot"]["top1"] == pytest.approx(100 * (zero_shot == test.labels).mean(), abs=0.3)
    probe = linear_probe(x.numpy(), train.labels, 17)
    linear = 100 * (probe.predict(y.numpy()) == test.labels).mean()
    # one by one or in batches, embeddings are rounded otherwise, which may tip the choice between two regularisations
    assert comparison["teacher"]["linear"]["top1"] == pytest.approx(linear, abs=1.0)
    h, queries = (student.student().embed([images.load(i) for i in range(len(images))]) for images in (train, test))
    mapped = zero_shot_logits(fit_space_map(h, x)(queries), classifier).argmax(1)
    assert comparison["student"]["zeroshot"]["top1"] == pytest.approx(100 * (mapped == test.labels).mean(), abs=0.5)

    now = bundles.load(student.path)
    records = {record["protocol"]: record["values"] for record in now.manifest.metrics}
    assert records["linear"] == comparison["student"]["linear"]
    assert records["linear, teacher teacher"] == comparison["teacher"]["linear"]
    assert records["zeroshot"] == comparison["student"]["zeroshot"]
    space_map, record = read_map(now, ClipTeacher.load(folder))
    assert record["r2"] == space_map.r2 == comparison["student"]["zeroshot"]["map_r2"]
    second = compare(student.path, DATA, protocols=["zeroshot", "linear"])
    assert second == comparison
    assert len(bundles.load(student.path).manifest.metrics) == len(now.manifest.metrics)


def test_the_command_prints_both_sides(tiny_pair: tuple[Path, Bundle]) -> None:
    arguments = ["evaluate", str(tiny_pair[1].path), "--data", DATA, "--protocol", "knn,zeroshot"]
    result = CliRunner().invoke(main, [*arguments, "--table"])
    assert result.exit_code == 0, result.output
    assert "zeroshot top1" in result.stdout
    assert "knn top1_plain_k20" in result.stdout
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "zeroshot go with --table" in refused.stderr


def test_another_teacher_than_the_recorded_one_is_not_taken_for_it(
    tiny_pair: tuple[Path, Bundle], tmp_path: Path
) -> None:
    folder, student = tiny_pair
    file = folder / "open_clip_model.safetensors"
    before = file.read_bytes()
    stranger = train_tiny_clip(
        open_images(DATA, "train"), tmp_path / "other",
        config=TinyClip(image_size=32, width=8, steps=1, text_width=32), seed=1,
    )  # fmt: skip
    try:
        file.write_bytes((stranger / "open_clip_model.safetensors").read_bytes())
        with pytest.raises(MvmrError, match=r"is not the one .*student was distilled from"):
            compare(student.path, DATA)
    finally:
        file.write_bytes(before)
    explicit = compare(student.path, DATA, teacher=stranger, protocols=["knn"])
    assert explicit["teacher"]["knn"] != explicit["student"]["knn"]
    records = {record["protocol"]: record for record in bundles.load(student.path).manifest.metrics}
    assert records["knn, teacher other"]["command"].endswith(f"--protocol knn --table --teacher {stranger}")


def test_a_bundle_without_a_teacher_is_one_line(tiny_pair: tuple[Path, Bundle], tmp_path: Path) -> None:
    _, student = tiny_pair
    with pytest.raises(MvmrError, match="unknown protocol 'zeroshoot'"):
        compare(student.path, DATA, protocols=["zeroshoot"])
    (tmp_path / "alone.partial").mkdir()
    manifest = student.manifest
    bundles.write(
        tmp_path / "alone.partial", backbone=manifest.backbone, options=manifest.options,
        embedding_dim=manifest.embedding_dim, preprocessing=manifest.preprocessing, training={"teachers": {}},
        encoder_state=student.student().encoder.state_dict(),
    )  # fmt: skip
    bundles.publish(tmp_path / "alone.partial", tmp_path / "alone")
    with pytest.raises(MvmrError, match="alone names no teacher to compare with; give one: --teacher ViT-B-16"):
        compare(tmp_path / "alone", DATA)
