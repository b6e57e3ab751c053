"""Which idle connections are kept, by a pool and connections of its own whose transports lead nowhere."""

import asyncio
import atexit
import random
import socket
from collections import Counter

import pytest
from typing_extensions import override

from gateway.client import connections as module
from gateway.client.connections import IDLE_LIMIT, Connection, Origin, Pool

SILENT, _OTHER_END = socket.socketpair()
for each in (SILENT, _OTHER_END):
    atexit.register(each.close)


class Nowhere(asyncio.Transport):
    """A transport that can only be closed."""

    def __init__(self, connected: socket.socket = SILENT) -> None:
        super().__init__({"socket": connected})
        self.is_aborted = False

    @override
    def abort(self) -> None:
        self.is_aborted = True


def origin_of(name: object) -> Origin:
    return Origin(f"{name}.example", 443, is_tls=True)


def dialled(pool: Pool, origin: Origin, connected: socket.socket = SILENT) -> Connection:
    connection = Connection(pool, origin, pool.generation)
    connection.connection_made(Nowhere(connected))
    return connection


@pytest.fixture
async def pool() -> Pool:
    return Pool(asyncio.get_running_loop())


async def test_beyond_the_limit_the_longest_idle_is_closed(pool: Pool) -> None:
    """So the busiest destinations keep theirs: of 1,000 requests, 200 go to one, the others to any of 8,000."""
    draw, dials, asked = random.Random(1), Counter[str](), Counter[str]()
    in_flight: list[Connection] = []
    for step in range(40_000):
        kind = "busy" if draw.random() < 0.2 else "other"
        origin = origin_of("busy" if kind == "busy" else draw.randrange(8_000))
        connection = pool.take(origin)
        if step >= 20_000:
            asked[kind] += 1
            dials[kind] += connection is None
        in_flight.append(connection or dialled(pool, origin))
        if len(in_flight) > 50:
            pool.release(in_flight.pop(0))
    assert dials["busy"] < asked["busy"] / 100
    assert dials["other"] < asked["other"] * 0.85  # there is room for a quarter of them
    assert sum([each.is_open for each in pool.connections]) == IDLE_LIMIT + len(in_flight)


async def test_surplus_ones_of_a_busy_destination_go_first(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_LIMIT", 4)
    busy = [dialled(pool, origin_of("busy")) for _ in range(4)]
    for each in busy:
        pool.release(each)
    for _ in range(3):
        assert pool.take(origin_of("busy")) is busy[3]  # the one that was used last
        pool.release(busy[3])
    others = [dialled(pool, origin_of(number)) for number in range(3)]
    for each in others:
        pool.release(each)
    assert [each.is_open for each in (*busy, *others)] == [False, False, False, True, True, True, True]


async def test_a_connection_that_is_closed_by_the_other_side_takes_no_room(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_LIMIT", 2)
    first, second, third = [dialled(pool, origin_of(number)) for number in range(3)]
    pool.release(first)
    pool.release(second)
    second.connection_lost(None)
    pool.release(third)
    assert pool.take(origin_of(0)) is first
    assert pool.take(origin_of(1)) is None
    assert pool.take(origin_of(2)) is third


async def test_a_connection_whose_socket_is_closed_before_it_is_told_is_not_taken(pool: Pool) -> None:
    """As of TLS, whose own layer is told first."""
    ours, theirs = socket.socketpair()
    connection = dialled(pool, origin_of(0), ours)
    pool.release(connection)
    ours.close()
    theirs.close()
    assert pool.take(origin_of(0)) is None
    assert not connection.is_open


async def test_of_another_generation_none_is_kept(pool: Pool) -> None:
    idle, in_use = dialled(pool, origin_of(0)), dialled(pool, origin_of(0))
    pool.release(idle)
    pool.invalidate()
    pool.release(in_use)
    assert pool.take(origin_of(0)) is None
    assert [idle.is_open, in_use.is_open] == [False, False]
