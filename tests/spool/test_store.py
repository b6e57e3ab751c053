"""The spool's file: what it keeps over a crash, and around damage."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry

from gateway.log.base import Commit, TopicSpec
from gateway.log.records import encode_event, event_key
from gateway.model import LogUnavailableError
from gateway.spool.counting import count
from gateway.spool.mover import Mover
from gateway.spool.report import list_spool, verify_spool
from gateway.spool.store import FileStore
from gateway.spool.topic_move import Doubt, TopicMove
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics
from tests.builders import an_event
from tests.memory_log import MemoryLog

TOPIC = "gateway.events.github"


async def fill(store: FileStore, count: int, *, size: int = 600, topic: str = TOPIC, mark: bytes = b"") -> None:
    for number in range(count):
        event = an_event(id=f"{number:032x}", body=mark + b"%05d" % number + b"x" * size)
        await store.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))


async def test_what_is_stored_is_there_for_the_next_owner_until_it_is_moved(tmp_path: Path) -> None:
    store = await FileStore.open(tmp_path / "spool.db", owner=True)
    await fill(store, 5)
    with pytest.raises(LogUnavailableError, match="in use by another gateway"):
        await FileStore.open(tmp_path / "spool.db", owner=True)
    assert await store.delete(TOPIC, [2]) == []
    await store.commit({TOPIC: Commit(1, metadata=b"1.0 3 ")})
    await store.close()
    store = await FileStore.open(tmp_path / "spool.db", owner=True)
    assert await store.moved(TOPIC) == Commit(1, metadata=b"1.0 3 ")
    assert (await store.ends(), await store.left()) == ({TOPIC: 5}, {TOPIC: 5})
    waiting = Waiting()
    await count(store, waiting)
    assert waiting.records == 3
    reader = await FileStore.open(tmp_path / "spool.db", owner=False)
    [row] = await list_spool(reader)
    assert (row.topic, row.events) == (TOPIC, 3)
    assert row.bytes > 3 * 600
    await reader.close()
    await store.delete_below(TOPIC, 5)
    await store.give_back()
    assert (await store.read(TOPIC, 0, 5))[0] == []
    assert await list_spool(store) == []
    assert (await store.end(TOPIC), await store.left()) == (5, {})
    await store.close()


async def test_the_space_of_what_is_moved_is_free_again_while_more_is_moved(tmp_path: Path) -> None:
    store = await FileStore.open(tmp_path / "spool.db", owner=True)
    await asyncio.gather(*[fill(store, 50, size=40_000) for _ in range(10)])
    size = (tmp_path / "spool.db").stat().st_size
    for start in range(0, 400, 100):
        await store.delete(TOPIC, range(start, start + 100))
    await store.give_back()
    await store._log.write(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    assert (tmp_path / "spool.db").stat().st_size < size / 2
    assert [record.offset for record in (await store.read(TOPIC, 0, 500))[0]][:2] == [400, 401]
    await store.close()


async def test_nobody_else_may_read_the_spool(tmp_path: Path) -> None:
    store = await FileStore.open(tmp_path / "spool.db", owner=True)
    await fill(store, 1)
    for name in ("spool.db", "spool.db-wal", "spool.db-shm"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    await store.close()


async def test_damaged_pages_lose_what_is_in_them_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    store = await FileStore.open(path, owner=True)
    await fill(store, 200)
    await fill(store, 3, topic="gateway.events.other")
    await store.close()  # everything is in the file now
    damage(path, page=12)
    store = await FileStore.open(path, owner=True)
    [one, other] = await verify_spool(store)
    assert (other.topic, other.events, other.lost) == ("gateway.events.other", 3, 0)
    assert one.lost > 0
    assert one.events == 200 - one.lost
    lost = {offset for each in one.unreadable for offset in range(each.start, each.end)}
    assert "malformed" in one.unreadable[0].reason
    waiting = Waiting()
    await count(store, waiting)
    assert waiting.records == 203
    found, start = set[int](), 0
    while start < 200:
        records, start, _ = await store.read(TOPIC, start, 200)
        found |= {record.offset for record in records}
    assert found == set(range(200)) - lost
    kept = await store.delete(TOPIC, range(200))
    assert lost <= set(kept)  # and neighbours, where pages would have to be merged
    assert len(kept) < 150
    await store.give_back()
    assert await store.left() == {TOPIC: 200, "gateway.events.other": 3}
    await store.append(TOPIC, key=b"k", value=b"v", headers=[])  # at its end, it is whole, and it can still be used
    await store.close()


async def moved_around_damage(path: Path, topics: Sequence[str], timeout: float = 20.0) -> tuple[MemoryLog, Metrics]:
    """Have a process move a spool's file; it has to move, or to tell that it is lost, all of it."""
    log, metrics, waiting = MemoryLog(), Metrics(CollectorRegistry()), Waiting()
    await log.create([TopicSpec(name=topic, partitions=1, retention=None) for topic in topics])
    store = await FileStore.open(path, owner=True)
    await count(store, waiting)
    mover = Mover(log=log, store=store, waiting=waiting, metrics=metrics, logger=structlog.get_logger())
    running = asyncio.create_task(mover.run())
    try:
        async with asyncio.timeout(timeout):
            while waiting.records:  # noqa: ASYNC110 - it is the mover that goes on
                await asyncio.sleep(0.05)
    finally:
        running.cancel()
        await asyncio.wait({running})
        await store.close()
    return log, metrics


@pytest.mark.parametrize("damaged", range(3))
async def test_a_damaged_page_with_the_oldest_events_of_a_topic_keeps_no_others_back(
    tmp_path: Path, damaged: int
) -> None:
    path, topics = tmp_path / "spool.db", [f"gateway.events.{name}" for name in "abc"]
    store = await FileStore.open(path, owner=True)
    for topic in topics:
        await fill(store, 60, topic=topic, size=900, mark=topic.encode())
    await store.close()
    damage(path, page=page_of(path, topics[damaged].encode() + b"00000x"))
    log, metrics = await moved_around_damage(path, topics)
    moved = sum(len(log.records(topic)) for topic in topics)
    assert 0 < metrics.spool_lost.value <= 20
    assert moved + metrics.spool_lost.value == 180
    again, metrics = await moved_around_damage(path, topics)
    assert (sum(len(again.records(topic)) for topic in topics), metrics.spool_lost.value) == (0, 0)


@pytest.mark.parametrize("marks", [(b"m00000x",), (b"m00000x", b"m00030x")], ids=["the first", "another, too"])
async def test_what_an_earlier_process_has_moved_is_deleted_around_damaged_pages(
    tmp_path: Path, marks: Sequence[bytes]
) -> None:
    path = tmp_path / "spool.db"
    store = await FileStore.open(path, owner=True)
    await fill(store, 90, size=900, mark=b"m")
    await store.close()
    for page in {page_of(path, mark) for mark in marks}:
        damage(path, page=page)
    store = await FileStore.open(path, owner=True)
    await store.delete_below(TOPIC, 80)
    left = await kept(store)
    assert left[-10:] == list(range(80, 90))
    assert len(left) <= 10 + 6 * len(marks), "but for those beside a damaged page, which SQLite would have to change"
    await store.close()


async def kept(store: FileStore) -> list[int]:
    """Return the offsets of the records that can be read."""
    found, start = list[int](), 0
    while start < 90:
        records, start, _ = await store.read(TOPIC, start, 90)
        found += [record.offset for record in records]
    return found


async def test_what_is_dropped_is_not_looked_at_again_where_it_cannot_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    store = await FileStore.open(path, owner=True)
    await fill(store, 60, mark=b"m")
    await fill(store, 2, topic="gateway.events.other")
    await store.close()
    damage(path, page=page_of(path, b"m00000x"))
    store = await FileStore.open(path, owner=False)
    await store.drop(TOPIC, await store.end(TOPIC))
    [row] = await list_spool(store)
    assert (row.topic, row.events) == ("gateway.events.other", 2)
    assert await store.dropped(TOPIC) == 60
    await store.close()
    log, metrics = await moved_around_damage(path, [TOPIC, "gateway.events.other"])
    assert (len(log.records(TOPIC)), metrics.spool_lost.value) == (0, 0)


async def test_what_is_in_doubt_stays_so_where_more_was_dropped_than_was_moved(tmp_path: Path) -> None:
    store = await FileStore.open(tmp_path / "spool.db", owner=True)
    await fill(store, 9)
    await store.commit({TOPIC: Commit(1, metadata=b"5.0 7 8-9")})
    await store.drop(TOPIC, 3)
    move = TopicMove.after(TOPIC, await store.moved(TOPIC))
    assert (move.base, move.doubt, move.until, move.gone) == (3, Doubt(5.0, 7), 7, [(8, 9)])
    await store.drop(TOPIC, 7)
    move = TopicMove.after(TOPIC, await store.moved(TOPIC))
    assert (move.base, move.doubt, move.until, move.gone) == (7, None, 7, [(8, 9)])
    await store.close()


async def test_without_its_notes_of_what_was_moved_all_is_looked_for_and_moved(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    store = await FileStore.open(path, owner=True)
    await fill(store, 5)
    await store.commit({TOPIC: Commit(1, metadata=b"noted")})
    await store.close()
    damage(path, page=page_of(path, b"noted".hex().encode()))
    log, metrics = await moved_around_damage(path, [TOPIC])
    assert (len(log.records(TOPIC)), metrics.spool_lost.value) == (5, 0)


async def test_a_spool_that_is_damaged_where_it_is_written_says_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    store = await FileStore.open(path, owner=True)
    await fill(store, 60, mark=b"m")
    await store.close()
    damage(path, page=page_of(path, b"m00059x"))
    store = await FileStore.open(path, owner=True)
    with pytest.raises(LogUnavailableError, match="malformed"):
        await fill(store, 1)
    with pytest.raises(LogUnavailableError, match="gateway spool move") as raised:
        await fill(store, 1)
    assert "gateway restore" not in str(raised.value)
    await store.close()


def page_of(path: Path, text: bytes) -> int:
    """Return the number of the page that has a text."""
    return path.read_bytes().index(text) // 8192 + 1


def damage(path: Path, *, page: int, size: int = 8192) -> None:
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(os.urandom(size))
