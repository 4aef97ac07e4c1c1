"""Endpoints that take images as they are: embed, classify, search, and OpenAI's embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from mvmr.data.image_bytes import Rejected
from mvmr.serve import wire
from mvmr.serve.engine import Engine
from mvmr.serve.http import request_body
from mvmr.serve.http.problems import Problem
from mvmr.serve.http.routes import openapi, query
from mvmr.serve.http.routes.exchange import check_model, client_of, declare_space, json_answer, receive, service_of
from mvmr.serve.http.service import EmbeddedImage, Outcome, Service
from mvmr.serve.vectors import unit

if TYPE_CHECKING:
    from mvmr.serve.index import Index

router = APIRouter(route_class=query.Route)
_NORMALIZE = "Divide each embedding by its length; they are of another embedding space then."


class EmbeddingsRequest(request_body.Input):
    """OpenAI's request for embeddings, with images for `input`."""

    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Refused unless it is the model's own.")
    user: str | None = None
    normalize: bool = Field(False, description=f"{_NORMALIZE} Not among OpenAI's.")


_IN_BODY = EmbeddingsRequest.model_fields.keys() - {"user"}


class EmbedRequest(request_body.Input):
    """The JSON of `/v1/embed`."""

    normalize: bool = Field(False, description=f"{_NORMALIZE} As in the query.")


@router.post("/v1/embeddings", responses=openapi.OBJECT | openapi.POSTED, openapi_extra=openapi.body(EmbeddingsRequest))
async def embeddings(request: Request) -> Response:
    """OpenAI's endpoint: images in base64 or as data URLs for `input`."""
    query.refuse_misplaced(request, _IN_BODY, "the JSON of the body")
    service, client = service_of(request), client_of(request)
    async with receive(request) as (body, take):
        parsed = await request_body.offload(request_body.parse, EmbeddingsRequest, body, size=len(body), client=client)
        check_model(service, parsed.model)
        if parsed.dimensions not in (None, service.engine.dim):
            reason = f"dimensions {parsed.dimensions} can't be given, this model has {service.engine.dim}"
            raise Problem("invalid", f"{reason}; leave dimensions out")
        most, remote = service.settings.max_items, request.app.state.remote
        payloads = await request_body.from_texts(parsed.texts, most=most, remote=remote, take=take, client=client)
        outcomes = await _embed(request, payloads, normalize=parsed.normalize)
        usage = {"prompt_tokens": len(outcomes), "total_tokens": len(outcomes)}
        data = [_openai(number, outcome, parsed.encoding_format) for number, outcome in enumerate(outcomes)]
        return json_answer({"object": "list", "model": service.engine.name, "data": data, "usage": usage})


@router.post("/v1/embed", responses=openapi.VECTORS | openapi.POSTED, openapi_extra=openapi.images(EmbedRequest))
async def embed(request: Request, normalize: bool = Query(False, description=_NORMALIZE)) -> Response:
    """Embed the raw bytes of one image, multipart files, or JSON; binary float32 or float16 by `Accept`."""
    service = service_of(request)
    async with receive(request) as (body, take):
        kind = _choose_kind(request.headers.get("accept", "*/*"))
        payloads, parsed = await _images(request, body, take, EmbedRequest)
        normalize = normalize or (parsed is not None and parsed.normalize)
        outcomes = await _embed(request, payloads, normalize=normalize)
        if kind != wire.JSON:
            return _binary(outcomes, service.engine, kind)
        vectors = [
            {"embedding": image.embedding, "width": image.width, "height": image.height}
            for image in _embedded_images(outcomes)
        ]
        origin = _origin(service, normalize=normalize)
        return json_answer({**origin, "dim": service.engine.dim, "results": _results(outcomes, vectors)})


@router.post(
    "/v1/classify", responses=openapi.OBJECT | openapi.POSTED, openapi_extra=openapi.images(request_body.Input)
)
async def classify(request: Request, head: str | None = Query(None), top_k: int = Query(5, ge=1, le=1000)) -> Response:
    """The most probable classes of a linear head; `head` may be left out where the bundle has one."""
    service = service_of(request)
    async with receive(request) as (body, take):
        engine = service.engine  # one for the whole request: its heads may be replaced meanwhile
        name = _choose_head(engine, head)
        payloads, _ = await _images(request, body, take, request_body.Input)
        outcomes = await _embed(request, payloads)
        labels = [{"labels": _labels(image, engine, name, top_k)} for image in _embedded_images(outcomes)]
        return json_answer({**_origin(service), "head": name, "results": _results(outcomes, labels)})


@router.post("/v1/search", responses=openapi.OBJECT | openapi.POSTED, openapi_extra=openapi.images(request_body.Input))
async def search(request: Request, k: int = Query(10, ge=1, le=1000)) -> Response:
    """The nearest images of the index this service was started with, by cosine."""
    service = service_of(request)
    async with receive(request) as (body, take):
        index: Index | None = request.app.state.index
        if index is None:
            raise Problem("no-index", "this service was started without one; start it with --index")
        payloads, _ = await _images(request, body, take, request_body.Input)
        normalize = normalizes(service.engine, index)
        outcomes = await _embed(request, payloads, normalize=normalize)
        rows = np.stack([image.embedding for image in _embedded_images(outcomes)])
        neighbours = await asyncio.to_thread(index.search, rows, k)
        hits = [{"hits": [{"path": hit.path, "score": hit.score} for hit in nearest]} for nearest in neighbours]
        return json_answer({**_origin(service, normalize=normalize), "results": _results(outcomes, hits)})


def normalizes(engine: Engine, index: Index) -> bool:
    """Whether an index holds normalised vectors of the engine, so that those to search for are normalised, too."""
    return index.space_id == engine.space_of(normalize=True)


async def _images(
    request: Request, body: bytes, take: request_body.Take, model: type[request_body.Inputs]
) -> tuple[list[request_body.Payload], request_body.Inputs | None]:
    most = service_of(request).settings.max_items
    remote, client = request.app.state.remote, client_of(request)
    return await request_body.images(request, body, model, most=most, remote=remote, take=take, client=client)


async def _embed(
    request: Request, payloads: Sequence[request_body.Payload], *, normalize: bool = False
) -> list[Outcome]:
    """Raises Problem when not one of the images can be embedded."""
    service = service_of(request)
    declare_space(request, service.engine.space_of(normalize=normalize))
    outcomes = await service.embed(payloads, client_of(request))
    failures = [
        _failure(number, outcome) for number, outcome in enumerate(outcomes) if not isinstance(outcome, EmbeddedImage)
    ]
    for failure in failures:
        service.metrics.errors.labels(failure["error"]["code"]).inc()
    if len(failures) == len(outcomes):
        raise Problem("bad-image", f"image 0: {failures[0]['error']['reason']}", errors=failures)
    return [_normalize(outcome) for outcome in outcomes] if normalize else outcomes


def _normalize(outcome: Outcome) -> Outcome:
    if not isinstance(outcome, EmbeddedImage):
        return outcome
    return replace(outcome, embedding=unit(outcome.embedding[None])[0])


def _embedded_images(outcomes: Sequence[Outcome]) -> list[EmbeddedImage]:
    return [outcome for outcome in outcomes if isinstance(outcome, EmbeddedImage)]


def _results(outcomes: Sequence[Outcome], contents: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each image: the next of `contents` where it is embedded, else why it is not."""
    remaining = iter(contents)
    return [
        {"index": number, **next(remaining)} if isinstance(outcome, EmbeddedImage) else _failure(number, outcome)
        for number, outcome in enumerate(outcomes)
    ]


def _failure(number: int, outcome: Rejected) -> dict[str, Any]:
    return {"index": number, "error": {"code": outcome.code, "reason": outcome.reason}}


def _labels(image: EmbeddedImage, engine: Engine, head: str, top_k: int) -> list[dict[str, Any]]:
    classes, chances = engine.heads[head].classes, engine.classify(image.embedding[None], head)[0]
    best = np.argsort(-chances, kind="stable")[:top_k]
    return [{"label": classes[i], "probability": float(chances[i])} for i in best]


def _openai(number: int, outcome: Outcome, encoding: str) -> dict[str, Any]:
    if not isinstance(outcome, EmbeddedImage):
        return {"object": "embedding", "embedding": None, **_failure(number, outcome)}
    values: object = outcome.embedding
    if encoding == "base64":
        values = base64.b64encode(outcome.embedding.astype("<f4").tobytes()).decode()
    return {"object": "embedding", "index": number, "embedding": values}


def _binary(outcomes: Sequence[Outcome], engine: Engine, kind: str) -> Response:
    """Rows of little-endian numbers; an image without embedding is a row of NaN, and named in a header."""
    rows = np.full((len(outcomes), engine.dim), np.nan, "<f2" if kind == wire.FLOAT16 else "<f4")
    failures = []
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, EmbeddedImage):
            rows[number] = outcome.embedding
        else:
            failures.append({"index": number, "code": outcome.code})
    headers = {wire.SHAPE: f"{rows.shape[0]},{rows.shape[1]}"}
    if failures:
        headers[wire.ERRORS] = orjson.dumps(failures).decode()
    return Response(rows.tobytes(), media_type=kind, headers=headers)


def _choose_kind(accept: str) -> str:
    """The first type in `Accept` that can be given."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for kind in kinds:
        if kind in (wire.FLOAT32, wire.FLOAT16, wire.JSON):
            return kind
        if kind in ("*/*", "application/*", ""):
            return wire.JSON
    ours = f"{wire.JSON}, {wire.FLOAT32} or {wire.FLOAT16}"
    raise Problem("not-acceptable", f"accept {accept[:100]!r} can't be given; ask for {ours}")


def _choose_head(engine: Engine, name: str | None) -> str:
    heads = engine.heads
    if name is None and len(heads) == 1:
        return next(iter(heads))
    if name is None or name not in heads:
        available = f"this bundle has {', '.join(heads)}" if heads else "this bundle has none; fit one by `mvmr probe`"
        raise Problem(
            "unknown-head", f"there is no head {name!r}; {available}" if name else f"give ?head=; {available}"
        )
    return name


def _origin(service: Service, *, normalize: bool = False) -> dict[str, str]:
    return {"model": service.engine.name, "space_id": service.engine.space_of(normalize=normalize)}
