"""The socket a service listens at, opened before anything slow is done."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from mvmr.errors import MvmrError

_BUFFERS = 2**17  # bytes that the system keeps for a connection each way; by itself it would take megabytes
_WAITING = 2048  # connections that wait to be taken; the system may allow fewer


@contextlib.contextmanager
def open_listener(host: str, port: int, flag: str = "--port") -> Iterator[socket.socket]:
    """A socket that listens, so that what is wrong with the address shows before a model is loaded; port 0: any free.

    Raises: MvmrError for an address or a port that can't be had.
    """
    with contextlib.ExitStack() as stack:
        try:
            candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = candidates[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # its connections inherit them
                listener.setsockopt(socket.SOL_SOCKET, option, _BUFFERS)
            listener.bind(address)
            listener.listen(_WAITING)
        except OSError as error:
            why = error.strerror or str(error)
            raise MvmrError(f"cannot listen at {host}:{port}: {why}; give another {flag}") from error
        yield listener


def url_of(listener: socket.socket, *, tls: bool = False) -> str:
    """The address of a listener, as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
