"""Every engine gives what it gives elsewhere, digit for digit; what can't be had says why and what to do."""

import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvmr.app.embedders import engines as module
from mvmr.app.embedders.engines import Engines
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.export.artifacts import ARTIFACTS, Artifact
from mvmr.export.runtimes import Runner, open_artifact
from mvmr.export.tensorrt import engine as tensorrt
from mvmr.export.tensorrt import rtx_provider
from mvmr.representations.cache import represent
from mvmr.serve.engine import Engine
from tests.app.embedders.encoders import ODD, load, patches, refusal
from tests.export.tensorrt.tensorrt_double import DIM, SIDE, Double, card, engine_bundle, fp16, with_engine  # noqa: F401
from tests.export.tensorrt.test_rtx import Plugin
from tests.making import SMALL
from tests.serve import serving

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")
FILES = {row.precision: row.file for row in ARTIFACTS.values() if row.runtime == "onnxruntime"}
FP32, FP16, INT8 = (FILES[precision] for precision in ("fp32", "fp16", "int8"))
KEYS = ["torch", "onnx-fp32", "onnx-fp16", "onnx-int8", "tensorrt-fp16", "tensorrt-rtx-fp16"]


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
    assert (engines.space_id, engines.name, engines.dim) == (plain_bundle.space_id, "student", SMALL.width)
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


def test_torch_gives_the_digits_of_a_report(plain_bundle: Bundle) -> None:
    images = patches()
    encoder = Engines(plain_bundle).get("torch")
    embeddings = encoder.embed(load(images))
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, represent(images, plain_bundle.student()))
    assert encoder.dim == embeddings.shape[1] == SMALL.width
    assert encoder.embed([]).shape == (0, SMALL.width)
    assert encoder.nbytes == (plain_bundle.path / "encoder.safetensors").stat().st_size
    assert np.array_equal(encoder.embed(ODD), plain_bundle.student().embed(ODD).numpy())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnx_gives_what_its_engine_gives(onnx_bundle: Bundle, tmp_path: Path, precision: Any) -> None:
    path = serving.copy_bundle(onnx_bundle.path, tmp_path)
    if precision != "fp32":  # what is in it does not matter here
        bundles.add_files(bundles.load(path), {FILES[precision]: onnx_bundle.file(FP32)})
    bundle = bundles.load(path)
    encoder = Engines(bundle).get(f"onnx-{precision}")
    assert encoder.label == f"ONNX {precision}"
    embeddings = encoder.embed(ODD)
    assert np.array_equal(embeddings, Engine.load(path, precision=precision).embed(ODD))
    np.testing.assert_allclose(embeddings, serving.embed_by_hand(serving.PREPROCESS.batch(ODD)), atol=1e-5)
    assert encoder.embed([]).shape == (0, serving.DIM)
    assert encoder.provenance is not None
    assert encoder.provenance.file == bundle.manifest.files[FILES[precision]]


def test_an_identity_changes_with_student_engine_and_file(
    onnx_bundle: Bundle, plain_bundle: Bundle, tmp_path: Path
) -> None:
    path = serving.copy_bundle(onnx_bundle.path, tmp_path)
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
    path = serving.copy_bundle(onnx_bundle.path, tmp_path)
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
