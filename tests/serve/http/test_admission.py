"""Clients that go away cost nothing, and those without room hear of it; by hand, as no library goes in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx2
import pytest

from mvmr.serve import Engine
from mvmr.serve.http.app import create_app
from mvmr.serve.http.settings import Settings
from tests.serve.inprocess import DATA, INFER, ONE, SECONDS, Session, ask_by_hand, count, post, tensor
from tests.serve.serving import jpeg, problem


def test_a_body_that_ends_early_is_no_request(engine: Engine) -> None:
    session = Session()
    app = create_app(session.within(engine), Settings())
    assert ask_by_hand(app, jpeg()[:1000], gone=True).status_code == 499
    assert session.batches == [4, 4, 1]  # to warm up, and the canary
    assert count(app, "mvmr_errors_total", cause="client-gone") == 1
    assert count(app, "mvmr_queue_images") == 0


@pytest.mark.parametrize("endpoint", ["/v1/embed", INFER])
def test_who_has_gone_is_dropped_before_inference(engine: Engine, endpoint: str) -> None:
    session = Session()
    app = create_app(session.within(engine), Settings())
    bodies = {"/v1/embed": jpeg(), INFER: json.dumps({"inputs": [tensor(ONE, data=DATA)]}).encode()}

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not holds():
                await asyncio.sleep(0.001)

    async def scenario() -> list[int]:
        async with app.router.lifespan_context(app):
            gone = asyncio.Event()
            with session.hold():
                first = asyncio.create_task(post(app, bodies[endpoint], endpoint=endpoint))
                await asyncio.to_thread(session.wait_for_batch)
                second = asyncio.create_task(post(app, bodies[endpoint], gone=gone, endpoint=endpoint))
                third = asyncio.create_task(post(app, bodies[endpoint], endpoint=endpoint))
                await until(lambda: count(app, "mvmr_queue_images") == 3)
                gone.set()
                statuses = [(await second).status_code]
                await until(lambda: count(app, "mvmr_queue_images") == 2)
            return [*statuses, (await first).status_code, (await third).status_code]

    assert asyncio.run(scenario()) == [499, 200, 200]
    assert session.batches == [4, 4, 1, 1, 1]  # to warm up, the canary, the first and the third
    assert count(app, "mvmr_errors_total", cause="client-gone") == 1
    assert count(app, "mvmr_images_total", outcome="embedded") == 2


def test_who_finds_no_room_hears_so_before_his_body_has_come(engine: Engine) -> None:
    session = Session()
    app = create_app(session.within(engine), Settings(queue=1, max_items=1))

    async def scenario() -> httpx2.Response:
        async with app.router.lifespan_context(app):
            with session.hold():
                first = asyncio.create_task(post(app, jpeg()))
                await asyncio.to_thread(session.wait_for_batch)
                refused = await post(app, b"", more=True, client="another")  # whose body never comes
            assert (await first).status_code == 200
            return refused

    refused = asyncio.run(scenario())
    assert problem(refused) == "busy"
    assert "--queue" in refused.json()["detail"]
    assert count(app, "mvmr_http_requests_total", endpoint="/v1/embed", status="429") == 1


def test_bodies_under_way_take_only_so_much_memory(engine: Engine) -> None:
    app = create_app(engine, Settings(max_body=1000))

    async def scenario() -> httpx2.Response:
        async with app.router.lifespan_context(app):
            waiting = [asyncio.create_task(post(app, bytes(1000), more=True)) for _ in range(2)]
            await asyncio.sleep(0)
            while app.state.service._bytes.total < 2000:
                await asyncio.sleep(0)
            assert problem(await post(app, bytes(1000), more=True)) == "busy"  # what is left is for others
            waiting.append(asyncio.create_task(post(app, bytes(1000), more=True, client="another")))
            while app.state.service._bytes.total < 3000:
                await asyncio.sleep(0)
            refused = await post(app, bytes(700), client="a third")
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert (await post(app, jpeg()[:999])).status_code == 422
            return refused

    refused = asyncio.run(scenario())
    assert problem(refused) == "busy"
    assert refused.headers["retry-after"] == "1"
