"""Endpoints of the Open Inference Protocol v2, as Triton's clients ask for them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mvmr.serve import wire
from mvmr.serve.http import request_body
from mvmr.serve.http.routes import openapi, query
from mvmr.serve.http.routes import protocol_v2 as protocol
from mvmr.serve.http.routes.exchange import check_model, client_of, declare_space, json_answer, receive, service_of
from mvmr.serve.http.routes.status import readyz

router = APIRouter(prefix="/v2", route_class=query.Route)
_IN_BODY = ("inputs", "outputs", "parameters", "normalize", "binary_data_output")
_INFER: dict[str, Any] = {
    "responses": openapi.VECTORS | openapi.POSTED,
    "openapi_extra": openapi.body(protocol.InferRequest),
}


@router.get("", responses=openapi.OBJECT)
async def server() -> Response:
    """This server."""
    return json_answer(protocol.server())


@router.get("/models/{name}", responses=openapi.OBJECT | openapi.problems(404))
@router.get("/models/{name}/versions/1", responses=openapi.OBJECT | openapi.problems(404))
async def model(name: str, request: Request) -> Response:
    """The model's inputs and outputs."""
    check_model(service_of(request), name)
    return json_answer(protocol.model(service_of(request).engine))


@router.get("/models/{name}/ready", responses=openapi.READY | openapi.problems(404))
@router.get("/models/{name}/versions/1/ready", responses=openapi.READY | openapi.problems(404))
async def model_ready(name: str, request: Request) -> Response:
    """As /readyz."""
    check_model(service_of(request), name)
    return await readyz(request)


@router.post("/models/{name}/infer", **_INFER)
@router.post("/models/{name}/versions/1/infer", **_INFER)
async def infer(name: str, request: Request) -> Response:
    """Embed prepared images, uint8 [N, S, S, 3]; tensors in JSON or in binary."""
    service = service_of(request)
    check_model(service, name)
    query.refuse_misplaced(request, _IN_BODY, "the JSON of the body, as the protocol has it, or in its parameters")

    async with receive(request) as (body, _):
        engine = service.engine
        header = request.headers.get(wire.JSON_LENGTH)
        infer_request, pixels = await request_body.offload(
            protocol.read,
            body,
            header,
            engine,
            service.settings.max_json,
            size=len(body) if header is None else 0,
            client=client_of(request),
        )
        request_body.check_count(len(pixels), service.settings.max_items)
        declare_space(request, engine.space_of(normalize=infer_request.parameters.normalize))
        content, headers = protocol.answer(infer_request, engine, await service.infer(pixels, client_of(request)))
        return Response(content, headers=headers)
