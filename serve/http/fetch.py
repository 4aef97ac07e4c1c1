"""Images from the web: from hosts on a list only, never from this network, and no more than is allowed."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Collection, Iterable
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpcore2

from mvmr.data.image_bytes import Rejected
from mvmr.errors import one_line
from mvmr.serve.http.problems import Problem

_CONNECTIONS = 8
# Networks of IPv6 that hold IPv4 addresses, which a translator on the way may lead anywhere.
_TRANSLATED = tuple(map(ipaddress.ip_network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")))
_TIMEOUTS = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}
_SECONDS = 15.0  # for the whole answer: a byte every four seconds must not hold a room for ever


class Remote:
    """Fetches images; without hosts, it refuses all.

    Names are looked up here, and the address that was checked is the one connected to: a name that changes its mind
    between the check and the connection leads nowhere. Redirects are not followed.

    Args:
        hosts: names that may be asked, as they stand in the address, without the port.
        most: bytes of an image.
    """

    def __init__(self, hosts: Collection[str], *, most: int) -> None:
        self._hosts, self._most = frozenset(host.lower() for host in hosts), most
        self._pool: httpcore2.AsyncConnectionPool | None = None

    async def __aenter__(self) -> Remote:
        if self._hosts:
            self._pool = httpcore2.AsyncConnectionPool(max_connections=_CONNECTIONS, network_backend=_Guarded())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            await self._pool.aclose()

    async def fetch(self, address: str, take: Callable[[int], None]) -> bytes | Rejected:
        """The bytes behind an address, or why there are none; `take` hears of them, and may raise Problem."""
        try:
            host = (urlsplit(address).hostname or "").lower()
        except ValueError:
            host = ""
        if self._pool is None:
            return Rejected("no-fetching", "this service fetches no addresses; send the image itself")
        if host not in self._hosts:
            return Rejected("no-fetching", f"images are not fetched from {host!r}; send the image itself")
        try:
            async with asyncio.timeout(_SECONDS):
                return await self._get(self._pool, address, take)
        except Problem:
            raise
        except TimeoutError:
            return Rejected("not-fetched", f"{host} took more than {_SECONDS:g} s")
        except _Private as error:
            return Rejected("no-fetching", str(error))
        except Exception as error:  # httpcore's own, and what sockets and certificates raise below it
            return Rejected("not-fetched", f"{host}: {one_line(error)}")

    async def _get(
        self, pool: httpcore2.AsyncConnectionPool, address: str, take: Callable[[int], None]
    ) -> bytes | Rejected:
        parts, total = [], 0
        async with pool.stream("GET", address, extensions={"timeout": _TIMEOUTS}) as answer:
            if answer.status != 200:
                return Rejected("not-fetched", f"the answer was {answer.status}")
            async for part in answer.aiter_stream():
                total += len(part)
                if total > self._most:
                    return Rejected("not-fetched", f"more than {self._most:,} bytes")
                take(len(part))
                parts.append(part)
        return b"".join(parts)


class _Private(Exception):
    """An address of this machine or its network."""


class _Guarded(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses only."""

    def __init__(self) -> None:
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> Any:  # Any: httpcore's stream
        addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = str(addresses[0][4][0])
        if not _is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise _Private(f"{host} leads to {address}, which is not a public address")
        return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address.is_site_local or any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast
