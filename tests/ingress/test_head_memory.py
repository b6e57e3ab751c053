"""What all connections hold of heads that aren't complete, and of requests that wait behind others, is limited."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from gateway.ingress.head_memory import LINE_OVERHEAD, SMALL, HeadMemory, Holder
from gateway.ingress.server import END_OF_HEAD, Limits
from tests.ingress.test_connections import GET, a_connection, connections
from tests.ingress.test_ingress import World, a_request, running, until

LIMIT = 200_000
BEGUN = b"GET /x HTTP/1.1\r\nHost: hooks.example\r\nX-A: %b\r\nX-B: %b\r\n" % (b"a" * 10_000, b"b" * 9_000)
"""The larger part of a head that is small enough."""


def size_of(data: bytes) -> int:
    """Return what bytes of heads count."""
    return len(data) + LINE_OVERHEAD * data.count(b"\n")


class Connection(Holder):
    def __init__(self) -> None:
        self.has_let_go = False

    @override
    def evict(self, held: int) -> None:
        self.has_let_go = True


@given(steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_whoever_has_held_something_for_the_longest_time_lets_go_first(steps: list[tuple[int, int]]) -> None:
    """0 bytes: it holds nothing any more."""
    memory = HeadMemory(100)
    everyone = [Connection() for _ in range(10)]
    held: dict[int, int] = {}
    for number, size in steps:
        everyone[number].has_let_go = False
        if size == 0:
            memory.forget(everyone[number])
            held.pop(number, None)
            continue
        memory.hold(everyone[number], size)
        held[number] = held.get(number, 0) + size
        while sum(held.values()) > 100:
            oldest = next(iter(held))
            del held[oldest]
            assert everyone[oldest].has_let_go
        assert memory.held == sum(held.values()) <= 100
        assert not any(everyone[other].has_let_go for other in held)


def held(world: World) -> int:
    assert world.ingress._web is not None
    return world.ingress._web.head_memory.held


async def test_unfinished_heads_take_little_memory_and_make_room_for_one_that_comes_at_once() -> None:
    async with running(limits=Limits(heads_bytes=LIMIT)) as world, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(world.wire()) for _ in range(30)]
        good = await stack.enter_async_context(world.wire())
        request = a_request("/in/open", "X-More: " + "a" * 8_000)
        for wire in slow:
            wire.send(BEGUN)
            good.send(request[:5_000])
            await asyncio.sleep(0.005)  # its two parts come so long after each other
            good.send(request[5_000:])
            assert (await good.reply()).status == 202
            assert held(world) <= LIMIT
        evicted = 30 - LIMIT // size_of(BEGUN)
        for wire in slow[:evicted]:
            assert (await wire.reply()).status == 408
            assert await wire.is_closed()
        assert world.count("rejected_total", source="", reason="evicted") == evicted
        for wire in slow[evicted:]:
            wire.send(b"X-C: c\r\n\r\n")
            assert (await wire.reply()).status == 404
    assert held(world) == 0


LARGE = [f"X-{number}: {'a' * 50}" for number in range(120)]
TRAILERS = b"".join([b"X-%d: %b\r\n" % (number, b"a" * 15_000) for number in range(120)])


@asynccontextmanager
async def within(most: int) -> AsyncIterator[None]:
    """Expect that at the end of it, no more than so many bytes are in use besides those at its beginning."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < most


async def test_large_heads_that_have_their_responses_take_little_memory() -> None:
    """Aiohttp keeps each until the next request of its connection, 113 kB."""
    limits = Limits(heads_bytes=1 << 20)
    async with running(limits=limits) as world, AsyncExitStack() as stack, within(4_000_000):
        wires = [await stack.enter_async_context(world.wire()) for _ in range(100)]
        for wire in wires:
            wire.send(a_request("/in/nobody", *LARGE))
            assert (await wire.reply()).status == 404
        assert 0 < held(world) <= limits.heads_bytes
        left = len(connections(world))
        assert 0 < left < 100
        assert world.count("connections_refused_total", reason="evicted") == 100 - left
        for wire in wires[:-left]:
            assert await wire.is_closed()
        for wire in wires[-left:]:  # of these, which are in use, none is closed
            wire.send(a_request("/in/open"))
            assert (await wire.reply()).status == 202
        assert held(world) == 0


async def test_large_heads_whose_bodies_are_awaited_take_little_memory() -> None:
    limits = Limits(heads_bytes=1 << 20)
    async with running(limits=limits) as world, AsyncExitStack() as stack, within(4_000_000):
        wires = [await stack.enter_async_context(world.wire()) for _ in range(100)]
        for wire in wires:
            wire.send(a_request("/in/open", *LARGE, length=2, body=b""))
            await asyncio.sleep(0.005)
        await until(lambda: world.count("connections_refused_total", reason="evicted") > 0)
        left = len(connections(world))
        assert 0 < left < 100
        for wire in wires[-left:]:
            wire.send(b"ok")
            assert (await wire.reply()).status == 202
    assert len(world.log.stored) == left


@pytest.mark.parametrize("is_ended", [False, True])
async def test_trailers_take_little_memory(*, is_ended: bool) -> None:
    """The parser keeps 3.6 MB of them, for a client that anybody may be."""
    async with running(limits=Limits(heads_bytes=1 << 20)) as world, AsyncExitStack() as stack, within(5_000_000):
        for _ in range(20):
            wire = await stack.enter_async_context(world.wire())
            wire.send(a_request("/in/nobody", "Transfer-Encoding: chunked", body=b"2\r\nhi\r\n0\r\n"))
            wire.send(TRAILERS + (b"\r\n" if is_ended else b""))
            assert (await wire.reply()).status == 404
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("chunk", [b"1\r\na\r\n", b"1;name=value\r\na\r\n"])
async def test_a_body_of_small_chunks_makes_room_for_none_and_is_read(chunk: bytes) -> None:
    async with running(limits=Limits(heads_bytes=LIMIT)) as world, AsyncExitStack() as stack:
        slow, good = [await stack.enter_async_context(world.wire()) for _ in range(2)]
        slow.send(BEGUN)
        good.send(a_request("/in/open", "Transfer-Encoding: chunked", body=b""))
        for _ in range(4):
            good.send(chunk * 2_000)
            await asyncio.sleep(0.01)
        good.send(b"0\r\n\r\n")
        assert (await good.reply()).status == 202
        assert world.log.stored[0].event.body == b"a" * 8_000
        slow.send(b"X-C: c\r\n\r\n")
        assert (await slow.reply()).status == 404


async def test_what_waits_behind_requests_in_progress_makes_room_too() -> None:
    many = GET * 1000
    async with running(limits=Limits(heads_bytes=5 * size_of(many))) as world, AsyncExitStack() as stack:
        world.log.may_append.clear()
        good, *greedy = [await stack.enter_async_context(world.wire()) for _ in range(11)]
        for number, wire in enumerate(greedy):
            wire.send(a_request())
            await until(lambda number=number: world.log.waiting == number + 1)  # type: ignore[misc]
            wire.send(many)
            await until(lambda number=number: held(world) == min(number + 1, 5) * size_of(many))  # type: ignore[misc]
            await asyncio.sleep(0.01)
        good.send(a_request())
        await until(lambda: world.log.waiting == 11)
        world.log.may_append.set()
        assert (await good.reply()).status == 202
        for wire in greedy[:5]:
            with suppress(ConnectionError):
                assert await wire.is_closed()
        assert world.count("connections_refused_total", reason="evicted") >= 5
        lines = [line for line in world.lines if line["event"] == "connection_refused"]
        assert [(line["reason"], line["address"]) for line in lines[:5]] == [("evicted", "127.0.0.1")] * 5
        assert (await greedy[-1].reply()).status == 202
        assert [(await greedy[-1].reply()).status for _ in range(1000)] == [404] * 1000
        await until(lambda: held(world) == 0)


async def test_of_a_connection_that_holds_nothing_any_more_nothing_is_taken() -> None:
    """Of two requests that come together, whether there is a part of a head behind them isn't known at once."""
    async with running(limits=Limits(heads_bytes=LIMIT)) as world:
        async with AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(world.wire()) for _ in range(30)]
            two = GET + a_request(body=b"x" * 10_000)
            for wire in wires:
                wire.send(two)
                assert [(await wire.reply()).status for _ in range(2)] == [404, 202]
                assert held(world) <= LIMIT
            world.log.may_append.clear()
            for wire in wires:
                wire.send(two)
                assert (await wire.reply()).status == 404
                assert held(world) <= LIMIT
            await until(lambda: world.log.waiting == len(wires))
            world.log.may_append.set()
            assert {(await wire.reply()).status for wire in wires} == {202}
        await until(lambda: not connections(world))
        assert held(world) == 0


async def test_a_connection_that_is_lost_holds_nothing() -> None:
    async with running() as world:
        connection, _ = a_connection(world)
        connection.data_received(BEGUN)
        assert held(world) == size_of(BEGUN)
        connection.connection_lost(None)
        assert held(world) == 0


async def test_many_short_lines_count_as_what_the_parser_makes_of_them() -> None:
    async with running(limits=Limits(heads_bytes=2**20)) as world:
        begun = GET.removesuffix(b"\r\n") + b"".join([b"a%d: b\r\n" % number for number in range(100)])
        for connection in [a_connection(world)[0] for _ in range(60)]:
            connection.data_received(begun)
        assert world.count("rejected_total", source="", reason="evicted") == 60 - 2**20 // size_of(begun) > 30


async def test_what_is_kept_of_a_head_goes_with_its_refusal() -> None:
    """TLS takes up to 5 s to close a connection whose client doesn't: its parser has let go by then."""
    async with running(limits=Limits(heads_bytes=2 * size_of(BEGUN))) as world:
        slow = [a_connection(world)[0] for _ in range(5)]
        for connection in slow:
            connection.data_received(BEGUN)
        assert [connection._parser is None for connection in slow] == [True, True, True, False, False]
        too_large, _ = a_connection(world)
        too_large.data_received(b"GET /x HTTP/1.1\r\n" + b"X-A: %b\r\n" % (b"a" * 16_000) * 5)
        assert too_large._parser is None
        assert held(world) == 2 * size_of(BEGUN), "and it has taken nothing of the others'"


def test_one_that_holds_much_lets_go_before_those_that_hold_little() -> None:
    memory, little, much = HeadMemory(10 * SMALL), Connection(), [Connection() for _ in range(9)]
    memory.hold(little, SMALL)
    for each in much:
        memory.hold(each, 1)
        memory.hold(each, 2 * SMALL)
    assert [each.has_let_go for each in much] == [True] * 5 + [False] * 4
    assert not little.has_let_go


async def test_what_follows_the_wish_for_another_protocol_is_not_kept() -> None:
    """No WebSocket and no tunnel is made here: the request gets its response, and its connection ends."""
    upgrade = b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    for first in (upgrade, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"):
        async with running() as world, world.wire() as wire:
            wire.send(first + BEGUN)
            assert (await wire.reply()).status in {400, 404, 405}
            assert await wire.is_closed()
            assert held(world) == 0
        async with running() as world:
            connection, transport = a_connection(world)
            connection.data_received(first + BEGUN)
            connection.data_received(BEGUN)
            assert connection._message_tail == b""
            transport.pause_reading.assert_called()


async def test_a_head_in_many_parts_is_held_until_it_is_complete() -> None:
    async with running() as world, world.wire() as wire:
        request = a_request()
        end = request.index(END_OF_HEAD)
        for at in range(end):
            wire.send(request[at : at + 1])
            await until(lambda at=at: held(world) == size_of(request[: at + 1]))  # type: ignore[misc]
        wire.send(request[end:])
        assert (await wire.reply()).status == 202
        assert held(world) == 0
