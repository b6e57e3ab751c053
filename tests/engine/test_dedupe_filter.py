"""Dedupe entries through crashes, rebalances, reloads and a log that fails; in virtual time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import CapturingLogger
from typing_extensions import override

from gateway.engine.dedupe.filter import RESTORE_TIMEOUT, SWEEP_EVERY, SWEPT_AT_ONCE, DuplicateFilter, PartitionDedupe
from gateway.engine.dedupe.store import FLUSHED_AT_ONCE, MAX_LAG
from gateway.log.base import (
    LEADER_CLOCK_SKEW,
    Assignment,
    Commit,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicSpec,
    partition_of,
)
from gateway.log.records import decode_event, dedupe_entries_key, encode_dedupe_entries, encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import Event, LogUnavailableError, event_id
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Egress, Rules, Source
from gateway.telemetry.metrics import Metrics
from gateway.verify.schemes import build_verifier
from tests.builders import an_event
from tests.engine.test_undecodable_records import of_version
from tests.engine.test_worker import virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

TOPICS = Topics()
EVENTS = Partition("events", 0)
HOUR = 3600.0
DAY = 24 * HOUR


def rules_of(windows: Mapping[str, float | None]) -> Rules:
    verifier = build_verifier({"scheme": "none"})
    return Rules(
        sources={
            name: Source(name=name, path=f"/in/{name}", verifier=verifier, topic=EVENTS.topic, dedupe=window)
            for name, window in windows.items()
        },
        destinations={},
        routes={},
        egress=Egress(),
        table=RouteTable(()),
        files=(),
    )


class TestLog(MemoryLog):
    """A log whose appends to `gateway.dedupe` can be held up, or fail though they are stored."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(now=now)
        self.gate = asyncio.Event()
        self.gate.set()
        self.forgets_to_answer = 0
        self.fails_to_scan = False
        self.slow = 0.0

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        await asyncio.sleep(self.slow)
        position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
        if topic == TOPICS.dedupe:
            await self.gate.wait()
            if self.forgets_to_answer:
                self.forgets_to_answer -= 1
                raise LogUnavailableError("stored, and no answer")
        return position

    @override
    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        if self.fails_to_scan:
            raise LogUnavailableError("no answer")
        return await super().readable(topic)


@dataclass
class Process:
    """One process of the gateway, as far as duplicates go."""

    duplicates: DuplicateFilter
    metrics: Metrics
    logger: CapturingLogger

    def rebuilt(self) -> list[int]:
        """Return how many identities each rebuild has found."""
        return [call.kwargs["identities"] for call in self.logger.calls if call.args == ("dedupe_rebuilt",)]

    def count(self, source: str = "stripe") -> tuple[float, float, float]:
        """Return how many duplicates, conflicts and undecided events were counted."""
        metrics = self.metrics
        counters = (metrics.duplicates, metrics.dedupe_conflicts, metrics.dedupe_undecided)
        duplicates, conflicts, undecided = [counter.labels(source).value for counter in counters]
        return duplicates, conflicts, undecided

    def gauges(self) -> tuple[float, float]:
        """Return how many identities are known, and of how many partitions that is not known yet."""
        metrics = self.metrics
        return metrics.dedupe_identities.labels("events").value, metrics.dedupe_rebuilding.labels("events").value


@dataclass
class World:
    """A log, and what each process reads of it."""

    log: TestLog = field(default_factory=TestLog)
    rules: Rules = field(default_factory=lambda: rules_of({"stripe": HOUR}))

    async def create(self) -> None:
        await self.log.create([TopicSpec(name="events", partitions=1, retention=None), *TOPICS.specs([])])

    async def put(self, *identities: str | None, source: str = "stripe", body: bytes = b"{}") -> None:
        for identity in identities:
            event = an_event(source=source, id=event_id(source, identity), body=body)
            await self.log.append("events", key=event_key(event), value=event.body, headers=encode_event(event))

    @asynccontextmanager
    async def process(self) -> AsyncIterator[Process]:
        metrics, logger = Metrics(CollectorRegistry()), CapturingLogger()
        duplicates = DuplicateFilter(
            log=self.log, topics=TOPICS, rules=lambda: self.rules, metrics=metrics, logger=logger
        )
        running = asyncio.create_task(duplicates.run())
        try:
            yield Process(duplicates, metrics, logger)
        finally:
            assert not running.done()
            running.cancel()

    def acquire(self, process: Process, base: int = 0) -> PartitionDedupe:
        return process.duplicates.acquire(Assignment(EVENTS, Commit(base), 0))

    def events(self, start: int = 0, end: int | None = None) -> list[tuple[Record, Event]]:
        return [(record, decode_event(record)) for record in self.log.records("events")[start:end]]

    async def read(self, reader: PartitionDedupe, start: int = 0, end: int | None = None) -> list[bool]:
        """Return of each event whether it is a duplicate."""
        events = self.events(start, end)
        await reader.ready(events[0][0])
        return [reader.is_duplicate(record, event) for record, event in events]

    def stored(self) -> int:
        """Return how many dedupe entries `gateway.dedupe` has."""
        return sum([len(record.value) // 40 for record in self.log.records(TOPICS.dedupe)])


@asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    world = World()
    await world.create()
    yield world


def test_duplicates_are_distinguished_from_originals_and_counted() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a", "b", "a", "a", "b", "c")
            assert await world.read(world.acquire(process)) == [False, False, True, True, True, False]
            assert process.count() == (3, 0, 0)

    run(scenario())


def test_an_event_of_the_same_identity_and_other_content_is_passed_and_counted() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a")
            await world.put("a", body=b"other")
            first, _ = world.events()
            retyped = replace(first[1], type="another")
            asked = replace(first[1], query="another=1")
            reader = world.acquire(process)
            assert await world.read(reader) == [False, False]
            assert not reader.is_duplicate(first[0]._replace(offset=2), retyped)
            assert not reader.is_duplicate(first[0]._replace(offset=3), asked)
            assert process.count() == (0, 3, 0)

    run(scenario())


def test_nothing_is_a_duplicate_without_an_identity_a_window_or_a_source() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            world.rules = rules_of({"stripe": HOUR, "github": None})
            await world.put(None, None)
            await world.put("a", "a", source="github")
            await world.put("a", "a", source="gone")
            record, event = world.events()[0]
            reader = world.acquire(process)
            assert await world.read(reader) == [False] * 6
            assert not reader.is_duplicate(record._replace(offset=9), event)  # that very id, once more
            await reader.flush()
            assert (world.stored(), process.count()) == (0, (0, 0, 0))

    run(scenario())


def test_the_original_of_a_duplicate_is_logged_once_a_second() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a", "b", "a", "a", "b")
            reader = world.acquire(process)
            await world.read(reader)
            told = [call.kwargs for call in process.logger.calls if call.args == ("event_duplicate",)]
            (record, event), identity = world.events()[2], event_id("stripe", "a")
            position, duplicate_of = f"events/0@{record.offset}", "events/0@0"
            first = {
                "source": "stripe",
                "event_id": identity,
                "position": position,
                "duplicate_of": duplicate_of,
                "count": 1,
            }
            assert told == [first]
            await asyncio.sleep(2)
            assert reader.is_duplicate(record, event)
            assert process.logger.calls[-1].kwargs == first | {"count": 3}

    run(scenario())


def test_a_new_owner_knows_the_entries_stored_before_a_commit() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "b", "a")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            await world.put("b", "a", "c")
            async with world.process() as second:
                assert await world.read(world.acquire(second, base=3), start=3) == [True, True, False]
                assert second.count() == (2, 0, 0)

    run(scenario())


def test_events_of_which_a_newer_version_may_have_stored_the_entry_are_undecided() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a")
            async with world.process() as newer:
                reader = world.acquire(newer)
                await world.read(reader)
                await reader.flush()
            world.log.rewrite(TOPICS.dedupe, lambda record: record._replace(headers=of_version(record.headers)))
            await world.put("a", "b", "b")
            async with world.process() as older:
                began, reader = now(), world.acquire(older, base=1)
                assert await world.read(reader, start=1) == [False, False, True]
                assert now() - began < RESTORE_TIMEOUT, "nothing is waited for"
                assert older.count() == (1, 0, 2)
                await asyncio.sleep(HOUR + 2 * LEADER_CLOCK_SKEW)
                await world.put("a")
                assert await world.read(reader, start=4) == [False]
                assert older.count() == (1, 0, 2), "its entry is out of the window"

    run(scenario())


def test_an_event_reread_after_a_crash_before_the_flush_is_passed() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "b")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader, end=1)
                await reader.flush()  # for a commit of the first record
                await world.read(reader, start=1)
            await world.put("a", "b")
            async with world.process() as second:
                assert await world.read(world.acquire(second, base=1), start=1) == [False, True, True]

    run(scenario())


def test_an_event_flushed_but_uncommitted_is_reread_and_passed() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "a")
            for _ in range(3):
                async with world.process() as process:
                    reader = world.acquire(process)
                    assert await world.read(reader) == [False, True]
                    await reader.flush()

    run(scenario())


def test_a_failed_flush_is_repeated_by_the_next() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a", "b")
            reader = world.acquire(process)
            await world.read(reader)
            world.log.fail_appends(2)
            for _ in range(2):
                with pytest.raises(LogUnavailableError):
                    await reader.flush()
            assert world.stored() == 0
            await reader.flush()
            await reader.flush()
            assert world.stored() == 2

    run(scenario())


def test_a_flush_that_was_stored_though_it_failed_does_no_harm() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "b")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                world.log.forgets_to_answer = 1
                with pytest.raises(LogUnavailableError):
                    await reader.flush()
                await reader.flush()
                assert world.stored() == 4
            await world.put("a", "c")
            async with world.process() as second:
                # The first two are unfinished, as nothing was committed.
                assert await world.read(world.acquire(second)) == [False, False, True, False]

    run(scenario())


def test_flushes_at_the_same_time_store_everything() -> None:
    """And none returns before what another one has begun to store is stored, or a commit could cover too much."""

    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a", "b", "c")
            reader = world.acquire(process)
            world.log.gate.clear()
            flushes = []
            for number in range(3):
                await world.read(reader, number, number + 1)
                flushes.append(asyncio.create_task(reader.flush()))
                await asyncio.sleep(0.1)
            assert not any(flush.done() for flush in flushes)
            world.log.gate.set()
            await asyncio.gather(*flushes)
            assert world.stored() == 3

    run(scenario())


def test_many_entries_are_stored_in_records_of_bounded_size() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a")
            ((record, event),) = world.events()
            reader = world.acquire(process)
            many = FLUSHED_AT_ONCE + 1000
            for offset in range(many):
                reader.is_duplicate(record._replace(offset=offset), replace(event, id=event_id("stripe", str(offset))))
            await reader.flush()
            sizes = [len(record.value) // 40 for record in world.log.records(TOPICS.dedupe)]
            assert sizes == [FLUSHED_AT_ONCE, 1000]
        async with world.process() as second:
            reader = world.acquire(second, base=many)
            assert await reader.ready(record)
            copy = record._replace(offset=many)
            assert reader.is_duplicate(copy, replace(event, id=event_id("stripe", str(many - 1))))

    run(scenario())


def test_a_returning_partition_has_its_interim_owners_entries() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as one, world.process() as two:
            reader = world.acquire(one)
            for number, identity in enumerate("ab"):
                await world.put(identity)
                await world.read(reader, start=number)
                await reader.flush()
                await asyncio.sleep(HOUR / 4)
            await world.put("c", "c")
            other = world.acquire(two, base=2)
            assert await world.read(other, start=2) == [False, True]
            await other.flush()
            other.release()
            await world.put("b", "c", "d")
            again = world.acquire(one, base=4)
            reader.release()
            assert await world.read(again, start=4) == [True, True, False]
            assert one.count() == (2, 0, 0)
            assert one.rebuilt() == [2]  # without the first, which was known

    run(scenario())


def test_a_partition_that_returns_at_once_keeps_unstored_entries() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a")
            reader = world.acquire(process)
            await world.read(reader)
            again = world.acquire(process)
            reader.release()
            await world.put("a")
            assert await world.read(again, start=1) == [True]
            await again.flush()
            assert world.stored() == 1

    run(scenario())


def test_a_lost_partitions_entries_are_freed_and_not_stored() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a", "b")
            reader = world.acquire(process)
            await world.read(reader)
            reader.release()
            await reader.flush()
            await asyncio.sleep(1.5)
            assert (world.stored(), process.gauges()) == (0, (0, 0))

    run(scenario())


def test_a_reader_hours_behind_another_passes_duplicates_and_has_nothing_read() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a", "a")
            await asyncio.sleep(HOUR + MAX_LAG + 1)
            await world.put("b", "b")
            ahead, behind = world.acquire(process), world.acquire(process)
            assert await world.read(ahead) == [False, True, False, True]
            await asyncio.sleep(1.5)
            assert not await behind.ready(world.events()[0][0])
            world.log.fails_to_scan = True
            assert await world.read(behind) == [False, False, False, True]
            await asyncio.sleep(1.5)
            assert process.gauges() == (1, 0)

    run(scenario())


def test_sources_that_share_a_topic_have_their_own_windows() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            world.rules = rules_of({"short": 1.0, "long": DAY})
            reader = world.acquire(process)
            for _ in range(3):
                await world.put("a", source="short")
                await world.put("a", source="long")
                await asyncio.sleep(2.0)
            assert await world.read(reader) == [False, False, False, True, False, True]

    run(scenario())


def test_a_reader_that_begins_behind_another_has_that_read_which_was_forgotten() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            router = world.acquire(process)
            await world.put("a")
            await world.put("b", "a")
            await world.read(router)
            await router.flush()
            await asyncio.sleep(HOUR + 60)
            await world.put("c")
            await world.read(router, start=3)
            await asyncio.sleep(600)
            assert process.gauges()[0] == 1
            behind = world.acquire(process, base=1)
            assert await world.read(behind, start=1) == [False, True, False]

    run(scenario())


def test_done_records_after_the_first_are_known_though_none_below_is_committed() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "b")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            await world.put("b")
            async with world.process() as second:
                reader = second.duplicates.acquire(Assignment(EVENTS, Commit(0, b"\2"), 0))
                (unfinished, _, copy) = world.events()
                assert await reader.ready(unfinished[0])
                assert [reader.is_duplicate(*event) for event in (unfinished, copy)] == [False, True]

    run(scenario())


def test_a_window_that_a_reload_makes_longer_is_read_from_the_log() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "b")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            await asyncio.sleep(3 * HOUR)
            await world.put("c", "a", "b")
            async with world.process() as second:
                reader = world.acquire(second, base=2)
                assert await world.read(reader, start=2, end=3) == [False]
                await asyncio.sleep(1.5)
                world.rules = rules_of({"stripe": DAY})
                (undecided,) = world.events(3, 4)
                assert not reader.is_duplicate(*undecided)
                await asyncio.sleep(1.0)
                assert await world.read(reader, start=4) == [True]
                assert second.count() == (1, 0, 1)

    run(scenario())


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_window_that_is_made_longer_is_read_though_another_sources_is_longer_still(*, is_stored: bool) -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            world.rules = rules_of({"stripe": HOUR, "other": 7 * DAY})
            await world.put("a", "b")
            reader = world.acquire(process)
            await world.read(reader)
            if is_stored:
                await reader.flush()
            await asyncio.sleep(3 * HOUR)
            await world.put("c")
            await world.read(reader, start=2)
            await asyncio.sleep(600)  # swept
            await world.put("a", "b")
            world.rules = rules_of({"stripe": DAY, "other": 7 * DAY})
            process.duplicates.reload()
            (undecided,) = world.events(3, 4)
            if is_stored:
                assert not reader.is_duplicate(*undecided)
                assert process.count() == (0, 0, 1)
            await asyncio.sleep(1)
            assert await world.read(reader, start=4) == [True]
            await asyncio.sleep(600)
            assert process.gauges()[1] == 0
            assert len(process.rebuilt()) == 1

    run(scenario())


def test_a_window_that_a_reload_leaves_as_it_is_has_nothing_read() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            world.rules = rules_of({"stripe": HOUR, "other": 7 * DAY})
            await world.put("a")
            reader = world.acquire(process)
            await world.read(reader)
            await asyncio.sleep(10)
            world.rules = rules_of({"stripe": HOUR, "other": DAY, "new": DAY})
            process.duplicates.reload()
            await asyncio.sleep(10)
            assert process.rebuilt() == []

    run(scenario())


def test_a_window_that_a_reload_makes_shorter_counts_at_once() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put("a")
            await asyncio.sleep(10)
            await world.put("a")
            reader = world.acquire(process)
            await world.read(reader, end=1)
            world.rules = rules_of({"stripe": 5.0})
            assert await world.read(reader, start=1) == [False]

    run(scenario())


def test_a_window_that_a_reload_switches_on_knows_nothing_of_before() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            world.rules = rules_of({"stripe": None})
            await world.put("a")
            reader = world.acquire(process)
            await world.read(reader)
            world.rules = rules_of({"stripe": HOUR})
            await world.put("a", "a")
            assert await world.read(reader, start=1) == [False, True]
            world.rules = rules_of({"stripe": None})
            await asyncio.sleep(1.5)
            assert process.gauges() == (0, 0)

    run(scenario())


def test_events_are_passed_and_counted_while_their_past_is_unknown() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            await world.put("a", "b", "b", "a", "c")
            async with world.process() as second:
                world.log.fails_to_scan = True
                reader = world.acquire(second, base=1)
                began = now()
                assert not await reader.ready(world.events(1)[0][0])
                assert now() - began == pytest.approx(RESTORE_TIMEOUT)
                assert not await reader.ready(world.events(1)[0][0])
                assert now() - began == pytest.approx(RESTORE_TIMEOUT)
                assert await world.read(reader, start=1, end=4) == [False, False, True]
                assert (second.count(), second.gauges()) == ((1, 0, 2), (0, 1))
                world.log.fails_to_scan = False
                await asyncio.sleep(5.0)
                assert await world.read(reader, start=4) == [True, False]
                assert (second.count(), second.gauges()) == ((2, 0, 2), (3, 0))  # the duplicate that was passed, too

    run(scenario())


def test_an_owner_hours_behind_knows_the_past_of_its_first_record() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            await world.put("a")
            await asyncio.sleep(30 * HOUR)
            async with world.process() as second:
                assert await world.read(world.acquire(second, base=1), start=1) == [True]
                assert second.count() == (1, 0, 0)

    run(scenario())


def test_an_owner_that_joins_a_read_of_the_log_gets_newer_entries_too() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as one, world.process() as two:
            await world.put("a", "b")
            other = world.acquire(two)
            await world.read(other)
            await other.flush()
            reader = world.acquire(one, base=2)
            store = one.duplicates._stores[EVENTS]
            asked = store.request()
            again = world.acquire(one, base=2)  # it came back while the log was read
            store.mark_read(asked, (), is_known=True)
            assert not store.known.is_set()
            reader.release()
            await world.put("a")
            assert await world.read(again, start=2) == [True]

    run(scenario())


def test_a_recreated_topic_has_no_entries_of_the_former() -> None:
    """Under an owner that goes on, with a new one, and with the one after that."""

    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "b", "c")
            old = world.events()
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
                await asyncio.sleep(60)
                at = world.log.now()
                order = (old[2], old[0])
                events = [
                    (record._replace(offset=offset, appended_at=at), event)
                    for offset, (record, event) in enumerate(order)
                ]
                assert [reader.is_duplicate(*event) for event in events] == [False, False]
            async with world.process() as second:
                reader = world.acquire(second)
                assert [reader.is_duplicate(*event) for event in events] == [False, False]
                await reader.flush()
            async with world.process() as third:
                reader = world.acquire(third, base=2)
                assert await reader.ready(old[0][0]._replace(offset=2, appended_at=at + 1))
                copies = [(record._replace(offset=5, appended_at=at + 1), event) for record, event in old]
                assert [reader.is_duplicate(*copy) for copy in copies] == [True, False, True]

    run(scenario())


def test_records_deleted_by_retention_are_still_known() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a", "b")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            await world.put("a")
            world.log.delete_below(EVENTS, 1)
            async with world.process() as second:
                reader = second.duplicates.acquire(Assignment(EVENTS, Commit(2), 1))
                assert await world.read(reader, start=1) == [True]

    run(scenario())


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (b"x" * 41, encode_dedupe_entries("stripe", 0)),
        (b"x" * 40, [("gw_v", b"2"), ("gw_source", b"stripe"), ("gw_origin", b"0")]),
        (b"x" * 40, [("gw_v", b"1"), ("gw_source", b"stripe")]),
    ],
)
def test_a_record_that_cannot_be_read_is_passed_over(value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a")
            key = dedupe_entries_key(EVENTS)
            await world.log.append(TOPICS.dedupe, key=key, value=value, headers=headers)
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            await world.log.append(TOPICS.dedupe, key=key, value=value, headers=headers)
            await world.put("a")
            async with world.process() as second:
                assert await world.read(world.acquire(second, base=1), start=1) == [True]

    run(scenario())


def test_memory_is_freed_after_the_window_even_without_new_events() -> None:
    async def scenario() -> None:
        async with a_world() as world, world.process() as process:
            await world.put(*[str(number) for number in range(500)])
            reader = world.acquire(process)
            await world.read(reader)
            await asyncio.sleep(HOUR + 1)
            assert process.gauges()[0] == 500
            await world.put("late")
            await world.read(reader, start=500)
            await asyncio.sleep(300)
            assert process.gauges()[0] == 1
            await asyncio.sleep(HOUR + MAX_LAG + 10)
            assert process.gauges()[0] == 0

    run(scenario())


def test_partitions_that_are_assigned_together_are_rebuilt_in_one_scan() -> None:
    async def scenario() -> None:
        async with a_world() as world:
            await world.put("a")
            async with world.process() as first:
                reader = world.acquire(first)
                await world.read(reader)
                await reader.flush()
            async with world.process() as second:
                for number in range(6):
                    second.duplicates.acquire(Assignment(Partition("events", number), Commit(1), 0))
                await asyncio.sleep(1.0)
                assert second.rebuilt() == [1]

    run(scenario())


async def a_log_with_leaderless(*numbers: int) -> World:
    world = World()
    await world.create()
    for number in numbers:
        world.log.lose_leader(Partition(TOPICS.dedupe, number))
    return world


def home_of(partition: Partition) -> int:
    return partition_of(dedupe_entries_key(partition), 6)


@virtual
async def test_a_dedupe_partition_without_a_leader_keeps_nothing_else_from_being_rebuilt() -> None:
    other = next(number for number in range(6) if number != home_of(EVENTS))
    world = await a_log_with_leaderless(other)
    await world.put("a", "a")
    async with world.process() as process:
        world.acquire(process, 1)
        await asyncio.sleep(0.1)
        assert await settled(process) == 0
        assert process.duplicates.unreadable() == {Partition(TOPICS.dedupe, other): "no leader"}
        scanned = len(process.rebuilt())
        await asyncio.sleep(30)
        assert len(process.rebuilt()) == scanned == 1, "what was read isn't read again"
        world.log.find_leader(Partition(TOPICS.dedupe, other))
        await asyncio.sleep(2)
        assert process.duplicates.unreadable() == {}
        assert len(process.rebuilt()) == 2


async def settled(process: Process) -> float:
    await asyncio.sleep(1.1)
    return process.gauges()[1]


@virtual
async def test_entries_in_a_partition_without_a_leader_are_missed_until_it_has_one_and_no_longer() -> None:
    home = Partition(TOPICS.dedupe, home_of(EVENTS))
    world = await a_log_with_leaderless()
    await world.put("a", "a", "b", "a")
    events = world.events()
    async with world.process() as process:
        reader = world.acquire(process)
        assert [reader.is_duplicate(*each) for each in events[:1]] == [False]
        await reader.flush()
    world.log.lose_leader(home)
    async with world.process() as process:
        reader = world.acquire(process, 1)
        assert not await reader.ready(events[1][0])
        assert not reader.is_duplicate(*events[1]), "rather twice than never"
        assert not reader.is_duplicate(*events[2])
        assert process.count() == (0, 0, 2)
        assert process.duplicates.unreadable() == {home: "no leader"}
        assert await settled(process) == 1
        world.log.find_leader(home)
        await asyncio.sleep(2)
        assert await settled(process) == 0
        assert reader.is_duplicate(*events[3])
        assert process.count() == (1, 0, 2)


@virtual
async def test_entries_that_are_not_stored_delay_the_commits_of_their_own_partition_alone() -> None:
    world = await a_log_with_leaderless(home_of(EVENTS))
    other = next(
        partition
        for partition in (Partition("events", number) for number in range(1, 9))
        if home_of(partition) != home_of(EVENTS)
    )
    await world.put("a", "b")
    events = world.events()
    async with world.process() as process:
        stuck, free = world.acquire(process), process.duplicates.acquire(Assignment(other, Commit(0), 0))
        stuck.is_duplicate(*events[0])
        free.is_duplicate(*events[0])
        with pytest.raises(LogUnavailableError):
            await stuck.flush()
        await free.flush()
        world.log.slow = 5.0
        await asyncio.sleep(2)
        began = now()
        stuck.is_duplicate(*events[1])
        with pytest.raises(LogUnavailableError, match="isn't stored yet"):
            await stuck.flush()
        assert now() == began, "an answer is waited for once"
        world.log.slow = 0.0
        await asyncio.sleep(10)
        told = [call.kwargs for call in process.logger.calls if call.args == ("append_retried",)]
        assert told
        assert len(told) <= 11
        assert {each["topic"] for each in told} == {TOPICS.dedupe}
        world.log.find_leader(Partition(TOPICS.dedupe, home_of(EVENTS)))
        await asyncio.sleep(2)
        await stuck.flush()
    assert world.stored() == 3


class CountedSources(dict[str, Source]):
    """Sources that count how often somebody goes through all of them."""

    passes = 0

    @override
    def items(self) -> Any:
        self.passes += 1
        return super().items()


@virtual
async def test_all_sources_are_gone_through_once_for_each_version_of_the_rules() -> None:
    """And not for each partition, every second: of 10,000 sources on one machine, each has its partition."""
    world = World()
    await world.create()
    sources = CountedSources(rules_of({f"s{number}": HOUR for number in range(300)}).sources)
    world.rules = replace(world.rules, sources=sources)
    await world.put("a", source="s7")
    async with world.process() as process:
        readers = [
            process.duplicates.acquire(Assignment(Partition("events", number), Commit(1), 0)) for number in range(50)
        ]
        ((record, event),) = world.events()
        for reader in readers:
            await reader.ready(record)
            reader.is_duplicate(record, event)
        await asyncio.sleep(10)
        assert sources.passes == 1
        former, later = ref(sources), CountedSources(sources)
        world.rules = replace(world.rules, sources=later)
        process.duplicates.reload()
        await asyncio.sleep(10)
        assert (sources.passes, later.passes) == (1, 1)
        del sources
        assert former() is None, "former rules are let go of at once"


@virtual
async def test_a_sweep_of_many_partitions_gives_everything_else_its_turns() -> None:
    world, slept = World(), Counter[float]()
    await world.create()

    async def sleep(seconds: float) -> None:
        slept[seconds] += 1
        await asyncio.sleep(seconds)

    metrics = Metrics(CollectorRegistry())
    duplicates = DuplicateFilter(
        log=world.log, topics=TOPICS, rules=lambda: world.rules, metrics=metrics, logger=CapturingLogger(), sleep=sleep
    )
    count = 5 * SWEPT_AT_ONCE
    for number in range(count):
        duplicates.acquire(Assignment(Partition("events", number), Commit(0), 0))
    running = asyncio.create_task(duplicates.run())
    await asyncio.sleep(1.5 * SWEEP_EVERY)
    running.cancel()
    assert slept == {SWEEP_EVERY: 2, 0: 5}


@virtual
async def test_a_source_that_comes_back_knows_its_past_though_another_was_there_all_the_time() -> None:
    world, both = World(), rules_of({"stripe": HOUR, "other": DAY})
    await world.create()
    world.rules = both
    await world.put("a", "b", "c")
    async with world.process() as process:
        reader = world.acquire(process)
        await world.read(reader)
        await reader.flush()
        world.rules = rules_of({"other": DAY})
        await asyncio.sleep(2)
        assert process.gauges()[0] == 0
        world.rules = both
        await world.put("a", "b", "c", "d")
        assert await world.read(reader, 3, 4) == [False]
        assert process.count() == (0, 0, 1), "its past isn't known yet, and that is counted"
        await asyncio.sleep(1)
        assert await world.read(reader, 4) == [True, True, False]
        assert process.count() == (2, 0, 1)
        assert len(process.rebuilt()) == 1


@virtual
async def test_sources_that_come_back_together_have_their_past_read_in_one_scan() -> None:
    names = [f"s{number}" for number in range(5)]
    world, all_of_them = World(), rules_of({"stripe": HOUR, **dict.fromkeys(names, HOUR)})
    await world.create()
    world.rules = all_of_them
    for name in names:
        await world.put("a", source=name)
    async with world.process() as process:
        reader = world.acquire(process)
        await world.read(reader)
        await reader.flush()
        world.rules = rules_of({"stripe": HOUR})
        process.duplicates.reload()
        await asyncio.sleep(2)
        world.rules = all_of_them
        process.duplicates.reload()
        await asyncio.sleep(2)
        assert len(process.rebuilt()) == 1
        for name in names:  # each seldom sends
            await world.put("a", source=name)
            await asyncio.sleep(2)
        assert await world.read(reader, len(names)) == [True] * len(names)
        assert len(process.rebuilt()) == 1


@virtual
async def test_a_source_that_comes_back_after_its_partition_was_taken_over_knows_its_past() -> None:
    """The new owner read the entries while the source wasn't in the rules."""
    world, both = World(), rules_of({"stripe": HOUR, "other": DAY})
    await world.create()
    world.rules = both
    await world.put("a", "b")
    async with world.process() as first:
        reader = world.acquire(first)
        await world.read(reader)
        await reader.flush()
    world.rules = rules_of({"other": DAY})
    await world.put("x", source="other")
    async with world.process() as second:
        reader = world.acquire(second, base=2)
        assert await world.read(reader, 2) == [False]
        world.rules = both
        await world.put("a", "b")
        assert await world.read(reader, 3, 4) == [False]
        assert second.count() == (0, 0, 1)
        await asyncio.sleep(1)
        assert await world.read(reader, 4) == [True]


@virtual
async def test_entries_that_are_not_stored_yet_come_back_with_their_source() -> None:
    world, both = World(), rules_of({"stripe": HOUR, "other": DAY})
    await world.create()
    world.rules = both
    await world.put("a", "b", "a")
    async with world.process() as process:
        reader = world.acquire(process)
        await world.read(reader, 0, 2)
        world.rules = rules_of({"other": DAY})
        await asyncio.sleep(2)
        world.rules = both
        assert await world.read(reader, 2) == [True]


@virtual
async def test_a_source_that_is_new_has_nothing_read_for_it() -> None:
    world = World()
    await world.create()
    await world.put("a", "b", "b")
    async with world.process() as process:
        world.rules = rules_of({"other": DAY})
        reader = world.acquire(process)
        await world.read(reader, 0, 1)
        await asyncio.sleep(2)
        world.rules = rules_of({"stripe": HOUR, "other": DAY})
        assert await world.read(reader, 1) == [False, True]
        await asyncio.sleep(2)
        assert process.rebuilt() == []


@virtual
async def test_a_source_that_has_moved_to_another_topic_has_nothing_read_for_its_events_in_the_former() -> None:
    world = World()
    await world.create()
    world.rules = rules_of({"stripe": HOUR, "other": DAY})
    await world.put(*[str(number) for number in range(10)])
    async with world.process() as process:
        reader = world.acquire(process)
        await world.read(reader, 0, 1)
        await reader.flush()
        moved = replace(world.rules.sources["stripe"], topic="elsewhere")
        world.rules = replace(world.rules, sources={**world.rules.sources, "stripe": moved})
        for number in range(1, 10):
            await asyncio.sleep(1)
            await world.read(reader, number, number + 1)
        assert process.rebuilt() == []
