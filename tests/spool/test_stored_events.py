"""What the log has of the events that were appended without an answer."""

from dataclasses import replace

from gateway.log.base import Partition, TopicSpec
from gateway.log.records import encode_event, event_key
from gateway.model import Event
from gateway.spool.records import digest_of
from gateway.spool.stored_events import find_stored
from tests.builders import an_event
from tests.memory_log import MemoryLog

TOPIC = "gateway.events.github"


def digest(event: Event) -> bytes:
    return digest_of(event_key(event), event.body, encode_event(event))


async def test_an_event_with_the_id_of_another_one_is_another_one() -> None:
    """Senders may give one id to different events, also of one request, and all are delivered; so is a resent one."""
    log = MemoryLog()
    await log.create([TopicSpec(name=TOPIC, partitions=1, retention=None)])
    first = an_event(received_at=1000.0)
    second = replace(first, received_at=1000.000001)
    await log.append(TOPIC, key=event_key(first), value=first.body, headers=encode_event(first))
    await log.append(TOPIC, key=b"clock", value=b"", headers=[])
    same = [replace(first, body=b"{}2"), replace(first, key="k"), replace(first, query="a=1")]
    digests = {digest(event) for event in (first, second, *same)}
    assert len(digests) == 5
    found, end = await find_stored(log, Partition(TOPIC, 0), digests, since=0.0)
    assert (found, end) == ({digest(first)}, 2)


async def test_what_a_partition_has_is_found_though_its_end_went_back() -> None:
    """After an unclean election, what was stored since is below the offset that was the next one."""
    log = MemoryLog()
    await log.create([TopicSpec(name=TOPIC, partitions=1, retention=None)])
    event = an_event()
    await log.append(TOPIC, key=event_key(event), value=event.body, headers=encode_event(event))
    digests = {digest(event)}
    found, end = await find_stored(log, Partition(TOPIC, 0), digests, since=0.0, from_offset=9)
    assert (found, end) == (digests, 1)
