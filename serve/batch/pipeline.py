"""Reading, decoding and embedding at the same time, with results in the order of the images.

On a processor every core embeds a batch of its own, on one thread: cores then never wait for one another within a
batch, which makes more of them than one batch on all cores does. The same threads decode, in turn: more threads than
cores only take each other's caches. Images that come from far away and GPUs leave a core idle; there, others decode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mvmr.cores import usable_cores
from mvmr.data.image_bytes import Prepared, Rejected
from mvmr.data.readable import Content, Item, LocalFile
from mvmr.serve.batch.columns import Rows
from mvmr.serve.decoding.decoder import Outcome
from mvmr.serve.decoding.pool import DecodePool
from mvmr.serve.engine import Engine
from mvmr.serve.vectors import unit

T = TypeVar("T")
R = TypeVar("R")

_READERS = 16  # at the same time, where each waits for a network
_READ_AHEAD = 4  # batches that are decoded while one is embedded


@dataclass(frozen=True)
class DecodedImage:
    """An image ready for the engine, or why not."""

    path: str
    outcome: Prepared | Rejected
    done: int


@dataclass(frozen=True)
class _Batch:
    images: list[DecodedImage]
    done: int
    ends_part: bool


@dataclass(frozen=True)
class EmbeddedBatch:
    """A batch's rows, and where they stand.

    images: how many of them, unreadable ones, too; done: how far the source has come
    ends_part: whether the next image belongs to another part
    """

    rows: Rows
    images: int
    done: int
    ends_part: bool


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What is done with images, and by how many threads.

    Batches never reach over the end of a part of `part_rows` images, so that which images share a batch does not depend
    on where a run was stopped.

    heads: whose best class and its probability are wanted, of the raw embedding; normalize: whether rows get length 1
    cores: batches embedded at a time on a processor
    """

    engine: Engine
    heads: Sequence[str]
    part_rows: int
    decoders: DecodePool
    cores: int
    distant: bool = False
    normalize: bool = False

    def run(self, items: Iterable[Item]) -> Generator[EmbeddedBatch, None, None]:
        """Embed images, the first of which begins a part; in order, with bounded memory.

        Raises: MvmrError when a source can't be read on.
        """
        on_cores = self.engine.provider == "cpu"
        engines = self.cores if on_cores else 1
        readers = _READERS if self.distant else 1
        ahead = _READ_AHEAD * self.engine.at_once * engines + max(readers, usable_cores())
        with ThreadPoolExecutor(readers, "read") as reading, ThreadPoolExecutor(engines, "embed") as embedding:
            try:
                read: Iterable[tuple[Item, Content | LocalFile]] = map(_read, items)
                if self.distant:
                    read = in_order(lambda item: reading.submit(_read, item), items, 2 * readers)
                decoded = in_order(self._decode, read, ahead)
                yield from in_order(
                    lambda batch: embedding.submit(self._embed, batch), self._batches(decoded), 2 * engines
                )
            finally:
                for pool in (reading, embedding):
                    pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, read: tuple[Item, Content | LocalFile]) -> Future[DecodedImage]:
        item, content = read
        decoded: Future[DecodedImage] = Future()

        def settle(outcome: Outcome) -> None:
            decoded.set_result(DecodedImage(item.path, outcome, item.done))

        if isinstance(content, Rejected):
            settle(content)
        else:
            self.decoders.submit(content).add_done_callback(lambda future: settle(future.result()))
        return decoded

    def _batches(self, images: Iterable[DecodedImage]) -> Iterator[_Batch]:
        batch: list[DecodedImage] = []
        in_part = readable = done = 0
        for image in images:
            batch.append(image)
            done = image.done
            in_part += 1
            readable += isinstance(image.outcome, Prepared)
            ends = in_part == self.part_rows
            if ends or readable == self.engine.at_once:
                yield _Batch(batch, done, ends)
                batch, readable, in_part = [], 0, 0 if ends else in_part
        if in_part:
            yield _Batch(batch, done, True)

    def _embed(self, batch: _Batch) -> EmbeddedBatch:
        rows = Rows()
        pixels = []
        for image in batch.images:
            if isinstance(image.outcome, Rejected):
                rows.rejected.append((image.path, image.outcome))
                continue
            pixels.append(image.outcome.pixels)
            rows.paths.append(image.path)
            rows.hashes.append(image.outcome.sha256)
            rows.sizes.append((image.outcome.width, image.outcome.height))
        if pixels:
            embeddings = self.engine(np.stack(pixels))
            rows.embeddings.append(unit(embeddings) if self.normalize else embeddings)
            for head in self.heads:
                probabilities = self.engine.classify(embeddings, head)
                rows.labels[head] = [probabilities.argmax(axis=1)]
                rows.probabilities[head] = [probabilities.max(axis=1)]
        return EmbeddedBatch(rows, len(batch.images), batch.done, batch.ends_part)


def _read(item: Item) -> tuple[Item, Content | LocalFile]:
    """Its bytes; what lies here is left to those who decode: a slow disk then has several to serve at a time."""
    return item, item.read if isinstance(item.read, LocalFile) else item.read()


def in_order(begin: Callable[[T], Future[R]], items: Iterable[T], limit: int) -> Iterator[R]:
    """What becomes of each item, in order; at most `limit` are begun before the first of them is asked for."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(begin(item))
        if len(waiting) >= limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
