"""What may stand in the query of a request: what an endpoint does not know is refused, not passed over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from mvmr.errors import shorten, unknown
from mvmr.serve.http.problems import OF_OTHERS, Problem


class Route(APIRoute):
    """A route that refuses a query parameter it does not declare; raises Problem with the nearest one.

    Not where the protocol is somebody else's: those say nothing of unknown parameters, and clients and gateways add
    some of their own (``api-version``). There `refuse_misplaced` sees to those that would change the answer.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind a look at the query."""
        handle = super().get_route_handler()
        if self.path.startswith(OF_OTHERS):
            return handle
        known = [field.alias for field in self.dependant.query_params]

        async def handle_known(request: Request) -> Response:
            for name in request.query_params:
                if name not in known:
                    raise Problem("invalid", str(unknown("query parameter", name, known)))
            return await handle(request)

        return handle_known


def refuse_misplaced(request: Request, names: Collection[str], place: str) -> None:
    """Refuse query parameters that are read in the body alone; raises Problem.

    names: those without which the answer would be another one; place: where they belong, for the message.
    """
    for name in request.query_params:
        if name in names:
            raise Problem("invalid", f"{shorten(name)!r} is not read in the query; give it in {place}")
