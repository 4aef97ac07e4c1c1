"""What goes wrong in a request, as RFC 9457 problem documents with a stable `type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from mvmr.serve import wire

# The part of `type` after `wire.PROBLEM_TYPE` -> (status, title). A promise to clients: never renamed.
PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed": (400, "The request is not well-formed"),
    "wrong-key": (401, "A valid API key is needed"),
    "unknown-path": (404, "There is no such path"),
    "unknown-model": (404, "There is no such model"),
    "unknown-head": (404, "There is no such head"),
    "no-index": (404, "This service has no index to search"),
    "wrong-method": (405, "The path does not take this method"),
    "not-acceptable": (406, "The answer can't be given in any of the accepted types"),
    "slow-head": (408, "The head of the request did not arrive in time"),
    "slow-body": (408, "The body did not arrive in time"),
    "too-large": (413, "The body is too large"),
    "wrong-type": (415, "The body is of a type that is not read here"),
    "invalid": (422, "A value in the request is not allowed"),
    "too-many-items": (422, "Too many images in one request"),
    "bad-image": (422, "None of the images can be embedded"),
    "busy": (429, "Too much is waiting already"),
    "large-head": (431, "The head of the request is too large"),
    "internal": (500, "The service has failed"),
    "engine-failed": (500, "The engine has failed"),
    "out-of-memory": (503, "The service has no memory left"),
    "not-ready": (503, "The service is not ready"),
}


INFERENCE_PROTOCOL, OPENAI = ("/v2",), ("/v1/embeddings", "/v1/models")  # how the paths of others' protocols begin
OF_OTHERS = INFERENCE_PROTOCOL + OPENAI


class Problem(Exception):
    """A request that can't be served; raised anywhere below an endpoint, answered in one place.

    detail: one sentence on this occurrence: what is wrong, the value seen, what to do.
    """

    def __init__(self, name: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.name, self.detail, self.headers, self.more = name, detail, dict(headers or {}), more

    @property
    def status(self) -> int:
        """The HTTP status."""
        return PROBLEMS[self.name][0]

    def response(self, path: str) -> Response:
        """The problem document; for clients of other protocols `error` repeats the detail where they look for it."""
        status, title = PROBLEMS[self.name]
        kind = f"{wire.PROBLEM_TYPE}{self.name}"
        document = {"type": kind, "title": title, "status": status, "detail": self.detail, **self.more}
        if path.startswith(INFERENCE_PROTOCOL):
            document["error"] = self.detail
        elif path.startswith(OPENAI):
            document["error"] = {"message": self.detail, "type": kind, "code": self.name}
        return Response(orjson.dumps(document), status, {"content-type": wire.PROBLEM, **self.headers})


def busy(reason: str, seconds: int) -> Problem:
    """The problem for a request that may be served in `seconds`."""
    return Problem("busy", f"{reason}; try again in {seconds} s", headers={"retry-after": str(seconds)})
