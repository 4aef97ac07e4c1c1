"""`mvmr serve` as a process: what keeps it from starting, signals, overload, clients that go, https."""

from __future__ import annotations

import http.client
import json
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
from click.testing import CliRunner

from mvmr.bundles import bundle as bundles
from mvmr.cli.main import main
from mvmr.export.artifacts import ARTIFACTS
from mvmr.serve.http import run
from tests.serve import serving
from tests.serve.serving import FLOAT32, Running, counted, jpeg, problem, rows, running

# Leaves in the file `counted` what the service has counted, when it ends.
FP32 = ARTIFACTS["onnx"].file

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


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.bundle(tmp_path_factory.mktemp("bundle"))


def asking(service: Running) -> httpx2.Client:
    return httpx2.Client(base_url=service.url, verify=False, timeout=ANSWER)


def metrics(service: Running, name: str) -> dict[str, float]:
    with asking(service) as client:
        return counted(client.get("/metrics").text, name)


# What keeps it from starting: one line, before the door opens


class Started(Exception):
    """It has opened its door."""


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def started(*arguments: object) -> None:
        raise Started

    monkeypatch.setattr(run, "_run", started)


def refusal(*argv: str | Path) -> str:
    """The one line that the command ends with; click says how it is used before, where a value is none for a flag."""
    result = CliRunner().invoke(main, ["serve", *map(str, argv), *([] if "--port" in argv else ["--port", "0"])])
    lines = result.stderr.splitlines()
    if result.exit_code == 2:
        assert lines.pop(0).startswith("Usage: ")
        return lines[-1].removeprefix("Error: ")
    assert result.exit_code == 1, result.exception or result.output
    (line,) = lines
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def damage(path: Path, name: str, content: bytes | None, *, listed: bool = False) -> None:
    """Change a file of a bundle; `listed`: so that its hash is right."""
    if listed:
        bundles.add_files(bundles.load(path, verify=False), {name: content or b""})
    elif content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("name", "content", "listed", "told"),
    [
        ("bundle.json", b"{", False, "bundle.json is not valid JSON"),
        ("bundle.json", None, False, "it holds no bundle.json"),
        (FP32, None, False, "onnx/encoder.fp32.onnx is missing"),
        (FP32, b"", False, "onnx/encoder.fp32.onnx has changed since it was written"),
        (FP32, b"not an ONNX file", True, "onnxruntime cannot load"),
        ("onnx/encoder.fp32.json", b"{}", False, "onnx/encoder.fp32.json has changed"),
        ("onnx/encoder.fp32.json", b'{"canary": "***"}', True, "encoder.fp32.json is not the report of an export"),
        ("onnx/encoder.fp32.json", b'{"canary": 5}', True, "encoder.fp32.json is not the report of an export"),
        ("onnx/encoder.fp32.json", b'{"canary": "AAAA"}', True, "encoder.fp32.json is not the report of an export"),
        ("onnx/encoder.fp32.json", b'{"canary": "AAAAAAAAAAAAAAAA"}', True, "encoder.fp32.json is not the report"),
        ("heads/animals/head.safetensors", b"", False, "heads/animals/head.safetensors has changed"),
        ("heads/animals/head.json", None, False, "heads/animals/head.json is missing"),
    ],
)  # fmt: skip
def test_a_bundle_that_cannot_be_read(
    path: Path, tmp_path: Path, name: str, content: bytes | None, listed: bool, told: str
) -> None:
    mine = serving.copied(path, tmp_path)
    damage(mine, name, content, listed=listed)
    said = refusal(mine)
    assert told in said
    assert str(mine) in said


@pytest.mark.usefixtures("no_start")
def test_no_bundle_or_nothing_exported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path / "gone") == f"no bundle at {tmp_path / 'gone'}: there is no such folder"
    monkeypatch.chdir(tmp_path)
    assert "no bundle below runs" in refusal()
    assert "has no int8 file; make it by `mvmr export" in refusal(path, "--precision", "int8")
    manifest = json.loads((path / "bundle.json").read_text())
    mine = serving.copied(path, tmp_path)
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if not name.startswith("onnx")}
    (mine / "bundle.json").write_text(json.dumps(manifest))
    assert f"bundle {mine} has nothing exported" in refusal(mine)


@pytest.mark.usefixtures("no_start")
def test_an_export_of_another_student(path: Path, tmp_path: Path) -> None:
    mine = serving.copied(path, tmp_path)
    manifest = json.loads((mine / "bundle.json").read_text())
    manifest["files"][bundles.ENCODER] = "0" * 64
    (mine / "bundle.json").write_text(json.dumps(manifest))
    assert f"{FP32}: it is stale, made from another student" in refusal(mine)


@pytest.mark.usefixtures("no_start")
def test_a_port_in_use(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(path, "--port", str(port))
    assert said == f"cannot listen at 127.0.0.1:{port}: Address already in use; give another --port"


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--port", "70000"], "70000"),
        (["--port", "-1"], "-1"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1:0"),
        (["--host", "192.0.2.1"], "Cannot assign requested address"),
        (["--precision", "fp64"], "unknown precision 'fp64'"),
        (["--provider", "cdua"], "unknown provider 'cdua'"),
        (["--provider", "cuda"], "has no cuda"),
        (["--queue", "10"], "max_items = 64 is more than queue = 10 holds"),
        (["--queue", "0"], "queue = 0 must be at least 1"),
        (["--max-body-mb", "0"], "0.0 must lie between"),
        (["--max-body-mb", "nan"], "nan must lie between"),
        (["--decode-seconds", "nan"], "nan"),
        (["--format", "JPG"], "unknown format 'JPG'; did you mean 'JPEG'"),
        (["--grace", "nan"], "nan must lie between"),
        (["--drain", "nan"], "nan must lie between"),
        (["--api-keys", "gone"], "cannot read the API keys in gone: No such file"),
        (["--tls-cert", "gone"], "https takes both --tls-cert and --tls-key"),
        (["--tls-cert", "gone", "--tls-key", "gone"], "cannot use gone with gone: No such file"),
        (["--tls-cert", __file__, "--tls-key", __file__], "test_process.py"),
        (["--index", "gone"], "no index at gone"),
    ],
)
def test_settings_that_cannot_be(path: Path, options: list[str], told: str) -> None:
    assert told in refusal(path, *options)


@pytest.mark.usefixtures("no_start")
def test_what_is_refused_here_would_start_without_the_fault(path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(path), "--port", "0"])
    assert isinstance(result.exception, Started)


@pytest.mark.slow
def test_as_a_process_it_says_one_line_and_ends(path: Path, tmp_path: Path) -> None:
    mine = serving.copied(path, tmp_path)
    damage(mine, FP32, b"")
    said = serving.refused(mine)
    assert said.startswith(f"bundle {mine} is damaged: {FP32} has changed since it was written")


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
        serving.wait_until(lambda: sum(sum(each.answered.values()) for each in callers) > 300, "the load", service)
        before = sum(sum(each.answered.values()) for each in callers)
        closing = sum(each.closing for each in callers if each._keep)
        assert service.stop() == 0
        for caller in callers:
            caller.join(ANSWER)
    answered = sum((caller.answered for caller in callers), Counter[str]())
    said = counted((tmp_path / "counted").read_text(), "mvmr_http_requests_total")
    assert sum(caller.torn for caller in callers) == 0
    assert said == {'endpoint="/v1/embed",status="200"': answered["200"]}
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
    mine = serving.copied(path, tmp_path)
    with running(mine, tmp_path) as service, asking(service) as client:
        serving.add_head(mine, "shapes", ("round", "square"))
        assert problem(client.post("/v1/classify?head=shapes", content=jpeg())) == "unknown-head"
        service.process.send_signal(signal.SIGHUP)
        service.wait_for("heads reloaded: animals, colours, shapes")
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 200
        damage(mine, "heads/shapes/head.json", b"{}")
        service.process.send_signal(signal.SIGHUP)
        service.wait_for("heads not reloaded")
        assert "heads/shapes/head.json has changed" in service.said
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
        for each in clients:
            each.start()
        memory = []
        for wait in (150, 300):  # answers; the first to warm up
            serving.wait_until(lambda wait=wait: len(accepted) >= wait, f"{wait} answers", service)
            ready.append(client.get("/readyz").status_code)
            memory.append(service.memory())
            assert sum(metrics(service, "mvmr_queue_images").values()) <= 8
        end.set()
        for each in clients:
            each.join()
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
            for each in gone:
                each.sendall(request())
            early = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(3)]
            for each in early:  # a body that ends early
                each.sendall(request(jpeg()[:100], length=len(jpeg())))
            serving.wait_until(lambda: metrics(service, "mvmr_queue_images")[""] == 7, "the requests", service)
            for each in gone + early:
                each.close()
            cause = 'cause="client-gone"'
            serving.wait_until(
                lambda: metrics(service, "mvmr_errors_total").get(cause) == 9, "their going to be seen", service
            )
            assert metrics(service, "mvmr_queue_images") == {"": 1}
            hold.unlink()
            assert patient.recv(12) == b"HTTP/1.1 200"
        found = metrics(service, "mvmr_images_total")
        assert found['outcome="embedded"'] - before == 1
        assert (
            metrics(service, "mvmr_batch_images_count")[""] <= 5
        )  # two to warm up, the canary, the patient one, the canary
        with asking(service) as client:
            assert client.get("/readyz").status_code == 200
        assert service.stop() == 0
        assert "Traceback" not in service.said


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
        for each in silent:
            each.settimeout(30)
            with suppress(ConnectionResetError):
                assert each.recv(12) in (b"", b"HTTP/1.1 408")
        answer = httpx2.post(f"{service.url}/v1/embed", content=jpeg(), headers={"content-type": "image/jpeg"})
        assert answer.status_code == 200


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
        assert "Traceback" not in service.said
        assert str(key) not in service.said


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
        assert "0123456789abcdef" not in service.said
