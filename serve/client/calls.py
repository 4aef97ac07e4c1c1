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
from mvmr.serve import wire
from mvmr.serve.client.images import ImageError, ImageFile, Images, pack
from mvmr.serve.client.retries import Ask, Work, answer_to

Errors = Literal["raise", "return"]
Entry = TypeVar("Entry")
T = TypeVar("T")

_OFF = 1e-3  # that the length of a normalised vector may be from 1


@dataclass(frozen=True, eq=False)
class Embeddings:
    """vectors: float32 [N, D], normalised where that was asked for; rows of NaN for the images in `errors`.

    space_id: vectors are comparable exactly when theirs are equal; that of normalised ones is another than of raw ones
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
class _Results(Generic[T]):
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

    def embed(self, images: Images, normalize: bool, errors: Errors) -> Work[Embeddings]:
        """The images' embeddings."""
        ask = Ask("/v1/embed", {"normalize": "true"} if normalize else {}, accept=wire.FLOAT32)
        space = "normalized_space_id" if normalize else "space_id"
        results = yield from self._collect(ask, images, errors, lambda outcome: outcome["embedding"], space)
        dim = next((row.size for row in results.shown.values()), None)
        if dim is None:  # there is no image, or none that can be embedded
            dim = (yield from self.models())[0]["dim"]
        vectors = np.full((results.count, dim), np.nan, np.float32)
        for index, row in results.shown.items():
            vectors[index] = row
        if normalize:
            self._check_lengths(vectors)
        return Embeddings(vectors, results.space, tuple(results.errors))

    def classify(self, images: Images, head: str | None, top_k: int, errors: Errors) -> Work[Ranked[Label]]:
        """The images' most probable classes."""
        query: dict[str, str | int] = {"top_k": top_k} if head is None else {"top_k": top_k, "head": head}

        def labels(outcome: Any) -> tuple[Label, ...]:
            return tuple(Label(entry["label"], entry["probability"]) for entry in outcome["labels"])

        return self._rank(Ask("/v1/classify", query), images, errors, labels)

    def search(self, images: Images, k: int, errors: Errors) -> Work[Ranked[Hit]]:
        """The images' nearest in the index."""

        def hits(outcome: Any) -> tuple[Hit, ...]:
            return tuple(Hit(entry["path"], entry["score"]) for entry in outcome["hits"])

        return self._rank(Ask("/v1/search", {"k": k}), images, errors, hits)

    def models(self) -> Work[list[dict[str, Any]]]:
        """What is served."""
        answer = yield from answer_to(Ask("/v1/models"), self.url, self.retries)
        with self._as_promised():
            return [{**model} for model in answer.json()["data"]]

    def ready(self) -> Work[bool]:
        """Whether the service answers and is ready; not asked again."""
        reply = yield Ask("/readyz")
        return isinstance(reply, httpx2.Response) and reply.status_code == 200

    def _rank(
        self, ask: Ask, images: Images, errors: Errors, show: Callable[[Any], tuple[Entry, ...]]
    ) -> Work[Ranked[Entry]]:
        results = yield from self._collect(ask, images, errors, show)
        rows = tuple(results.shown.get(index, ()) for index in range(results.count))
        return Ranked(rows, results.space, tuple(results.errors))

    def _collect(
        self, ask: Ask, images: Images, errors: Errors, show: Callable[[Any], T], space: str = "space_id"
    ) -> Work[_Results[T]]:
        """space: what the service calls the embedding space of the answers where it says what is served."""
        if errors not in ("raise", "return"):
            raise unknown("value of errors", errors, ("raise", "return"))
        results = _Results[T]()
        for part in pack(images, self.max_items, self.max_bytes):
            failures = [image for image in part if isinstance(image, ImageError)]
            image_files = [image for image in part if isinstance(image, ImageFile)]
            if image_files and not (failures and errors == "raise"):
                files = [("file", (str(file.index), file.content)) for file in image_files]
                answer = yield from answer_to(replace(ask, files=files), self.url, self.retries)
                with self._as_promised():
                    shown, more = _outcomes(answer, image_files, show)
                    self._check_space(results.space, answer.headers[wire.SPACE])
                    results.space = answer.headers[wire.SPACE]
                results.shown |= shown
                failures = sorted(failures + more, key=lambda failure: failure.index)
            if failures and errors == "raise":
                first = failures[0]
                reason = f"{first.name} can't be embedded: {first.reason or first.code}"
                message = f"{self.url}: {reason}; mend it, leave it out, or give errors='return'"
                raise MvmrError(" ".join(message.split()))
            results.errors += failures
            results.count += len(part)
        if not results.space:  # nothing was sent
            model = (yield from self.models())[0]
            if space not in model:
                raise self._too_old()
            results.space = model[space]
        return results

    def _check_space(self, before: str, now: str) -> None:
        if before and now != before:
            reason = f"its embedding space changed from {before[:12]} to {now[:12]} during this call"
            raise MvmrError(f"{self.url}: {reason}: another bundle has been deployed; make the call again")

    def _check_lengths(self, vectors: npt.NDArray[np.float32]) -> None:
        """Refuse vectors of a service from before there was `normalize`, which passes over what it doesn't know."""
        lengths = np.linalg.norm(vectors, axis=1)
        if np.any((lengths != 0) & (np.abs(lengths - 1) > _OFF)):  # not for NaN
            raise self._too_old()

    def _too_old(self) -> MvmrError:
        return MvmrError(f"{self.url} doesn't know how to normalise; upgrade it, or leave normalize out")

    @contextmanager
    def _as_promised(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = summarise(error)
            raise MvmrError(f"{self.url} doesn't answer as an mvmr service does ({reason}); check the URL") from error


def _outcomes(
    answer: httpx2.Response, image_files: Sequence[ImageFile], show: Callable[[Any], T]
) -> tuple[dict[int, T], list[ImageError]]:
    """What was found for the images of one request, by their number, and those that failed."""
    shown: dict[int, T] = {}
    failures: list[ImageError] = []
    outcomes = _binary(answer) if answer.headers.get("content-type") == wire.FLOAT32 else _json(answer)
    if sorted(outcome["index"] for outcome in outcomes) != list(range(len(image_files))):
        raise ValueError(f"{len(outcomes)} results for {len(image_files)} images")
    for outcome in outcomes:
        image = image_files[outcome["index"]]
        if error := outcome.get("error"):
            failures.append(ImageError(image.index, image.name, error["code"], error.get("reason")))
        else:
            shown[image.index] = show(outcome)
    return shown, failures


def _json(answer: httpx2.Response) -> list[dict[str, Any]]:
    document = answer.json()
    return [{**outcome} for outcome in document["results" if answer.is_success else "errors"]]


def _binary(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The rows and the header x-errors of a binary answer, as a JSON answer would have them."""
    count, dim = map(int, answer.headers[wire.SHAPE].split(","))
    rows = np.frombuffer(answer.content, "<f4").reshape(count, dim)
    errors = orjson.loads(answer.headers.get(wire.ERRORS, "[]"))
    codes = {error["index"]: error["code"] for error in errors}
    return [
        {"index": index, "error": {"code": codes[index]}} if index in codes else {"index": index, "embedding": row}
        for index, row in enumerate(rows)
    ]
