"""What every request passes: the API key, the counters, and the headers of every answer."""

from __future__ import annotations

import hashlib
import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mvmr.serve.problems import Problem
from mvmr.serve.service import Service

SPACE = "x-embedding-space"
# Asked by machines that have no key: probes, and Prometheus.
OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})


class Edge:
    """ASGI middleware around the whole service."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        # hashed, so that neither the length nor the start of a key shows in the time a comparison takes
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        space = (SPACE.encode(), self._service.engine.space_id.encode())

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), space]
                if self._service.draining:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            if self._keys and scope["path"] not in OPEN and not self._has_key(scope):
                self._service.metrics.errors.labels("wrong-key").inc()
                hint = "send a valid key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
                refusal = Problem("wrong-key", hint, headers={"www-authenticate": "Bearer"}).response(scope["path"])
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            route = scope.get("route")
            endpoint = getattr(route, "path", "other")  # never the path as it came: strangers could make up millions
            self._service.metrics.requests.labels(endpoint, status).inc()
            self._service.metrics.request_seconds.labels(endpoint).observe(time.perf_counter() - began)

    def _has_key(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        given = headers.get(b"x-api-key", b"")
        kind, _, rest = headers.get(b"authorization", b"").partition(b" ")
        if not given and kind.lower() == b"bearer":
            given = rest.strip()
        digest = hashlib.sha256(given).digest()
        equal = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, found or not
        return any(equal)
