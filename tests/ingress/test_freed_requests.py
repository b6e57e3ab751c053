"""What a request took is free when its response is sent: a cycle of references would keep bodies beyond their memory.

Python frees an object with its last reference, and one in a cycle only when its collector runs, which is after
thousands of requests here (`gateway/commands/run.py`).
"""

import asyncio
import base64
import gc
import gzip
import hmac
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from gateway.ingress.server import Connection, Limits
from gateway.model import Event, RefusedError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.rules import Source
from gateway.verify.content import Content
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier
from gateway.verify.verifier import PendingVerification
from tests.certificates import Authority
from tests.ingress.test_ingress import (
    BAD_REQUESTS,
    CHUNKED,
    CRM,
    NOW,
    PING,
    World,
    a_request,
    chunked,
    github,
    github_signature,
    running,
    signed,
)

GITHUB = f"X-Hub-Signature-256: {github_signature()}"
PARTIAL = b"POST /in/github HTTP/1.1\r\nHost: hooks.example\r\n"
WRONG_TOKEN = "X-Token: wrong"
FORGED = "X-Hub-Signature-256: sha256=" + "0" * 64
FIELD_MAC = hmac.new(b"key", b"7", "sha256").hexdigest()
SVIX = ["webhook-id: e1", f"webhook-timestamp: {NOW:.0f}"]
SIGNED_BY_SVIX = base64.b64encode(hmac.new(b"key", b"e1.%.0f." % NOW + PING, "sha256").digest()).decode()

GZIP, FORM, XML = (
    "Content-Encoding: gzip",
    "Content-Type: application/x-www-form-urlencoded",
    "Content-Type: text/xml",
)
OF_A_REQUEST = (Connection, Content, Event, EventView, PendingVerification, RefusedError, Request)

GOOD_REQUESTS = {
    "signed": github(GITHUB),
    "signed in the body": a_request("/in/field", body=b'{"mac":"%b","n":7}' % FIELD_MAC.encode()),
    "with a token": a_request("/in/crm", CRM),
    "with a time": signed("stripe"),
    "in chunks": github(GITHUB, CHUNKED, body=chunked(PING)),
    "in chunks, by the second method": a_request(
        "/in/svix", *SVIX, f"webhook-signature: v1,{SIGNED_BY_SVIX}", CHUNKED, body=chunked(PING)
    ),
    "by the second method": a_request("/in/svix", *SVIX, f"webhook-signature: v1,{SIGNED_BY_SVIX}"),
    "after a forged line": github(FORGED, GITHUB),
    "after a malformed line": github("X-Hub-Signature-256: x", GITHUB),
    "with an identity in a form": a_request("/in/crm", CRM, FORM, body=b"id=1"),
    "with an identity in XML": a_request("/in/xml", XML, body=b"<a id='1'/>"),
    "with an identity that was compressed": a_request("/in/crm", CRM, GZIP, body=gzip.compress(PING)),
    "several compressed events": a_request("/in/split", GZIP, body=gzip.compress(b'{"records":[{"id":1},{"id":2}]}')),
    "several events": a_request("/in/split", body=b'{"records":[{"id":1},{"id":2}]}'),
}
REFUSED = {
    **BAD_REQUESTS,
    "neither method": (a_request("/in/svix"), 401, "missing"),
    "forged, by the second method": (a_request("/in/svix", *SVIX, "webhook-signature: v1," + "A" * 43 + "="), 401, ""),
    "forged, in chunks": (github(FORGED, CHUNKED, body=chunked(PING)), 401, "bad_signature"),
    "two forged lines": (github(FORGED, FORGED), 401, "bad_signature"),
    "a malformed line and a forged one": (github("X-Hub-Signature-256: x", FORGED), 401, "bad_signature"),
    "no JSON to verify": (a_request("/in/field", body=b"{"), 401, "unreadable_body"),
    "no batch": (a_request("/in/split", GZIP, body=b'{"records":[1,2]}'), 400, "malformed_content"),
    "no identity in a form": (a_request("/in/crm", CRM, FORM, body=b"&" * 10_000), 413, "content_too_large"),
    "no XML": (a_request("/in/xml", XML, body=b"<a>"), 400, "malformed_content"),
    "XML that is too deep": (a_request("/in/xml", XML, body=b"<a>" * 101), 413, "content_too_large"),
    "half of what was compressed": (a_request("/in/crm", CRM, GZIP, body=gzip.compress(PING)[:-1]), 400, "malformed"),
    "another coding": (a_request("/in/crm", CRM, "Content-Encoding: br"), 415, "content_coding"),
}


FORGED_CHUNKS = a_request("/in/github", FORGED, CHUNKED, body=b"")
ENDS = {
    "before it says anything": [b""],
    "amid a head": [PARTIAL],
    "with a head that is too large": [PARTIAL + b"X-A: " + b"x" * 80_000],
    "amid a body": [github(GITHUB)[:-1]],
    "amid a body in chunks": [github(GITHUB, CHUNKED, body=b"5\r\n")],
    "amid a body that its head has refused": [a_request("/in/crm", WRONG_TOKEN)[:-1]],
    "with a malformed rest of a body that its head has refused": [
        a_request("/in/crm", WRONG_TOKEN, CHUNKED, body=b"3\r\nabc\r\n"),
        b"zz\r\n",
    ],
    "before its response": [github(GITHUB)],
    "with what isn't HTTP, after a good request": [github(GITHUB), b"\x16\x03\x01\r\n\r\n"],
    "with a malformed rest of a forged body": [FORGED_CHUNKS, b"3\r\nabc\r\nzz\r\n"],
    "with a malformed rest of a body": [github(GITHUB, CHUNKED, body=b"3\r\nabc\r\n"), b"zz\r\n"],
}
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


def more_sources() -> list[Source]:
    field = {"scheme": "hmac", "field": "mac", "signed": "{field:n}", "secrets": ["key"]}
    svix = {"scheme": "svix", "secrets": ["whsec_" + base64.b64encode(b"key").decode()]}
    return [
        Source(name="svix", path="/in/svix", verifier=build_verifier(svix)),
        Source(name="field", path="/in/field", verifier=build_verifier(field)),
        Source(name="xml", path="/in/xml", verifier=build_verifier({"scheme": "none"}), id=Expression("body.a['@id']")),
        Source(name="split", path="/in/split", verifier=build_verifier({"scheme": "none"}), split=("records",)),
    ]


@pytest.fixture(scope="module")
def pki() -> Authority:
    return Authority("servers")


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("case", [*GOOD_REQUESTS, *REFUSED])
async def test_nothing_of_a_request_outlives_it(case: str) -> None:
    request, status = (GOOD_REQUESTS[case], 202) if case in GOOD_REQUESTS else REFUSED[case][:2]
    async with running(limits=Limits(body_seconds=0.05)) as world:
        sources = {source.name: source for source in more_sources()}
        world.rules[0] = replace(world.rules[0], sources={**world.rules[0].sources, **sources})
        assert (await world.exchange(request)).status == status
        await _closed(world)
        world.log.stored.clear()
        assert _left() == []


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("way", ["plain", "TLS", "quarantine"])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_of_a_connection_outlives_it(
    loop: Callable[[], asyncio.AbstractEventLoop], way: str, end: str, pki: Authority, tmp_path: Path
) -> None:
    is_tls = way == "TLS"
    certificates = [pki.file(tmp_path, "hooks.example")] if is_tls else []
    trust = ssl.create_default_context(cadata=pki.pem) if is_tls else None
    name = "hooks.example" if is_tls else None

    async def run() -> list[object]:
        async with running(limits=Limits(head_seconds=0.2), certificates=certificates) as world:
            rules = world.rules[0]
            kept = {name: replace(rules.sources[name], quarantine=way == "quarantine") for name in ("github", "crm")}
            world.rules[0] = replace(rules, sources={**rules.sources, **kept})
            _, writer = await asyncio.open_connection("127.0.0.1", world.port, ssl=trust, server_hostname=name)
            for piece in ENDS[end]:
                writer.write(piece)
                await asyncio.sleep(0.02)
            writer.transport.abort()
            del writer
            await _closed(world)
            world.log.stored.clear()
            return _left()

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(run()) == []


async def _closed(world: World) -> None:
    """Wait until no connection is open."""
    assert world.ingress._web is not None
    async with asyncio.timeout(5):
        while world.ingress._web.connections:  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0)


def _left() -> list[object]:
    return [each for each in gc.get_objects() if isinstance(each, OF_A_REQUEST)]
