"""Processes that go by different rules for a while, on three brokers: what is read by the older ones is not lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.acceptance.conftest import LogPlace
from tests.acceptance.test_ordered import Keyed, events_by_key
from tests.acceptance.test_rollout import NUMBERS, Fleet, slowest
from tests.faults.scenario import Table, account_of, command
from tests.gateway_process import GatewayProcess
from tests.gateway_versions import THIS
from tests.load import SECRET, Load, all_delivered
from tests.sink import Sink

RATE = 200.0
"""Events a second of all sources."""
KEYS = 40
DIFFERENT = 10.0
"""Seconds for which the processes go by different rules, under load."""
SOURCE_WAIT, ROUTE_WAIT = 20.0, 60.0
"""Seconds for which a router keeps an event of a source, or a delivery of a route, that its rules don't know, before it
looks again."""
MOMENT = 5.0
"""Seconds within which what waits for nothing is delivered, with a rebalance on the way."""

VERIFIED = f'verify: {{{{scheme: github, secrets: ["{SECRET}"]}}}}, key: string(body.k)'
SOURCES = f"""\
version: 1
sources:
  github: {{{{{VERIFIED}}}}}
"""
NEW_SOURCES = f"""\
  own: {{{{{VERIFIED}}}}}
  shared: {{{{{VERIFIED}, topic: {{prefix}}events.github}}}}
"""
"""One with a topic of its own, and one in a topic that every router reads already."""
KEPT = """\
destinations:
  kept: {{url: "{kept}"}}
  plain: {{url: "{plain}"}}
  ordered: {{url: "{ordered}"}}
routes:
  - {{name: kept, from: github, to: kept}}
"""
MORE = """\
  - {{name: plain, from: {sources}, to: plain}}
  - {{name: in-order, from: {sources}, to: ordered, order: key}}
"""

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


@asynccontextmanager
async def sending(loads: Sequence[Load]) -> AsyncIterator[None]:
    """Send while the block runs; end when each request has its answer."""
    stopped = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for load in loads:
            tasks.create_task(load.send_until(stopped))
        try:
            yield
        finally:
            stopped.set()


async def go_by(rules: str, *gateways: GatewayProcess) -> float:
    """Give gateways other rules, and return when all of them go by these."""
    reloaded = [len(each.lines("rules_reloaded")) for each in gateways]
    for each in gateways:
        each.rules.write_text(rules)
    for each, count in zip(gateways, reloaded, strict=True):
        until = time.monotonic() + 30
        while len(each.lines("rules_reloaded")) == count:
            assert time.monotonic() < until, each.story()
            await asyncio.sleep(0.02)
    return time.time()


async def are_in_order(place: LogPlace, source: str, came: Iterable[str]) -> bool:
    """Return whether events of a topic came in the order that the log has of each key."""
    positions = {event: position for position, event in enumerate(came)}
    for events in (await events_by_key(place, source)).values():
        found = [positions[event.id] for event in events if event.id in positions]
        if found != sorted(found):
            return False
    return True


async def unrouted(*gateways: GatewayProcess) -> float:
    return sum([(await each.metrics()).sum("gateway_unrouted_total") for each in gateways])


async def test_a_new_source_that_one_router_does_not_know_yet_reaches_its_routes(
    cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    """The ingress and the other router know it; what the first reads of it waits until it is asked again."""
    async with Sink(path="/plain") as plain, Sink(path="/ordered") as ordered, AsyncExitStack() as stack:
        names = {"kept": plain.url, "plain": plain.url, "ordered": ordered.url, "prefix": cluster_place.prefix}
        older = (SOURCES + KEPT).format(**names)
        newer = (SOURCES + NEW_SOURCES + KEPT + MORE).format(**names, sources="[own, shared]")
        fleet = Fleet(stack, folder, cluster_place, older)
        [first] = await fleet.start(THIS, "router")
        second, ingress = await fleet.start(THIS, "router", "ingress")
        await go_by(newer, second, ingress)
        loads = []
        for number, source in enumerate(("own", "shared")):
            load = Keyed(ingress.port, rate=RATE / 2, path=f"/in/{source}", first=number * NUMBERS)
            load.keys = KEYS
            loads.append(load)
        async with sending(loads):
            await asyncio.sleep(DIFFERENT)
            known_at = await go_by(newer, first)
            await asyncio.sleep(DIFFERENT / 2)
        acknowledged = {event: at for load in loads for event, at in load.acknowledged.items()}
        await all_delivered(acknowledged, plain, ordered, timeout=3 * SOURCE_WAIT)
        await asyncio.sleep(MOMENT)
        account = account_of(loads, {"plain": plain, "ordered": ordered})
        table("a new source, which one of two routers doesn't know for 10 s, kafka", account)
        stories = "\n".join([each.story() for each in (first, second)])
        assert (account.lost, account.altered, account.duplicated) == (0, 0, 0), f"{account}\n{stories}"
        assert (account.refused, await unrouted(first, second)) == (0, 0), stories
        came = {request.header("gateway-event-id") or "": request.at for request in ordered.requests}
        late = {event for event, at in came.items() if at > acknowledged[event] + SOURCE_WAIT / 2}
        own, shared = [load.acknowledged for load in loads]
        assert late, "expected the first router to read of the new source"
        assert len(late) < len(shared) * 2 / 3
        assert late <= {event for event, at in shared.items() if at < known_at + MOMENT}
        assert all(at < acknowledged[event] + SOURCE_WAIT + MOMENT for event, at in came.items())
        assert max(came[event] - at for event, at in own.items()) < MOMENT
        in_time = [event for event in came if event not in late]
        assert await are_in_order(cluster_place, "own", in_time), stories
        assert await are_in_order(cluster_place, "github", in_time), stories


async def test_a_route_that_one_router_loses_first_misses_only_what_that_router_reads(
    cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    """Put back at both, it gets what waited; a replay brings what it missed. The route that stays has it all."""
    async with (
        Sink(path="/kept") as kept,
        Sink(path="/plain") as plain,
        Sink(path="/ordered") as ordered,
        AsyncExitStack() as stack,
    ):
        names = {"kept": kept.url, "plain": plain.url, "ordered": ordered.url}
        without = (SOURCES + KEPT).format(**names)
        whole = (SOURCES + KEPT + MORE).format(**names, sources="github")
        fleet = Fleet(stack, folder, cluster_place, whole)
        first, second, ingress = await fleet.start(THIS, "router", "router", "ingress")
        load = Keyed(ingress.port, rate=RATE)
        load.keys = KEYS
        async with sending([load]):
            await plain.received(int(RATE), timeout=30)
            began = time.time()
            await go_by(without, second)
            await asyncio.sleep(DIFFERENT)
            gone_at = await go_by(without, first)
            await asyncio.sleep(MOMENT)
            await go_by(whole, first, second)
            back_at = time.time()
            await asyncio.sleep(MOMENT)
        await all_delivered(load.acknowledged, kept, timeout=30)
        await asyncio.sleep(max(0.0, back_at + ROUTE_WAIT + MOMENT - time.time()))
        stories = "\n".join([each.story() for each in (first, second)])
        for name, sink in (("plain", plain), ("in-order", ordered)):
            came = [request.header("gateway-event-id") or "" for request in sink.requests]
            missed = load.acknowledged.keys() - set(came)
            different = {event for event, at in load.acknowledged.items() if began < at < gone_at}
            assert all(began - 1 < load.acknowledged[event] < back_at for event in missed), stories
            assert 0 < len(missed & different) < len(different), "expected each router to read some"
            if sink is ordered:
                assert await are_in_order(cluster_place, "github", came), stories
            words = ("replay", "--route", name, "--from", "1h", "--undelivered", f"--rules={first.rules}")
            told = (await command(cluster_place, *words)).decode()
            assert f"queued {len(missed):,} deliveries by {name}," in told
        await all_delivered(load.acknowledged, plain, ordered, timeout=60)
        await asyncio.sleep(MOMENT)
        account = account_of([load], {"kept": kept, "plain": plain, "ordered": ordered})
        table("a route gone from one of two routers 10 s before the other, kafka", account)
        assert (account.lost, account.altered, account.duplicated) == (0, 0, 0), f"{account}\n{stories}"
        assert (account.refused, await unrouted(first, second)) == (0, 0), stories
        assert slowest(kept, load.acknowledged) < MOMENT
