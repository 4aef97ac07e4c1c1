"""Clients take turns, and no client has more than its share."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from mvmr.serve.http.connections.turns import Turns
from mvmr.serve.shares import Recent, Shares, owner_of


def test_who_asks_much_at_once_is_begun_a_few_at_a_turn_and_others_at_once() -> None:
    begun: list[str] = []

    def begin(owner: str) -> bool:
        begun.append(owner)
        return True

    async def scenario() -> list[list[str]]:
        turns, seen = Turns(), []
        for _ in range(5):
            turns.take("many", partial(begin, "many"))
        turns.take("one", partial(begin, "one"))
        for _ in range(4):
            seen.append(begun.copy())
            begun.clear()
            turns.take("one", partial(begin, "one"))
            await asyncio.sleep(0)
        return seen

    assert asyncio.run(scenario()) == [["many", "one"]] * 4


def test_no_client_takes_all_and_many_hardly_do() -> None:
    shares = Shares(256)
    counts: dict[str, int] = {}
    for client in ("first", "second", "third"):
        while shares.take(client, 1):
            counts[client] = counts.get(client, 0) + 1
    assert counts == {"first": 170, "second": 57, "third": 19}
    assert shares.total == 246
    shares.give("first", 170)
    assert shares.fits("second", 101)
    assert not shares.fits("second", 102)
    assert shares.fits("fourth", 120)
    assert not shares.fits("fourth", 121)
    assert Shares(4).fits("alone", 4)


@pytest.mark.parametrize(
    ("address", "another", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False), ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True), ("fe80::1%eth0", "fe80::2%eth0", True), ("somewhere", "somewhere", True),
    ],
)  # fmt: skip
def test_whose_an_address_is(address: str, another: str, same: bool) -> None:
    assert (owner_of(address) == owner_of(another)) is same


def test_half_of_what_a_client_has_had_is_forgotten_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    recent = Recent()
    recent.add("one", 4)
    now += 5
    recent.add("one", 1)
    assert (recent.of("one"), recent.of("another")) == (3, 0)
    now += 10
    assert recent.of("one") == 0.75
    for number in range(500):
        recent.add(str(number), 1e-4)
    now += 60
    recent.add("another", 1)
    recent.add("one", 1)
    assert set(recent._had) == {"another", "one"}
