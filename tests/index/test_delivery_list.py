"""Lists of deliveries, compared with looking through all of them one by one; and by what they are found."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from itertools import count, pairwise, product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.index import search
from gateway.index.deliveries import COLUMNS
from gateway.index.delivery_query import WAITING, DeliveryQuery, statement_of
from gateway.index.index import Index, open_index
from gateway.index.query import QueryError
from gateway.index.results import DeliveryPage, ListedDelivery
from gateway.index.search import Searcher
from gateway.index.statuses import OPEN, Status
from gateway.log.attempt_records import Decision
from gateway.log.base import Partition, Record
from gateway.model import LogUnavailableError, Result
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

ROUTES, DESTINATIONS, SOURCES = ("build", "announce"), ("ci", "chat"), ("github", "stripe")
Told = tuple[str, str, str, str, Status]


async def a_company(count: int = 120) -> tuple[Company, list[Told]]:
    """Write events whose deliveries are in every state, and tell of each its event, source, targets and status."""
    random, told = Random(7), list[Told]()
    company = await Company.found(MemoryLog(now=Ticking()))
    for _ in range(count):
        event, *_ = await company.event(source=random.choice(SOURCES))
        for route, destination in random.sample([*product(ROUTES, DESTINATIONS)], random.choice((0, 1, 1, 2, 4))):
            to: dict[str, Any] = {"route": route, "destination": destination}
            match random.choice(("retry", "park", "die", "delivered", "dropped")):
                case "retry":
                    await company.retry(event, **to)
                    status = Status.RETRYING
                case "park":
                    await company.park(event, **to)
                    status = Status.PARKED
                case "die":
                    await company.die(event, **to)
                    status = Status.DEAD
                case "delivered":
                    await company.attempt(event, **to)
                    status = Status.DELIVERED
                case _:
                    failed: dict[str, Any] = {
                        "result": Result.CLIENT_ERROR,
                        "status": 400,
                        "decision": Decision.DROPPED,
                    }
                    await company.attempt(event, **to, **failed)
                    status = Status.DROPPED
            told.append((event.id, event.source, route, destination, status))
    return company, told


@pytest.fixture
async def indexed(tmp_path: Path) -> AsyncIterator[tuple[Index, list[Told]]]:
    company, told = await a_company()
    async with open_index(tmp_path / "index.db", company.log, company.topics) as index:
        await index.refresh()
        yield index, told
    await company.close()


def told_of(each: ListedDelivery) -> Told:
    delivery = each.delivery
    return each.event.id, each.event.source, delivery.route, delivery.destination, delivery.status


async def all_of(index: Index, query: DeliveryQuery, *, limit: int) -> list[ListedDelivery]:
    found, cursor = list[ListedDelivery](), None
    while True:
        page: DeliveryPage = await index.list_deliveries(query, limit=limit, cursor=cursor)
        assert len(page.deliveries) <= limit
        found += page.deliveries
        cursor = page.cursor
        if cursor is None:
            return found


async def test_a_list_has_all_that_it_is_for_the_newest_events_first_whatever_its_pages(
    indexed: tuple[Index, list[Told]],
) -> None:
    index, told = indexed
    order = {event: number for number, event in enumerate(dict.fromkeys([each[0] for each in told]))}
    statuses = (None, WAITING, frozenset({Status.DEAD}), frozenset({Status.DELIVERED, Status.PARKED}), frozenset(OPEN))
    for route, destination, source, which in product((None, "build"), (None, "ci"), (None, "stripe"), statuses):
        query = DeliveryQuery(route=route, destination=destination, source=source, statuses=which)
        expected = sorted(
            [
                each
                for each in told
                if source in (None, each[1])
                and route in (None, each[2])
                and destination in (None, each[3])
                and (which is None or each[4] in which)
            ]
        )
        for limit in (1, 7, 500):
            found = await all_of(index, query, limit=limit)
            assert sorted(map(told_of, found)) == expected, (query, limit)
            assert all(order[one.event.id] >= order[other.event.id] for one, other in pairwise(found))


@pytest.mark.parametrize("seconds_each", [0.0, 1.0], ids=["whole pages", "pages cut short"])
async def test_what_nobody_may_see_is_neither_listed_nor_where_a_list_goes_on(
    tmp_path: Path, seconds_each: float
) -> None:
    """However slow it is, and however many deliveries one event has, every list ends."""
    company, told = await a_company(count=700)
    large, *_ = await company.event(source="github")
    for number in range(700):
        await company.attempt(large, route=f"route-{number}")
    path = tmp_path / "index.db"
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        everything = await all_of(index, DeliveryQuery(), limit=500)
        others = {each.delivery.id for each in everything if each.event.id != large.id}
        clock = count(0.0, seconds_each)
        searcher = Searcher(index._file.reader, clock=lambda: next(clock))

        def sees(source: str, route: str, destination: str) -> bool:
            return (source, destination) == ("stripe", "ci") or route == "route-350"

        def pages(limit: int) -> tuple[list[ListedDelivery], list[str]]:
            found, named, cursor = list[ListedDelivery](), list[str](), None
            while True:
                page = searcher.list_deliveries(DeliveryQuery(sees=sees), limit=limit, cursor=cursor)
                found += page.deliveries
                if (cursor := page.cursor) is None:
                    return found, named
                named.append(cursor.delivery)

        expected = sorted([each for each in told if sees(each[1], each[2], each[3])])
        for limit in (1, 7, 500):
            found, named = await asyncio.to_thread(pages, limit)
            assert sorted([told_of(each) for each in found if each.event.id != large.id]) == expected, limit
            assert [each.delivery.route for each in found if each.event.id == large.id] == ["route-350"]
            unseen = {*named} - {"", *[each.delivery.id for each in found]}
            assert not unseen & others, "but where one event alone takes longer than a page"
    await company.close()


async def test_a_page_that_is_exactly_the_rest_has_an_empty_one_behind_it(indexed: tuple[Index, list[Told]]) -> None:
    index, told = indexed
    parked = len([each for each in told if each[4] is Status.PARKED])
    query = DeliveryQuery(statuses=frozenset({Status.PARKED}))
    for limit, is_more in ((parked + 1, False), (parked, True), (parked - 1, True)):
        page = await index.list_deliveries(query, limit=limit)
        assert (len(page.deliveries), page.cursor is not None) == (min(limit, parked), is_more), limit
        assert not page.is_cut_short
        if limit == parked:  # it doesn't look whether there are more
            after = await index.list_deliveries(query, limit=1, cursor=page.cursor)
            assert (after.deliveries, after.cursor) == ((), None)


async def test_nothing_has_a_name_that_is_no_text(tmp_path: Path) -> None:
    company, _ = await a_company(count=1)
    async with open_index(tmp_path / "index.db", company.log, company.topics) as index:
        await index.refresh()
        assert await index.event("\udcff") is None
        assert (await index.list_deliveries(DeliveryQuery(source="\udcff"))).deliveries == ()
        for query in (DeliveryQuery(route="\udcff"), DeliveryQuery(destination="\udcff", statuses=WAITING)):
            with pytest.raises(QueryError, match="expected text in UTF-8, got other bytes"):
                await index.list_deliveries(query)


async def test_of_what_couldnt_be_read_for_a_while_none_may_wait_once_it_is_done(tmp_path: Path) -> None:
    log = MemoryLog(now=Ticking())
    company = await Company.found(log)
    _, first, _ = await company.event()
    async with open_index(tmp_path / "index.db", log, company.topics) as index:
        await index.refresh()
        _, bad, last = await company.event()
        while bad == first:
            _, bad, last = await company.event()
        await company.commit(bad, last + 1)
        scan = log.scan

        def cut(partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
            if partition == bad:
                raise LogUnavailableError("its leader is gone")
            return scan(partition, start, end)

        log.scan = cut  # type: ignore[method-assign] # it goes while it is read
        assert bad in (await index.refresh()).unreadable
        log.scan = scan  # type: ignore[method-assign] # and comes back
        for number, (_, end) in (await log.bounds(bad.topic)).items():
            await company.commit(Partition(bad.topic, number), end)
        await index.refresh()
        assert {each.status for each in (await index.search("")).events} == {Status.DONE}
        assert (await index.list_deliveries(DeliveryQuery(statuses=WAITING))).unrecorded_since is None


async def test_a_list_ends_in_time_and_goes_on_from_there(tmp_path: Path) -> None:
    company, told = await a_company(count=400)
    path = tmp_path / "index.db"
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        ticks = iter(range(10**6))
        searcher = Searcher(index._file.reader, clock=lambda: float(next(ticks)))
        query = DeliveryQuery(source="nobody")

        def pages() -> int:
            count, cursor = 0, None
            while True:
                page = searcher.list_deliveries(query, limit=1, cursor=cursor)
                assert page.is_cut_short is (page.cursor is not None)
                count, cursor = count + 1, page.cursor
                if cursor is None:
                    return count

        assert await asyncio.to_thread(pages) == -(-len(told) // search.FIRST_CANDIDATES)
    await company.close()


async def test_what_waits_is_shown_with_its_reason_its_last_attempt_and_since_when(tmp_path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    first, *_ = await company.event(key="a", type="push")
    second, *_ = await company.event()
    third, *_ = await company.event()
    await company.retry(first)
    failed: dict[str, Any] = {"result": Result.SERVER_ERROR, "status": 503, "decision": Decision.RETRY}
    await company.attempt(first, number=1, **failed)
    await company.attempt(first, number=2, **failed)
    parked, *_ = await company.park(second)
    replayed_at = round(company.log.now(), 6)
    await company.carry(company.topics.retry("5h"), third, replayed_at=replayed_at)
    async with open_index(tmp_path / "index.db", company.log, company.topics) as index:
        await index.refresh()
        page = await index.list_deliveries(DeliveryQuery(destination="ci", statuses=WAITING))
    third_one, second_one, first_one = page.deliveries
    (attempt,) = first_one.delivery.attempts
    assert (attempt.number, attempt.status, attempt.partition is not None, first_one.tried) == (2, 503, True, 2)
    assert (first_one.event.id, first_one.event.key, first_one.event.type) == (first.id, "a", "push")
    assert first_one.since == pytest.approx(first.received_at, abs=1e-5)
    assert (second_one.delivery.reason, second_one.delivery.attempts, second_one.tried) == ("destination/ci", (), 0)
    assert second_one.since > second.received_at + 0.001
    assert third_one.since == pytest.approx(replayed_at, abs=1e-5)
    assert parked.id == second_one.delivery.id
    assert page.unrecorded_since is not None  # no event is done
    await company.close()


async def test_once_all_events_are_done_nothing_waits_unrecorded(tmp_path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    await company.event(key="same")
    _, partition, last = await company.event(key="same")
    await company.commit(partition, last + 1)
    async with open_index(tmp_path / "index.db", company.log, company.topics) as index:
        await index.refresh()
        assert await index.list_deliveries(DeliveryQuery()) == DeliveryPage(
            deliveries=(), cursor=None, is_cut_short=False, unrecorded_since=None
        )
        for limit in (0, 501):
            with pytest.raises(QueryError, match="limit: expected a number from 1 to 500"):
                await index.list_deliveries(DeliveryQuery(), limit=limit)
    await company.close()


async def test_no_list_sorts_or_goes_through_all_deliveries(indexed: tuple[Index, list[Told]]) -> None:
    """Each statement reads an index, or the table, in its order, and no more rows than it may return."""
    index, _ = indexed
    at = {"event": 1, "delivery": "", "replayed": 0, "count": 1}
    statuses = (None, WAITING, frozenset({Status.DELIVERED}), frozenset({Status.RETRYING}), frozenset({Status.DEAD}))
    for route, destination, which in product((None, "build"), (None, "ci"), statuses):
        query = DeliveryQuery(route=route, destination=destination, statuses=which)
        statement, parameters = statement_of(query, COLUMNS)
        plan = index._file.reader.execute(f"EXPLAIN QUERY PLAN {statement}", {**parameters, **at}).fetchall()
        steps = [step[-1] for step in plan]
        reads = [step for step in steps if re.match(r"(SEARCH|SCAN) deliveries\b", step)]
        assert reads
        assert all(step.startswith("SEARCH deliveries USING ") for step in reads), steps
        if len(reads) == 1:  # else the few rows that several of these yield are merged
            assert not [step for step in steps if "TEMP B-TREE" in step]


def test_the_waiting_of_a_destination_are_found_without_those_that_have_ended() -> None:
    statement, _ = statement_of(DeliveryQuery(destination="ci", statuses=WAITING), COLUMNS)
    assert statement.count("INDEXED BY open_by_destination WHERE is_open = 1") == len(WAITING)
    statement, _ = statement_of(DeliveryQuery(route="build", statuses=WAITING), COLUMNS)
    assert statement.count("INDEXED BY open_by_route WHERE is_open = 1") == len(WAITING)


def test_names_are_parameters() -> None:
    statement, parameters = statement_of(DeliveryQuery(destination="x' OR 1", route="y'"), COLUMNS)
    assert "x'" not in statement
    assert parameters == {"destination": "x' OR 1", "route": "y'"}
