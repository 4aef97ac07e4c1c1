"""Probes at a port of their own wait for nobody, and neither does a service whose log nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from tests.serve import serving
from tests.serve.serving import Running, jpeg, problem, running


def probe_url(service: Running) -> str:
    return next(line for line in service.log_text.splitlines() if "probes at " in line).rpartition(" ")[2]


@pytest.mark.slow
def test_probes_at_a_port_of_their_own_wait_for_nobody(path: Path, tmp_path: Path) -> None:
    """Not even for an event loop that stands still; when it stands for long, they say so."""
    block = tmp_path / "block"
    wrapped = f"""
import os, time
import mvmr.serve.http.service as module
import pytest
from mvmr.serve.http.admission import Edge
call = Edge.__call__
async def blocking(self, scope, receive, send):
    while scope.get("path") == "/block" and os.path.exists({str(block)!r}):
        time.sleep(0.01)
    await call(self, scope, receive, send)
Edge.__call__ = blocking
"""
    with running(path, tmp_path, "--probe-port", "0", wrapped=wrapped) as service:
        url = probe_url(service)
        with httpx2.Client(timeout=20) as client:
            for probe in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"):
                assert client.get(url + probe).status_code == 200
            assert problem(client.get(f"{url}/v1/models")) == "unknown-path"
            assert problem(client.post(f"{url}/v1/embed", content=jpeg())) == "unknown-path"
            block.touch()
            asking = threading.Thread(target=lambda: httpx2.get(f"{service.url}/block", timeout=60))
            asking.start()
            time.sleep(0.5)
            for _ in range(3):
                assert client.get(f"{url}/healthz").status_code == 200
                time.sleep(1.1)  # longer than a verdict stands
                assert client.get(f"{url}/readyz").status_code == 200
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


@pytest.mark.slow
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
        log = b""
        while b"startup complete" not in log:
            log += os.read(process.stderr.fileno(), 2**16)
        url = next(line for line in log.decode().splitlines() if " at http" in line).rpartition(" ")[2]
        with httpx2.Client(base_url=url, timeout=10) as client:
            for _ in range(50):
                assert client.get("/healthz").status_code == 200
        process.terminate()
        assert process.wait(20) == 0
