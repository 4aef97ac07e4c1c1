"""What the OpenAPI document says of bodies and answers, for endpoints that read and write them by hand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from mvmr.serve import wire
from mvmr.serve.http.problems import PROBLEMS
from mvmr.serve.http.request_body import MULTIPART, RAW

_OBJECT = {"type": "object"}
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "enum": [f"{wire.PROBLEM_TYPE}{name}" for name in PROBLEMS]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}
Responses = dict[int | str, dict[str, Any]]


def problems(*statuses: int) -> Responses:
    """The problem documents of these statuses."""
    titles = {status: " / ".join(title for code, title in PROBLEMS.values() if code == status) for status in statuses}
    return {
        status: {"description": titles[status], "content": {wire.PROBLEM: {"schema": _PROBLEM}}} for status in statuses
    }


def body(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON body that is read into `model`."""
    return {"requestBody": {"required": True, "content": {wire.JSON: {"schema": schema(model)}}}}


def images(model: type[BaseModel]) -> dict[str, Any]:
    """A body of images: JSON as `model`, files, or the bytes of one."""
    binary = {"type": "string", "format": "binary"}
    files = {
        "type": "object",
        "properties": {"file": {"type": "array", "items": binary, "minItems": 1}},
        "required": ["file"],
    }
    kinds = {
        wire.JSON: {"schema": schema(model)},
        MULTIPART: {"schema": files},
        RAW: {"schema": binary},
        "image/jpeg": {"schema": binary},
        "image/png": {"schema": binary},
    }
    return {"requestBody": {"required": True, "content": kinds}}


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema with its parts in place, as an OpenAPI operation can hold it."""
    document = model.model_json_schema()
    parts = document.pop("$defs", {})

    def inline(value: Any) -> Any:  # Any: JSON
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(parts[value["$ref"].rpartition("/")[2]])
            return {key: inline(item) for key, item in value.items()}
        return [inline(item) for item in value] if isinstance(value, list) else value

    result: dict[str, Any] = inline(document)
    return result


OBJECT: Responses = {200: {"description": "As asked.", "content": {wire.JSON: {"schema": _OBJECT}}}}
HEALTH: Responses = {200: {"description": "It runs.", "content": {wire.JSON: {"schema": _OBJECT}}}}
READY: Responses = HEALTH | problems(503)
TEXT: Responses = {
    200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
VECTORS: Responses = {
    200: {
        "description": "The embeddings; in binary: rows of little-endian numbers.",
        "content": {
            wire.JSON: {"schema": _OBJECT},
            wire.FLOAT32: {"schema": {"type": "string", "format": "binary"}},
            wire.FLOAT16: {"schema": {"type": "string", "format": "binary"}},
            RAW: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
POSTED: Responses = problems(400, 401, 404, 406, 408, 413, 415, 422, 429, 500)
