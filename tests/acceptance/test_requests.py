"""Requests that routes make, with each method, path, query and form: what a destination gets is what `test` tells."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import parse_qs

import orjson
import pytest

from gateway.cli import main
from tests.acceptance.conftest import SOURCES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import post, signed_post
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = (
    SOURCES
    + """
destinations:
  crm: {{url: "{crm}api?key=k"}}
routes:
  - name: put
    from: github
    to: crm
    let: {{who: "default(body.who, 'nobody')", total: 'money(body.cents, body.currency)'}}
    when: who != 'nobody'
    request:
      method: PUT
      path: /people/${{{{ who }}}}
      query: {{tag: "${{{{ body.tags }}}}", none: null}}
      headers: {{If-Match: "${{{{ body.version }}}}"}}
      body: {{total: "${{{{ total }}}}", at: "${{{{ date(body.at, '%Y-%m-%d') }}}}"}}
  - {{name: patch, from: github, to: crm, request: {{method: PATCH, path: /raw}}}}
  - {{name: delete, from: github, to: crm, request: {{method: DELETE, path: "/people/${{{{ body.who }}}}"}}}}
  - {{name: get, from: github, to: crm, request: {{method: GET, query: {{who: "${{{{ body.who }}}}"}}}}}}
  - {{name: form, from: github, to: crm, request: {{path: /form, form: {{who: "${{{{ body.who }}}}", ok: true}}}}}}
tests:
  - name: as it is sent
    event:
      source: github
      headers: {{X-GitHub-Event: push}}
      body: {{who: "../a&b", cents: 1999, currency: usd, tags: ["x y", 1], version: 7, at: 1767323045}}
    expect:
      routes: [put, patch, delete, get, form]
      requests:
        - route: put
          method: PUT
          url: "{crm}api/people/..%2Fa%26b?key=k&tag=x%20y&tag=1"
          headers: {{If-Match: "7", X-GitHub-Event: null}}
          body: {{total: 19.99 USD, at: "2026-01-02"}}
        - {{route: patch, method: PATCH, url: "{crm}api/raw?key=k", headers: {{X-GitHub-Event: push}}}}
        - {{route: delete, method: DELETE, url: "{crm}api/people/..%2Fa%26b?key=k", body: ""}}
        - {{route: get, method: GET, url: "{crm}api?key=k&who=..%2Fa%26b", body: ""}}
        - {{route: form, method: POST, body: {{who: "../a&b", ok: "true"}}}}
"""
)
BODY = orjson.dumps(
    {"who": "../a&b", "cents": 1999, "currency": "usd", "tags": ["x y", 1], "version": 7, "at": 1767323045}
)


async def test_each_request_is_made_as_its_route_says(place: LogPlace, folder: Path) -> None:
    async with AsyncExitStack() as stack:
        crm = await stack.enter_async_context(Sink(200, path="/"))
        rules = RULES.format(crm=crm.url)
        gateway = await stack.enter_async_context(
            GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        )
        status, _ = await post(gateway.port, signed_post(BODY, delivery="1"))
        assert status == 202
        await crm.received(5)
        await gateway.stop()
    told = folder / "told.yaml"
    await asyncio.to_thread(told.write_text, rules)
    assert await asyncio.to_thread(main, ["test", str(told)]) == 0
    made = {request.header("gateway-route"): request for request in crm.requests}
    put, patch, delete, get, form = [made[name] for name in ("put", "patch", "delete", "get", "form")]
    assert (put.method, put.target) == ("PUT", "/api/people/..%2Fa%26b?key=k&tag=x%20y&tag=1")
    assert orjson.loads(put.body) == {"total": "19.99 USD", "at": "2026-01-02"}
    assert (put.header("if-match"), put.header("x-github-event")) == ("7", None)
    assert (patch.method, patch.target, patch.body) == ("PATCH", "/api/raw?key=k", BODY)
    assert patch.header("x-github-event") == "push"
    assert (delete.method, delete.target, delete.body) == ("DELETE", "/api/people/..%2Fa%26b?key=k", b"")
    assert (get.method, get.target, get.body) == ("GET", "/api?key=k&who=..%2Fa%26b", b"")
    assert (form.method, form.header("content-type")) == ("POST", "application/x-www-form-urlencoded")
    assert parse_qs(form.body.decode()) == {"who": ["../a&b"], "ok": ["true"]}
