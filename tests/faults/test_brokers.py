"""A cluster of three brokers that loses leaders, replicas and coordinators under load."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dev.kafka import Broker, Cluster
from tests.acceptance.conftest import LogPlace
from tests.faults.scenario import Scenario, Table

LATEST_ANSWER = 12.0
"""Seconds: senders such as GitHub give up after 10, most after 15 or more."""

pytestmark = [pytest.mark.full, pytest.mark.timeout(180)]


async def test_a_leader_that_is_killed_is_followed_to_its_successor(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario("a leader killed", cluster_place, folder, table, count=2) as scenario:
        async with scenario.load():
            await scenario.acknowledged(200)
            leader = await cluster.leader(f"{cluster_place.prefix}events.github", 0)
            async with _down_for(10, leader, cluster, scenario):
                await _in_a_row(200, scenario)
            await scenario.acknowledged(200)
        await _settle(scenario)


async def test_a_coordinator_that_is_killed_is_followed_to_its_successor(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario("the coordinator killed", cluster_place, folder, table, count=2, is_dev=False) as scenario:
        async with scenario.load():
            await scenario.acknowledged(200)
            group = f"{cluster_place.prefix}router"
            async with _down_for(10, await cluster.coordinator(group), cluster, scenario):
                async with asyncio.timeout(30):
                    before = await cluster.committed(group)
                    while await cluster.committed(group) < before + 200:  # noqa: ASYNC110 - another process's
                        await asyncio.sleep(0.1)
            await scenario.acknowledged(200)
        await _settle(scenario)


async def test_brokers_are_restarted_in_turn(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario("each broker restarted", cluster_place, folder, table, count=2, is_dev=False) as scenario:
        async with scenario.load():
            for node in cluster.nodes.values():
                await scenario.acknowledged(150)
                async with scenario.without_commits(node, cluster):
                    await asyncio.to_thread(node.end)
                    await asyncio.to_thread(node.restart)
                    await cluster.until_whole()
        await _settle(scenario)


async def test_a_leader_that_hangs_loses_nothing(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    async with Scenario(
        "a leader frozen for 15 s", cluster_place, folder, table, count=2, connections=1500
    ) as scenario:
        async with scenario.load():
            await scenario.acknowledged(200)
            node = await cluster.leader(f"{cluster_place.prefix}events.github", 0)
            async with scenario.without_commits(node, cluster):
                node.pause()
                try:
                    await asyncio.sleep(15)
                finally:
                    node.resume()
                await cluster.until_whole()
            await scenario.acknowledged(200)
        await _settle(scenario)


@pytest.mark.parametrize("by", ["ended", "killed"])
async def test_without_enough_replicas_nothing_is_acknowledged_until_they_are_back(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table, by: str
) -> None:
    """Two that are ended leave the in-sync replicas (NOT_ENOUGH_REPLICAS); those that are killed are waited for."""
    title = f"two of three brokers {by} for 15 s"
    async with Scenario(title, cluster_place, folder, table, count=2, connections=1500) as scenario:
        pids = [gateway.pid for gateway in scenario.gateways]
        async with scenario.load():
            await scenario.acknowledged(200)
            began = time.time()
            for node in list(cluster.nodes.values())[:2]:
                await asyncio.to_thread(node.end if by == "ended" else node.kill)
            down = time.time()
            await asyncio.sleep(15)
            for gateway in scenario.gateways:
                assert (await gateway.metrics()).sum("gateway_log_up") == 0
                if by == "ended":  # a question to one that was killed has no answer either
                    assert "append to " in gateway.lines("log_unavailable")[-1]["error"]
                with pytest.raises(AssertionError, match=r"503 Service Unavailable.*log: "):
                    await gateway.ready(timeout=0)
            back = time.time()
            await asyncio.to_thread(cluster.heal)
            await cluster.until_whole()
            for gateway in scenario.gateways:
                await gateway.ready(timeout=20)
                await gateway.line("log_available")
            await scenario.acknowledged(300)
            # Commits need as many replicas as events do: nothing comes meanwhile that could be finished.
            scenario.explain(began, time.time(), uncommitted=0)
        await _settle(scenario)
        answers = [sent for sent in scenario.sender.answers if sent.at > down and sent.answered_at < back]
        refused = [sent for sent in answers if sent.status == 503]
        assert not [sent for sent in answers if sent.status == 202]
        assert refused
        assert all(b"\r\nretry-after: " in sent.head.lower() for sent in refused)
        assert [gateway.pid for gateway in scenario.gateways if gateway.is_running] == pids


async def _in_a_row(count: int, scenario: Scenario, *, timeout: float = 30.0) -> None:
    """Wait until so many requests are acknowledged of which each was sent next after the one before, from now on.

    Their ids decide the partition: where one has no leader that is known, about every sixth is refused.
    """
    began, until = time.time(), time.monotonic() + timeout
    while True:
        numbers = sorted([each.number for each in scenario.sender.answers if each.status == 202 and each.at > began])
        if any(last - first == count - 1 for first, last in zip(numbers, numbers[count - 1 :], strict=False)):
            return
        assert time.monotonic() < until, f"expected {count} 202s in a row in {timeout:g} s\n{scenario.story()}"
        await asyncio.sleep(0.1)


@asynccontextmanager
async def _down_for(seconds: float, node: Broker, cluster: Cluster, scenario: Scenario) -> AsyncIterator[None]:
    """Kill a node, and bring it back once so much time has gone by and what is done meanwhile is done."""
    async with scenario.without_commits(node, cluster):
        await asyncio.to_thread(node.kill)
        began = time.monotonic()
        yield
        await asyncio.sleep(began + seconds - time.monotonic())
        await asyncio.to_thread(node.restart)
        await cluster.until_whole()


async def _settle(scenario: Scenario) -> None:
    await scenario.settle(timeout=90)
    slowest = max(sent.answered_at - sent.at for sent in scenario.sender.answers)
    assert slowest < LATEST_ANSWER, scenario.story()
