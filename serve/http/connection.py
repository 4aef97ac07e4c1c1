"""One connection: HTTP/1.1 as uvicorn speaks it, within limits of bytes and time, and polite to unusual clients."""

from __future__ import annotations

import asyncio
import enum
import re
from typing import Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from mvmr.serve.http.connections import Connections
from mvmr.serve.problems import Problem

_HOST = re.compile(rb"[\w.~!$&'()*+,;=%:\[\]-]*", re.ASCII)
# Of a request that asks for another protocol; none is spoken here, so it is answered as if it did not.
_UPGRADE = frozenset({b"upgrade", b"http2-settings", b"connection"})
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
    connecting: what makes it, until it is made.
    """

    def __init__(
        self, config: Config, state: ServerState, app_state: dict[str, Any], *, connections: Connections, owner: str
    ) -> None:
        super().__init__(config, state, app_state)
        self.owner = owner
        self.connecting: asyncio.Task[None] | None = None
        self._all, self._limits = connections, connections.limits
        self._stage, self._since = _Stage.CONNECTING, 0.0
        self._running: RequestResponseCycle | None = None  # `cycle` is the last that came, which may have to wait
        self._heads = self._head_bytes = self._pieces = self._body_bytes = 0
        self._refusal: Problem | None = None
        self._unread_since: float | None = None
        self._closing_since: float | None = None

    # What the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._stage, self._since = _Stage.FRESH, self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self.pipeline.clear()
        if self._running is not None:  # uvicorn thinks of the last request alone
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self._all.remove(self)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._stage is _Stage.REFUSED:
            return
        if self._stage in (_Stage.FRESH, _Stage.IDLE):
            self._begin_head()
        heads = self._heads
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
        if self._stage is _Stage.HEAD and self._heads == heads:  # a head that has begun in these bytes is short so far
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head:
                self._refuse(self._large_head())

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that sends no more may still read, or may have gone; only writing to it shows which."""
        running = self._running
        half_open = self._stage is _Stage.IDLE and running is not None and not running.response_complete
        if not half_open or self.scheme == "https":
            return False
        self.cycle.keep_alive = False
        if self.scope["http_version"] == "1.1":
            self._ask_whether_there(2)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self.loop.time()
        self._all.set_unread(self, True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None
        self._all.set_unread(self, False)

    def timeout_keep_alive_handler(self) -> None:
        # closing would wait for the client to take what it has not read, and for its answer under TLS
        self.abort()

    # What the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heads += 1
        if self._stage is not _Stage.HEAD:
            self._begin_head()
        self._head_bytes = 0
        self._upgrading = False

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._add_to_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._add_to_head(len(name) + len(value))
        if len(self.headers) >= self._limits.headers:
            self._stop(Problem("large-head", f"more than {self._limits.headers} headers (--max-headers); send fewer"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        self._stage, self._since, self._pieces, self._body_bytes = _Stage.BODY, self.loop.time(), 0, 0
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            self._stop(Problem("malformed", f"a request has one Host header, this one has {len(hosts)}"))
        if hosts and not _HOST.fullmatch(hosts[0]):
            self._stop(Problem("malformed", "the Host header is not the name of a host"))
        if self.parser.get_method() == b"CONNECT":
            self._stop(
                Problem("wrong-method", "this is no proxy: CONNECT is not taken", headers={"allow": "GET, POST"})
            )
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        if len(self.pipeline) >= self._limits.pipelined:
            told = f"more than {self._limits.pipelined} requests were sent before their answers (--max-pipelined)"
            self._stop(Problem("malformed", f"{told}; wait for some"))
        super().on_headers_complete()

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
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_idle()

    def shutdown(self) -> None:
        if self._running is None or (self._running.response_complete and not self.pipeline):
            self.abort()  # to close an idle connection takes an answer of its client under TLS, and idle ones give none
        else:
            super().shutdown()

    # What `Connections` asks

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not taken yet."""
        return self.transport.get_write_buffer_size()

    def abort(self) -> None:
        """End it at once, whatever has not been sent."""
        if self._stage is _Stage.CONNECTING:
            if self.connecting:
                self.connecting.cancel()
            return
        self._unset_keepalive_if_required()
        self.transport.abort()

    def check(self, now: float) -> None:
        """End it where it takes too long."""
        limits, since = self._limits, now - self._since
        if self._stage is _Stage.CONNECTING:
            return
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > limits.answer_seconds:
                self.abort()
        elif self._stage is _Stage.REFUSED:
            if since > _LINGER and not self._is_answering:
                self.abort()
        elif self._unread_since is not None and now - self._unread_since > limits.answer_seconds:
            self._all.note("slow-answer", "a client has not read its answer for %g s", limits.answer_seconds)
            self.abort()
        elif self._stage is _Stage.FRESH and since > limits.head_seconds:
            self.abort()
        elif self._stage is _Stage.HEAD and since > limits.head_seconds and not self._is_answering:
            told = f"the head did not arrive within {limits.head_seconds:g} s (--head-seconds)"
            self._refuse(Problem("slow-head", f"{told}; send it at once"))
        elif self._stage is _Stage.BODY and since > limits.body_seconds and not self._is_answering:
            self.abort()  # it has its answer, and its body still comes

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _begin_head(self) -> None:
        self._stage, self._since, self._head_bytes = _Stage.HEAD, self.loop.time(), 0
        self._all.set_busy(self)

    def _note_idle(self) -> None:
        if self._stage is _Stage.IDLE and not self._is_answering:
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

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The request once more, without its wish for another protocol, and what came behind its head."""
        version, method = self.parser.get_http_version(), self.parser.get_method()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name not in _UPGRADE]
        if not self.parser.should_keep_alive():
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        return b"\r\n".join(lines) + b"\r\n\r\n" + rest

    def _refuse(self, problem: Problem) -> None:
        """Answer with a problem document and end, after the requests before this one have been answered."""
        self._all.count(problem.name)
        self._stage, self._since = _Stage.REFUSED, self.loop.time()
        running = self._running
        if running is None or running.response_complete:
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
            running.message_event.set()
            self._write(problem)

    def _write(self, problem: Problem) -> None:
        answer = problem.response(getattr(self, "url", b"").decode("latin-1"))
        headers = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        head = b"".join(b"%s: %s\r\n" % pair for pair in headers)
        self.transport.write(b"%s%s\r\n%s" % (STATUS_LINE[answer.status_code], head, answer.body))
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
