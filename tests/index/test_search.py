"""Searches, compared with looking through all events one by one."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.index import segments
from gateway.index.event_numbers import id_key
from gateway.index.index import Index, open_index
from gateway.index.results import IndexedEvent
from gateway.index.statuses import Status
from gateway.log.attempt_records import Decision
from gateway.model import Event, Result, event_id
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

WORDS = ("alpha", "Beta", "gamma-ray", "acme/app", "x1", "é", "Straße", "to be", "a.b@c.d", "42", "7.5")
ROUTES, DESTINATIONS = ("build", "announce"), ("ci", "chat", "mirror")
PUNCTUATION = ".,;:!?()[]{}<>\"'`\u2018\u2019\u201c\u201d«»…¿¡"


class Told:
    """What a test has written of an event, to compare answers with."""

    def __init__(self, event: Event, body: dict[str, Any], identity: str) -> None:
        self.event = event
        self.body = body
        self.identity = identity
        self.summaries: set[tuple[str, str, Status]] = set()


def leaves(value: object, path: str = "body") -> Iterator[tuple[str, str]]:
    match value:
        case dict():
            for key, each in value.items():
                yield from leaves(each, f"{path}.{key}")
        case list():
            for each in value:
                yield from leaves(each, path)
        case None | bool():
            yield path, "null" if value is None else str(value).lower()
        case _:
            yield path, str(value)


def pieces(told: Told) -> set[str]:
    found = set[str]()
    for _, text in leaves(told.body):
        if text not in ("null", "true", "false"):
            folded = text.casefold()
            found |= {piece.strip(PUNCTUATION) for piece in folded.split()} | set(re.findall(r"\w+", folded))
    return found


def fits(value: str, pattern: str) -> bool:
    value, pattern = value.casefold(), pattern.casefold()
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def holds(told: Told, condition: str) -> bool:
    """Return whether a condition, as the tests write them, holds for an event."""
    if condition.startswith("-"):
        return not holds(told, condition[1:])
    name, colon, text = condition.partition(":")
    values = [value.strip('"') for value in (text.split(",") if name != "key" else [text])]
    event = told.event
    if not colon:
        return any(fits(piece, condition) for piece in pieces(told))
    if name.startswith("body."):
        return any(path == name and fits(value, text.strip('"')) for path, value in leaves(told.body))
    own = {"source": event.source, "type": event.type, "key": event.key, "id": event.id, "identity": told.identity}
    found = own[name]
    return found is not None and any(fits(found, value) for value in values)


def matches(told: Told, query: list[str]) -> bool:
    of_deliveries = [each for each in query if re.match("-?(route|destination|status):", each)]
    if not all(holds(told, each) for each in query if each not in of_deliveries):
        return False

    def is_one(summaries: tuple[str, str, Status], conditions: list[str]) -> bool:
        values = dict(zip(("route", "destination", "status"), summaries, strict=True))
        return all(values[each.partition(":")[0]] in each.partition(":")[2].split(",") for each in conditions)

    wanted = [each for each in of_deliveries if not each.startswith("-")]
    unwanted = [each[1:] for each in of_deliveries if each.startswith("-")]
    return (not wanted or any(is_one(each, wanted) for each in told.summaries)) and not any(
        is_one(each, [condition]) for each in told.summaries for condition in unwanted
    )


async def store_fate(company: Company, told: Told, route: str, destination: str, fate: str | None) -> None:
    """Store what becomes of a delivery."""
    to: dict[str, Any] = {"route": route, "destination": destination}
    match fate:
        case "dead":
            await company.die(told.event, **to)
        case "parked":
            await company.park(told.event, f"destination/{destination}", **to)
        case "retrying":
            await company.retry(told.event, "5h", **to)
        case "delivered":
            await company.attempt(told.event, **to)
        case "dropped":
            failure: dict[str, Any] = {"result": Result.CLIENT_ERROR, "status": 400, "decision": Decision.DROPPED}
            await company.attempt(told.event, **to, **failure)
        case _:
            return
    told.summaries.add((route, destination, Status(fate)))


async def a_history(company: Company, chosen: Random, count: int) -> list[Told]:
    """Store events with bodies and fates drawn at random, in the order of their appends."""
    history = []
    for number in range(count):
        body = {
            "name": chosen.choice(WORDS),
            "labels": chosen.sample(WORDS, chosen.randrange(3)),
            "customer": {"id": chosen.randrange(5), "note": " ".join(chosen.choices(WORDS, k=3))},
            "is_open": chosen.choice([True, False, None]),
        }
        event, partition, offset = await company.event(
            source=chosen.choice(["github", "stripe"]),
            type=chosen.choice(["push", "pull.opened", "pull.closed"]),
            key=chosen.choice([None, "acme/app", "acme/shop"]),
            body=body,
        )
        told = Told(event, body, f"delivery {number + 1}")
        is_done = chosen.random() < 0.7
        for route, destination in product(ROUTES, DESTINATIONS):
            fate = chosen.choice([None, None, None, "dead", "parked", "retrying", "delivered", "dropped"])
            await store_fate(company, told, route, destination, fate)
        if not is_done:
            told.summaries.add(("", "", Status.PENDING))
        elif not told.summaries:
            told.summaries.add(("", "", Status.DONE))
        history.append(told)
        if is_done:
            commits = await company.log.committed(company.topics.group("router"), partition.topic)
            before = commits.get(partition.number)
            bits = 0 if before is None else int.from_bytes(before.done, "little")
            await company.commit(partition, 0, (bits | 1 << offset).to_bytes(64, "little"))
    return history


def a_query(chosen: Random) -> list[str]:
    """Draw some conditions."""
    drawn = [
        lambda: f"source:{chosen.choice(['github', 'stripe', 'github,stripe', 'git*', 'nobody'])}",
        lambda: f"type:{chosen.choice(['push', 'pull.*', 'PULL.opened', 'pull.opened,push', 'x'])}",
        lambda: f"key:{chosen.choice(['acme/app', 'acme/*', 'none'])}",
        lambda: f"body.customer.id:{chosen.randrange(6)}",
        lambda: f'body.name:"{chosen.choice(WORDS)}"',
        lambda: f"body.labels:{chosen.choice(['alpha', 'bet*', 'x1'])}",
        lambda: f"body.is_open:{chosen.choice(['true', 'false', 'null'])}",
        lambda: chosen.choice(
            ["alpha", "BETA", "acme", "acme/app", "gam*", "ray", "é", "strasse", "be", "c.d", "7", "zz"]
        ),
        lambda: f"status:{chosen.choice(list(Status))}",
        lambda: f"status:{chosen.choice(['dead', 'pending'])},{chosen.choice(['done', 'parked'])}",
        lambda: f"route:{chosen.choice([*ROUTES, 'build,announce', 'none'])}",
        lambda: f"destination:{chosen.choice([*DESTINATIONS, 'ci,chat'])}",
        lambda: f'identity:"delivery {chosen.randrange(1, 60)}"',
    ]
    return [chosen.choice(["", "", "", "-"]) + chosen.choice(drawn)() for _ in range(chosen.randrange(4))]


async def all_found(index: Index, text: str, limit: int) -> list[IndexedEvent]:
    found: list[IndexedEvent] = []
    cursor = None
    while True:
        page = await index.search(text, limit=limit, cursor=cursor)
        assert len(page.events) <= limit
        found += page.events
        if (cursor := page.cursor) is None:
            return found


@pytest.mark.timeout(300)
@pytest.mark.rotated(share=1 / 2)
@pytest.mark.parametrize("part", range(4))
async def test_a_search_finds_what_looking_through_all_events_finds(
    path: Path, monkeypatch: pytest.MonkeyPatch, part: int, *, is_full: bool
) -> None:
    """Over several segments, and with as many queries as there is time for."""
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 17)
    chosen = Random(part)
    company = await Company.found(MemoryLog(now=Ticking()))
    history = await a_history(company, chosen, 120)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        for _ in range(1000 if is_full else 80):
            query = a_query(chosen)
            text = " ".join(query)
            expected = [told.event.id for told in reversed(history) if matches(told, query)]
            found = await all_found(index, text, chosen.choice([1, 7, 50]))
            assert [event.id for event in found] == expected, text
        for event in await all_found(index, "", 50):
            told = next(each for each in history if each.event.id == event.id)
            assert set(event.summaries) == told.summaries


async def test_what_an_identity_is_in_each_source_is_looked_up_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thousands of sources it takes longer than a page may, and there are segments and pages."""
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 3)
    company = await Company.found(MemoryLog(now=Ticking()))
    same = event_id("github", "again")
    for number in range(12):
        await company.event(source=("github", "stripe")[number % 2], **({} if number % 2 else {"id": same}))
    calls = Counter[str]()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls[function.__name__] += 1
            return function(*given)

        return call

    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        monkeypatch.setattr("gateway.index.conditions.event_id", counted(event_id))
        monkeypatch.setattr("gateway.index.candidates.id_key", counted(id_key))
        assert len(await all_found(index, "identity:again", 1)) == 6
        assert calls == {"event_id": 2, "id_key": 2}


async def test_a_search_that_takes_too_long_says_where_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.index.search.FIRST_CANDIDATES", 2)
    monkeypatch.setattr("gateway.index.search.SECONDS", 0.0)
    company = await Company.found(MemoryLog(now=Ticking()))
    events = [(await company.event())[0] for _ in range(9)]
    await company.die(events[0])
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        pages = [page := await index.search("-status:pending", limit=2)]
        while page.cursor is not None:
            pages.append(page := await index.search("-status:pending", limit=2, cursor=page.cursor))
        assert sum(page.is_cut_short for page in pages) >= 3
        assert [page.searched_to for page in pages] == sorted([page.searched_to for page in pages], reverse=True)


async def test_a_search_that_finds_nothing_takes_no_longer_than_one_that_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the segment in which its time is over, whether that had something or not."""
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 17)
    monkeypatch.setattr("gateway.index.search.SECONDS", 0.0)
    company = await Company.found(MemoryLog(now=Ticking()))
    async with open_index(path, company.log, company.topics) as index:
        events = []
        for _ in range(4):
            events += [(await company.event())[0] for _ in range(17)]
            await index.refresh()
        for query, expected in (("source:* -source:*", []), (f"id:{events[-1].id}", [events[-1].id])):
            pages = [page := await index.search(query)]
            while page.cursor is not None:
                pages.append(page := await index.search(query, cursor=page.cursor))
            assert [page.is_cut_short for page in pages] == [*[True] * (len(pages) - 1), False]
            assert len(pages) == 4 + len(expected)
            assert [event.id for page in pages for event in page.events] == expected
            assert len({page.searched_to for page in pages}) == len(pages)
