"""Promises of docs/guarantees.md that no other test of the engine holds; in virtual time."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

import pytest
import structlog
from structlog.testing import CapturingLogger
from typing_extensions import override

from gateway.client.request import Outbound
from gateway.log.base import Partition
from gateway.log.records import encode_event
from gateway.model import Attempt, Event
from tests.builders import a_destination, a_policy, a_route, an_event
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    Answer,
    ScriptedClient,
    World,
    a_world,
    events,
    running,
    virtual,
)
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

TIERS = ("5s", "20s", "80s", "5m")


class CountingClient(ScriptedClient):
    """Remembers the most attempts at once that a destination had."""

    def __init__(self, **scripts: Sequence[Answer]) -> None:
        super().__init__(scripts)
        self.most = Counter[str]()
        self._at_once = Counter[str]()

    @override
    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        name = outbound.url.rpartition("/")[2]
        self._at_once[name] += 1
        self.most[name] = max(self.most[name], self._at_once[name])
        try:
            return await super().attempt(outbound, timeout=timeout, number=number)
        finally:
            self._at_once[name] -= 1


@virtual
async def test_records_deleted_unread_are_reported_and_the_rest_delivered() -> None:
    world = await a_world(a_route())
    told = CapturingLogger()
    world.logger = structlog.wrap_logger(
        told, processors=[], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR)
    )
    made = [an_event(id=f"evt_{n}", key="same", received_at=now()) for n in range(10)]
    await world.put(*made[:1])
    async with running(world):
        await asyncio.sleep(3)
    await world.put(*made[1:])
    [partition] = [
        Partition(EVENTS, number) for number, (start, end) in (await world.log.bounds(EVENTS)).items() if end > start
    ]
    world.log.delete_below(partition, 7)
    async with running(world):
        await asyncio.sleep(3)
    router = TOPICS.group("router")
    assert [call.kwargs for call in told.calls] == [
        {"event": "records_lost", "topic": EVENTS, "partition": partition.number, "group": router, "count": 6}
    ]
    assert [event for _, event, _ in world.client.made] == ["evt_0", "evt_7", "evt_8", "evt_9"]
    assert await world.unfinished() == 0


@virtual
async def test_a_delivery_that_outgrows_the_log_is_dead_lettered() -> None:
    """Each attempt makes its record longer; of a dead letter's attempts only the last is kept where they don't fit."""
    world = await a_world(a_route(retry=a_policy(schedule=(10.0,), max_attempts=20, max_age=3600.0)), ci=[503])
    event = an_event(received_at=now())
    size = len(event.body) + sum(len(name) + len(value) for name, value in encode_event(event))
    world.log.max_record_bytes = size + 1000
    await world.put(event)
    async with running(world):
        await asyncio.sleep(600)
    [dead] = world.dead()
    assert dead.metadata.dead_reason == "too_large"
    assert 2 < len(world.client.made) < 20
    assert [attempt.number for attempt in dead.delivery.attempts] == [len(world.client.made)]
    assert await world.unfinished() == 0
    assert [await world.unfinished(TOPICS.retry(tier)) for tier in TIERS] == [0] * 4


@virtual
async def test_a_dead_letter_that_the_log_no_longer_takes_waits_for_a_higher_limit() -> None:
    world = await a_world(a_route(retry=a_policy(max_attempts=1)), ci=[503])
    await world.put(*events(1))
    limit = world.log.max_record_bytes
    worker = world.worker()
    log = worker._services.log
    assert isinstance(log, MemoryLog)
    log.max_record_bytes = 100
    async with running(world, worker):
        await asyncio.sleep(30)
        assert (world.dead(), await world.unfinished()) == ([], 1)
        log.max_record_bytes = limit
        await asyncio.sleep(10)
    assert [dead.metadata.dead_reason for dead in world.dead()] == ["exhausted"]
    assert await world.unfinished() == 0


@pytest.mark.parametrize("kills", [1, 2, 4])
def test_kills_between_a_successor_and_its_commit_leave_one_live_duplicate_more_each(kills: int) -> None:
    run(_killed(kills))


async def _killed(kills: int) -> None:
    policy = a_policy(schedule=(20.0,), max_attempts=4)
    world = await a_world(a_route(retry=policy), ci=[*[503] * (2 * kills + 2), 200])
    await world.put(*events(1))
    world.log.fail_commits()
    for number in range(kills):
        await _killed_once(world, successors=number + 1)
    assert await world.unfinished() == 1
    world.log.fail_commits(0)
    async with running(world):
        await asyncio.sleep(90)
    tries = Counter(number for _, _, number in world.client.made)
    assert tries[1] == kills + 1
    assert max(tries.values()) == kills + 1, "what is copied isn't copied again"
    steps = Counter((stored.delivery.id, stored.delivery.successor) for stored in world.stored(TOPICS.retry("20s")))
    assert {successor for _, successor in steps} >= {1, 2}
    assert max(steps.values()) == kills + 1
    assert await world.unfinished() + await world.unfinished(TOPICS.retry("20s")) == 0


async def _killed_once(world: World, *, successors: int) -> None:
    """A worker that is cancelled, and can commit nothing, ends as one that is killed."""
    task = asyncio.create_task(world.worker().run())
    await asyncio.sleep(0.2)
    assert len(world.log.records(TOPICS.retry("20s"))) == successors
    task.cancel()
    await asyncio.wait([task])
    world.log._state.members.clear()  # its session is over


@virtual
async def test_a_route_with_a_thousand_times_the_traffic_gets_no_more_than_its_cap() -> None:
    world = await a_world(
        a_route("flood", match={"type": "flood"}, to=("flooded",)),
        a_route(match={"type": "push"}),
        destinations=[a_destination("flooded", url="http://127.0.0.1:1/flooded", concurrency=20)],
    )
    world.client = client = CountingClient(flooded=[0.05], ci=[0.01])
    sent: dict[str, float] = {}
    async with running(world):
        for turn in range(60):
            flood = [_one_of_many(50 * turn + number) for number in range(50)]
            if turn % 20 == 10:
                event = an_event(id=f"evt_ci_{turn}", received_at=now())
                sent[event.id] = now()
                flood.insert(25, event)
            await world.put(*flood)
            await asyncio.sleep(0.05)
        await asyncio.sleep(60)
    assert client.most["flooded"] == 20
    late = {
        event: at - sent[event] for (name, event, _), at in zip(client.made, client.at, strict=True) if name == "ci"
    }
    assert late.keys() == sent.keys()
    assert max(late.values()) < 0.2
    assert Counter(name for name, _, _ in client.made) == {"flooded": 3000, "ci": 3}


def _one_of_many(number: int) -> Event:
    return an_event(id=f"evt_{number}", type="flood", received_at=now())
