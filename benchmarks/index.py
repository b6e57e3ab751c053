"""The index: how fast it follows a log, how large it is, how long searches take, and how long the loop is held.

python -m benchmarks.index [--events 1000000] [--folder DIR]

The log is made up as it is read: pushes of 2 kB of 1,000 repositories, 1 in 1,000 with a dead letter. What making them
up costs is told, and not counted in the rate. Garbage is collected as in a gateway.
"""

import argparse
import asyncio
import random
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from typing import cast

import psutil
import uvloop

from benchmarks.payload import BODY
from gateway import garbage
from gateway.index.index import Index, open_index
from gateway.index.traffic import TrafficQuery
from gateway.index.traffic_schema import HOUR
from gateway.log.base import Commit, Log, Partition, Record
from gateway.log.records import encode_delivery, encode_event
from gateway.log.topics import Topics
from gateway.model import Attempt, Delivery, Event, RecordMetadata, Result, delivery_id, event_id

TOPICS = Topics()
PUSHES, DEAD = TOPICS.events("github"), TOPICS.dead
PARTITIONS = 6
REPOSITORIES, SENDERS, DEAD_EVERY = 1000, 5000, 1000
TYPES = ("push", "push", "push", "pull_request.opened", "issues.opened", "check_run.completed", "release.published")
BATCH, AT_ONCE = 500, 50
RATE = 5000.0
"""Events a second by the made-up log's clock."""
HEADERS = (
    (b"Content-Type", b"application/json"),
    (b"User-Agent", b"GitHub-Hookshot/044aadd"),
    (b"X-GitHub-Event", b"push"),
    (b"X-GitHub-Hook-ID", b"457826735"),
)
SHA, OWN, MESSAGE = b"6113728f27ae82c7b1a177c8d03f9e96e0adf246", b"95790bf891e7", b"Round totals half to even"
TRIES = 40


class MadeUpLog:
    """As much of a log as the index asks for: events of one topic, dead letters of another, all of them done."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.began = time.time() - count / RATE
        self.seconds = 0.0
        """Of CPU time that making up records took."""
        template = Event(
            id=event_id("github", "0"), source="github", type="push", received_at=0.0, headers=HEADERS, body=b""
        )
        self._fixed = [
            pair for pair in encode_event(template) if pair[0] not in ("ce_id", "ce_type", "gw_at", "ce_time")
        ]

    async def topics(self) -> Collection[str]:
        return [PUSHES, DEAD]

    async def topics_of(self, group: str) -> Collection[str]:  # noqa: ARG002 - the contract's
        return []

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        return {topic: len((await self.readable(topic))[0]) for topic in topics}

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        if topic == DEAD:
            return {0: (0, self.count // DEAD_EVERY)}, {}
        its = [(self.count - number + PARTITIONS - 1) // PARTITIONS for number in range(PARTITIONS)]
        return {number: (0, end) for number, end in enumerate(its)} if topic == PUSHES else {}, {}

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:  # noqa: ARG002 - the contract's
        return {number: Commit(end) for number, (_, end) in (await self.readable(topic))[0].items()}

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int]) -> Mapping[int, int]:  # noqa: ARG002 - as above
        return dict.fromkeys(numbers, 0)

    def topic_id(self, topic: str) -> str:  # noqa: ARG002 - the contract's
        return ""

    def now(self) -> float:
        return time.time()

    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        for begin in range(start, end, BATCH):
            records = list[Record]()
            for first in range(begin, min(end, begin + BATCH), AT_ONCE):
                began = time.thread_time()
                some = range(first, min(end, begin + BATCH, first + AT_ONCE))
                records += [self._record(partition, offset) for offset in some]
                self.seconds += time.thread_time() - began
                await asyncio.sleep(0)
            yield records

    def _record(self, partition: Partition, offset: int) -> Record:
        if partition.topic == DEAD:
            number = offset * DEAD_EVERY
            at = self.began + number / RATE + 1
            event = self.event(number)
            attempt = Attempt(number=1, at=at, seconds=0.1, result=Result.SERVER_ERROR, status=503)
            delivery = Delivery(
                id=delivery_id(event.id, "build", "ci"),
                event=event,
                route="build",
                destination=f"ci-{number // DEAD_EVERY % 20}",
                attempts=(attempt,),
                successor=1,
            )
            return Record(
                offset, at, b"", event.body, encode_delivery(delivery, RecordMetadata(dead_reason="exhausted"), at=at)
            )
        number = offset * PARTITIONS + partition.number
        at = self.began + number / RATE
        headers = [
            *self._fixed,
            ("ce_id", event_id("github", str(number)).encode()),
            ("ce_type", TYPES[number % len(TYPES)].encode()),
            ("gw_at", b"%.6f" % at),
        ]
        return Record(offset, at, b"", body_of(number), headers)

    def event(self, number: int) -> Event:
        at = float(b"%.6f" % (self.began + number / RATE))
        type_ = TYPES[number % len(TYPES)]
        return Event(
            id=event_id("github", str(number)),
            source="github",
            type=type_,
            received_at=at,
            headers=HEADERS,
            body=body_of(number),
        )


def body_of(number: int) -> bytes:
    """Return a push: its commit is its own, its repository and sender are some of many."""
    body = BODY.replace(SHA, b"%040x" % (number * 2654435761)).replace(OWN, b"%012x" % number)
    body = body.replace(b"acme/shop", b"acme/shop-%d" % (number % REPOSITORIES))
    return body.replace(b'"login":"mona"', b'"login":"mona-%d"' % (number % SENDERS)).replace(
        MESSAGE, MESSAGE + b" %d" % number
    )


async def measure(count: int, folder: Path) -> None:
    source = MadeUpLog(count)
    path = folder / "index.db"
    gaps: list[float] = []
    before: list[float] = []
    async with open_index(path, cast("Log", source), TOPICS, days=3650, max_bytes=1 << 40) as index:
        collecting = asyncio.create_task(garbage.collect(), name="garbage")
        idle = asyncio.create_task(watch_loop(before), name="watch-idle")
        await asyncio.sleep(3.0)
        idle.cancel()
        watching = asyncio.create_task(watch_loop(gaps), name="watch")
        cpu, began = time.process_time(), time.perf_counter()
        await index.refresh()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        watching.cancel()
        collecting.cancel()
        size = bytes_in(folder)
        own = cpu - source.seconds
        print(f"{count:,} events: {count / own:,.0f}/s of CPU time, {count / wall:,.0f}/s of time")
        print(
            f"  {own / count * 1e6:.0f} µs of CPU time an event; to make it up, {source.seconds / count * 1e6:.0f} µs"
        )
        print(f"  {size / 2**20:,.0f} MiB, {size / count:,.0f} bytes an event")
        for when, measured in (("before", before), ("meanwhile", gaps)):
            p99, longest = quantiles(measured, n=100)[98] * 1e3, max(measured) * 1e3
            print(f"  gaps of the event loop {when}: p99 {p99:.1f} ms, longest {longest:.1f} ms")
        await search_all(index, count)
        await count_all(index, count)
        print(f"  statuses: {(await index.statistics()).left_out or 'all records are in the index'}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  memory: {psutil.Process().memory_info().rss / 2**20:,.0f} MiB now, {peak:,.0f} MiB at most")


def bytes_in(folder: Path) -> int:
    return sum([each.stat().st_size for each in folder.iterdir()])


async def watch_loop(gaps: list[float]) -> None:
    """Measure how much later than asked for the loop wakes up a task."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.005)
        gaps.append(time.perf_counter() - began - 0.005)


async def search_all(index: Index, count: int) -> None:
    print(f"  {'search':<58} {'p50':>8} {'p95':>8} {'longest':>8}  found")
    for name, queries in KINDS.items():
        chosen = random.Random(7)
        times, found, short = list[float](), 0, 0
        for query in queries(chosen, count):
            began = time.perf_counter()
            page = await index.search(query)
            times.append(time.perf_counter() - began)
            found += len(page.events)
            short += page.is_cut_short
        p50, p95 = quantiles(times, n=20)[9], quantiles(times, n=20)[18]
        told = f"{found / len(times):.1f}" + (f", {short / len(times):.0%} cut short" if short else "")
        print(f"  {name:<58} {p50 * 1e3:7.1f}  {p95 * 1e3:7.1f}  {max(times) * 1e3:7.1f}   {told}")


async def count_all(index: Index, count: int) -> None:
    """Measure how long it takes to read the traffic of a day, and of a page of destinations."""
    until = time.time() + 1
    names = [f"ci-{number}" for number in range(20)]
    day = TrafficQuery(step=HOUR, since=until - 86_400, until=until)
    for name, query in {
        "traffic of a day": day,
        "traffic of a day, of 20 destinations": replace(day, by="destination", names=names),
    }.items():
        times = list[float]()
        for _ in range(TRIES):
            began = time.perf_counter()
            await index.traffic(query)
            times.append(time.perf_counter() - began)
        found = await index.traffic(query)
        p50, p95 = quantiles(times, n=20)[9], quantiles(times, n=20)[18]
        print(f"  {name:<58} {p50 * 1e3:7.1f}  {p95 * 1e3:7.1f}  {max(times) * 1e3:7.1f}")
        assert sum([each.total.dead for each in found.values()]) == count // DEAD_EVERY


def repeated(make: Callable[[random.Random, int], str]) -> Callable[[random.Random, int], Iterator[str]]:
    def queries(chosen: random.Random, count: int) -> Iterator[str]:
        for _ in range(TRIES):
            yield make(chosen, count)

    return queries


KINDS: dict[str, Callable[[random.Random, int], Iterator[str]]] = {
    name: repeated(make)
    for name, make in {
        "(nothing: the newest)": lambda _chosen, _count: "",
        "source:github type:push": lambda _chosen, _count: "source:github type:push",
        "type:pull_request.*": lambda _chosen, _count: "type:pull_request.*",
        "id:…": lambda chosen, count: f"id:{event_id('github', str(chosen.randrange(count)))}",
        "identity:…": lambda chosen, count: f"identity:{chosen.randrange(count)}",
        "a commit, as text": lambda chosen, count: f"{chosen.randrange(count) * 2654435761:040x}",
        "body.after:…": lambda chosen, count: f"body.after:{chosen.randrange(count) * 2654435761:040x}",
        "body.repository.full_name:… (1 in 1,000)": lambda chosen, _count: (
            f"body.repository.full_name:acme/shop-{chosen.randrange(REPOSITORIES)}"
        ),
        "a repository and a type that it never has": lambda chosen, _count: (
            f"body.repository.full_name:acme/shop-{chosen.randrange(REPOSITORIES)} type:never"
        ),
        "a repository and a sender that never meet": lambda chosen, _count: (
            f"body.repository.full_name:acme/shop-{chosen.randrange(500) * 2} mona-{chosen.randrange(2000) * 2 + 1}"
        ),
        "words: round totals half even": lambda _chosen, _count: '"round totals half even"',
        "a word that isn't there": lambda chosen, _count: f"absent{chosen.randrange(10**9)}",
        "status:dead": lambda _chosen, _count: "status:dead",
        "status:dead type:push": lambda _chosen, _count: "status:dead type:push",
        "status:dead and a repository": lambda chosen, _count: (
            f"status:dead body.repository.full_name:acme/shop-{chosen.randrange(REPOSITORIES)}"
        ),
        "destination:ci-7": lambda _chosen, _count: "destination:ci-7",
        "status:done type:release.published": lambda _chosen, _count: "status:done type:release.published",
        "status:pending": lambda _chosen, _count: "status:pending",
        "status:unknown": lambda _chosen, _count: "status:unknown",
    }.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="events of the log")
    parser.add_argument("--folder", type=Path, help="where the index is made, and deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gateway-index-", dir=options.folder) as folder:
        garbage.prepare()
        uvloop.run(measure(options.events, Path(folder)))


if __name__ == "__main__":
    main()
