"""Move an embedded log to Kafka, with no gateway running on either: unfinished records stay so, completed ones too.

    source, one partition a topic                     target
    events  0 1 2 3 4 5 6 …  ── in their order ──▶    each in the partition of its key, with its origin (`gw_moved`)
    ordered routes' topics   ── in their order ──▶    the same
    commits of each group    ── translated ────────▶  commits of the same groups
    tiers                    ── unfinished only ───▶  the tier for the rest of the delay
    parked, dead             ── open ones only ────▶  the same topics
    dedupe                   ── rows by partition ─▶  the same topic
    control                  ── current ones ──────▶  the same topic, with offsets of the target

Each moved record names its original in the source, so after a killed run, another one reads what is there and
continues. The commits come last, after everything has been read back and compared: without them a gateway on the target
would start at the beginning. A commit never covers records that came after the comparison.

An existing commit isn't replaced. So if there is any, nothing more is appended, and all of them must be those that this
run computes: otherwise a gateway was started there, or the old one has continued after a complete move.

Completed events are moved as well: later duplicates are recognised by them, and replays can deliver them as long as the
topic keeps them. By the target's clock all of them are appended now.
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
from gateway.engine.control.records import ControlRecord, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import read_dead_letter
from gateway.engine.jobs.log_reader import last_append_time, last_records
from gateway.engine.ordered.duplicate_appends import ROW, DuplicateAppends, Furthest, metadata_of
from gateway.log.base import COMMIT_BYTES, Commit, Log, Partition, Record, RecordHeaders, partition_of
from gateway.log.records import (
    DEDUPE_ENTRY,
    Origin,
    decode_dedupe_entries,
    decode_delivery,
    dedupe_entries_key,
    encode_dedupe_entries,
    origin_of,
    without_origin,
)
from gateway.log.topics import JOBS_GROUP, ROUTER_GROUP, SOURCES_GROUP, TIERS, Topics
from gateway.model import (
    LogUnavailableError,
    NewerRecordError,
    UndecodableRecordError,
    UnreadableRecordError,
    UsageError,
)

MOVED = "gw_moved"
"""The record header that names the source, the topic and the offset that a record was moved from."""
BATCH_BYTES = 256 << 10
"""Bytes of records appended concurrently. They keep their order, as they never fill a batch of Kafka's producer."""
BATCH_RECORDS = 500

Show = Callable[[int, str], None]
Pair = tuple[str, str]
"""An ordered route and one of its destinations."""
Original = tuple[str, int]
"""The record of the source that one was moved from: its topic and offset."""
Commits = Mapping[tuple[str, str], Mapping[int, Commit]]
"""Group and topic → partition number → its commit."""


class Moved(NamedTuple):
    """The result for one topic. `unfinished` is the number of the source's records that aren't completed.

    `twice` is the number of duplicates in the target that no commit marks as done.
    """

    topic: str
    records: int
    unfinished: int
    twice: int = 0


class Migrated(NamedTuple):
    """The result for each topic, and the source's other topics with records, which weren't moved."""

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
    """Move everything that is needed; `show` gets the number of records, and returns a function for the progress.

    Raises UsageError if one of the logs isn't suitable, and LogUnavailableError if another run has to continue.
    """
    return await _Migration(source, target, topics).run(event_topics, ordered, show)


@dataclass(slots=True)
class _OffsetMap:
    """The moved records of one source topic: ascending offsets in the source, each with its position in the target."""

    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    topics: list[str] = field(default_factory=list)
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    moved_to: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, record: Record, topic: str, number: int = -1, offset: int = -1) -> int:
        """Add a record, with its position if it is in the target already; return its index."""
        self.offsets.append(record.offset)
        self.digests.append(_digest(record.key, record.value, record.headers))
        self.topics.append(topic)
        self.numbers.append(number)
        self.moved_to.append(offset)
        return len(self.offsets) - 1

    def index(self, offset: int) -> int | None:
        index = bisect_left(self.offsets, offset)
        return index if index < len(self.offsets) and self.offsets[index] == offset else None

    def ends(self, below: int, partitions: Iterable[int]) -> dict[int, int]:
        """Return per target partition the offset after the last record that was moved from below an offset."""
        ends = dict.fromkeys(partitions, 0)
        for index in range(bisect_left(self.offsets, below)):
            number = self.numbers[index]
            ends[number] = max(ends[number], self.moved_to[index] + 1)
        return ends

    def has_order(self) -> bool:
        """Return whether each target partition's records are in the order of the source."""
        last: dict[int, int] = {}
        for number, offset in zip(self.numbers, self.moved_to, strict=True):
            if offset < last.get(number, 0):
                return False
            last[number] = offset
        return True


@dataclass(slots=True)
class _MovedEarlier:
    """The records that an earlier run moved into one partition of an ordered topic: source offsets, target offsets.

    The first `matched` of them have been found in the source again.
    """

    source_offsets: "array[int]" = field(default_factory=lambda: array("q"))
    target_offsets: "array[int]" = field(default_factory=lambda: array("q"))
    matched: int = 0


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
        # What was compared, and the offsets to ignore in the target: of duplicates, and of records that have ended
        # since an earlier run moved them.
        self._bounds: dict[Partition, tuple[int, int]] = {}
        self._ended_since: dict[Partition, list[int]] = defaultdict(list)
        self._duplicates: dict[Partition, list[int]] = defaultdict(list)
        self._twice: Counter[str] = Counter()
        self._offset_maps: dict[str, _OffsetMap] = defaultdict(_OffsetMap)
        self._moved_earlier: dict[Partition, _MovedEarlier] = {}
        # Per topic of an ordered route: the furthest event positions, and the duplicates. Per target partition: the
        # last append time.
        self._seen: dict[str, DuplicateAppends] = {}
        self._source_duplicates: dict[str, set[int]] = defaultdict(set)
        self._latest: dict[Partition, int] = defaultdict(int)
        self._target_positions: dict[Original, tuple[Partition, int]] = {}
        self._partitions: dict[str, int] = {}
        # Each with its source and target topics, and its index in `_offset_maps` of the former.
        self._batch: list[tuple[Record, str, str, int]] = []
        self._batch_bytes = 0
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
        await self._read_earlier_moves(self._partitions, ordered={*events, *of_pairs})
        control = await self._control()
        await self._require_still_open(control)
        moved = [await self._move_events(topic, await self._groups(topic)) for topic in events]
        moved += [await self._move_ordered(topic, pair) for topic, pair in of_pairs.items()]
        moved.append(await self._move_dead(control))
        moved.append(await self._move_parked(control))
        moved += [await self._move_tier(topic, control) for topic in self._tiers]
        moved.append(await self._move_dedupe_entries(events))
        moved.append(await self._move_control(control))
        await self._compare(names)
        await self._commit(names, {**await self._commits(events), **await self._commits_of(of_pairs, events)})
        return Migrated([each._replace(twice=self._twice[each.topic]) for each in moved], await self._other_topics())

    # Before anything is moved.

    async def _events(self, event_topics: Iterable[str]) -> list[str]:
        """Return the topics of events: those in the rules, and those of removed sources.

        Raises UsageError if the source has no topics with this prefix: its groups wouldn't be found either.
        """
        topics, prefix = self._topics, self._topics.events("")
        own = {spec.name for spec in topics.specs([])}
        known = await self._source.topics()
        if topics.control not in known:
            others = sorted([name.removesuffix("control") for name in known if name.endswith("control")])
            prefixes = " or ".join([repr(other) for other in others if Topics(other).dead in known])
            if not prefixes:
                raise UsageError("--from: expected the log of a gateway, got one without topics")
            raise UsageError(
                f"--topic-prefix: expected {prefixes}, the prefix of the topics to move, got {topics.prefix!r}"
            )
        groups = self._router, topics.group(SOURCES_GROUP)
        committed = {topic for group in groups for topic in await self._source.topics_of(group)}
        found = {topic for topic in known if topic.startswith(prefix) or topic in committed} - own
        return sorted(found | set(event_topics))

    async def _pairs(self, ordered: Iterable[Pair]) -> set[Pair]:
        """Return the ordered routes and their destinations: those in the rules, and those in either log."""
        known = {*await self._source.topics(), *await self._target.topics()}
        targets = [self._topics.ordered_target(topic) for topic in known]
        return {target for target in targets if target is not None}.union(ordered)

    async def _prepare(self, events: Collection[str], pairs: Collection[Pair]) -> None:
        """Check that both logs are suitable, and give the source an id, once: each moved record has it."""
        specs = self._topics.specs(events, pairs)
        for spec in specs:
            if len(await self._source.bounds(spec.name)) > 1:
                raise UsageError(f"{spec.name}: expected one partition in the log to move from, got several")
        for group, members in (await self._target.groups(self._topics.prefix)).items():
            if members:
                raise UsageError(f"{group}: expected no gateway on the log to move to, got {members}; stop it")
        await self._target.create(specs)
        problems = [problem for problem in await self._target.check(specs) if problem.is_fatal]
        if problems:
            raise UsageError("\n".join([f"{problem.topic}: {problem.message}" for problem in problems]))
        for spec in [each for each in specs if not each.is_best_effort]:  # what isn't moved is told at the end
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
        """Return the commits in the target for the moved topics."""
        return {
            (group, topic): await self._target.committed(group, topic)
            for group in sorted(await self._target.groups(self._topics.prefix))
            for topic in sorted(await self._target.topics_of(group))
            if topic in names
        }

    async def _read_earlier_moves(self, names: Iterable[str], ordered: Collection[str]) -> None:
        """Read what earlier runs have moved. Raises UsageError for a record that wasn't moved."""
        for topic in names:
            for number, (start, end) in (await self._target.bounds(topic)).items():
                partition = Partition(topic, number)
                found = self._moved_earlier[partition] = _MovedEarlier()
                async for records in self._target.scan(partition, start, end):
                    for record in records:
                        original = self._origin(record)
                        if original is None:
                            raise UsageError(
                                f"{topic}/{number}@{record.offset}: expected only records moved from this log, got "
                                f"another record, so a gateway has run there; {self._advice}"
                            )
                        if topic in ordered:
                            found.source_offsets.append(original[1])
                            found.target_offsets.append(record.offset)
                        else:
                            self._target_positions.setdefault(original, (partition, record.offset))

    def _origin(self, record: Record) -> Original | None:
        origin = dict(record.headers).get(MOVED, b"").split(b" ")
        if len(origin) != 3 or origin[0] != self._id:  # noqa: PLR2004 - its three parts
            return None
        return origin[1].decode(), int(origin[2])

    async def _require_still_open(self, control: Control) -> None:
        """Raise UsageError if a record that an earlier run moved has ended since, and no commit could mark it as done.

        The old gateway may have continued since.
        """
        for topic, open_records in (
            (self._topics.dead, self._open_dead_letters(control)),
            (self._topics.parked, self._parked(control)),
        ):
            ended = {offset for origin, offset in self._target_positions if origin == topic}
            async for record in open_records:
                ended.discard(record.offset)
            if ended:
                raise UsageError(
                    f"{topic}@{min(ended)}: expected the records that an earlier run moved to be still open, got one "
                    f"that has ended since; {self._advice}"
                )

    async def _control(self) -> Control:
        control = Control()
        async for record in self._records(self._topics.control):
            with suppress(UndecodableRecordError):  # every process ignores it
                control.decode_and_apply(record.key, record.value, record.offset)
        return control

    async def _groups(self, topic: str) -> Mapping[str, Commit]:
        """Return the groups that read a topic of events, with their commits."""
        others, moved = [self._topics.group(name) for name in (JOBS_GROUP, SOURCES_GROUP)], self._topics.group("moved/")
        names = [
            name
            for name in await self._source.groups(self._topics.prefix)
            if name not in others and not name.startswith(moved)
        ]
        found = {name: (await self._source.committed(name, topic)).get(0) for name in names}
        commits = {name: commit for name, commit in found.items() if commit is not None}
        # The router reads all of them: duplicates must be done for it, even before its first commit.
        return {self._router: Commit(0), **commits}

    # Moving.

    async def _move_events(self, topic: str, groups: Mapping[str, Commit]) -> Moved:
        unfinished = 0
        async for record in self._records(topic):
            unfinished += not all(commit.covers(record.offset) for commit in groups.values())
            await self._move_in_order(topic, record)
        await self._append()
        return self._moved(topic, unfinished)

    async def _move_ordered(self, topic: str, pair: Pair) -> Moved:
        """Move the deliveries of an ordered route; duplicates count as done.

        They lose the position of their event's record, which has another one now. The furthest positions so far are in
        the commit's metadata.
        """
        commit = (await self._source.committed(self._topics.ordered_group(*pair), topic)).get(0, Commit(0))
        seen = self._seen[topic] = DuplicateAppends(commit.metadata)
        unfinished = 0
        async for record in self._records(topic):
            origin = _origin_of_delivery(record) if record.offset >= commit.base else None
            if origin is not None and seen.is_duplicate(record.offset, origin):
                self._source_duplicates[topic].add(record.offset)
            unfinished += not (commit.covers(record.offset) or record.offset in self._source_duplicates[topic])
            await self._move_in_order(topic, without_origin(record))
        await self._append()
        return self._moved(topic, unfinished)

    async def _move_dead(self, control: Control) -> Moved:
        topic = self._topics.dead
        async for record in self._open_dead_letters(control, is_counted=True):
            await self._move(topic, topic, record)
        await self._append()
        return self._moved(topic)

    async def _open_dead_letters(self, control: Control, *, is_counted: bool = False) -> AsyncIterator[Record]:
        partition = Partition(self._topics.dead, 0)
        async for record in self._records(partition.topic, is_counted=is_counted):
            letter, _ = read_dead_letter(record)
            if control.resolved_by(letter, partition, record.offset) is None:
                yield record

    async def _move_parked(self, control: Control) -> Moved:
        topic = self._topics.parked
        async for record in self._parked(control, is_counted=True):
            await self._move(topic, topic, record)
        await self._append()
        return self._moved(topic)

    async def _parked(self, control: Control, *, is_counted: bool = False) -> AsyncIterator[Record]:
        """Yield the parked deliveries that no resume has injected."""
        partition = Partition(self._topics.parked, 0)
        async for record in self._records(partition.topic, is_counted=is_counted):
            try:
                by = decode_delivery(record).metadata.paused_name
            except UnreadableRecordError:
                by = ""
            if not control.has_scanned(f"pause/{by}", partition, record.offset, record.appended_at):
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
                pass  # the router dead-letters it
            else:
                args = (*delivery.kick_target, partition, record.offset, record.appended_at)
                if control.was_injected_by_kick(*args):
                    continue  # it was injected again
                tier = tiers.plan(delivery.due, self._target.now())
            await self._move(topic, self._topics.retry(tier or tiers.SHORTEST), record)
        await self._append()
        return self._moved(topic)

    async def _move_dedupe_entries(self, events: Iterable[str]) -> Moved:
        """Move the dedupe entries, each to the partition in which its event is now."""
        topic, moved = self._topics.dedupe, 0
        by_key = {dedupe_entries_key(Partition(name, 0)): name for name in events}
        async for record in self._records(topic):
            name = by_key.get(record.key)
            try:
                entries = decode_dedupe_entries(record)
            except UnreadableRecordError:
                continue
            if name is None:
                continue
            offset_map = self._offset_maps[name]
            rows: dict[int, bytearray] = defaultdict(bytearray)
            for identity, content, offset, at in DEDUPE_ENTRY.iter_unpack(entries.rows):
                index = offset_map.index(offset)
                if index is not None:  # otherwise retention deleted the event, and the window has passed
                    rows[offset_map.numbers[index]] += DEDUPE_ENTRY.pack(
                        identity, content, offset_map.moved_to[index], at
                    )
            headers = encode_dedupe_entries(entries.source, entries.origin)
            for number, of_partition in sorted(rows.items()):
                # One record becomes several, distinguished by the partition that each is about.
                original = f"{topic}:{name}/{number}", record.offset
                if original not in self._target_positions:
                    key = dedupe_entries_key(Partition(name, number))
                    await self._store(topic, key, bytes(of_partition), headers, original)
                moved += 1
        return Moved(topic, moved, 0)

    async def _move_control(self, control: Control) -> Moved:
        """Write the current control records. Ended ones aren't needed: their deliveries weren't moved."""
        topic = self._topics.control
        there = Control()
        for number, (start, end) in (await self._target.bounds(topic)).items():
            async for records in self._target.scan(Partition(topic, number), start, end):
                for record in records:
                    with suppress(UndecodableRecordError):
                        there.decode_and_apply(record.key, record.value, record.offset)
        moved = [
            each for command in control.commands.values() for each in await self._translated_command(command, control)
        ]
        wanted = Control(moved)
        # What an earlier run wrote, and the old gateway has carried out since.
        for key, command in there.commands.items():
            if key not in wanted.commands:
                await self._store_control(ControlRecord(kind="checkpoint", name=key, state="deleted", at=0.0))
                await self._store_control(ControlRecord(kind=command.kind, name=command.name, state="deleted", at=0.0))
        for command in moved:
            if command.kind != "checkpoint":
                is_there = there.commands.get(command.key) == command
            else:
                last = there.last_checkpoint(command.name)
                is_there = last is not None and (last.checkpoint, last.count, last.results) == (
                    command.checkpoint,
                    command.count,
                    command.results,
                )
            if not is_there:
                await self._store_control(command)
        await self._move_history(control, there)
        return Moved(topic, len(wanted.commands), len(wanted.commands))

    async def _move_history(self, control: Control, there: Control) -> None:
        """Write by which rules the moved events had been routed."""
        for command in control.history.records():
            if not (there.history.knows(command.name) or there.history.has_record(command.name)):
                checkpoint = {
                    partition_name: end
                    for partition_name, end in command.checkpoint.items()
                    if partition_name.rpartition("/")[0] in self._offset_maps
                }
                await self._store_control(replace(command, checkpoint=self._translated(checkpoint), done={}))

    async def _store_control(self, command: ControlRecord) -> None:
        key, value = command.encode()
        topic, partition = self._topics.control_partition
        self._require_commits({})
        headers = [(MOVED, self._origin_header((topic, 0)))]
        await self._target.append(topic, key=key, value=value, headers=headers, partition=partition)

    async def _translated_command(self, command: ControlRecord, control: Control) -> list[ControlRecord]:
        """Return the records for a command in the target."""
        match command.kind:
            case "pause":
                return [command]
            case "kick":
                return [command] if command.state == "requested" else []
            case "dead" if command.state == "requested":
                # A dead letter's time is that of its append, which has changed, and its order may have.
                which = command.filter
                has_order = self._offset_maps[self._topics.dead].has_order()
                if which.since is not None or which.until is not None or not has_order:
                    which = replace(which, since=None, until=None, ids=await self._dead_letter_ids(command, control))
                ends = self._translated(command.checkpoint)
                latest = await last_append_time(self._target, ends)
                return [replace(command, filter=which, checkpoint=ends, latest=latest)]
            case "replay" if command.state == "requested" and command.selection is not None:
                starts = self._translated(command.selection.starts)
                selection = replace(command.selection, since=0.0, until=None, starts=starts)
                ends = self._translated(command.checkpoint)
                last = await last_records(self._target, starts, ends)
                moved = [replace(command, selection=selection, checkpoint=ends, last_records=last)]
                if reached := control.checkpoint(command.key):
                    at, injected = command.at, control.injected(command.key)
                    checkpoint = self._translated(reached)
                    moved.append(
                        ControlRecord(
                            kind="checkpoint",
                            name=command.key,
                            state="done",
                            at=at,
                            checkpoint=checkpoint,
                            count=injected,
                        )
                    )
                return moved
            case "redeliver" if command.state == "requested" and command.redelivery is not None:
                return await self._translated_redelivery(command, control)
            case _:
                return []

    async def _translated_redelivery(self, command: ControlRecord, control: Control) -> list[ControlRecord]:
        """Return the records for a redelivery, with what it has injected by now; its event may be in another partition.

        None if its event is gone: there is nothing left to deliver.
        """
        assert command.redelivery is not None, command
        name, offset = command.redelivery.partition, command.redelivery.offset
        starts, ends = self._translated({name: offset}), self._translated({name: offset + 1})
        places = [each for each, end in ends.items() if end > starts.get(each, end)]
        if not places:
            return []
        there = replace(command.redelivery, partition=places[0], offset=starts[places[0]])
        known = await last_records(self._target, starts, {there.partition: there.offset + 1})
        moved = [replace(command, redelivery=there, last_records=known)]
        last = control.last_checkpoint(command.key)
        return moved if last is None else [*moved, replace(last, covers_commands_below=0)]

    async def _dead_letter_ids(self, command: ControlRecord, control: Control) -> tuple[str, ...]:
        """Return the deliveries whose open dead letters a command covers; if none, an id that no delivery has."""
        partition = Partition(self._topics.dead, 0)
        found: dict[str, None] = {}
        async for record in self._open_dead_letters(control):
            letter, _ = read_dead_letter(record)
            if command.is_for(letter) and record.offset < command.checkpoint.get(partition_key(partition), 0):
                found[letter.id] = None
        return tuple(found) or ("none",)

    def _translated(self, checkpoint: Mapping[str, int]) -> dict[str, int]:
        """Return the corresponding positions in the target: "topic/partition" → offset."""
        translated: dict[str, int] = {}
        for partition_name, offset in checkpoint.items():
            topic = partition_name.rpartition("/")[0]
            ends = self._offset_maps[topic].ends(offset, range(self._partitions.get(topic, 0)))
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

    async def _move_in_order(self, topic: str, record: Record) -> None:
        """Move a record to its place after its predecessors in the partition.

        Records that an earlier run stored behind a failed append are ignored, and moved again.
        """
        partition = Partition(topic, partition_of(record.key, self._partitions[topic]))
        found = self._moved_earlier[partition]
        if found.matched < len(found.source_offsets):
            try:
                found.matched = found.source_offsets.index(record.offset, found.matched)
            except ValueError:
                found.matched = len(found.source_offsets)
            else:
                self._offset_maps[topic].add(record, topic, partition.number, found.target_offsets[found.matched])
                found.matched += 1
                return
        await self._add(topic, record, topic)

    async def _move(self, origin: str, topic: str, record: Record) -> None:
        """Move a record from one topic to another, unless it is already there."""
        there = self._target_positions.get((origin, record.offset))
        if there is None:
            await self._add(origin, record, topic)
        else:
            partition, offset = there
            self._offset_maps[origin].add(record, partition.topic, partition.number, offset)

    async def _add(self, origin: str, record: Record, topic: str) -> None:
        self._require_commits({})
        size = len(record.value) + sum([len(name) + len(text) for name, text in record.headers])
        if self._batch and (self._batch_bytes + size > BATCH_BYTES or len(self._batch) == BATCH_RECORDS):
            await self._append()
        # Added at once: offsets must ascend, even if the next record is there already.
        self._batch.append((record, origin, topic, self._offset_maps[origin].add(record, topic)))
        self._batch_bytes += size

    async def _append(self) -> None:
        """Append the batch, concurrently and in order."""
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        appends = [
            self._target.append(
                topic,
                key=record.key,
                value=record.value,
                headers=[*record.headers, (MOVED, self._origin_header((origin, record.offset)))],
            )
            for record, origin, topic, _ in batch
        ]
        results = await asyncio.gather(*appends, return_exceptions=True)
        for (_, origin, _, index), result in zip(batch, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            offset_map = self._offset_maps[origin]
            offset_map.numbers[index], offset_map.moved_to[index] = result.partition, result.offset

    async def _store(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders, original: Original) -> None:
        self._require_commits({})
        await self._target.append(
            topic, key=key, value=value, headers=[*headers, (MOVED, self._origin_header(original))]
        )

    def _origin_header(self, original: Original) -> bytes:
        return b"%b %b %d" % (self._id, original[0].encode(), original[1])

    def _moved(self, topic: str, unfinished: int | None = None) -> Moved:
        count = len(self._offset_maps[topic].offsets)
        return Moved(topic, count, count if unfinished is None else unfinished)

    # After everything is moved.

    def _require_commits(self, expected: Commits) -> None:
        """Raise UsageError if the target has other commits than these."""
        for (group, topic), commits in self._committed.items():
            for number, commit in commits.items():
                if expected.get((group, topic), {}).get(number) != commit:
                    raise UsageError(
                        f"{group}: expected only the commits of this move, got another one of {topic}/{number}: a "
                        "gateway was started there, or the old one has continued since a complete move; "
                        f"{self._advice}"
                    )

    async def _compare(self, names: Iterable[str]) -> None:
        """Read the moved records back, and compare them.

        Raises LogUnavailableError if one is missing or differs.
        """
        seen: dict[str, int] = defaultdict(int)
        for topic in names:
            for number, bounds in (await self._target.bounds(topic)).items():
                partition = Partition(topic, number)
                self._bounds[partition] = bounds
                if topic == self._topics.dedupe:
                    continue  # no delivery depends on it
                async for records in self._target.scan(partition, *bounds):
                    for record in records:
                        origin = self._compared(partition, record)
                        if origin is not None:
                            seen[origin] += 1
                    self._done += len(records)
                    self._show(self._done, f"comparing {topic}")
        for topic, offset_map in self._offset_maps.items():
            if seen[topic] != len(offset_map.offsets):
                raise LogUnavailableError(
                    f"{topic}: expected {len(offset_map.offsets)} records moved, found {seen[topic]}"
                )

    def _compared(self, partition: Partition, record: Record) -> str | None:
        """Return the topic that a record was moved from; None if it is to be ignored, which is recorded."""
        original = self._origin(record)
        self._latest[partition] = max(self._latest[partition], int(record.appended_at * 1000))
        if original is None:
            raise UsageError(
                f"{partition.topic}/{partition.number}@{record.offset}: expected no other writer meanwhile, got "
                f"another record; stop the writer; {self._advice}"
            )
        topic, offset = original
        offset_map = self._offset_maps[topic]
        index = offset_map.index(offset)
        if index is None:
            self._ended_since[partition].append(record.offset)
            return None
        where = offset_map.topics[index], offset_map.numbers[index], offset_map.moved_to[index]
        if where != (partition.topic, partition.number, record.offset):
            self._duplicates[partition].append(record.offset)
            return None
        headers = [(name, text) for name, text in record.headers if name != MOVED]
        if _digest(record.key, record.value, headers) != offset_map.digests[index]:
            raise LogUnavailableError(f"{topic}@{offset}: expected the moved record to be the same, got another one")
        return topic

    async def _commits(self, events: Iterable[str]) -> Commits:
        """Return commits that let each group continue where it was; records after the comparison are unfinished.

        Raises UsageError if no commit can express that.
        """
        commits: dict[tuple[str, str], dict[int, Commit]] = {}
        for topic in events:
            offset_map = self._offset_maps[topic]
            for group, commit in (await self._groups(topic)).items():
                unfinished: dict[int, list[int]] = {number: [] for number in range(self._partitions[topic])}
                for index, offset in enumerate(offset_map.offsets):
                    if not commit.covers(offset):
                        unfinished[offset_map.numbers[index]].append(offset_map.moved_to[index])
                commits[group, topic] = {
                    number: self._commit_of(offsets, Partition(topic, number)) for number, offsets in unfinished.items()
                }
        for topic in self._tiers:
            for number in range(self._partitions[topic]):
                partition = Partition(topic, number)
                void = self._ended_since[partition] + self._duplicates[partition]
                if void:
                    live = sorted(set(range(*self._bounds[partition])).difference(void))
                    far = [offset for offset in self._duplicates[partition] if live and offset >= live[0] + WINDOW]
                    self._twice[topic] += len(far)
                    commits.setdefault((self._router, topic), {})[number] = self._commit_of([*live, *far], partition)
        for partition, duplicates in self._duplicates.items():
            if partition.topic in (self._topics.parked, self._topics.dead):
                self._twice[partition.topic] += len(duplicates)
        return commits

    async def _commits_of(self, of_pairs: Mapping[str, Pair], events: Collection[str]) -> Commits:
        """Return commits that let each ordered route continue where it was, and recognise duplicates."""
        commits: dict[tuple[str, str], dict[int, Commit]] = {}
        for topic, pair in of_pairs.items():
            group, offset_map = self._topics.ordered_group(*pair), self._offset_maps[topic]
            commit = (await self._source.committed(group, topic)).get(0, Commit(0))
            unfinished: dict[int, list[int]] = {number: [] for number in range(self._partitions[topic])}
            for index, offset in enumerate(offset_map.offsets):
                if not commit.covers(offset) and offset not in self._source_duplicates[topic]:
                    unfinished[offset_map.numbers[index]].append(offset_map.moved_to[index])
            furthest: dict[Partition, Furthest] = {}
            for name in events:
                last = self._seen[topic].furthest(Partition(name, 0))
                if last is not None:
                    ends = self._offset_maps[name].ends(last.offset + 1, range(self._partitions[name]))
                    there = {Partition(name, number): end - 1 for number, end in ends.items() if end}
                    furthest |= {each: Furthest(offset, self._latest[each]) for each, offset in there.items()}
            of_topic = commits[group, topic] = {}
            for number, offsets in unfinished.items():
                moved = self._commit_of(offsets, Partition(topic, number))
                room = (COMMIT_BYTES - len(moved.done)) // ROW.size
                of_topic[number] = moved._replace(metadata=metadata_of(dict(list(furthest.items())[:room])))
        return commits

    def _commit_of(self, unfinished: Sequence[int], partition: Partition) -> Commit:
        """Return a commit that covers a partition except these offsets, the first of which is the lowest."""
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
                    f"{partition.topic}/{partition.number}@{offset}: expected completed records within {WINDOW} of "
                    f"the first unfinished one, got one beyond; {self._advice}"
                )
            bits |= 1 << (offset - base)
        return Commit(base, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))

    async def _commit(self, names: Collection[str], commits: Commits) -> None:
        """Commit, so that each group continues where it was."""
        self._require_commits(commits)
        for (group, topic), of_topic in commits.items():
            await self._target.seed(group, {Partition(topic, number): commit for number, commit in of_topic.items()})
        # Commits that another run made first are kept.
        self._committed = await self._commits_there(names)
        self._require_commits(commits)
        for topic in names:
            for number, (_, end) in (await self._target.bounds(topic)).items():
                _, compared = self._bounds[Partition(topic, number)]
                if end > compared:
                    raise UsageError(
                        f"{topic}/{number}@{compared}: expected no other writer meanwhile, got another record, which "
                        "is unfinished; the whole log was moved: start the gateway once you know who wrote it"
                    )

    async def _other_topics(self) -> list[str]:
        """Return the source's topics that have records and weren't moved."""
        left = sorted(set(await self._source.topics()).difference(self._partitions))
        bounds = {topic: (await self._source.bounds(topic)).values() for topic in left}
        return [topic for topic in left if any(start < end for start, end in bounds[topic])]


def _origin_of_delivery(record: Record) -> Origin | None:
    """Return the event's record from which a delivery was derived, as its route does: None if it can't be decoded."""
    try:
        decode_delivery(record)
    except NewerRecordError:
        pass
    except UndecodableRecordError:
        return None
    return origin_of(record)


def _digest(key: bytes, value: bytes, headers: RecordHeaders) -> int:
    digest = blake2b(b"%d %d " % (len(key), len(value)) + key, digest_size=8)
    digest.update(value)
    for name, text in headers:
        digest.update(f"{len(name)} {len(text)} {name}".encode())
        digest.update(text)
    return int.from_bytes(digest.digest(), "big")
