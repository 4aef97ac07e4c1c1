"""Every engine gives what it gives elsewhere, digit for digit; what can't be had says why and what to do."""

import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mvmr.app.embedders import engines as module
from mvmr.app.embedders.engines import Engines
from mvmr.app.embedders.teacher import load_teacher
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.errors import MvmrError
from mvmr.export.artifacts import ARTIFACTS, Artifact
from mvmr.export.runtimes import Runner, open_artifact
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_provider
from mvmr.representations.cache import represent
from mvmr.serve.client import Client
from mvmr.serve.client import Embeddings as Answer
from mvmr.serve.engine import Engine
from tests.distill.test_report import a_bundle
from tests.distill.test_teacher import SMALL, build, write_folder
from tests.export.tensorrt_double import DIM, SIDE, Double, card, engine_bundle, fp16, with_engine  # noqa: F401
from tests.export.test_rtx import Plugin
from tests.serve import serving

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")
FILES = {row.precision: row.file for row in ARTIFACTS.values() if row.runtime == "onnxruntime"}
FP32, FP16, INT8 = (FILES[precision] for precision in ("fp32", "fp16", "int8"))
KEYS = ["torch", "onnx-fp32", "onnx-fp16", "onnx-int8", "tensorrt-fp16", "tensorrt-rtx-fp16"]


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With heads and a float32 ONNX, but weights that are none."""
    return bundles.load(serving.bundle(tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A resnet18 at 16 px, and nothing exported."""
    return a_bundle(tmp_path_factory.mktemp("runs") / "student")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    test_split = open_images("sample:patches", "test")
    return test_split.subset(range(0, len(test_split), 5))  # 136: two whole batches and some


def load(images: ImageSet, count: int | None = None) -> list[Image.Image]:
    return [images.load(number) for number in range(count or len(images))]


ODD = [
    serving.photograph(),
    serving.photograph("coins").convert("L"),
    serving.photograph("chelsea").convert("CMYK"),
    serving.photograph().convert("RGBA").resize((91, 300)),
    serving.photograph().quantize(16),
    Image.new("I;16", (9, 5), 40_000),
    Image.new("RGB", (1, 1), "red"),
]


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as excinfo:
        call(*arguments, **options)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


# -- what there is


def test_every_engine_is_listed_and_what_is_not_there_says_how_to_make_it(plain_bundle: Bundle) -> None:
    engines = Engines(plain_bundle)
    choices = {choice.key: choice for choice in engines.choices}
    assert list(choices) == KEYS
    assert engines.default == "torch"
    assert choices["torch"].why is None
    assert choices["torch"].nbytes == (plain_bundle.path / "encoder.safetensors").stat().st_size
    options = {"onnx-fp32": "onnx", "onnx-fp16": "fp16", "onnx-int8": "int8", "tensorrt-fp16": "trt"}
    for key, option in {**options, "tensorrt-rtx-fp16": "fp16"}.items():
        why = choices[key].why
        assert why is not None
        assert f"`mvmr export {plain_bundle.path} --{option}`" in why
        assert choices[key].nbytes is None
        assert why in refusal(engines.get, key)
    assert "did you mean 'onnx-int8'" in refusal(engines.get, "onx-int8")
    assert (engines.space_id, engines.name, engines.dim) == (plain_bundle.space_id, "student", 512)
    assert dict(engines.heads) == {}


def test_a_file_that_is_there_can_be_had_with_its_size(onnx_bundle: Bundle) -> None:
    choices = {choice.key: choice for choice in Engines(onnx_bundle).choices}
    assert choices["onnx-fp32"].why is None
    assert choices["onnx-fp32"].nbytes == (onnx_bundle.path / FP32).stat().st_size
    assert choices["onnx-fp16"].why is not None


def test_one_engine_that_fails_leaves_the_others(onnx_bundle: Bundle) -> None:
    engines = Engines(onnx_bundle)
    assert "embedding_dim = 48" in refusal(engines.get("torch").embed, ODD[:1])
    assert engines.get("onnx-fp32").embed(ODD[:1]).shape == (1, serving.DIM)


def test_neither_a_bundle_nor_a_service_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="give one"):
        Engines(None)


# -- what they give


def test_torch_gives_the_digits_of_a_report(plain_bundle: Bundle, images: ImageSet) -> None:
    encoder = Engines(plain_bundle).get("torch")
    embeddings = encoder.embed(load(images))
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, represent(images, plain_bundle.student()))
    assert encoder.dim == embeddings.shape[1] == 512
    assert encoder.embed([]).shape == (0, 512)
    assert encoder.nbytes == (plain_bundle.path / "encoder.safetensors").stat().st_size
    assert np.array_equal(encoder.embed(ODD), plain_bundle.student().embed(ODD).numpy())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnx_gives_what_its_engine_gives(onnx_bundle: Bundle, tmp_path: Path, precision: Any) -> None:
    path = serving.copied(onnx_bundle.path, tmp_path)
    if precision != "fp32":  # what is in it does not matter here
        bundles.add_files(bundles.load(path), {FILES[precision]: onnx_bundle.file(FP32)})
    bundle = bundles.load(path)
    encoder = Engines(bundle).get(f"onnx-{precision}")
    assert encoder.label == f"ONNX {precision}"
    embeddings = encoder.embed(ODD)
    assert np.array_equal(embeddings, Engine.load(path, precision=precision).embed(ODD))
    np.testing.assert_allclose(embeddings, serving.embedded(serving.PREPROCESS.batch(ODD)), atol=1e-5)
    assert encoder.embed([]).shape == (0, serving.DIM)
    assert encoder.provenance is not None
    assert encoder.provenance.file == bundle.manifest.files[FILES[precision]]


def test_an_identity_changes_with_student_engine_and_file(
    onnx_bundle: Bundle, plain_bundle: Bundle, tmp_path: Path
) -> None:
    path = serving.copied(onnx_bundle.path, tmp_path)
    before = Engines(bundles.load(path)).get("onnx-fp32").identity
    assert before == Engines(onnx_bundle).get("onnx-fp32").identity
    serving.export(path, scale=1.5)
    after = Engines(bundles.load(path)).get("onnx-fp32").identity
    bundles.add_files(bundles.load(path), {INT8: onnx_bundle.file(FP32)})
    int8 = Engines(bundles.load(path)).get("onnx-int8").identity
    every = {before, after, int8, Engines(plain_bundle).get("torch").identity}
    assert len(every) == 4
    assert all(len(identity) == 64 and int(identity, 16) for identity in every)


def test_a_bundle_that_was_trained_again_meanwhile_is_refused(onnx_bundle: Bundle, tmp_path: Path) -> None:
    path = serving.copied(onnx_bundle.path, tmp_path)
    engines = Engines(bundles.load(path))
    shutil.rmtree(path)
    successor = serving.bundle(tmp_path / "other")
    manifest = bundles.load(successor).manifest
    (successor / "encoder.safetensors").write_bytes(b"other weights")
    changed = replace(manifest, files={**manifest.files, "encoder.safetensors": serving.staging.digest(
        successor / "encoder.safetensors") or ""})  # fmt: skip
    serving.write_json(successor / "bundle.json", changed.to_json())
    serving.export(successor)
    shutil.move(successor, path)
    assert "has changed since it was opened; start again" in refusal(engines.get, "onnx-fp32")


def test_an_engine_is_loaded_once_however_many_ask(onnx_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[str] = []

    def slow(artifact: Artifact, bundle: Bundle, **options: Any) -> Runner:
        times.append("loaded")
        threading.Event().wait(0.2)
        return open_artifact(artifact, bundle, **options)

    monkeypatch.setattr(module, "open_artifact", slow)
    engines, encoders = Engines(onnx_bundle), []
    assert not times
    threads = [threading.Thread(target=lambda: encoders.append(engines.get("onnx-fp32"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert times == ["loaded"]
    assert len({id(thread) for thread in encoders}) == 1


def test_heads_classify_as_the_service_does(onnx_bundle: Bundle) -> None:
    engines = Engines(onnx_bundle)
    assert engines.heads == serving.HEADS
    rows = engines.get("onnx-fp32").embed(ODD)
    for head in serving.HEADS:
        probabilities = engines.classify(rows, head)
        assert np.array_equal(probabilities, Engine.load(onnx_bundle.path).classify(rows, head))
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert "did you mean 'animals'" in refusal(engines.classify, rows, "animal")


# -- TensorRT, on its recording double


def with_own_engine(bundle: Bundle, double: Double) -> Bundle:
    """The bundle with an engine that says it is made from its weights."""
    model = fp16(bundle_hash=bundle.manifest.files["encoder.safetensors"], bundle_space_id=bundle.space_id)
    return bundles.load(with_engine(bundle, model, double).path)


@pytest.mark.usefixtures("card")
def test_tensorrt_runs_in_batches_that_its_engine_takes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = Double()
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    bundle = with_own_engine(request.getfixturevalue("engine_bundle"), double)
    (choice,) = (option for option in Engines(bundle).choices if option.key == "tensorrt-fp16")
    assert choice.why is None
    encoder = Engines(bundle).get("tensorrt-fp16")
    for count in (1, 2, 6, 7, 13):  # the double's engine takes 2 to 6
        pictures = [serving.photograph().rotate(9 * number) for number in range(count)]
        pixels = bundle.manifest.preprocessing.batch(pictures)
        sums = pixels.reshape(count, -1).sum(axis=1, dtype=np.float32)
        assert np.array_equal(encoder.embed(pictures), sums[:, None] + np.arange(DIM, dtype=np.float32))
    assert encoder.embed([]).shape == (0, DIM)
    assert bundle.manifest.preprocessing.crop == SIDE
    assert encoder.nbytes == choice.nbytes == tensorrt.find(bundle).path.stat().st_size


@pytest.mark.usefixtures("card")
def test_an_engine_of_tensorrt_for_another_machine_says_so(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles.load(with_engine(request.getfixturevalue("engine_bundle"), fp16(), Double()).path)
    monkeypatch.setitem(sys.modules, "tensorrt", Double("10.16.1.11"))
    reason = refusal(Engines(bundle).get, "tensorrt-fp16")
    assert "has no engine for this machine" in reason
    assert reason.endswith(f"mvmr export {bundle.path} --trt --rebuild")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TensorRT needs an NVIDIA GPU" in refusal(Engines(bundle).get, "tensorrt-fp16")


def test_tensorrt_for_rtx_runs_the_fp16_file_or_says_what_it_lacks(
    onnx_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(onnx_bundle.path, tmp_path / "student")
    content = onnx_bundle.file(FP32).read_bytes()
    bundle = bundles.add_files(bundles.load(tmp_path / "student"), {FP16: content})
    key = "tensorrt-rtx-fp16"
    with monkeypatch.context() as patch:
        patch.setattr(rtx_provider, "version", lambda: None)
        assert "can't be had: the provider tensorrt-rtx is not installed here" in refusal(Engines(bundle).get, key)
    plugin = Plugin(monkeypatch, tmp_path / "site")
    engines = Engines(bundle)
    (choice,) = (option for option in engines.choices if option.key == key)
    assert choice.label == "TensorRT for RTX fp16"
    assert choice.nbytes == bundle.file(FP16).stat().st_size
    encoder, plain = engines.get(key), engines.get("onnx-fp16")
    assert ("session", "1") in plugin.calls
    pictures = [serving.photograph().rotate(9 * number) for number in range(3)]
    np.testing.assert_allclose(encoder.embed(pictures), plain.embed(pictures), rtol=1e-4, atol=1e-4)
    assert plugin.runs == [3]
    assert encoder.identity != plain.identity
    assert plain.provenance is not None
    assert encoder.provenance is None  # a job on the processor computes the same file in single precision


# -- a service


@pytest.fixture(scope="module")
def service(onnx_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving.running(onnx_bundle.path, tmp_path_factory.mktemp("log")) as running:
        yield running.url


@pytest.fixture
def remote(service: str) -> Iterator[Engines]:
    with closing(Engines(None, service=service)) as engines:
        yield engines


def test_a_service_gives_what_its_engine_gives(remote: Engines, service: str, onnx_bundle: Bundle) -> None:
    engines = remote
    assert (engines.space_id, engines.name, engines.dim) == (onnx_bundle.space_id, "student", serving.DIM)
    assert engines.default == "service"
    assert [(choice.key, choice.label, choice.why, choice.nbytes) for choice in engines.choices] == [
        ("service", f"service at {service} (fp32)", None, None)
    ]
    encoder = engines.get("service")
    assert (encoder.dim, encoder.nbytes) == (serving.DIM, None)
    large = serving.photograph().resize((3000, 2001), Image.Resampling.BICUBIC)
    every = [*ODD, large, large.rotate(90, expand=True)]
    engine = Engine.load(onnx_bundle.path)
    assert np.array_equal(encoder.embed(every), engine.embed(every))
    assert max(encoder.prepare(large).size) == 40 * 3000 // 2001  # no more is sent than is looked at
    assert encoder.prepare(Image.new("RGB", (1, 50))).size == (1, 50)  # and nothing is enlarged here
    assert encoder.embed([]).shape == (0, serving.DIM)
    assert engines.heads == serving.HEADS
    with pytest.raises(ValueError, match="0 came with 9 embeddings"):
        engines.classify(encoder.embed(every), "animals")
    probabilities = engines.classify(encoder.embed(every), "animals", every)
    np.testing.assert_allclose(probabilities, engine.classify(engine.embed(every), "animals"), atol=1e-6)
    assert "did you mean 'colours'" in refusal(engines.classify, encoder.embed(every), "colour", every)


def test_a_service_stands_in_the_place_of_the_bundles_student(
    plain_bundle: Bundle, service: str, onnx_bundle: Bundle
) -> None:
    with closing(Engines(plain_bundle, service=service)) as engines:
        assert [choice.key for choice in engines.choices] == ["service"]
        assert engines.space_id == onnx_bundle.space_id


def test_a_service_that_was_given_another_model_meanwhile_is_refused(
    remote: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = remote.get("service")

    def other(self: Client, images: Sequence[Image.Image]) -> Answer:
        return Answer(np.zeros((len(images), serving.DIM), np.float32), "f" * 32, ())

    monkeypatch.setattr(Client, "embed", other)
    assert "serves another model than when the app was started" in refusal(encoder.embed, ODD[:1])


def test_a_service_that_is_not_there_or_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmr.serve.client.client.sleep", lambda seconds: None)
    assert "http://127.0.0.1:9" in refusal(Engines, None, service="http://127.0.0.1:9")
    assert "is no URL of a service" in refusal(Engines, None, service="localhost")
    for models in ([], [{}], [{"id": "x", "heads": 3}]):
        monkeypatch.setattr(Client, "models", lambda self, models=models: models)
        reason = refusal(Engines, None, service="http://name:secret@localhost:8000")
        assert "http://localhost:8000 doesn't answer as an mvmr service does" in reason


# -- the teacher


def test_a_teacher_gives_the_digits_of_a_report_with_its_text_tower(tmp_path: Path, images: ImageSet) -> None:
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
    assert "small" in refusal(load_teacher, bundle, None, None)


def test_a_teacher_that_can_not_be_had_is_one_sentence(plain_bundle: Bundle, tmp_path: Path) -> None:
    assert "names no teacher to compare with; give one: --teacher" in refusal(load_teacher, plain_bundle, None, None)
    assert "name it: --teacher" in refusal(load_teacher, None, None, None)
    assert "gone.pt of teacher ViT-B-32 does not exist" in refusal(load_teacher, None, "ViT-B-32", tmp_path / "gone.pt")
    save_file(build(SMALL).state_dict(), tmp_path / "w.safetensors")
    reason = refusal(load_teacher, None, "ViT-B-32", tmp_path / "w.safetensors")
    assert "as the image tower of ViT-B-32, does not" in reason
