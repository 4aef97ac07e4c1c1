"""Endpoints that say how the service is and what it serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mvmr.serve.http import metrics
from mvmr.serve.http.problems import Problem
from mvmr.serve.http.routes import openapi, query
from mvmr.serve.http.routes.exchange import check_model, json_answer, service_of

router = APIRouter(route_class=query.Route)
probes = APIRouter(route_class=query.Route)  # on the probes' own port, too


@probes.get("/healthz", responses=openapi.HEALTH | openapi.problems(422))
@probes.get("/v2/health/live", responses=openapi.HEALTH)
async def healthz(request: Request) -> Response:
    """Whether the process runs, and its event loop turns."""
    service = service_of(request)
    if (silence := service.silence()) > service.settings.stuck_seconds:
        raise Problem("not-ready", f"the event loop has not turned for {silence:.0f} s")
    return json_answer({"status": "ok"})


@probes.get("/readyz", responses=openapi.READY | openapi.problems(422))
@probes.get("/v2/health/ready", responses=openapi.READY)
async def readyz(request: Request) -> Response:
    """Whether it does what was verified: a canary is decoded and embedded, and must come back as exported."""
    if fault := await service_of(request).fault():
        raise Problem("not-ready", fault)
    return json_answer({"status": "ready"})


@probes.get("/metrics", responses=openapi.TEXT | openapi.problems(422))
async def prometheus(request: Request) -> Response:
    """Counters for Prometheus."""
    service_of(request).look()  # whether it is ready is among them, as of the last look
    return Response(service_of(request).metrics.text(), media_type=metrics.CONTENT_TYPE)


@router.get("/v1/models", responses=openapi.OBJECT)
async def models(request: Request) -> Response:
    """What is served: dimension, preprocessing, embedding space, engine and precision."""
    return json_answer({"object": "list", "data": [_model(request)]})


@router.get("/v1/models/{name}", responses=openapi.OBJECT | openapi.problems(404))
async def model(name: str, request: Request) -> Response:
    """One of them."""
    check_model(service_of(request), name)
    return json_answer(_model(request))


def _model(request: Request) -> dict[str, Any]:
    engine, index = service_of(request).engine, request.app.state.index
    return {
        "id": engine.name,
        "object": "model",
        "created": 0,  # OpenAI's clients want a number
        "owned_by": "mvmr",
        "dim": engine.dim,
        "space_id": engine.space_id,
        "normalized_space_id": engine.space_of(normalize=True),
        "preprocessing": engine.preprocess.to_dict(),
        "precision": engine.precision,
        "engine": f"{engine.artifact.runtime} {engine.provider}",
        "heads": {name: list(head.classes) for name, head in engine.heads.items()},
        "index": None if index is None else {"vectors": len(index)},
    }
