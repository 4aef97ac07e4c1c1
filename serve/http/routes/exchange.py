"""One request and its answer: what all endpoints share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mvmr.serve import wire
from mvmr.serve.http import request_body
from mvmr.serve.http.admission import CLIENT, SPACE_ID
from mvmr.serve.http.problems import Problem
from mvmr.serve.http.service import Service

_LEFT = "the client has gone"


def service_of(request: Request) -> Service:
    """What stands behind the application that the request came to."""
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """Who sent a request, as the edge has found out."""
    client: str = request.scope[CLIENT]
    return client


def declare_space(request: Request, space_id: str) -> None:
    """Have the answer's header name this embedding space, be the answer a problem or not; without, the engine's own."""
    request.scope[SPACE_ID] = space_id


def json_answer(value: Mapping[str, Any]) -> Response:
    """JSON; numpy's arrays become lists."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type=wire.JSON)


def is_json(request: Request) -> bool:
    """Whether the whole body is JSON, by its headers."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == wire.JSON and wire.JSON_LENGTH not in request.headers


def check_model(service: Service, name: str) -> None:
    """Refuse another model than the one that is served."""
    if name != service.engine.name:
        raise Problem("unknown-model", f"there is no model {name[:100]!r}; this service has {service.engine.name!r}")


@asynccontextmanager
async def receive(request: Request) -> AsyncIterator[tuple[bytes, request_body.Take]]:
    """Read the body, and hold the memory it takes until the block ends.

    Yields the body, and what is to hear of more bytes that the block takes in.

    Raises: ClientDisconnect when the client goes away before the block has ended; Problem for a body that is refused.
    """
    service = service_of(request)
    settings = service.settings
    most, flag = (settings.max_json, "--max-json-mb") if is_json(request) else (settings.max_body, "--max-body-mb")
    seconds = settings.connections.body_seconds
    with service.memory(client_of(request)) as take:
        body = await request_body.read_body(request, most=most, flag=flag, seconds=seconds, take=take)
        task = asyncio.current_task()
        watch = asyncio.ensure_future(_disconnection(request))
        watch.add_done_callback(lambda watch: None if watch.cancelled() or task is None else task.cancel(_LEFT))
        try:
            yield body, take
        except asyncio.CancelledError as error:
            if error.args != (_LEFT,):
                raise
            raise ClientDisconnect from None
        finally:
            watch.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
