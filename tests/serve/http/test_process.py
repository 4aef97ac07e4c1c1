"""`mvmr serve` as a process: signals, overload, clients that go, https, variables."""

from __future__ import annotations

import http.client
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest

from tests.serve import serving
from tests.serve.serving import FLOAT32, Running, damage, jpeg, problem, read_metric, rows, running

# Leaves in the file `counted` what the service has counted, when it ends.
COUNTING = """
import atexit
import mvmr.serve.http.run as run
made, create = [], run.create_app
def spy(*arguments):
    made.append(create(*arguments))
    return made[0]
run.create_app = spy
atexit.register(lambda: open("counted", "wb").write(made[0].state.service.metrics.text()))
"""
# A batch takes so many seconds.
SLOW = """
import time
from mvmr.serve.engine import Engine
quick = Engine.__call__
def slow(self, pixels):
    time.sleep({seconds})
    return quick(self, pixels)
Engine.__call__ = slow
"""
# Every batch but the first, which is the canary at the start, waits while there is a file `hold`; it makes `held`.
HOLDING = """
import os, time
from mvmr.serve.engine import Engine
quick = Engine.__call__
def held(self, pixels):
    if os.path.exists("hold"):
        open("held", "a").close()
    while os.path.exists("hold"):
        time.sleep(0.01)
    return quick(self, pixels)
Engine.__call__ = held
"""
ANSWER = 20.0


def asking(service: Running) -> httpx2.Client:
    return httpx2.Client(base_url=service.url, verify=False, timeout=ANSWER)


def metrics(service: Running, name: str) -> dict[str, float]:
    with asking(service) as client:
        return read_metric(client.get("/metrics").text, name)


# Signals


@pytest.mark.slow
def test_draining_probes_hear_of_it_before_the_door_closes(path: Path, tmp_path: Path) -> None:
    with running(path, tmp_path, drain=60.0) as service, asking(service) as client:
        service.process.send_signal(signal.SIGTERM)
        serving.wait_until(lambda: client.get("/readyz").status_code == 503, "the drain", service)
        answer = client.get("/readyz")
        assert problem(answer) == "not-ready"
        assert "draining" in answer.json()["detail"]
        assert answer.headers["connection"] == "close"
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/embed", content=jpeg()).status_code == 200
        assert service.stop() == 0  # a second time: at once


class Caller(threading.Thread):
    """A client that asks again and again until the door is closed, and keeps account.

    answered: whole answers, by status; cut: connections that ended before a byte of an answer, and were tried again
    torn: answers that began and did not end; closing: answers that ended their connection
    """

    def __init__(self, port: int, *, keep: bool, stop: threading.Event | None = None) -> None:
        super().__init__()
        self.answered: Counter[str] = Counter()
        self.cut = self.torn = self.closing = 0
        self._port, self._keep, self._stop_at, self.failed = port, keep, stop, ""

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER)
        headers = {"content-type": "image/jpeg", "accept": FLOAT32} | ({} if self._keep else {"connection": "close"})
        while not (self._stop_at and self._stop_at.is_set()):
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError:  # closed
                return
            try:
                connection.request("POST", "/v1/embed", jpeg(), headers)
                answer = connection.getresponse()
            except (OSError, http.client.RemoteDisconnected):
                self.cut += 1
                connection.close()
                continue
            try:
                answer.read()
            except (OSError, http.client.HTTPException):
                self.torn += 1
                connection.close()
                continue
            self.answered[str(answer.status)] += 1
            if answer.will_close or not self._keep:
                self.closing += 1
                connection.close()
        connection.close()


@pytest.mark.slow
def test_no_request_that_was_accepted_is_lost_when_it_is_stopped_under_load(path: Path, tmp_path: Path) -> None:
    """Lost: counted by the service, and not answered whole. Refused, or cut before it was read, is not lost."""
    wrapped = COUNTING + SLOW.format(seconds=0.02)
    with running(path, tmp_path, "--workers", "1", wrapped=wrapped, drain=0.3) as service:
        callers = [Caller(service.port, keep=number % 2 == 0) for number in range(12)]
        for caller in callers:
            caller.start()
        serving.wait_until(lambda: sum(sum(caller.answered.values()) for caller in callers) > 300, "the load", service)
        before = sum(sum(caller.answered.values()) for caller in callers)
        closing = sum(caller.closing for caller in callers if caller._keep)
        assert service.stop() == 0
        for caller in callers:
            caller.join(ANSWER)
    answered = sum((caller.answered for caller in callers), Counter[str]())
    totals = read_metric((tmp_path / "counted").read_text(), "mvmr_http_requests_total")
    assert sum(caller.torn for caller in callers) == 0
    assert totals == {'endpoint="/v1/embed",status="200"': answered["200"]}
    assert answered.total() > before + 12  # what came during the drain was accepted, too
    assert sum(caller.closing for caller in callers if caller._keep) >= closing + 6  # each was told to go elsewhere


@pytest.mark.slow
def test_an_engine_that_is_stuck_does_not_keep_it_from_ending(path: Path, tmp_path: Path) -> None:
    with running(path, tmp_path, "--grace", "1", "--workers", "1", wrapped=HOLDING) as service:
        (tmp_path / "hold").touch()
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(request())
            serving.wait_until((tmp_path / "held").exists, "the engine", service)
            service.process.send_signal(signal.SIGTERM)
            service.process.wait(ANSWER)


@pytest.mark.slow
def test_heads_are_read_again_at_sighup(path: Path, tmp_path: Path) -> None:
    mine = serving.copy_bundle(path, tmp_path)
    with running(mine, tmp_path) as service, asking(service) as client:
        serving.add_head(mine, "shapes", ("round", "square"))
        assert problem(client.post("/v1/classify?head=shapes", content=jpeg())) == "unknown-head"
        service.process.send_signal(signal.SIGHUP)
        service.wait_for("heads reloaded: animals, colours, shapes")
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 200
        damage(mine, "heads/shapes/head.json", b"{}")
        service.process.send_signal(signal.SIGHUP)
        service.wait_for("heads not reloaded")
        assert "heads/shapes/head.json has changed" in service.log_text
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 200
        damage(mine, "bundle.json", b"{")
        service.process.send_signal(signal.SIGHUP)
        service.wait_for("bundle.json is not valid JSON")
        assert client.get("/readyz").status_code == 200


# Overload, and clients that go away


def request(body: bytes = b"", *, length: int | None = None) -> bytes:
    body = body or jpeg()
    size = len(body) if length is None else length
    return b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + body


@pytest.mark.slow
def test_at_twice_its_capacity_it_answers_what_it_accepts_and_sends_the_rest_away(path: Path, tmp_path: Path) -> None:
    """40 images a second are its capacity: 4 at a time, a tenth of a second each time."""
    options = ["--workers", "1", "--max-batch", "4", "--queue", "8", "--max-items", "4"]
    with running(path, tmp_path, *options, wrapped=SLOW.format(seconds=0.1)) as service, asking(service) as client:
        wanted = rows(client.post("/v1/embed", content=jpeg(), headers={"accept": FLOAT32}))
        accepted: list[httpx2.Response] = []
        refused: list[httpx2.Response] = []
        failures: list[Exception] = []
        ready = []
        end = threading.Event()

        def load() -> None:
            with asking(service) as client:
                while not end.is_set():
                    try:
                        answer = client.post("/v1/embed", content=jpeg(), headers={"accept": FLOAT32})
                        (accepted if answer.status_code == 200 else refused).append(answer)
                    except httpx2.HTTPError as error:
                        failures.append(error)
                    time.sleep(0.02)

        clients = [threading.Thread(target=load) for _ in range(16)]
        for thread in clients:
            thread.start()
        memory = []
        for wait in (150, 300):  # answers; the first to warm up
            serving.wait_until(lambda wait=wait: len(accepted) >= wait, f"{wait} answers", service)
            ready.append(client.get("/readyz").status_code)
            memory.append(service.memory())
            assert sum(metrics(service, "mvmr_queue_images").values()) <= 8
        end.set()
        for thread in clients:
            thread.join()
        assert failures == []
        assert ready == [200, 200]
        for answer in accepted:
            np.testing.assert_array_equal(rows(answer), wanted)
        assert len(refused) >= len(accepted)  # so it was twice what it can do
        assert {problem(answer) for answer in refused} == {"busy"}
        assert all(1 <= int(answer.headers["retry-after"]) <= 10 for answer in refused)
        assert memory[1] - memory[0] < 30 * 2**20
        assert metrics(service, "mvmr_queue_images") == {"": 0}


@pytest.mark.slow
def test_clients_that_have_gone_cost_no_inference(path: Path, tmp_path: Path) -> None:
    with running(path, tmp_path, "--workers", "1", wrapped=HOLDING) as service:
        before = metrics(service, "mvmr_images_total")['outcome="embedded"']
        hold = tmp_path / "hold"
        hold.touch()
        with socket.create_connection(("127.0.0.1", service.port), timeout=ANSWER) as patient:
            patient.sendall(request())
            serving.wait_until((tmp_path / "held").exists, "the engine", service)
            gone = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(6)]
            for connection in gone:
                connection.sendall(request())
            early = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(3)]
            for connection in early:  # a body that ends early
                connection.sendall(request(jpeg()[:100], length=len(jpeg())))
            serving.wait_until(lambda: metrics(service, "mvmr_queue_images")[""] == 7, "the requests", service)
            for connection in gone + early:
                connection.close()
            cause = 'cause="client-gone"'
            serving.wait_until(
                lambda: metrics(service, "mvmr_errors_total").get(cause) == 9, "their going to be seen", service
            )
            assert metrics(service, "mvmr_queue_images") == {"": 1}
            hold.unlink()
            assert patient.recv(12) == b"HTTP/1.1 200"
        images = metrics(service, "mvmr_images_total")
        assert images['outcome="embedded"'] - before == 1
        assert (
            metrics(service, "mvmr_batch_images_count")[""] <= 5
        )  # two to warm up, the canary, the patient one, the canary
        with asking(service) as client:
            assert client.get("/readyz").status_code == 200
        assert service.stop() == 0
        assert "Traceback" not in service.log_text


# The rest of its flags


@pytest.mark.slow
@pytest.mark.slow
def test_connections_that_say_nothing_are_closed_and_many_may_be_open(path: Path, tmp_path: Path) -> None:
    # 80 connections are too many for a limit of 64 files, which is raised
    wrapped = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[1]}))
"""
    with running(path, tmp_path, "--head-seconds", "0.5", wrapped=wrapped) as service, ExitStack() as stack:
        port = httpx2.URL(service.url).port
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(80)]
        silent[0].sendall(b"POST /v1/embed HTTP/1.1\r\nhost: here\r\n")  # and no more of its head
        for connection in silent:
            connection.settimeout(30)
            with suppress(ConnectionResetError):
                assert connection.recv(12) in (b"", b"HTTP/1.1 408")
        answer = httpx2.post(f"{service.url}/v1/embed", content=jpeg(), headers={"content-type": "image/jpeg"})
        assert answer.status_code == 200


@pytest.mark.slow
def test_https(path: Path, tmp_path: Path) -> None:
    cert, key = serving.certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(cert))
    with running(path, tmp_path, "--tls-cert", str(cert), "--tls-key", str(key)) as service:
        assert service.url.startswith("https://")
        with httpx2.Client(base_url=service.url, verify=trusting) as client:
            assert rows(client.post("/v1/embed", content=jpeg(), headers={"accept": FLOAT32})).shape == (1, serving.DIM)
            with pytest.raises(httpx2.HTTPError), httpx2.Client(verify=False) as plain:
                plain.get(f"http://127.0.0.1:{service.port}/healthz")
            service.process.send_signal(signal.SIGINT)
            assert service.process.wait(15) == 0  # it does not wait for a connection that says nothing
        assert "Traceback" not in service.log_text
        assert str(key) not in service.log_text


@pytest.mark.slow
def test_every_flag_is_also_a_variable(path: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    env = {
        "MVMR_API_KEYS": str(tmp_path / "keys"), "MVMR_MAX_ITEMS": "2", "MVMR_QUEUE": "3", "MVMR_HOST": "127.0.0.2",
        "MVMR_CORS": "https://one.example https://two.example",
    }  # fmt: skip
    with running(path, tmp_path, env=env) as service, asking(service) as client:
        assert service.url.startswith("http://127.0.0.2:")
        assert problem(client.get("/v1/models")) == "wrong-key"
        key = {"x-api-key": "0123456789abcdef", "origin": "https://two.example"}
        answer = client.post("/v1/embed", json={"input": ["a"] * 3}, headers=key)
        assert problem(answer) == "too-many-items"
        assert answer.headers["access-control-allow-origin"] == "https://two.example"
        assert "0123456789abcdef" not in service.log_text
