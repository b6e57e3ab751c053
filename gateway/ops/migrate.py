"""Move an embedded log to Kafka, with nobody at work on either: what is undone stays undone, what is done stays done.

    source, one partition a topic                     target
    events  0 1 2 3 4 5 6 …  ── in their order ──▶    each in the partition of its key, as `gw_moved` tells
    commits of each group    ── by what was done ──▶  commits of the same groups
    tiers                    ── what isn't done ───▶  the tier that waits for what is left of the delay
    parked, dead             ── what is open ──────▶  the same topics
    dedupe                   ── rows by partition ─▶  the same topic
    control                  ── orders in force ───▶  the same topic, with its offsets as they are there

Every record that is moved says which one of the source it is, so a run that was killed is followed by one that looks
at what is there and goes on. The commits come last, and after everything has been read back and compared: before them a
gateway on the target would begin at the beginning.

Events are moved with those that are done, since a copy that comes later is known by them, and a replay delivers them
again for as long as the topic keeps them. By the target's clock all of them are appended now.
"""

import asyncio
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple
from uuid import uuid4

from gateway.engine import planner
from gateway.engine.control import Control, Order, decode
from gateway.engine.jobs import read_letter
from gateway.engine.progress import WINDOW
from gateway.log.base import Commit, Log, Partition, Record, RecordHeaders, partition_of
from gateway.log.records import (
    SIGHTING,
    decode_delivery,
    decode_sightings,
    encode_sightings,
    sightings_key,
)
from gateway.log.topics import JOBS_GROUP, ROUTER_GROUP, TIERS, Topics
from gateway.model import LogUnavailableError, UndecodableRecordError, UsageError

MOVED = "gw_moved"
"""The record header that names the source, the topic and the offset that a record was moved from."""
PIECE_BYTES = 256 << 10
"""Of records that are appended at once, which keep their order in a partition: they never fill a batch of Kafka's."""
PIECE_RECORDS = 500

Show = Callable[[int, str], None]
Place = tuple[str, int]
"""A record of the source: its topic and offset."""


class Moved(NamedTuple):
    """What became of one topic of the source. `undone` counts its records that somebody is still to see to."""

    topic: str
    records: int
    undone: int


async def migrate(
    source: Log, target: Log, topics: Topics, event_topics: Iterable[str], show: Callable[[int], Show]
) -> Sequence[Moved]:
    """Move all that matters; `show` is told how many records there are, and returns what is told how far it is.

    Raises UsageError where one of the logs isn't fit for it, and LogUnavailableError where another run has to go on.
    """
    return await _Migration(source, target, topics).run(event_topics, show)


@dataclass(slots=True)
class _Copies:
    """The records of one source topic that are in the target: offsets there ascend, each with its place here."""

    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    topics: list[str] = field(default_factory=list)
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    places: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, record: Record, topic: str, number: int = -1, place: int = -1) -> int:
        """Note a record, and where it is if it is there already; return its index."""
        self.offsets.append(record.offset)
        self.digests.append(_digest(record.key, record.value, record.headers))
        self.topics.append(topic)
        self.numbers.append(number)
        self.places.append(place)
        return len(self.offsets) - 1

    def index(self, offset: int) -> int | None:
        index = bisect_left(self.offsets, offset)
        return index if index < len(self.offsets) and self.offsets[index] == offset else None

    def ends(self, below: int, partitions: Iterable[int]) -> dict[int, int]:
        """Return of each partition the offset after the last record that was moved from below an offset."""
        ends = dict.fromkeys(partitions, 0)
        for index in range(bisect_left(self.offsets, below)):
            ends[self.numbers[index]] = self.places[index] + 1
        return ends


@dataclass(slots=True)
class _Found:
    """What an earlier run has left in one partition of a topic that keeps its order: offsets there → offsets here.

    All up to `taken` has been looked at.
    """

    origins: "array[int]" = field(default_factory=lambda: array("q"))
    places: "array[int]" = field(default_factory=lambda: array("q"))
    taken: int = 0


class _Migration:
    def __init__(self, source: Log, target: Log, topics: Topics) -> None:
        self._source = source
        self._target = target
        self._topics = topics
        self._router = topics.group(ROUTER_GROUP)
        self._tiers = {topics.retry(tier): tier for tier in TIERS}
        self._id = b""
        self._copies: dict[str, _Copies] = defaultdict(_Copies)
        self._found: dict[Partition, _Found] = {}
        self._anywhere: dict[Place, tuple[Partition, int]] = {}
        self._partitions: dict[str, int] = {}
        # Each with the topics that it comes from and goes to, and its index among the copies of the former.
        self._piece: list[tuple[Record, str, str, int]] = []
        self._piece_bytes = 0
        self._done = 0
        self._show: Show

    async def run(self, event_topics: Iterable[str], show: Callable[[int], Show]) -> Sequence[Moved]:
        events = await self._events(event_topics)
        await self._prepare(events)
        names = [topic for topic in self._partitions if topic != self._topics.control]
        bounds = {topic: await self._source.bounds(topic) for topic in names}
        there = sum([end - start for each in bounds.values() for start, end in each.values()])
        self._show = show(2 * there)
        await self._look(names, ordered=[*events, self._topics.dead])
        control = await self._control()
        moved = [await self._move_events(topic, await self._groups(topic)) for topic in events]
        moved.append(await self._move_dead(control))
        moved.append(await self._move_parked(control))
        moved += [await self._move_tier(topic, control) for topic in self._tiers]
        moved.append(await self._move_sightings(events))
        moved.append(await self._move_orders(control))
        void = await self._compare(names)
        await self._commit(events, void)
        return moved

    # Before anything is moved.

    async def _events(self, event_topics: Iterable[str]) -> list[str]:
        """Return the topics of events: those of the rules, and those of sources that the rules lost."""
        topics, prefix = self._topics, self._topics.events("")
        own = {spec.name for spec in topics.specs([])}
        known = await self._source.topics()
        committed = await self._source.topics_of(self._router)
        found = {topic for topic in known if topic.startswith(prefix) or topic in committed} - own
        return sorted(found | set(event_topics))

    async def _prepare(self, events: Collection[str]) -> None:
        """See that both logs are fit for it, and give the source a name, once: it tells its records from another's."""
        specs = self._topics.specs(events)
        for spec in specs:
            if len(await self._source.bounds(spec.name)) > 1:
                raise UsageError(f"{spec.name}: expected one partition in the log to move from, got several")
        for group, members in (await self._target.groups(self._topics.prefix)).items():
            if members:
                raise UsageError(f"{group}: expected nobody at work on the log to move to, got {members}")
        await self._target.create(specs)
        problems = [problem for problem in await self._target.check(specs) if problem.is_fatal]
        if problems:
            raise UsageError("\n".join([f"{problem.topic}: {problem.message}" for problem in problems]))
        for spec in specs:
            self._partitions[spec.name] = len(await self._target.bounds(spec.name))
        prefix = self._topics.group("moved/")
        given = sorted(await self._source.groups(prefix))
        if not given:
            given = [f"{prefix}{uuid4().hex[:12]}"]
            await self._source.seed(given[0], {Partition(self._topics.control, 0): Commit(0)})
        self._id = given[0].removeprefix(prefix).encode()

    async def _look(self, names: Iterable[str], ordered: Collection[str]) -> None:
        """Read what an earlier run has moved already. Raises UsageError where anybody else has written."""
        for topic in names:
            for number, (start, end) in (await self._target.bounds(topic)).items():
                partition = Partition(topic, number)
                found = self._found[partition] = _Found()
                async for records in self._target.scan(partition, start, end):
                    for record in records:
                        place = self._origin(record)
                        if place is None:
                            raise UsageError(
                                f"{topic}/{number}@{record.offset}: expected nothing but what was moved from this log, "
                                "got another record; another --topic-prefix has topics of its own"
                            )
                        if topic in ordered:
                            found.origins.append(place[1])
                            found.places.append(record.offset)
                        else:
                            self._anywhere.setdefault(place, (partition, record.offset))

    def _origin(self, record: Record) -> Place | None:
        told = dict(record.headers).get(MOVED, b"").split(b" ")
        if len(told) != 3 or told[0] != self._id:  # noqa: PLR2004 - its three parts
            return None
        return told[1].decode(), int(told[2])

    async def _control(self) -> Control:
        control = Control()
        async for record in self._records(self._topics.control):
            try:
                control.apply(decode(record.key, record.value))
            except UndecodableRecordError:
                continue  # no process obeys it
        return control

    async def _groups(self, topic: str) -> Mapping[str, Commit]:
        """Return the groups that read a topic of events, with what they have committed."""
        jobs, moved = self._topics.group(JOBS_GROUP), self._topics.group("moved/")
        names = [
            name
            for name in await self._source.groups(self._topics.prefix)
            if name != jobs and not name.startswith(moved)
        ]
        found = {name: (await self._source.committed(name, topic)).get(0) for name in names}
        return {name: commit for name, commit in found.items() if commit is not None}

    # Moving.

    async def _move_events(self, topic: str, groups: Mapping[str, Commit]) -> Moved:
        undone = 0
        async for record in self._records(topic):
            undone += not groups or not all(commit.covers(record.offset) for commit in groups.values())
            await self._keep_order(topic, record)
        await self._append()
        return self._moved(topic, undone)

    async def _move_dead(self, control: Control) -> Moved:
        topic = self._topics.dead
        async for record in self._records(topic):
            letter, _ = read_letter(record)
            if control.settled(letter, Partition(topic, 0), record.offset) is None:
                await self._keep_order(topic, record)
        await self._append()
        return self._moved(topic)

    async def _move_parked(self, control: Control) -> Moved:
        topic = self._topics.parked
        async for record in self._records(topic):
            try:
                by = decode_delivery(record).note.get("by", "")
            except UndecodableRecordError:
                by = ""
            # What a resumption has scanned goes on elsewhere.
            if not control.has_scanned(f"pause/{by}", Partition(topic, 0), record.offset):
                await self._keep(topic, topic, record)
        await self._append()
        return self._moved(topic)

    async def _move_tier(self, topic: str, control: Control) -> Moved:
        partition = Partition(topic, 0)
        commit = (await self._source.committed(self._router, topic)).get(0, Commit(0))
        async for record in self._records(topic):
            if commit.covers(record.offset):
                continue
            tier: str | None = None
            try:
                delivery = decode_delivery(record).delivery
            except UndecodableRecordError:
                pass  # the router keeps it among the dead
            else:
                if control.is_kicked(delivery.route, delivery.destination, partition, record.offset):
                    continue  # it was injected anew
                tier = planner.plan(delivery.due, self._target.now())
            await self._keep(topic, self._topics.retry(tier or planner.SHORTEST), record)
        await self._append()
        return self._moved(topic)

    async def _move_sightings(self, events: Iterable[str]) -> Moved:
        """Move what was seen of identities, each row to the partition in which its event is now."""
        topic, moved = self._topics.dedupe, 0
        by_key = {sightings_key(Partition(name, 0)): name for name in events}
        async for record in self._records(topic):
            name = by_key.get(record.key)
            try:
                sighted = decode_sightings(record)
            except UndecodableRecordError:
                continue
            if name is None:
                continue
            copies = self._copies[name]
            rows: dict[int, bytearray] = defaultdict(bytearray)
            for identity, content, offset, at in SIGHTING.iter_unpack(sighted.rows):
                index = copies.index(offset)
                if index is not None:  # else retention has taken the event, and the window is over
                    rows[copies.numbers[index]] += SIGHTING.pack(identity, content, copies.places[index], at)
            headers = encode_sightings(sighted.source, sighted.origin)
            for number, of_partition in sorted(rows.items()):
                # One record becomes several, each told by the partition that it is about.
                place = f"{topic}:{name}/{number}", record.offset
                if place not in self._anywhere:
                    key = sightings_key(Partition(name, number))
                    await self._store(topic, key, bytes(of_partition), headers, place)
                moved += 1
        return Moved(topic, moved, 0)

    async def _move_orders(self, control: Control) -> Moved:
        """Give the orders in force again. What has ended isn't needed: what it was about wasn't moved."""
        topic = self._topics.control
        there = Control()
        for number, (start, end) in (await self._target.bounds(topic)).items():
            async for records in self._target.scan(Partition(topic, number), start, end):
                for record in records:
                    there.apply(decode(record.key, record.value))
        count = 0
        for order in control.orders.values():
            moved = await self._order(order, control)
            for each in moved:
                present = there.orders.get(each.key)
                if each.kind == "marker" or present != each:
                    key, value = each.encode()
                    await self._target.append(topic, key=key, value=value, headers=[])
            count += bool(moved)
        return Moved(topic, count, count)

    async def _order(self, order: Order, control: Control) -> list[Order]:
        """Return what is to be said of an order in the target."""
        match order.kind:
            case "pause":
                return [order]
            case "kick":
                return [order] if order.state == "asked" else []
            case "dead" if order.state == "asked":
                # A letter's time is that of its append, which is another one now.
                which = order.filter
                if which.since is not None or which.until is not None:
                    which = replace(which, since=None, until=None, ids=await self._letters(order, control))
                return [replace(order, filter=which, marker=self._translated(order.marker))]
            case "replay" if order.state == "asked" and order.selection is not None:
                starts = self._translated(order.selection.starts)
                selection = replace(order.selection, since=0.0, until=None, starts=starts)
                moved = [replace(order, selection=selection, marker=self._translated(order.marker))]
                if reached := control.marker(order.key):
                    at, injected = order.at, control.injected(order.key)
                    marker = self._translated(reached)
                    moved.append(
                        Order(kind="marker", name=order.key, state="done", at=at, marker=marker, count=injected)
                    )
                return moved
            case _:
                return []

    async def _letters(self, order: Order, control: Control) -> tuple[str, ...]:
        """Return the deliveries whose open dead letters an order is for; of one that has none, a name that none has."""
        partition = Partition(self._topics.dead, 0)
        found: dict[str, None] = {}
        async for record in self._records(partition.topic, is_counted=False):
            letter, _ = read_letter(record)
            is_meant = order.is_for(letter) and order.is_before_marker(partition, record.offset)
            if is_meant and control.settled(letter, partition, record.offset) is None:
                found[letter.id] = None
        return tuple(found) or ("none",)

    def _translated(self, marker: Mapping[str, int]) -> dict[str, int]:
        """Return the same place in the target: "topic/partition" → offset there."""
        translated: dict[str, int] = {}
        for place, offset in marker.items():
            topic = place.rpartition("/")[0]
            ends = self._copies[topic].ends(offset, range(self._partitions.get(topic, 0)))
            translated |= {f"{topic}/{number}": end for number, end in ends.items()}
        return translated

    async def _records(self, topic: str, *, is_counted: bool = True) -> AsyncIterator[Record]:
        for number, (start, end) in (await self._source.bounds(topic)).items():
            async for records in self._source.scan(Partition(topic, number), start, end):
                for record in records:
                    yield record
                if is_counted:
                    self._done += len(records)
                    self._show(self._done, f"moving {topic}")

    async def _keep_order(self, topic: str, record: Record) -> None:
        """Move a record behind those of its partition that were moved before it.

        Where an append of an earlier run has failed, and those behind it haven't, these don't count: they come again.
        """
        partition = Partition(topic, partition_of(record.key, self._partitions[topic]))
        found = self._found[partition]
        if found.taken < len(found.origins):
            try:
                found.taken = found.origins.index(record.offset, found.taken)
            except ValueError:
                found.taken = len(found.origins)
            else:
                self._copies[topic].add(record, topic, partition.number, found.places[found.taken])
                found.taken += 1
                return
        await self._add(topic, record, topic)

    async def _keep(self, origin: str, topic: str, record: Record) -> None:
        """Move a record from one topic to another, if none of the target is that one."""
        there = self._anywhere.get((origin, record.offset))
        if there is None:
            await self._add(origin, record, topic)
        else:
            partition, offset = there
            self._copies[origin].add(record, partition.topic, partition.number, offset)

    async def _add(self, origin: str, record: Record, topic: str) -> None:
        size = len(record.value) + sum([len(name) + len(text) for name, text in record.headers])
        if self._piece and (self._piece_bytes + size > PIECE_BYTES or len(self._piece) == PIECE_RECORDS):
            await self._append()
        # Noted at once: offsets ascend, also where the next record is there already.
        self._piece.append((record, origin, topic, self._copies[origin].add(record, topic)))
        self._piece_bytes += size

    async def _append(self) -> None:
        """Append what is gathered, all at once and in its order."""
        piece, self._piece, self._piece_bytes = self._piece, [], 0
        appends = [
            self._target.append(
                topic,
                key=record.key,
                value=record.value,
                headers=[*record.headers, (MOVED, self._told((origin, record.offset)))],
            )
            for record, origin, topic, _ in piece
        ]
        results = await asyncio.gather(*appends, return_exceptions=True)
        for (_, origin, _, index), result in zip(piece, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            copies = self._copies[origin]
            copies.numbers[index], copies.places[index] = result.partition, result.offset

    async def _store(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders, place: Place) -> None:
        await self._target.append(topic, key=key, value=value, headers=[*headers, (MOVED, self._told(place))])

    def _told(self, place: Place) -> bytes:
        return b"%b %b %d" % (self._id, place[0].encode(), place[1])

    def _moved(self, topic: str, undone: int | None = None) -> Moved:
        count = len(self._copies[topic].offsets)
        return Moved(topic, count, count if undone is None else undone)

    # After everything is moved.

    async def _compare(self, names: Iterable[str]) -> Mapping[Partition, Sequence[int]]:
        """Read back what was moved, and compare it; return the offsets of what counts for nothing.

        Raises LogUnavailableError where a record is missing or isn't the same.
        """
        void: dict[Partition, list[int]] = defaultdict(list)
        seen: dict[str, int] = defaultdict(int)
        for topic in names:
            if topic == self._topics.dedupe:
                continue  # it says nothing that an event must be delivered for
            for number, (start, end) in (await self._target.bounds(topic)).items():
                async for records in self._target.scan(Partition(topic, number), start, end):
                    for record in records:
                        origin = self._compared(Partition(topic, number), record)
                        if origin is None:
                            void[Partition(topic, number)].append(record.offset)
                        else:
                            seen[origin] += 1
                    self._done += len(records)
                    self._show(self._done, f"comparing {topic}")
        for topic, copies in self._copies.items():
            if seen[topic] != len(copies.offsets):
                raise LogUnavailableError(f"{topic}: expected {len(copies.offsets)} records moved, found {seen[topic]}")
        return void

    def _compared(self, partition: Partition, record: Record) -> str | None:
        """Return the topic that a record was moved from; None if it is the second copy of one, or behind a gap."""
        place = self._origin(record)
        if place is None:
            where = f"{partition.topic}/{partition.number}@{record.offset}"
            raise UsageError(f"{where}: expected nobody else to write meanwhile, got another record")
        topic, offset = place
        copies = self._copies[topic]
        index = copies.index(offset)
        if index is None or (copies.topics[index], copies.numbers[index], copies.places[index]) != (
            partition.topic,
            partition.number,
            record.offset,
        ):
            return None
        headers = [(name, text) for name, text in record.headers if name != MOVED]
        if _digest(record.key, record.value, headers) != copies.digests[index]:
            raise LogUnavailableError(f"{topic}@{offset}: expected the same record moved, got another one")
        return topic

    async def _commit(self, events: Iterable[str], void: Mapping[Partition, Sequence[int]]) -> None:
        """Let each group begin where it was."""
        for topic in events:
            copies, bounds = self._copies[topic], await self._target.bounds(topic)
            for group, commit in (await self._groups(topic)).items():
                undone: dict[int, list[int]] = defaultdict(list)
                for index, offset in enumerate(copies.offsets):
                    if not commit.covers(offset):
                        undone[copies.numbers[index]].append(copies.places[index])
                commits = {
                    Partition(topic, number): _commit_of(undone[number], end, f"{topic}/{number}")
                    for number, (_, end) in bounds.items()
                }
                await self._target.seed(group, commits)
        for partition, offsets in void.items():
            if partition.topic in self._tiers:
                topic, number = partition
                start, end = (await self._target.bounds(topic))[number]
                left = sorted(set(range(start, end)).difference(offsets))
                await self._target.seed(self._router, {partition: _commit_of(left, end, f"{topic}/{number}")})


def _commit_of(undone: Sequence[int], end: int, where: str) -> Commit:
    """Return a commit that covers all of a partition but these offsets, which ascend."""
    if not undone:
        return Commit(end)
    base, waiting = undone[0], set(undone)
    bits = 0
    for offset in range(base, end):
        if offset in waiting:
            continue
        if offset - base >= WINDOW:
            raise UsageError(
                f"{where}@{offset}: expected what is done within {WINDOW} records of the first that isn't, got it "
                "beyond; delete the topics that were moved to, and move again"
            )
        bits |= 1 << (offset - base)
    return Commit(base, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))


def _digest(key: bytes, value: bytes, headers: RecordHeaders) -> int:
    digest = blake2b(b"%d %d " % (len(key), len(value)) + key, digest_size=8)
    digest.update(value)
    for name, text in headers:
        digest.update(f"{len(name)} {len(text)} {name}".encode())
        digest.update(text)
    return int.from_bytes(digest.digest(), "big")
