"""uvicorn's server, with sockets and connections of ours."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Literal

import uvicorn

from mvmr.serve.http.connections.acceptor import Acceptor
from mvmr.serve.http.connections.connection import Connection
from mvmr.serve.http.connections.registry import Connections
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.settings import Settings


class Server(uvicorn.Server):
    """Serves an application at a socket that listens already.

    Signals are for the caller: uvicorn would raise them again at the end, and the exit code would be 143.
    """

    def __init__(
        self,
        app: object,
        listener: socket.socket,
        settings: Settings,
        metrics: Metrics,
        *,
        lifespan: Literal["on", "off"] = "on",
    ) -> None:
        limits = settings.connections
        mapped = [f"::ffff:{proxy}" for proxy in limits.proxies if "." in proxy]  # as they come to an address of IPv6
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http="httptools", ws="none", lifespan=lifespan, log_config=None, access_log=False, server_header=False,
            proxy_headers=bool(limits.proxies), forwarded_allow_ips=[*limits.proxies, *mapped],
            timeout_graceful_shutdown=max(1, round(settings.grace)),
            ssl_certfile=settings.tls_cert, ssl_keyfile=settings.tls_key,
        )  # fmt: skip
        super().__init__(config)
        self._listener, self._limits, self._metrics = listener, limits, metrics

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._connections = Connections(self._limits, self._metrics)  # now that the files of everything else are open
        self._acceptor = Acceptor(self._listener, self._connections, self._make_connection, self.config.ssl)
        self._acceptor.start()
        self._watch = asyncio.ensure_future(self._connections.watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._acceptor.stop()
        self._connections.closing = True
        await super().shutdown(sockets=[])
        self._watch.cancel()

    def _make_connection(self, owner: str) -> Connection:
        return Connection(
            self.config, self.server_state, self.lifespan.state, connections=self._connections, owner=owner
        )
