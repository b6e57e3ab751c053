"""Processes with wrong clocks: due times, ages and ends follow the log's clock alone; in virtual time."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from typing_extensions import override

from gateway.client.request import Outbound
from gateway.log.base import Partition
from gateway.log.records import encode_delivery
from gateway.log.topics import TIERS
from gateway.model import NO_METADATA, Attempt
from tests.builders import a_delivery, a_destination, a_policy, a_route, an_event
from tests.engine.test_worker import EVENTS, TOPICS, Answer, ScriptedClient, a_world, events, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

HOUR = 3600.0


class OffClient(ScriptedClient):
    """Stamps its attempts by a clock that is wrong by so many seconds, and drifts by a share of the time."""

    def __init__(self, ahead: float, drift: float = 0.0, **scripts: Sequence[Answer]) -> None:
        super().__init__(scripts)
        self._ahead = ahead
        self._drift = drift
        self._began = now()

    @override
    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        attempt = await super().attempt(outbound, timeout=timeout, number=number)
        return replace(attempt, at=attempt.at + self._ahead + self._drift * (now() - self._began))


@dataclass
class MachineClock:
    ahead: float = HOUR


class UnsynchronizedLog(MemoryLog):
    """Doesn't know the brokers' time, until a test says so: its machine's clock is ahead."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(now=now)
        self.clock = MachineClock()

    @override
    def now(self) -> float:
        return now() + self.clock.ahead


@pytest.mark.parametrize("ahead", [-HOUR, -16 * 60.0, 16 * 60.0, HOUR])
def test_a_refusal_has_its_short_budget_whatever_this_machines_clock_says(ahead: float) -> None:
    run(_refused(ahead))


async def _refused(ahead: float) -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(5.0, 5.0, 5.0, 5.0), max_attempts=9)))
    world.client = OffClient(ahead, ci=[404])
    began = now()
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(120)
    assert [number for _, _, number in world.client.made] == [1, 2, 3, 4, 5]
    [dead] = world.dead()
    assert dead.metadata.dead_reason == "permanent"
    kept = [attempt.at - began for attempt in dead.delivery.attempts]
    assert kept == pytest.approx([at - began for at in world.client.at], abs=0.01)


@virtual
async def test_successors_date_attempts_by_the_logs_clock() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(30.0,), max_attempts=3)))
    world.client = OffClient(HOUR, drift=0.01, ci=[503])
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(120)
    told = [each for tier in TIERS for each in world.stored(TOPICS.retry(tier))] + world.dead()
    times = {(each.number, each.at) for stored in told for each in stored.delivery.attempts}
    assert [number for number, _ in sorted(times)] == [1, 2, 3]
    assert [at for _, at in sorted(times)] == pytest.approx(world.client.at, abs=0.01)


@virtual
async def test_a_wait_in_memory_ends_in_time_though_the_clock_is_set_back() -> None:
    """A process with a clock that is ahead waits for a retry, then learns the brokers' time."""
    world = await a_world(a_route(retry=a_policy(schedule=(3.0,), max_age=3 * HOUR)), ci=[503, 200])
    world.log = log = UnsynchronizedLog(now=now)
    await log.create(TOPICS.specs([EVENTS], world.rules.ordered))
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(1.0)
        log.clock.ahead = 0.0
        await asyncio.sleep(5.0)
    assert [number for _, _, number in world.client.made] == [1, 2]
    assert 2.9 < world.client.at[1] - world.client.at[0] < 3.5


@pytest.mark.parametrize("is_cut_first", [True, False])
def test_an_attempt_that_is_cut_short_took_its_time_though_the_clock_is_set_back(*, is_cut_first: bool) -> None:
    """By the clock it would have ended before it began: a record with that can't be read, and counts as nobody's."""
    run(_cut_short(is_cut_first=is_cut_first))


async def _cut_short(*, is_cut_first: bool) -> None:
    later = a_policy(schedule=(HOUR,), max_age=5 * HOUR)
    stuck = a_destination("stuck", url="http://127.0.0.1:1/stuck", timeout=300.0)
    world = await a_world(a_route(to=("stuck",), retry=later), destinations=[stuck], stuck=[1e9])
    world.log = log = UnsynchronizedLog(now=now)
    await log.create(TOPICS.specs([EVENTS], world.rules.ordered))
    first, second = [an_event(id=f"evt_{number}", key="same", received_at=now()) for number in range(2)]
    await world.put(first)
    [number] = [number for number, (_, end) in (await log.bounds(EVENTS)).items() if end]
    async with running(world):
        await asyncio.sleep(0.1)
        if not is_cut_first:
            log.clock.ahead = 0.0
        log.skip_offsets(Partition(EVENTS, number), 17_000)
        await world.put(second)
        await asyncio.sleep(0.1)
        log.clock.ahead = 0.0
        await asyncio.sleep(5.0)
        stored = [each for tier in TIERS for each in world.stored(TOPICS.retry(tier))]
    [attempt] = [attempt for each in stored for attempt in each.delivery.attempts]
    assert 0.2 <= attempt.seconds < 1.0


@virtual
async def test_a_tier_lets_a_record_of_the_future_wait_no_longer_than_others() -> None:
    """Its leader's clock has been set back since it was appended."""
    world = await a_world(a_route())
    first, *others = [replace(a_delivery(event=event), successor=1) for event in events(3)]
    headers = encode_delivery(first, NO_METADATA, at=now())
    world.log._now = lambda: now() + HOUR
    await world.log.append(TOPICS.retry("5s"), key=b"ci", value=first.event.body, headers=headers)
    world.log._now, world.log._last = now, now()
    for each in others:
        headers = encode_delivery(each, NO_METADATA, at=now())
        await world.log.append(TOPICS.retry("5s"), key=b"ci", value=each.event.body, headers=headers)
    async with running(world):
        await asyncio.sleep(4.0)
        assert world.client.made == []
        await asyncio.sleep(2.0)
    assert len(world.client.made) == 3


@virtual
async def test_a_retry_that_a_clock_ahead_has_stored_waits_where_a_kick_finds_it() -> None:
    world = await a_world(a_route())
    delivery = replace(a_delivery(event=events(1)[0]), due=now() + HOUR + 5.0, successor=1)
    await world.log.append(
        TOPICS.retry("5s"),
        key=b"ci",
        value=delivery.event.body,
        headers=encode_delivery(delivery, NO_METADATA, at=now() + HOUR),
    )
    async with running(world):
        await asyncio.sleep(11.0)
        assert len(world.stored(TOPICS.retry("20m"))) == 1
