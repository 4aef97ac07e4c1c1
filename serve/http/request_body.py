"""The images of a request: raw bytes, multipart files, or JSON with base64, data URLs and addresses."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar
from weakref import WeakValueDictionary

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mvmr.data.image_bytes import Rejected
from mvmr.serve import wire
from mvmr.serve.concurrency import gather_or_cancel
from mvmr.serve.http.fetch import Remote
from mvmr.serve.http.problems import Problem

MULTIPART, RAW = "multipart/form-data", "application/octet-stream"
_DATA_URL = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_WORDS = {"missing": "is missing"}
_VALUES = 100_000  # in the JSON of a request with images: each takes up to fifty times the memory of its letters
_AT_ONCE = 2**16  # bytes of JSON that are read, and of a multipart body, while nothing else is done
_READER = ThreadPoolExecutor(1, "mvmr-json")
_TURNS: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by client

Payload = bytes | Rejected
Take = Callable[[int], None]  # hears of bytes before they are kept, and may raise Problem
Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
Text = Annotated[str, Field(min_length=1)]
# An error for every item of a long list, or for every unknown key, would take a thousand times the memory of the body.
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class Input(BaseModel):
    """JSON with images, each in base64, as a data URL or (where it is allowed) as an http address."""

    model_config = ConfigDict(strict=True)

    input: Text | Texts = Field(
        description="One or several images: base64, a data URL, or an address on a host that this service may ask."
    )

    @property
    def texts(self) -> list[str]:
        """The images, one or several, as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


Inputs = TypeVar("Inputs", bound=Input)


async def read_body(request: Request, *, most: int, flag: str, seconds: float, take: Take) -> bytes:
    """Read the whole body; `take` hears of every piece, and may refuse it.

    flag: that sets the limit.
    Raises: Problem for more bytes than `most`, a body that is not there within `seconds`, or one that is encoded.
    """
    if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise Problem("wrong-type", f"content-encoding {encoding!r} is not read here; send the body as it is")
    try:
        promised = int(request.headers.get("content-length", 0))
    except ValueError:
        raise Problem("malformed", "content-length is not a number") from None
    limit = f"the limit is {most:,} bytes ({flag}); send fewer or smaller images"
    if promised > most:
        raise Problem("too-large", f"a body of {promised:,} bytes was announced; {limit}")
    parts, total = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                total += len(part)
                if total > most:
                    raise Problem("too-large", f"the body has more than {total - len(part):,} bytes; {limit}")
                take(len(part))
                parts.append(part)
    except TimeoutError:
        reason = f"{total:,} bytes came in {seconds:g} s"
        raise Problem(
            "slow-body", f"{reason} (--body-seconds); send the whole body at once", headers={"connection": "close"}
        ) from None
    return b"".join(parts)


async def images(
    request: Request, body: bytes, model: type[Inputs], *, most: int, remote: Remote, take: Take, client: str
) -> tuple[list[Payload], Inputs | None]:
    """The images of a body, by its content type; each is there or has its own reason why not.

    model: what JSON is read into; it comes second, None for a body that is no JSON.
    Raises: Problem for a body of another type, not well-formed, without images, or with more than `most`.
    """
    kind = request.headers.get("content-type", RAW).partition(";")[0].strip().lower()
    if kind == wire.JSON:
        inputs = await offload(parse, model, body, size=len(body), client=client)
        return await from_texts(inputs.texts, most=most, remote=remote, take=take, client=client), inputs
    if kind == MULTIPART:
        return await _multipart(request, body, most), None
    if kind == RAW or kind.startswith("image/"):
        return [body], None
    raise Problem(
        "wrong-type", f"content-type {kind!r} is not read here; send {wire.JSON}, {MULTIPART}, image/* or {RAW}"
    )


async def offload(work: Callable[..., Result], *arguments: Any, size: int, client: str) -> Result:
    """Do `work` with JSON of so many bytes: much of it in a thread, so that others are heard meanwhile.

    client: whose it is; one has one piece of work at a time in that thread, so that others' waits for no crowd.
    """
    if size <= _AT_ONCE:
        return work(*arguments)
    turn = _TURNS.setdefault(client, asyncio.Lock())
    async with turn:
        return await asyncio.get_running_loop().run_in_executor(_READER, work, *arguments)


def warm_up() -> None:
    """Start the thread that `offload` takes."""
    _READER.submit(bytes).result()


def parse(model: type[Model], body: bytes, values: int = _VALUES) -> Model:
    """Read JSON strictly into a pydantic model; raises Problem naming every value that is not allowed.

    values: how many there may be; they are counted before anything is made of them.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > values:
        raise Problem("invalid", f"the JSON holds more than {values:,} values; send fewer, tensors in binary")
    try:
        return model.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Problem("malformed", f"the body is not JSON: {error}") from None
    except ValidationError as error:
        errors = [
            {"at": _format_location(item["loc"]), "problem": _WORDS.get(item["type"], item["msg"])}
            for item in error.errors()
        ]
        first = errors[0]
        raise Problem("invalid", f"{first['at']}: {first['problem']}", errors=errors) from None


async def from_texts(texts: Sequence[str], *, most: int, remote: Remote, take: Take, client: str) -> list[Payload]:
    """Decode base64 and data URLs, fetch what is an address; raises Problem for more than `most`."""
    check_count(len(texts), most)
    fetched = await gather_or_cancel([remote.fetch(text, take) for text in texts if _ADDRESS.match(text)])
    addresses = iter(fetched)
    decoded = await offload(_decode, texts, size=sum(map(len, texts)), client=client)
    return [next(addresses) if payload is None else payload for payload in decoded]


def check_count(count: int, most: int) -> None:
    """Refuse too many images."""
    if count > most:
        raise Problem(
            "too-many-items",
            f"{count} images in one request, at most {most} are taken (--max-items); send several requests",
        )


def _decode(texts: Sequence[str]) -> list[Payload | None]:
    """The bytes that each text stands for; None for an address."""
    return [None if _ADDRESS.match(text) else _decode_image(text) for text in texts]


def _decode_image(text: str) -> Payload:
    if text.startswith("data:"):
        head = _DATA_URL.match(text)
        if not head:
            return Rejected("not-base64", "a data URL without ;base64, is not read here")
        text = text[head.end() :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters outside ASCII
        return Rejected("not-base64", f"neither base64, a data URL nor an address ({error})")


async def _multipart(request: Request, body: bytes, most: int) -> list[Payload]:
    async def stream() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _AT_ONCE):
            yield body[start : start + _AT_ONCE]
            await asyncio.sleep(0)
        yield b""

    parser = MultiPartParser(
        request.headers, stream(), max_files=most + 1, max_fields=most + 1, max_part_size=len(body)
    )
    parser.spool_max_size = len(body) + 1  # in memory, where the body is already: a read-only disk is no obstacle
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many" in error.message:
            check_count(most + 1, most)
        raise Problem("malformed", f"the multipart body is damaged: {error.message}") from None
    except Exception as error:  # the parser underneath raises KeyError and its like for a missing boundary
        raise Problem("malformed", f"the multipart body is damaged: {type(error).__name__} {error}") from None
    contents: list[Payload] = []
    try:
        for name, part in form.multi_items():
            if isinstance(part, str):
                raise Problem("invalid", f"the field {name!r} is text; send images as files, with a file name")
            contents.append(await part.read())
    finally:
        await form.close()
    if not contents:
        raise Problem("invalid", "the multipart body holds no file; send each image as a file")
    check_count(len(contents), most)
    return contents


def _format_location(location: tuple[int | str, ...]) -> str:
    # pydantic names the members of a union, too, which mean nothing to a client
    return ".".join(str(part) for part in location if isinstance(part, int) or part.isidentifier()) or "body"
