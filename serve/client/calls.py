"""What the methods of a client do and give, without sending and waiting (see `mvmr.serve.client.retries`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

import httpx2
import numpy as np
import numpy.typing as npt
import orjson

from mvmr.errors import MvmrError, summarise, unknown
from mvmr.serve.client.images import ImageError, Images, Sent, parts
from mvmr.serve.client.retries import Ask, Work, answer_to

Errors = Literal["raise", "return"]
Entry = TypeVar("Entry")
T = TypeVar("T")

_FLOAT32, _SPACE = "application/x-mvmr-float32", "x-embedding-space"


@dataclass(frozen=True, eq=False)
class Embeddings:
    """vectors: float32 [N, D], not normalised, rows of NaN for the images in `errors`.

    space_id: vectors are comparable exactly when theirs are equal
    """

    vectors: npt.NDArray[np.float32]
    space_id: str
    errors: tuple[ImageError, ...]


@dataclass(frozen=True)
class Label:
    """A class of a head, and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Hit:
    """An image of the index, and its cosine."""

    path: str
    score: float


@dataclass(frozen=True)
class Ranked(Generic[Entry]):
    """rows: a tuple to each image, best first, empty for the images in `errors`."""

    rows: tuple[tuple[Entry, ...], ...]
    space_id: str
    errors: tuple[ImageError, ...]


@dataclass
class _Found(Generic[T]):
    """count: images there were; shown: what was found, by number; space: "" before the first answer."""

    count: int = 0
    shown: dict[int, T] = field(default_factory=dict)
    errors: list[ImageError] = field(default_factory=list)
    space: str = ""


@dataclass(frozen=True)
class Calls:
    """The work of a client's methods.

    url: of the service, for messages; retries: times to send a request again
    max_items, max_bytes: images to a request, and bytes of their files
    """

    url: str
    retries: int
    max_items: int
    max_bytes: int

    def __post_init__(self) -> None:
        for name, least in (("retries", 0), ("max_items", 1), ("max_bytes", 1)):
            if getattr(self, name) < least:
                raise MvmrError(f"{name} = {getattr(self, name)} of a client must be at least {least}")

    def embed(self, images: Images, errors: Errors) -> Work[Embeddings]:
        """The images' embeddings."""
        ask = Ask("/v1/embed", accept=_FLOAT32)
        found = yield from self._each(ask, images, errors, lambda outcome: outcome["embedding"])
        dim = next((row.size for row in found.shown.values()), None)
        if dim is None:  # there is no image, or none that can be embedded
            dim = (yield from self.models())[0]["dim"]
        vectors = np.full((found.count, dim), np.nan, np.float32)
        for index, row in found.shown.items():
            vectors[index] = row
        return Embeddings(vectors, found.space, tuple(found.errors))

    def classify(self, images: Images, head: str | None, top_k: int, errors: Errors) -> Work[Ranked[Label]]:
        """The images' most probable classes."""
        query: dict[str, str | int] = {"top_k": top_k} if head is None else {"top_k": top_k, "head": head}

        def labels(outcome: Any) -> tuple[Label, ...]:
            return tuple(Label(each["label"], each["probability"]) for each in outcome["labels"])

        return self._ranked(Ask("/v1/classify", query), images, errors, labels)

    def search(self, images: Images, k: int, errors: Errors) -> Work[Ranked[Hit]]:
        """The images' nearest in the index."""

        def hits(outcome: Any) -> tuple[Hit, ...]:
            return tuple(Hit(each["path"], each["score"]) for each in outcome["hits"])

        return self._ranked(Ask("/v1/search", {"k": k}), images, errors, hits)

    def models(self) -> Work[list[dict[str, Any]]]:
        """What is served."""
        answer = yield from answer_to(Ask("/v1/models"), self.url, self.retries)
        with self._as_promised():
            return [{**each} for each in answer.json()["data"]]

    def ready(self) -> Work[bool]:
        """Whether the service answers and is ready; not asked again."""
        got = yield Ask("/readyz")
        return isinstance(got, httpx2.Response) and got.status_code == 200

    def _ranked(
        self, ask: Ask, images: Images, errors: Errors, show: Callable[[Any], tuple[Entry, ...]]
    ) -> Work[Ranked[Entry]]:
        found = yield from self._each(ask, images, errors, show)
        rows = tuple(found.shown.get(index, ()) for index in range(found.count))
        return Ranked(rows, found.space, tuple(found.errors))

    def _each(self, ask: Ask, images: Images, errors: Errors, show: Callable[[Any], T]) -> Work[_Found[T]]:
        if errors not in ("raise", "return"):
            raise unknown("value of errors", errors, ("raise", "return"))
        found = _Found[T]()
        for part in parts(images, self.max_items, self.max_bytes):
            failed = [each for each in part if isinstance(each, ImageError)]
            sent = [each for each in part if isinstance(each, Sent)]
            if sent and not (failed and errors == "raise"):
                files = [("file", (str(each.index), each.content)) for each in sent]
                answer = yield from answer_to(replace(ask, files=files), self.url, self.retries)
                with self._as_promised():
                    shown, more = _outcomes(answer, sent, show)
                    self._check_space(found.space, answer.headers[_SPACE])
                    found.space = answer.headers[_SPACE]
                found.shown |= shown
                failed = sorted(failed + more, key=lambda each: each.index)
            if failed and errors == "raise":
                told = f"{failed[0].name} can't be embedded: {failed[0].reason or failed[0].code}"
                raise MvmrError(" ".join(f"{self.url}: {told}; mend it, leave it out, or give errors='return'".split()))
            found.errors += failed
            found.count += len(part)
        if not found.space:  # nothing was sent
            found.space = (yield from self.models())[0]["space_id"]
        return found

    def _check_space(self, before: str, now: str) -> None:
        if before and now != before:
            told = f"its embedding space changed from {before[:12]} to {now[:12]} during this call"
            raise MvmrError(f"{self.url}: {told}: another bundle has been deployed; make the call again")

    @contextmanager
    def _as_promised(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = summarise(error)
            raise MvmrError(f"{self.url} doesn't answer as an mvmr service does ({reason}); check the URL") from error


def _outcomes(
    answer: httpx2.Response, sent: Sequence[Sent], show: Callable[[Any], T]
) -> tuple[dict[int, T], list[ImageError]]:
    """What was found for the images of one request, by their number, and those that failed."""
    shown: dict[int, T] = {}
    failed: list[ImageError] = []
    outcomes = _binary(answer) if answer.headers.get("content-type") == _FLOAT32 else _json(answer)
    if sorted(outcome["index"] for outcome in outcomes) != list(range(len(sent))):
        raise ValueError(f"{len(outcomes)} results for {len(sent)} images")
    for outcome in outcomes:
        image = sent[outcome["index"]]
        if error := outcome.get("error"):
            failed.append(ImageError(image.index, image.name, error["code"], error.get("reason")))
        else:
            shown[image.index] = show(outcome)
    return shown, failed


def _json(answer: httpx2.Response) -> list[dict[str, Any]]:
    document = answer.json()
    return [{**each} for each in document["results" if answer.is_success else "errors"]]


def _binary(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The rows and the header x-errors of a binary answer, as a JSON answer would have them."""
    count, dim = map(int, answer.headers["x-shape"].split(","))
    rows = np.frombuffer(answer.content, "<f4").reshape(count, dim)
    errors = orjson.loads(answer.headers.get("x-errors", "[]"))
    codes = {each["index"]: each["code"] for each in errors}
    return [
        {"index": index, "error": {"code": codes[index]}} if index in codes else {"index": index, "embedding": row}
        for index, row in enumerate(rows)
    ]
