"""Messages that ask for a confirmation and come again and again: few requests and lines come of them."""

import asyncio
from typing import Any

import pytest
import structlog

from gateway.ingress.fetch_turns import FetchTurns
from gateway.ingress.subscriptions import AT_ONCE, MAX_CONFIRMED, PER_SECOND, Subscriptions
from gateway.model import RefusedError, UnfetchedError
from gateway.telemetry.log_quota import PER_KIND
from tests.ingress.test_ingress import World, until
from tests.ingress.test_subscriptions import a_message, receiving
from tests.verify.test_sns import SUBSCRIBE
from tests.virtual_time import run

PREFIX = SUBSCRIBE.removesuffix("2")


def lines(world: World, event: str) -> list[dict[str, Any]]:
    return [line for line in world.lines if line["event"] == event]


async def test_a_confirmed_message_that_is_repeated_is_visited_and_logged_once() -> None:
    async with receiving() as (world, asked):
        for _ in range(30):
            assert (await world.exchange(a_message(Type="SubscriptionConfirmation"))).status == 200
        assert asked.count(SUBSCRIBE) == 1
        assert len(lines(world, "subscription_confirmed")) == 1


async def test_one_that_fails_is_visited_seldom_and_keeps_no_other_from_its_visit() -> None:
    async with receiving(lambda url: url == SUBSCRIBE) as (world, asked):
        replies = [await world.exchange(a_message(Type="SubscriptionConfirmation")) for _ in range(60)]
        assert {reply.status for reply in replies} == {503}
        assert AT_ONCE // 2 <= asked.count(SUBSCRIBE) <= AT_ONCE // 2 + 2
        other = a_message(Type="SubscriptionConfirmation", SubscribeURL=f"{PREFIX}3")
        assert (await world.exchange(other)).status == 200
        reasons = [line["reason"] for line in lines(world, "subscription_not_confirmed")]
        assert len(reasons) == PER_KIND
        assert world.count("rejected_total", source="topic", reason="unconfirmed_subscription") == 60
        assert PREFIX not in str(world.lines)


async def test_copies_of_a_message_whose_visit_takes_long_make_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    may_respond = asyncio.Event()
    original = FetchTurns.fetch

    async def fetch(turns: FetchTurns, source: str, url: str, **more: Any) -> bytes:
        if url == SUBSCRIBE:
            await may_respond.wait()
        return await original(turns, source, url, **more)

    monkeypatch.setattr(FetchTurns, "fetch", fetch)
    async with receiving() as (world, asked), asyncio.TaskGroup() as tasks:
        first = tasks.create_task(world.exchange(a_message(Type="SubscriptionConfirmation")))
        await until(lambda: any(each.visiting for each in world.ingress._subscriptions._sources.values()))
        for _ in range(5):
            assert (await world.exchange(a_message(Type="SubscriptionConfirmation"))).status == 503
        may_respond.set()
        assert (await first).status == 200
        assert asked.count(SUBSCRIBE) == 1


def test_in_hours_few_are_visited_and_the_one_that_comes_for_the_first_time_is() -> None:
    """In virtual time: somebody repeats ten messages whose tokens have ended, and has the topic send new ones."""
    asked: list[str] = []

    async def fetch(url: str, **_: Any) -> bytes:
        asked.append(url)
        if "ended" in url:
            raise UnfetchedError("sns.us-west-2.amazonaws.com: expected a document, got 400 Bad Request")
        return b"<ConfirmSubscriptionResponse/>"

    async def main() -> float:
        subscriptions = Subscriptions(FetchTurns(fetch), logger=structlog.get_logger(), may_log=lambda _: False)

        async def is_confirmed(url: str) -> bool:
            try:
                await subscriptions.confirm("topic", url)
            except RefusedError:
                return False
            return True

        for second in range(7200):
            await asyncio.sleep(1.0)
            assert not await is_confirmed(f"{PREFIX}ended{second % 10}")
            if second % 600 == 599:
                assert await is_confirmed(f"{PREFIX}{second}")
        own = subscriptions._sources["topic"]
        for n in range(3 * MAX_CONFIRMED):
            await asyncio.sleep(60.0)
            assert await is_confirmed(f"{PREFIX}new{n}")
        assert (len(own._confirmed), own.visiting) == (MAX_CONFIRMED, set())
        subscriptions.retain([])
        assert not subscriptions._sources
        return 7200 + 60.0 * 3 * MAX_CONFIRMED

    with structlog.testing.capture_logs():
        seconds = run(main())
    assert len(asked) <= AT_ONCE + PER_SECOND * seconds
