"""What is in a spool, and whether all of it can be read, for operators."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.log.base import Partition, Record
from gateway.log.embedded.unreadable_records import Unreadable
from gateway.log.records import decode_event
from gateway.model import UnreadableRecordError
from gateway.spool.counting import count
from gateway.spool.records import decode
from gateway.spool.store import FileStore
from gateway.spool.topic_move import TopicMove
from gateway.spool.waiting import Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicReport:
    """What a spool has for a topic of the log. `oldest` is when the first event was stored (Unix seconds)."""

    topic: str
    events: int
    bytes: int
    oldest: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What of a topic was read: events, and what is no event any more.

    `tried` is how many of the events may be in the log already. `unreadable` are offsets in damaged pages, and
    `undecodable` (offset, why) records that are there and no events.
    """

    topic: str
    events: int
    tried: int
    unreadable: Sequence[Unreadable]
    undecodable: Sequence[tuple[int, str]]

    @property
    def lost(self) -> int:
        return sum([each.end - each.start for each in self.unreadable])


async def list_spool(store: FileStore) -> list[TopicReport]:
    """Return what isn't moved yet, by topic."""
    waiting = Waiting()
    await count(store, waiting)
    return [
        TopicReport(topic=topic, events=records, bytes=size, oldest=oldest)
        for topic, records, size, oldest in waiting.by_topic()
        if records
    ]


async def verify_spool(store: FileStore) -> list[Verified]:
    """Read every event that isn't moved yet, around what is damaged."""
    found = []
    for topic in sorted(await store.topics()):
        move, end = TopicMove.after(topic, await store.moved(topic)), await store.end(topic)
        start, events, tried = move.base, 0, 0
        unreadable: list[Unreadable] = []
        undecodable: list[tuple[int, str]] = []
        while start < end:
            records, start, lost = await store.read(topic, start, end)
            unreadable += [each for each in lost if move.waits(each.start)]
            for record in decode([each for each in records if move.waits(each.offset)]):
                try:
                    decode_event(Record(record.offset, record.spooled_at, record.key, record.value, record.headers))
                except UnreadableRecordError as error:
                    undecodable.append((record.offset, str(error)))
                else:
                    events += 1
                    tried += record.tried_at is not None
        if events or unreadable or undecodable:
            found.append(
                Verified(topic=topic, events=events, tried=tried, unreadable=unreadable, undecodable=undecodable)
            )
    return found


def name_of(topic: str, offset: int) -> str:
    """Return how a record of a spool is named."""
    partition = Partition(topic, 0)
    return f"{partition.topic}/{partition.number}/{offset}"
