"""How ingresses share a source's rate: whoever is there counts, and nothing is refused for want of a count."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import structlog
from structlog.testing import CapturingLogger
from typing_extensions import override

from gateway.ingress.rate_share import INTERVAL, RateShare
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError
from tests.memory_log import MemoryLog
from tests.virtual_time import run

TOPICS = Topics()


class AwayLog(MemoryLog):
    """A log whose groups can't be looked at while it `is_away`."""

    is_away = False

    @override
    async def members(self, group: str) -> int:
        if self.is_away:
            raise LogUnavailableError(f"members of {group}: the broker doesn't answer")
        return await super().members(group)


class Ingress:
    """What `RateShare` needs of one: whether a source has a rate, and how many share it."""

    def __init__(self, log: MemoryLog) -> None:
        self.has_rate = True
        self.counts: list[int] = []
        self.lines = CapturingLogger()
        logger = structlog.wrap_logger(self.lines, processors=[lambda _, __, event: event])
        self.share = RateShare(
            log=log, topics=TOPICS, is_needed=lambda: self.has_rate, use=self.counts.append, logger=logger
        )

    @property
    def events(self) -> list[str]:
        return [call.kwargs["event"] for call in self.lines.calls]


async def a_log() -> AwayLog:
    log = AwayLog()
    await log.create(TOPICS.specs([]))
    return log


def test_each_counts_all_that_are_there() -> None:
    async def scenario() -> None:
        log = await a_log()
        ingresses = [Ingress(log) for _ in range(3)]
        async with AsyncExitStack() as stack:
            tasks = [await stack.enter_async_context(running(each)) for each in ingresses]
            await asyncio.sleep(2 * INTERVAL)
            assert [each.counts[-1] for each in ingresses] == [3, 3, 3]
            tasks[0].cancel()
            await asyncio.sleep(2 * INTERVAL)
            assert [each.counts[-1] for each in ingresses[1:]] == [2, 2]
            ingresses[1].has_rate = False  # its rules are newer
            await asyncio.sleep(2 * INTERVAL)
            assert [each.counts[-1] for each in ingresses[1:]] == [1, 1]
            ingresses[1].has_rate = True
            await asyncio.sleep(2 * INTERVAL)
            assert [each.counts[-1] for each in ingresses[1:]] == [2, 2]
        assert await log.members(TOPICS.group("ingress")) == 0

    run(scenario())


def test_it_reads_no_record_and_commits_nothing() -> None:
    async def scenario() -> None:
        log = await a_log()
        group = TOPICS.group("ingress")
        ingress = Ingress(log)
        fetched: list[Sequence[object]] = []

        async def consume(**arguments: Any) -> Any:
            consumer = await MemoryLog.consume(log, **arguments)
            fetch = consumer.fetch

            async def noting(**arguments: Any) -> Any:
                found = await fetch(**arguments)
                fetched.append(found)
                return found

            consumer.fetch = noting  # type: ignore[method-assign]
            return consumer

        log.consume = consume  # type: ignore[method-assign]
        async with running(ingress):
            await asyncio.sleep(INTERVAL)
            for number in range(50):
                await log.append(TOPICS.control, key=b"k", value=b"%d" % number, headers=[], partition=0)
            await asyncio.sleep(2 * INTERVAL)
            assert await log.committed(group, TOPICS.control) == {}
        assert fetched
        assert not any(fetched)

    run(scenario())


def test_while_the_log_is_away_the_last_count_is_used() -> None:
    async def scenario() -> None:
        log = await a_log()
        first, second = Ingress(log), Ingress(log)
        async with running(first), running(second):
            await asyncio.sleep(2 * INTERVAL)
            log.is_away = True
            await asyncio.sleep(100)
            assert (first.counts, second.counts) in (([2], [2]), ([1, 2], [2]))
            assert 1 <= first.events.count("rate_not_shared") <= 2
            log.is_away = False
            await asyncio.sleep(2 * INTERVAL)
            assert first.counts[-1] == 2

    run(scenario())


@pytest.mark.parametrize("is_there", [True, False])
def test_nobody_joins_without_a_rate(*, is_there: bool) -> None:
    async def scenario() -> None:
        log = await a_log()
        ingress = Ingress(log)
        ingress.has_rate = is_there
        async with running(ingress):
            await asyncio.sleep(2 * INTERVAL)
            assert await log.members(TOPICS.group("ingress")) == is_there
        assert ingress.events == []

    run(scenario())


@asynccontextmanager
async def running(ingress: Ingress) -> AsyncIterator["asyncio.Task[None]"]:
    """Run an ingress's share; its task is cancelled at the end."""
    task = asyncio.create_task(ingress.share.run())
    yield task
    task.cancel()
    await asyncio.wait([task])
