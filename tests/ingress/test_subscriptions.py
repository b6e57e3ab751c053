"""Subscriptions of Amazon SNS are confirmed once their message is verified; none is delivered as an event."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
import pytest

from gateway.model import UnfetchedError
from gateway.rules.rules import Source
from tests.ingress.test_ingress import NOW, World, a_request, running, some_rules
from tests.verify.test_remote_keys import a_certificate, the_key
from tests.verify.test_sns import SUBSCRIBE, URL, VERIFIER, signed

CERTIFICATE = a_certificate(the_key(), since=NOW - 86400, until=NOW + 86400)
RULES = some_rules(Source(name="topic", path="/in/topic", verifier=VERIFIER))


@asynccontextmanager
async def receiving(fails: Callable[[str], bool] = lambda _: False) -> AsyncIterator[tuple[World, list[str]]]:
    """Serve a source of SNS; the list is of the addresses that were requested."""
    asked: list[str] = []

    async def fetch(url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:  # noqa: ARG001 - of the protocol
        asked.append(url)
        if fails(url):
            raise UnfetchedError("sns.us-west-2.amazonaws.com: expected a document, got 403 Forbidden")
        return CERTIFICATE if url == URL else b"<ConfirmSubscriptionResponse/>"

    async with running(fetch=fetch) as world:
        world.rules[0] = RULES
        yield world, asked


def a_message(**fields: str) -> bytes:
    return a_request("/in/topic", "Content-Type: text/plain; charset=UTF-8", body=signed(**fields).body)


async def test_a_subscription_is_confirmed_at_sns_and_is_no_event() -> None:
    async with receiving() as (world, asked):
        reply = await world.exchange(a_message(Type="SubscriptionConfirmation"))
        assert (reply.status, reply.body) == (200, b"")
        assert asked == [URL, SUBSCRIBE]
        assert (await world.exchange(a_message())).status == 202
        assert len(world.log.stored) == 1
        assert [line["source"] for line in world.lines if line["event"] == "subscription_confirmed"] == ["topic"]


async def test_an_unconfirmed_subscription_is_refused_so_that_sns_asks_again() -> None:
    async with receiving(lambda url: url == SUBSCRIBE) as (world, _):
        reply = await world.exchange(a_message(Type="SubscriptionConfirmation"))
        assert reply.status == 503
        [line] = [line for line in world.lines if line["event"] == "subscription_not_confirmed"]
        assert "403" in line["reason"]
        assert "Token" not in str(world.lines)
        assert world.count("rejected_total", source="topic", reason="unconfirmed_subscription") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"TopicArn": "arn:aws:sns:us-west-2:123456789012:Another"},
        {"SignatureVersion": "3"},
        {"SignatureVersion": "1"},  # of another hash than was signed
        {"Token": "2336412f38"},
        {"SubscribeURL": SUBSCRIBE + "3"},
        {"Type": "UnsubscribeConfirmation"},
    ],
)
async def test_nothing_is_visited_for_a_message_that_is_refused(fields: dict[str, str]) -> None:
    message = signed(Type="SubscriptionConfirmation").body
    for name, value in fields.items():
        message = orjson.dumps({**orjson.loads(message), name: value})
    async with receiving() as (world, asked):
        reply = await world.exchange(a_request("/in/topic", body=message))
        assert reply.status == 401
        assert set(asked) <= {URL}
        signed_by_nobody = {"Token", "SubscribeURL", "Type"} & fields.keys() or fields == {"SignatureVersion": "1"}
        assert (world.lines[-1]["reason"] == "bad_signature") == bool(signed_by_nobody)
        assert not any(line["event"] == "subscription_confirmed" for line in world.lines)


async def test_an_end_of_a_subscription_is_answered_alone() -> None:
    async with receiving() as (world, asked):
        reply = await world.exchange(a_message(Type="UnsubscribeConfirmation"))
        assert reply.status == 200
        assert asked == [URL]
        assert world.log.stored == []
