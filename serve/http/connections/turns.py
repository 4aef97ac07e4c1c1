"""Turns of the event loop, of which nobody takes all: who has hundreds of connections does not hold others up."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

_AT_A_TURN = 1  # request of one owner that begins in a turn: others wait for them, several turns to a request


class Turns:
    """Lets requests begin: those of an owner that has begun many in this turn of the event loop, in the next ones."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._waiting: dict[str, deque[Callable[[], bool]]] = {}
        self._is_due = False

    def take(self, owner: str, begin: Callable[[], bool]) -> None:
        """Begin a request of an owner, now or soon.

        begin: says whether it did; a request whose client has gone meanwhile does not count.
        """
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._next)
        if owner in self._waiting or self._begun[owner] >= _AT_A_TURN:
            self._waiting.setdefault(owner, deque()).append(begin)
            return
        self._begun[owner] += begin()

    def _next(self) -> None:
        self._begun.clear()
        self._is_due = bool(self._waiting)
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._next)
        for owner, waiting in list(self._waiting.items()):
            while waiting and self._begun[owner] < _AT_A_TURN:
                self._begun[owner] += waiting.popleft()()
            if not waiting:
                del self._waiting[owner]
