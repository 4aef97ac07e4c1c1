"""The batcher alone, with an engine that waits to be told: order, bound, cancellation, failure."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mvmr.serve.http.batcher import Batcher
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.problems import Problem

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
SECONDS = 20.0


class Engine:
    """Gives each image's first value back; in `batches` those of each batch, in the order in which they were begun.

    held: whether a batch waits until `let_go` was called once more
    """

    def __init__(self, *, held: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.error: Exception | None = None
        self._held, self._begun, self._go = held, queue.SimpleQueue[None](), threading.Semaphore(0)

    def __call__(self, pixels: Pixels) -> Floats:
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        self._begun.put(None)
        if self._held:
            assert self._go.acquire(timeout=SECONDS)
        if self.error:
            raise self.error
        return pixels[:, 0, 0, :1].astype(np.float32)

    async def wait_for_batch(self) -> None:
        """Wait until it is at the next batch."""
        await asyncio.to_thread(self._begun.get, True, SECONDS)

    def let_go(self, batches: int = 1) -> None:
        self._go.release(batches)


def image(value: int) -> Pixels:
    return np.full((2, 2, 3), value, np.uint8)


def run(
    test: Callable[[Batcher, Engine], Coroutine[Any, Any, None]],
    *,
    engine: Engine | None = None,
    metrics: Metrics | None = None,
    at_once: int = 3,
    bound: int = 100,
    workers: int = 1,
) -> Engine:
    """Run a test in an event loop with a started batcher."""
    engine = engine or Engine()

    async def scenario() -> None:
        tested = Batcher(engine, at_once=at_once, bound=bound, workers=workers, metrics=metrics or Metrics())
        tested.start()
        try:
            async with asyncio.timeout(SECONDS):
                await test(tested, engine)
        finally:
            engine.let_go(1000)
            await tested.stop(30)

    asyncio.run(scenario())
    return engine


async def ask(tested: Batcher, *values: int, client: str = "") -> list[asyncio.Task[Floats]]:
    """Requests for these images, each of them in the queue."""
    tasks = [asyncio.create_task(tested.embed(image(value), client)) for value in values]
    await asyncio.sleep(0)
    return tasks


async def answers(tasks: list[asyncio.Task[Floats]]) -> list[float]:
    return [float(row[0]) for row in await asyncio.gather(*tasks)]


def count_dropped(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("mvmr_images_total", {"outcome": "dropped"})


def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the batcher's clock at 0; the function that is returned sets it."""
    now = [0.0]
    monkeypatch.setattr("mvmr.serve.http.batcher.time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_while_the_engine_works_images_gather_and_are_taken_in_order() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        before = await ask(tested, 0)
        await engine.wait_for_batch()
        tasks = await ask(tested, *range(1, 8))
        engine.let_go(4)
        assert await answers(before + tasks) == [*range(8)]

    assert run(test).batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_an_image_that_comes_alone_waits_for_no_other() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        tasks = await ask(tested, 5)
        await engine.wait_for_batch()
        assert engine.batches == [[5]]
        engine.let_go()
        await answers(tasks)

    run(test)


def test_each_of_many_gets_its_own_row() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        values = np.random.default_rng(0).integers(0, 256, 300).tolist()
        assert await answers(await ask(tested, *values)) == values
        assert sorted(itertools.chain(*engine.batches)) == sorted(values)

    run(test, engine=Engine(held=False), workers=3)


def test_first_goes_before_all_that_wait() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        tasks = await ask(tested, 0)
        await engine.wait_for_batch()
        tasks += await ask(tested, 1, 2, 3, 4)
        urgent = tested.embed_first(image(99))
        engine.let_go(3)
        await answers(tasks)
        assert urgent.result(SECONDS)[0] == 99

    assert run(test).batches == [[0], [99, 1, 2], [3, 4]]


def test_clients_take_turns_and_one_image_waits_for_few_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock = clock(monkeypatch)

    async def test(tested: Batcher, engine: Engine) -> None:
        tasks = await ask(tested, 0)
        await engine.wait_for_batch()
        tasks += await ask(tested, *range(1, 9), client="many")
        tasks += await ask(tested, *range(11, 15), client="some")
        tasks += await ask(tested, 99, client="one")
        engine.let_go(9)
        await answers(tasks)
        set_clock(2.0)  # seconds: "one" is there no more
        tasks = await ask(tested, 21, client="many")
        while engine.batches[-1] != [21]:
            await asyncio.sleep(0.001)
        tasks += await ask(tested, 22, 23, 24, 25, client="many")
        engine.let_go(2)
        await answers(tasks)

    shared = [[0], [1, 11, 99], [2, 12], [3, 13], [4, 14], [5], [6], [7], [8]]
    assert run(test, at_once=4).batches == [*shared, [21], [22, 23, 24, 25]]


def test_no_client_takes_all_the_room() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        with tested.room(60, "many"):
            assert tested.refusal("many") is None
            with tested.room(6, "many"):
                refusal = tested.refusal("many")
                assert refusal is not None
                assert refusal.name == "busy"
                with pytest.raises(Problem), tested.room(1, "many"):
                    raise AssertionError
                with tested.room(20, "another"):
                    pass

    run(test, bound=100)


def test_a_second_worker_begins_while_the_first_is_at_work() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        tasks = await ask(tested, 1)
        await engine.wait_for_batch()
        tasks += await ask(tested, 2)
        await engine.wait_for_batch()  # nothing was let go yet
        assert engine.batches == [[1], [2]]
        tasks += await ask(tested, 3, 4, 5)
        engine.let_go(1)
        await engine.wait_for_batch()  # the worker that is free takes all: no other is idle
        assert engine.batches[2] == [3, 4, 5]
        engine.let_go(2)
        assert await answers(tasks) == [1, 2, 3, 4, 5]

    run(test, workers=2)


# Room


def test_rooms_are_bounded_and_given_back() -> None:
    metrics = Metrics()

    async def test(tested: Batcher, engine: Engine) -> None:
        with tested.room(3):
            assert metrics.registry.get_sample_value("mvmr_queue_images") == 3
            with (
                pytest.raises(Problem, match="no room for 3 more images now \\(--queue\\); try again in 1 s") as caught,
                tested.room(3),
            ):
                raise AssertionError
            assert (caught.value.name, caught.value.headers) == ("busy", {"retry-after": "1"})
            with tested.room(1, "another"):
                pass
        with pytest.raises(ZeroDivisionError), tested.room(5):
            raise ZeroDivisionError
        assert metrics.registry.get_sample_value("mvmr_queue_images") == 0
        with tested.room(5):
            pass

    run(test, bound=5, metrics=metrics)


def test_who_is_sent_away_hears_how_long_those_before_him_take(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock = clock(monkeypatch)

    async def test(tested: Batcher, engine: Engine) -> None:
        tasks = await ask(tested, 0)
        await engine.wait_for_batch()
        set_clock(2.0)  # half an image a second
        engine.let_go()
        await answers(tasks)
        with tested.room(3), pytest.raises(Problem) as caught, tested.room(1):
            raise AssertionError
        assert caught.value.headers == {"retry-after": "6"}

    run(test, bound=3)


# Clients that go


def test_who_goes_before_his_turn_is_not_run() -> None:
    metrics = Metrics()

    async def test(tested: Batcher, engine: Engine) -> None:
        tasks = await ask(tested, 0)
        await engine.wait_for_batch()
        tasks += await ask(tested, 1, 2, 3, 4, 5)
        for gone in (tasks.pop(4), tasks.pop(1)):
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
        engine.let_go(2)
        assert await answers(tasks) == [0, 2, 3, 5]

    assert run(test, metrics=metrics).batches == [[0], [2, 3, 5]]
    assert count_dropped(metrics) == 2


def test_a_queue_of_none_but_gone_is_no_batch() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        tasks = await ask(tested, 0)
        await engine.wait_for_batch()
        for gone in await ask(tested, 1, 2):
            gone.cancel()
        await asyncio.sleep(0)
        engine.let_go()
        await answers(tasks)
        last = await ask(tested, 3)
        engine.let_go()
        assert await answers(last) == [3]

    assert run(test).batches == [[0], [3]]


def test_who_goes_during_his_turn_takes_no_row_from_the_others() -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        before = await ask(tested, 0)
        await engine.wait_for_batch()
        tasks = await ask(tested, 1, 2, 3)
        engine.let_go()
        await answers(before)
        await engine.wait_for_batch()
        gone = tasks.pop(0)
        gone.cancel()
        await asyncio.sleep(0)
        engine.let_go()
        assert await answers(tasks) == [2, 3]
        assert gone.cancelled()

    assert run(test).batches == [[0], [1, 2, 3]]


# An engine that fails or hangs


def test_a_failure_reaches_everyone_in_the_batch_and_nobody_after(caplog: pytest.LogCaptureFixture) -> None:
    async def test(tested: Batcher, engine: Engine) -> None:
        engine.error = RuntimeError("the GPU is gone")
        before = await ask(tested, 0)
        await engine.wait_for_batch()
        tasks = await ask(tested, 1, 2)
        engine.let_go(2)
        for outcome in await asyncio.gather(*before, *tasks, return_exceptions=True):
            assert outcome is engine.error
        engine.error = None
        last = await ask(tested, 3)
        engine.let_go()
        assert await answers(last) == [3]

    with caplog.at_level(logging.ERROR):
        run(test)
    assert [record.getMessage() for record in caplog.records] == [
        "the engine failed on a batch of 1",
        "the engine failed on a batch of 2",
    ]
    assert caplog.records[0].exc_info


def test_it_knows_for_how_long_the_engine_has_been_at_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock = clock(monkeypatch)

    async def test(tested: Batcher, engine: Engine) -> None:
        assert tested.busy_seconds == 0
        set_clock(100.0)
        tasks = await ask(tested, 0)
        await engine.wait_for_batch()
        set_clock(110.0)
        tasks += await ask(tested, 1)
        await engine.wait_for_batch()
        set_clock(142.0)
        assert tested.busy_seconds == 42  # of the worker that has been at it for longest
        engine.let_go(2)
        await answers(tasks)
        assert tested.busy_seconds == 0

    run(test, workers=2)


def test_stopping_waits_for_the_batch_at_hand() -> None:
    engine = Engine()

    async def test() -> list[float]:
        tested = Batcher(engine, at_once=3, bound=9, workers=1, metrics=Metrics())
        tested.start()
        tasks = await ask(tested, 7)
        await engine.wait_for_batch()
        stopping: Awaitable[None] = asyncio.create_task(tested.stop(30))
        await asyncio.sleep(0)
        engine.let_go()
        await stopping
        return await answers(tasks)

    assert asyncio.run(test()) == [7]
