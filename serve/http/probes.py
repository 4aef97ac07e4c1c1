"""A port of their own for probes, answered by a thread of its own: no request keeps one waiting."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

from mvmr.serve.http.app import create_probe_app
from mvmr.serve.http.connections.server import Server
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.service import Service
from mvmr.serve.http.settings import ConnectionLimits, Settings

_SETTINGS = Settings(connections=ConnectionLimits(total=64, of_one=32, idle_seconds=15.0), grace=0.0)
_END_SECONDS = 2.0


@contextlib.contextmanager
def serve_probes(service: Service, listener: socket.socket) -> Iterator[None]:
    """Answer probes at a listener while the block runs."""
    # the gauge of connections is that of the other listener
    server = Server(create_probe_app(service), listener, _SETTINGS, Metrics(), lifespan="off")
    loop_factory = server.config.get_loop_factory()

    def answer() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=answer, name="mvmr-probes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_END_SECONDS)
