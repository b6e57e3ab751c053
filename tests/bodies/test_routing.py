"""Events that are compressed, forms or XML, on their way through the router, a replay and a template."""

import asyncio
import gzip
from dataclasses import replace

import orjson
import pytest

from gateway.client.request import compose
from gateway.log.records import fingerprint
from gateway.model import Event, ExpressionError, identity_of
from gateway.rules.event_builder import EventBuilder
from gateway.rules.expressions import Expression
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.rules import Source
from gateway.rules.templates import Template
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier
from tests.builders import a_delivery, a_destination, a_route, an_event
from tests.engine.test_replay import a_replay, ended, owning
from tests.engine.test_worker import TOPICS, a_world, running, virtual

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
GZIP = {"Content-Encoding": "gzip"}
OPENED = orjson.dumps({"payload": {"action": "opened"}})
READABLE = {
    "json": ({}, OPENED),
    "gzip": (GZIP, gzip.compress(OPENED)),
    "form": (FORM, b"payload=%7B%22action%22%3A%22opened%22%7D"),
    "packed-form": (FORM | GZIP, gzip.compress(b"payload=%7B%22action%22%3A%22opened%22%7D")),
    "xml": ({"Content-Type": "text/xml"}, b"<payload><action>opened</action></payload>"),
    "multipart": (
        {"Content-Type": "multipart/form-data; boundary=b"},
        b'--b\r\nContent-Disposition: form-data; name="payload"\r\n\r\n{"action":"opened"}\r\n--b--\r\n',
    ),
}
UNREADABLE = {
    "no-json": ({}, b"{"),
    "br": ({"Content-Encoding": "br"}, OPENED),
    "cut": (GZIP, gzip.compress(OPENED)[:-1]),
    "bomb": (GZIP, gzip.compress(b"[" + b"1," * (2 << 20) + b"1]")),
    "dtd": ({"Content-Type": "text/xml"}, b"<!DOCTYPE payload><payload><action>opened</action></payload>"),
}


def events_of(*cases: dict[str, tuple[dict[str, str], bytes]]) -> list[Event]:
    return [
        an_event(id=f"evt_{name}", headers=headers, body=body)
        for several in cases
        for name, (headers, body) in several.items()
    ]


@virtual
async def test_conditions_read_each_body_and_one_that_cannot_be_read_counts_as_no_json() -> None:
    template = RequestTemplate(body=Template({"was": "${{ body.payload.action }}"}))
    world = await a_world(
        a_route("matched", match={"body.payload.action": "opened"}, to=("ci",)),
        a_route("expressed", when="body.payload.action == 'opened'", to=("audit",)),
        a_route("rendered", to=("chat",), request=template),
        a_route("everything", match={"body.payload.action": {"exists": False}}, to=("rest",)),
    )
    await world.put(*events_of(READABLE, UNREADABLE))
    async with running(world):
        await asyncio.sleep(5)
    made = {
        name: {event for to, event, _ in world.client.made if to == name} for name in ("ci", "audit", "chat", "rest")
    }
    readable, unreadable = {f"evt_{name}" for name in READABLE}, {f"evt_{name}" for name in UNREADABLE}
    assert made["ci"] == made["audit"] == readable
    assert made["rest"] == unreadable
    dead = [(each.delivery.route, each.delivery.event.id, each.metadata.dead_reason) for each in world.dead()]
    assert {*dead} == {("rendered", event, "expression_error") for event in unreadable}
    assert await world.unfinished() == 0


@virtual
async def test_a_replay_reads_bodies_as_the_router_does() -> None:
    world = await a_world(a_route(match={"body.payload.action": "opened"}))
    made = events_of(READABLE, UNREADABLE)
    await world.put(*made)
    await asyncio.sleep(100)
    async with owning(world) as control:
        await a_replay(world)
        done = await ended(control)
    assert (done.state, done.count) == ("done", len(READABLE))
    injected = {stored.delivery.event.id: stored.delivery.event for stored in world.stored(TOPICS.retry("5s"))}
    assert {(event.id, event.body, event.headers) for event in injected.values()} == {
        (event.id, event.body, event.headers) for event in made[: len(READABLE)]
    }


@pytest.mark.parametrize("name", READABLE)
def test_a_destination_gets_the_bytes_as_they_came_or_a_body_of_the_routes_own(name: str) -> None:
    headers, body = READABLE[name]
    delivery = a_delivery(event=an_event(headers=headers, body=body))
    sent = compose(delivery, a_destination(), None, now=0.0)
    assert sent.body == body
    assert {*sent.headers} >= {(key.encode(), value.encode()) for key, value in headers.items()}
    own = compose(delivery, a_destination(), RequestTemplate(body=Template("${{ body.payload.action }}")), now=0.0)
    assert own.body == b"opened"
    assert b"content-encoding" not in {key.lower() for key, _ in own.headers}


def test_a_template_says_why_a_body_cannot_be_read() -> None:
    template = RequestTemplate(body=Template("${{ body.payload.action }}"))
    for name, why in {"br": "content coding", "cut": "gzip", "bomb": "2097152 bytes", "dtd": "document type"}.items():
        headers, body = UNREADABLE[name]
        with pytest.raises(ExpressionError, match=rf"^request\.body: body.* isn't there \(.*{why}"):
            compose(a_delivery(event=an_event(headers=headers, body=body)), a_destination(), template, now=0.0)


def test_an_event_that_is_compressed_anew_has_its_identity_and_is_a_conflict() -> None:
    """A duplicate has the content as it came: what was compressed at another time has another."""
    verifier = build_verifier({"scheme": "none"})
    builder = EventBuilder(Source(name="s", path="/in/s", verifier=verifier, id=Expression("body.payload.action")))
    first, later, plain = [
        builder.event(Request("POST", "/in/s", "", ((b"Content-Encoding", coding),), body), received_at=1.0)
        for coding, body in (
            (b"gzip", gzip.compress(OPENED, mtime=1)),
            (b"gzip", gzip.compress(OPENED, mtime=2)),
            (b"identity", OPENED),
        )
    ]
    assert len({identity_of(event.id) for event in (first, later, plain)}) == 1
    assert len({fingerprint(event) for event in (first, later, plain)}) == 3
    assert fingerprint(first) == fingerprint(replace(first, headers=()))
