"""Garbage that only the collector finds goes soon, whatever generation it is in, and no collection takes long."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from gateway import garbage
from gateway.rules.load import load_rules
from tests.acceptance.test_company import SECRETS
from tests.company import ROUTES, TEAMS, write
from tests.virtual_time import run

A_SECOND = 1.1 * garbage.YOUNG_EVERY * garbage.YOUNG_INTERVAL


class Node:
    """An object that refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@asynccontextmanager
async def collecting() -> AsyncIterator[None]:
    task = asyncio.create_task(garbage.collect(), name="garbage")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _is_gone(node: "weakref.ref[Node]", seconds: float) -> bool:
    """Return whether it is within these seconds of the event loop."""
    await asyncio.sleep(seconds)
    return node() is None


@pytest.mark.usefixtures("no_collection")
def test_new_garbage_goes_within_a_second() -> None:
    async def scenario() -> None:
        async with collecting():
            assert await _is_gone(weakref.ref(Node()), A_SECOND)

    run(scenario())


@pytest.mark.usefixtures("no_collection")
def test_much_new_garbage_goes_at_once() -> None:
    async def scenario() -> None:
        async with collecting():
            await asyncio.sleep(1.5 * A_SECOND)
            nodes = [Node() for _ in range(garbage.YOUNG_OBJECTS)]
            found = weakref.ref(nodes[0])
            del nodes
            assert await _is_gone(found, 2 * garbage.YOUNG_INTERVAL)

    run(scenario())


@pytest.mark.usefixtures("no_collection")
def test_garbage_that_was_looked_at_once_goes_soon() -> None:
    async def scenario(found: "weakref.ref[Node]") -> None:
        async with collecting():
            assert await _is_gone(found, 1.1 * garbage.MIDDLE_EVERY * A_SECOND)

    node = Node()
    gc.collect(0)
    found = weakref.ref(node)
    del node
    run(scenario(found))


@pytest.mark.usefixtures("no_collection")
def test_old_garbage_goes_with_the_next_full_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(found: "weakref.ref[Node]") -> None:
        monkeypatch.setattr(garbage, "perf_counter", asyncio.get_running_loop().time)
        async with collecting():
            assert not await _is_gone(found, garbage.FULL_INTERVAL - 1.0)
            assert await _is_gone(found, 2.0)

    node = Node()
    gc.collect()
    found = weakref.ref(node)
    del node
    run(scenario(found))


@pytest.mark.usefixtures("no_collection")
def test_what_was_frozen_with_something_large_goes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "THAW_INTERVAL", 2.5 * garbage.FULL_INTERVAL)

    async def scenario(found: "weakref.ref[Node]") -> None:
        monkeypatch.setattr(garbage, "perf_counter", asyncio.get_running_loop().time)
        async with collecting():
            assert not await _is_gone(found, 2.5 * garbage.FULL_INTERVAL)
            assert await _is_gone(found, garbage.FULL_INTERVAL)
            frozen = gc.get_freeze_count()
            assert frozen > 0
            await asyncio.sleep(2.5 * garbage.FULL_INTERVAL)
            assert gc.get_freeze_count() <= frozen, "only where something was frozen since"

    node = Node()
    with garbage.kept():
        found = weakref.ref(node)
    del node
    run(scenario(found))


@pytest.mark.usefixtures("no_collection")
async def test_full_collections_take_a_thousandth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, full = [0.0], []

    def collect(generation: int = 2) -> int:
        if generation == 2:
            full.append(now[0])
            now[0] += 0.5
        return 0

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 1200.0:
            raise asyncio.CancelledError

    monkeypatch.setattr(garbage, "perf_counter", lambda: now[0])
    monkeypatch.setattr("gateway.garbage.asyncio.sleep", sleep)
    monkeypatch.setattr("gateway.garbage.gc.collect", collect)
    with suppress(asyncio.CancelledError):
        await garbage.collect()
    assert full == [pytest.approx(60.0, abs=1.0), pytest.approx(560.5, abs=2.0), pytest.approx(1061.0, abs=3.0)]


@pytest.mark.usefixtures("no_collection")
async def test_no_collection_but_a_full_one_looks_at_all_that_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "YOUNG_INTERVAL", 0.005)
    monkeypatch.setattr(garbage, "YOUNG_OBJECTS", garbage.YOUNG_OBJECTS // 10)
    kept: list[list[list[int]]] = []
    looked_at: list[int] = []

    def count(phase: str, info: Mapping[str, int]) -> None:
        if phase == "start":
            looked_at.append(sum(len(gc.get_objects(each)) for each in range(info["generation"] + 1)))

    gc.callbacks.append(count)
    try:
        async with collecting():
            for _ in range(500):
                kept.append([[] for _ in range(100)])
                await asyncio.sleep(0.001)
    finally:
        gc.callbacks.remove(count)
    assert 0 < max(looked_at) < 500 * 100 / 3


@pytest.mark.usefixtures("no_collection")
def test_nothing_is_collected_while_something_large_is_created_and_that_is_never_traversed() -> None:
    async def scenario() -> None:
        async with collecting():
            with garbage.kept():
                found = weakref.ref(Node())
                assert not await _is_gone(found, 1.1 * garbage.MIDDLE_EVERY * A_SECOND)
                frozen, kept = gc.get_freeze_count(), [[] for _ in range(1000)]  # type: ignore[var-annotated] # lists
            assert gc.get_freeze_count() >= frozen + len(kept)
            assert await _is_gone(weakref.ref(Node()), A_SECOND), "as before"

    run(scenario())


def test_rules_have_no_cycles(tmp_path: Path) -> None:
    """What is frozen with them would never go."""
    rules = load_rules(write(tmp_path / "company"), environ=dict.fromkeys(SECRETS, "only-for-this-test-0123456789"))
    gc.unfreeze()
    gc.collect()
    before = len(gc.get_objects())
    assert len(rules.routes) == TEAMS * ROUTES
    del rules
    assert len(gc.get_objects()) < before - 50 * TEAMS * ROUTES // 2
    assert gc.collect() == 0
