"""Gateways that are killed, frozen, restarted, added and taken away under load."""

import asyncio
import random
from pathlib import Path

import pytest

from dev.kafka import Cluster
from tests.acceptance.conftest import LogPlace
from tests.faults.scenario import Scenario, Table
from tests.run_seeds import drawn
from tests.sink import Answer


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_without_a_fault_nothing_is_duplicated(place: LogPlace, folder: Path, table: Table) -> None:
    async with Scenario("no fault", place, folder, table, rate=400) as scenario:
        async with scenario.load():
            await asyncio.sleep(15)
        account = await scenario.settle()
        assert (account.duplicated, account.stored_again, account.refused) == (0, 0, 0), scenario.story()


@pytest.mark.rotated(share=1 / 12, group="faults")
@pytest.mark.timeout(180)
async def test_a_gateway_killed_again_and_again_repeats_only_uncommitted_deliveries(
    place: LogPlace, folder: Path, table: Table, *, is_full: bool
) -> None:
    kills, rate = (5, 1500.0) if is_full else (2, 150.0)
    chance = random.Random(drawn())
    async with Scenario(f"killed {kills} times", place, folder, table, rate=rate) as scenario:
        [gateway] = scenario.gateways
        async with scenario.load():
            for _ in range(kills):
                await scenario.acknowledged(int(rate * chance.uniform(0.5, 2.5)))
                scenario.kill(gateway)
                await gateway.start()
                await scenario.until_all_work()
        account = await scenario.settle()
        under_way = max(UNDER_WAY[place.kind], 2 * scenario.usual_wait)
        assert account.duplicated <= scenario.uncommitted(under_way), f"{under_way:.3f} s: {account}"


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_three_gateways_that_are_killed_in_turn_take_over_from_each_other(
    cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario("each of three killed", cluster_place, folder, table, count=3, is_dev=False) as scenario:
        async with scenario.load():
            for gateway in scenario.gateways:
                await scenario.acknowledged(300)
                scenario.kill(gateway)
                await asyncio.sleep(2)
                await gateway.start()
                await scenario.until_all_work()
        await scenario.settle()


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_one_of_three_gateways_frozen_beyond_its_session_does_little_harm_on_return(
    cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario("one of three frozen for 46 s", cluster_place, folder, table, count=3, rate=100) as scenario:
        async with scenario.load():
            await scenario.acknowledged(200)
            await scenario.freeze(scenario.gateways[1], FROZEN, explains=HEARTBEAT)
            await asyncio.sleep(5)
        account = await scenario.settle(timeout=90)
        assert account.slowest < FROZEN + 30, scenario.story()


@pytest.mark.full
@pytest.mark.timeout(120)
async def test_a_gateway_that_was_frozen_resumes_normally(embedded_place: LogPlace, folder: Path, table: Table) -> None:
    async with Scenario("frozen for 10 s", embedded_place, folder, table) as scenario:
        async with scenario.load():
            await scenario.acknowledged(200)
            await scenario.freeze(scenario.gateways[0], 10, explains=0)
            await scenario.acknowledged(200)
        account = await scenario.settle()
        assert (account.duplicated, account.refused) == (0, 0), account


@pytest.mark.full
@pytest.mark.timeout(120)
async def test_an_event_loop_that_is_blocked_for_5_s_costs_no_membership(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    group = f"{cluster_place.prefix}router"
    async with Scenario("one of three blocked for 5 s, twice", cluster_place, folder, table, count=3) as scenario:
        async with scenario.load():
            before = await cluster.members(group)
            for _ in range(2):
                await scenario.acknowledged(200)
                await scenario.freeze(scenario.gateways[1], 5, explains=0)
            await asyncio.sleep(4)  # an evicted member would learn it with its next heartbeat
            assert await cluster.members(group) == before, scenario.story()
        account = await scenario.settle()
        assert (len(before), account.duplicated) == (3, 0), account


@pytest.mark.full
@pytest.mark.timeout(240)
async def test_rolling_restarts_of_three_gateways_lose_and_duplicate_nothing(
    cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario("three restarted in turn, twice", cluster_place, folder, table, count=3) as scenario:
        scenario.first.answer(SLOW)
        async with scenario.load():
            for gateway in scenario.gateways * 2:
                await scenario.acknowledged(150)
                await scenario.restart(gateway)
                await scenario.until_all_work()
        account = await scenario.settle()
        assert account.duplicated == 0, f"{account}\n{scenario.story()}"
        assert account.latest["second"] < PROMPT, scenario.story()


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_a_member_that_comes_and_goes_every_5_s_stops_nobody(
    cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario("a fourth that comes and goes, 5 times", cluster_place, folder, table, count=3) as scenario:
        fourth = scenario.add()
        scenario.first.answer(SLOW)
        async with scenario.load():
            for _ in range(5):
                await fourth.start()
                await asyncio.sleep(5)
                await fourth.stop()
                await asyncio.sleep(5)
        account = await scenario.settle()
        assert account.duplicated == 0, f"{account}\n{scenario.story()}"


SLOW = Answer(delay=0.3)
"""So that there is always much under way."""
UNDER_WAY = {"kafka": 0.02, "embedded": 0.06}
"""Seconds that a commit and what is in flight take at a crash, on the average of several. On the embedded log a commit
waits for appends and their syncs: beside other tests that is longer, by what acknowledgements take."""
FROZEN = 46.0
"""Seconds: a session lasts for 45."""
HEARTBEAT = 4.0
"""Seconds until an evicted member learns of it, with its next heartbeat, and releases its partitions."""
PROMPT = 10.0
"""Seconds within which the destination that responds at once gets an event while partitions change hands: it took 2.1
on two busy cores."""
