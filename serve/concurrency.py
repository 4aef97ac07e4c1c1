"""Several coroutines at a time, of which the first failure ends all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def gather_or_cancel(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Their results in order; when one fails, or the caller is cancelled, no other goes on for nobody."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
