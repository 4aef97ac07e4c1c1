"""All connections of a service: how many there may be, and which must go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from mvmr.serve.http.connections.turns import Turns
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.settings import ConnectionLimits
from mvmr.serve.shares import is_among, owner_of, share_of

if TYPE_CHECKING:
    from mvmr.serve.http.connections.connection import Connection

logger = logging.getLogger(__name__)

_TICK = 0.5  # seconds between looks at what takes long
_QUIET = 60.0  # seconds between two lines in the log about the same thing: strangers must not fill it
_SPARE_FILES = 48  # files that the service itself may open on top of those it has: decoders come and go


class Connections:
    """Counts connections by whose they are, and ends those that are in others' way or take too long.

    turns: in which their requests begin; closing: set when no more of them are taken.

    Where there is no room, the longest idle connection of whoever has the most goes; one at which a request is under
    way never does. Where all are busy, newcomers are refused.
    """

    def __init__(self, limits: ConnectionLimits, metrics: Metrics) -> None:
        self.limits, self.turns, self._metrics = limits, Turns(), metrics
        self._most = min(limits.total, _room_for_files())
        self._counts: Counter[str] = Counter()
        self._idle: dict[str, OrderedDict[Connection, None]] = {}
        self._all: set[Connection] = set()
        self._unread: set[Connection] = set()
        self._note_times: dict[str, float] = {}
        self.closing = False
        if self._most < limits.total:
            logger.warning(
                "%d connections at most, not %d: this process may open no more files; raise it by `ulimit -n`",
                self._most, limits.total,
            )  # fmt: skip

    def admit(self, connection: Connection) -> bool:
        """Count a new connection, for which another may have to go; False where there is no room."""
        owner = connection.owner
        if not self._has_share(owner) and not self._evict(owner):
            self.note("too-many-connections", "an address has all the connections it may have, %d", self._counts[owner])
            return False
        if len(self._all) >= self._most and not (self._idle and self._evict(self._largest())):
            self.note("too-many-connections", "all %d connections are in use; more are refused", self._most)
            return False
        self._all.add(connection)
        self._counts[owner] += 1
        self.set_idle(connection)
        return True

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended, or was never made."""
        if connection in self._all:
            self._all.discard(connection)
            self._unread.discard(connection)
            self.set_busy(connection)
            self._counts[connection.owner] -= 1
            if not self._counts[connection.owner]:
                del self._counts[connection.owner]

    def set_idle(self, connection: Connection) -> None:
        """Note that nothing is under way at a connection."""
        if connection in self._all:
            self._idle.setdefault(connection.owner, OrderedDict())[connection] = None

    def set_busy(self, connection: Connection) -> None:
        """Note that a request has begun to come, or that the connection has ended."""
        if idle := self._idle.get(connection.owner):
            idle.pop(connection, None)
            if not idle:
                del self._idle[connection.owner]

    def set_unread(self, connection: Connection, unread: bool) -> None:
        """Note whether a client leaves much of its answer unread; of too much in all, the most is dropped."""
        if not unread:
            self._unread.discard(connection)
            return
        self._unread.add(connection)
        sizes = {reader: reader.unsent for reader in self._unread}
        while sum(sizes.values()) > self.limits.unsent:
            most = max(sizes, key=sizes.__getitem__)
            del sizes[most]
            self.note("slow-answer", "clients leave more than %d bytes of answers unread", self.limits.unsent)
            most.abort()

    def make_room(self) -> bool:
        """End an idle connection, for the system has no more files; False where none is."""
        self.note("too-many-connections", "the system lets this process open no more files")
        return bool(self._idle) and self._evict(self._largest())

    async def watch(self) -> None:
        """End what takes too long, again and again; and when no more is taken, what has nothing under way."""
        while True:
            await asyncio.sleep(_TICK)
            now = asyncio.get_running_loop().time()
            for connection in list(self._all):
                try:
                    connection.check(now)
                    if self.closing:
                        connection.shutdown()
                except Exception:  # of one, which must not keep the others from their end
                    logger.exception("a connection can't be ended")
            self._metrics.connections.set(len(self._all))

    def owner_of(self, address: str) -> str:
        """Whose a connection from an address is; a trusted proxy's its own."""
        return address if is_among(address, self.limits.proxies) else owner_of(address)

    def begin(self, owner: str, begin: Callable[[], bool]) -> None:
        """Begin a request; of an owner that has begun many already, a little later."""
        if is_among(owner, self.limits.proxies):
            begin()
        else:
            self.turns.take(owner, begin)

    def count(self, cause: str) -> None:
        """Count a problem by its cause."""
        self._metrics.errors.labels(cause).inc()

    def note(self, cause: str, words: str, *values: object) -> None:
        """Count a problem, and tell the log of it now and then."""
        self.count(cause)
        now = time.monotonic()
        if now - self._note_times.get(words, -_QUIET) >= _QUIET:
            self._note_times[words] = now
            logger.warning(f"{words} (said once a minute; mvmr_errors_total counts {cause})", *values)

    def _has_share(self, owner: str) -> bool:
        """Whether an owner may have one more connection beside those of others; the first is no question of shares."""
        own = self._counts[owner]
        may = min(self.limits.of_one, share_of(self._most - len(self._all) + own))
        return own < max(1, may) or is_among(owner, self.limits.proxies)

    def _largest(self) -> str:
        """Who has the most connections, of those that have an idle one."""
        return max(self._idle, key=self._counts.__getitem__)

    def _evict(self, owner: str) -> bool:
        idle = self._idle.get(owner)
        if not idle:
            return False
        connection = next(iter(idle))
        self.count("evicted")
        connection.abort()
        self.set_busy(connection)  # it ends a moment later
        return True


def raise_file_limit() -> None:
    """Raise the number of files and sockets this process may open to what it may raise it to."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a system with a limit of its own below
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _room_for_files() -> int:
    """How many connections fit beside the files this process has open and may have to open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        open_files = len(os.listdir("/proc/self/fd"))
    except OSError:  # another system
        open_files = _SPARE_FILES
    return max(1, limit - open_files - _SPARE_FILES)
