"""A request with several events: each is stored with its own id, and all of them before the sender hears of it."""

import asyncio
import gc
import gzip
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from gateway.model import LogUnavailableError
from gateway.rules.event_builder import EventBuilder
from gateway.rules.expressions import Expression
from gateway.rules.load import load_rules
from gateway.rules.rules import StoredResponse
from gateway.rules.templates import Template
from gateway.verify.schemes import build_verifier
from tests.ingress.test_ingress import SECRET, World, a_request, github_signature, running

ITEMS = [b'{"id": "a", "kind": "opened"}', b'{"id":"b","kind":"clicked","n":1.0}']
BODY = b'{ "records": [' + b", ".join(ITEMS) + b"]}"


@pytest.fixture
async def splitting() -> AsyncIterator[World]:
    """Return a gateway whose source `github` has several events in a request."""
    async with running() as world:
        source = world.rules[0].sources["github"]
        source = replace(source, split=("records",), id=Expression("body.id"), type=Expression("body.kind"))
        world.rules[0] = replace(world.rules[0], sources={"github": source})
        yield world


def signed(body: bytes = BODY, *headers: str) -> bytes:
    signature = f"X-Hub-Signature-256: {github_signature(body)}"
    return a_request("/in/github", "X-GitHub-Delivery: d1", "X-A: 1", signature, *headers, body=body)


async def test_each_item_is_an_event_with_its_bytes_identity_and_type(splitting: World) -> None:
    reply = await splitting.exchange(signed())
    events = [stored.event for stored in splitting.log.stored]
    assert reply.status == 202
    assert reply.json == {"ids": [event.id for event in events]}
    assert [(event.body, event.type) for event in events] == list(zip(ITEMS, ["opened", "clicked"], strict=True))
    assert len({event.id for event in events}) == 2
    names = {name.lower() for event in events for name, _ in event.headers}
    assert b"x-a" in names
    # They are about the whole.
    assert names.isdisjoint({b"x-hub-signature-256", b"content-length"})
    assert splitting.count("events_total", source="github") == 2
    assert splitting.count("requests_total", source="github", status="202") == 1
    [line] = [each for each in splitting.lines if each["event"] == "request_finished"]
    assert line["events"] == 2


async def test_the_sources_response_to_several_events_is_as_far_as_it_is_about_none_of_them(splitting: World) -> None:
    source = splitting.rules[0].sources["github"]
    about_one = ("X-Kind", Template("${{ type }}"))
    response = StoredResponse(status=200, headers=(("X-A", Template("b")), about_one), body=Template("[accepted]"))
    splitting.rules[0] = replace(splitting.rules[0], sources={"github": replace(source, response=response)})
    reply = await splitting.exchange(signed())
    assert (reply.status, reply.body, reply.headers["content-type"]) == (
        200,
        b"[accepted]",
        "text/plain; charset=utf-8",
    )
    assert (reply.headers["x-a"], reply.headers.get("x-kind")) == ("b", None)
    response = replace(response, headers=(("X-A", Template("b\0")),), body=Template({"type": "${{ type }}"}))
    splitting.rules[0] = replace(splitting.rules[0], sources={"github": replace(source, response=response)})
    reply = await splitting.exchange(signed())
    assert reply.json == {"ids": [stored.event.id for stored in splitting.log.stored[-2:]]}


async def test_a_request_that_comes_again_has_the_same_ids(splitting: World) -> None:
    first, again = [(await splitting.exchange(signed())).json for _ in range(2)]
    assert first == again
    source = replace(splitting.rules[0].sources["github"], id=None)
    splitting.rules[0] = replace(splitting.rules[0], sources={"github": source})
    first, again = [(await splitting.exchange(signed())).json["ids"] for _ in range(2)]
    assert first == again
    assert len({*first}) == 2  # though the header that identifies the request is the same


@pytest.mark.parametrize("body", [b'{"id":"a","kind":"opened"}', b'{"id":"a","kind":"opened","records":7}'])
async def test_a_request_without_the_list_is_one_event(splitting: World, body: bytes) -> None:
    reply = await splitting.exchange(signed(body))
    [stored] = splitting.log.stored
    assert (reply.status, reply.json) == (202, {"id": stored.event.id})
    assert stored.event.body == body


@pytest.mark.parametrize("codings", ["gzip", "deflate, gzip"])
async def test_a_compressed_request_is_split_into_items_that_are_not(splitting: World, codings: str) -> None:
    body = gzip.compress(zlib.compress(BODY) if codings.startswith("deflate") else BODY)
    reply = await splitting.exchange(signed(body, f"Content-Encoding: {codings}"))
    assert (reply.status, reply.json["ids"]) == (202, (await splitting.exchange(signed())).json["ids"])
    for stored, item in zip(splitting.log.stored, ITEMS, strict=False):
        assert stored.event.body == item
        assert b"content-encoding" not in {name.lower() for name, _ in stored.event.headers}
    assert splitting.ingress._memory.free == splitting.ingress._memory._total


async def test_a_compressed_request_without_the_list_is_one_event_as_it_came(splitting: World) -> None:
    body = gzip.compress(b'{"id":"a","kind":"opened"}')
    reply = await splitting.exchange(signed(body, "Content-Encoding: gzip"))
    [stored] = splitting.log.stored
    assert (reply.status, stored.event.body, stored.event.type) == (202, body, "opened")
    assert (b"Content-Encoding", b"gzip") in stored.event.headers


async def test_what_is_kept_of_a_compressed_request_counts_as_memory_until_it_is_stored(splitting: World) -> None:
    items = [b'{"id":"%d","kind":"%b"}' % (number, b"x" * 1000) for number in range(500)]
    splitting.log.may_append.clear()
    body = gzip.compress(b'{"records":[' + b",".join(items) + b"]}")
    exchange = asyncio.create_task(splitting.exchange(signed(body, "Content-Encoding: gzip")))
    memory = splitting.ingress._memory
    async with asyncio.timeout(5):
        while splitting.log.waiting < len(items):  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0)
    assert len(body) < 10_000
    assert memory._total - memory.free > sum(map(len, items)) + len(body)
    splitting.log.may_append.set()
    assert (await exchange).status == 202
    assert memory.free == memory._total


async def test_a_compressed_request_has_no_events_where_there_is_no_memory_for_them(splitting: World) -> None:
    items = [b'{"id":"%d","kind":"x","text":"%b"}' % (number, b"x" * 1000) for number in range(900)]
    body = gzip.compress(b'{"records":[' + b",".join(items) + b"]}")
    splitting.ingress._memory._total = 600_000
    reply = await splitting.exchange(signed(body, "Content-Encoding: gzip"))
    assert (reply.status, splitting.log.stored) == (503, [])
    assert splitting.ingress._memory.free == 600_000


async def test_nothing_is_acknowledged_unless_all_is_stored(splitting: World) -> None:
    splitting.log.may_append.clear()
    exchange = asyncio.create_task(splitting.exchange(signed()))
    async with asyncio.timeout(5):
        while splitting.log.waiting < 2:  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0)
    assert not exchange.done()
    splitting.log.failure = LogUnavailableError("no quorum")
    splitting.log.may_append.set()
    assert (await exchange).status == 503
    assert splitting.ingress._memory.free == splitting.ingress._memory._total
    splitting.log.failure = None
    assert (await splitting.exchange(signed())).status == 202


@pytest.mark.parametrize("refused", range(len(ITEMS)))
async def test_nothing_is_acknowledged_if_one_of_several_events_is_not_stored(splitting: World, refused: int) -> None:
    splitting.log.refused = {ITEMS[refused]}
    reply = await splitting.exchange(signed())
    assert reply.status == 503
    assert "retry-after" in reply.headers
    [other] = splitting.log.stored
    assert other.event.body == ITEMS[1 - refused]
    splitting.log.refused.clear()
    reply = await splitting.exchange(signed())
    ids = [stored.event.id for stored in splitting.log.stored[1:]]
    assert (reply.status, reply.json) == (202, {"ids": ids})
    assert ids[1 - refused] == other.event.id, "a copy of what was stored"


async def test_a_batch_that_cannot_be_stored_is_one_line(splitting: World, caplog: pytest.LogCaptureFixture) -> None:
    items = b",".join([b'{"id":"%d","kind":"x"}' % number for number in range(50)])
    splitting.log.failure = LogUnavailableError("no quorum")
    assert (await splitting.exchange(signed(b'{"records":[' + items + b"]}"))).status == 503
    gc.collect()  # an exception that nobody has retrieved is reported when it is freed
    assert [line["event"] for line in splitting.lines] == ["request_finished"]
    assert caplog.records == []


async def test_items_that_nothing_identifies_share_a_partition_and_others_do_not(splitting: World) -> None:
    """They have other ids when they come again, so that all or none of them should be stored."""
    source = splitting.rules[0].sources["github"]
    unidentified = replace(source, id=Expression("body.id"), key=Expression("body.account"))
    splitting.rules[0] = replace(splitting.rules[0], sources={"github": unidentified})
    items = [b'{"kind":"a"}', b'{"kind":"b","id":7}', b'{"kind":"c"}', b'{"kind":"d","account":"x"}', b'{"kind":"a"}']
    reply = await splitting.exchange(signed(b'{"records":[' + b",".join(items) + b"]}"))
    stored = splitting.log.stored
    ids = [each.event.id.encode() for each in stored]
    assert reply.json["ids"] == [each.decode() for each in ids]
    assert len({*ids}) == len(items)
    assert [each.key for each in stored] == [ids[0], ids[1], ids[0], b"x", ids[0]]


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (signed(b'{"records":[1,]}'), 400, "malformed_batch"),
        (signed(b"records"), 400, "malformed_batch"),
        (signed(BODY + BODY), 400, "malformed_batch"),
        (signed(BODY, "Content-Encoding: gzip"), 400, "malformed_content"),
        (signed(gzip.compress(BODY)[:-1], "Content-Encoding: gzip"), 400, "malformed_content"),
        (signed(gzip.compress(b" " * (3 << 20)), "Content-Encoding: gzip"), 413, "content_too_large"),
        (signed(BODY, "Content-Encoding: br"), 415, "content_coding"),
        (signed(b'{"records":[' + b",".join([b"{}"] * 1001) + b"]}"), 413, "batch_too_large"),
        (signed(b'{"records":[{"id":"a"},{"id":[]}]}'), 400, "expression_error"),
    ],
)
async def test_a_batch_that_cannot_be_split_is_refused_whole(
    splitting: World, data: bytes, status: int, reason: str
) -> None:
    assert (await splitting.exchange(data)).status == status
    assert splitting.log.stored == []
    assert splitting.count("rejected_total", source="github", reason=reason) == 1


async def test_nothing_of_a_batch_is_stored_if_one_event_is_too_large(splitting: World) -> None:
    """It is so each time that the batch is sent again: the others would be stored again and again."""
    room = splitting.ingress._body_limit
    items = [b'{"id":"a","kind":"opened"}', b'{"id":"b","kind":"x","text":"%b"}' % (b"x" * room)]
    body = gzip.compress(b'{"records":[' + b",".join(items) + b"]}")
    assert (await splitting.exchange(signed(body, "Content-Encoding: gzip"))).status == 413
    assert splitting.log.stored == []
    assert splitting.count("rejected_total", source="github", reason="body_too_large") == 1
    assert splitting.ingress._memory.free == splitting.ingress._memory._total


@pytest.mark.parametrize(
    ("of_batch", "of_one"),
    [
        ("application/cloudevents-batch+json", b"application/cloudevents+json"),
        ("Application/CloudEvents-Batch+JSON; charset=utf-8", b"application/cloudevents+json; charset=utf-8"),
        ("application/json", b"application/json"),
        ("application/cloudevents-batch+jsonx", b"application/cloudevents-batch+jsonx"),
    ],
)
async def test_an_event_of_a_batch_of_cloudevents_has_the_content_type_of_one(
    splitting: World, of_batch: str, of_one: bytes
) -> None:
    """https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md: it tells both."""
    reply = await splitting.exchange(signed(BODY, f"Content-Type: {of_batch}"))
    assert (reply.status, len(splitting.log.stored)) == (202, 2)
    for stored in splitting.log.stored:
        assert [value for name, value in stored.event.headers if name.lower() == b"content-type"] == [of_one]


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        ("text/plain", b"hello"),
        ("application/xml", b"<a/>"),
        ("application/json", b"[]"),
        ("application/json", b"[1,2,3]"),
        ("application/json", b'[{"id":"a"}]'),
        ("", b""),
    ],
)
async def test_a_cloudevent_in_binary_mode_is_one_event_whatever_its_data(
    cloudevents: World, media_type: str, body: bytes
) -> None:
    """https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md, section 3.1."""
    headers = [f"Content-Type: {media_type}"] if media_type else []
    headers += [
        "ce-specversion: 1.0",
        "ce-id: 7",
        "ce-source: /shop",
        "ce-type: paid",
        f"Authorization: Bearer {SECRET}",
    ]
    reply = await cloudevents.exchange(a_request("/in/events", *headers, body=body))
    [stored] = cloudevents.log.stored
    assert (reply.status, reply.json) == (202, {"id": stored.event.id})
    assert (stored.event.body, stored.event.type) == (body, "paid")
    again = await cloudevents.exchange(a_request("/in/events", *headers, body=body))
    assert again.json == reply.json


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_a_batch_of_cloudevents_is_so_many_events(cloudevents: World, count: int) -> None:
    items = [b'{"specversion":"1.0","id":"%d","source":"/shop","type":"paid"}' % number for number in range(count)]
    body = b"[" + b", ".join(items) + b"]"
    headers = ["Content-Type: application/cloudevents-batch+json", f"Authorization: Bearer {SECRET}"]
    reply = await cloudevents.exchange(a_request("/in/events", *headers, body=body))
    assert (reply.status, reply.json) == (202, {"ids": [stored.event.id for stored in cloudevents.log.stored]})
    assert [stored.event.body for stored in cloudevents.log.stored] == items
    assert cloudevents.ingress._memory.free == cloudevents.ingress._memory._total


async def test_a_cloudevent_in_structured_mode_is_one_event(cloudevents: World) -> None:
    body = b'{"specversion":"1.0","id":"7","source":"/shop","type":"paid","data":[1,2]}'
    headers = ["Content-Type: application/cloudevents+json", f"Authorization: Bearer {SECRET}"]
    assert (await cloudevents.exchange(a_request("/in/events", *headers, body=body))).status == 202
    assert [stored.event.body for stored in cloudevents.log.stored] == [body]


@pytest.fixture
async def cloudevents(tmp_path: Path) -> AsyncIterator[World]:
    """Return a gateway with a source of CloudEvents."""
    async with running() as world:
        path = tmp_path / "routes.yaml"
        path.write_text(f"version: 1\nsources: {{events: {{verify: {{scheme: cloudevents, secrets: [{SECRET}]}}}}}}\n")
        world.rules[0] = await asyncio.to_thread(load_rules, path, environ={})
        yield world


@pytest.mark.parametrize("expression", ["'x-id' in headers ? headers['x-id'] : body.id", "body.other"])
async def test_items_that_have_the_identity_of_their_request_have_ids_of_their_own(
    splitting: World, expression: str
) -> None:
    """Else all but the first would be dropped as duplicates."""
    source = replace(splitting.rules[0].sources["github"], id=Expression(expression))
    splitting.rules[0] = replace(splitting.rules[0], sources={"github": source})
    headers = ("X-Id: 7", "Idempotency-Key: 8")
    body = b'{"records":[{"kind":"a","id":"x"},{"kind":"a","id":"x"},{"kind":"b","id":"y"}]}'
    first, again = [(await splitting.exchange(signed(body, *headers))).json["ids"] for _ in range(2)]
    assert first == again
    assert len({*first}) == 3


async def test_an_items_id_is_known_again(splitting: World) -> None:
    """As that of an event which `dedupe` has dropped must be, lest a replay takes it for another one's."""
    source = replace(splitting.rules[0].sources["github"], id=None)
    splitting.rules[0] = replace(splitting.rules[0], sources={"github": source})
    await splitting.exchange(signed())
    stored = [each.event for each in splitting.log.stored]
    assert len({event.id for event in stored}) == len(stored) == 2
    assert all(EventBuilder(source).reproduces_id_of(event) for event in stored)
    other = replace(source, id=Expression("body.kind"))
    assert not any(EventBuilder(other).reproduces_id_of(event) for event in stored)


async def test_items_with_one_identity_of_their_own_are_copies(splitting: World) -> None:
    body = b'{"id":"z","records":[{"id":"a","kind":"x"},{"id":"a","kind":"x"},{"id":"z","kind":"x"}]}'
    ids = (await splitting.exchange(signed(body))).json["ids"]
    assert ids[0] == ids[1] != ids[2]


async def test_an_empty_batch_has_no_event(splitting: World) -> None:
    reply = await splitting.exchange(signed(b'{"records":[]}'))
    assert (reply.status, reply.json, splitting.log.stored) == (202, {"ids": []}, [])


async def test_a_batch_has_the_sources_status(splitting: World) -> None:
    source = replace(splitting.rules[0].sources["github"], response=StoredResponse(status=204))
    splitting.rules[0] = replace(splitting.rules[0], sources={"github": source})
    reply = await splitting.exchange(signed())
    assert (reply.status, reply.body, len(splitting.log.stored)) == (204, b"", 2)


@pytest.mark.parametrize("comes_later", [False, True], ids=["with_its_head", "later"])
async def test_a_forged_batch_is_refused_before_it_is_split(splitting: World, *, comes_later: bool) -> None:
    body = b'{"records":['  # which can't be split: that alone would be a 400
    expects = ["Expect: 100-continue"] * comes_later
    forged = signed(body, *expects).replace(github_signature(body).encode(), b"sha256=" + b"0" * 64, 1)
    async with splitting.wire() as wire:
        if comes_later:
            wire.send(forged.removesuffix(body))
            assert (await wire.reply()).status == 100
            wire.send(body)
        else:
            wire.send(forged)
        assert (await wire.reply()).status == 401
    assert splitting.count("rejected_total", source="github", reason="bad_signature") == 1


def test_a_provider_says_what_is_split() -> None:
    for name, path in (("event-grid", ()), ("microsoft-graph", ("value",)), ("github", None)):
        assert build_verifier({"scheme": name, "secrets": [SECRET]}).split == path
    assert orjson.loads(BODY)["records"]
