"""What a kick came to on ordered routes by the API: what their processes have published, or that it isn't known.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
a kick that hasn't been carried out         not known
one that is done, all processes have told   what they have told, in all
… somebody hasn't told, of what waits still not known
… nobody has told of any, for seconds       none is told of
another kick replaces what was told         not known: it isn't the other's
a name without ordered routes               null
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import AccessRole
from gateway.engine.control.records import ControlRecord, tried_name
from gateway.log.topics import ORDERED_PARTITIONS
from tests.api.conftest import World, world_of
from tests.index.company import Company
from tests.memory_log import MemoryLog

KICK, ROUTE = "kick/destination/ledger", "book"
PARTITIONS = range(ORDERED_PARTITIONS)


@dataclass
class Clock:
    now: float = 1_764_572_400.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def world(clock: Clock, tmp_path: Path) -> AsyncIterator[World]:
    company = await Company.found(MemoryLog(now=clock), ordered=[(ROUTE, "ledger")])
    async with world_of(company, tmp_path) as made:
        made.become(AccessRole.OPERATOR)
        yield made


async def publish(world: World, name: str, **fields: Any) -> None:
    record = ControlRecord(kind="checkpoint", name=name, state="done", **fields)
    await world.company.log.append(
        world.company.topics.control, key=record.encode()[0], value=record.encode()[1], headers=[]
    )


async def carry_out(world: World, clock: Clock, *outcomes: tuple[int, dict[str, Any]], key: str = KICK) -> float:
    """Announce a kick, let the processes of these partitions tell what came of it, and end it."""
    clock.now += 1
    at = clock.now
    offset = (await world.backend.control()).offset_of(key)
    assert offset is not None
    await publish(world, f"announcement/{key}", at=at, covers_commands_below=offset + 1)
    for partition, told in outcomes:
        await publish(world, tried_name(ROUTE, "ledger", partition), at=at, **told)
    clock.now += 3
    await publish(world, key, at=clock.now, covers_commands_below=offset + 1, tried=0, delivered=0)
    return at


async def append(world: World) -> None:
    topic = world.company.topics.ordered(ROUTE, "ledger")
    await world.company.log.append(topic, key=b"k", value=b"{}", headers=[])


async def state_of(world: World, key: str = KICK) -> Any:
    return await world.get(f"/commands/{key.replace('/', '%2F')}")


async def ordered_of(world: World) -> Any:
    return (await state_of(world))["ordered"]


async def test_what_the_processes_have_told_is_told_in_all(world: World, clock: Clock) -> None:
    await world.post("/destinations/ledger/kick", {})
    ordered = await ordered_of(world)
    assert (ordered["is_known"], ordered["tried"], ordered["count"]) == (False, None, None)
    told = {"count": 3, "tried": 2, "delivered": 1, "failed_by_result": {"503": 1}, "untried_by_reason": {"behind": 1}}
    await carry_out(world, clock, (0, told), (1, {"count": 4, "tried": 4, "delivered": 4}))
    assert not (await ordered_of(world))["is_known"], "others may still tell"
    clock.now += 3
    state = await state_of(world)
    assert (state["state"], state["by"], state["count"], state["tried"]) == ("done", "anna", 0, 0)
    assert state["ordered"] == {
        "is_known": True,
        "count": 7,
        "tried": 6,
        "delivered": 5,
        "dead": 0,
        "unfinished": 0,
        "waiting": {"behind": 1},
        "failed_by_result": {"503": 1},
        "repeated_failures": {},
    }


async def test_what_nobody_has_told_isnt_nothing(world: World, clock: Clock) -> None:
    await append(world)
    await world.post("/destinations/ledger/kick", {})
    await carry_out(world, clock)
    clock.now += 60
    ordered = await ordered_of(world)
    assert (ordered["is_known"], ordered["tried"]) == (False, None)


async def test_what_came_after_a_kick_makes_nothing_unknown(world: World, clock: Clock) -> None:
    await world.post("/destinations/ledger/kick", {})
    await carry_out(world, clock)
    await append(world)
    clock.now += 60
    ordered = await ordered_of(world)
    assert (ordered["is_known"], ordered["count"], ordered["unfinished"]) == (True, 0, 0)


async def test_what_another_kick_came_to_is_not_this_ones(world: World, clock: Clock) -> None:
    await world.post("/destinations/ledger/kick", {})
    told = {"count": 3, "tried": 3, "delivered": 3}
    await carry_out(world, clock, *((number, told) for number in PARTITIONS))
    await world.post(f"/routes/{ROUTE}/kick", {})
    tried = {"count": 1, "tried": 1, "delivered": 0}
    await carry_out(world, clock, *((number, tried) for number in PARTITIONS), key=f"kick/route/{ROUTE}")
    clock.now += 60
    assert not (await ordered_of(world))["is_known"]
    assert (await state_of(world, f"kick/route/{ROUTE}"))["ordered"]["tried"] == len(PARTITIONS)


async def test_a_second_kick_begins_without_what_the_first_came_to(world: World, clock: Clock) -> None:
    await world.post("/destinations/ledger/kick", {})
    await carry_out(world, clock, (0, {"count": 3, "tried": 3, "delivered": 3}))
    clock.now += 60
    assert (await ordered_of(world))["tried"] == 3
    await world.post("/destinations/ledger/kick", {})
    assert not (await ordered_of(world))["is_known"]
    offset = (await world.backend.control()).offset_of(KICK)
    assert offset is not None
    await publish(world, KICK, at=clock.now, covers_commands_below=offset + 1)
    state = await state_of(world)
    assert (state["state"], state["ordered"]["is_known"]) == ("done", False), "its announcement is still to be read"


async def test_without_ordered_routes_there_is_nothing_to_know(world: World) -> None:
    await world.post("/routes/build/kick", {})
    assert (await state_of(world, "kick/route/build"))["ordered"] is None
    await world.post(f"/routes/{ROUTE}/pause", {})
    assert (await state_of(world, f"pause/route/{ROUTE}"))["ordered"] is None


async def test_a_log_that_answers_late_leaves_it_unknown(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.post("/destinations/ledger/kick", {})
    await carry_out(world, clock)
    clock.now += 60
    monkeypatch.setattr("gateway.api.command_states.ORDERED_WITHIN", 0.01)

    async def wait(*_: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(world.company.log, "offsets_at", wait)
    state = await state_of(world)
    assert (state["state"], state["ordered"]["is_known"]) == ("done", False)
