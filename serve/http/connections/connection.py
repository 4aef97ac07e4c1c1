"""One connection: HTTP/1.1 as uvicorn speaks it, within limits of bytes and time, and polite to unusual clients."""

from __future__ import annotations

import asyncio
import enum
import socket
from contextlib import suppress
from functools import partial
from typing import Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from mvmr.serve.http.connections import heads
from mvmr.serve.http.connections.registry import Connections
from mvmr.serve.http.problems import Problem

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ASK_AGAIN = 0.25  # seconds until a client that has closed its side is asked a second time whether it is still there
_LINGER = 2.0  # seconds for a client to read why it was refused
_PIECES, _SMALLEST = 1000, 64  # a body may come in so many pieces of any size, in more only of so many bytes on average


class _Stage(enum.Enum):
    CONNECTING = enum.auto()  # TLS is being agreed on
    FRESH = enum.auto()  # nothing has come yet
    IDLE = enum.auto()  # nothing of the next request has come
    HEAD = enum.auto()  # a part of a head has come
    BODY = enum.auto()  # a head has come, and not yet its whole body
    REFUSED = enum.auto()  # no more is read


class Connection(HttpToolsProtocol):
    """What a client sends and is sent.

    A request whose head or body is not as it may be is refused by a problem document, and the connection ends.

    owner: whose the connection is, for `connections`, which it is one of.
    peer: the socket, until it is connected.
    """

    def __init__(
        self, config: Config, state: ServerState, app_state: dict[str, Any], *, connections: Connections, owner: str
    ) -> None:
        super().__init__(config, state, app_state)
        self.owner = owner
        self.peer: socket.socket | None = None
        self._all, self._limits = connections, connections.limits
        self._stage, self._since = _Stage.CONNECTING, 0.0
        self._running: RequestResponseCycle | None = None  # `cycle` is the last that came, which may have to wait
        self._heads_begun = self._head_bytes = self._pieces = self._body_bytes = 0
        self._waiting_bytes = 0  # of heads whose requests wait for the answers of others
        self._refusal: Problem | None = None
        self._unread_since: float | None = None
        self._closing_since: float | None = None

    # What the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._stage, self._since = _Stage.FRESH, self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self._running is not None:  # uvicorn thinks of the last request alone
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self._all.remove(self)

    def data_received(self, data: bytes) -> None:
        if self._stage is _Stage.REFUSED:
            return
        if self._stage in (_Stage.FRESH, _Stage.IDLE):
            if not data.strip(b"\r\n"):  # RFC 9112, 2.2: an empty line before a request means nothing
                return
            self._begin_head()
        heads_before, bytes_before = self._heads_begun, self._head_bytes
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError as error:
                reason = " ".join(str(error).split()) or "it is not HTTP/1.1"
                self._refuse(self._refusal or Problem("malformed", f"the request can't be read: {reason}"))
                return
        # a head that has begun in these bytes is short so far
        if self._stage is _Stage.HEAD and self._heads_begun == heads_before:
            self._head_bytes = bytes_before + len(data)
            if self._head_bytes > self._limits.head:
                self._refuse(self._large_head())

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that sends no more may still read, or may have gone; only writing to it shows which."""
        half_open = self._stage is _Stage.IDLE and self._is_answering
        if not half_open or self.scheme == "https":
            return False
        self.cycle.keep_alive = False
        if self.scope["http_version"] == "1.1":
            self._ask_whether_there(2)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self.loop.time()
        self._all.set_busy(self)
        self._all.set_unread(self, True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None
        self._all.set_unread(self, False)
        self._note_idle()

    # What the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heads_begun += 1
        if self._stage is not _Stage.HEAD:
            self._begin_head()
        self._head_bytes = 0
        self._upgrading = False

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._add_to_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._add_to_head(len(name) + len(value))
        if self._stage is _Stage.BODY:  # a trailer, which is no header: who trusts a proxy trusts what that has set
            return
        if len(self.headers) >= self._limits.headers:
            self._stop(Problem("large-head", f"more than {self._limits.headers} headers (--max-headers); send fewer"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        head_bytes, self._head_bytes = self._head_bytes, 0
        if problem := heads.find_fault(self.parser.get_method(), self.parser.get_http_version(), self.headers):
            self._stop(problem)
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        self._waiting_bytes = head_bytes + (self._waiting_bytes if self.pipeline else 0)
        if len(self.pipeline) >= self._limits.pipelined or (self.pipeline and self._waiting_bytes > self._limits.head):
            excess = (
                f"more than {self._limits.pipelined} requests (--max-pipelined), or more bytes than a head may have"
            )
            self._stop(Problem("malformed", f"{excess}, were sent before their answers; wait for some"))
        super().on_headers_complete()
        self._stage, self._since, self._pieces, self._body_bytes = _Stage.BODY, self.loop.time(), 0, 0
        self._all.set_busy(self)

    def on_body(self, body: bytes) -> None:
        self._pieces += 1
        self._body_bytes += len(body)
        if self._pieces > _PIECES and self._body_bytes < _SMALLEST * self._pieces:
            self._stop(Problem("malformed", "the body comes in thousands of tiny pieces; send it in larger ones"))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        super().on_message_complete()
        self._stage, self._since = _Stage.IDLE, self.loop.time()
        self._note_idle()

    # What uvicorn calls

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._all.begin(self.owner, partial(self._begin, cycle, app))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `check` looks at that
        if self._stage is _Stage.IDLE:
            self._since = self.loop.time()
        self._note_idle()

    def shutdown(self) -> None:
        if self._stage in (_Stage.CONNECTING, _Stage.REFUSED):
            return  # it ends soon
        if self._is_answering or self.pipeline:
            super().shutdown()
        elif self.unsent:
            self.transport.close()
        else:
            self.abort()  # to close takes an answer of the client under TLS, and idle ones give none

    # What `Connections` asks

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not taken yet."""
        return self.transport.get_write_buffer_size()

    def abort(self) -> None:
        """End it at once, whatever has not been sent."""
        if self._stage is _Stage.CONNECTING:
            self.end_handshake()
        else:
            self.transport.abort()

    def end_handshake(self) -> None:
        """End it, as by its client's wish, where it is not yet connected."""
        if self._stage is _Stage.CONNECTING and self.peer is not None:
            with suppress(OSError):
                self.peer.shutdown(socket.SHUT_RDWR)

    def check(self, now: float) -> None:
        """End it where it takes too long."""
        limits, since = self._limits, now - self._since
        if self._stage is _Stage.CONNECTING:
            return
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > limits.answer_seconds:
                self.abort()
        elif self._unread_since is not None:
            if now - self._unread_since > limits.answer_seconds:
                self._all.note("slow-answer", "a client has not read its answer for %g s", limits.answer_seconds)
                self.abort()
        elif self._stage is _Stage.REFUSED:
            if since > _LINGER and not self._is_answering:
                self.abort()
        elif self._stage is _Stage.IDLE:
            if since > limits.idle_seconds and not self._is_answering:
                self.abort()
        elif self._stage is _Stage.FRESH and since > limits.head_seconds:
            self.abort()
        elif self._stage is _Stage.HEAD and since > limits.head_seconds and not self._is_answering:
            reason = f"the head did not arrive within {limits.head_seconds:g} s (--head-seconds)"
            self._refuse(Problem("slow-head", f"{reason}; send it at once"))
        elif self._stage is _Stage.BODY and since > limits.body_seconds and not self._is_answering:
            self.abort()  # it has its answer, and its body still comes

    def _begin(self, cycle: RequestResponseCycle, app: Any) -> bool:
        if not cycle.disconnected:
            super()._start_asgi_task(cycle, app)
        return not cycle.disconnected

    @property
    def _is_answering(self) -> bool:
        running = self._running
        return running is not None and not (running.response_complete or running.disconnected)

    def _begin_head(self) -> None:
        self._stage, self._since, self._head_bytes = _Stage.HEAD, self.loop.time(), 0

    def _note_idle(self) -> None:
        if self._stage is _Stage.IDLE and not self._is_answering and self._unread_since is None:
            self._all.set_idle(self)

    def _add_to_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > self._limits.head:
            self._stop(self._large_head())

    def _large_head(self) -> Problem:
        return Problem(
            "large-head", f"a head has at most {self._limits.head:,} bytes (--max-head-kb); send a smaller one"
        )

    def _stop(self, problem: Problem) -> None:
        """Have the parser give up."""
        self._refusal = problem
        raise ValueError(problem.detail)

    def _without_upgrade(self, tail: bytes) -> bytes:
        """The request once more, without its wish for another protocol, and what came behind its head."""
        version, close = self.parser.get_http_version(), not self.parser.should_keep_alive()
        head = heads.drop_upgrade(self.parser.get_method(), self.url, version, self.headers, close=close)
        self.parser = httptools.HttpRequestParser(self)
        return head + tail

    def _refuse(self, problem: Problem) -> None:
        """Answer with a problem document and end, after the requests before this one have been answered."""
        self._all.count(problem.name)
        in_body = self._stage is _Stage.BODY
        self._stage, self._since = _Stage.REFUSED, self.loop.time()
        running = self._running
        if in_body and self.cycle.response_complete:
            self.abort()  # it has had its answer, and its body still came
        elif running is None or running.response_complete:
            self._write(problem)
        elif self.pipeline or not running.more_body:  # those that came whole have their answers
            if self.cycle.more_body:
                self.pipeline.popleft()
            last = self.pipeline[0][0] if self.pipeline else running
            last.keep_alive = False
        elif running.response_started:
            self.abort()
        else:
            running.disconnected = True
            running.waiting_for_100_continue = False
            running.message_event.set()
            self._write(problem)

    def _write(self, problem: Problem) -> None:
        answer = problem.response(getattr(self, "url", b"").decode("latin-1"))
        headers = [*self.server_state.default_headers, *answer.raw_headers]
        self.transport.write(heads.write_answer(STATUS_LINE[answer.status_code], headers, bytes(answer.body)))
        # what it still sends is dropped for a while: closed at once, it might never read the answer
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _ask_whether_there(self, times: int) -> None:
        running = self._running
        if times and running is not None and not running.response_started and not self.transport.is_closing():
            self.transport.write(_CONTINUE)
            self.loop.call_later(_ASK_AGAIN, self._ask_whether_there, times - 1)
