"""The embedding service as an application: its endpoints, its life, and how problems are answered."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mvmr import __version__
from mvmr.serve import wire
from mvmr.serve.engine import Engine
from mvmr.serve.http.admission import Edge
from mvmr.serve.http.fetch import Remote
from mvmr.serve.http.problems import Problem
from mvmr.serve.http.routes import embeddings, inference, query, status
from mvmr.serve.http.service import Service
from mvmr.serve.http.settings import Settings

if TYPE_CHECKING:
    from mvmr.serve.index import Index

logger = logging.getLogger(__name__)


def create_app(engine: Engine, settings: Settings, index: Index | None = None) -> FastAPI:
    """The service as an ASGI application; `app.state.service` is what stands behind it.

    Raises: MvmrError for an index of another embedding space than the engine's.
    """
    if index is not None:
        index.check_space(engine.space_of(normalize=embeddings.normalizes(engine, index)), engine.name)
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Remote(settings.url_hosts, most=settings.max_body) as remote:
            app.state.remote = remote
            await service.start()
            yield
            await service.stop()

    app = _application(service, (status.probes, status.router, embeddings.router, inference.router), lifespan)
    app.state.index = index
    document = orjson.dumps(app.openapi())  # once: it takes milliseconds, and anybody may ask for it

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(document, media_type=wire.JSON)

    if settings.cors:  # around the edge: a browser's question beforehand never carries a key
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=[wire.SPACE, wire.SHAPE, wire.ERRORS, "retry-after"],
        )  # fmt: skip
    return app


def create_probe_app(service: Service) -> FastAPI:
    """What answers at the probes' own port: health, readiness and metrics."""
    return _application(service, (status.probes,))


def _application(service: Service, routers: Sequence[APIRouter], lifespan: Any = None) -> FastAPI:
    # No pages of documentation: FastAPI's load their scripts from elsewhere.
    app = FastAPI(title="mvmr", version=__version__, lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.router.route_class = query.Route
    _answer_problems(app, service)
    for router in routers:
        app.include_router(router)
    app.add_middleware(Edge, service=service, routes=[route for router in routers for route in router.routes])
    return app


def _answer_problems(app: FastAPI, service: Service) -> None:
    def answer(request: Request, problem: Problem) -> Response:
        service.metrics.errors.labels(problem.name).inc()
        return problem.response(request.url.path)

    async def answer_problem(request: Request, error: Exception) -> Response:
        if not isinstance(error, Problem):
            raise error
        return answer(request, error)

    async def answer_http_exception(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        path = request.url.path
        if error.status_code == 404:
            return answer(request, Problem("unknown-path", f"there is no {path!r}; /openapi.json lists what there is"))
        if error.status_code == 405:
            message = f"{path!r} does not take {request.method}"
            return answer(request, Problem("wrong-method", message, headers=error.headers))
        return answer(request, Problem("malformed", str(error.detail)))

    async def answer_invalid_query(request: Request, error: Exception) -> Response:
        first = getattr(error, "errors", list)()[0]
        return answer(request, Problem("invalid", f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))

    async def answer_memory_error(request: Request, error: Exception) -> Response:
        logger.error("no memory left for a request to %s", getattr(request.scope.get("route"), "path", "another path"))
        message = "what it would take is not there now; try again later, or send less at a time"
        return answer(request, Problem("out-of-memory", message, headers={"retry-after": "1"}))

    async def answer_nobody(request: Request, error: Exception) -> Response:
        service.metrics.errors.labels("client-gone").inc()
        return Response(status_code=499)  # nobody reads it; the number shows in the metrics

    async def answer_exception(request: Request, error: Exception) -> Response:
        return answer(request, Problem("internal", "this is a fault of the service; its log has the trace"))

    app.add_exception_handler(Problem, answer_problem)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_exception_handler(RequestValidationError, answer_invalid_query)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    app.add_exception_handler(MemoryError, answer_memory_error)
    app.add_exception_handler(Exception, answer_exception)
