"""Resolving names: shared, cached, and never delayed by another zone."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from gateway.client import resolver as module
from gateway.client.resolver import NEGATIVE_TTL, STALE_TTL, SUSPECT_THREADS, THREADS, TTL, Resolver, UnresolvedError


class Zone:
    """A DNS that responds by a table, counts, and can be made to hang; the resolver uses its clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.answers: dict[str, tuple[str, ...] | Exception] = {}
        self.asked: list[str] = []
        self.hanging: set[str] = set()
        self.released = threading.Event()

    def look_up(self, host: str) -> tuple[str, ...]:
        self.asked.append(host)
        if host in self.hanging:
            self.released.wait(10)
        answer = self.answers.get(host, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def zone() -> Zone:
    return Zone()


@pytest.fixture
async def resolver(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Resolver]:
    # The lookup hangs for ever: waiting longer would show nothing more.
    monkeypatch.setattr(module, "LOOKUP_TIMEOUT", 1.0)
    monkeypatch.setattr(module, "REFRESH_TIMEOUT", 0.02)
    resolver = Resolver(zone.look_up, clock=lambda: zone.now)
    yield resolver
    zone.released.set()
    resolver.close()


async def test_callers_at_once_share_one_lookup(resolver: Resolver, zone: Zone) -> None:
    zone.answers["a.test"] = ("10.0.0.1", "10.0.0.2")
    found = await asyncio.gather(*[resolver.resolve("a.test") for _ in range(50)])
    assert found == [("10.0.0.1", "10.0.0.2")] * 50
    assert zone.asked == ["a.test"]


async def test_an_answer_serves_until_its_time_is_over(resolver: Resolver, zone: Zone) -> None:
    zone.answers["a.test"] = ("10.0.0.1",)
    await resolver.resolve("a.test")
    zone.answers["a.test"] = ("10.0.0.2",)
    zone.now += TTL - 0.01
    assert await resolver.resolve("a.test") == ("10.0.0.1",)
    zone.now += 0.02
    assert await resolver.resolve("a.test") == ("10.0.0.2",)


async def test_a_failure_is_remembered_for_a_moment(resolver: Resolver, zone: Zone) -> None:
    for _ in range(3):
        with pytest.raises(UnresolvedError, match=r"^a.test: expected an address, got name or service not known$"):
            await resolver.resolve("a.test")
    assert zone.asked == ["a.test"]
    zone.answers["a.test"] = ("10.0.0.1",)
    zone.now += NEGATIVE_TTL
    assert await resolver.resolve("a.test") == ("10.0.0.1",)


@pytest.mark.parametrize("failure", [UnicodeError("label too long"), OSError(), socket.gaierror(socket.EAI_AGAIN, "x")])
async def test_every_kind_of_failure_has_words(resolver: Resolver, zone: Zone, failure: Exception) -> None:
    zone.answers["a.test"] = failure
    with pytest.raises(UnresolvedError, match=r"^a.test: expected an address, got "):
        await resolver.resolve("a.test")


async def test_a_known_address_serves_while_its_zone_fails(resolver: Resolver, zone: Zone) -> None:
    zone.answers["a.test"] = ("10.0.0.1",)
    await resolver.resolve("a.test")
    zone.answers["a.test"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    zone.now += TTL
    assert await resolver.resolve("a.test") == ("10.0.0.1",)
    zone.now += STALE_TTL
    with pytest.raises(UnresolvedError, match="temporary failure"):
        await resolver.resolve("a.test")


async def test_a_removed_name_is_unresolved(resolver: Resolver, zone: Zone) -> None:
    zone.answers["a.test"] = ("10.0.0.1",)
    await resolver.resolve("a.test")
    del zone.answers["a.test"]
    zone.now += TTL
    with pytest.raises(UnresolvedError):
        await resolver.resolve("a.test")


async def test_a_known_address_serves_while_its_zone_hangs(resolver: Resolver, zone: Zone) -> None:
    zone.answers["a.test"] = ("10.0.0.1",)
    await resolver.resolve("a.test")
    zone.hanging.add("a.test")
    zone.now += TTL
    for _ in range(3):
        assert await resolver.resolve("a.test") == ("10.0.0.1",)
    assert zone.asked == ["a.test", "a.test"]


async def test_an_unknown_name_is_given_up_in_time(resolver: Resolver, zone: Zone) -> None:
    zone.hanging.add("dead.test")
    with pytest.raises(UnresolvedError, match="got no response within"):
        await resolver.resolve("dead.test")


async def test_of_more_names_than_are_kept_those_asked_for_last_are_known(resolver: Resolver, zone: Zone) -> None:
    names = [f"{number}.test" for number in range(module.NAMES_LIMIT + 2)]
    zone.answers = dict.fromkeys(names, ("10.0.0.1",))
    for name in names[:-2]:
        await resolver.resolve(name)
    for name in (names[0], *names[-2:]):
        await resolver.resolve(name)
    zone.asked.clear()
    for name in (names[0], *names[-2:], *names[-2:]):
        await resolver.resolve(name)
    assert zone.asked == []
    await resolver.resolve(names[1])  # which was the oldest
    assert zone.asked == [names[1]]


async def test_names_that_are_being_looked_up_stay_however_many_there_are(
    resolver: Resolver, zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NAMES_LIMIT", 2)
    names = ["a.one", "b.two", "c.three", "d.four"]
    zone.answers = dict.fromkeys(names, ("10.0.0.1",))
    zone.hanging = set(names)
    async with asyncio.TaskGroup() as tasks:
        for name in (*names, *names):
            tasks.create_task(resolver.resolve(name))
        await asyncio.sleep(0)
        zone.released.set()
    assert sorted(zone.asked) == names
    zone.answers |= {"e.five": ("10.0.0.1",), "f.six": ("10.0.0.1",)}
    zone.asked.clear()
    for name in ("e.five", "f.six", "e.five", "f.six", *names):
        await resolver.resolve(name)
    assert zone.asked == ["e.five", "f.six", *names]  # the room is for two again


async def test_one_name_takes_one_thread_however_often_it_is_asked_for(resolver: Resolver, zone: Zone) -> None:
    zone.hanging.add("dead.test")
    zone.answers["a.test"] = ("10.0.0.1",)
    dead = [asyncio.ensure_future(resolver.resolve("dead.test")) for _ in range(THREADS * 4)]
    await asyncio.sleep(0)
    assert await resolver.resolve("a.test") == ("10.0.0.1",)
    assert zone.asked == ["dead.test", "a.test"]
    await asyncio.gather(*dead, return_exceptions=True)


async def test_names_that_failed_before_leave_the_threads_of_the_others_alone(resolver: Resolver, zone: Zone) -> None:
    names = [f"{number}.dead.test" for number in range(THREADS + SUSPECT_THREADS)]
    await asyncio.gather(*[resolver.resolve(name) for name in names], return_exceptions=True)
    zone.now += NEGATIVE_TTL
    zone.hanging.update(names)
    dead = [asyncio.ensure_future(resolver.resolve(name)) for name in names]
    await asyncio.sleep(0)
    zone.answers["a.test"] = ("10.0.0.1",)
    assert await resolver.resolve("a.test") == ("10.0.0.1",)
    await asyncio.gather(*dead, return_exceptions=True)


async def test_a_zone_that_dies_at_the_start_leaves_threads_for_the_others(resolver: Resolver, zone: Zone) -> None:
    """None of its names has failed yet; and however many there are, it is one zone."""
    names = [f"{number}.eu.dead.test" for number in range(1000)]
    zone.hanging.update(names)
    dead = [asyncio.ensure_future(resolver.resolve(name)) for name in names]
    await asyncio.sleep(0)
    for host in ("a.test", "b.live.test", "short"):
        zone.answers[host] = ("10.0.0.1",)
        assert await resolver.resolve(host) == ("10.0.0.1",)
    assert len([host for host in zone.asked if host in zone.hanging]) <= THREADS // 3
    await asyncio.gather(*dead, return_exceptions=True)


async def test_a_zone_that_dies_later_delays_no_other(resolver: Resolver, zone: Zone) -> None:
    names = [f"{number}.dead.test" for number in range(THREADS)]
    zone.answers |= dict.fromkeys((*names, "a.test"), ("10.0.0.1",))
    await asyncio.gather(*[resolver.resolve(name) for name in (*names, "a.test")])
    zone.hanging.update(names)
    zone.now += TTL
    zone.answers["a.test"] = ("10.0.0.2",)
    dead = [asyncio.ensure_future(resolver.resolve(name)) for name in names]
    await asyncio.sleep(0)
    assert await resolver.resolve("a.test") == ("10.0.0.2",)
    assert await asyncio.gather(*dead) == [("10.0.0.1",)] * THREADS


async def test_every_name_of_a_large_zone_gets_its_turn(
    resolver: Resolver, zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKUP_TIMEOUT", 30.0)  # none hangs: on a busy machine, 500 may take a moment
    monkeypatch.setattr(module, "REFRESH_TIMEOUT", 30.0)
    names = [f"{number}.a.test" for number in range(500)]
    zone.answers |= dict.fromkeys(names, ("10.0.0.1",))
    for _ in range(2):  # what was taken for the zone was given back
        assert await asyncio.gather(*[resolver.resolve(name) for name in names]) == [("10.0.0.1",)] * 500
        zone.now += TTL
    assert len(zone.asked) == 1000


async def test_a_caller_that_gives_up_takes_nothing_from_the_others(resolver: Resolver, zone: Zone) -> None:
    zone.hanging.add("a.test")
    zone.answers["a.test"] = ("10.0.0.1",)
    first = asyncio.ensure_future(resolver.resolve("a.test"))
    second = asyncio.ensure_future(resolver.resolve("a.test"))
    await asyncio.sleep(0)
    first.cancel()
    zone.released.set()
    assert await second == ("10.0.0.1",)


async def test_no_more_threads_start_than_are_needed(resolver: Resolver, zone: Zone) -> None:
    before = {*threading.enumerate()}
    for number in range(20):
        zone.answers[f"{number}.test"] = ("10.0.0.1",)
        await resolver.resolve(f"{number}.test")
    # An answer is told before its thread is free again: one more may start for the next name, now and then.
    assert 1 <= len({*threading.enumerate()} - before) <= 3


async def test_however_many_names_hang_the_threads_are_limited(resolver: Resolver, zone: Zone) -> None:
    before = {*threading.enumerate()}
    names = [f"{number}.{letter}.test" for number in range(8) for letter in "abcdefghi"]
    zone.answers |= dict.fromkeys(names, ("10.0.0.1",))
    zone.hanging |= {*names}
    lookups = [asyncio.ensure_future(resolver.resolve(name)) for name in names]
    await asyncio.sleep(0)
    assert len({*threading.enumerate()} - before) == THREADS
    zone.released.set()
    assert await asyncio.gather(*lookups) == [("10.0.0.1",)] * len(names)


def as_looked_up(look_up: Callable[[str], tuple[str, ...]], *hosts: str) -> list[tuple[str, ...]]:
    return [look_up(host) for host in hosts]


def test_the_system_reads_every_notation_of_a_literal() -> None:
    assert as_looked_up(module.look_up, "2130706433", "0x7f.1", "127.1", "::1") == [("127.0.0.1",)] * 3 + [("::1",)]
