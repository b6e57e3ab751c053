"""What one principal may take of what all share.

what crosses                                  what has to come of it
────────────────────────────────────────────  ────────────────────────────────────────────────
one who asks for much, and others beside them others are answered, and wait behind nobody's many
nobody else                                   all of it is theirs
a request that ends while it waits            its turn is the next one's; nothing is lost
… in the moment in which it is its turn       the same
"""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from gateway.access.principal import AccessRole, Principal
from gateway.api import tail
from gateway.api.endpoints import BASE
from gateway.api.problems import ApiError
from gateway.api.shares import FairTurns, Shares
from tests.api.conftest import World

ANNA = Principal(name="anna", role=AccessRole.VIEWER, via="token")
BOB = replace(ANNA, name="bob")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Turns:
    """Turns, and who has had one, in order."""

    def __init__(self, most: int, each: int | None = None) -> None:
        self.turns = FairTurns(most, each)
        self.served: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def rest(self) -> tuple[object, ...]:
        """Return what is kept: how many turns are free, and of whom something is known."""
        turns = self.turns
        return turns._free, +turns._held, turns._waiting, turns._last

    async def ask(self, *names: str) -> None:
        """Have somebody wait for a turn, each name once."""

        async def wait(name: str) -> None:
            await self.turns.acquire(name)
            self.served.append(name)

        self.tasks += [asyncio.create_task(wait(name)) for name in names]
        await settle()

    async def end(self, *names: str) -> None:
        """End a turn of somebody."""
        for name in names:
            self.turns.release(name)
        await settle()


async def test_nobody_waits_behind_the_many_of_one() -> None:
    turns = Turns(2)
    await turns.ask(*["anna"] * 6)
    assert turns.served == ["anna"] * 2, "all of them, as nobody else waits"
    await turns.ask("bob", "carl")
    await turns.end("anna")
    assert turns.served[2:] == ["bob"]
    await turns.end("anna")
    assert turns.served[3:] == ["carl"]
    await turns.end("bob")
    await turns.ask("bob")
    assert turns.served[4:] == ["anna"], "who has waited when one was free"
    await turns.end("carl")
    assert turns.served[5:] == ["bob"], "anna has one"
    await turns.end("anna", "bob")
    await turns.end("anna", "anna")
    assert turns.served[6:] == ["anna"] * 3
    await turns.end("anna")
    assert turns.rest() == (2, {}, {}, {})


async def test_of_those_who_hold_as_much_the_one_is_next_who_was_served_longest_ago() -> None:
    turns = Turns(1)
    await turns.ask("anna", "anna", "anna", "bob", "bob", "carl")
    for _ in range(5):
        await turns.end(turns.served[-1])
    assert turns.served == ["anna", "bob", "carl", "anna", "bob", "anna"]


async def test_a_turn_that_nobody_waits_for_any_more_is_the_next_ones() -> None:
    turns = Turns(1)
    await turns.ask("anna", "bob", "bob", "carl")
    turns.tasks[1].cancel()  # it hasn't heard of it yet
    turns.turns.release("anna")  # bob's second is next, and ends before it hears of it
    turns.tasks[2].cancel()
    await settle()
    assert turns.served == ["anna", "carl"]
    await turns.end("carl")
    assert turns.rest() == (1, {}, {}, {})


async def test_of_turns_that_take_long_some_are_left_for_others() -> None:
    turns = Turns(3, 1)
    await turns.ask("anna", "anna", "anna")
    assert turns.served == ["anna"]
    await turns.ask("bob", "", "")
    assert turns.served[1:] == ["bob", ""], "what all see the same has what is free"
    await turns.end("bob")
    assert turns.served[3:] == [""]
    await turns.end("", "")
    assert turns.served[4:] == []
    await turns.end("anna", "anna", "anna")
    assert turns.served[4:] == ["anna", "anna"]
    assert turns.rest() == (3, {}, {}, {})


async def test_nobody_holds_all_turns_at_explaining(world: World) -> None:
    going_on = threading.Event()

    async def explain(who: str) -> None:
        await world.backend.explain(who, lambda: going_on.wait(10), 10)

    many = [asyncio.create_task(explain(ANNA.identity)) for _ in range(5)]
    await asyncio.sleep(0.05)
    event, *_ = await world.company.event()
    await world.refresh()
    world.access.principal = replace(BOB, role=AccessRole.READER)
    await asyncio.wait_for(world.get(f"/events/{event.id}/explanation"), 5)
    world.access.principal = replace(ANNA, role=AccessRole.READER)
    await asyncio.wait_for(world.get(f"/events/{event.id}/exported"), 5)  # which takes a moment, and no such turn
    going_on.set()
    await asyncio.gather(*many)


def test_a_place_is_free_again_whatever_has_happened() -> None:
    shares = Shares()

    def fail() -> None:
        with shares.place(ANNA, 1, "requests"), shares.place(BOB, 1, "requests"):
            with pytest.raises(ApiError, match="at most 1 requests of one"), shares.place(ANNA, 1, "requests"):
                pass
            raise LookupError

    for _ in range(3):
        with pytest.raises(LookupError):
            fail()
    assert not shares._taken


def test_whoever_is_on_this_machine_is_everybody_and_has_it_all() -> None:
    shares, local = Shares(), replace(ANNA, name="local", via="loopback")
    with shares.place(local, 1, "requests"), shares.place(local, 1, "requests"):
        pass


async def hanging(world: World, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Have requests that read control records wait for an event."""
    going_on, control = asyncio.Event(), world.backend.control

    async def wait() -> Any:
        await going_on.wait()
        return await control()

    monkeypatch.setattr(type(world.backend), "control", lambda _: wait())
    return going_on


async def test_one_who_asks_for_much_leaves_room_for_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.application.EACH", 2)
    going_on = await hanging(world, monkeypatch)
    world.access.principal = ANNA
    asked = [asyncio.create_task(world.get("/routes/build")) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert "of one principal" in (await world.get("/me", 503))["detail"]
    world.access.principal = BOB
    assert (await world.get("/me"))["name"] == "bob"
    going_on.set()
    await asyncio.gather(*asked)
    world.access.principal = ANNA
    await world.get("/me")


async def test_one_who_listens_often_leaves_places_for_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "MAX_PER_PRINCIPAL", 1)
    world.access.principal = ANNA
    async with world.client.get(f"{BASE}/tail") as listening:
        assert listening.status == 200
        assert "of one principal" in (await world.get("/tail", 503))["detail"]
        world.access.principal = BOB
        async with world.client.get(f"{BASE}/tail") as another:
            assert another.status == 200


async def test_a_search_waits_behind_nobodys_many(world: World) -> None:
    async with world.backend.turn(ANNA.identity), world.backend.turn(ANNA.identity):
        waiting = [asyncio.create_task(world.backend.turn(ANNA.identity).__aenter__()) for _ in range(30)]
        await asyncio.sleep(0)
        world.access.principal = BOB
        search = asyncio.create_task(world.get("/events"))
        await asyncio.sleep(0.05)
    await asyncio.wait_for(search, 5)
    for each in waiting:
        each.cancel()
