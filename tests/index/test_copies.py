"""Events that share an id, or are copies of each other: however many there are, one of them takes no longer.

What is compared are steps of SQLite's machine, which are the same on each computer.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from gateway.engine.control.records import partition_key
from gateway.index import duplicates, lookups, segments
from gateway.index.duplicates import Ended, LetThrough, NewDuplicates, Suspect
from gateway.index.file import open_to_read, rows
from gateway.index.index import open_index
from gateway.index.query import parse_query
from gateway.index.reading import index_to_read
from gateway.index.results import IndexedEvent
from gateway.index.search import Searcher
from gateway.index.segments import Segments
from gateway.index.settlement import CommitCoverage
from gateway.index.statuses import Status
from gateway.log.base import Partition
from gateway.log.records import DEDUPE_ENTRY, dedupe_entries_key, encode_dedupe_entries, fingerprint
from gateway.model import Event, event_id, identity_of
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

FEW, MANY = 100, 1000
ID = event_id("github", "always the same")


class Copies(NamedTuple):
    """What is in an index: some events, in one partition."""

    path: Path
    partition: Partition
    events: Sequence[Event]

    async def steps(self, work: Callable[[sqlite3.Connection], object]) -> int:
        """Return how many steps some work with the file takes."""
        return await asyncio.to_thread(self._steps, work)

    def _steps(self, work: Callable[[sqlite3.Connection], object]) -> int:
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.set_progress_handler(step, 1)
            work(connection)
        return count

    def ended(self, connection: sqlite3.Connection, since: int) -> Sequence[object]:
        """Return the duplicates among those that have ended, from an offset on, as the writing thread finds them."""
        select = "SELECT json_group_array(id) FROM partitions WHERE topic = ? AND number = ?"
        [number] = rows(connection, select, *self.partition)
        its = rows(connection, "SELECT json_group_array(id) FROM segments")
        ended = Ended(partition_key(self.partition), number, CommitCoverage(since), CommitCoverage(len(self.events)))
        return NewDuplicates(connection, LetThrough(connection)).found(ended, its)


async def let_through(company: Company, partition: Partition, event: Event, offset: int) -> None:
    """Store the dedupe entry of an event."""
    identity = identity_of(event.id)
    assert identity is not None
    row = DEDUPE_ENTRY.pack(identity, fingerprint(event), offset, round(company.log.now() * 1e6))
    headers = encode_dedupe_entries(event.source, 0)
    await company.log.append(company.topics.dedupe, key=dedupe_entries_key(partition), value=row, headers=headers)


async def copies(
    path: Path,
    count: int,
    *,
    have_one_content: bool = True,
    entry_of: int | None = 0,
    are_of_one_request: bool = False,
) -> Copies:
    """Index so many events: the last with an entry and an id of its own, the others with `ID`, one with an entry."""
    company = await Company.found(MemoryLog(now=Ticking()))
    at = {"received_at": round(company.log.now(), 6)} if are_of_one_request else {}
    events = list[Event]()
    for number in range(count - 1):
        body = b'{"n":%d}' % (0 if have_one_content else number)
        event, partition, offset = await company.event(id=ID, key="k", body=body, **at)
        events.append(event)
        if offset == entry_of:
            await let_through(company, partition, event, offset)
    other, partition, offset = await company.event(key="k")
    await let_through(company, partition, other, offset)
    await company.commit(partition, count)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
    return Copies(path, partition, [*events, other])


@pytest.mark.parametrize("have_one_content", [True, False])
async def test_a_page_takes_no_longer_however_many_have_one_id(tmp_path: Path, *, have_one_content: bool) -> None:
    """Of different contents, none has an entry: each may be a duplicate of those before it."""
    taken = list[int]()
    for count in (FEW, MANY):
        its = await copies(
            tmp_path / f"{count}.db",
            count,
            have_one_content=have_one_content,
            entry_of=0 if have_one_content else None,
        )

        def page(connection: sqlite3.Connection) -> None:
            found = Searcher(connection).search(parse_query("", now=0.0), limit=50, cursor=None).events
            expected = Status.DUPLICATE if have_one_content else Status.DONE
            assert [each.status for each in found] == [Status.DONE, *[expected] * 49]

        taken.append(await its.steps(page))
    assert taken[1] < 1.1 * taken[0]


@pytest.mark.parametrize("have_one_content", [True, False])
async def test_to_count_a_duplicate_takes_no_longer_however_many_copies_it_has(
    tmp_path: Path, *, have_one_content: bool
) -> None:
    taken = list[tuple[int, int]]()
    for count in (FEW, MANY):
        its = await copies(
            tmp_path / f"{count}.db",
            count,
            have_one_content=have_one_content,
            entry_of=0 if have_one_content else None,
        )

        def last(connection: sqlite3.Connection, its: Copies = its) -> None:
            assert len(its.ended(connection, len(its.events) - 11)) == (10 if have_one_content else 0)

        def all_of_them(connection: sqlite3.Connection, its: Copies = its) -> None:
            assert len(its.ended(connection, 0)) == (len(its.events) - 2 if have_one_content else 0)

        taken.append((await its.steps(last), await its.steps(all_of_them)))
    assert taken[1][0] < 1.1 * taken[0][0]
    assert taken[1][1] < 1.1 * MANY / FEW * taken[0][1]


async def test_copies_are_found_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without an entry aren't all read into memory, if they all came before dedupe was on."""
    its = await copies(tmp_path / "index.db", MANY, entry_of=MANY - 20)
    returned = list[int]()

    def counted(connection: sqlite3.Connection, statement: str, *parameters: object) -> list[object]:
        found = rows(connection, statement, *parameters)
        returned.append(sum([len(each) if isinstance(each, list) else 1 for each in found]))
        return found

    monkeypatch.setattr(duplicates, "PIECES", (2, 16, 512))
    monkeypatch.setattr(duplicates, "rows", counted)
    content = int.from_bytes(fingerprint(its.events[0]), "big") >> 1
    suspects = [Suspect(partition_key(its.partition), at, 1, ID, content) for at in range(MANY - 1)]

    def found() -> set[Suspect]:
        with closing(open_to_read(its.path)) as connection:
            [number] = rows(connection, "SELECT json_group_array(DISTINCT partition) FROM events_1")
            asked = [each._replace(partition=number) for each in suspects]
            return {each._replace(partition=1) for each in LetThrough(connection).duplicates(asked, [1])}

    assert await asyncio.to_thread(found) == set()  # none of the first 2 + 16 + 512 has an entry
    assert max(returned) <= 512
    monkeypatch.setattr(duplicates, "PIECES", (2, 16, MANY))
    assert await asyncio.to_thread(found) == set(suspects[MANY - 19 :])


@pytest.mark.parametrize("seed", range(20))
async def test_duplicates_are_those_with_an_earlier_copy_that_has_an_entry(
    path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 30)
    monkeypatch.setattr(segments, "ROWS_A_STATEMENT", 10)
    monkeypatch.setattr(duplicates, "PIECES", random.choice([(1, 100), (2, 5, 100), (100,)]))
    monkeypatch.setattr(duplicates, "READ_AT_ONCE", 100)
    company = await Company.found(MemoryLog(now=Ticking()))
    original, copied = dict[tuple[Partition, str, bytes], int](), dict[float, Status]()
    ends = dict[Partition, int]()
    has_entries = random.choice([0.02, 0.2, 0.7])
    for _ in range(100):
        fields = {"key": random.choice("ab"), "body": random.choice([b"1", b"2"])}
        event, partition, offset = await company.event(id=event_id("github", random.choice("cde")), **fields)
        ends[partition] = offset + 1
        of = partition, event.id, event.body
        is_copy = of in original
        if random.random() < has_entries:
            await let_through(company, partition, event, offset)
            original.setdefault(of, offset)
            is_copy = False
        copied[event.received_at] = Status.DUPLICATE if is_copy else Status.DONE
    for partition, end in ends.items():
        await company.commit(partition, end)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        found = (await index.search("", limit=200)).events
        assert {each.received_at: each.status for each in found} == copied
        assert len((await index.search("status:duplicate", limit=200)).events) == sum(
            [each is Status.DUPLICATE for each in copied.values()]
        )


async def test_an_event_takes_no_longer_however_many_have_its_id(tmp_path: Path) -> None:
    taken = list[list[int]]()
    for count in (3 * lookups.LAST_RECEIVED, 9 * lookups.LAST_RECEIVED):
        its = await copies(tmp_path / f"{count}.db", count, have_one_content=False)
        middle = its.events[count // 2]

        def newest(connection: sqlite3.Connection, its: Copies = its) -> None:
            [found] = Searcher(connection).events(ID, limit=1)
            assert found.received_at == its.events[-2].received_at

        def at_its_place(connection: sqlite3.Connection, its: Copies = its, at: int = count // 2) -> None:
            found = Searcher(connection).event_at(ID, its.partition, at)
            assert found is not None
            assert found.received_at == its.events[at].received_at

        def of_its_request(connection: sqlite3.Connection, middle: Event = middle) -> None:
            [found] = Searcher(connection).namesakes(ID, middle.received_at, 2)
            assert found.received_at == middle.received_at

        def of_its_record(connection: sqlite3.Connection, middle: Event = middle, at: int = count // 2) -> None:
            assert record_of(connection, middle) == at

        taken.append([await its.steps(work) for work in (newest, at_its_place, of_its_request, of_its_record)])
    for few, many in zip(*taken, strict=True):
        assert many < 1.1 * few


async def test_the_newest_with_an_id_are_those_that_were_appended_last(
    company: Company, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clocks of those that received them; of more than are looked at, those that were received last."""
    now = round(company.log.now(), 6)
    early = [(await company.event(id=ID, received_at=now - ago))[0] for ago in (0, 3, 1, 2)]
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        in_order = [each.received_at for each in reversed(early)]
        assert [each.received_at for each in await index.events(ID)] == in_order
        assert [each.received_at for each in await index.events(ID, limit=2)] == in_order[:2]
        monkeypatch.setattr(lookups, "LAST_RECEIVED", 2)
        assert [each.received_at for each in await index.events(ID)] == [now - 1, now]


async def test_an_event_is_found_at_its_position_among_those_with_its_id(company: Company, path: Path) -> None:
    stored = [await company.event(id=ID, body={"n": number}, key=str(number)) for number in range(12)]

    def read(position: str, id: str = ID) -> IndexedEvent | None:  # noqa: A002 - what it is
        with index_to_read(path) as reading:
            return reading.event(id, position)

    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        for event, partition, offset in stored:
            position = f"{partition_key(partition)}@{offset}"
            for found in (await index.event(position), await asyncio.to_thread(read, position)):
                assert found is not None
                assert (found.position, found.received_at) == (position, event.received_at)
            assert await asyncio.to_thread(read, position, event_id("github", "another")) is None
        assert await asyncio.to_thread(read, ID) is None


def record_of(connection: sqlite3.Connection, event: Event) -> int | None:
    """Return the offset of the event that a record is of which names this one."""
    found = Segments(connection, days=7, max_bytes=1 << 30).find([(event.id, round(event.received_at * 1e6))])[0]
    return None if found is None else found.offset


async def test_of_several_that_came_in_one_request_a_record_is_of_the_first(path: Path) -> None:
    its = await copies(path, 6, are_of_one_request=True)
    event = its.events[0]

    def look(connection: sqlite3.Connection) -> None:
        assert record_of(connection, event) == 0
        searcher = Searcher(connection)
        assert len(searcher.namesakes(ID, event.received_at, 2)) == 2
        assert len(searcher.namesakes(ID, event.received_at, 9)) == 5
        assert searcher.namesakes(ID, event.received_at + 0.001, 9) == []
        with index_to_read(path) as reading:
            assert reading.has_namesake(searcher.events(ID)[0])
            assert not reading.has_namesake(searcher.events(its.events[-1].id)[0])

    await its.steps(look)


async def test_what_a_record_is_of_takes_no_longer_however_many_came_in_one_request(tmp_path: Path) -> None:
    taken = list[int]()
    for count in (FEW, MANY):
        its = await copies(tmp_path / f"{count}.db", count, are_of_one_request=True)

        def look(connection: sqlite3.Connection, event: Event = its.events[0]) -> None:
            assert record_of(connection, event) == 0
            assert len(Searcher(connection).namesakes(ID, event.received_at, 2)) == 2

        taken.append(await its.steps(look))
    assert taken[1] < 1.1 * taken[0]
