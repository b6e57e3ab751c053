"""What many ask for at once is read once, and nobody is told what another one may see.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
many at once, just after a start            one looks the rules over, all get an answer
readers with other limits                   their own counts, never another's
a reading that takes too long               whoever waits is told to ask again, and finds it then
a reading that fails                        is told to who waits, and not kept
counts of thousands of routes               searches and the thread that writes don't wait for them
"""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.access.principal import AccessRole
from gateway.api import backend as backend_module
from gateway.api import cache, traffic_readings
from gateway.api.cache import CacheByKey
from gateway.api.overview import Overview, overview_of
from gateway.api.problems import ApiError, Code
from gateway.api.shapes import Currency
from gateway.api.traffic_readings import Found, Limits, TrafficReadings
from gateway.index.file import IndexUnavailableError
from gateway.index.index import Index, Timed, open_index
from gateway.index.traffic import TrafficQuery
from gateway.rules.rules import Rules
from tests.api.conftest import World
from tests.index.company import Company

MANY = 20
CURRENT = Currency(complete_to=None, statuses_as_of=None, unread_records=0, problem=None)
ALL = Limits(None, None)
DAY = 86_400.0


async def test_many_who_ask_at_once_after_a_start_wait_for_one_look_at_the_rules(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0

    def counted(rules: Rules) -> Overview:
        nonlocal looked
        looked += 1
        return overview_of(rules)

    monkeypatch.setattr(backend_module, "overview_of", counted)
    for path in ("/destinations", "/findings", "/traffic", "/routes?traffic=true", "/dead-letters"):
        await asyncio.gather(*[world.ask("GET", path) for _ in range(MANY)])
    assert looked == 1


async def test_who_waits_too_long_for_a_turn_is_told_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "PATIENCE", 0.01)
    async with world.backend.turn(""), world.backend.turn(""):
        assert (await world.get("/dead-letters", 503))["code"] == "busy"
        await world.get("/destinations")


async def test_those_with_other_limits_get_their_own_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("github", "stripe", "stripe"):
        await world.company.event(source=source)
    await world.refresh()
    monkeypatch.setattr(cache, "QUICK", -1.0)
    monkeypatch.setattr(cache, "SHARE", 1e9)  # everything is kept

    async def received(**limits: frozenset[str]) -> int:
        world.become(AccessRole.VIEWER, **limits)
        return int((await world.get("/traffic"))["traffic"]["received"])

    for _ in range(2):
        assert await received(sources=frozenset({"github"})) == 1
        assert await received(sources=frozenset({"stripe"})) == 2
        assert await received(owners=frozenset({"payments"})) == 2
        assert await received() == 3


class Counter:
    """An index whose counts come when a test says so."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Timed[Found]]] = []

    def start_traffic(self, *_: object) -> asyncio.Future[Timed[Found]]:
        self.asked.append(asyncio.get_running_loop().create_future())
        return self.asked[-1]

    def tell(self, number: int, *, seconds: float, ended: float) -> None:
        self.asked[number].set_result(Timed({}, seconds, ended))


@dataclass
class Asked:
    """Counts that are asked for at a time."""

    counter: Counter
    readings: TrafficReadings
    now: float = 1000.0

    async def get(self, limits: Limits = ALL, **fields: Any) -> Found:
        query = replace(TrafficQuery(step=3600, since=0.0, until=DAY), **fields)
        found, _ = await self.readings.get(cast("Index", self.counter), query, CURRENT, limits, lambda _: {})
        return found


@pytest.fixture
def asked() -> Asked:
    made = Asked(Counter(), TrafficReadings(lambda: made.now))
    return made


async def test_counts_that_took_long_are_kept_for_nine_times_as_long(asked: Asked) -> None:
    waiting = [asyncio.create_task(asked.get()) for _ in range(MANY)]
    await asyncio.sleep(0)
    asked.counter.tell(0, seconds=2.0, ended=1000.0)
    await asyncio.gather(*waiting)
    asked.now = 1018.0
    await asked.get()
    assert len(asked.counter.asked) == 1
    asked.now = 1018.1
    for number in (1, 2):  # the first took so quickly that it isn't kept
        task = asyncio.create_task(asked.get())
        await asyncio.sleep(0)
        asked.counter.tell(number, seconds=0.01, ended=1018.1)
        await task


async def test_who_waits_too_long_for_counts_finds_them_later(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_readings, "PATIENCE", 0.01)
    for _ in range(2):
        with pytest.raises(ApiError) as raised:
            await asked.get()
        assert raised.value.code is Code.BUSY
    asked.counter.tell(0, seconds=30.0, ended=1000.0)
    await asked.get()
    assert len(asked.counter.asked) == 1


async def test_counts_that_cant_be_read_are_asked_for_anew(asked: Asked) -> None:
    task = asyncio.create_task(asked.get())
    await asyncio.sleep(0)
    asked.counter.asked[0].set_exception(IndexUnavailableError("the disk is full"))
    with pytest.raises(IndexUnavailableError):
        await task
    again = asyncio.create_task(asked.get())
    await asyncio.sleep(0)
    asked.counter.tell(1, seconds=1.0, ended=1000.0)
    await again


async def test_so_much_is_kept_and_no_more(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_readings, "MOST_KEPT", 60)
    for number, name in enumerate(("a", "b", "c", "d")):  # 25 steps each
        task = asyncio.create_task(asked.get(by="route", names=[name]))
        await asyncio.sleep(0)
        asked.counter.tell(number, seconds=9.0, ended=1000.0)
        await task
    await asked.get(by="route", names=["d"])
    first = asyncio.create_task(asked.get(by="route", names=["a"]))
    await asyncio.sleep(0)
    assert len(asked.counter.asked) == 5
    first.cancel()


async def test_searches_and_what_writes_dont_wait_for_counts(company: Company, tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def made(found: Mapping[str, object]) -> int:
        begun.set()
        assert may_end.wait(10)
        return len(found)

    async with open_index(tmp_path / "index.db", company.log, company.topics) as index:
        await company.event()
        await index.refresh()
        counting = index.start_traffic(TrafficQuery(step=3600, since=0.0, until=company.log.now()), None, made)
        await asyncio.to_thread(begun.wait, 60)
        await company.event()
        await index.refresh()
        assert len((await index.search("")).events) == 2
        may_end.set()
        assert (await counting).value == 1


async def test_what_pages_count_is_kept_by_who_sees_the_same() -> None:
    now, read = 0.0, list[str]()
    shared = CacheByKey[str](lambda: now)

    async def slow(who: str) -> str:
        nonlocal now
        now += 1.0
        read.append(who)
        await asyncio.sleep(0)
        return who

    for _ in range(2):
        found = await asyncio.gather(*[shared.get(who, partial(slow, who)) for who in ("ada", "eve", "ada")])
        assert found == ["ada", "eve", "ada"]
    assert read == ["ada", "eve"]
    now += 30.0
    await shared.get("ada", partial(slow, "ada"))
    assert read == ["ada", "eve", "ada"]


async def test_a_reading_that_fails_does_so_for_all_who_wait_and_is_not_kept() -> None:
    shared, may_end, read = CacheByKey[str](), asyncio.Event(), 0

    async def fails() -> str:
        nonlocal read
        read += 1
        await may_end.wait()
        raise ApiError(Code.LOG_UNAVAILABLE, "the log gave no answer")

    waiting = [asyncio.create_task(shared.get("status", fails)) for _ in range(MANY)]
    await asyncio.sleep(0)
    may_end.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert {each.code for each in found if isinstance(each, ApiError)} == {Code.LOG_UNAVAILABLE}
    assert (len(found), read) == (MANY, 1)
    with pytest.raises(ApiError):
        await shared.get("status", fails)
    assert read == 2


async def test_who_waits_too_long_for_anothers_reading_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.01)
    shared, may_end = CacheByKey[str](), asyncio.Event()

    async def slow() -> str:
        await may_end.wait()
        return "found"

    reading = asyncio.create_task(shared.get("status", slow))
    await asyncio.sleep(0)
    with pytest.raises(ApiError, match="what another request reads took longer"):
        await shared.get("status", slow)
    may_end.set()
    assert await reading == "found"


async def test_a_reading_whose_reader_has_left_is_begun_anew() -> None:
    shared, may_end = CacheByKey[int](), asyncio.Event()
    read = count()

    async def slow() -> int:
        number = next(read)
        await may_end.wait()
        return number

    first, second = [asyncio.create_task(shared.get("status", slow)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    may_end.set()
    assert await second == 1
