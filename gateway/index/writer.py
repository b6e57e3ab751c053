"""Writes what was read of the event log into the index, with how far it was read, in one transaction.

What can't be decoded is counted and skipped (a router dead-letters it). What a newer version wrote is left out until
that version recreates the file.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple, TypeVar

import structlog

from gateway.engine.control.records import DeadLetterProperties, partition_key
from gateway.engine.control.state import Control
from gateway.index import hidden
from gateway.index.deliveries import AttemptRow, Deliveries, resolution
from gateway.index.duplicates import Ended, LetThrough, NewDuplicates
from gateway.index.file import IndexFile, IndexOutdatedError
from gateway.index.notes import Note, noted, write_note
from gateway.index.partitions import Part, Partitions, Settlement
from gateway.index.segments import Known, NewEvent, Segments
from gateway.index.settlement import AttemptOutcome, DeliveryKey, DeliveryRow
from gateway.index.statuses import Status
from gateway.index.terms import terms_of
from gateway.index.traffic_counts import TrafficCounts
from gateway.log.attempt_records import AttemptRecord, decode_attempt_record
from gateway.log.base import Partition, Record
from gateway.log.records import (
    DEDUPE_ENTRY,
    StoredDelivery,
    decode_dedupe_entries,
    decode_delivery,
    decode_event,
    fingerprint,
)
from gateway.log.topics import DAY
from gateway.model import Event, NewerRecordError, UndecodableRecordError, identity_of, result_label
from gateway.turns import give_way, taking_turns

T = TypeVar("T")
logger = structlog.get_logger(__name__)

MAX_DETAIL = 300
"""Characters of a message that are kept; the record has all of it."""
RECORD_RETENTION = 7 * DAY
"""Seconds for which the log keeps a delivery's record, done or not, in addition to the delay of its tier."""
MERGE_SECONDS = 0.1
"""Seconds after which merging closed segments ends, in each commit."""


class Kind(StrEnum):
    """What the records of a topic are, as far as the index is concerned."""

    EVENTS = "events"
    RETRY = "retry"
    ORDERED = "ordered"
    PARKED = "parked"
    DEAD = "dead"
    DEDUPE = "dedupe"
    ATTEMPTS = "attempts"
    CONTROL = "control"


STATUS_OF_LAST_RECORD = {
    Kind.RETRY: Status.RETRYING,
    Kind.ORDERED: Status.PENDING,
    Kind.PARKED: Status.PARKED,
    Kind.DEAD: Status.DEAD,
}
"""The kinds of deliveries' records, and what a delivery is while one of them is its last."""


class LeftOut(StrEnum):
    """Why a record isn't in the index."""

    UNDECODABLE = "undecodable"
    NEWER = "newer"
    TOO_OLD = "too_old"
    """It is older than the horizon of the index."""
    WITHOUT_EVENT = "without_event"
    """It is an attempt for an event that isn't in the index."""
    DELETED = "deleted"
    """The log had deleted it before it was read."""


class Writer:
    """The writing side of an open file. Not thread-safe: the loop's thread may read `parts`, `complete_to`, `left_out`.

    Raises IndexUnavailableError, after which `roll_back` continues from what was committed.
    """

    def __init__(self, file: IndexFile, loop: asyncio.AbstractEventLoop, *, days: float, max_bytes: int) -> None:
        self._file = file
        self._loop = loop
        self._connection = file.writer
        self._deliveries = Deliveries(self._connection)
        self._let_through = LetThrough(self._connection)
        self.control = Control()
        self._log_starts: dict[Partition, int] = {}
        self._resolutions = 0
        self._is_control_changed = True
        self._redactions: hidden.Redactions = {}
        self.left_out: Counter[LeftOut] = Counter()
        """How many records aren't in the index, since this was made."""
        self._uncommitted: Counter[LeftOut] = Counter()
        with file.errors():
            self._segments = Segments(self._connection, days=days, max_bytes=max_bytes)
            self._partitions = Partitions(self._connection)
            self._counts = TrafficCounts(self._connection, days=days, max_bytes=max_bytes)
            self._duplicates = NewDuplicates(self._connection, self._let_through)
            self.complete_to = self._noted_to = noted(self._connection, Note.COMPLETE_TO)
        self._touched = {part.id for part in self.parts.values()}

    @property
    def parts(self) -> Mapping[Partition, Part]:
        """What is read. It changes while a method runs: other threads iterate over a copy (`tuple(parts)`)."""
        return self._partitions.parts

    # The partitions.

    def begin_partition(self, partition: Partition, topic_id: str, position: int) -> None:
        """Start indexing a new partition at an offset."""
        with self._working():
            self._partitions.begin(partition, topic_id, position)

    def forget_partition(self, partition: Partition, kind: Kind) -> None:
        """Forget a partition whose topic is gone, with its events."""
        with self._working():
            part = self._partitions.forget(partition)
            if kind is Kind.EVENTS:
                deleted = self._segments.forget_partition(part.id)
                self._counts.add_events([(source, at, -count, -size) for source, at, count, size in deleted])
                self._let_through.forget(partition_key(partition))
            self._deliveries.forget_partition(part.id)
            self._log_starts.pop(partition, None)

    def note_topic_id(self, partition: Partition, topic_id: str) -> None:
        """Store the id of a topic, which wasn't known before."""
        with self._working():
            self._partitions.note_topic_id(partition, topic_id)

    def skip(self, partition: Partition, position: int, *, is_deleted: bool) -> None:
        """Continue at an offset: the log has no records before it, or no longer has them."""
        with self._working():
            if is_deleted:
                self._uncommitted[LeftOut.DELETED] += position - self.parts[partition].position
            self._partitions.move(partition, position)

    def hide(self, redactions: hidden.Redactions) -> None:
        """From now on, don't index the fields that the rules redact.

        Raises IndexOutdatedError if the file may already have some that only now are redacted.
        """
        with self._working():
            if self.parts and (more := hidden.sources_that_hide_more(self._connection, redactions)):
                raise IndexOutdatedError(f"the rules hide more now of what came from {', '.join(more[:5])}")
            hidden.note(self._connection, redactions)
            self._redactions = redactions

    # Records.

    def index(self, partition: Partition, kind: Kind, records: Sequence[Record], position: int, now: float) -> None:
        """Index a partition's next records; `position` is the offset of the one after them."""
        with self._working():
            part = self.parts[partition].id
            self._segments.forget_before(now)
            self._counts.forget_before(now)
            if kind is Kind.EVENTS:
                self._add_events(part, records)
            elif kind is Kind.DEDUPE:
                self._add_entries(records)
            elif kind is Kind.ATTEMPTS:
                self._add_attempts(part, records)
            else:
                self._add_deliveries(partition, part, kind, records)
            self._partitions.move(partition, position, _us(records[-1].appended_at))

    def follow_control(self, records: Sequence[Record]) -> None:
        """Apply records of the control topic, which is read from its beginning by each process."""
        for record in records:
            self._is_control_changed = True
            try:
                self.control.decode_and_apply(record.key, record.value, record.offset, record.appended_at)
            except UndecodableRecordError:
                self.left_out[LeftOut.UNDECODABLE] += 1  # also if the transaction is rolled back: it isn't read again
            except NewerRecordError:
                self.left_out[LeftOut.NEWER] += 1

    def forget_control(self) -> None:
        """Start over with a control topic that was recreated."""
        self.control.forget_offsets()
        self._is_control_changed = True

    def _decoded(self, records: Iterable[Record], decode: Callable[[Record], T]) -> Iterator[tuple[Record, T]]:
        """Yield the records that can be decoded, each with its content, and give way before each; count the others."""
        for record in records:
            give_way()
            try:
                decoded = decode(record)
            except UndecodableRecordError:
                self._uncommitted[LeftOut.UNDECODABLE] += 1
            except NewerRecordError:
                self._uncommitted[LeftOut.NEWER] += 1
            else:
                yield record, decoded

    def _add_events(self, part: int, records: Sequence[Record]) -> None:
        events = [
            self._new_event(event, part, record.offset, _us(record.appended_at) // 1000)
            for record, event in self._decoded(records, decode_event)
        ]
        kept = [
            (each.source, each.received // 1_000_000, 1, each.size) for each in events if self._segments.takes(each)
        ]
        self._counts.add_events(kept)
        self._uncommitted[LeftOut.TOO_OLD] += self._segments.add(events)
        if events:
            self._partitions.add_unsettled(part, records[-1].offset, events[0].at)

    def _add_entries(self, records: Sequence[Record]) -> None:
        offsets: defaultdict[str, list[int]] = defaultdict(list)
        of_partitions = [record for record in records if b"/" in record.key]  # others were appended to learn the time
        for record, entries in self._decoded(of_partitions, decode_dedupe_entries):
            name = record.key.decode("utf-8", "replace")
            offsets[name] += [offset for _, _, offset, _ in DEDUPE_ENTRY.iter_unpack(entries.rows)]
        for name, its in offsets.items():
            self._let_through.add(name, its)

    def _add_deliveries(self, partition: Partition, part: int, kind: Kind, records: Sequence[Record]) -> None:
        stored = list(self._decoded(records, decode_delivery))
        keys = [_identity(each.delivery.event.id, each.delivery.event.received_at) for _, each in stored]
        stand_ins = dict[tuple[str, int], Known]()  # events of which only a delivery's record was read
        found, attempts = list[DeliveryRow](), list[AttemptRow]()
        for (record, each), key, known in zip(stored, keys, self._segments.find(keys), strict=True):
            event = known or stand_ins.get(key)
            if event is None:
                at = min(key[1], _us(record.appended_at)) // 1000
                new = self._new_event(each.delivery.event, 0, 0, at)
                event = self._segments.add_stand_in(new)
                if event is None:
                    self._uncommitted[LeftOut.TOO_OLD] += 1
                    continue
                stand_ins[key] = event
            delivery_key = DeliveryKey(event.event, each.delivery.id, _us(each.delivery.replayed_at))
            row = self._row_of(partition, kind, record, each, delivery_key)
            found.append(row)
            attempts += self._attempts_of(each, row)
        self._deliveries.add(found, attempts, is_ordered=kind is Kind.ORDERED)
        self._touched.add(part)

    def _row_of(
        self, partition: Partition, kind: Kind, record: Record, stored: StoredDelivery, key: DeliveryKey
    ) -> DeliveryRow:
        """Return what a delivery's record says."""
        delivery, metadata = stored.delivery, stored.metadata
        status, reason = STATUS_OF_LAST_RECORD[kind], metadata.spill_reason
        if kind is Kind.RETRY and not delivery.attempts:
            status = Status.PENDING
        elif kind is Kind.PARKED:
            reason = metadata.paused_name
            if self.control.has_scanned(f"pause/{reason}", partition, record.offset, record.appended_at):
                status = Status.DONE
        elif kind is Kind.DEAD:
            reason = metadata.dead_reason
            letter = DeadLetterProperties(
                id=delivery.id,
                route=delivery.route,
                destination=delivery.destination,
                reason=reason,
                at=record.appended_at,
            )
            status = resolution(self.control, letter, partition, record.offset) or status
        last = delivery.attempts[-1] if delivery.attempts else None
        return DeliveryRow(
            key=key,
            route=delivery.route,
            destination=delivery.destination,
            item=-1 if delivery.part is None else delivery.part.number,
            status=status,
            decided=_us(record.appended_at),
            partition=self.parts[partition].id,
            offset=record.offset,
            successor=delivery.successor,
            attempts=0 if last is None else last.number,
            result="" if last is None else result_label(last),
            reason=_valid(reason),
            detail=self._detail(metadata.detail, delivery.event),
            due=_us(delivery.due),
            letter=_valid(reason) if kind is Kind.DEAD else "",
            lane=self._counts.lane(delivery.event.source, delivery.route, delivery.destination),
            began=key.replayed or _us(delivery.event.received_at),
        )

    def _add_attempts(self, part: int, records: Sequence[Record]) -> None:
        decoded = list(self._decoded(records, decode_attempt_record))
        events = self._segments.find([_identity(each.event_id, each.received_at) for _, each in decoded])
        found = list[tuple[AttemptRow, DeliveryRow, AttemptOutcome]]()
        for (record, attempt), event in zip(decoded, events, strict=True):
            if event is None:
                self._uncommitted[LeftOut.WITHOUT_EVENT] += 1
                continue
            lane = self._counts.lane(attempt.source, attempt.route, attempt.destination)
            found.append(_rows_of(attempt, event, _Place(part, record.offset), lane))
            self._touched.add(event.partition)
        self._deliveries.add_attempts(found)

    def _new_event(self, event: Event, part: int, offset: int, at: int) -> NewEvent:
        redaction = self._redactions.get(event.source)
        seen = hidden.seen(event, redaction)
        terms = terms_of(seen, redaction)
        has_identity = identity_of(event.id) is not None
        return NewEvent(
            at=at,
            partition=part,
            offset=offset,
            id=event.id,
            source=event.source,
            type=_valid(seen.type),
            key=None if seen.key is None else _valid(seen.key),
            received=_us(event.received_at),
            size=len(event.body),
            is_cut=terms.is_cut,
            content=int.from_bytes(fingerprint(event), "big") >> 1 if has_identity else 0,
            terms=terms.text,
        )

    def _attempts_of(self, stored: StoredDelivery, row: DeliveryRow) -> list[AttemptRow]:
        """Return the attempts in a delivery's record."""
        return [
            AttemptRow(
                key=row.key,
                number=attempt.number,
                at=_us(attempt.at),
                took=_us(attempt.seconds),
                result=attempt.result,
                status=attempt.status or 0,
                decision="",
                detail=self._detail(attempt.detail, stored.delivery.event),
                partition=0,
                offset=0,
                lane=row.lane,
            )
            for attempt in stored.delivery.attempts
        ]

    def _detail(self, detail: str, event: Event) -> str:
        redaction = self._redactions.get(event.source)
        return _valid(hidden.seen_detail(detail, event, redaction)[:MAX_DETAIL])

    def note(self, note: Note, at: float) -> None:
        """Note a time in the file."""
        with self._working():
            write_note(self._connection, note, at)
            if note is Note.COMPLETE_TO:
                self._noted_to = at

    # Transactions.

    def settle(self, settlements: Mapping[Partition, Settlement], kinds: Mapping[Partition, Kind], now: float) -> None:
        """Apply commits. Everything that had been appended when they were fetched has to be indexed before."""
        with self._working():
            for partition, settlement in settlements.items():
                if partition not in self.parts:
                    continue
                is_of_events, before = kinds[partition] is Kind.EVENTS, self.parts[partition].coverage
                if is_of_events:
                    self._forget_entries(partition, settlement.log_start)
                    unsure_before = 0
                else:  # the log deletes what is done there, but also what is older than that
                    settlement, unsure_before = settlement._replace(log_start=0), _us(max(0.0, now - RECORD_RETENTION))  # noqa: PLW2901
                coverage = self._partitions.advance(partition, settlement)
                part = self.parts[partition]
                if coverage is not None and is_of_events:
                    ended = Ended(partition_key(partition), part.id, before, coverage)
                    self._counts.add_duplicates(self._duplicates.found(ended, self._segments.numbers()))
                if coverage is None and part.id not in self._touched:
                    continue
                assert part.coverage is not None
                self._deliveries.settle(part.id, part.coverage, unsure_before)
                self._touched.discard(part.id)
            if self._is_control_changed:
                self._deliveries.resume(self.control, self._numbered(kinds, Kind.PARKED))
                self._deliveries.resolve(self.control, self._resolutions, self._numbered(kinds, Kind.DEAD))
                self._resolutions, self._is_control_changed = self.control.resolutions, False

    def _forget_entries(self, partition: Partition, log_start: int) -> None:
        """Forget the dedupe entries of events that the log no longer has."""
        if log_start > self._log_starts.get(partition, 0):
            self._log_starts[partition] = log_start
            self._let_through.forget(partition_key(partition), log_start)

    def _numbered(self, kinds: Mapping[Partition, Kind], kind: Kind) -> dict[int, Partition]:
        return {part.id: partition for partition, part in self.parts.items() if kinds.get(partition) is kind}

    def commit(self, now: float) -> None:
        """Keep the index within its bounds, and end the transaction."""
        with self._working():
            dropped = 0
            self._counts.forget_before(now)
            while self._segments.is_beyond_bounds(now):
                dropped += self._segments.drop_oldest()
            self._counts.add_up()
            self._segments.merge_some(MERGE_SECONDS)
            self._file.check()
            self._connection.execute("COMMIT")
            self.complete_to = self._noted_to  # no search sees it before
            if dropped:
                before = datetime.fromtimestamp(self._segments.horizon / 1000, UTC).isoformat(timespec="seconds")
                logger.info("index_events_dropped", path=str(self._file.path), count=dropped, before=before)
            self.left_out.update(self._uncommitted)
            self._uncommitted.clear()

    def roll_back(self) -> None:
        """Roll back, and reload from the file what was committed."""
        with self._file.errors():
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            self._uncommitted.clear()
            self._log_starts.clear()  # what was forgotten is back
            self._segments.load()
            self._partitions.load()
            self._counts.load()
            self.complete_to = self._noted_to = noted(self._connection, Note.COMPLETE_TO)
            self._touched = {part.id for part in self.parts.values()}
            self._resolutions, self._is_control_changed = 0, True

    def size(self) -> int:
        """Return the bytes of the file that are used."""
        with self._file.errors():
            return self._segments.bytes_used()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Work in the transaction, in turns with the event loop."""
        with self._file.errors(), taking_turns(self._loop):
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN IMMEDIATE")
            yield


class _Place(NamedTuple):
    """Where a record is: its partition's number in the index."""

    partition: int
    offset: int


def _us(seconds: float) -> int:
    """Return a time as the index has it, in microseconds."""
    return round(seconds * 1e6)


def _identity(event_id: str, received_at: float) -> tuple[str, int]:
    """Return what tells an event from others: events with the same id were received at different times."""
    return event_id, _us(received_at)


def _rows_of(
    attempt: AttemptRecord, event: Known, at: _Place, lane: int
) -> tuple[AttemptRow, DeliveryRow, AttemptOutcome]:
    """Return an attempt, a provisional row for its delivery, and what the attempt decides."""
    key = DeliveryKey(event.event, attempt.delivery_id, _us(attempt.replayed_at))
    result = attempt.result.value if attempt.status is None else str(attempt.status)
    outcome = AttemptOutcome(attempt.number, _us(attempt.at + attempt.seconds), result, attempt.decision)
    row = AttemptRow(
        key=key,
        number=attempt.number,
        at=_us(attempt.at),
        took=_us(attempt.seconds),
        result=attempt.result,
        status=attempt.status or 0,
        decision=attempt.decision or "",
        detail=_valid(attempt.detail[:MAX_DETAIL]),
        partition=at.partition,
        offset=at.offset,
        lane=lane,
    )
    first = DeliveryRow(
        key=key,
        route=attempt.route,
        destination=attempt.destination,
        item=-1 if attempt.item is None else attempt.item,
        status=Status.RETRYING if event.partition else Status.UNKNOWN,
        decided=outcome.ended,
        partition=event.partition,
        offset=event.offset,
        successor=-1,
        lane=lane,
        began=key.replayed or _us(attempt.received_at),
    )
    return row, first, outcome


def _valid(text: str) -> str:
    """Return a text as valid UTF-8: a sender's invalid bytes become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
