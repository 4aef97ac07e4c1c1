"""Accepting connections: all that wait, at every turn of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from mvmr.serve.http.connections import heads
from mvmr.serve.http.connections.connection import Connection
from mvmr.serve.http.connections.registry import Connections
from mvmr.serve.http.problems import Problem

logger = logging.getLogger(__name__)

_AT_ONCE = 32  # connections taken before others are heard again
_PAUSE = 0.1  # seconds without taking any, where the system has no more files
_NO_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_FULL = Problem(
    "busy", "too many connections are open (--max-connections); try again in 1 s", headers={"retry-after": "1"}
)


class Acceptor:
    """Takes connections for `make`, which is given whose they are.

    uvloop takes one at a turn of its loop: under load, with hundreds of requests to a turn, newcomers waited for
    seconds, probes among them.
    """

    def __init__(
        self,
        listener: socket.socket,
        connections: Connections,
        make: Callable[[str], Connection],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listener, self._connections, self._make, self._tls = listener, connections, make, tls
        self._connecting: dict[Connection, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin; to be called in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        """Take no more, and close the listener."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        if self._tls:  # without it a request may have come by now
            for connection in self._connecting:
                connection.end_handshake()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                peer, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_FILES:  # of the network, and of that connection alone: see accept(2)
                    continue
                if not self._connections.make_room():
                    self._loop.remove_reader(self._listener.fileno())
                    self._loop.call_later(_PAUSE, self._resume)
                return
            connection = self._make(self._connections.owner_of(str(address[0])))
            if not self._connections.admit(connection):
                self._send_away(peer)
                continue
            connection.peer = peer
            task = self._connecting[connection] = self._loop.create_task(self._connect(peer, connection))
            task.add_done_callback(partial(self._on_connected, peer, connection))

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _send_away(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            peer.setblocking(False)
            if self._tls is None:
                answer = _FULL.response("")
                head = STATUS_LINE[answer.status_code]
                peer.send(heads.write_answer(head, answer.raw_headers, bytes(answer.body)))

    async def _connect(self, peer: socket.socket, connection: Connection) -> None:
        timeout = self._connections.limits.head_seconds if self._tls else None
        await self._loop.connect_accepted_socket(lambda: connection, peer, ssl=self._tls, ssl_handshake_timeout=timeout)

    def _on_connected(self, peer: socket.socket, connection: Connection, task: asyncio.Task[None]) -> None:
        del self._connecting[connection]
        connection.peer = None
        error = None if task.cancelled() else task.exception()
        if error or task.cancelled():  # what came was no handshake, or the loop ends
            self._connections.remove(connection)
            self._connections.count("no-handshake")
            peer.close()
        if error and not isinstance(error, OSError):
            logger.error("a connection failed", exc_info=error)
