"""A fifth of all destinations dies at once: the others go on, memory stays bounded, and the backlog comes back."""

import asyncio
import re
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from typing_extensions import override

from tests.acceptance.conftest import SOURCES, LogPlace
from tests.acceptance.test_destination_isolation import MARGIN, SHARE, percentile
from tests.gateway_process import GatewayProcess
from tests.load import Load, deliveries, report
from tests.sink import Fault, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

BUSY = 3
"""Of the dead ones, so many have a fifth of all traffic between them, and a rate: their backlog is worth a name."""
BUSY_RATE = 50
DRAIN = 400.0
SCRAPE_EVERY = 5.0
OLDEST = re.compile(r'^gateway_oldest_pending_seconds\{topic=".*events.github"\} (.*)$', re.MULTILINE)
SCRAPER = """
import sys, urllib.request
for line in urllib.request.urlopen(sys.argv[1]):
    if b"oldest_pending_seconds{" in line:
        sys.stdout.buffer.write(line)
"""
MAX_MEMORY = 512 << 20
MAX_WAIT = 16.0
"""Seconds that the lowest unfinished offset may wait: some in a queue and memory, two timeouts of 5 s, and a spill."""


@dataclass(frozen=True, slots=True)
class Size:
    destinations: int
    rate: float
    seconds: float


class Spread(Load):
    """Sends to all destinations alike, but for the busy ones."""

    destinations = 0

    @override
    def body(self, number: int) -> bytes:
        name = number // 5 % BUSY if number % 5 == 0 else BUSY + number * 7919 % (self.destinations - BUSY)
        return b'{"n":%d,"d":%d,"filler":"%b"}' % (number, name, self._filler)


def the_rules(size: Size, url_of: Callable[[int], str]) -> str:
    lines = [SOURCES.format(), "destinations:"]
    for number in range(size.destinations):
        limit = f", rate: {BUSY_RATE}/s, concurrency: 5" if number < BUSY else ""
        lines.append(f'  d{number}: {{url: "{url_of(number)}", timeout: 5s{limit}}}')
    lines.append("routes:")
    retry = "retry: {schedule: [5s, 10s, 20s], max_attempts: 1000, max_age: 1d}"
    lines += [
        f"  - {{name: r{number}, from: github, match: {{body.d: {number}}}, to: [d{number}], {retry}}}"
        for number in range(size.destinations)
    ]
    return "\n".join(lines)


@pytest.mark.full
@pytest.mark.timeout(1200)
async def test_a_fifth_of_all_destinations_dies_and_the_others_do_not_notice(
    long_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    size = Size(destinations=5000, rate=400.0, seconds=60.0) if is_full else Size(300, 200.0, 6.0)
    dead = size.destinations // 5
    async with AsyncExitStack() as stack:
        alive, hanging, refusing, failing = [await stack.enter_async_context(Sink(200)) for _ in range(4)]

        def sink_of(number: int) -> Sink:
            return alive if number >= dead else (hanging, refusing, failing)[number % 3]

        rules = the_rules(size, lambda number: f"{sink_of(number).url}/{number}")
        gateway = GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix)
        await stack.enter_async_context(gateway)
        load = Spread(gateway.port, rate=size.rate)
        load.destinations = size.destinations
        watch = asyncio.create_task(watched(gateway))
        await load.send_for(size.seconds)  # the first seconds are slow, and aren't looked at
        began = time.time()
        await load.send_for(size.seconds)
        died = time.time()
        hanging.answer(Fault.HANG)
        failing.answer(503)
        await refusing.refuse()
        await load.send_for(size.seconds)
        recovered = time.time()
        hanging.disconnect()
        hanging.answer(200)
        failing.answer(200)
        await refusing.listen()
        missing = set(load.acknowledged)
        while missing and time.time() < recovered + DRAIN:
            await asyncio.sleep(1)
            for sink in (alive, hanging, refusing, failing):
                # What came to the dead ones while they were dead had no 2xx.
                missing -= {
                    request.header("gateway-event-id") or ""
                    for request in sink.requests
                    if sink is alive or not died <= request.at < recovered
                }
        drained = time.time() - recovered
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        before = percentile(delays(load, alive, began, died), 0.99)
        beside = percentile(delays(load, alive, died, recovered), 0.99)
        report(
            f"{dead} of {size.destinations} destinations dead, {size.rate:g}/s, {long_place.kind}: "
            f"p99 of the others {1000 * before:.1f} ms before, {1000 * beside:.1f} ms beside them; "
            f"memory {WATCHED.memory >> 20} MiB at most, oldest pending {WATCHED.oldest:.1f} s at most, "
            f"backlog back after {drained:.0f} s"
        )
        assert not missing, f"{len(missing)} not delivered: {await where_they_are(gateway)}"
        assert max(deliveries(alive).values()) == 1, gateway.story()
        for each in (hanging, refusing, failing):
            assert_within_rates(each, recovered)
            answered = Counter(
                request.header("gateway-event-id")
                for request in each.requests
                if not died - 0.2 < request.at < recovered + 0.2
            )
            assert max(answered.values()) == 1, gateway.story()
        assert WATCHED.memory < MAX_MEMORY
        assert WATCHED.oldest < MAX_WAIT
        if is_full:
            assert beside <= max(SHARE * before, before + MARGIN), gateway.story()


class WATCHED:
    """The worst that was seen of the process."""

    memory = 0
    oldest = 0.0


async def watched(gateway: GatewayProcess) -> None:
    WATCHED.memory, WATCHED.oldest = 0, 0.0
    while True:
        await asyncio.sleep(SCRAPE_EVERY)
        WATCHED.memory = most_memory(gateway.pid)
        # Read by a process of its own, as a Prometheus would: here it would delay the senders and what they measure.
        page = f"http://127.0.0.1:{gateway.admin_port}/metrics"
        reader = await asyncio.create_subprocess_exec(sys.executable, "-c", SCRAPER, page, stdout=PIPE)
        try:
            said, _ = await reader.communicate()
        except asyncio.CancelledError:
            reader.kill()
            await reader.communicate()
            raise
        found = OLDEST.findall(said.decode())
        assert found, "the page doesn't tell the age of the oldest"
        WATCHED.oldest = max(WATCHED.oldest, *map(float, found))


def most_memory(pid: int) -> int:
    """Return the most bytes that a process has ever had resident."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


async def where_they_are(gateway: GatewayProcess) -> str:
    """Tell what the process says of its backlog."""
    text = await gateway.scrape()
    backlog = re.findall(r"^gateway_retry_backlog\{tier=(.*)\} (.*)$", text, re.MULTILINE)
    spills: Counter[str] = Counter()
    for reason, count in re.findall(r'^gateway_spills_total\{.*reason="(.*)"\} (.*)$', text, re.MULTILINE):
        spills[reason] += int(float(count))
    results: Counter[str] = Counter()
    for result, count in re.findall(r'^gateway_attempts_total\{.*result="(.*)"\} (.*)$', text, re.MULTILINE):
        results[result] += int(float(count))
    waiting = sum(float(n) for n in re.findall(r"^gateway_deliveries_waiting\{.*\} (.*)$", text, re.MULTILINE))
    flying = sum(float(n) for n in re.findall(r"^gateway_deliveries_in_flight\{.*\} (.*)$", text, re.MULTILINE))
    shut = sum(float(n) for n in re.findall(r"^gateway_breaker_open\{.*\} (.*)$", text, re.MULTILINE))
    return f"tiers {backlog}, {+spills}, {+results}, {waiting} waiting, {flying} in flight, {shut} breakers open"


def delays(load: Load, sink: Sink, since: float, until: float) -> list[float]:
    """Return the seconds from each 202 within a time to its delivery at a sink, of those that went there."""
    delivered = {request.header("gateway-event-id") or "": request.at for request in sink.requests}
    return [
        delivered[event] - at for event, at in load.acknowledged.items() if since <= at < until and event in delivered
    ]


def assert_within_rates(sink: Sink, since: float) -> None:
    """Hold what a busy destination got in each second against its rate, with what a burst allows."""
    seconds: dict[str, Counter[int]] = defaultdict(Counter)
    for request in sink.requests:
        if request.at > since:
            seconds[request.target][int(request.at)] += 1
    for number in range(BUSY):
        counts = seconds.get(f"/hook/{number}", Counter())
        assert max(counts.values(), default=0) <= 1.1 * BUSY_RATE + 5, (number, counts)  # a burst, and a late one
