"""One request of a client and its answer: sent again while the service is busy, and a line when there is no answer.

All work of a client is written as generators that yield a request to send, or seconds to wait, and are sent the answer,
or the error there was instead: the same for a client that blocks and for one that awaits.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from mvmr.errors import MvmrError
from mvmr.serve import wire

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds: what the random wait is drawn from doubles from one to the other
_LONGEST_ASKED = 300.0  # seconds of Retry-After that a client is ready for
_BUSY = (429, 503)
_AGAIN = (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ConnectTimeout)
BAD_IMAGE = f"{wire.PROBLEM_TYPE}bad-image"
_HINTS = {
    f"{wire.PROBLEM_TYPE}too-many-items": "; give the client that number as max_items",
    f"{wire.PROBLEM_TYPE}too-large": "; give the client a smaller max_bytes",
    f"{wire.PROBLEM_TYPE}wrong-key": "; give it to the client as api_key",
}


@dataclass(frozen=True)
class Ask:
    """A request; `files` are sent as multipart."""

    path: str
    query: Mapping[str, str | int] = field(default_factory=dict)
    accept: str = wire.JSON
    files: Sequence[tuple[str, tuple[str, bytes]]] = ()

    def request(self, http: httpx2.Client | httpx2.AsyncClient) -> httpx2.Request:
        """The same in httpx's terms; a new one for each try."""
        method, headers = "POST" if self.files else "GET", {"accept": self.accept}
        return http.build_request(method, self.path, params=self.query, headers=headers, files=self.files or None)


Reply = httpx2.Response | httpx2.RequestError | None
Work = Generator[Ask | float, Reply, T]


def answer_to(ask: Ask, url: str, retries: int) -> Work[httpx2.Response]:
    """The answer to one request, sent again `retries` times at most.

    It has succeeded, or is the problem document of a request in which no image could be embedded.

    Raises: MvmrError, one line, for another answer, or none.
    """
    tries = 0
    while True:
        reply = yield ask
        tries += 1
        if isinstance(reply, httpx2.Response):
            if reply.is_success or problem(reply).get("type") == BAD_IMAGE:
                return reply
            retry, wait = reply.status_code in _BUSY, _retry_after(reply)
        else:
            retry, wait = isinstance(reply, _AGAIN), 0.0
        if not retry or tries > retries or wait > _LONGEST_ASKED:
            often = f" (tried {tries} times)" if tries > 1 else ""
            raise MvmrError(" ".join(f"{url}{ask.path} {_refusal(reply)}{often}".split()))
        # Full jitter, on top of what is asked for: all that were refused together must not come back together.
        yield wait + random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (tries - 1)))


def problem(answer: httpx2.Response) -> dict[str, Any]:
    """The problem document of an answer, {} where it has none."""
    if not answer.headers.get("content-type", "").startswith(wire.PROBLEM):
        return {}
    try:
        document = answer.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _retry_after(answer: httpx2.Response) -> float:
    """Seconds that the answer asks to wait, which may be given as a number or a date."""
    text = answer.headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    now = datetime.now(UTC)
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds())


def _refusal(reply: Reply) -> str:
    if isinstance(reply, httpx2.Response):
        document = problem(reply)
        if detail := document.get("detail"):
            return f"answered {reply.status_code}: {detail}{_HINTS.get(str(document.get('type')), '')}"
        to = f", to {reply.headers['location']}" if "location" in reply.headers else ""
        return f"answered {reply.status_code} {reply.reason_phrase}{to}, not as an mvmr service does; check the URL"
    why = f"{type(reply).__name__} {reply}"
    if isinstance(reply, httpx2.TimeoutException) and not isinstance(reply, httpx2.ConnectTimeout):
        return f"has not answered in time: {why}; give a longer timeout, or a smaller max_items"
    return f"can't be reached: {why}; check the URL, and that the service is running there"
