"""The embedding service: every endpoint, on FastAPI."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mvmr import __version__
from mvmr.errors import MvmrError
from mvmr.serve import inference_protocol as protocol
from mvmr.serve import metrics, openapi, payload
from mvmr.serve.edge import Edge
from mvmr.serve.engine import Engine
from mvmr.serve.problems import Problem
from mvmr.serve.remote import Remote
from mvmr.serve.service import Embedded, Outcome, Service
from mvmr.serve.settings import Settings

if TYPE_CHECKING:
    from mvmr.serve.index import Index

Floats = npt.NDArray[np.float32]
FLOAT32, FLOAT16 = "application/x-mvmr-float32", "application/x-mvmr-float16"
_GONE = Response(status_code=499)  # nobody reads it; the number shows in the metrics


class EmbeddingsRequest(payload.Input):
    """OpenAI's request for embeddings, with images for `input`."""

    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Refused unless it is the model's own.")
    user: str | None = None


def create_app(engine: Engine, settings: Settings, index: Index | None = None) -> FastAPI:
    """The service as an ASGI application; `app.state.service` is what stands behind it.

    Raises: MvmrError for an index of another embedding space than the engine's.
    """
    if index is not None and index.space_id != engine.space_id:
        told = f"the index is of space {index.space_id[:12]}, {engine.name} of {engine.space_id[:12]}"
        raise MvmrError(f"{told}; index embeddings of this bundle: `mvmr embed`, then `mvmr index`")
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Remote(settings.url_hosts, most=settings.max_body) as remote:
            app.state.remote = remote
            await service.start()
            yield
            await service.stop()

    # No pages of documentation: FastAPI's load their scripts from elsewhere.
    app = FastAPI(title="mvmr", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service, app.state.index = service, index
    _answer_problems(app, service)
    _add_status(app, service)
    _add_embeddings(app, service)
    _add_protocol(app, service)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(Edge, service=service)
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", responses=openapi.HEALTH)
    async def healthz() -> Response:
        """Whether the process runs."""
        return _json({"status": "ok"})

    @app.get("/readyz", responses=openapi.READY)
    async def readyz() -> Response:
        """Whether it does what was verified: a canary image goes through the engine and must come back as exported."""
        if fault := await service.fault():
            raise Problem("not-ready", fault)
        return _json({"status": "ready"})

    @app.get("/metrics", responses=openapi.TEXT)
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/models", responses=openapi.OBJECT)
    async def models() -> Response:
        """What is served: dimension, preprocessing, embedding space, engine and precision."""
        return _json({"object": "list", "data": [_model(app, service)]})

    @app.get("/v1/models/{name}", responses=openapi.OBJECT | openapi.problems(404))
    async def model(name: str) -> Response:
        """One of them."""
        _check_model(service, name)
        return _json(_model(app, service))


def _add_embeddings(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/embeddings", responses=openapi.OBJECT | openapi.POSTED, openapi_extra=openapi.body(EmbeddingsRequest)
    )
    async def embeddings(request: Request) -> Response:
        """OpenAI's endpoint: images in base64 or as data URLs for `input`."""

        async def work(body: bytes) -> Response:
            asked = payload.parse(EmbeddingsRequest, body)
            _check_model(service, asked.model)
            if asked.dimensions not in (None, service.engine.dim):
                told = f"dimensions {asked.dimensions} can't be given, this model has {service.engine.dim}"
                raise Problem("invalid", f"{told}; leave dimensions out")
            given = await payload.from_texts(asked.texts, most=service.settings.max_items, remote=app.state.remote)
            outcomes = await _embed(service, given)
            usage = {"prompt_tokens": len(outcomes), "total_tokens": len(outcomes)}
            data = [_openai(number, each, asked.encoding_format) for number, each in enumerate(outcomes)]
            return _json({"object": "list", "model": service.engine.name, "data": data, "usage": usage})

        return await _posted(request, service, work)

    @app.post("/v1/embed", responses=openapi.VECTORS | openapi.POSTED, openapi_extra=openapi.images(payload.Input))
    async def embed(request: Request) -> Response:
        """Embed the raw bytes of one image, multipart files, or JSON; binary float32 or float16 by `Accept`."""

        async def work(body: bytes) -> Response:
            kind = _accepted(request.headers.get("accept", "*/*"))
            outcomes = await _embed(service, await _images(request, body, app))
            if kind != payload.JSON:
                return _binary(outcomes, service.engine, kind)
            return _json({**_origin(service), "dim": service.engine.dim, "results": _results(outcomes, _vector)})

        return await _posted(request, service, work)

    @app.post("/v1/classify", responses=openapi.OBJECT | openapi.POSTED, openapi_extra=openapi.images(payload.Input))
    async def classify(
        request: Request, head: str | None = Query(None), top_k: int = Query(5, ge=1, le=1000)
    ) -> Response:
        """The most probable classes of a linear head; `head` may be left out where the bundle has one."""

        async def work(body: bytes) -> Response:
            engine, name = service.engine, _head(service, head)
            outcomes = await _embed(service, await _images(request, body, app))

            def labels(found: Embedded) -> dict[str, Any]:
                chances = engine.classify(found.embedding[None], name)[0]
                best = np.argsort(-chances, kind="stable")[:top_k]
                classes = engine.heads[name].classes
                return {"labels": [{"label": classes[i], "probability": float(chances[i])} for i in best]}

            return _json({**_origin(service), "head": name, "results": _results(outcomes, labels)})

        return await _posted(request, service, work)

    @app.post("/v1/search", responses=openapi.OBJECT | openapi.POSTED, openapi_extra=openapi.images(payload.Input))
    async def search(request: Request, k: int = Query(10, ge=1, le=1000)) -> Response:
        """The nearest images of the index this service was started with, by cosine."""

        async def work(body: bytes) -> Response:
            index: Index | None = app.state.index
            if index is None:
                raise Problem("no-index", "this service was started without one; start it with --index")
            outcomes = await _embed(service, await _images(request, body, app))
            rows = [each.embedding for each in outcomes if isinstance(each, Embedded)]
            found = iter(await asyncio.to_thread(index.search, np.stack(rows), k))

            def hits(_: Embedded) -> dict[str, Any]:
                return {"hits": [{"path": hit.path, "score": hit.score} for hit in next(found)]}

            return _json({**_origin(service), "results": _results(outcomes, hits)})

        return await _posted(request, service, work)


def _add_protocol(app: FastAPI, service: Service) -> None:
    @app.get("/v2", responses=openapi.OBJECT)
    async def server() -> Response:
        """The Open Inference Protocol v2: this server."""
        return _json(protocol.server())

    @app.get("/v2/health/live", responses=openapi.HEALTH)
    async def live() -> Response:
        """As /healthz."""
        return _json({"live": True})

    @app.get("/v2/health/ready", responses=openapi.READY)
    async def ready() -> Response:
        """As /readyz."""
        if fault := await service.fault():
            raise Problem("not-ready", fault)
        return _json({"ready": True})

    @app.get("/v2/models/{name}", responses=openapi.OBJECT | openapi.problems(404))
    @app.get("/v2/models/{name}/versions/1", responses=openapi.OBJECT | openapi.problems(404))
    async def described(name: str) -> Response:
        """The model's inputs and outputs."""
        _check_model(service, name)
        return _json(protocol.model(service.engine))

    @app.get("/v2/models/{name}/ready", responses=openapi.READY | openapi.problems(404))
    @app.get("/v2/models/{name}/versions/1/ready", responses=openapi.READY | openapi.problems(404))
    async def model_ready(name: str) -> Response:
        """As /readyz."""
        _check_model(service, name)
        return await ready()

    infers: dict[str, Any] = {
        "responses": openapi.VECTORS | openapi.POSTED, "openapi_extra": openapi.body(protocol.InferRequest)
    }  # fmt: skip

    @app.post("/v2/models/{name}/infer", **infers)
    @app.post("/v2/models/{name}/versions/1/infer", **infers)
    async def infer(name: str, request: Request) -> Response:
        """Embed prepared images, uint8 [N, S, S, 3]; tensors in JSON or in binary."""
        _check_model(service, name)

        async def work(body: bytes) -> Response:
            engine = service.engine
            asked, pixels = protocol.read(body, request.headers.get(protocol.HEADER), engine)
            payload.check_count(len(pixels), service.settings.max_items)
            content, headers = protocol.answer(asked, engine, await service.infer(pixels))
            return Response(content, headers=headers)

        return await _posted(request, service, work)


def _answer_problems(app: FastAPI, service: Service) -> None:
    def answer(request: Request, problem: Problem) -> Response:
        service.metrics.errors.labels(problem.name).inc()
        return problem.response(request.url.path)

    async def ours(request: Request, error: Exception) -> Response:
        if not isinstance(error, Problem):
            raise error
        return answer(request, error)

    async def frameworks(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        path = request.url.path
        if error.status_code == 404:
            return answer(request, Problem("unknown-path", f"there is no {path!r}; /openapi.json lists what there is"))
        if error.status_code == 405:
            told = f"{path!r} does not take {request.method}"
            return answer(request, Problem("wrong-method", told, headers=error.headers))
        return answer(request, Problem("malformed", str(error.detail)))

    async def query(request: Request, error: Exception) -> Response:
        first = getattr(error, "errors", list)()[0]
        return answer(request, Problem("invalid", f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))

    async def ourselves(request: Request, error: Exception) -> Response:
        return answer(request, Problem("internal", "this is a fault of the service; its log has the trace"))

    app.add_exception_handler(Problem, ours)
    app.add_exception_handler(HTTPException, frameworks)
    app.add_exception_handler(RequestValidationError, query)
    app.add_exception_handler(Exception, ourselves)


async def _posted(request: Request, service: Service, work: Callable[[bytes], Awaitable[Response]]) -> Response:
    """Read the body and do the work, unless the client goes away before it is done."""
    says = service.settings
    with service.memory() as take:
        try:
            body = await payload.read_body(request, most=says.max_body, seconds=says.body_seconds, take=take)
        except ClientDisconnect:
            service.metrics.errors.labels("client-gone").inc()
            return _GONE
        working = asyncio.ensure_future(work(body))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            service.metrics.errors.labels("client-gone").inc()
            return _GONE
        finally:
            working.cancel()
            gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _images(request: Request, body: bytes, app: FastAPI) -> list[payload.Payload]:
    most = app.state.service.settings.max_items
    return await payload.images(request, body, most=most, remote=app.state.remote)


async def _embed(service: Service, given: Sequence[payload.Payload]) -> list[Outcome]:
    outcomes = await service.embed(given)
    failed = [_failure(number, each) for number, each in enumerate(outcomes) if not isinstance(each, Embedded)]
    for each in failed:
        service.metrics.errors.labels(each["error"]["code"]).inc()
    if len(failed) == len(outcomes):
        raise Problem("bad-image", f"image 0: {failed[0]['error']['reason']}", errors=failed)
    return outcomes


def _results(outcomes: Sequence[Outcome], show: Callable[[Embedded], dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"index": number, **show(each)} if isinstance(each, Embedded) else _failure(number, each)
        for number, each in enumerate(outcomes)
    ]


def _failure(number: int, outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Embedded):
        raise TypeError("an image that was embedded has no failure")
    return {"index": number, "error": {"code": outcome.code, "reason": outcome.reason}}


def _vector(found: Embedded) -> dict[str, Any]:
    return {"embedding": found.embedding, "width": found.width, "height": found.height}


def _openai(number: int, outcome: Outcome, encoding: str) -> dict[str, Any]:
    if not isinstance(outcome, Embedded):
        return {"object": "embedding", "embedding": None, **_failure(number, outcome)}
    values: object = outcome.embedding
    if encoding == "base64":
        values = base64.b64encode(outcome.embedding.astype("<f4").tobytes()).decode()
    return {"object": "embedding", "index": number, "embedding": values}


def _binary(outcomes: Sequence[Outcome], engine: Engine, kind: str) -> Response:
    """Rows of little-endian numbers; an image without embedding is a row of NaN, and named in a header."""
    rows = np.full((len(outcomes), engine.dim), np.nan, "<f2" if kind == FLOAT16 else "<f4")
    failed = []
    for number, each in enumerate(outcomes):
        if isinstance(each, Embedded):
            rows[number] = each.embedding
        else:
            failed.append({"index": number, "code": each.code})
    headers = {"x-shape": f"{rows.shape[0]},{rows.shape[1]}"}
    if failed:
        headers["x-errors"] = orjson.dumps(failed).decode()
    return Response(rows.tobytes(), media_type=kind, headers=headers)


def _accepted(accept: str) -> str:
    """The first type in `Accept` that can be given."""
    wanted = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for kind in wanted:
        if kind in (FLOAT32, FLOAT16, payload.JSON):
            return kind
        if kind in ("*/*", "application/*", ""):
            return payload.JSON
    raise Problem(
        "not-acceptable", f"accept {accept[:100]!r} can't be given; ask for {payload.JSON}, {FLOAT32} or {FLOAT16}"
    )


def _head(service: Service, name: str | None) -> str:
    heads = service.engine.heads
    if name is None and len(heads) == 1:
        return next(iter(heads))
    if name not in heads:
        known = f"this bundle has {', '.join(heads)}" if heads else "this bundle has none; fit one by `mvmr probe`"
        raise Problem("unknown-head", f"there is no head {name!r}; {known}" if name else f"give ?head=; {known}")
    return name


def _check_model(service: Service, name: str) -> None:
    if name != service.engine.name:
        raise Problem("unknown-model", f"there is no model {name[:100]!r}; this service has {service.engine.name!r}")


def _origin(service: Service) -> dict[str, str]:
    return {"model": service.engine.name, "space_id": service.engine.space_id}


def _model(app: FastAPI, service: Service) -> dict[str, Any]:
    engine = service.engine
    return {
        "id": engine.name,
        "object": "model",
        "created": 0,
        "owned_by": "mvmr",
        "dim": engine.dim,
        "space_id": engine.space_id,
        "preprocessing": engine.preprocess.to_dict(),
        "precision": engine.precision,
        "engine": f"onnxruntime {engine.provider}",
        "heads": {name: list(head.classes) for name, head in engine.heads.items()},
        "index": None if app.state.index is None else {"vectors": len(app.state.index)},
    }


def _json(value: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type=payload.JSON)
