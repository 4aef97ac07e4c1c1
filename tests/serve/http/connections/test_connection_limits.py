"""Connections are many, and nobody's take all: who has too many loses some, and whoever is new gets in."""

from __future__ import annotations

import ssl
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest

from tests.serve import serving
from tests.serve.http.connections.wire import GET, HOST, answers, causes, connect, everything, is_alive
from tests.serve.serving import jpeg, problem, running


@pytest.mark.slow
def test_who_has_many_connections_loses_those_that_are_idle_to_others(path: Path, tmp_path: Path) -> None:
    options = ["--max-connections", "40", "--max-connections-per-address", "20"]
    with running(path, tmp_path, *options) as service, ExitStack() as stack:
        mine = [stack.enter_context(connect(service, "127.0.2.1")) for _ in range(25)]
        theirs = [stack.enter_context(connect(service, "127.0.2.2")) for _ in range(20)]
        for opened in (mine[-1], theirs[-1]):
            assert is_alive(opened)
        for opened in mine[:5]:  # above twenty, those longest idle went
            opened.settimeout(5)
            assert everything(opened) == b""
        others = [stack.enter_context(connect(service, f"127.0.2.{number}")) for number in range(3, 13)]
        assert all(map(is_alive, others))  # above forty in all, too
        serving.wait_until(lambda: causes(service).get("evicted", 0) >= 15, "the metrics", service)


@pytest.mark.slow
def test_where_all_are_busy_newcomers_are_refused_and_the_log_says_so_once(path: Path, tmp_path: Path) -> None:
    begun = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"content-length: 5\r\n\r\na"
    with running(path, tmp_path, "--max-connections", "10") as service, ExitStack() as stack:
        for number in range(10):
            stack.enter_context(connect(service, f"127.0.5.{number + 2}")).sendall(begun)
        time.sleep(1.0)
        for _ in range(5):
            (answer,) = answers(service, source="127.0.5.1")
            assert problem(answer) == "busy"
            assert answer.headers["retry-after"] == "1"
        service.wait_for("all 10 connections are in use")
        assert service.log_text.count("all 10 connections are in use") == 1


@pytest.mark.slow
def test_a_low_limit_of_files_is_told_and_shuts_nobody_out(path: Path, tmp_path: Path) -> None:
    wrapped = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    options = ["--head-seconds", "1", "--decoders", "2"]
    with running(path, tmp_path, *options, wrapped=wrapped) as service, ExitStack() as stack:
        assert "raise it by `ulimit -n`" in service.log_text
        for _ in range(120):
            with suppress(OSError):
                stack.enter_context(connect(service)).sendall(GET + b"GET /he")
        with httpx2.Client(base_url=service.url) as client:
            for _ in range(20):
                assert client.get("/healthz", headers={"connection": "close"}).status_code in (200, 429)
            serving.wait_until(lambda: client.get("/readyz").status_code == 200, "room", service, 30)
            assert client.post("/v1/embed", content=jpeg()).status_code == 200
        assert service.stop() == 0


@pytest.mark.slow
def test_behind_a_proxy_that_is_trusted_clients_are_told_apart(path: Path, tmp_path: Path) -> None:
    options = ["--max-connections-per-address", "5", "--trust-proxy", "127.0.3.1"]
    with running(path, tmp_path, *options) as service, ExitStack() as stack:
        proxy = [stack.enter_context(connect(service, "127.0.3.1")) for _ in range(20)]
        for opened in proxy:
            assert is_alive(opened, GET.replace(HOST, HOST + b"x-forwarded-for: 8.8.8.8\r\n"))


@pytest.mark.slow
def test_tls_that_is_begun_and_not_ended(path: Path, tmp_path: Path) -> None:
    cert, key = serving.certificate(tmp_path)
    options = ["--tls-cert", str(cert), "--tls-key", str(key), "--head-seconds", "1"]
    with running(path, tmp_path, *options) as service:
        for begun in (b"", b"\x16\x03\x01\x02\0", GET):
            began = time.monotonic()
            with connect(service) as opened:
                opened.sendall(begun)
                everything(opened)
            assert time.monotonic() - began < 5
        context = ssl.create_default_context(cafile=str(cert))
        with connect(service) as plain, context.wrap_socket(plain, server_hostname="localhost") as opened:
            assert is_alive(opened)
        assert service.stop() == 0
        assert "Traceback" not in service.log_text


@pytest.mark.slow
def test_a_thousand_connections_at_once_are_all_taken(path: Path, tmp_path: Path) -> None:
    _, most = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
    if most < 4096:
        pytest.skip(f"this machine allows {most} open files")
    psutil.Process().rlimit(psutil.RLIMIT_NOFILE, (most, most))
    with running(path, tmp_path) as service, ExitStack() as stack:
        sockets = [stack.enter_context(connect(service, f"127.0.6.{number % 4}")) for number in range(1000)]
        assert all(map(is_alive, sockets))
