"""What the next event has to know of the spool."""

import pytest

from gateway.log.base import Partition, partition_of
from gateway.spool.waiting import SLOTS, Waiting

TOPIC = "gateway.events.github"


def test_an_event_follows_what_waits_with_its_key() -> None:
    waiting = Waiting()
    assert not waiting.must_spool(TOPIC, b"a")
    waiting.add(TOPIC, b"a", 10, at=1.0)
    waiting.add(TOPIC, b"a", 10, at=2.0)
    assert waiting.must_spool(TOPIC, b"a")
    assert not waiting.must_spool(TOPIC, b"b")
    assert not waiting.must_spool("another", b"a")
    waiting.remove(TOPIC, b"a", 10)
    assert waiting.must_spool(TOPIC, b"a")
    waiting.remove(TOPIC, b"a", 10)
    assert not waiting.must_spool(TOPIC, b"a")
    assert (waiting.records, waiting.bytes, waiting.oldest) == (0, 0, None)


def test_a_closed_partition_closes_for_all_its_keys_until_it_is_open_or_nothing_waits() -> None:
    waiting, keys = Waiting(), [b"%d" % number for number in range(50)]
    assert not waiting.close(TOPIC, keys[0])  # nothing waits by which it would be seen to open
    waiting.add(TOPIC, keys[0], 1, at=1.0)
    waiting.set_partitions(TOPIC, 4)
    assert waiting.close(TOPIC, keys[0])
    assert not waiting.close(TOPIC, keys[0])
    closed = partition_of(keys[0], 4)
    assert [waiting.must_spool(TOPIC, key) for key in keys] == [partition_of(key, 4) == closed for key in keys]
    waiting.open(Partition(TOPIC, closed))
    assert [key for key in keys if waiting.must_spool(TOPIC, key)] == [keys[0]]
    waiting.close(TOPIC, keys[0])
    waiting.remove(TOPIC, keys[0], 1)
    waiting.clear(TOPIC, waiting.mark(TOPIC))
    assert not any(waiting.must_spool(TOPIC, key) for key in keys)
    waiting.add(TOPIC, keys[1], 1, at=1.0)
    assert [key for key in keys if waiting.must_spool(TOPIC, key)] == [keys[1]]


def test_with_more_partitions_all_are_open() -> None:
    waiting = Waiting()
    waiting.add(TOPIC, b"a", 1, at=1.0)
    waiting.close(TOPIC, b"a")
    assert waiting.must_spool(TOPIC, b"b")
    waiting.set_partitions(TOPIC, 3)
    assert not waiting.must_spool(TOPIC, b"b")
    assert waiting.must_spool(TOPIC, b"a")


def test_what_cannot_be_read_is_removed_from_the_counts_and_closes_nothing_for_ever() -> None:
    waiting = Waiting()
    waiting.add(TOPIC, b"a", 5, at=3.0)
    waiting.add(TOPIC, b"b", 7, at=4.0)
    waiting.lose(TOPIC, 1)
    assert (waiting.records, waiting.oldest) == (1, 3.0)
    waiting.remove(TOPIC, b"b", 7)
    assert (waiting.records, waiting.oldest) == (0, None)
    assert waiting.has(TOPIC)
    assert waiting.clear(TOPIC, waiting.mark(TOPIC)) == 0
    assert (waiting.bytes, waiting.has(TOPIC), waiting.must_spool(TOPIC, b"a")) == (0, False, False)


def test_what_is_too_large_and_cannot_be_read_is_neither() -> None:
    waiting = Waiting()
    waiting.add(TOPIC, b"a", 5, at=3.0)
    waiting.add(TOPIC, b"b", 7, at=4.0)
    waiting.set_aside(TOPIC, b"a")
    waiting.lose(TOPIC, 1, large=1)
    assert (waiting.records, waiting.large, waiting.must_spool(TOPIC, b"b")) == (1, 0, True)


def test_what_was_counted_by_itself_is_followed_as_all_else() -> None:
    waiting, found = Waiting(), Waiting()
    found.add(TOPIC, b"a", 5, at=3.0)
    found.add("gateway.events.other", b"b", 1, at=2.0)
    mark = waiting.mark(TOPIC)
    waiting.merge(TOPIC, found)
    assert waiting.mark(TOPIC) != mark
    assert (waiting.records, waiting.bytes, waiting.oldest) == (1, 5, 3.0)
    assert (waiting.must_spool(TOPIC, b"a"), waiting.must_spool(TOPIC, b"b")) == (True, False)
    waiting.remove(TOPIC, b"a", 5)
    assert (waiting.records, waiting.bytes, waiting.must_spool(TOPIC, b"a")) == (0, 0, False)


def test_what_is_too_large_is_counted_and_nothing_waits_for_it() -> None:
    waiting = Waiting()
    waiting.add(TOPIC, b"a", 5, at=3.0)
    waiting.add(TOPIC, b"a", 7, at=4.0)
    waiting.set_aside(TOPIC, b"a")
    waiting.set_oldest(TOPIC, 4.0)
    assert (waiting.must_spool(TOPIC, b"a"), waiting.large, waiting.oldest) == (True, 1, 4.0)
    waiting.remove(TOPIC, b"a", 7)
    assert (waiting.records, waiting.bytes, waiting.oldest) == (1, 5, None)
    assert (waiting.must_spool(TOPIC, b"a"), waiting.has(TOPIC)) == (False, True)
    waiting.add(TOPIC, b"a", 9, at=6.0)
    assert waiting.oldest == 6.0
    waiting.remove_large(TOPIC, 5)
    assert (waiting.records, waiting.bytes, waiting.large, waiting.must_spool(TOPIC, b"a")) == (1, 9, 0, True)


def test_what_is_too_large_is_counted_however_many_others_were_not() -> None:
    """An append that failed may have stored its record: that is moved, and wasn't counted."""
    waiting = Waiting()
    waiting.add(TOPIC, b"a", 5, at=1.0)
    waiting.set_aside(TOPIC, b"a")
    waiting.remove(TOPIC, b"b", 5)
    assert (waiting.records, waiting.large) == (1, 1)
    waiting.set_aside(TOPIC, b"b")
    assert (waiting.records, waiting.large) == (2, 2)
    assert waiting.clear(TOPIC, waiting.mark(TOPIC)) == 2
    assert (waiting.records, waiting.large, waiting.has(TOPIC)) == (0, 0, False)


def test_what_was_perhaps_stored_is_followed_until_all_is_moved() -> None:
    waiting = Waiting()
    waiting.begin(TOPIC, b"a", 5, at=1.0)
    assert waiting.mark(TOPIC) is None
    waiting.end(TOPIC, 5, is_stored=False)
    assert (waiting.records, waiting.bytes) == (0, 0)
    assert waiting.must_spool(TOPIC, b"a")
    mark = waiting.mark(TOPIC)
    waiting.begin(TOPIC, b"b", 5, at=2.0)
    waiting.end(TOPIC, 5, is_stored=True)
    waiting.clear(TOPIC, mark)  # of before the second one
    assert waiting.must_spool(TOPIC, b"b")
    assert waiting.records == 1
    waiting.remove(TOPIC, b"b", 5)
    waiting.remove(TOPIC, b"a", 5)  # it was stored after all
    assert (waiting.records, waiting.bytes, waiting.must_spool(TOPIC, b"a")) == (0, 0, False)


def test_a_million_keys_take_a_bounded_memory() -> None:
    waiting = Waiting()
    for number in range(20_000):
        waiting.add(TOPIC, b"%d" % number, 1, at=0.0)
    assert len(waiting._topics[TOPIC].slots) <= SLOTS


@pytest.mark.parametrize("at", [5.0, 6.0])
def test_the_oldest_is_told(at: float) -> None:
    waiting = Waiting()
    waiting.add("one", b"", 1, at=9.0)
    waiting.add("other", b"", 1, at=at)
    assert waiting.oldest == at
    waiting.set_oldest("other", 20.0)
    assert waiting.oldest == 9.0
    assert {topic: oldest for topic, _, _, oldest in waiting.by_topic()} == {"one": 9.0, "other": 20.0}
