"""What is in a spool, and whether all of it can be read, for operators."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.log.base import Record
from gateway.log.embedded.unreadable_records import Unreadable
from gateway.log.records import decode_event
from gateway.model import UnreadableRecordError
from gateway.spool.counting import count_topic
from gateway.spool.records import decode
from gateway.spool.store import FileStore
from gateway.spool.topic_move import TopicMove
from gateway.spool.waiting import Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicReport:
    """What a spool has for a topic of the log. `oldest` is when the first event was stored (Unix seconds).

    It covers offsets below `end`.
    """

    topic: str
    events: int
    bytes: int
    oldest: float | None
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found when a topic was read: events, and what can't be read as one.

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
    found = [await report_topic(store, topic, end) for topic, end in (await store.ends()).items()]
    return [each for each in found if each.events]


async def report_topic(store: FileStore, topic: str, end: int) -> TopicReport:
    """Return what of a topic isn't moved yet, below an offset."""
    waiting, move = Waiting(), TopicMove.after(topic, await store.moved(topic))
    move.aside.clear()  # records that are too large count as others do
    await count_topic(store, waiting, topic, end, move)
    return TopicReport(
        topic=topic, events=waiting.records, bytes=waiting.bytes, oldest=waiting.oldest_of(topic), end=end
    )


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


def record_name(topic: str, offset: int) -> str:
    """Return the name of a record of a spool."""
    return f"{topic}/0/{offset}"
