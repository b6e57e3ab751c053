"""What a request took is free when its response is sent: a cycle of references would keep bodies beyond their memory.

Python frees an object with its last reference, and one in a cycle only when its collector runs, which is after
thousands of requests here (`gateway/commands/run.py`).
"""

import asyncio
import base64
import gc
import hmac
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gateway.ingress.server import Limits
from gateway.model import Event, RefusedError
from gateway.rules.rules import Source
from gateway.verify.content import Content
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier
from gateway.verify.verifier import PendingVerification
from tests.ingress.test_ingress import (
    BAD_REQUESTS,
    CHUNKED,
    CRM,
    NOW,
    PING,
    a_request,
    chunked,
    github,
    github_signature,
    running,
    signed,
)

GITHUB = f"X-Hub-Signature-256: {github_signature()}"
FORGED = "X-Hub-Signature-256: sha256=" + "0" * 64
FIELD_MAC = hmac.new(b"key", b"7", "sha256").hexdigest()
SVIX = ["webhook-id: e1", f"webhook-timestamp: {NOW:.0f}"]
SIGNED_BY_SVIX = base64.b64encode(hmac.new(b"key", b"e1.%.0f." % NOW + PING, "sha256").digest()).decode()

OF_A_REQUEST = (Content, Event, PendingVerification, RefusedError, Request)

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
    "no batch": (a_request("/in/split", "Content-Encoding: gzip", body=b'{"records":[1,2]}'), 400, "malformed_batch"),
}


def more_sources() -> list[Source]:
    field = {"scheme": "hmac", "field": "mac", "signed": "{field:n}", "secrets": ["key"]}
    svix = {"scheme": "svix", "secrets": ["whsec_" + base64.b64encode(b"key").decode()]}
    return [
        Source(name="svix", path="/in/svix", verifier=build_verifier(svix)),
        Source(name="field", path="/in/field", verifier=build_verifier(field)),
        Source(name="split", path="/in/split", verifier=build_verifier({"scheme": "none"}), split=("records",)),
    ]


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """Collect nothing, and let `gc.get_objects` return only what is created from now on."""
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("case", [*GOOD_REQUESTS, *REFUSED])
async def test_nothing_of_a_request_outlives_it(case: str) -> None:
    request, status = (GOOD_REQUESTS[case], 202) if case in GOOD_REQUESTS else REFUSED[case][:2]
    async with running(limits=Limits(body_seconds=0.05)) as world:
        sources = {source.name: source for source in more_sources()}
        world.rules[0] = replace(world.rules[0], sources={**world.rules[0].sources, **sources})
        assert (await world.exchange(request)).status == status
        server = world.ingress._web
        assert server is not None
        async with asyncio.timeout(5):
            while server.connections:  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0)
        world.log.stored.clear()
        assert not [each for each in gc.get_objects() if isinstance(each, OF_A_REQUEST)]
