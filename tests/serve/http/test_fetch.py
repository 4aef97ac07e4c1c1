"""Images from addresses: whom the service asks, and what it takes of the answer; nothing leaves this machine."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpcore2
import numpy as np
import pytest
from starlette.testclient import TestClient

from mvmr.data.image_bytes import Rejected
from mvmr.serve import Engine
from mvmr.serve.http import fetch
from mvmr.serve.http.app import create_app
from mvmr.serve.http.fetch import Remote
from mvmr.serve.http.settings import Settings
from tests.serve import serving
from tests.serve.serving import jpeg, problem, read_json

HOST, PUBLIC = "images.example", "93.184.216.34"
MOST = 100_000
SECONDS = 20.0
Write = Callable[[bytes], Awaitable[None]]
Reply = Callable[[Write], Awaitable[None]]


class Network:
    """What stands in for the world: a resolver, and connections that all lead to one server here.

    asked: the names that were looked up; connected: the addresses that were connected to; requests: the first lines
    answers: the addresses a name leads to, the last one for good
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.connected: list[str] = []
        self.requests: list[str] = []
        self.answers: list[list[str]] = [[PUBLIC]]
        self.port = 0
        really, network = httpcore2.AnyIOBackend.connect_tcp, self

        async def connect(backend: httpcore2.AnyIOBackend, host: str, port: int, *more: Any) -> Any:
            network.connected.append(host)
            return await really(backend, "127.0.0.1", network.port, *more)

        patch.setattr(socket, "getaddrinfo", self._look_up)
        patch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect)

    def _look_up(self, host: str, port: int, *more: Any, **options: Any) -> list[Any]:
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    @asynccontextmanager
    async def serving(self, reply: Reply, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        """Answer every request by `reply`."""
        open_ones: set[asyncio.Task[None]] = set()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            open_ones.add(task)

            async def write(data: bytes) -> None:
                writer.write(data)
                await writer.drain()

            try:
                while head := await reader.readuntil(b"\r\n\r\n"):
                    self.requests.append(head.partition(b"\r\n")[0].decode())
                    await reply(write)
                    if b"content-length: 0" not in head.lower():
                        break
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the client has had enough
            finally:
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield
            for task in open_ones:
                task.cancel()
            await asyncio.gather(*open_ones, return_exceptions=True)


def take(count: int) -> None:
    """What hears of the bytes that are fetched: there is memory for all of them."""


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


def replying(*pieces: bytes) -> Reply:
    async def reply(write: Write) -> None:
        for piece in pieces:
            await write(piece)

    return reply


def reply_with(body: bytes, status: str = "200 OK", headers: str = "") -> Reply:
    return replying(f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode(), body)


def fetch_from(
    network: Network, address: str, reply: Reply | None = None, *, tls: ssl.SSLContext | None = None
) -> bytes | Rejected:
    """What comes of fetching an address while the world answers by `reply`."""

    async def test() -> bytes | Rejected:
        world = network.serving(reply or reply_with(jpeg()), tls)
        async with asyncio.timeout(SECONDS), world, Remote((HOST,), most=MOST) as remote:
            return await remote.fetch(address, take)

    return asyncio.run(test())


def rejection(outcome: bytes | Rejected, code: str) -> str:
    """The reason why nothing was fetched."""
    assert isinstance(outcome, Rejected)
    assert outcome.code == code
    assert "\n" not in outcome.reason
    return outcome.reason


@pytest.mark.parametrize("address", [f"http://{HOST}/a.jpg", f"HTTP://{HOST.upper()}:8080/a.jpg?b=c#d"])
def test_an_image_of_a_host_on_the_list(network: Network, address: str) -> None:
    assert fetch_from(network, address) == jpeg()
    assert network.connected == [PUBLIC]
    assert network.requests[0].startswith("GET /a.jpg")


def test_an_image_by_address_is_embedded_as_if_it_were_sent(network: Network, tmp_path: Path) -> None:
    engine = Engine.load(serving.bundle(tmp_path), threads=1)
    document = {"input": [f"http://{HOST}/a.jpg", "http://other.example/a.jpg"]}
    app = create_app(engine, Settings(url_hosts=(HOST,)))

    async def test() -> list[Any]:
        async with network.serving(reply_with(jpeg())):
            return await asyncio.to_thread(post)

    def post() -> list[Any]:
        with TestClient(app) as client:
            answer = client.post("/v1/embed", json=document)
            results: list[Any] = read_json(answer)["results"]
            return results

    by_address, refused = asyncio.run(test())
    np.testing.assert_array_equal(np.float32(by_address["embedding"]), engine.embed([jpeg()])[0])
    assert refused["error"]["code"] == "no-fetching"


# Whom it does not ask


@pytest.mark.parametrize(
    "address",
    [
        "http://other.example/", f"http://{HOST}.other.example/", f"http://other.example/{HOST}", f"http://x{HOST}/",
        f"http://{HOST}@other.example/", f"http://other.example#@{HOST}/", f"http://other.example?@{HOST}/",
        f"http://{HOST}\\@other.example/", "http://127.0.0.1/", "http://[::1]/",
        "http://169.254.169.254/latest/meta-data", "http://0x7f000001/", "http://2130706433/", "http://[::1", "http://",
        "http:///a.jpg", f"http://{HOST}%00.other.example/", f"http://{HOST}\t.other.example/",
    ],
)  # fmt: skip
def test_a_host_that_is_not_on_the_list_is_not_even_looked_up(network: Network, address: str) -> None:
    rejection(fetch_from(network, address), "no-fetching")
    assert (network.asked, network.connected) == ([], [])


def test_without_a_list_nobody_is_asked(network: Network) -> None:
    async def test() -> bytes | Rejected:
        async with Remote((), most=MOST) as remote:
            return await remote.fetch(f"http://{HOST}/a.jpg", take)

    assert "this service fetches no addresses" in rejection(asyncio.run(test()), "no-fetching")
    assert network.asked == []


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher"])
def test_only_http_and_https(network: Network, scheme: str) -> None:
    rejection(fetch_from(network, f"{scheme}://{HOST}/etc/passwd"), "not-fetched")
    assert network.requests == []


@pytest.mark.parametrize(
    "private",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1",
        # IPv4 addresses of this network, within addresses of IPv6
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "::a9fe:a9fe",
    ],
)  # fmt: skip
def test_a_name_that_leads_into_this_network_is_refused(network: Network, private: str) -> None:
    network.answers = [[private]]
    assert f"{HOST} leads to {private}" in rejection(fetch_from(network, f"http://{HOST}/a.jpg"), "no-fetching")
    assert network.connected == []


def test_a_name_that_changes_its_mind_leads_nowhere_else(network: Network) -> None:
    network.answers = [[PUBLIC], ["127.0.0.1"]]
    assert fetch_from(network, f"http://{HOST}/a.jpg") == jpeg()
    assert (network.asked, network.connected) == ([HOST], [PUBLIC])  # looked up once: what was checked is what is used


@pytest.mark.parametrize("target", ["http://127.0.0.1/", f"http://{HOST}/b.jpg", "file:///etc/passwd"])
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
def test_redirects_are_not_followed(network: Network, status: str, target: str) -> None:
    outcome = fetch_from(network, f"http://{HOST}/a.jpg", reply_with(b"", status, f"location: {target}\r\n"))
    assert rejection(outcome, "not-fetched") == f"the answer was {status[:3]}"
    assert (len(network.requests), len(network.connected)) == (1, 1)


# What it takes of an answer


@pytest.mark.parametrize("status", ["404 Not Found", "500 Internal", "204 No Content", "206 Partial Content"])
def test_another_answer_than_200_is_no_image(network: Network, status: str) -> None:
    assert status[:3] in rejection(fetch_from(network, f"http://{HOST}/a.jpg", reply_with(b"", status)), "not-fetched")


def test_as_many_bytes_as_allowed_and_no_more(network: Network) -> None:
    assert fetch_from(network, f"http://{HOST}/a.jpg", reply_with(bytes(MOST))) == bytes(MOST)
    reason = rejection(fetch_from(network, f"http://{HOST}/a.jpg", reply_with(bytes(MOST + 1))), "not-fetched")
    assert reason == "more than 100,000 bytes"


async def endless(write: Write) -> None:
    await write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        await write(b"1000\r\n" + bytes(0x1000) + b"\r\n")


def test_answers_without_end_are_cut_off_and_take_no_place_from_others(network: Network) -> None:
    async def test() -> None:
        async with asyncio.timeout(SECONDS), Remote((HOST,), most=MOST) as remote:
            async with network.serving(endless):
                outcomes = await asyncio.gather(
                    *(remote.fetch(f"http://{HOST}/{number}", take) for number in range(30))
                )
                assert {rejection(outcome, "not-fetched") for outcome in outcomes} == {"more than 100,000 bytes"}
            async with network.serving(reply_with(jpeg())):
                assert await remote.fetch(f"http://{HOST}/a.jpg", take) == jpeg()

    asyncio.run(test())


def test_who_sends_a_byte_now_and_then_is_not_waited_for(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_SECONDS", 0.2)

    async def dripping(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        while True:
            await write(b"a")
            await asyncio.sleep(0.01)

    reason = rejection(fetch_from(network, f"http://{HOST}/a.jpg", dripping), "not-fetched")
    assert reason == f"{HOST} took more than 0.2 s"


@pytest.mark.parametrize(
    "pieces",
    [
        (b"",), (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b"half of it"), (b"\xff\xd8\xff\xe0\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 2**20 + b"\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"zz\r\n"),
    ],
)  # fmt: skip
def test_an_answer_that_is_broken_is_no_image(network: Network, pieces: tuple[bytes, ...]) -> None:
    assert rejection(fetch_from(network, f"http://{HOST}/a.jpg", replying(*pieces)), "not-fetched").startswith(HOST)


def test_a_name_that_nobody_knows(network: Network) -> None:
    network.answers = [[]]
    assert "Name or service not known" in rejection(fetch_from(network, f"http://{HOST}/a.jpg"), "not-fetched")


def test_a_certificate_that_nobody_vouches_for(network: Network, tmp_path: Path) -> None:
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(*serving.certificate(tmp_path, HOST))
    reason = rejection(fetch_from(network, f"https://{HOST}/a.jpg", tls=own), "not-fetched")
    assert "certificate verify failed" in reason
    assert network.requests == []


def test_fetched_images_count_as_the_bodys_bytes_do(network: Network, tmp_path: Path) -> None:
    engine = Engine.load(serving.bundle(tmp_path), threads=1)
    app = create_app(engine, Settings(url_hosts=(HOST,), max_body=MOST))
    document = {"input": [f"http://{HOST}/{number}" for number in range(64)]}

    async def test() -> Any:
        async with network.serving(reply_with(bytes(MOST))):
            return await asyncio.to_thread(post)

    def post() -> Any:
        with TestClient(app) as client:
            return client.post("/v1/embed", content=json.dumps(document), headers={"content-type": "application/json"})

    # bodies under way take at most 4 x max_body; 64 images of max_body each must not come on top
    assert problem(asyncio.run(test())) in ("busy", "too-large")
