"""The client's patience, and what it makes of answers, against a server that follows a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from mvmr.serve.client import Client, Hit
from mvmr.serve.client import client as module
from tests.serve import serving
from tests.serve.client.clients import both, refusal


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that clients would have waited, in this test."""
    seconds: list[float] = []

    async def note(wanted: float) -> None:
        seconds.append(wanted)

    monkeypatch.setattr(module, "sleep", seconds.append)
    monkeypatch.setattr(module, "async_sleep", note)
    return seconds


class Scripted:
    """A server that gives its answers in turn, the last again and again; calls: method, path and body of each request.

    An answer is status, headers and body; None ends the connection without any.
    """

    def __init__(self, *answers: tuple[int, dict[str, str], bytes] | None) -> None:
        self.answers, self.calls = list(answers), list[tuple[str, str, bytes]]()

    @contextmanager
    def running(self) -> Iterator[str]:
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                boundary = self.headers.get("content-type", "").partition("boundary=")[2]
                script.calls.append((self.command, self.path, body.replace(boundary.encode() or b"-", b"")))
                answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer  # http.server's names

            def log_message(self, *arguments: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()


def vectors(*rows: list[float], space: str = "a" * 32) -> tuple[int, dict[str, str], bytes]:
    headers = {"content-type": serving.FLOAT32, "x-shape": f"{len(rows)},{len(rows[0])}", "x-embedding-space": space}
    return 200, headers, np.array(rows, "<f4").tobytes()


def problem_answer(status: int, detail: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    document = json.dumps({"type": "urn:mvmr:problem:busy", "detail": detail, "status": status}).encode()
    return status, {"content-type": "application/problem+json", **headers}, document


BUSY = problem_answer(429, "no room for 1 more images now; try again in 7 s", **{"retry-after": "7"})


@both
def test_a_busy_service_is_asked_again_when_it_says(kind: Any, waits: list[float]) -> None:
    script = Scripted(
        BUSY, problem_answer(503, "starting"), (503, {"retry-after": "nonsense"}, b"<html>"), vectors([1, 2])
    )
    with script.running() as url, kind(url) as client:
        embeddings = client.embed([b"the same each time"])
    np.testing.assert_array_equal(embeddings.vectors, [[1, 2]])
    assert len(script.calls) == 4
    assert len(set(script.calls)) == 1
    assert b"the same each time" in script.calls[0][2]
    assert 7 <= waits[0] <= 7 + module_waits(1)
    assert 0 <= waits[1] <= module_waits(2)
    assert 0 <= waits[2] <= module_waits(3)


def module_waits(tries: int) -> float:
    """The longest random wait after so many tries: it doubles from a quarter of a second to ten."""
    return min(10.0, 0.25 * 2 ** (tries - 1))


@both
def test_the_random_waits_grow_up_to_a_bound_and_differ(kind: Any, waits: list[float]) -> None:
    script = Scripted(problem_answer(429, "no room; try again"))
    with script.running() as url, kind(url, retries=40) as client:
        message = refusal(client.embed, [b"x"])
    assert message == f"{url}/v1/embed answered 429: no room; try again (tried 41 times)"
    assert len(script.calls) == 41
    assert all(0 <= wait <= module_waits(tries) for tries, wait in enumerate(waits, 1))
    assert len(set(waits)) == 40
    assert max(waits) > 5  # of 34 drawn from [0, 10], not one above 5: once in 10^10 runs


@both
def test_a_date_to_come_back_at_is_understood(kind: Any, waits: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    script = Scripted((503, {"retry-after": date}, b""), vectors([1, 2]))
    with script.running() as url, kind(url) as client:
        client.embed([b"x"])
    assert 25 <= waits[0] <= 30.25


@both
def test_nobody_waits_for_an_hour_or_when_told_not_to_try_again(kind: Any, waits: list[float]) -> None:
    later = problem_answer(503, "closed for repairs", **{"retry-after": "3600"})
    for script, options in ((Scripted(later), {}), (Scripted(BUSY), {"retries": 0})):
        with script.running() as url, kind(url, **options) as client:
            message = refusal(client.models)
        assert message.startswith(f"{url}/v1/models answered ")
        assert "tried" not in message
        assert len(script.calls) == 1
    assert waits == []


@both
def test_a_connection_that_breaks_is_made_again(kind: Any, waits: list[float]) -> None:
    script = Scripted(None, None, vectors([1, 2]))
    with script.running() as url, kind(url) as client:
        np.testing.assert_array_equal(client.embed([b"x"]).vectors, [[1, 2]])
    assert len(script.calls) == 3
    assert len(waits) == 2


@both
def test_a_service_that_is_not_there_is_one_line(kind: Any, waits: list[float]) -> None:
    with Scripted(None).running() as url:
        pass
    with kind(url, retries=2) as client:
        assert client.ready() is False
        message = refusal(client.models)
    assert message.startswith(f"{url}/v1/models can't be reached: ConnectError")
    assert message.endswith("check the URL, and that the service is running there (tried 3 times)")
    assert len(waits) == 2


@both
def test_a_service_that_stays_silent_is_not_asked_the_same_again(kind: Any, waits: list[float]) -> None:
    script = Scripted((200, {"content-length": "10"}, b"short"))
    with script.running() as url, kind(url, timeout=0.2) as client:
        message = refusal(client.models)
    assert "has not answered in time: ReadTimeout" in message
    assert "give a longer timeout" in message
    assert len(script.calls) == 1


@both
@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422, 500, 502])
def test_what_would_fail_again_is_not_sent_again(kind: Any, status: int, waits: list[float]) -> None:
    script = Scripted(problem_answer(status, "the detail; what to do"))
    with script.running() as url, kind(url) as client:
        assert refusal(client.embed, [b"x"]) == f"{url}/v1/embed answered {status}: the detail; what to do"
    assert len(script.calls) == 1


@both
def test_another_bundle_in_the_middle_of_a_call_is_noticed(kind: Any) -> None:
    script = Scripted(vectors([1, 2]), vectors([1, 2]), vectors([3, 4], space="b" * 32))
    with script.running() as url, kind(url, max_items=1) as client:
        message = refusal(client.embed, [b"x", b"y", b"z"])
        assert message == (
            f"{url}: its embedding space changed from aaaaaaaaaaaa to bbbbbbbbbbbb during this call: another bundle "
            "has been deployed; make the call again"
        )
        assert client.embed([b"x", b"y"]).space_id == "b" * 32


@both
@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>welcome"),
        (200, {"content-type": "application/json"}, b"[1, 2]"),
        (200, {"content-type": "application/json"}, b'{"results": []}'),
        (200, {"content-type": serving.FLOAT32, "x-shape": "1,2"}, b"\0" * 8),
        (200, {"content-type": serving.FLOAT32, "x-embedding-space": "a", "x-shape": "1,3"}, b"\0" * 8),
        (200, {"content-type": serving.FLOAT32, "x-embedding-space": "a", "x-shape": "2,1"}, b"\0" * 8),
    ],
)
def test_another_server_than_ours_is_one_line(kind: Any, answer: tuple[int, dict[str, str], bytes]) -> None:
    with Scripted(answer).running() as url, kind(url) as client:
        assert refusal(client.embed, [b"x"]).startswith(f"{url} doesn't answer as an mvmr service does (")


def test_a_page_that_sends_elsewhere_or_fails_is_one_line() -> None:
    with Scripted((301, {"location": "https://there/"}, b"")).running() as url, Client(url) as client:
        message = "answered 301 Moved Permanently, to https://there/, not as an mvmr service does; check the URL"
        assert refusal(client.models) == f"{url}/v1/models {message}"
    with Scripted((502, {}, b"<html>")).running() as url, Client(url) as client:
        assert "answered 502 Bad Gateway, not as an mvmr service does" in refusal(client.models)


@both
def test_neighbours_are_read(kind: Any) -> None:
    hits = [{"path": "a.jpg", "score": 0.75}, {"path": "b.jpg", "score": 0.5}]
    document = json.dumps({"results": [{"index": 0, "hits": hits}]}).encode()
    script = Scripted((200, {"content-type": "application/json", "x-embedding-space": "a" * 32}, document))
    with script.running() as url, kind(f"{url}/behind/a/path") as client:
        assert client.search([b"x"], k=2).rows == ((Hit("a.jpg", 0.75), Hit("b.jpg", 0.5)),)
    assert script.calls[0][:2] == ("POST", "/behind/a/path/v1/search?k=2")


@both
def test_a_service_from_before_there_was_normalize_is_not_believed(kind: Any) -> None:
    script = Scripted(vectors([3, 4]))
    with script.running() as url, kind(url) as client:
        message = refusal(client.embed, [b"x"], normalize=True)
    assert message == f"{url} doesn't know how to normalise; upgrade it, or leave normalize out"
    assert script.calls[0][:2] == ("POST", "/v1/embed?normalize=true")
    models = json.dumps({"data": [{"space_id": "a" * 32, "dim": 2}]}).encode()
    with Scripted((200, {}, models)).running() as url, kind(url) as client:
        assert client.embed([]).space_id == "a" * 32
        assert "doesn't know how to normalise" in refusal(client.embed, [], normalize=True)


@both
def test_raw_and_normalised_vectors_are_not_mixed_in_a_call(kind: Any) -> None:
    script = Scripted(vectors([1, 0]), vectors([0, 1], space="b" * 32))
    with script.running() as url, kind(url, max_items=1) as client:
        assert "its embedding space changed from" in refusal(client.embed, [b"x", b"y"], normalize=True)
