"""Requests whose bodies are compressed, forms or XML: verified and stored as they came, and read where it is needed."""

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.model import identity_of
from gateway.rules.expressions import Expression
from gateway.rules.rules import StoredResponse
from gateway.rules.templates import Template
from gateway.verify.schemes import build_verifier
from tests.ingress.test_ingress import SECRET, World, a_request, a_source, github_signature, running, some_rules

PUSH = b'{"id": "e1", "kind": "push", "team": "a"}'
FORM = "Content-Type: application/x-www-form-urlencoded"
XML = "Content-Type: application/xml"
MULTIPART = "Content-Type: multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


@pytest.fixture
async def reading() -> AsyncIterator[World]:
    """Return a gateway with a source `read`, whose identity, type and key are in its signed bodies; `open` has none."""
    async with running() as world:
        verify = {"scheme": "hmac", "header": "X-Signature", "secrets": [SECRET]}
        read = a_source("read", verify, id="body.id", type="body.kind", key="body.team")
        world.rules[0] = some_rules(read, a_source("open", {"scheme": "none"}))
        yield world


def signed(body: bytes, *headers: str) -> bytes:
    signature = github_signature(body).removeprefix("sha256=")
    return a_request("/in/read", f"X-Signature: {signature}", *headers, body=body)


READABLE = {
    "JSON": ((), PUSH),
    "gzip": (("Content-Encoding: gzip",), gzip.compress(PUSH)),
    "deflate": (("Content-Encoding: Deflate",), zlib.compress(PUSH)),
    "several codings": (("Content-Encoding: deflate, gzip",), gzip.compress(zlib.compress(PUSH))),
    "several lines": (("Content-Encoding: deflate", "Content-Encoding: gzip"), gzip.compress(zlib.compress(PUSH))),
    "a form": ((FORM,), b"id=e1&kind=push&team=a"),
    "a compressed form": ((FORM, "Content-Encoding: gzip"), gzip.compress(b"id=e1&kind=push&team=a")),
    "multipart": ((MULTIPART,), PART % (b"id", b"e1") + PART % (b"kind", b"push") + PART % (b"team", b"a") + b"--b--"),
}


@pytest.mark.parametrize("name", READABLE)
async def test_it_is_stored_as_it_came_and_identified_by_what_it_contains(reading: World, name: str) -> None:
    headers, body = READABLE[name]
    reply = await reading.exchange(signed(body, *headers))
    [stored] = reading.log.stored
    event = stored.event
    assert reply.status == 202
    assert event.body == body
    assert [f"{key.decode()}: {value.decode()}" for key, value in event.headers if key.startswith(b"Content-E")] == [
        line for line in headers if line.startswith("Content-E")
    ]
    assert (event.type, event.key) == ("push", "a")
    plain = await reading.exchange(signed(PUSH))
    assert identity_of(reading.log.stored[1].event.id) == identity_of(event.id)
    assert plain.status == 202


async def test_xml_has_an_identity_too(reading: World) -> None:
    source = replace(
        reading.rules[0].sources["read"], id=Expression("body.e['@id']"), type=Expression("body.e.kind"), key=None
    )
    reading.rules[0] = replace(reading.rules[0], sources={"read": source})
    ids = []
    for body in (b"<e id='1'><kind>push</kind></e>", b'<e id="1" ><kind>push</kind></e>'):
        reply = await reading.exchange(signed(body, XML))
        assert reply.status == 202
        ids.append(reading.log.stored[-1].event.id)
    assert ids[0] == ids[1]
    assert reading.log.stored[0].event.type == "push"


UNREADABLE = {
    "another coding": (("Content-Encoding: br",), PUSH, 415, "content_coding"),
    "another coding within": (("Content-Encoding: zstd, gzip",), gzip.compress(PUSH), 415, "content_coding"),
    "no gzip": (("Content-Encoding: gzip",), PUSH, 400, "malformed_content"),
    "cut off": (("Content-Encoding: gzip",), gzip.compress(PUSH)[:-1], 400, "malformed_content"),
    "a bomb": (("Content-Encoding: gzip",), gzip.compress(b" " * (9 << 20)), 413, "content_too_large"),
    "too many fields": ((FORM,), b"&" * 10_000, 413, "content_too_large"),
    "half a multipart form": ((MULTIPART,), PART % (b"id", b"e1"), 400, "malformed_content"),
    "no XML": ((XML,), b"<a>", 400, "malformed_content"),
    "a document type": ((XML,), b"<!DOCTYPE a><a/>", 400, "malformed_content"),
    "no JSON": ((), b"{", 400, "body_not_json"),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_where_the_ingress_needs_what_it_cannot_read_it_refuses_and_says_why(reading: World, name: str) -> None:
    headers, body, status, reason = UNREADABLE[name]
    reply = await reading.exchange(signed(body, *headers))
    assert reply.status == status
    assert reply.json["detail"].startswith("id: expected ")
    assert reply.headers.get("accept-encoding") == ("gzip, deflate" if status == 415 else None)
    assert reading.log.stored == []
    assert reading.count("rejected_total", source="read", reason=reason) == 1
    assert reading.ingress._memory.free == reading.ingress._memory._total


@pytest.mark.parametrize("name", UNREADABLE)
async def test_where_only_routing_would_read_it_it_is_stored(reading: World, name: str) -> None:
    headers, body, _, _ = UNREADABLE[name]
    assert (await reading.exchange(a_request("/in/open", *headers, body=body))).status == 202
    [stored] = reading.log.stored
    assert stored.event.body == body


@pytest.mark.parametrize("name", READABLE)
async def test_a_signature_is_of_the_bytes_as_they_came(reading: World, name: str) -> None:
    headers, body = READABLE[name]
    signature = github_signature(PUSH + b" ").removeprefix("sha256=")
    request = a_request("/in/read", f"X-Signature: {signature}", *headers, body=body)
    assert (await reading.exchange(request)).status == 401
    if "gzip" in name:  # of what was compressed, as some sign it
        signature = github_signature(PUSH).removeprefix("sha256=")
        assert (
            await reading.exchange(a_request("/in/read", f"X-Signature: {signature}", *headers, body=body))
        ).status == 401
    assert reading.log.stored == []


async def test_nothing_is_decompressed_that_is_not_verified(reading: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zlib.decompressobj", lambda _: pytest.fail("it was decompressed"))
    forged = a_request("/in/read", "X-Signature: 00", "Content-Encoding: gzip", body=gzip.compress(PUSH))
    assert (await reading.exchange(forged)).status == 401
    token = build_verifier({"scheme": "token", "field": "token", "secrets": [SECRET]})
    source = replace(reading.rules[0].sources["read"], verifier=token)
    reading.rules[0] = replace(reading.rules[0], sources={"read": source})
    inside = a_request("/in/read", "Content-Encoding: gzip", body=gzip.compress(b'{"token": "%b"}' % SECRET.encode()))
    reply = await reading.exchange(inside)
    assert reply.status == 401
    assert "Content-Encoding" in reply.json["detail"]
    assert reading.count("rejected_total", source="read", reason="unreadable_body") == 1


async def test_nothing_is_decompressed_that_nobody_reads(reading: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zlib.decompressobj", lambda _: pytest.fail("it was decompressed"))
    request = a_request("/in/open", "Content-Encoding: gzip", body=gzip.compress(PUSH))
    assert (await reading.exchange(request)).status == 202


async def test_what_is_decompressed_is_gone_while_events_wait_for_the_log(reading: World) -> None:
    body = gzip.compress(b'{"id": "e1", "kind": "push", "team": "a", "text": "%b"}' % (b"x" * 2_000_000))
    reading.log.may_append.clear()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        exchanges = [asyncio.create_task(reading.exchange(signed(body, "Content-Encoding: gzip"))) for _ in range(10)]
        async with asyncio.timeout(20):
            while reading.log.waiting < len(exchanges):  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept - before < 2_000_000
    assert most - before < 50_000_000  # of one at a time: orjson takes twelve times of what it reads
    reading.log.may_append.set()
    assert {(await exchange).status for exchange in exchanges} == {202}


async def test_a_response_reads_it_too(reading: World) -> None:
    response = StoredResponse(status=200, body=Template("hello ${{ body.user }}"))
    source = replace(a_source("open", {"scheme": "none"}), response=response)
    reading.rules[0] = replace(reading.rules[0], sources={"open": source})
    reply = await reading.exchange(a_request("/in/open", FORM, body=b"user=ann"))
    assert (reply.status, reply.body) == (200, b"hello ann")


async def test_a_handshake_may_be_compressed() -> None:
    async with running() as world:
        verify = {"scheme": "hmac", "header": "X-Signature", "secrets": [SECRET], "handshake": "challenge-json"}
        world.rules[0] = some_rules(a_source("read", verify))
        body = gzip.compress(b'{"challenge": "c1"}')
        reply = await world.exchange(signed(body, "Content-Encoding: gzip"))
        assert (reply.status, reply.json) == (200, {"challenge": "c1"})
        assert world.log.stored == []
        for body in (
            gzip.compress(b'{"challenge": "c1"}')[:-1],
            gzip.compress(b'{"challenge":' + b" " * 20_000 + b'"c1"}'),
        ):
            assert (await world.exchange(signed(body, "Content-Encoding: gzip"))).status == 202
        assert (await world.exchange(signed(b'{"challenge": "c1"}', "Content-Encoding: br"))).status == 202
        assert len(world.log.stored) == 3


async def test_two_pipelined_requests_are_read_each_by_its_own_coding(reading: World) -> None:
    async with reading.wire() as wire:
        wire.send(signed(gzip.compress(PUSH), "Content-Encoding: gzip") + signed(b"id=e1&kind=push&team=a", FORM))
        assert [(await wire.reply()).status for _ in range(2)] == [202, 202]
    first, second = [stored.event for stored in reading.log.stored]
    assert (first.id, first.type) == (second.id, second.type)
    assert first.body != second.body
