"""The socket a service listens at, opened before anything slow is done."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from mvmr.errors import MvmrError

_BUFFERS = 2**17  # bytes that the system keeps for a connection each way; by itself it would take megabytes
_WAITING = 2048  # connections that wait to be taken; the system may allow fewer


@contextlib.contextmanager
def open_door(host: str, port: int, flag: str = "--port") -> Iterator[socket.socket]:
    """A socket that listens, so that what is wrong with the address shows before a model is loaded; port 0: any free.

    Raises: MvmrError for an address or a port that can't be had.
    """
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            door = stack.enter_context(socket.socket(found[0], found[1], found[2]))
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # its connections inherit them
                door.setsockopt(socket.SOL_SOCKET, option, _BUFFERS)
            door.bind(found[4])
            door.listen(_WAITING)
        except OSError as error:
            why = error.strerror or str(error)
            raise MvmrError(f"cannot listen at {host}:{port}: {why}; give another {flag}") from error
        yield door


def url_of(door: socket.socket, *, tls: bool = False) -> str:
    """The address of an open door, as a URL."""
    host, port = door.getsockname()[:2]
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
