"""Move an embedded log to Kafka, with nobody at work on either: what is unfinished stays so, what is done stays done.

    source, one partition a topic                     target
    events  0 1 2 3 4 5 6 …  ── in their order ──▶    each in the partition of its key, as `gw_moved` tells
    ordered routes' topics   ── in their order ──▶    the same
    commits of each group    ── by what was done ──▶  commits of the same groups
    tiers                    ── what isn't done ───▶  the tier that waits for what is left of the delay
    parked, dead             ── what is open ──────▶  the same topics
    dedupe                   ── rows by partition ─▶  the same topic
    control                  ── orders in force ───▶  the same topic, with its offsets as they are there

Every record that is moved says which one of the source it is, so a run that was killed is followed by one that looks
at what is there and goes on. The commits come last, and after everything has been read back and compared: before them a
gateway on the target would begin at the beginning. A commit never covers what came after the comparison.

A commit that is there stands. So where there is any, nothing is appended any more, and all of them must be those that
this run computes: else a gateway has been started there, or the old one has gone on after a move that was complete.

Events are moved with those that are done, since a copy that comes later is known by them, and a replay delivers them
again for as long as the topic keeps them. By the target's clock all of them are appended now.
"""

import asyncio
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple
from uuid import uuid4

from gateway.engine import tiers
from gateway.engine.commit_progress import WINDOW
from gateway.engine.control.records import Order
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import read_letter
from gateway.engine.ordered.duplicate_appends import ROW, Furthest, Seen, note_of
from gateway.log.base import COMMIT_BYTES, Commit, Log, Partition, Record, RecordHeaders, partition_of
from gateway.log.records import (
    SIGHTING,
    decode_delivery,
    decode_sightings,
    encode_sightings,
    origin_of,
    sightings_key,
    without_origin,
)
from gateway.log.topics import JOBS_GROUP, ROUTER_GROUP, TIERS, Topics
from gateway.model import LogUnavailableError, UndecodableRecordError, UnreadableRecordError, UsageError

MOVED = "gw_moved"
"""The record header that names the source, the topic and the offset that a record was moved from."""
PIECE_BYTES = 256 << 10
"""Of records that are appended at once, which keep their order in a partition: they never fill a batch of Kafka's."""
PIECE_RECORDS = 500

Show = Callable[[int, str], None]
Pair = tuple[str, str]
"""An ordered route and one of its destinations."""
Place = tuple[str, int]
"""A record of the source: its topic and offset."""
Commits = Mapping[tuple[str, str], Mapping[int, Commit]]
"""Of each group and topic what is committed, by the number of the partition."""


class Moved(NamedTuple):
    """What became of one topic. `unfinished` counts the source's records that somebody is still to see to.

    `twice` counts those of the target that are second copies, and that no commit calls done.
    """

    topic: str
    records: int
    unfinished: int
    twice: int = 0


class Migrated(NamedTuple):
    """What became of each topic, and which topics of the source have records and another prefix, and weren't moved."""

    topics: Sequence[Moved]
    left: Sequence[str]


async def migrate(
    source: Log,
    target: Log,
    topics: Topics,
    event_topics: Iterable[str],
    show: Callable[[int], Show],
    *,
    ordered: Iterable[Pair] = (),
) -> Migrated:
    """Move all that matters; `show` is told how many records there are, and returns what is told how far it is.

    Raises UsageError where one of the logs isn't fit for it, and LogUnavailableError where another run has to go on.
    """
    return await _Migration(source, target, topics).run(event_topics, ordered, show)


@dataclass(slots=True)
class _Copies:
    """The records of one source topic that are in the target: offsets there ascend, each with its offset here."""

    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    topics: list[str] = field(default_factory=list)
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    moved_to: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, record: Record, topic: str, number: int = -1, place: int = -1) -> int:
        """Note a record, and where it is if it is there already; return its index."""
        self.offsets.append(record.offset)
        self.digests.append(_digest(record.key, record.value, record.headers))
        self.topics.append(topic)
        self.numbers.append(number)
        self.moved_to.append(place)
        return len(self.offsets) - 1

    def index(self, offset: int) -> int | None:
        index = bisect_left(self.offsets, offset)
        return index if index < len(self.offsets) and self.offsets[index] == offset else None

    def ends(self, below: int, partitions: Iterable[int]) -> dict[int, int]:
        """Return of each partition the offset after the last of the records that were moved from below an offset."""
        ends = dict.fromkeys(partitions, 0)
        for index in range(bisect_left(self.offsets, below)):
            number = self.numbers[index]
            ends[number] = max(ends[number], self.moved_to[index] + 1)
        return ends

    def has_order(self) -> bool:
        """Return whether the records of each partition there are in the order that they have here."""
        last: dict[int, int] = {}
        for number, place in zip(self.numbers, self.moved_to, strict=True):
            if place < last.get(number, 0):
                return False
            last[number] = place
        return True


@dataclass(slots=True)
class _Found:
    """What an earlier run has left in one partition of a topic that keeps its order: offsets there → offsets here.

    All up to `taken` has been looked at.
    """

    origins: "array[int]" = field(default_factory=lambda: array("q"))
    moved_to: "array[int]" = field(default_factory=lambda: array("q"))
    taken: int = 0


class _Migration:
    def __init__(self, source: Log, target: Log, topics: Topics) -> None:
        self._source = source
        self._target = target
        self._topics = topics
        self._router = topics.group(ROUTER_GROUP)
        self._tiers = {topics.retry(tier): tier for tier in TIERS}
        self._id = b""
        self._advice = (
            f"if nothing there is needed, delete the topics and the groups there that begin with {topics.prefix!r}, "
            "and move again"
        )
        self._committed: Commits = {}
        # As far as was compared, and what counts for nothing there: what has ended since an earlier run moved it, and
        # second copies.
        self._bounds: dict[Partition, tuple[int, int]] = {}
        self._ended: dict[Partition, list[int]] = defaultdict(list)
        self._second: dict[Partition, list[int]] = defaultdict(list)
        self._twice: Counter[str] = Counter()
        self._copies: dict[str, _Copies] = defaultdict(_Copies)
        self._found: dict[Partition, _Found] = {}
        # Of the topics of ordered routes what had come, and what is there twice; of each partition there its last time.
        self._seen: dict[str, Seen] = {}
        self._repeated: dict[str, set[int]] = defaultdict(set)
        self._latest: dict[Partition, int] = defaultdict(int)
        self._anywhere: dict[Place, tuple[Partition, int]] = {}
        self._partitions: dict[str, int] = {}
        # Each with the topics that it comes from and goes to, and its index among the copies of the former.
        self._piece: list[tuple[Record, str, str, int]] = []
        self._piece_bytes = 0
        self._done = 0
        self._show: Show

    async def run(self, event_topics: Iterable[str], ordered: Iterable[Pair], show: Callable[[int], Show]) -> Migrated:
        events = await self._events(event_topics)
        pairs = await self._pairs(ordered)
        await self._prepare(events, pairs)
        of_pairs = {self._topics.ordered(*pair): pair for pair in sorted(pairs)}
        names = [topic for topic in self._partitions if topic != self._topics.control]
        bounds = {topic: await self._source.bounds(topic) for topic in names}
        there = sum([end - start for each in bounds.values() for start, end in each.values()])
        self._show = show(2 * there)
        self._committed = await self._commits_there(names)
        await self._look(self._partitions, ordered={*events, *of_pairs})
        control = await self._control()
        await self._see_to_what_ended(control)
        moved = [await self._move_events(topic, await self._groups(topic)) for topic in events]
        moved += [await self._move_ordered(topic, pair) for topic, pair in of_pairs.items()]
        moved.append(await self._move_dead(control))
        moved.append(await self._move_parked(control))
        moved += [await self._move_tier(topic, control) for topic in self._tiers]
        moved.append(await self._move_sightings(events))
        moved.append(await self._move_orders(control))
        await self._compare(names)
        await self._commit(names, {**await self._commits(events), **await self._commits_of(of_pairs, events)})
        return Migrated([each._replace(twice=self._twice[each.topic]) for each in moved], await self._left())

    # Before anything is moved.

    async def _events(self, event_topics: Iterable[str]) -> list[str]:
        """Return the topics of events: those of the rules, and those of sources that the rules lost.

        Raises UsageError where the source has none of this prefix: its groups wouldn't be found either.
        """
        topics, prefix = self._topics, self._topics.events("")
        own = {spec.name for spec in topics.specs([])}
        known = await self._source.topics()
        if topics.control not in known:
            others = sorted([name.removesuffix("control") for name in known if name.endswith("control")])
            prefixes = " or ".join([repr(other) for other in others if Topics(other).dead in known])
            if not prefixes:
                raise UsageError("--from: expected a log that a gateway has worked on, got one without topics")
            raise UsageError(
                f"--topic-prefix: expected {prefixes}, as the topics to move from begin, got {topics.prefix!r}"
            )
        committed = await self._source.topics_of(self._router)
        found = {topic for topic in known if topic.startswith(prefix) or topic in committed} - own
        return sorted(found | set(event_topics))

    async def _pairs(self, ordered: Iterable[Pair]) -> set[Pair]:
        """Return the ordered routes and their destinations: those of the rules, and those that either log knows."""
        known = {*await self._source.topics(), *await self._target.topics()}
        targets = [self._topics.ordered_target(topic) for topic in known]
        return {target for target in targets if target is not None}.union(ordered)

    async def _prepare(self, events: Collection[str], pairs: Collection[Pair]) -> None:
        """See that both logs are fit for it, and give the source a name, once: it tells its records from another's."""
        specs = self._topics.specs(events, pairs)
        for spec in specs:
            if len(await self._source.bounds(spec.name)) > 1:
                raise UsageError(f"{spec.name}: expected one partition in the log to move from, got several")
        for group, members in (await self._target.groups(self._topics.prefix)).items():
            if members:
                raise UsageError(
                    f"{group}: expected nobody at work on the log to move to, got {members}; stop the gateway there"
                )
        await self._target.create(specs)
        problems = [problem for problem in await self._target.check(specs) if problem.is_fatal]
        if problems:
            raise UsageError("\n".join([f"{problem.topic}: {problem.message}" for problem in problems]))
        for spec in specs:
            self._partitions[spec.name] = len(await self._target.bounds(spec.name))
            if self._topics.ordered_target(spec.name) and self._partitions[spec.name] > spec.partitions:
                raise UsageError(f"{spec.name}: expected {spec.partitions} partitions, got more; {self._advice}")
        prefix = self._topics.group("moved/")
        given = sorted(await self._source.groups(prefix))
        if not given:
            given = [f"{prefix}{uuid4().hex[:12]}"]
            await self._source.seed(given[0], {Partition(self._topics.control, 0): Commit(0)})
        self._id = given[0].removeprefix(prefix).encode()

    async def _commits_there(self, names: Collection[str]) -> Commits:
        """Return what is committed in the target of what is moved."""
        return {
            (group, topic): await self._target.committed(group, topic)
            for group in sorted(await self._target.groups(self._topics.prefix))
            for topic in sorted(await self._target.topics_of(group))
            if topic in names
        }

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
                                f"got another record, so a gateway has worked there; {self._advice}"
                            )
                        if topic in ordered:
                            found.origins.append(place[1])
                            found.moved_to.append(record.offset)
                        else:
                            self._anywhere.setdefault(place, (partition, record.offset))

    def _origin(self, record: Record) -> Place | None:
        told = dict(record.headers).get(MOVED, b"").split(b" ")
        if len(told) != 3 or told[0] != self._id:  # noqa: PLR2004 - its three parts
            return None
        return told[1].decode(), int(told[2])

    async def _see_to_what_ended(self, control: Control) -> None:
        """See that what an earlier run has moved is still open, where no commit could call it done.

        The old gateway may have gone on since. Raises UsageError.
        """
        for topic, open_records in (
            (self._topics.dead, self._open_letters(control)),
            (self._topics.parked, self._parked(control)),
        ):
            ended = {offset for origin, offset in self._anywhere if origin == topic}
            async for record in open_records:
                ended.discard(record.offset)
            if ended:
                raise UsageError(
                    f"{topic}@{min(ended)}: expected what an earlier run has moved to be still open, got one that has "
                    f"ended since; {self._advice}"
                )

    async def _control(self) -> Control:
        control = Control()
        async for record in self._records(self._topics.control):
            with suppress(UndecodableRecordError):  # no process obeys it
                control.take(record.key, record.value, record.offset)
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
        commits = {name: commit for name, commit in found.items() if commit is not None}
        # The router reads all of them: what is there twice has to be done for it, also before its first commit.
        return {self._router: Commit(0), **commits}

    # Moving.

    async def _move_events(self, topic: str, groups: Mapping[str, Commit]) -> Moved:
        unfinished = 0
        async for record in self._records(topic):
            unfinished += not all(commit.covers(record.offset) for commit in groups.values())
            await self._keep_order(topic, record)
        await self._append()
        return self._moved(topic, unfinished)

    async def _move_ordered(self, topic: str, pair: Pair) -> Moved:
        """Move the deliveries of an ordered route; what is there twice counts as done.

        They don't say any more from which event's record they were made, as that has another place now. What had come
        by then is told by the note of the commit.
        """
        commit = (await self._source.committed(self._topics.ordered_group(*pair), topic)).get(0, Commit(0))
        seen = self._seen[topic] = Seen(commit.note)
        unfinished = 0
        async for record in self._records(topic):
            origin = origin_of(record) if record.offset >= commit.base else None
            if origin is not None and seen.is_copy(record.offset, origin):
                self._repeated[topic].add(record.offset)
            unfinished += not (commit.covers(record.offset) or record.offset in self._repeated[topic])
            await self._keep_order(topic, without_origin(record))
        await self._append()
        return self._moved(topic, unfinished)

    async def _move_dead(self, control: Control) -> Moved:
        topic = self._topics.dead
        async for record in self._open_letters(control, is_counted=True):
            await self._keep(topic, topic, record)
        await self._append()
        return self._moved(topic)

    async def _open_letters(self, control: Control, *, is_counted: bool = False) -> AsyncIterator[Record]:
        partition = Partition(self._topics.dead, 0)
        async for record in self._records(partition.topic, is_counted=is_counted):
            letter, _ = read_letter(record)
            if control.settled(letter, partition, record.offset) is None:
                yield record

    async def _move_parked(self, control: Control) -> Moved:
        topic = self._topics.parked
        async for record in self._parked(control, is_counted=True):
            await self._keep(topic, topic, record)
        await self._append()
        return self._moved(topic)

    async def _parked(self, control: Control, *, is_counted: bool = False) -> AsyncIterator[Record]:
        """Yield what is parked; what a resumption has scanned goes on elsewhere."""
        partition = Partition(self._topics.parked, 0)
        async for record in self._records(partition.topic, is_counted=is_counted):
            try:
                by = decode_delivery(record).note.by
            except UnreadableRecordError:
                by = ""
            if not control.has_scanned(f"pause/{by}", partition, record.offset):
                yield record

    async def _move_tier(self, topic: str, control: Control) -> Moved:
        partition = Partition(topic, 0)
        commit = (await self._source.committed(self._router, topic)).get(0, Commit(0))
        async for record in self._records(topic):
            if commit.covers(record.offset):
                continue
            tier: str | None = None
            try:
                delivery = decode_delivery(record).delivery
            except UnreadableRecordError:
                pass  # the router keeps it among the dead
            else:
                if control.is_kicked(delivery.route, delivery.destination, partition, record.offset):
                    continue  # it was injected anew
                tier = tiers.plan(delivery.due, self._target.now())
            await self._keep(topic, self._topics.retry(tier or tiers.SHORTEST), record)
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
            except UnreadableRecordError:
                continue
            if name is None:
                continue
            copies = self._copies[name]
            rows: dict[int, bytearray] = defaultdict(bytearray)
            for identity, content, offset, at in SIGHTING.iter_unpack(sighted.rows):
                index = copies.index(offset)
                if index is not None:  # else retention has taken the event, and the window is over
                    rows[copies.numbers[index]] += SIGHTING.pack(identity, content, copies.moved_to[index], at)
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
                    with suppress(UndecodableRecordError):
                        there.take(record.key, record.value, record.offset)
        moved = [each for order in control.orders.values() for each in await self._order(order, control)]
        wanted = Control(moved)
        # What an earlier run has given, and the old gateway has carried out since.
        for key, order in there.orders.items():
            if key not in wanted.orders:
                await self._give(Order(kind="marker", name=key, state="gone", at=0.0))
                await self._give(Order(kind=order.kind, name=order.name, state="gone", at=0.0))
        for order in moved:
            if order.kind != "marker":
                is_there = there.orders.get(order.key) == order
            else:
                is_there = there.marker(order.name) == order.marker and there.injected(order.name) == order.count
            if not is_there:
                await self._give(order)
        await self._move_history(control, there)
        return Moved(topic, len(wanted.orders), len(wanted.orders))

    async def _move_history(self, control: Control, there: Control) -> None:
        """Tell by which rules the events that were moved had been routed."""
        for order in control.history.orders():
            if not (there.history.knows(order.name) or there.history.has(order.name)):
                marker = {place: end for place, end in order.marker.items() if place.rpartition("/")[0] in self._copies}
                await self._give(replace(order, marker=self._translated(marker), done={}))

    async def _give(self, order: Order) -> None:
        key, value = order.encode()
        await self._store(self._topics.control, key, value, [], (self._topics.control, 0))

    async def _order(self, order: Order, control: Control) -> list[Order]:
        """Return what is to be said of an order in the target."""
        match order.kind:
            case "pause":
                return [order]
            case "kick":
                return [order] if order.state == "asked" else []
            case "dead" if order.state == "asked":
                # A letter's time is that of its append, which is another one now, and its place may be one.
                which = order.filter
                has_order = self._copies[self._topics.dead].has_order()
                if which.since is not None or which.until is not None or not has_order:
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
        async for record in self._open_letters(control):
            letter, _ = read_letter(record)
            if order.is_for(letter) and order.is_before_marker(partition, record.offset):
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
                self._copies[topic].add(record, topic, partition.number, found.moved_to[found.taken])
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
        self._see_to_commits({})
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
            copies.numbers[index], copies.moved_to[index] = result.partition, result.offset

    async def _store(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders, place: Place) -> None:
        self._see_to_commits({})
        await self._target.append(topic, key=key, value=value, headers=[*headers, (MOVED, self._told(place))])

    def _told(self, place: Place) -> bytes:
        return b"%b %b %d" % (self._id, place[0].encode(), place[1])

    def _moved(self, topic: str, unfinished: int | None = None) -> Moved:
        count = len(self._copies[topic].offsets)
        return Moved(topic, count, count if unfinished is None else unfinished)

    # After everything is moved.

    def _see_to_commits(self, expected: Commits) -> None:
        """See that the target has no commits but these. Raises UsageError."""
        for (group, topic), commits in self._committed.items():
            for number, commit in commits.items():
                if expected.get((group, topic), {}).get(number) != commit:
                    raise UsageError(
                        f"{group}: expected no commits there but those of this move, got one of {topic}/{number}: a "
                        "gateway was started there, or the old one has gone on since a move that was complete; "
                        f"{self._advice}"
                    )

    async def _compare(self, names: Iterable[str]) -> None:
        """Read back what was moved, and compare it.

        Raises LogUnavailableError where a record is missing or isn't the same.
        """
        seen: dict[str, int] = defaultdict(int)
        for topic in names:
            for number, bounds in (await self._target.bounds(topic)).items():
                partition = Partition(topic, number)
                self._bounds[partition] = bounds
                if topic == self._topics.dedupe:
                    continue  # it says nothing that an event must be delivered for
                async for records in self._target.scan(partition, *bounds):
                    for record in records:
                        origin = self._compared(partition, record)
                        if origin is not None:
                            seen[origin] += 1
                    self._done += len(records)
                    self._show(self._done, f"comparing {topic}")
        for topic, copies in self._copies.items():
            if seen[topic] != len(copies.offsets):
                raise LogUnavailableError(f"{topic}: expected {len(copies.offsets)} records moved, found {seen[topic]}")

    def _compared(self, partition: Partition, record: Record) -> str | None:
        """Return the topic that a record was moved from; None, and note it, if it counts for nothing."""
        place = self._origin(record)
        self._latest[partition] = max(self._latest[partition], int(record.appended_at * 1000))
        if place is None:
            raise UsageError(
                f"{partition.topic}/{partition.number}@{record.offset}: expected nobody else to write meanwhile, got "
                f"another record; stop who does; {self._advice}"
            )
        topic, offset = place
        copies = self._copies[topic]
        index = copies.index(offset)
        if index is None:
            self._ended[partition].append(record.offset)
            return None
        where = copies.topics[index], copies.numbers[index], copies.moved_to[index]
        if where != (partition.topic, partition.number, record.offset):
            self._second[partition].append(record.offset)
            return None
        headers = [(name, text) for name, text in record.headers if name != MOVED]
        if _digest(record.key, record.value, headers) != copies.digests[index]:
            raise LogUnavailableError(f"{topic}@{offset}: expected the same record moved, got another one")
        return topic

    async def _commits(self, events: Iterable[str]) -> Commits:
        """Return what lets each group begin where it was, up to what was compared: what comes after that is unfinished.

        Raises UsageError where a commit can't say it.
        """
        commits: dict[tuple[str, str], dict[int, Commit]] = {}
        for topic in events:
            copies = self._copies[topic]
            for group, commit in (await self._groups(topic)).items():
                unfinished: dict[int, list[int]] = {number: [] for number in range(self._partitions[topic])}
                for index, offset in enumerate(copies.offsets):
                    if not commit.covers(offset):
                        unfinished[copies.numbers[index]].append(copies.moved_to[index])
                commits[group, topic] = {
                    number: self._commit_of(offsets, Partition(topic, number)) for number, offsets in unfinished.items()
                }
        for topic in self._tiers:
            for number in range(self._partitions[topic]):
                partition = Partition(topic, number)
                void = self._ended[partition] + self._second[partition]
                if void:
                    live = sorted(set(range(*self._bounds[partition])).difference(void))
                    far = [offset for offset in self._second[partition] if live and offset >= live[0] + WINDOW]
                    self._twice[topic] += len(far)
                    commits.setdefault((self._router, topic), {})[number] = self._commit_of([*live, *far], partition)
        for partition, second in self._second.items():
            if partition.topic in (self._topics.parked, self._topics.dead):
                self._twice[partition.topic] += len(second)
        return commits

    async def _commits_of(self, of_pairs: Mapping[str, Pair], events: Collection[str]) -> Commits:
        """Return what lets each ordered route go on where it was, and know what had come."""
        commits: dict[tuple[str, str], dict[int, Commit]] = {}
        for topic, pair in of_pairs.items():
            group, copies = self._topics.ordered_group(*pair), self._copies[topic]
            commit = (await self._source.committed(group, topic)).get(0, Commit(0))
            unfinished: dict[int, list[int]] = {number: [] for number in range(self._partitions[topic])}
            for index, offset in enumerate(copies.offsets):
                if not commit.covers(offset) and offset not in self._repeated[topic]:
                    unfinished[copies.numbers[index]].append(copies.moved_to[index])
            furthest: dict[Partition, Furthest] = {}
            for name in events:
                last = self._seen[topic].furthest(Partition(name, 0))
                if last is not None:
                    ends = self._copies[name].ends(last.offset + 1, range(self._partitions[name]))
                    there = {Partition(name, number): end - 1 for number, end in ends.items() if end}
                    furthest |= {each: Furthest(offset, self._latest[each]) for each, offset in there.items()}
            of_topic = commits[group, topic] = {}
            for number, offsets in unfinished.items():
                moved = self._commit_of(offsets, Partition(topic, number))
                room = (COMMIT_BYTES - len(moved.done)) // ROW.size
                of_topic[number] = moved._replace(note=note_of(dict(list(furthest.items())[:room])))
        return commits

    def _commit_of(self, unfinished: Sequence[int], partition: Partition) -> Commit:
        """Return a commit that covers all of a partition but these offsets, of which the first is the lowest."""
        _, end = self._bounds[partition]
        if not unfinished:
            return Commit(end)
        base, waiting = unfinished[0], set(unfinished)
        bits = 0
        for offset in range(base, end):
            if offset in waiting:
                continue
            if offset - base >= WINDOW:
                raise UsageError(
                    f"{partition.topic}/{partition.number}@{offset}: expected what is done within {WINDOW} records of "
                    f"the first that isn't, got it beyond; {self._advice}"
                )
            bits |= 1 << (offset - base)
        return Commit(base, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))

    async def _commit(self, names: Collection[str], commits: Commits) -> None:
        """Let each group begin where it was."""
        self._see_to_commits(commits)
        for (group, topic), of_topic in commits.items():
            await self._target.seed(group, {Partition(topic, number): commit for number, commit in of_topic.items()})
        # Where another was faster, its commits stand.
        self._committed = await self._commits_there(names)
        self._see_to_commits(commits)
        for topic in names:
            for number, (_, end) in (await self._target.bounds(topic)).items():
                _, compared = self._bounds[Partition(topic, number)]
                if end > compared:
                    raise UsageError(
                        f"{topic}/{number}@{compared}: expected nobody else to write meanwhile, got another record, "
                        "which is unfinished; all of the log was moved: start the gateway once you know who wrote it"
                    )

    async def _left(self) -> list[str]:
        """Return the topics of the source that aren't this gateway's, and have records."""
        left = sorted(set(await self._source.topics()).difference(self._partitions))
        bounds = {topic: (await self._source.bounds(topic)).values() for topic in left}
        return [topic for topic in left if any(start < end for start, end in bounds[topic])]


def _digest(key: bytes, value: bytes, headers: RecordHeaders) -> int:
    digest = blake2b(b"%d %d " % (len(key), len(value)) + key, digest_size=8)
    digest.update(value)
    for name, text in headers:
        digest.update(f"{len(name)} {len(text)} {name}".encode())
        digest.update(text)
    return int.from_bytes(digest.digest(), "big")
