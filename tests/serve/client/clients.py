"""What tests of the client share: both of its classes with one face, and what they refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mvmr.errors import MvmrError
from mvmr.serve.client import AsyncClient, Client

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
ITEMS = 3
KEY = "0123456789abcdef"


class Awaited:
    """AsyncClient with the face of Client, so that each test holds for both."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def method(*arguments: Any, **options: Any) -> Any:
            return self._runner.run(getattr(self._client, name)(*arguments, **options))

        return method

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *raised: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


both = pytest.mark.parametrize("kind", [Client, Awaited])


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
