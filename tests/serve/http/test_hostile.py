"""A running service and strangers: bombs, JSON by the megabyte, garbage on the wire; it stays as it was."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import httpx2
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from tests.serve import serving
from tests.serve.serving import Running, embed, encoded, jpeg, photograph, problem, read_metric, reasons, running

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MIB = 2**20
# What this service may take for a while on top of what it has: an image of 5 megapixels, decoded in two threads
OPTIONS = ["--max-megapixels", "5", "--max-body-mb", "4", "--workers", "1", "--decoders", "2"]
MOST = 200 * MIB


@pytest.fixture(scope="module")
def service(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One process for all the attacks: what one of them leaves behind, the next ones meet."""
    with running(path, tmp_path_factory.mktemp("service"), *OPTIONS) as service:
        warm_up(service)
        yield service
        assert service.stop() == 0
        assert "Traceback" not in service.log_text


@pytest.fixture
def client(service: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, verify=False, timeout=60) as client:
        yield client


@pytest.fixture
def unharmed(service: Running, client: httpx2.Client) -> Iterator[None]:
    """After the test the service is ready, embeds as before, and has its memory back."""
    wanted = embed(client)
    memory, threads = service.memory(), psutil.Process(service.pid).num_threads()
    yield
    assert client.get("/readyz").status_code == 200
    np.testing.assert_array_equal(embed(client), wanted)
    assert psutil.Process(service.pid).num_threads() == threads
    assert service.memory() - memory < MOST
    assert read_metric(client.get("/metrics").text, "mvmr_queue_images") == {"": 0}


def warm_up(service: Running) -> None:
    """Let all its threads start and its allocator take what it takes."""
    with httpx2.Client(base_url=service.url, verify=False, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: embed(client), range(100)))


def peak(service: Running, act: Callable[[], object]) -> int:
    """Bytes that the resident set grew by at most while `act` ran."""
    Path(f"/proc/{service.pid}/clear_refs").write_text("5")
    before = service.memory()
    act()
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{service.pid}/status").read_text())
    assert match
    return int(match[1]) * 1024 - before


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that makes the bombs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("serve_fuzz")


# Images


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("size", [(300_000, 1), (1, 300_000), (4_000_000, 1)])
def test_a_thin_image_takes_little_memory(
    service: Running, client: httpx2.Client, fuzz: ModuleType, size: tuple[int, int]
) -> None:
    answers: list[httpx2.Response] = []
    content = fuzz.png(*size)
    assert peak(service, lambda: answers.append(client.post("/v1/embed", content=content))) < MOST
    assert reasons(answers[0]) == {"too-many-pixels"}


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("colour", "bits"), [(0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 8), (4, 16), (6, 8), (6, 16)]
)
def test_as_many_pixels_as_allowed_take_a_bounded_memory(
    service: Running, client: httpx2.Client, fuzz: ModuleType, colour: int, bits: int
) -> None:
    palette = fuzz.chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    content = fuzz.png(2500, 2000, colour=colour, bits=bits, extra=palette)
    statuses: list[int] = []
    assert peak(service, lambda: statuses.append(client.post("/v1/embed", content=content).status_code)) < MOST
    assert statuses == [200]


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("mode", ["F", "I", "I;16", "LAB", "CMYK"])
def test_so_do_other_kinds_of_pixels(service: Running, client: httpx2.Client, mode: str) -> None:
    content = encoded(Image.new(mode, (2500, 2000)), "TIFF", compression="tiff_adobe_deflate")
    statuses: list[int] = []
    assert peak(service, lambda: statuses.append(client.post("/v1/embed", content=content).status_code)) < MOST
    assert statuses == [200]


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("wrapper", ["iptc", "ico", "icns"])
def test_what_hides_in_a_wrapper_is_not_decoded_when_it_is_too_large(
    service: Running, client: httpx2.Client, fuzz: ModuleType, wrapper: str
) -> None:
    content = getattr(fuzz, wrapper)(fuzz.png(9000, 9000))
    answers: list[httpx2.Response] = []
    assert peak(service, lambda: answers.append(client.post("/v1/embed", content=content))) < MOST
    assert reasons(answers[0]) <= {"not-an-image", "too-many-pixels", "undecodable"}


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
def test_no_program_is_run_for_a_file(path: Path, tmp_path: Path, fuzz: ModuleType) -> None:
    """As Ghostscript is by Pillow, for an EPS and for what has one in it."""
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c", "djpeg", "ppmtogif"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {called}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    with running(path, tmp_path, env=env) as own, httpx2.Client(base_url=own.url, verify=False) as client:
        for content in (eps, fuzz.iptc(eps)):
            assert reasons(client.post("/v1/embed", content=content)) <= {"not-an-image", "undecodable"}
    assert not called.exists()


# JSON


TENSOR = '{"name":"image","datatype":"UINT8","shape":['


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("endpoint", "start", "item", "end"),
    [
        ("/v1/embed", '{"input":[', "1,", "1]}"),
        ("/v1/embed", '{"input":[', "[],", "[]]}"),
        ("/v1/embed", '{"input":[', '"",', '""]}'),
        ("/v1/embed", "", "[", ""),
        ("/v1/embed", '{"input":', "[", ""),
        ("/v1/embeddings", '{"model":"student","input":[', "1,", "1]}"),
        ("/v2/models/student/infer", '{"inputs":[', "{},", "{}]}"),
        ("/v2/models/student/infer", f'{{"inputs":[{TENSOR}1]}}],"outputs":[', "{},", "{}]}"),
        ("/v2/models/student/infer", f'{{"inputs":[{TENSOR}', '"",', "1]}]}"),
    ],
)  # fmt: skip
def test_json_with_many_wrong_values_takes_little_memory(
    service: Running, client: httpx2.Client, endpoint: str, start: str, item: str, end: str
) -> None:
    content = start + item * (2 * MIB // len(item)) + end
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(client.post(endpoint, content=content, headers={"content-type": "application/json"}))

    assert peak(service, ask) < MOST
    assert problem(answers[0]) in ("invalid", "malformed")
    assert len(answers[0].content) < 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
def test_json_with_many_unknown_keys_takes_little_memory(service: Running, client: httpx2.Client) -> None:
    content = "{" + ",".join(f'"{number}":1' for number in range(200_000)) + "}"
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(client.post("/v1/embed", content=content, headers={"content-type": "application/json"}))

    assert peak(service, ask) < MOST
    assert problem(answers[0]) == "invalid"
    assert len(answers[0].content) < 10_000


# The wire


GARBAGE = [
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n",
    b"\0" * 1000,
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n" + b"a" * 1000,
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
    b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET http://elsewhere.example/ HTTP/1.1\r\nhost: x\r\n\r\n",
    b"CONNECT elsewhere.example:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=" + b"a" * 5000 + b"\r\n"
    b"content-length: 4\r\n\r\n--aa",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=a; charset=x\r\n"
    b"content-length: 5\r\n\r\n--a--",
    b"POST /v1/embed HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
]


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
def test_garbage_on_the_wire_is_refused_or_cut_off(service: Running) -> None:
    for content in GARBAGE:
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            try:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while part := connection.recv(65536):
                    answer += part
            except ConnectionError:  # it has hung up in the middle: just as well
                continue
        status = answer.split(b" ", 2)[1:2]
        assert not status or status[0][:1] in b"1234", (content[:100], answer[:300])


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
def test_connections_that_say_nothing_take_no_place_from_others(service: Running, client: httpx2.Client) -> None:
    starts = [b"", b"POST /v1/emb", b"POST /v1/embed HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc"]
    idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(300)]
    try:
        for number, connection in enumerate(idle):
            connection.sendall(starts[number % len(starts)])
        assert client.get("/readyz").status_code == 200
        embed(client)
    finally:
        for connection in idle:
            connection.close()
    serving.wait_until(lambda: len(psutil.Process(service.pid).net_connections()) < 10, "the connections' end", service)


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
def test_many_large_bodies_at_a_time_take_a_bounded_memory(service: Running, client: httpx2.Client) -> None:
    content = json.dumps({"input": [base64.b64encode(bytes(700_000)).decode()] * 4})  # 3.7 of the 4 MB that are allowed
    assert len(content) < 4 * MIB
    statuses: list[int] = []

    def ask(_: int) -> None:
        answer = client.post("/v1/embed", content=content, headers={"content-type": "application/json"})
        statuses.append(answer.status_code)

    def flood() -> None:
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask, range(64)))

    assert peak(service, flood) < MOST
    assert set(statuses) <= {422, 429}
    assert len(statuses) == 64


@pytest.mark.slow
@pytest.mark.usefixtures("unharmed")
def test_memory_stays_as_it_is(service: Running, client: httpx2.Client) -> None:
    files = [("file", (f"{number}.jpg", jpeg(name))) for number, name in enumerate(("astronaut", "coffee", "chelsea"))]
    broken = encoded(photograph().resize((1000, 1000)), "PNG")[:-1000]

    def ask(number: int) -> None:
        assert client.post("/v1/embed", files=files).status_code == 200
        assert client.post("/v1/embed", content=broken).status_code == 422
        assert client.post("/v1/classify?head=animals", content=jpeg()).status_code == 200
        assert client.get(f"/nowhere/{number}").status_code == 404

    with ThreadPoolExecutor(4) as pool:
        memory = []
        for _ in range(3):
            list(pool.map(ask, range(100)))
            memory.append(service.memory())
    assert memory[2] - memory[1] < 30 * MIB, memory
