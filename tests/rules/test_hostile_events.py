"""What any sender may put into an event: each request that is made of it is a valid one, to where the rules say.

Each value is in an event as it is sent, so that it is also what JSON can't say. What the texts of messages mean to the
services that show them is in `test_request_presets.py`.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import pytest
import yarl

from gateway.client.request import Outbound, compose
from gateway.engine.deliveries_of_event import plan
from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from tests.builders import NOW, an_event
from tests.rules.test_request_presets import FIELDS, HOSTILE

SECONDS = 1.0
"""Of processor time for one request, or for all conditions, on a slow machine."""
A = "${{ body.a }}"
FUNCTIONS = (
    "string(body.a).upper()",
    "string(body.a).trim()",
    "string(body.a).split('a')",
    "string(body.a).split(' ').join(',')",
    "string(body.a).substring(0, 4)",
    "string(body.a).replace('a', 'xx')",
    "string(body.a).truncate(5)",
    "string(body.a).extract('^(a+)+$')",
    "'%s %d %.2f'.format([body.a, body.a, body.a])",
    "default(body.a.b.c, body.a)",
    "money(body.a, 'EUR')",
    "date(body.a, '%Y', 'UTC')",
    "date(0, string(body.a), 'UTC')",
    "timestamp(body.a)",
    "url(body.a)",
    "json(body.a)",
    "base64(body.a)",
    "sha256(body.a)",
    "ceAttribute(body.a)",
    "hmac(body.a, 'pepper')",
    "body.a.map(x, x)",
    "body.a + body.a",
    "size(body.a)",
    "body.a == body.a",
    "body.a in [body.a]",
)
REQUESTS: dict[str, Mapping[str, Any]] = {
    "json": {"body": {"x": A, "y": f"<{A}>", "z": [A, {"deep": A}]}},
    "text": {"body": f"x {A}\n{A}"},
    "loop": {"body": {"x": {"for": "body.a", "as": "each_", "do": {"v": "${{ each_ }}", "w": "<${{ each_ }}>"}}}},
    "joined": {"body": {"x": {"for": "body.a", "as": "each_", "join": ", ", "do": "<${{ each_ }}>"}}},
    "form": {"form": {"x": A, "y": f"<{A}>"}},
    "path": {"method": "PUT", "path": f"/a/{A}/b"},
    "path-part": {"method": "DELETE", "path": f"/a/x{A}..."},
    "query": {"method": "GET", "query": {"x": A, "y": f"<{A}>"}},
    "header": {"headers": {"X-A": A, "X-B": f"<{A}>"}},
    **{f"function-{n}": {"body": {"x": f"${{{{ {text} }}}}"}} for n, text in enumerate(FUNCTIONS)},
    **{name: {"preset": name, **fields} for name, fields in FIELDS.items()},
}
KEYS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "matched": {"match": {"body.a": ["*a*", 7, True]}},
    "ranged": {"match": {"body.a": {"gt": -5, "lt": 10**9}}},
    "conditioned": {"when": "string(body.a).matches('^(a+)+$') || body.a.size() > 2"},
    "chosen": {"to": f"t-{A}"},
    "chosen-or": {"to": f"t-{A}", "otherwise": "t-rest"},
    "split": {"split": "body.a"},
    "split-path": {"split": "body.a", "request": {"method": "PUT", "path": "/a/${{ item }}"}},
    "split-text": {"split": "body.a", "request": {"body": "<${{ item.b }}>"}},
    "debounced": {"debounce": {"key": "body.a", "quiet": "30s"}},
    "named": {"let": {"x": "body.a", "y": "[x, x]"}, "request": {"body": {"y": "${{ y }}"}}},
    **{name: {"request": request} for name, request in REQUESTS.items()},
}
VALUES: dict[str, bytes] = {
    **{name: json.dumps(value).encode() for name, value in HOSTILE.items()},
    "letters": json.dumps("a" * 30_000 + "!").encode(),
    "as UTF-8": json.dumps("\u202e\ufeff\U0001f468\u200d\U0001f469 \x7f", ensure_ascii=False).encode(),
    "half a pair": rb'"\ud800x\udc00"',
    "no UTF-8": b'"\xff\xfe\xc3\x28\xed\xa0\x80"',
    "NUL": rb'"\u0000"',
    "no string": b'"\n\r\x00"',
    "way up": b'".."',
    "way up in hex": b'"%2e%2e%2f..%5c"',
    "host": b'"//evil.example/@evil.example:1?#"',
    "another": b'"other"',
    "lists in lists": b"[" * 50_000 + b"]" * 50_000,
    "mappings in mappings": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "as deep as is read": b"[" * 900 + b"]" * 900,
    "digits": b"1" * 1_000_000,
    "digits after a point": b"0." + b"1" * 1_000_000,
    "more digits than are read": b"7" * 10_000_000,
    "halves of surrogate pairs": b'"' + rb"\ud83d" * 349_000 + b'"',
    "backslashes and no end": b'"' + b"\\" * 10_000_001,
    "beyond 64 bits": b"-9223372036854775809",
    "beyond a double": b"1e400",
    "next to nothing": b"-1e-400",
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "null": b"null",
    "true": b"true",
    "7": b"7",
    "half": b"0.5",
    "empty list": b"[]",
    "empty mapping": b"{}",
    "list": rb'["<!channel>", "..", "", 7, null, {"b": "\r\n"}, [[]]]',
    "many items": b"[" + b",".join([b'{"b":"..","b":"%d"}' % n for n in range(500)]) + b"]",
    "many keys": b"{" + b",".join([b'"k%d":"<b>"' % n for n in range(5_000)]) + b"}",
    "hostile keys": json.dumps({"\r\nX: y": 1, "": 2, "<b>": {"__proto__": 3}, "a.b[0]": 4}).encode(),
    "another member": b'1, "a": "<!channel>", "a": ".."',
    "end of the body": b"1} <!channel>",
}
TYPES = ("application/json", "application/x-www-form-urlencoded", "application/xml")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Rules:
    """Return rules with a route for each kind of key and request."""
    destinations = {name: {"url": f"http://{name}.example/base?fixed=1"} for name in ("d", "t-a", "t-rest", "t-7")}
    routes = [{"name": name, "from": "shop", "to": "d", **keys} for name, keys in KEYS.items()]
    document = {
        "version": 1,
        "secrets": {"pepper": "0123456789abcdef0123456789abcdef"},
        "sources": {"shop": {"verify": {"scheme": "none"}}},
        "destinations": destinations,
        "routes": routes,
    }
    (file := tmp_path_factory.mktemp("rules") / "routes.yaml").write_text(json.dumps(document))
    return load_rules(file)


def requests_of(rules: Rules, body: bytes, content_type: str) -> dict[str, list[Outbound]]:
    """Return the requests that can be made of an event, by route. Any error but that of an expression is a fault."""
    headers = {"Content-Type": content_type} if content_type else {}
    event = an_event(source="shop", body=body, headers=headers)
    view = EventView.of(event)
    made: dict[str, list[Outbound]] = {}
    began = time.process_time()
    all_planned = plan(event, view, rules.table.match(view))
    assert time.process_time() - began < SECONDS
    for planned in all_planned:
        delivery, route = planned.delivery, rules.routes[planned.delivery.route]
        if planned.end is not None:
            continue
        assert delivery.destination in route.destinations
        began = time.process_time()
        try:
            request = compose(
                delivery, rules.destinations[delivery.destination], route.request, now=NOW, split=route.split
            )
        except ExpressionError:
            continue  # a dead letter
        finally:
            assert time.process_time() - began < SECONDS
        assert yarl.URL(request.address, encoded=True).host == f"{delivery.destination}.example"
        made.setdefault(route.name, []).append(request)
    return made


def assert_valid(request: Outbound, written: Mapping[str, Any]) -> None:
    """Check what is sent against what the route's `request` says, and the standards of its parts."""
    assert request.method == written.get("method", "POST")
    for text in (request.path, request.query):
        assert text.isascii()
        assert not re.search(r"[\x00-\x20\x7f#<>\"\\]", text)
    assert "?" not in request.path
    assert not {"..", "."} & set(request.path.split("/"))
    assert request.path.count("/") == str(written.get("path", "")).count("/") or "preset" in written
    assert {name for name, _ in parse_qsl(request.query)} <= {"x", "y", "identifierType", "token"}
    for name, value in request.headers:
        assert re.fullmatch(rb"[!-~]+", name)
        assert re.fullmatch(rb"[^\x00-\x08\x0a-\x1f\x7f]*", value)
    content_type = dict(request.headers).get(b"content-type", b"")
    if not written.keys() & {"body", "form", "preset"}:
        return
    assert content_type != b""
    text = request.body.decode()
    match content_type:
        case b"application/json":
            json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_duplicates)
        case b"application/x-www-form-urlencoded":
            assert text.isascii()
            assert {name for name, _ in parse_qsl(text)} <= {"x", "y", "P", "token", "ref", "variables[V]"}
        case _:
            assert content_type == b"text/plain; charset=utf-8"


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.rotated(share=1 / 2)
@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_whatever_an_event_has_its_requests_are_valid(value: bytes, content_type: str, rules: Rules) -> None:
    if "form" in content_type:
        body = b"a=" + value + b"&a=x"
    elif "xml" in content_type:
        body = b"<r><a>" + value + b"</a></r>"
    else:
        body = b'{"a": ' + value + b"}"
    made = requests_of(rules, body, content_type)
    assert [each.body for each in made["plain"]] == [body]
    for route, requests in made.items():
        written = KEYS[route].get("request", {})
        for request in requests:
            assert_valid(request, written)


def test_what_is_harmless_is_sent_by_each_route(rules: Rules) -> None:
    """Else the test above could find nothing wrong with what is never made."""
    bodies = [
        b'{"a": "a"}',
        b'{"a": "1700000000"}',
        b'{"a": ["a", "aaaa"]}',
        b'{"a": 7}',
        b'{"a": 0.5}',
        b'{"a": [{"b": 1}]}',
    ]
    made = {name for body in bodies for name in requests_of(rules, body, "application/json")}
    assert KEYS.keys() - made == set()
