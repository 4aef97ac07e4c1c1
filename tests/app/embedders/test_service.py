"""A service in the student's place gives what its engine gives; what it can't be asked is one sentence."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from mvmr.app.embedders.engines import Engines
from mvmr.bundles.bundle import Bundle
from mvmr.serve.client import Client
from mvmr.serve.client import Embeddings as Answer
from mvmr.serve.engine import Engine
from tests.app.embedders.encoders import ODD, refusal
from tests.serve import serving

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.fixture(scope="module")
def service(onnx_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving.running(onnx_bundle.path, tmp_path_factory.mktemp("log")) as running:
        yield running.url


@pytest.fixture
def remote(service: str) -> Iterator[Engines]:
    with closing(Engines(None, service=service)) as engines:
        yield engines


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_service_that_was_given_another_model_meanwhile_is_refused(
    remote: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = remote.get("service")

    def other(self: Client, images: Sequence[Image.Image]) -> Answer:
        return Answer(np.zeros((len(images), serving.DIM), np.float32), "f" * 32, ())

    monkeypatch.setattr(Client, "embed", other)
    assert "serves another model than when the app was started" in refusal(encoder.embed, ODD[:1])


@pytest.mark.slow
def test_a_service_that_is_not_there_or_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmr.serve.client.client.sleep", lambda seconds: None)
    assert "http://127.0.0.1:9" in refusal(Engines, None, service="http://127.0.0.1:9")
    assert "is no URL of a service" in refusal(Engines, None, service="localhost")
    for models in ([], [{}], [{"id": "x", "heads": 3}]):
        monkeypatch.setattr(Client, "models", lambda self, models=models: models)
        reason = refusal(Engines, None, service="http://name:secret@localhost:8000")
        assert "http://localhost:8000 doesn't answer as an mvmr service does" in reason
