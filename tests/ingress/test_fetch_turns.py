"""Whose turn it is to fetch: a source whose fetches hang takes neither all of them nor the time of another's."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ingress.fetch_turns import AT_ONCE, FetchTurns
from gateway.ingress.listener import RESERVED
from gateway.model import UnfetchedError
from tests.virtual_time import run


class Vendors:
    """Servers of documents, by source, which the address begins with. A hanging one ends after the timeout."""

    def __init__(self) -> None:
        self.hanging = {"hangs", "hangs too"}
        self.asked: list[str] = []
        self.fetching = Counter[str]()
        self.most = 0

    async def fetch(self, url: str, *, timeout: float, **_: Any) -> bytes:
        source = url.partition("/")[0]
        self.asked.append(url)
        self.fetching[source] += 1
        self.most = max(self.most, self.fetching.total())
        try:
            await asyncio.sleep(timeout if source in self.hanging else 0.01)
            if source in self.hanging:
                raise UnfetchedError("no response")
            return url.encode()
        finally:
            self.fetching[source] -= 1


async def outcome(turns: FetchTurns, url: str) -> bytes | None:
    try:
        return await turns.fetch(url.partition("/")[0], url, timeout=3.0, limit=100)
    except UnfetchedError:
        return None


def test_a_source_whose_fetches_hang_has_half_and_delays_no_other() -> None:
    async def main() -> None:
        vendors = Vendors()
        turns, clock = FetchTurns(vendors.fetch), asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as tasks:
            hanging = [tasks.create_task(outcome(turns, f"hangs/{n}")) for n in range(1000)]
            await asyncio.sleep(1.0)
            assert vendors.fetching["hangs"] == AT_ONCE // 2
            began = clock()
            assert await outcome(turns, "works/1") == b"works/1"
            assert clock() == pytest.approx(began + 0.01)
            for task in hanging:
                task.cancel()
        assert (turns._fetching, turns._waiting) == ({}, {})

    run(main())


def test_of_many_sources_whose_fetches_hang_no_more_than_all_are_fetched_and_each_in_its_turn() -> None:
    """65 sources that each have as many new addresses fetched as they may."""

    async def main() -> None:
        vendors = Vendors()
        vendors.hanging = {f"{source}" for source in range(65)}
        turns = FetchTurns(vendors.fetch)
        async with asyncio.TaskGroup() as tasks:
            for number in range(80):
                for source in range(65):
                    tasks.create_task(outcome(turns, f"{source}/{number}"))
        assert len(vendors.asked) == 65 * 80
        begun = [Counter(url.partition("/")[0] for url in vendors.asked[: 65 * n]) for n in range(8, 60)]
        assert all(len(each) == 65 and 2 * min(each.values()) >= max(each.values()) for each in begun)
        assert vendors.most <= AT_ONCE <= RESERVED - 4096 - 512  # as many are left for the log and files

    run(main())


def test_its_own_wait_until_there_is_a_turn_in_the_order_in_which_they_came() -> None:
    async def main() -> None:
        vendors = Vendors()
        turns = FetchTurns(vendors.fetch)
        found = await asyncio.gather(*[outcome(turns, f"works/{n}") for n in range(500)])
        assert found == [b"works/%d" % n for n in range(500)]
        assert vendors.asked == [f"works/{n}" for n in range(500)]
        assert vendors.most == AT_ONCE // 2

    run(main())


steps = st.lists(st.tuples(st.sampled_from(["hangs", "hangs too", "works"]), st.floats(0.0, 4.0), st.integers(1, 90)))
"""Of which source, after how long those that came are cancelled, how many come at once."""


@given(steps=steps)
def test_whenever_those_that_wait_or_fetch_are_cancelled_no_turn_is_lost(steps: list[tuple[str, float, int]]) -> None:
    async def main() -> None:
        vendors = Vendors()
        turns = FetchTurns(vendors.fetch)

        async def some(source: str, seconds: float, number: int) -> None:
            try:
                async with asyncio.timeout(seconds):
                    await asyncio.gather(*[outcome(turns, f"{source}/{n}") for n in range(number)])
            except TimeoutError:
                pass

        async with asyncio.TaskGroup() as tasks:
            for step in steps:
                tasks.create_task(some(*step))
                await asyncio.sleep(0.1)
                assert vendors.fetching.total() <= turns._fetching.total() <= AT_ONCE
        assert (turns._fetching, turns._waiting) == ({}, {})
        assert await outcome(turns, "works/last") == b"works/last"

    run(main())
