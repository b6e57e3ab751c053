"""What becomes of deliveries in the moments after a kick has expedited them, as far as the log shows.

    expedited ───▶ done, and no successor ───────────────────────▶ tried: delivered, or dropped
        │          a successor with another attempt ─────────────▶ tried: it failed; dead, if that is a dead letter
        │          a successor without one ──────────────────────▶ waits, and its metadata says why
        └────────▶ none of it yet ───────────────────────────────▶ on its way: in a queue, or under way

Any process may have taken a delivery, and the owner of the jobs sees only the records and commits of the others. So
`tried` is never more than what destinations have seen, and an unknown outcome counts as on its way: also that of a
delivery which is done while its successor may be in a partition that can't be read, in a topic that was recreated
meanwhile, or in a record of a newer version.

A delivery that its route splits has become others, one for each item: it has failed if one of them has, and waits if
one of them does.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Container, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from gateway.engine.control.records import ENDED, LATER, ON_ITS_WAY
from gateway.engine.jobs.log_reader import RECORDS_PER_STEP, records_of
from gateway.log.base import ALL, Commit, Log, Partition, are_of_different_topics
from gateway.log.records import decode_delivery
from gateway.model import (
    Delivery,
    NewerRecordError,
    RecordMetadata,
    UniqueKey,
    UnreadableRecordError,
    result_label,
)

MAX_TRACKED = 10_000
"""Maximum deliveries of a kick that are tracked. With more, the number of those tried is unknown."""
POLL_TIMEOUT = 3.5
"""Maximum seconds after the last one was expedited: for the queue, an attempt, and the commit that shows it."""
POLL_INTERVAL = 0.25
RECORDS_OF_ONE = RECORDS_PER_STEP // 8
"""Records of a topic that are read before other tasks run, as several topics are read at once."""
MIN_EARLIER_RECORDS = 500
"""Minimum number of records re-read per partition: selecting by timestamp alone would miss successors if the brokers'
clocks differ by seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KickOutcome:
    """How many deliveries were tried, and how many were not, by reason: most of these wait.

    Of those that failed, `failed_by_result` counts the last results, `repeated_failures` those that had the same result
    before, and `dead` how many became dead letters. The others that were tried left no record: they are `delivered`,
    which is None if some may have been dropped.
    """

    tried: int
    delivered: int | None
    untried_by_reason: Mapping[str, int]
    failed_by_result: Mapping[str, int] = field(default_factory=dict)
    repeated_failures: Mapping[str, int] = field(default_factory=dict)
    dead: int = 0


_Whole = tuple[str, str, str, float, int, float]


@dataclass(slots=True, kw_only=True)
class _Tracked:
    route: str
    successor: int
    attempts: int
    previous_result: str
    """The result of its last attempt before the kick; "" if there was none."""
    names: set[str] = field(default_factory=set)
    partition_name: str | None = None
    """The partition of its record in the shortest tier, injected or there anyway; None until it is found."""
    offset: int = 0
    untried_because: str = ON_ITS_WAY
    is_tried: bool = False
    failed_with: str = ""
    """The result of its last attempt since, if that failed."""
    is_dead: bool = False
    """Whether that made it a dead letter."""


class KickOutcomes:
    """Tracks the deliveries of one kick or several on plain routes (see `ordered/kick_tally.py` for ordered ones).

    Their successors may be appended to `topics`. `starts` are the ends of these before it began. A partition that
    couldn't be read then is read from `since` on.
    """

    def __init__(
        self,
        log: Log,
        *,
        topics: Collection[str],
        shortest: str,
        dead: str,
        starts: Mapping[str, int],
        since: float,
    ) -> None:
        self.unreadable: Mapping[Partition, str] = {}
        """Why partitions couldn't be read the last time."""
        self._has_newer_records = False
        self._log = log
        self._topics = topics
        self._shortest = shortest
        self._dead = dead
        self._read = dict(starts)
        self._since = since
        self._tracked: dict[UniqueKey, _Tracked] = {}
        self._wholes: dict[_Whole, _Tracked] = {}
        self._topic_ids: dict[str, str] = {}  # as they were before it began
        # The last successor number of records written just before: of a delivery, and of the items of a whole one.
        self._before: dict[UniqueKey, int] = {}
        self._items_before: dict[_Whole, int] = {}

    async def read_earlier(self, starts: Mapping[str, int], sleep: Callable[[float], Awaitable[None]]) -> None:
        """Read what was written from these offsets up to the start. Raises LogUnavailableError.

        A delivery with a successor there waits or is dead, even if its own record isn't committed yet.
        """
        ends, self._read = self._read, {**self._read, **starts}
        await self._read_records(sleep, ends)
        self._read = ends

    def has_newer_successor(self, delivery: Delivery) -> bool:
        """Return whether another record had already continued a delivery, or one of its items if it was split."""
        last = self._before.get(delivery.unique_key, 0)
        if delivery.part is None and self._items_before:
            last = max(last, self._items_before.get(_whole(delivery), 0))
        return delivery.successor < last

    def track(self, name: str, delivery: Delivery, partition_name: str | None = None, offset: int = 0) -> None:
        """Track a delivery for a kicked name.

        `partition_name` and `offset` are given if its record is already in the shortest tier.
        """
        key = delivery.unique_key
        tracked = self._tracked.get(key)
        if tracked is None:
            if len(self._tracked) >= MAX_TRACKED:
                return
            tracked = self._tracked[key] = _Tracked(
                route=delivery.route,
                successor=delivery.successor,
                attempts=len(delivery.attempts),
                previous_result=_last_result(delivery),
                partition_name=partition_name,
                offset=offset,
            )
            if delivery.part is None:
                self._wholes[_whole(delivery)] = tracked
        tracked.names.add(name)

    async def poll(
        self,
        committed: Callable[[], Awaitable[Mapping[str, Commit]]],
        *,
        is_wanted: Callable[[], bool],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """Poll until each has been tried or waits, up to a timeout. Raises LogUnavailableError."""
        until = self._log.now() + POLL_TIMEOUT
        while is_wanted():
            # Before the records: what is done by then has its successor among them.
            commits = await committed()
            await self._read_records(sleep)
            if not self.unreadable and not self._has_newer_records:
                self._observe_commits(commits)
            if self._log.now() >= until or not any(
                each.untried_because == ON_ITS_WAY and not each.is_tried for each in self._tracked.values()
            ):
                return
            await sleep(POLL_INTERVAL)

    def of(self, name: str, count: int, *, dropping: Container[str]) -> KickOutcome | None:
        """Return the outcome of the deliveries that a kick has counted; None if not all of them were tracked.

        `dropping` are the routes that drop deliveries on certain responses, which leaves no record either.
        """
        tracked = [each for each in self._tracked.values() if name in each.names]
        if len(tracked) != count:
            return None
        untried_by_reason = Counter([each.untried_because for each in tracked if not each.is_tried])
        failed = [each for each in tracked if each.is_tried and each.failed_with]
        tried = count - untried_by_reason.total()
        is_certain = not any(each.route in dropping for each in tracked if each.is_tried and not each.failed_with)
        return KickOutcome(
            tried=tried,
            delivered=tried - len(failed) if is_certain else None,
            untried_by_reason=dict(untried_by_reason),
            failed_by_result=dict(Counter([each.failed_with for each in failed])),
            repeated_failures=dict(
                Counter([each.failed_with for each in failed if each.failed_with == each.previous_result])
            ),
            dead=sum(each.is_dead for each in failed),
        )

    async def _read_records(
        self, sleep: Callable[[float], Awaitable[None]], ends: Mapping[str, int] | None = None
    ) -> None:
        """Read new records, or those up to these ends: of all topics at once, since each takes several requests."""
        unreadable: dict[Partition, str] = {}
        try:
            async with asyncio.TaskGroup() as tasks:
                for topic in self._topics:
                    tasks.create_task(self._read_topic(topic, sleep, ends, unreadable), name="kick-outcomes")
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        self.unreadable = unreadable

    async def _read_topic(
        self,
        topic: str,
        sleep: Callable[[float], Awaitable[None]],
        ends: Mapping[str, int] | None,
        unreadable: dict[Partition, str],
    ) -> None:
        scanned = 0
        bounds, reasons = await self._log.readable(topic)
        unreadable |= {Partition(topic, number): reason for number, reason in reasons.items()}
        if self._is_another(topic, bounds, reasons):
            unreadable[Partition(topic, ALL)] = "recreated"
        if newly_readable := [number for number in bounds if ends is None and f"{topic}/{number}" not in self._read]:
            starts = await self._log.offsets_at(topic, self._since, newly_readable)
            self._read |= {
                f"{topic}/{each}": min(at, bounds[each][1] - MIN_EARLIER_RECORDS) for each, at in starts.items()
            }
        for number, (start, after_last) in bounds.items():
            partition = Partition(topic, number)
            partition_name = f"{topic}/{number}"
            end = after_last if ends is None else ends.get(partition_name, 0)
            first = max(start, self._read.get(partition_name, start))
            async with aclosing(records_of(self._log, partition, first, end)) as records:
                async for record in records:
                    scanned += 1
                    if scanned % RECORDS_OF_ONE == 0:
                        await sleep(0)
                    try:
                        stored = decode_delivery(record)
                    except NewerRecordError:
                        self._has_newer_records = True
                        continue
                    except UnreadableRecordError:
                        continue
                    if ends is None:
                        self._observe(stored.delivery, stored.metadata, partition_name, record.offset)
                    else:
                        self._note_earlier(stored.delivery)
            self._read[partition_name] = end

    def _note_earlier(self, delivery: Delivery) -> None:
        key = delivery.unique_key
        self._before[key] = max(delivery.successor, self._before.get(key, 0))
        if delivery.part is not None:
            whole = _whole(delivery)
            self._items_before[whole] = max(delivery.successor, self._items_before.get(whole, 0))

    def _is_another(self, topic: str, *found: Collection[int]) -> bool:
        """Return whether a topic was deleted since it was read first, and perhaps recreated."""
        topic_id = self._log.topic_id(topic)
        if are_of_different_topics(self._topic_ids.setdefault(topic, topic_id), topic_id):
            return True
        return not any(found) and any(partition_name.rpartition("/")[0] == topic for partition_name in self._read)

    def _observe(self, delivery: Delivery, metadata: RecordMetadata, partition_name: str, offset: int) -> None:
        tracked = self._tracked.get(delivery.unique_key)
        attempts = 0 if tracked is None else tracked.attempts
        if tracked is None and delivery.part is not None:
            tracked = self._wholes.get(_whole(delivery))
        if tracked is None or delivery.successor <= tracked.successor:
            return
        topic = partition_name.rpartition("/")[0]
        if topic == self._shortest and metadata.is_expedited and tracked.partition_name is None:
            tracked.partition_name, tracked.offset = partition_name, offset
        elif len(delivery.attempts) > attempts:
            tracked.is_tried = True
            tracked.failed_with = _last_result(delivery)
            tracked.is_dead |= topic == self._dead
        else:
            tracked.untried_because = ENDED if topic == self._dead else metadata.spill_reason or LATER

    def _observe_commits(self, commits: Mapping[str, Commit]) -> None:
        for each in self._tracked.values():
            commit = commits.get(each.partition_name or "")
            if each.untried_because == ON_ITS_WAY and commit is not None and commit.covers(each.offset):
                each.is_tried = True


def _whole(delivery: Delivery) -> _Whole:
    """Return what a delivery of an item has in common with the one that it was split from."""
    event = delivery.event
    return event.id, delivery.route, delivery.destination, event.received_at, hash(event.body), delivery.replayed_at


def _last_result(delivery: Delivery) -> str:
    """Return the status that the last attempt got, or the kind of its failure."""
    if not delivery.attempts:
        return ""
    return result_label(delivery.attempts[-1])
