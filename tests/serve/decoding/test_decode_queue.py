"""Whose image is decoded next."""

from __future__ import annotations

import pytest

from mvmr.data.image_bytes import AT_ONCE
from mvmr.serve.decoding.decoder import Job
from mvmr.serve.decoding.queue import BATCH_BYTES, DecodeQueue


@pytest.fixture
def queue() -> DecodeQueue:
    return DecodeQueue()


def take(queue: DecodeQueue, idle: int = 1, **options: object) -> list[Job]:
    how = {"running": {}, "memory": True, "busy": (), **options}
    return queue.take(idle, **how)  # type: ignore[arg-type]


def add(queue: DecodeQueue, client: str, count: int = 1, **options: bool) -> list[Job]:
    jobs = [Job(b"image", client, **options) for _ in range(count)]  # type: ignore[arg-type]
    for job in jobs:
        queue.add(job)
    return jobs


def test_who_has_had_least_is_next_what_runs_included(queue: DecodeQueue) -> None:
    for client in ("first", "second", "third"):
        add(queue, client)
    queue.had.add("first", 2)
    queue.had.add("second", 1)
    assert queue.clients(running={"third": 1.5}, memory=True) == ["second", "third", "first"]
    assert queue.clients(running={"second": 1.5}, memory=True) == ["third", "first", "second"]
    assert [job.client for job in take(queue, busy=["third"])] == ["second"]


def test_of_equals_who_has_a_process_already_comes_last(queue: DecodeQueue) -> None:
    add(queue, "first")
    add(queue, "second")
    assert queue.clients(running={"first": 0.0}, memory=True) == ["second", "first"]


def test_what_is_urgent_comes_before_all(queue: DecodeQueue) -> None:
    add(queue, "nothing so far")
    add(queue, "canary", urgent=True)
    queue.had.add("canary", 9)
    assert [job.client for job in take(queue)] == ["canary"]


def test_a_process_gets_its_share_of_a_client_s_images_in_order(queue: DecodeQueue) -> None:
    jobs = add(queue, "one", 3)
    assert take(queue, idle=2) == jobs[:2]
    assert take(queue, idle=2) == jobs[2:]
    assert take(queue, idle=2) == []
    jobs = add(queue, "one", AT_ONCE + 1)
    assert take(queue) == jobs[:AT_ONCE]


def test_what_is_alone_or_large_is_handed_over_by_itself(queue: DecodeQueue) -> None:
    before, alone, after = add(queue, "one"), add(queue, "one", alone=True), add(queue, "one")
    assert [take(queue), take(queue), take(queue)] == [before, alone, after]
    for job in (big := [Job(bytes(BATCH_BYTES), "one"), Job(b"small", "one")]):
        queue.add(job)
    assert [take(queue), take(queue)] == [[job] for job in big]


def test_large_images_wait_for_memory_and_the_others_do_not(queue: DecodeQueue) -> None:
    large, small = add(queue, "one", alone=True, large=True), add(queue, "one")
    add(queue, "another", large=True)
    assert queue.clients(running={}, memory=False) == ["one"]
    assert take(queue, memory=False) == small
    assert take(queue, memory=False) == []
    assert take(queue) == large


def test_what_was_cancelled_is_not_handed_over_and_forgotten(queue: DecodeQueue) -> None:
    gone, remaining = add(queue, "one", 2)
    gone.answer.cancel()
    add(queue, "another")[0].answer.cancel()
    assert queue.clients(running={}, memory=True) == ["one"]
    queue.forget_cancelled()
    assert take(queue) == [remaining]
    waiting = add(queue, "one", 2)
    queue.cancel()
    assert all(job.answer.cancelled() for job in waiting)
    assert take(queue) == []


def test_what_begins_again_comes_before_its_client_s_others(queue: DecodeQueue) -> None:
    (waiting,) = add(queue, "one", alone=True)
    queue.add(again := Job(b"image", "one", alone=True), first=True)
    assert [take(queue), take(queue)] == [[again], [waiting]]
