"""Compressed bodies, forms and XML on their whole way: delivered as they came, and routed by what is in them."""

import gzip
import zlib
from contextlib import AsyncExitStack
from pathlib import Path

import orjson
import pytest

from tests.acceptance.conftest import SOURCES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import post, signed_post
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = (
    SOURCES
    + """
destinations:
  opened: {{url: "{opened}"}}
  told: {{url: "{told}"}}
  rest: {{url: "{rest}"}}
routes:
  - {{name: opened, from: github, to: opened, match: {{body.payload.action: opened}}}}
  - name: told
    from: github
    to: told
    when: body.payload.action == 'opened'
    request: {{body: {{action: "${{{{ body.payload.action }}}}"}}}}
  - {{name: rest, from: github, to: rest, match: {{not: {{body.payload.action: opened}}}}}}
"""
)
PLAIN = b'{"payload": {"action": "opened"}}'
PART = b"--b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n"
FORM = ("Content-Type", "application/x-www-form-urlencoded")
READABLE = {
    "gzip": ([("Content-Encoding", "gzip")], gzip.compress(PLAIN)),
    "deflate in gzip": ([("Content-Encoding", "deflate, gzip")], gzip.compress(zlib.compress(PLAIN))),
    "form": ([FORM], b"payload=%7B%22action%22:+%22opened%22%7D"),
    "multipart": (
        [("Content-Type", "multipart/form-data; boundary=b")],
        PART % (b'name="payload"', b'{"action":"opened"}') + PART % (b'name=f; filename="a.bin"', b"\xff\0") + b"--b--",
    ),
    "xml": ([("Content-Type", "application/soap+xml")], b"<payload><action>opened</action></payload>"),
}
UNREADABLE = {
    "br": ([("Content-Encoding", "br")], PLAIN),
    "bomb": ([("Content-Encoding", "gzip")], gzip.compress(b"0" * (64 << 20))),
    "dtd": ([("Content-Type", "text/xml")], b"<!DOCTYPE payload><payload><action>opened</action></payload>"),
}


async def test_bodies_are_delivered_as_they_came_and_routed_by_what_they_contain(place: LogPlace, folder: Path) -> None:
    async with AsyncExitStack() as stack:
        opened, told, rest = [await stack.enter_async_context(Sink(200)) for _ in range(3)]
        rules = RULES.format(opened=opened.url, told=told.url, rest=rest.url)
        gateway = await stack.enter_async_context(
            GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        )
        ids: dict[str, str] = {}
        for name, (headers, body) in (READABLE | UNREADABLE).items():
            request = signed_post(body, delivery=name, headers=headers)
            if any(key == "Content-Type" for key, _ in headers):
                request = request.replace(b"Content-Type: application/json\r\n", b"", 1)
            status, ids[name] = await post(gateway.port, request)
            assert status == 202, name
        await opened.received(len(READABLE))
        await told.received(len(READABLE))
        await rest.received(len(UNREADABLE))
        for sink, cases in ((opened, READABLE), (rest, UNREADABLE)):
            got = {each.header("gateway-event-id"): each for each in sink.requests}
            assert got.keys() == {ids[name] for name in cases}
            for name, (headers, body) in cases.items():
                assert got[ids[name]].body == body, name
                assert {*got[ids[name]].headers} >= {(key.encode(), value.encode()) for key, value in headers}
        for each in told.requests:
            assert orjson.loads(each.body) == {"action": "opened"}
            assert each.header("content-encoding") is None
        await gateway.stop()
