"""Connections of a running service: what one may take, whose they are, and how each ends. By hand, byte by byte."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest

from mvmr.serve.http.connections.turns import Turns
from mvmr.serve.shares import Recent, Shares, owner_of
from tests.serve import serving
from tests.serve.serving import Running, counted, jpeg, problem, running

HOST = b"host: here\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
ALIVE = b'{"status":"ok"}'
MIB = 2**20
OPTIONS = [
    "--head-seconds", "1", "--body-seconds", "1", "--answer-seconds", "1", "--idle-seconds", "6",
    "--max-connections", "40", "--max-connections-per-address", "20", "--max-unsent-mb", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def service(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(path, tmp_path_factory.mktemp("service"), *OPTIONS) as found:
        yield found
        assert found.stop() == 0
        assert "Traceback" not in found.said


@contextmanager
def connected(service: Running, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), 10, (source, 0)) as opened:
        opened.settimeout(20)
        yield opened


def everything(opened: socket.socket) -> bytes:
    """All that is said until the other side ends the connection."""
    said = b""
    with suppress(ConnectionResetError):
        while got := opened.recv(2**16):
            said += got
    return said


def answers(service: Running, *sent: bytes, half: bool = False, source: str = "127.0.0.1") -> list[httpx2.Response]:
    """The answers at a connection that is sent this and waits for its end."""
    with connected(service, source) as opened:
        for piece in sent:
            opened.sendall(piece)
        if half:
            opened.shutdown(socket.SHUT_WR)
        return parsed(everything(opened))


def parsed(said: bytes) -> list[httpx2.Response]:
    found = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("content-length", 0))
        if not status.startswith("HTTP/1.1 100"):
            found.append(httpx2.Response(int(status.split()[1]), headers=headers, content=said[:length]))
        said = said[length:]
    return found


def is_alive(opened: socket.socket, request: bytes = GET) -> bool:
    """Whether the service answers at a connection."""
    opened.sendall(request)
    said = b""
    while not said.endswith(ALIVE):
        if not (got := opened.recv(2**16)):
            return False
        said += got
    return True


def post(more: bytes = b"", *, body: bytes | None = None) -> bytes:
    body = jpeg() if body is None else body
    head = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"content-type: image/jpeg\r\n" + more
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def connections(service: Running) -> float:
    with httpx2.Client(base_url=service.url, headers={"connection": "close"}) as client:
        return counted(client.get("/metrics").text, "mvmr_connections")[""]


def causes(service: Running) -> dict[str, float]:
    with httpx2.Client(base_url=service.url, headers={"connection": "close"}) as client:
        found = counted(client.get("/metrics").text, "mvmr_errors_total")
    return {name.split('"')[1]: value for name, value in found.items()}


# Heads


@pytest.mark.parametrize(
    ("request_", "name", "told"),
    [
        (b"GET / HTTP/1.1\r\n" + HOST + b"a: " + b"b" * 300_000 + b"\r\n\r\n", "large-head", "--max-head-kb"),
        (b"GET /" + b"b" * 300_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", "large-head", "--max-head-kb"),
        (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 100 + b"\r\n", "large-head", "--max-headers"),
        (b"GET / HTTP/1.1\r\nhost", "slow-head", "--head-seconds"),
        (GET + b"GET / HTTP/1.1\r\nhost", "slow-head", "--head-seconds"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", "malformed", "one Host header, this one has 0"),
        (b"GET /healthz HTTP/1.1\r\n" + HOST * 2 + b"\r\n", "malformed", "this one has 2"),
        (b"GET /healthz HTTP/1.1\r\nhost: a b\r\n\r\n", "malformed", "not the name of a host"),
        (b"CONNECT here:80 HTTP/1.1\r\n" + HOST + b"\r\n", "wrong-method", "no proxy"),
        (b"\x16\x03\x01 not this protocol\r\n\r\n", "malformed", "can't be read"),
        (post(b"transfer-encoding: chunked\r\n"), "malformed", "can't be read"),
    ],
)
def test_a_head_that_is_not_as_it_may_be(service: Running, request_: bytes, name: str, told: str) -> None:
    *before, last = answers(service, request_)
    assert [each.content for each in before] == [ALIVE] * request_.count(GET)
    assert problem(last) == name
    assert told in last.json()["detail"]
    assert last.headers["connection"] == "close"


def test_megabytes_of_headers_take_no_memory(service: Running) -> None:
    before = service.memory()
    with connected(service) as opened, suppress(OSError):
        opened.sendall(b"GET / HTTP/1.1\r\n" + HOST)
        for _ in range(60):
            opened.sendall(b"a: b\r\n" * (MIB // 6))
    assert service.memory() - before < 20 * MIB


def test_a_connection_on_which_nothing_comes_is_closed(service: Running) -> None:
    began = time.monotonic()
    assert answers(service) == []
    assert 0.9 < time.monotonic() - began < 5


def test_between_requests_it_may_be_silent_for_longer(service: Running) -> None:
    with connected(service) as opened:
        for _ in range(2):
            assert is_alive(opened)
            time.sleep(1.3)  # above --head-seconds, below --idle-seconds
        assert everything(opened) == b""


def test_an_empty_line_between_requests_means_nothing(service: Running) -> None:
    with connected(service) as opened:
        assert is_alive(opened)
        opened.sendall(b"\r\n")
        time.sleep(1.3)
        assert is_alive(opened)


def test_a_head_may_come_in_pieces(service: Running) -> None:
    head = b"GET /healthz HTTP/1.1\r\n" + HOST + (b"a: " + b"b" * 994 + b"\r\n") * 30 + b"\r\n"  # 30 of 32 KiB
    with connected(service) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(head), 1500):
            opened.sendall(head[start : start + 1500])
            time.sleep(0.005)
        assert is_alive(opened, b"")


# Requests, one behind the other


def test_requests_may_be_sent_before_their_answers_but_not_any_number(service: Running) -> None:
    assert [each.content for each in answers(service, GET * 10, half=True)] == [ALIVE] * 10
    found = answers(service, GET * 5000)
    assert [each.content for each in found] == [ALIVE] * 17  # one was begun, sixteen may wait
    assert found[-1].headers["connection"] == "close"


def test_what_comes_whole_before_garbage_is_answered(service: Running) -> None:
    found = answers(service, post() + GET + b"\0\0\0\r\n\r\n")
    assert [each.status_code for each in found] == [200, 200]
    assert "dim" in found[0].json()
    assert found[1].content == ALIVE


def test_garbage_in_a_body_is_the_answer_to_its_request(service: Running) -> None:
    chunked = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n"
    (found,) = answers(service, chunked + b"5\r\nabcde\r\nnothing\r\n")
    assert problem(found) == "malformed"
    (found,) = answers(service, chunked + b"1\r\na\r\n" * 100_000)
    assert "tiny pieces" in found.json()["detail"]
    (found,) = answers(service, GET + chunked + b"nothing\r\n")
    assert found.content == ALIVE  # and no more, as it can't be told where the next request begins


def test_who_stays_after_he_was_refused_is_not_kept(service: Running) -> None:
    refused = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n"
    begun = [b"\r\n5\r\nabcde\r\nnothing\r\n", b"expect: 100-continue\r\n\r\nnothing\r\n"]
    with ExitStack() as stack:
        for number in range(10):
            opened = stack.enter_context(connected(service, "127.0.4.1"))
            opened.sendall(refused + begun[number % 2])
            assert b"400 Bad Request" in opened.recv(2**16)
        serving.wait_until(lambda: connections(service) < 10, "their end", service)


@pytest.mark.parametrize("body", [b"nothing\r\n", b"1\r\na\r\n" * 5000])
def test_a_body_that_cannot_be_read_is_no_second_answer(service: Running, body: bytes) -> None:
    with connected(service) as opened:
        opened.sendall(b"POST /nowhere HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n")
        assert opened.recv(12) == b"HTTP/1.1 404"
        time.sleep(0.2)
        opened.sendall(body)
        assert b"HTTP/1.1" not in everything(opened)


def test_trailers_are_no_headers(path: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    chunked = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n0\r\n"
    with running(path, tmp_path, "--api-keys", str(tmp_path / "keys")) as service, connected(service) as opened:
        opened.sendall(chunked + b"x-api-key: 0123456789abcdef\r\n\r\n")
        assert opened.recv(12) == b"HTTP/1.1 401"


# Other ways of speaking


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0, HTTP/1.1"])
def test_who_would_rather_speak_another_protocol_is_answered_in_this_one(service: Running, protocol: bytes) -> None:
    more = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: " + protocol + b"\r\nhttp2-settings: AAMAAABk\r\n"
    found = answers(service, post(more) + post(more), half=True)
    assert [each.status_code for each in found] == [200, 200]
    assert found[0].json()["results"][0]["width"] == 240
    assert found[0].json() == found[1].json()


def test_who_says_no_more_than_his_request_is_answered(service: Running) -> None:
    (found,) = answers(service, post(), half=True)
    assert found.json()["results"][0]["width"] == 240
    assert answers(service, post()[:-1], half=True) == []  # it was not whole


def test_who_waits_to_be_told_to_send_a_body_is_not_taken_by_his_word(service: Running) -> None:
    """After a refusal its body may come or not: what comes next would be read as the one or the other."""
    head = b"POST /nowhere HTTP/1.1\r\n" + HOST + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\n"
    (found,) = answers(service, head)
    assert (problem(found), found.headers["connection"]) == ("unknown-path", "close")


def test_a_body_that_nobody_waits_for_may_not_take_for_ever(service: Running) -> None:
    with connected(service) as opened:
        opened.sendall(b"POST /nowhere HTTP/1.1\r\n" + HOST + b"content-length: 1000000\r\n\r\n")
        assert b"404" in opened.recv(2**16)
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < 10:
                opened.sendall(b"a")
                time.sleep(0.1)
        assert time.monotonic() - began < 5


def test_curl_asks_for_http2_and_is_answered(service: Running, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    asked = ["curl", "--silent", "--http2", "--data-binary", f"@{tmp_path / 'a.jpg'}", "--header"]
    done = subprocess.run(
        [*asked, "content-type: image/jpeg", f"{service.url}/v1/embed"], capture_output=True, timeout=30
    )
    assert json.loads(done.stdout)["results"][0]["width"] == 240


# Answers that nobody reads


def test_answers_that_nobody_reads_take_a_bounded_memory_and_time(service: Running) -> None:
    # from two addresses: one has twenty connections
    asked = b"GET /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n"
    before, cause = service.memory(), causes(service).get("slow-answer", 0)
    with ExitStack() as stack:
        for number in range(38):
            opened = stack.enter_context(connected(service, f"127.0.1.{1 + number // 19}"))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            opened.sendall(asked * 15)
        time.sleep(0.5)
        assert service.memory() - before < 40 * MIB
        with httpx2.Client(base_url=service.url) as client:
            assert client.get("/healthz").status_code == 200
        serving.wait_until(lambda: causes(service).get("slow-answer", 0) > cause, "their end", service, 20)


# How many, and whose


def test_who_has_many_connections_loses_those_that_are_idle_to_others(path: Path, tmp_path: Path) -> None:
    options = ["--max-connections", "40", "--max-connections-per-address", "20"]
    with running(path, tmp_path, *options) as service, ExitStack() as stack:
        mine = [stack.enter_context(connected(service, "127.0.2.1")) for _ in range(25)]
        theirs = [stack.enter_context(connected(service, "127.0.2.2")) for _ in range(20)]
        for opened in (mine[-1], theirs[-1]):
            assert is_alive(opened)
        for opened in mine[:5]:  # above twenty, those longest idle went
            opened.settimeout(5)
            assert everything(opened) == b""
        others = [stack.enter_context(connected(service, f"127.0.2.{number}")) for number in range(3, 13)]
        assert all(map(is_alive, others))  # above forty in all, too
        serving.wait_until(lambda: causes(service).get("evicted", 0) >= 15, "the metrics", service)


def test_where_all_are_busy_newcomers_are_refused_and_the_log_says_so_once(path: Path, tmp_path: Path) -> None:
    begun = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"content-length: 5\r\n\r\na"
    with running(path, tmp_path, "--max-connections", "10") as service, ExitStack() as stack:
        for number in range(10):
            stack.enter_context(connected(service, f"127.0.5.{number + 2}")).sendall(begun)
        time.sleep(1.0)
        for _ in range(5):
            (found,) = answers(service, source="127.0.5.1")
            assert problem(found) == "busy"
            assert found.headers["retry-after"] == "1"
        service.wait_for("all 10 connections are in use")
        assert service.said.count("all 10 connections are in use") == 1


def test_a_low_limit_of_files_is_told_and_shuts_nobody_out(path: Path, tmp_path: Path) -> None:
    wrapped = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    options = ["--head-seconds", "1", "--decoders", "2"]
    with running(path, tmp_path, *options, wrapped=wrapped) as service, ExitStack() as stack:
        assert "raise it by `ulimit -n`" in service.said
        for _ in range(120):
            with suppress(OSError):
                stack.enter_context(connected(service)).sendall(GET + b"GET /he")
        with httpx2.Client(base_url=service.url) as client:
            for _ in range(20):
                assert client.get("/healthz", headers={"connection": "close"}).status_code in (200, 429)
            serving.wait_until(lambda: client.get("/readyz").status_code == 200, "room", service, 30)
            assert client.post("/v1/embed", content=jpeg()).status_code == 200
        assert service.stop() == 0


def test_behind_a_proxy_that_is_trusted_clients_are_told_apart(path: Path, tmp_path: Path) -> None:
    options = ["--max-connections-per-address", "5", "--trust-proxy", "127.0.3.1"]
    with running(path, tmp_path, *options) as service, ExitStack() as stack:
        proxy = [stack.enter_context(connected(service, "127.0.3.1")) for _ in range(20)]
        for opened in proxy:
            assert is_alive(opened, GET.replace(HOST, HOST + b"x-forwarded-for: 8.8.8.8\r\n"))


def test_tls_that_is_begun_and_not_ended(path: Path, tmp_path: Path) -> None:
    cert, key = serving.certificate(tmp_path)
    options = ["--tls-cert", str(cert), "--tls-key", str(key), "--head-seconds", "1"]
    with running(path, tmp_path, *options) as service:
        for begun in (b"", b"\x16\x03\x01\x02\0", GET):
            began = time.monotonic()
            with connected(service) as opened:
                opened.sendall(begun)
                everything(opened)
            assert time.monotonic() - began < 5
        context = ssl.create_default_context(cafile=str(cert))
        with connected(service) as plain, context.wrap_socket(plain, server_hostname="localhost") as opened:
            assert is_alive(opened)
        assert service.stop() == 0
        assert "Traceback" not in service.said


# Probes


def probe_url(service: Running) -> str:
    return next(line for line in service.said.splitlines() if "probes at " in line).rpartition(" ")[2]


def test_probes_at_a_port_of_their_own_wait_for_nobody(path: Path, tmp_path: Path) -> None:
    """Not even for an event loop that stands still; when it stands for long, they say so."""
    block = tmp_path / "block"
    wrapped = f"""
import os, time
import mvmr.serve.http.service as module
from mvmr.serve.http.admission import Edge
call = Edge.__call__
async def blocking(self, scope, receive, send):
    while scope.get("path") == "/block" and os.path.exists({str(block)!r}):
        time.sleep(0.01)
    await call(self, scope, receive, send)
Edge.__call__ = blocking
"""
    with running(path, tmp_path, "--probe-port", "0", wrapped=wrapped) as service:
        place = probe_url(service)
        with httpx2.Client(timeout=20) as client:
            for probe in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"):
                assert client.get(place + probe).status_code == 200
            assert problem(client.get(f"{place}/v1/models")) == "unknown-path"
            assert problem(client.post(f"{place}/v1/embed", content=jpeg())) == "unknown-path"
            block.touch()
            asking = threading.Thread(target=lambda: httpx2.get(f"{service.url}/block", timeout=60))
            asking.start()
            time.sleep(0.5)
            for _ in range(3):
                assert client.get(f"{place}/healthz").status_code == 200
                time.sleep(1.1)  # longer than a verdict stands
                assert client.get(f"{place}/readyz").status_code == 200
            block.unlink()
            asking.join()
        assert service.stop() == 0


def test_an_event_loop_that_stands_still_is_not_alive(path: Path, tmp_path: Path) -> None:
    wrapped = """
import mvmr.serve.http.service as module
module.Service.silence = lambda self: 31.0
"""
    with running(path, tmp_path, "--probe-port", "0", wrapped=wrapped) as service:
        answer = httpx2.get(f"{probe_url(service)}/healthz")
        assert problem(answer) == "not-ready"
        assert "has not turned for 31 s" in answer.json()["detail"]


def test_a_log_that_nobody_reads_keeps_nobody_waiting(path: Path, tmp_path: Path) -> None:
    argv = serving.command(path, "--drain", "0")
    # a log of every request, which a full pipe would stop
    script = tmp_path / "wrapped.py"
    script.write_text(
        "import logging\nfrom mvmr.serve.http.admission import Edge\ncall = Edge.__call__\n"
        "async def talkative(self, scope, receive, send):\n"
        "    for _ in range(100):\n        logging.getLogger('mvmr').warning('x' * 1000)\n"
        "    await call(self, scope, receive, send)\n"
        "Edge.__call__ = talkative\nfrom mvmr.cli.main import main\nmain(prog_name='mvmr')\n"
    )
    with subprocess.Popen([sys.executable, str(script), *argv[3:]], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while b"startup complete" not in said:
            said += os.read(process.stderr.fileno(), 2**16)
        url = next(line for line in said.decode().splitlines() if " at http" in line).rpartition(" ")[2]
        with httpx2.Client(base_url=url, timeout=10) as client:
            for _ in range(50):
                assert client.get("/healthz").status_code == 200
        process.terminate()
        assert process.wait(20) == 0


def test_malformed_requests_are_counted_and_not_logged(service: Running) -> None:
    lines, before = len(service.said.splitlines()), causes(service).get("malformed", 0)
    for _ in range(50):
        answers(service, b"\0\r\n\r\n")
    assert causes(service)["malformed"] - before == 50
    assert len(service.said.splitlines()) == lines


def test_a_thousand_connections_at_once_are_all_taken(path: Path, tmp_path: Path) -> None:
    _, most = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
    if most < 4096:
        pytest.skip(f"this machine allows {most} open files")
    psutil.Process().rlimit(psutil.RLIMIT_NOFILE, (most, most))
    with running(path, tmp_path) as service, ExitStack() as stack:
        there = [stack.enter_context(connected(service, f"127.0.6.{number % 4}")) for number in range(1000)]
        assert all(map(is_alive, there))


# Turns and shares


def test_who_asks_much_at_once_is_begun_a_few_at_a_turn_and_others_at_once() -> None:
    begun: list[str] = []

    def begin(owner: str) -> bool:
        begun.append(owner)
        return True

    async def whole() -> list[list[str]]:
        turns, seen = Turns(), []
        for _ in range(5):
            turns.take("many", partial(begin, "many"))
        turns.take("one", partial(begin, "one"))
        for _ in range(4):
            seen.append(begun.copy())
            begun.clear()
            turns.take("one", partial(begin, "one"))
            await asyncio.sleep(0)
        return seen

    first, second, third, last = asyncio.run(whole())
    assert first == ["many", "many", "one"]
    assert second == ["one", "many", "many"]
    assert third == ["one", "many"]
    assert last == ["one"]


def test_no_client_takes_all_and_many_hardly_do() -> None:
    shares = Shares(256)
    taken: dict[str, int] = {}
    for client in ("first", "second", "third"):
        while shares.take(client, 1):
            taken[client] = taken.get(client, 0) + 1
    assert taken == {"first": 170, "second": 57, "third": 19}
    assert shares.total == 246
    shares.give("first", 170)
    assert shares.fits("second", 101)
    assert not shares.fits("second", 102)
    assert shares.fits("fourth", 120)
    assert not shares.fits("fourth", 121)
    assert Shares(4).fits("alone", 4)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False), ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True), ("fe80::1%eth0", "fe80::2%eth0", True), ("somewhere", "somewhere", True),
    ],
)  # fmt: skip
def test_whose_an_address_is(one: str, other: str, same: bool) -> None:
    assert (owner_of(one) == owner_of(other)) is same


def test_half_of_what_a_client_has_had_is_forgotten_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    recent = Recent()
    recent.add("one", 4)
    now += 5
    recent.add("one", 1)
    assert (recent.of("one"), recent.of("another")) == (3, 0)
    now += 10
    assert recent.of("one") == 0.75
    for number in range(500):
        recent.add(str(number), 1e-4)
    now += 60
    recent.add("another", 1)
    recent.add("one", 1)
    assert set(recent._had) == {"another", "one"}
