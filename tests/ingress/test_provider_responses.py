"""A provider that takes only a certain response for a success gets that for what it has signed."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import orjson
import pytest

from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from gateway.verify.presets import PRESETS
from tests.ingress.test_ingress import running
from tests.verify.vectors import Vector, vectors

OWN = [each for each in vectors() if each.scheme in PRESETS and PRESETS[each.scheme].response is not None]


def rules_of(vector: Vector, path: Path, own: Mapping[str, object]) -> Rules:
    respond = dict(own) or None
    source = {
        "path": "/in/it",
        "respond": respond,
        "verify": {"scheme": vector.scheme, **vector.config},
        "public_url": vector.public_url,
    }
    given = {key: value for key, value in source.items() if value is not None}
    path.write_bytes(orjson.dumps({"version": 1, "sources": {"it": given}, "destinations": {}, "routes": []}))
    return load_rules(path, environ={})


@pytest.mark.parametrize("vector", [each for each in OWN if not each.documents], ids=str)
@pytest.mark.parametrize("own", [{}, {"headers": {"X-A": "b"}}], ids=["no response", "own headers"])
async def test_a_stored_event_gets_the_response_that_its_provider_wants(
    vector: Vector, own: Mapping[str, object], tmp_path: Path
) -> None:
    wanted = PRESETS[vector.scheme].response
    assert wanted is not None
    rules = await asyncio.to_thread(rules_of, vector, tmp_path / "routes.yaml", own)
    sent = vector.request
    lines = [f"{sent.method} /in/it?{sent.query} HTTP/1.1".encode(), b"Host: gateway.example"]
    lines += [b"%b: %b" % pair for pair in sent.headers]
    head = b"\r\n".join([*lines, b"Content-Length: %d" % len(sent.body), b"", b""])
    async with running(clock=lambda: vector.now) as world:
        world.rules[0] = rules
        reply = await world.exchange(head + sent.body)
        # QuickBooks sends a list of events.
        assert len(world.log.stored) == (len(orjson.loads(sent.body)) if sent.body.startswith(b"[") else 1)
    assert reply.status == wanted.status
    assert reply.headers.get("x-a") == ("b" if own else None)
    match wanted.body:
        case None if wanted.status == 204:
            assert reply.body == b""
        case None:
            assert reply.json.keys() & {"id", "ids"}
        case str(text):
            assert reply.body == text.encode()
        case other:
            assert reply.json == other
            assert reply.headers["content-type"] == "application/json"
