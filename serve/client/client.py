"""A client of the embedding service, synchronous and asynchronous (torch-free)."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Generic, Self, TypeVar

import httpx2

from mvmr.errors import MvmrError
from mvmr.serve import wire
from mvmr.serve.client.calls import Calls, Embeddings, Errors, Hit, Label, Ranked
from mvmr.serve.client.images import Images
from mvmr.serve.client.retries import Ask, Reply, Work

T = TypeVar("T")
sleep, async_sleep = time.sleep, asyncio.sleep


class Client:
    """The service at `url`, such as ``https://embed.example.com``; threads may share it.

    When the service is busy (429), not ready (503) or out of reach, a request is sent again, after the time that the
    answer asks for (five minutes at most) and a random one that grows from try to try.

    Args:
        api_key: sent as X-API-Key; timeout: seconds that the service may be silent; retries: times to send again.
        max_items, max_bytes: of a request, at most the service's --max-items and --max-body-mb; an image of more than
            `max_bytes` goes alone.

    Raises: MvmrError for a url, a key or a number that can't be. Its methods raise MvmrError, one line, when the
        service stays out of reach or busy, or refuses what is asked.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 60.0, retries: int = 5,
        max_items: int = 32, max_bytes: int = 32 * 2**20,
    ) -> None:  # fmt: skip
        self._calls = Calls(_printable_url(url), retries, max_items, max_bytes)
        self._http = httpx2.Client(base_url=url, headers=_headers(api_key), timeout=timeout)

    def embed(self, images: Images, *, normalize: bool = False, errors: Errors = "raise") -> Embeddings:
        """Embed any number of images: paths, bytes of files, PIL images, or arrays uint8 [H, W, 3] RGB in [0, 255].

        Shapes: N images, or uint8 [N, H, W, 3] -> vectors float32 [N, D], in their order.
        normalize: divide each vector by its length, which is 1 then, or 0 where all of it is 0; those are vectors of
            another embedding space.
        errors: ``raise`` MvmrError for the first image that can't be embedded, or ``return`` them all.
        Raises: MvmrError, also when another bundle is deployed meanwhile, whose vectors can't be compared.
        """
        return self._run(self._calls.embed(images, normalize, errors))

    def classify(
        self, images: Images, *, head: str | None = None, top_k: int = 5, errors: Errors = "raise"
    ) -> Ranked[Label]:
        """The `top_k` most probable classes of each image, by a head (None: the only one); else as `embed`."""
        return self._run(self._calls.classify(images, head, top_k, errors))

    def search(self, images: Images, *, k: int = 10, errors: Errors = "raise") -> Ranked[Hit]:
        """The `k` nearest images of the service's index to each image; else as `embed`."""
        return self._run(self._calls.search(images, k, errors))

    def models(self) -> list[dict[str, Any]]:
        """What is served, as /v1/models tells it."""
        return self._run(self._calls.models())

    def ready(self) -> bool:
        """Whether the service answers and is ready; asked once."""
        return self._run(self._calls.ready())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _run(self, work: Work[T]) -> T:
        reply: Reply = None
        while not isinstance(step := _next(work, reply), _Done):
            if isinstance(step, float):
                sleep(step)
                continue
            try:
                reply = self._http.send(step.request(self._http))
            except httpx2.RequestError as error:
                reply = error
        return step.value


class AsyncClient:
    """As `Client`, for asyncio; files are read in threads."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 60.0, retries: int = 5,
        max_items: int = 32, max_bytes: int = 32 * 2**20,
    ) -> None:  # fmt: skip
        self._calls = Calls(_printable_url(url), retries, max_items, max_bytes)
        self._http = httpx2.AsyncClient(base_url=url, headers=_headers(api_key), timeout=timeout)

    async def embed(self, images: Images, *, normalize: bool = False, errors: Errors = "raise") -> Embeddings:
        """As `Client.embed`."""
        return await self._run(self._calls.embed(images, normalize, errors))

    async def classify(
        self, images: Images, *, head: str | None = None, top_k: int = 5, errors: Errors = "raise"
    ) -> Ranked[Label]:
        """As `Client.classify`."""
        return await self._run(self._calls.classify(images, head, top_k, errors))

    async def search(self, images: Images, *, k: int = 10, errors: Errors = "raise") -> Ranked[Hit]:
        """As `Client.search`."""
        return await self._run(self._calls.search(images, k, errors))

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return await self._run(self._calls.models())

    async def ready(self) -> bool:
        """As `Client.ready`."""
        return await self._run(self._calls.ready())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    async def _run(self, work: Work[T]) -> T:
        reply: Reply = None
        # in a thread, for the next step may be to read and pack the files of the next request
        while not isinstance(step := await asyncio.to_thread(_next, work, reply), _Done):
            if isinstance(step, float):
                await async_sleep(step)
                continue
            try:
                reply = await self._http.send(step.request(self._http))
            except httpx2.RequestError as error:
                reply = error
        return step.value


class _Done(Generic[T]):
    """The end of a client's work."""

    def __init__(self, value: T) -> None:
        self.value = value


def _next(work: Work[T], reply: Reply) -> Ask | float | _Done[T]:
    try:
        return work.send(reply)
    except StopIteration as end:
        return _Done(end.value)


def _printable_url(url: str) -> str:
    """The URL for messages, without a password; raises MvmrError for none of http's."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise MvmrError(f"{url!r} is no URL ({error}); give one such as http://localhost:8000") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise MvmrError(f"{url!r} is no URL of a service; give one such as http://localhost:8000")
    return str(parsed.copy_with(userinfo=b"")).rstrip("/")


def _headers(api_key: str | None) -> dict[str, str]:
    if api_key is None:
        return {}
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        raise MvmrError("the API key is not printable ASCII; give it as it stands in the service's --api-keys file")
    return {wire.API_KEY: api_key}
