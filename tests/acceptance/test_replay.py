"""A replay of a day's events, whose gateway is killed time and again."""

import asyncio
import re
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from gateway.engine.control.records import ControlRecord, Selection
from gateway.engine.jobs.log_reader import CHECKPOINT_EVERY, CHECKPOINT_INTERVAL
from gateway.engine.jobs.replay_progress import RATE_STEP
from gateway.log.base import Log, Partition
from gateway.log.records import decode_delivery
from gateway.log.topics import Topics
from gateway.open_log import open_log
from gateway.ops.control_client import ControlClient
from gateway.ops.replays import ReplayStatus, follow, window_of
from gateway.settings import from_sources
from tests.acceptance.conftest import SOURCES, LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import Ledger, Load, all_delivered, report
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

LIVE = (
    SOURCES
    + """
destinations:
  first: {{url: "{first}"}}
  second: {{url: "{second}"}}
routes:
  - {{name: live, from: github, to: first}}
"""
)
WITH_ANOTHER = LIVE + "  - {{name: another, from: github, to: second}}\n"
KILLS = 3
BUNCHED = 2.0
"""How many seconds of a replay may come within one: a tier that was read late, on a busy machine, makes up for it."""
RECOVERY = 3.0
"""Seconds after a start in which what has become due meanwhile comes at once."""


@pytest.mark.timeout(600)
async def test_a_replay_that_is_killed_skips_nothing_and_repeats_at_most_a_batch_a_kill(
    long_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """The events came before there was the route: whatever its destination gets is the replay's."""
    count, rate = (50_000, 1000.0) if is_full else (2000, 500.0)
    topics = Topics(long_place.prefix)
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = LIVE.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            load = Load(gateway.port, rate=1500)
            await load.send(count)
            await all_delivered(load.acknowledged, first, timeout=60)
            assert await gateway.stop() == 0
            gateway.rules.write_text(WITH_ANOTHER.format(first=first.url, second=second.url))
            await gateway.start()
            log = await open_log(from_sources({"log": long_place.url}, {}), owner=False)
            try:
                window = await window_of(log, [topics.events("github")], 0.0, None)
                selection = Selection(route="another", since=0.0, rate=rate, starts=window.starts)
                command = (await ControlClient(log, topics).replay(selection, window.ends)).command
                steps: list[ReplayStatus] = []
                recoveries: list[tuple[float, float]] = []
                async for step in follow(log, topics, command.name, timeout=60.0):
                    steps.append(step)
                    if len(recoveries) < KILLS and step.injected >= count * (len(recoveries) + 1) / (KILLS + 1):
                        gateway.kill()
                        killed_at = time.time()
                        await gateway.start()
                        recoveries.append((killed_at, time.time() + RECOVERY))
                assert len(recoveries) == KILLS, steps
                injected, again, busiest = await _injections(log, topics, command)
            finally:
                await log.close()
            await all_delivered(load.acknowledged, second, timeout=120)
            ledger = Ledger.of(second, load.acknowledged)
            came = [request.at for request in second.requests]
            paced = [at for at in came if not any(begin < at < end for begin, end in recoveries)]
            busiest_there = _busiest(paced)
            repeated = Counter(bisect_right([killed_at for killed_at, _ in recoveries], at) for at in again)
            most = rate + 2 * max(1, rate * RATE_STEP)
            batch = min(CHECKPOINT_EVERY, most * CHECKPOINT_INTERVAL)
            title = f"replay of {count} at {rate:g}/s, killed {KILLS} times, {long_place.kind}"
            report(
                f"{title}: {repeated.total()} injected twice, after one kill {max(repeated.values(), default=0)}, "
                f"at most {busiest} in a second, {len(steps)} steps told",
                f"outside of the kills at most {busiest_there} in a second at the destination, of {len(paced)}",
                ledger,
            )
            assert ledger.lost == 0, gateway.story()
            assert injected == load.acknowledged.keys()
            assert repeated[0] == 0
            assert max(repeated.values(), default=0) <= batch
            assert busiest <= most
            assert busiest_there <= BUNCHED * most, gateway.story()
            assert (steps[-1].command.state, steps[-1].injected) == ("done", count)
            assert steps[-1].scanned == steps[-1].total == window.total
            told = [(step.scanned, step.injected) for step in steps]
            assert told == sorted(told)


async def test_each_number_that_a_replay_reports_matches_its_destination(long_place: LogPlace, folder: Path) -> None:
    """A route comes late, while events go on coming; each command's numbers are held against the destination's."""

    async def call(*words: str) -> str:
        return await _called(long_place, gateway, *words)

    def number(pattern: str, told: str) -> int:
        found = re.search(pattern, told)
        assert found is not None, told
        return int(found[1])

    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = LIVE.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            load, stopped = Load(gateway.port, rate=40), asyncio.Event()
            sending = asyncio.create_task(load.send_until(stopped))
            await asyncio.sleep(2)
            gateway.rules.write_text(WITH_ANOTHER.format(first=first.url, second=second.url))
            await gateway.line("rules_reloaded", timeout=10)
            await asyncio.sleep(2)
            words = ("replay", "--route", "another", "--from", "1h")
            told = await call(*words, "--dry-run")
            missed = number(r"(\d+) missed", told)
            assert re.search("use --to .+Z or --undelivered to leave them out", told), told
            assert number(r"would queue (\d+) deliveries", told) == number(r"(\d+) deliveries match", told) > missed
            told = await call("replay", "--source", "github", "--from", "1h", "--undelivered")
            assert "queued 0 deliveries by live, from " in told
            assert number(r"queued (\d+) deliveries by another", told) == missed
            again = await call(*words, "--undelivered", "--dry-run")
            assert number(r"would queue (\d+) deliveries", again) == 0
            stopped.set()
            await sending
            await all_delivered(load.acknowledged, second, timeout=60)
            came = Counter(request.header("gateway-event-id") for request in second.requests)
            assert came == dict.fromkeys(load.acknowledged, 1), gateway.story()

            told = await call(*words, "--dry-run")
            assert number(r"(\d+) missed", told) == 0
            assert number(r"would queue (\d+) deliveries", told) == len(came)
            exactly = told.partition("to replay exactly these: gateway ")[2].split()
            assert number(r"queued (\d+) deliveries", await call(*exactly)) == len(came)
            event = next(iter(load.acknowledged))
            assert "queued 1 delivery by another, from 1 record" in await call(
                "replay", "--event", event, "--destination", "second"
            )
            await second.received(2 * len(came) + 1, timeout=30)
            twice = Counter(request.header("gateway-event-id") for request in second.requests)
            assert twice == dict.fromkeys(came, 2) | {event: 3}
            report(
                f"replay of what a route missed, {long_place.kind}: {missed} of {len(came)} queued, each delivered once"
            )


async def test_one_event_is_delivered_again_to_all_its_destinations(place: LogPlace, folder: Path) -> None:
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = WITH_ANOTHER.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway:
            load = Load(gateway.port, rate=20)
            await load.send(20)
            await all_delivered(load.acknowledged, first, timeout=30)
            await all_delivered(load.acknowledged, second, timeout=30)
            event = next(iter(load.acknowledged))
            told = await _called(place, gateway, "events", "redeliver", event)
            assert f"queued 2 deliveries of {event}: due" in told
            for sink in (first, second):
                await sink.received(21, timeout=30)
                came = Counter(request.header("gateway-event-id") for request in sink.requests)
                assert came == dict.fromkeys(load.acknowledged, 1) | {event: 2}, gateway.story()


async def _called(place: LogPlace, gateway: GatewayProcess, *words: str) -> str:
    """Call a command, and return what it prints."""
    flags = (f"--log={place.url}", f"--topic-prefix={place.prefix}", f"--rules={gateway.rules}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *words, *flags, cwd=ROOT, stdout=PIPE, stderr=STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, out.decode()
    return out.decode()


async def _injections(log: Log, topics: Topics, command: ControlRecord) -> tuple[set[str], list[float], int]:
    """Return what was injected, when something was again, and the most within a second.

    Later hops of a delivery aren't injections.
    """
    topic = topics.retry("5s")
    found: defaultdict[str, list[float]] = defaultdict(list)
    for number, (start, end) in (await log.bounds(topic)).items():
        async for records in log.scan(Partition(topic, number), start, end):
            for record in records:
                stored = decode_delivery(record)
                if stored.metadata.replay == command.name and stored.delivery.replayed_at == stored.delivery.due:
                    found[stored.delivery.event.id].append(record.appended_at)
            await asyncio.sleep(0)
    again = [at for times in found.values() for at in sorted(times)[1:]]
    return set(found), again, _busiest(at for times in found.values() for at in times)


def _busiest(times: Iterable[float]) -> int:
    """Return the most of these within a second."""
    at = sorted(times)
    busiest = begin = 0
    for index, moment in enumerate(at):
        while at[begin] <= moment - 1.0:
            begin += 1
        busiest = max(busiest, index - begin + 1)
    return busiest
