"""Reading the log backwards."""

from contextlib import aclosing

from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.dedupe.index import DedupeIndex, DedupeVerdict
from gateway.engine.jobs.log_reader import FIRST_PIECE, LARGEST_PIECE
from gateway.log.base import Partition, TopicSpec
from gateway.log.records import DEDUPE_ENTRY, decode_event, encode_event, fingerprint
from gateway.model import event_id, identity_of
from gateway.ops.log_search import newest_first, original_of
from tests.builders import an_event
from tests.memory_log import MemoryLog

TOPICS = [TopicSpec(name=name, partitions=3, retention=None) for name in ("one", "two")]


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        self.at += 1.0
        return self.at


async def a_log(count: int, *, size: int = 1) -> MemoryLog:
    log = MemoryLog(now=Clock())
    await log.create(TOPICS)
    for number in range(count):
        value = b"%d" % number + b" " * size
        await log.append(TOPICS[number % 2].name, key=b"%d" % (number % 7), value=value, headers=[])
    return log


async def values(log: MemoryLog, *topics: str, since: float | None = None) -> list[int]:
    return [int(found.record.value) async for found in newest_first(log, topics, since=since)]


async def test_the_newest_comes_first_over_all_partitions_and_topics() -> None:
    log = await a_log(20 * FIRST_PIECE)
    assert await values(log, "one", "two") == list(reversed(range(20 * FIRST_PIECE)))


async def test_a_topic_that_is_not_there_has_no_records() -> None:
    assert await values(await a_log(10), "none", "two") == [9, 7, 5, 3, 1]


async def test_older_records_are_left_out() -> None:
    log = await a_log(200)
    everything = [found async for found in newest_first(log, ["one", "two"])]
    since = everything[12].record.appended_at
    assert await values(log, "one", "two", since=since) == list(range(199, 186, -1))


async def test_a_few_records_cost_a_small_scan() -> None:
    """However long the log is, one page of it is read in one piece a partition."""
    log = await a_log(3000)
    scanned: list[int] = []
    scan = log.scan

    def counting(partition, start, end):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202 - as the one it stands before
        scanned.append(end - start)
        return scan(partition, start, end)

    log.scan = counting  # type: ignore[method-assign] # counts, and is the same otherwise
    async with aclosing(newest_first(log, ["one", "two"])) as history:
        assert int((await anext(history)).record.value) == 2999
    assert set(scanned) == {FIRST_PIECE}
    assert len(scanned) <= 6


async def test_large_records_are_read_in_small_pieces() -> None:
    log = await a_log(300, size=300_000)
    scanned: dict[Partition, list[int]] = {}
    scan = log.scan

    def counting(partition, start, end):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202 - as the one it stands before
        scanned.setdefault(partition, []).append(end - start)
        return scan(partition, start, end)

    log.scan = counting  # type: ignore[method-assign] # counts, and is the same otherwise
    assert await values(log, "one", "two") == list(reversed(range(300)))
    later = [size for sizes in scanned.values() for size in sizes[1:]]  # how large they are shows in the first piece
    assert later
    assert max(later) <= 4 < LARGEST_PIECE


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("ab"), st.sampled_from("xy")), max_size=30))
async def test_a_duplicate_is_what_dedupe_dropped_after_its_original(steps: list[tuple[int, str, str]]) -> None:
    clock = [1000.0]
    log = MemoryLog(now=lambda: clock[0])
    await log.create([TopicSpec(name="one", partitions=1, retention=None)])
    index, window = DedupeIndex(), 60.0
    delivered: set[int] = set()
    duplicates: set[int] = set()
    for offset, (wait, identity, body) in enumerate(steps):
        clock[0] += wait
        event = an_event(id=event_id("github", identity), body=body.encode())
        await log.append("one", key=b"", value=event.body, headers=encode_event(event))
        row = DEDUPE_ENTRY.pack(identity_of(event.id), fingerprint(event), offset, round(clock[0] * 1e6))
        is_copy = index.add(row, round(window * 1e6)) is DedupeVerdict.DUPLICATE
        (duplicates if is_copy else delivered).add(offset)
    async for found in newest_first(log, ["one"]):
        event = decode_event(found.record)
        original = await original_of(log, found, event, window)
        assert (original is not None) == (found.record.offset in duplicates)
        if original is not None:
            assert original.record.offset in delivered
            assert (decode_event(original.record).id, original.record.value) == (event.id, event.body)
