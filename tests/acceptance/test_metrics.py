"""What /metrics says adds up: no delivery is forgotten by the books. And it is said within a second."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.acceptance.conftest import SOURCES, LogPlace, operators
from tests.gateway_process import GatewayProcess, Metrics
from tests.load import Load, report
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = (
    SOURCES
    + """
destinations:
  good: {{url: "{good}"}}
  gone: {{url: "{gone}"}}
  soon: {{url: "{soon}"}}
  later: {{url: "{later}"}}
routes:
  - {{name: ended, from: github, to: [good, gone]}}
  - {{name: soon, from: github, match: {{body.n: {{lt: 50}}}}, to: [soon], retry: {{schedule: [4s], max_attempts: 99}}}}
  - {{name: later, from: github, match: {{type: push}}, to: [later], retry: {{schedule: [1h]}}}}
  - {{name: never, from: github, match: {{type: nothing}}, to: [good]}}
"""
)
CHAOS = (
    SOURCES
    + """
destinations:
  good: {{url: "{good}"}}
  flaky: {{url: "{flaky}"}}
  gone: {{url: "{gone}"}}
routes:
  - {{name: good, from: github, to: [good]}}
  - {{name: flaky, from: github, to: [flaky], retry: {{schedule: [200ms], jitter: 0, max_attempts: 99}}}}
  - {{name: gone, from: github, to: [gone]}}
"""
)
SCRAPE = 1.0
"""Seconds that a scrape may take by the clock, without those in which other processes have the processor."""
OF_THE_JOBS = 'gateway_log_retention_left_seconds{topic="gateway.parked"}'
"""A series that one process has: the one that counts what is parked, from its first count on."""
MATCHED = 3
"""Deliveries of each event: two of `ended` and one of `later`."""
SOON = 50
"""Those of `soon`: as many as its lane takes, so that they stay in memory, where no record stands for them."""


async def test_events_times_matched_destinations_are_deliveries_finished_and_pending(
    place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    events = 5000 if is_full else 300
    async with Sink(200) as good, Sink(410) as gone, Sink(425) as soon, Sink(425) as later:
        rules = RULES.format(good=good.url, gone=gone.url, soon=soon.url, later=later.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway:
            load = Load(gateway.port, rate=500)
            await load.send(events)
            await good.received(events, timeout=30)
            metrics = await gateway.metrics()
            for _ in range(40):  # gauges are a second old at most
                if sum(_books(metrics).values()) == events * MATCHED + SOON:
                    break
                await asyncio.sleep(0.25)
                metrics = await gateway.metrics()
            books = _books(metrics)
            report(f"{events} events, {MATCHED} deliveries each and {SOON} more, {place.kind}: {books}")
            assert metrics.sum("gateway_events_total") == events
            assert sum(books.values()) == events * MATCHED + SOON, gateway.story()
            assert (books["delivered"], books["dead_lettered"]) == (events, events)
            assert metrics.sum("gateway_dead_letters_total", reason="gone") == events
            assert metrics.sum("gateway_unrouted_total") == 0


async def test_counters_of_several_processes_add_up_over_a_chaotic_run(
    long_place: LogPlace, tmp_path: Path, *, is_full: bool
) -> None:
    """Destinations that fail and come back, one that is gone, a pause: each delivery ends in somebody's books, once.

    Nothing is killed: a crash repeats, and counts again what it repeats.
    """
    events = 3000 if is_full else 240
    count = 3 if long_place.is_kafka else 1  # a file is one process's
    scraped: list[Metrics] = []
    async with Sink(200) as good, Sink(503, 200, 500, 200, 200) as flaky, Sink(410) as gone:
        rules = CHAOS.format(good=good.url, flaky=flaky.url, gone=gone.url)
        folders = [tmp_path / str(number) for number in range(count)]
        async with AsyncExitStack() as stack:
            gateways: list[GatewayProcess] = []
            for folder in folders:
                folder.mkdir()
                beside = gateways[0] if gateways else None
                gateway = GatewayProcess(
                    folder, rules=rules, log=long_place.url, prefix=long_place.prefix, beside=beside
                )
                gateways.append(await stack.enter_async_context(gateway))
            load = Load(gateways[0].port, rate=300)
            await load.send(events // 2)
            async with operators(long_place) as commands:
                await commands.pause("destination/good")
            await load.send(events // 2)
            async with operators(long_place) as commands:
                await commands.resume("destination/good")
            for _ in range(120):
                scraped = [await gateway.metrics() for gateway in gateways]
                if _ended(scraped) == events * 3:
                    break
                await asyncio.sleep(0.25)
            for gateway in gateways:
                assert await gateway.stop() == 0
    total = _ended(scraped)
    report(f"{events} events by {count} processes, {long_place.kind}: {total:g} deliveries ended")
    assert _sum(scraped, "gateway_events_total") == events == load.statuses()[202]
    assert _sum(scraped, "gateway_requests_total", status="202") == events
    assert _sum(scraped, "gateway_deliveries_total", outcome="delivered") == events * 2
    assert _sum(scraped, "gateway_deliveries_total", outcome="dead_lettered") == events
    assert _sum(scraped, "gateway_dead_letters_total") == events
    assert _sum(scraped, "gateway_delivery_duration_seconds_count") == events * 2
    tried = _sum(scraped, "gateway_attempts_total")
    assert tried == _sum(scraped, "gateway_attempt_duration_seconds_count")
    assert tried == len(good.requests) + len(flaky.requests) + len(gone.requests)
    retried = _sum(scraped, "gateway_retries_total")
    assert tried == total + retried, "each attempt ends its delivery, or is followed by another"
    assert retried > 0
    assert _sum(scraped, "gateway_spills_total", reason="paused") > 0


def series_of(
    *,
    sources: int,
    destinations: int,
    routes: int,
    pairs: int,
    ordered: int,
    secrets: int = 0,
    ends: int = 0,
    quarantines: int = 0,
) -> int:
    """Return how many series docs/scaling.md tells of, but for those of the process."""
    of_names = 178 + 91 * sources + 43 * destinations + 36 * routes + 11 * pairs + 5 * ordered
    return of_names + secrets + ends + 6 * quarantines


async def test_the_number_of_series_is_as_documented(embedded_place: LogPlace, tmp_path: Path) -> None:
    verify = "verify: {scheme: none}, key: body.n"
    rules = "\n".join(
        [
            "version: 1",
            "sources:",
            *[f"  source-{number}: {{{verify}{', dedupe: 1h' if number < 2 else ''}}}" for number in range(5)],
            "  rotating: {verify: {scheme: github, secrets: [new, {secret: old, until: 2999-12-31}]}}",
            "  steady: {verify: {scheme: github, secrets: [only]}, quarantine: true}",
            "destinations:",
            *[f'  to-{number}: {{url: "http://127.0.0.1:1/"}}' for number in range(4)],
            "routes:",
            *[f"  - {{name: route-{number}, from: source-{number}, to: [to-0, to-1, to-2]}}" for number in range(4)],
            "  - {name: ordered, from: source-4, to: [to-2, to-3], order: key}",
        ]
    )
    expected = series_of(sources=7, destinations=4, routes=5, pairs=14, ordered=2, secrets=2, ends=1, quarantines=1)
    async with GatewayProcess(tmp_path, rules=rules, log=embedded_place.url) as gateway:
        await asyncio.sleep(2.5)  # gauges are set once a second
        found = _series(await gateway.scrape())
    report(f"{found} series, {expected} expected")
    assert found == expected


def _series(page: str) -> int:
    """Count the gateway's series that each process has from its start."""
    return sum(line.startswith("gateway_") and not line.startswith(OF_THE_JOBS) for line in page.splitlines())


async def test_ten_thousand_routes_are_scraped_within_a_second(embedded_place: LogPlace, folder: Path) -> None:
    """The first page too, of which nothing has been written before."""
    rules = "\n".join(
        [
            SOURCES.format(),
            "destinations:",
            *[f'  destination-{number}: {{url: "http://127.0.0.1:1/"}}' for number in range(1000)],
            "routes:",
            *[
                f"  - {{name: route-{number}, from: github, to: [destination-{number % 1000}], match: {{type: never}}}}"
                for number in range(10_000)
            ],
        ]
    )
    async with GatewayProcess(folder, rules=rules, log=embedded_place.url) as gateway:
        seconds, page = [], ""
        for _ in range(3):
            began, before = time.monotonic(), [_waited(pid) for pid in (gateway.pid, os.getpid())]
            page = await gateway.scrape()
            took, after = time.monotonic() - began, [_waited(pid) for pid in (gateway.pid, os.getpid())]
            seconds.append(took - max(now - then for now, then in zip(after, before, strict=True)))
            await asyncio.sleep(1.2)  # gauges are set once a second
        report(f"scrapes of {page.count(chr(10)):,} lines took {', '.join(f'{each:.2f}' for each in seconds)} s")
        expected = series_of(sources=1, destinations=1000, routes=10_000, pairs=10_000, ordered=0)
        assert _series(page) == expected, _counts(page)
        assert max(seconds) < SCRAPE


def _waited(pid: int) -> float:
    """Return the seconds for which a process could have run, and others had the processor; 0 where nobody says so."""
    path = Path(f"/proc/{pid}/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


def _counts(page: str) -> dict[str, int]:
    """Return how many series each metric has that has few: which of them is one too many shows there."""
    names = Counter(line.partition("{")[0].partition(" ")[0] for line in page.splitlines() if not line.startswith("#"))
    return {name: count for name, count in names.items() if count < 100}


def _ended(scraped: Iterable[Metrics]) -> float:
    return _sum(scraped, "gateway_deliveries_total")


def _sum(scraped: Iterable[Metrics], name: str, **labels: str) -> float:
    return sum(metrics.sum(name, **labels) for metrics in scraped)


def _books(metrics: Metrics) -> dict[str, float]:
    finished = {
        outcome: metrics.sum("gateway_deliveries_total", outcome=outcome)
        for outcome in ("delivered", "dead_lettered", "dropped")
    }
    pending = {
        name: metrics.sum(f"gateway_{name}") for name in ("deliveries_in_flight", "deliveries_waiting", "retry_backlog")
    }
    return finished | pending
