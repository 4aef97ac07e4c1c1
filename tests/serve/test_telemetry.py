"""A service talks to nobody else, from its start to its end."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest

from tests.serve.serving import embed, reasons, running


class Watch(threading.Thread):
    """All that the services below this process are connected with, looked at again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[tuple[str, str, str]] = set()
        self.looks, self._end = 0, threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            for process in psutil.Process().children(recursive=True):
                try:
                    for connection in process.net_connections("inet"):
                        ours, theirs = (
                            "".join(str(side.ip) if side else "") for side in (connection.laddr, connection.raddr)
                        )
                        self.seen.add((connection.type.name, ours, theirs))
                    self.looks += 1
                except psutil.Error:
                    continue
            time.sleep(0.002)

    def stop(self) -> None:
        self._end.set()
        self.join()


# Writes down every connection and every name that Python code asks for.
LISTENING = """
import sys
def note(event, arguments):
    if event == "socket.sendmsg" and arguments[0].family == 1:  # among processes of this machine
        return
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        with open("asked", "a") as file:
            file.write(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[:2]}\\n")
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        with open("asked", "a") as file:
            file.write(f"{event} {arguments[1][1:4] if event == 'subprocess.Popen' else ''}\\n")
sys.addaudithook(note)
"""


@pytest.mark.slow
def test_nothing_is_sent_anywhere(path: Path, tmp_path: Path) -> None:
    """From its start to its end; onnxruntime would report to its makers, unless mvmr forbids it."""
    home = tmp_path / "home"
    home.mkdir()
    env = {name: None for name in os.environ if "TELEMETRY" in name or name.startswith("XDG_")}
    watch = Watch()
    watch.start()
    with running(path, tmp_path, env=env | {"HOME": str(home)}, wrapped=LISTENING) as own:
        with httpx2.Client(base_url=own.url, verify=False) as client, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: embed(client), range(100)))
            urls = {"input": ["http://198.51.100.1/a.jpg", "https://example.org/a.jpg"]}
            assert reasons(client.post("/v1/embed", json=urls)) == {"no-fetching"}
        assert own.stop() == 0
    watch.stop()
    assert watch.looks > 100
    assert {("SOCK_STREAM", "127.0.0.1", "127.0.0.1"), ("SOCK_STREAM", "127.0.0.1", "")} <= watch.seen  # it can see
    assert {theirs for _, _, theirs in watch.seen} <= {"", "127.0.0.1"}
    assert {kind for kind, _, _ in watch.seen} == {"SOCK_STREAM"}
    # the name of the host that it listens at is looked up, and images are decoded in processes, nothing else
    events = set((tmp_path / "asked").read_text().splitlines())
    decoders = "subprocess.Popen ['-P', '-m', 'mvmr.serve.decoding.process']"
    assert events == {"socket.getaddrinfo ('127.0.0.1', 0)", decoders}
    assert [str(file) for file in home.rglob("*") if "microsoft" in file.name.lower()] == []
    assert list(home.iterdir()) == []
