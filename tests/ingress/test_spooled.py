"""What a sender and an operator hear of an event that is in the spool, and not in the log yet."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from gateway.log.base import Position, RecordHeaders
from gateway.rules.rules import AfterDelivery, StoredResponse
from gateway.rules.templates import Template
from tests.ingress.test_ingress import World, github, github_signature, running

if TYPE_CHECKING:
    from gateway.ingress.destination_responses import DestinationResponses

GOOD = github(f"X-Hub-Signature-256: {github_signature()}")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Return a gateway without a spool."""
    async with running() as world:
        yield world


@pytest.fixture
async def spooling() -> AsyncIterator[World]:
    """Return a gateway whose spool takes everything."""
    async with running() as found:

        async def append(topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position | None:
            await found.log.append(topic, key=key, value=value, headers=headers)
            return None

        found.ingress._writer._append_record = append
        yield found


def respond(world: World, response: StoredResponse) -> None:
    source = world.rules[0].sources["github"]
    world.rules[0] = replace(world.rules[0], sources={"github": replace(source, response=response)})


@pytest.mark.parametrize("response", [None, StoredResponse(status=200, body=Template("ok"))])
async def test_the_response_and_the_log_line_say_how_durable_it_is(
    spooling: World, response: StoredResponse | None
) -> None:
    if response is not None:
        respond(spooling, response)
    reply = await spooling.exchange(GOOD)
    assert reply.status == (202 if response is None else 200)
    assert reply.headers["gateway-durability"] == "spooled"
    assert reply.headers["gateway-event-id"] == spooling.log.stored[0].event.id
    [line] = [each for each in spooling.lines if each["event"] == "request_finished"]
    assert line["durability"] == "spooled"
    assert spooling.count("events_total", source="github") == 1
    assert spooling.count("append_duration_seconds_count") == 0


async def test_in_the_log_it_is_as_durable_as_always(world: World) -> None:
    reply = await world.exchange(GOOD)
    assert "gateway-durability" not in reply.headers
    [line] = [each for each in world.lines if each["event"] == "request_finished"]
    assert "durability" not in line


class NoResponses:
    """Destinations that never respond."""

    def expect(self, *_: object, **__: object) -> "NoResponses":
        return self

    async def response(self, _: float) -> tuple[None, str]:
        raise AssertionError("nobody waits for what isn't on its way")

    def stop(self) -> None: ...

    def close(self) -> None: ...


async def test_nobody_waits_for_the_destination_of_an_event_that_is_not_on_its_way(spooling: World) -> None:
    spooling.ingress._writer._responses = cast("DestinationResponses", NoResponses())
    respond(spooling, StoredResponse(after_delivery=AfterDelivery(destination="chat", timeout=5.0)))
    reply = await spooling.exchange(GOOD)
    assert (reply.status, reply.headers["gateway-durability"]) == (202, "spooled")
    [line] = [each for each in spooling.lines if each["event"] == "request_finished"]
    assert line["destination_response"] == "spooled"
    assert spooling.count("destination_responses_total", source="github", outcome="spooled") == 1
