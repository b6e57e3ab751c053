"""The live tail: each event once, in order, from where a listener was; and nobody who holds up the others.

what crosses                              what has to come of it
────────────────────────────────────────  ────────────────────────────────────────────────
a listener that comes back                goes on after the last that it was told
… to another process                      the same: the numbers are those of the log's times
a window with more than a page            all of it, in order
a window with nothing to tell             how far it is
an index that is behind                   nothing is told that something may precede
a leader whose clock is behind            what it stores is told
a listener that doesn't read              is told so and cut; the others go on
a role or token that ends                 the listener is cut
rules by which something isn't theirs     it isn't told any more
an index that is lost meanwhile           the same
"""

import asyncio
import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import ClientResponse
from typing_extensions import override

from gateway.access.principal import AccessRole, Principal
from gateway.api import event_stream, tail
from gateway.api.endpoints import BASE
from gateway.api.tail import SKEW, TailItem, tail_events
from gateway.index.event_numbers import SLOTS
from gateway.log.base import NewRecord, Partition, Position
from tests.api.answers import strict
from tests.api.conftest import RULES, World, rules_of, world_of
from tests.index.company import Company
from tests.index.conftest import Calendar
from tests.memory_log import MemoryLog

MANY = 20
"""Times in a row that a listener is told that there is no more, where something is to come."""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "POLL", 0.01)
    monkeypatch.setattr(tail, "SKEW", 0.0)  # one clock, which hardly goes on by itself


class Skewed(MemoryLog):
    """A log of which the leaders of odd partitions have a clock that is behind: its own is that of the others."""

    def __init__(self, clock: Calendar, behind: float) -> None:
        super().__init__(now=clock)
        self._behind = behind

    @override
    def _store(self, partition: Partition, new: NewRecord) -> Position:
        found = super()._store(partition, new)
        if partition.number % 2 == 0:
            return found
        records = self._state.segments[partition].records
        records[-1] = records[-1]._replace(appended_at=found.appended_at - self._behind)
        return found._replace(appended_at=records[-1].appended_at)


class Listener:
    """A listener, and what it was told."""

    def __init__(self, response: ClientResponse) -> None:
        self._response = response
        self.last = ""

    async def next(self) -> tuple[str, Any]:
        """Return what it is told next: the kind, and the data."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(20):
            while line := (await self._response.content.readline()).decode().rstrip("\n"):
                name, _, value = line.partition(": ")
                fields[name] = value
        assert fields, "the end of the stream"
        self.last = fields.get("id", self.last)
        return fields["event"], orjson.loads(fields["data"])

    async def events(self, number: int) -> list[str]:
        """Return the ids of the next events."""
        found: list[str] = []
        quiet = 0
        while len(found) < number:
            kind, data = await self.next()
            assert kind in ("event", "progress"), data
            if kind == "event":
                found.append(data["id"])
            quiet = quiet + 1 if kind == "progress" else 0
            assert quiet < MANY, "expected an event, got again and again that there is no more"
        return found


@asynccontextmanager
async def listening(world: World, query: str = "", **headers: str) -> AsyncIterator[Listener]:
    async with world.client.get(f"{BASE}/tail", params={"query": query}, headers=headers) as response:
        assert response.status == 200, await response.read()
        assert response.content_type == "text/event-stream"
        listener = Listener(response)
        if not headers:
            assert (await listener.next())[0] == "progress"
        yield listener


async def events(world: World, number: int, **fields: Any) -> list[str]:
    found = [str((await world.company.event(**fields))[0].id) for _ in range(number)]
    await world.refresh()
    return found


async def test_events_are_told_as_they_come_in_order(world: World) -> None:
    await events(world, 2)
    async with listening(world, "type:push") as listener:
        first = await events(world, 3)
        await events(world, 1, type="ping")
        second = await events(world, 2)
        assert await listener.events(5) == [*first, *second]
        kind, data = await listener.next()
        assert kind == "progress"
        assert data.keys() == strict()["components"]["schemas"]["Currency"]["properties"].keys()


async def test_a_listener_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "PAGE", 4)
    async with listening(world) as listener:
        stored = await events(world, 3)
        told = await listener.events(2)
        last = listener.last
    stored += await events(world, 20)
    async with listening(world, **{"Last-Event-ID": last}) as listener:
        told += await listener.events(21)
    assert told == stored


async def test_a_listener_that_catches_up_gets_on_however_little_there_is_to_tell(world: World) -> None:
    """Else one whose query matches seldom is cut before it was told anything, and begins again where it was."""
    await events(world, 1)
    assert world.index is not None
    end = math.floor(world.index.complete_to * 1000) * SLOTS - 1
    reached = list[int]()
    async with listening(world, "type:never", **{"Last-Event-ID": str(end - 600_000 * SLOTS)}) as listener:
        while not reached or reached[-1] < end:
            assert (await listener.next())[0] == "progress"
            reached.append(int(listener.last))
    assert reached[:10] == [end - (600_000 - tail.WIDEST * step) * SLOTS for step in range(1, 11)]


async def test_many_of_one_moment_are_all_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "PAGE", 3)
    async with listening(world) as listener:
        last = listener.last
    at = world.company.log.now() + 0.001
    world.company.log._now = lambda: at  # type: ignore[attr-defined]
    stored = [(await world.company.event())[0].id for _ in range(20)]
    world.company.log._now = lambda: at + 10  # type: ignore[attr-defined]
    await world.refresh()
    async with listening(world, **{"Last-Event-ID": last}) as listener:
        assert sorted(await listener.events(20)) == sorted(stored)


async def test_what_may_be_preceded_isnt_told_yet(world: World) -> None:
    """Of what was stored since the index looked last, others may come before it."""
    assert world.index is not None
    async with listening(world) as listener:
        stored = await events(world, 1)
        assert await listener.events(1) == stored
        reached = listener.last
        late = (await world.company.event())[0].id
        kind, data = await listener.next()
        assert (kind, data["complete_to"] is not None) == ("progress", True)
        assert int(listener.last) >= int(reached)
        await world.refresh()
        assert await listener.events(1) == [late]


@pytest.mark.parametrize(("behind", "has_shown"), [(0.2, False), (30.0, True)])
async def test_what_a_leader_stores_whose_clock_is_behind_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: float, *, has_shown: bool
) -> None:
    """Else it isn't told at all: its time is one that the listener has passed."""
    monkeypatch.setattr(tail, "SKEW", SKEW)
    clock = Calendar()
    company = await Company.found(Skewed(clock, behind))
    stored, told = list[str](), list[str]()

    async def store(count: int) -> None:
        stored.extend([str((await company.event())[0].id) for _ in range(count)])

    async with world_of(company, tmp_path) as world:
        await world.refresh()
        if has_shown:
            await store(24)  # each partition gets some
            await world.refresh()
        clock.now += behind + 2 * SKEW
        await world.refresh()
        stored.clear()
        anna = Principal(name="anna", role=AccessRole.READER, via="test")
        after = round((clock.now - behind) * 1000) * SLOTS
        async with aclosing(tail_events(world.backend, anna, after=after)) as tells:
            for _ in range(10):
                clock.now += 1.0
                await world.refresh()
                told += await _all_there_is(tells)
                clock.now += 0.05
                await store(4)
                clock.now += 0.45
                await store(4)
            for _ in range(2):
                clock.now += behind + 2 * SKEW
                await world.refresh()
            told += await _all_there_is(tells)
    assert sorted(told) == sorted(stored)


async def test_the_first_events_of_a_topic_that_is_created_during_a_round_are_told(tmp_path: Path) -> None:
    """Just after the index has asked which topics there are."""
    clock = Calendar()
    log = CreatingMeanwhile(now=clock)
    company = await Company.found(log)
    async with world_of(company, tmp_path) as world:
        await world.refresh()
        anna = Principal(name="anna", role=AccessRole.READER, via="test")
        async with aclosing(tail_events(world.backend, anna)) as tells:
            assert await _all_there_is(tells) == []
            stored = list[str]()

            async def create() -> None:
                await log.create(company.topics.specs([company.topics.events("shop")], []))
                stored.append(str((await company.event(source="shop"))[0].id))
                clock.now += 1.0

            log.meanwhile = create
            told = list[str]()
            for _ in range(3):
                clock.now += 1.0
                await world.refresh()
                told += await _all_there_is(tells)
            assert told == stored != []


class CreatingMeanwhile(MemoryLog):
    """A log in which something is done once, after somebody has asked which topics there are."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    @override
    async def topics(self) -> Collection[str]:
        found = await super().topics()
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        return found


async def _all_there_is(tells: AsyncGenerator[TailItem, None]) -> list[str]:
    """Return the ids of the next events, up to where there are no more."""
    found, at = list[str](), -1
    while (told := await anext(tells)).event is not None or told.at != at:
        at = told.at
        found += [] if told.event is None else [told.event.id]
    return found


async def test_a_viewer_and_who_is_limited_hear_what_they_see(world: World) -> None:
    world.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    await world.get("/tail", 403, query="body.a:1")
    async with listening(world) as listener:
        await events(world, 1, source="github")
        theirs = await events(world, 1, source="stripe")
        assert await listener.events(1) == theirs


async def test_who_may_not_listen_any_more_is_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "ASKED_AGAIN", 0.0)
    world.become(AccessRole.VIEWER)
    async with listening(world) as listener:
        world.become(AccessRole.READER)
        await events(world, 1)
        kind, data = await _end_of(listener)
        assert (kind, data["code"]) == ("cut", "forbidden")


async def test_who_may_not_listen_any_more_hears_it_within_moments(world: World) -> None:
    """As a request would: a listener isn't somebody whose rights end later."""
    world.become(AccessRole.VIEWER)
    async with listening(world) as listener:
        world.become(None)
        async with asyncio.timeout(5):
            assert (await _end_of(listener))[1]["code"] == "forbidden"


async def test_who_is_limited_hears_what_is_theirs_by_the_rules_in_force(world: World, tmp_path: Path) -> None:
    world.become(AccessRole.VIEWER, owners=frozenset({"platform"}))
    async with listening(world) as listener:
        assert await events(world, 1, source="github") == await listener.events(1)
        text = RULES.replace("path: /github\n    owner: platform", "path: /github\n    owner: payments")
        text = text.replace("path: /stripe\n    owner: payments", "path: /stripe\n    owner: platform")
        world.rules = await asyncio.to_thread(rules_of, tmp_path / "other.yaml", text)
        await events(world, 1, source="github")
        assert await events(world, 1, source="stripe") == await listener.events(1)


async def test_an_index_that_is_gone_is_told(world: World) -> None:
    async with listening(world) as listener:
        world.index = None
        kind, data = await _end_of(listener)
        assert (kind, data["code"]) == ("cut", "index_unavailable")


async def _end_of(listener: Listener) -> tuple[str, Any]:
    async with asyncio.timeout(10):
        while True:
            kind, data = await listener.next()
            if kind == "cut":
                return kind, data


async def test_a_listener_that_doesnt_read_is_cut_and_holds_up_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "SLOW", 2.0)
    monkeypatch.setattr(event_stream, "GRACE", 0.3)
    monkeypatch.setattr(tail, "MAX_LISTENERS", 2)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)  # noqa: FBT003 - its only argument
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", world.client.port))
    await loop.sock_sendall(connection, f"GET {BASE}/tail HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    async with listening(world) as listener:
        assert (await world.get("/tail", 503))["code"] == "busy"
        reading = asyncio.create_task(listener.events(1200))
        stored: list[str] = []
        for _ in range(12):
            stored += await events(world, 100, type="x" * 2000)
        assert await reading == stored
        async with asyncio.timeout(20):
            while True:
                async with world.client.get(f"{BASE}/tail") as response:  # its place is free again
                    if response.status == 200:
                        break
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.4)
        assert b"event: event" in await _all_of(connection), "and then the end"


async def _all_of(connection: socket.socket) -> bytes:
    """Return what a connection still has, until it ends in whatever way."""
    read = b""
    with suppress(ConnectionError):
        while piece := await asyncio.get_running_loop().sock_recv(connection, 1 << 20):
            read += piece
    connection.close()
    return read


async def test_a_tail_that_isnt_right_is_a_problem(world: World) -> None:
    assert (await world.get("/tail", 400, query="nothing:x"))["code"] == "invalid_query"
    assert (await world.get("/tail", 400, after="x"))["code"] == "invalid_request"
    for last in ("x", "-1", "9" * 30):
        assert (await world.ask("GET", "/tail", 400, headers={"Last-Event-ID": last}))["code"] == "invalid_request"
    world.index = None
    assert (await world.get("/tail", 503))["code"] == "index_unavailable"
