"""Something of which there is only so much, shared so that no client takes all of it."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

_HALF = 5.0  # seconds in which half of what a client has had is forgotten
_SWEEP = 60.0  # seconds until those who have had next to nothing are forgotten
_NOTHING = 1e-3
_OF_THE_REST = 2  # a client may have that many times what it leaves
_PREFIX = 64  # bits of an IPv6 address that tell one customer of a network from another


class Shares:
    """An amount, such as places in a queue or bytes, of which clients take and give back.

    A client gets no more than two thirds of what the others have left, so that the next finds a third of it, and it
    takes many clients to leave nothing. Where nobody has any, one may have all.
    """

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._taken: Counter[str] = Counter()
        self.total = 0

    def fits(self, client: str, count: int) -> bool:
        """Whether a client can have so much more."""
        left = self._bound - self.total - count
        return left >= 0 and (not self.total or self._taken[client] + count <= _OF_THE_REST * left)

    def take(self, client: str, count: int) -> bool:
        """Let a client have so much more; False, and nothing is taken, where it doesn't fit."""
        if not self.fits(client, count):
            return False
        self._taken[client] += count
        self.total += count
        return True

    def give(self, client: str, count: int) -> None:
        """Take back what a client has had."""
        self.total -= count
        self._taken[client] -= count
        if self._taken[client] <= 0:
            del self._taken[client]


class Recent:
    """How much each client has had of late, such as seconds of a processor."""

    def __init__(self) -> None:
        self._had: dict[str, tuple[float, float]] = {}  # how much, and when that was
        self._swept = time.monotonic()

    def of(self, client: str) -> float:
        """What a client has had, of which half is forgotten every five seconds."""
        amount, at = self._had.get(client, (0.0, 0.0))
        return amount * 0.5 ** ((time.monotonic() - at) / _HALF)

    def add(self, client: str, amount: float) -> None:
        """Note that it has had so much more."""
        now = time.monotonic()
        self._had[client] = self.of(client) + amount, now
        if now - self._swept > _SWEEP:
            self._swept = now
            self._had = {owner: had for owner, had in self._had.items() if self.of(owner) > _NOTHING}


def share_of(amount: int) -> int:
    """How much a client may have of what the others have left."""
    return -(-amount * _OF_THE_REST // (_OF_THE_REST + 1))


def is_among(address: str, addresses: Iterable[str]) -> bool:
    """Whether an address is one of some, however it is written: an IPv4 address may come as one of IPv6."""
    return any(address.removeprefix("::ffff:") == entry.removeprefix("::ffff:") for entry in addresses)


@lru_cache(1024)
def owner_of(address: str) -> str:
    """Whose an address is: itself for IPv4, the network of 64 bits for IPv6, whose customers have as many each."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a Unix socket, or a test
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _PREFIX), strict=False))
    return str(parsed)
