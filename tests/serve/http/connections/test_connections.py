"""One connection of a running service: what its heads and bodies may take, and how it ends."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import pytest

from tests.serve import serving
from tests.serve.http.connections.wire import (
    ALIVE,
    GET,
    HOST,
    MIB,
    answers,
    causes,
    connect,
    connections,
    everything,
    is_alive,
    post,
)
from tests.serve.serving import Running, jpeg, problem, running

OPTIONS = [
    "--head-seconds", "1", "--body-seconds", "1", "--answer-seconds", "1", "--idle-seconds", "6",
    "--max-connections", "40", "--max-connections-per-address", "20", "--max-unsent-mb", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def service(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(path, tmp_path_factory.mktemp("service"), *OPTIONS) as service:
        yield service
        assert service.stop() == 0
        assert "Traceback" not in service.log_text


# Heads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "name", "detail"),
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
def test_a_head_that_is_not_as_it_may_be(service: Running, request_: bytes, name: str, detail: str) -> None:
    *before, last = answers(service, request_)
    assert [answer.content for answer in before] == [ALIVE] * request_.count(GET)
    assert problem(last) == name
    assert detail in last.json()["detail"]
    assert last.headers["connection"] == "close"


def test_megabytes_of_headers_take_no_memory(service: Running) -> None:
    before = service.memory()
    with connect(service) as opened, suppress(OSError):
        opened.sendall(b"GET / HTTP/1.1\r\n" + HOST)
        for _ in range(60):
            opened.sendall(b"a: b\r\n" * (MIB // 6))
    assert service.memory() - before < 20 * MIB


def test_a_connection_on_which_nothing_comes_is_closed(service: Running) -> None:
    began = time.monotonic()
    assert answers(service) == []
    assert 0.9 < time.monotonic() - began < 5


@pytest.mark.slow
def test_between_requests_it_may_be_silent_for_longer(service: Running) -> None:
    with connect(service) as opened:
        for _ in range(2):
            assert is_alive(opened)
            time.sleep(1.3)  # above --head-seconds, below --idle-seconds
        assert everything(opened) == b""


def test_an_empty_line_between_requests_means_nothing(service: Running) -> None:
    with connect(service) as opened:
        assert is_alive(opened)
        opened.sendall(b"\r\n")
        time.sleep(1.3)
        assert is_alive(opened)


def test_a_head_may_come_in_pieces(service: Running) -> None:
    head = b"GET /healthz HTTP/1.1\r\n" + HOST + (b"a: " + b"b" * 994 + b"\r\n") * 30 + b"\r\n"  # 30 of 32 KiB
    with connect(service) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(head), 1500):
            opened.sendall(head[start : start + 1500])
            time.sleep(0.005)
        assert is_alive(opened, b"")


# Requests, one behind the other


def test_requests_may_be_sent_before_their_answers_but_not_any_number(service: Running) -> None:
    assert [answer.content for answer in answers(service, GET * 10, half=True)] == [ALIVE] * 10
    replies = answers(service, GET * 5000)
    assert [answer.content for answer in replies] == [ALIVE] * 17  # one was begun, sixteen may wait
    assert replies[-1].headers["connection"] == "close"


def test_what_comes_whole_before_garbage_is_answered(service: Running) -> None:
    replies = answers(service, post() + GET + b"\0\0\0\r\n\r\n")
    assert [answer.status_code for answer in replies] == [200, 200]
    assert "dim" in replies[0].json()
    assert replies[1].content == ALIVE


def test_garbage_in_a_body_is_the_answer_to_its_request(service: Running) -> None:
    chunked = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n"
    (answer,) = answers(service, chunked + b"5\r\nabcde\r\nnothing\r\n")
    assert problem(answer) == "malformed"
    (answer,) = answers(service, chunked + b"1\r\na\r\n" * 100_000)
    assert "tiny pieces" in answer.json()["detail"]
    (answer,) = answers(service, GET + chunked + b"nothing\r\n")
    assert answer.content == ALIVE  # and no more, as it can't be told where the next request begins


@pytest.mark.slow
def test_who_stays_after_he_was_refused_is_not_kept(service: Running) -> None:
    refused = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n"
    begun = [b"\r\n5\r\nabcde\r\nnothing\r\n", b"expect: 100-continue\r\n\r\nnothing\r\n"]
    with ExitStack() as stack:
        for number in range(10):
            opened = stack.enter_context(connect(service, "127.0.4.1"))
            opened.sendall(refused + begun[number % 2])
            assert b"400 Bad Request" in opened.recv(2**16)
        serving.wait_until(lambda: connections(service) < 10, "their end", service)


@pytest.mark.parametrize("body", [b"nothing\r\n", b"1\r\na\r\n" * 5000])
def test_a_body_that_cannot_be_read_is_no_second_answer(service: Running, body: bytes) -> None:
    with connect(service) as opened:
        opened.sendall(b"POST /nowhere HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n")
        assert opened.recv(12) == b"HTTP/1.1 404"
        time.sleep(0.2)
        opened.sendall(body)
        assert b"HTTP/1.1" not in everything(opened)


@pytest.mark.slow
def test_trailers_are_no_headers(path: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    chunked = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n0\r\n"
    with running(path, tmp_path, "--api-keys", str(tmp_path / "keys")) as service, connect(service) as opened:
        opened.sendall(chunked + b"x-api-key: 0123456789abcdef\r\n\r\n")
        assert opened.recv(12) == b"HTTP/1.1 401"


# Other ways of speaking


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0, HTTP/1.1"])
def test_who_would_rather_speak_another_protocol_is_answered_in_this_one(service: Running, protocol: bytes) -> None:
    more = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: " + protocol + b"\r\nhttp2-settings: AAMAAABk\r\n"
    replies = answers(service, post(more) + post(more), half=True)
    assert [answer.status_code for answer in replies] == [200, 200]
    assert replies[0].json()["results"][0]["width"] == 240
    assert replies[0].json() == replies[1].json()


def test_who_says_no_more_than_his_request_is_answered(service: Running) -> None:
    (answer,) = answers(service, post(), half=True)
    assert answer.json()["results"][0]["width"] == 240
    assert answers(service, post()[:-1], half=True) == []  # it was not whole


def test_who_waits_to_be_told_to_send_a_body_is_not_taken_by_his_word(service: Running) -> None:
    """After a refusal its body may come or not: what comes next would be read as the one or the other."""
    head = b"POST /nowhere HTTP/1.1\r\n" + HOST + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\n"
    (answer,) = answers(service, head)
    assert (problem(answer), answer.headers["connection"]) == ("unknown-path", "close")


def test_a_body_that_nobody_waits_for_may_not_take_for_ever(service: Running) -> None:
    with connect(service) as opened:
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
    command = ["curl", "--silent", "--http2", "--data-binary", f"@{tmp_path / 'a.jpg'}", "--header"]
    done = subprocess.run(
        [*command, "content-type: image/jpeg", f"{service.url}/v1/embed"], capture_output=True, timeout=30
    )
    assert json.loads(done.stdout)["results"][0]["width"] == 240


# Answers that nobody reads


@pytest.mark.slow
def test_answers_that_nobody_reads_take_a_bounded_memory_and_time(service: Running) -> None:
    # from two addresses: one has twenty connections
    request = b"GET /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n"
    before, cause = service.memory(), causes(service).get("slow-answer", 0)
    with ExitStack() as stack:
        for number in range(38):
            opened = stack.enter_context(connect(service, f"127.0.1.{1 + number // 19}"))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            opened.sendall(request * 15)
        time.sleep(0.5)
        assert service.memory() - before < 40 * MIB
        with httpx2.Client(base_url=service.url) as client:
            assert client.get("/healthz").status_code == 200
        serving.wait_until(lambda: causes(service).get("slow-answer", 0) > cause, "their end", service, 20)


# Probes


@pytest.mark.slow
def test_malformed_requests_are_counted_and_not_logged(service: Running) -> None:
    lines, before = len(service.log_text.splitlines()), causes(service).get("malformed", 0)
    for _ in range(50):
        answers(service, b"\0\r\n\r\n")
    assert causes(service)["malformed"] - before == 50
    assert len(service.log_text.splitlines()) == lines
