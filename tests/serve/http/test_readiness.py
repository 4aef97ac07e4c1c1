"""A service is ready exactly while its engine does what was verified, and finds out cheaply."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest

from mvmr.serve import Engine
from mvmr.serve.http import readiness
from mvmr.serve.http.batcher import Batcher
from tests.serve import serving
from tests.serve.inprocess import SECONDS, Floats, Pixels, Session, serve
from tests.serve.serving import jpeg


@pytest.fixture
def asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_FRESH", -1.0)


def drift(factor: float, pixels: Pixels) -> Floats:
    return serving.embed_by_hand(pixels) * np.float32(factor)


@pytest.mark.usefixtures("asked_every_time")
def test_it_is_not_ready_while_its_engine_drifts(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine)) as client:
        for factor, status in ((1.0, 200), (1.0 + 1e-2, 503), (1.0, 200)):
            session.result = partial(drift, factor)
            answer = client.get("/readyz")
            assert answer.status_code == status
            assert serving.read_metric(client.get("/metrics").text, "mvmr_ready")[""] == (status == 200)
            if status == 503:
                assert "off by 0.01 of its length: it has drifted" in answer.json()["detail"]
                assert client.get("/healthz").status_code == 200


@pytest.mark.usefixtures("asked_every_time")
def test_it_is_not_ready_while_its_engine_is_stuck(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine), stuck_seconds=0.05) as client:
        with session.hold():
            assert "has not answered for 0.05 s" in client.get("/readyz").json()["detail"]
            session.wait_for_batch()
            assert "has been at one batch for" in client.get("/readyz").json()["detail"]
        serving.wait_until(lambda: client.get("/readyz").status_code == 200, "the engine")


@pytest.mark.usefixtures("asked_every_time")
def test_it_is_ready_while_all_its_room_is_taken_and_a_probe_waits_for_no_request(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine), queue=6, max_items=1, max_batch=1) as client:
        batcher: Batcher = client.app.state.service._batcher  # type: ignore[attr-defined]
        probes: list[int] = []
        asking = [threading.Thread(target=lambda: client.post("/v1/embed", content=jpeg())) for _ in range(4)]
        probing = threading.Thread(target=lambda: probes.append(client.get("/readyz").status_code))
        with session.hold():
            for thread in asking:
                thread.start()
            session.wait_for_batch()
            serving.wait_until(lambda: batcher._count == 3, "the requests")
            probing.start()
            serving.wait_until(lambda: batcher._count == 4, "the probe")
            session.let_go(2)  # the batch at hand, and the one after it
            probing.join(SECONDS)
            assert probes == [200]
            assert batcher._count >= 2
        for thread in asking:
            thread.join()


def test_probes_cost_the_engine_one_image_a_second(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine)) as client:
        before = len(session.batches)
        assert [client.get("/readyz").status_code for _ in range(50)] == [200] * 50
    assert len(session.batches) - before <= 3


def test_draining_it_is_not_ready_but_answers_and_ends_the_connection(engine: Engine) -> None:
    with serve(engine) as client:
        assert "connection" not in client.get("/healthz").headers
        client.app.state.service.draining = True  # type: ignore[attr-defined]
        assert "draining" in client.get("/readyz").json()["detail"]
        answer = client.post("/v1/embed", content=jpeg())
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


def test_full_batches_that_fail_are_told_of_at_the_start(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def result(pixels: Pixels) -> Floats:
        if len(pixels) > 1:
            raise RuntimeError("no memory for so many")
        return serving.embed_by_hand(pixels)

    with serve(Session(result).within(engine)) as client:
        assert client.get("/readyz").status_code == 200  # one at a time, it does
    assert [record.getMessage() for record in caplog.records if record.levelno >= 40] == [
        "the engine failed on a batch of 4"
    ] * 2
