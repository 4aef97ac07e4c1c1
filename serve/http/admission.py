"""What every request passes first: whose it is, whether there is room for it, counters, and headers of every answer."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mvmr.serve import wire
from mvmr.serve.http.problems import Problem
from mvmr.serve.http.service import Service
from mvmr.serve.shares import owner_of

CLIENT = "mvmr.client"  # in the scope: whose the request is
SPACE_ID = "mvmr.space"  # in the scope: the embedding space that the answer is about, where it is not the engine's own
# Asked by machines that have no key: probes, and Prometheus.
_OPEN = re.compile(r"/healthz|/readyz|/metrics|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/1)?/ready")


class Edge:
    """ASGI middleware around the whole service.

    A request for which there is no room is sent away here, before its body is read and anything else is done.

    routes: of the service, to tell where those were going that are sent away.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: Sequence[BaseRoute]) -> None:
        self._app, self._service, self._routes = app, service, routes
        # hashed, so that neither the length nor the start of a key shows in the time a comparison takes
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, refused_at = time.perf_counter(), 500, None
        own_space = self._service.engine.space_id
        headers = dict(scope["headers"])
        if scope["method"] == "HEAD":  # uvicorn leaves the body of the answer out
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                space = scope.get(SPACE_ID, own_space)
                more = [*message.get("headers", ()), (wire.SPACE.encode(), space.encode())]
                # who waited to be told to send the body may not send it after a refusal
                if self._service.draining or (status >= 400 and b"expect" in headers):
                    more.append((b"connection", b"close"))
                message = {**message, "headers": more}
            await send(message)

        try:
            if refusal := self._refusal(scope, headers):
                self._service.metrics.errors.labels(refusal.name).inc()
                refused_at = next((route for route in self._routes if route.matches(scope)[0] is Match.FULL), None)
                await refusal.response(scope["path"])(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            # never the path as it came: strangers could make up millions
            endpoint = getattr(scope.get("route", refused_at), "path", "other")
            self._service.metrics.requests.labels(endpoint, status).inc()
            self._service.metrics.request_seconds.labels(endpoint).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Problem | None:
        """Why a request is not let in; where it is, whose it is stands in its scope."""
        key = _key(headers)
        if self._keys and not _OPEN.fullmatch(scope["path"]) and not self._is_valid(key):
            hint = "send a valid key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
            return Problem("wrong-key", hint, headers={"www-authenticate": "Bearer"})
        address = scope["client"][0] if scope.get("client") else ""
        scope[CLIENT] = hashlib.sha256(key).hexdigest() if self._keys else owner_of(address)
        if scope["method"] != "POST":
            return None
        size = headers.get(b"content-length", b"0")
        return self._service.refusal(scope[CLIENT], int(size) if size.isdigit() else 0)

    def _is_valid(self, key: bytes) -> bool:
        digest = hashlib.sha256(key).digest()
        equal = [hmac.compare_digest(digest, expected) for expected in self._keys]  # all of them, found or not
        return any(equal)


def _key(headers: dict[bytes, bytes]) -> bytes:
    key = headers.get(wire.API_KEY.encode(), b"")
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if not key and scheme.lower() == b"bearer" else key
