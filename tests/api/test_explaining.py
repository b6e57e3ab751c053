"""A posted request is explained by the rules in force, or by rules that are posted with it: never by other files."""

from base64 import b64encode
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.access.principal import AccessRole
from gateway.api.endpoints import BASE
from gateway.ops.api_answers import LEFT_OUT, explained_of
from tests.api.conftest import RULES, World
from tests.builders import an_event
from tests.stalls import stalls

PUSH = {
    "source": "github",
    "body": '{"ref": "main"}',
    "headers": [{"name": "Content-Type", "value": "application/json"}],
}


async def test_a_request_is_explained_by_the_rules_in_force(world: World) -> None:
    body = '{"amount": 12}'
    found = await world.post("/explain", {**PUSH, "source": "stripe", "body": body}, 200)
    assert found["rules"] == world.rules.version
    assert {each["name"]: each["is_matched"] for each in found["routes"]} == {"book": True, "audit": True}
    assert found["routes_left_out"] == 1
    (request,) = found["routes"][0]["requests"]
    assert (request["destination"], request["method"], request["body"]) == ("ledger", "POST", body)
    every = await world.post("/explain", {**PUSH, "source": "stripe", "include_unmatched": True}, 200)
    assert {each["name"]: each["reason"] for each in every["routes"]}["build"].startswith("from: expected github")
    packed = {"source": "stripe", "body_base64": b64encode(b"\xff\xfe").decode()}
    (audit,) = (await world.post("/explain", packed, 200))["routes"][-1:]
    assert (audit["requests"][0]["body"], audit["requests"][0]["body_base64"]) == (None, packed["body_base64"])


async def test_secrets_are_masked(world: World) -> None:
    found = await world.post("/explain", {**PUSH, "body": '{"a": "a-secret-token"}'}, 200)
    assert "a-secret-token" not in str(found)
    assert "secret" not in str(found["routes"])


async def test_a_request_is_explained_by_posted_rules(world: World) -> None:
    rules = RULES.replace("match: {type: push}", "when: 'body.ref == \"main\"'")
    found = await world.post("/explain", {**PUSH, "rules": rules}, 200)
    assert found["rules"] not in ("", world.rules.version)
    assert [each["name"] for each in found["routes"]] == ["build", "audit"]


@pytest.mark.parametrize(
    ("given", "status", "detail"),
    [
        ({"source": "nothing"}, 400, "body: source: unknown source"),
        ({"source": "github", "body": "", "body_base64": ""}, 400, "body: expected one of body and body_base64"),
        ({"source": "github", "body_base64": "!"}, 400, "body.body_base64: expected base64"),
        ({"source": "github", "rules": "version: 1\nsauces: {}\n"}, 422, "routes.yaml:2:1: sauces: unknown key"),
        ({"source": "github", "rules": "version: 1\ninclude: [/etc/*.conf]\n"}, 422, "routes.yaml: expected rules of"),
        ({"source": "github", "rules": "{"}, 422, "routes.yaml:"),
        ({"source": "github", "rules": "\f\x04"}, 422, "routes.yaml:1:1: expected text, got the character"),
        ({"source": "github", "rules": ""}, 422, "routes.yaml:"),
        ({}, 400, "body.source: expected a value, got none"),
    ],
)
async def test_what_cant_be_explained_says_why(world: World, given: Any, status: int, detail: str) -> None:
    assert (await world.post("/explain", given, status))["detail"].startswith(detail)


async def test_posted_rules_read_no_file_and_no_variable(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECIOUS", "a-precious-value")
    (tmp_path / "secret").write_text("a-precious-value")
    for reference in ("${PRECIOUS}", f"${{file:{tmp_path}/secret}}"):
        rules = RULES.replace(
            'url: "https://ci.example/hooks/secret"', f'url: "https://ci.example/", headers: {{X-A: "{reference}"}}'
        )
        rules = rules.replace("match: {type: push}", f"when: 'body.ref == \"{reference}\"'")
        found = await world.post("/explain", {**PUSH, "rules": rules, "include_unmatched": True}, 200)
        assert "a-precious-value" not in str(found)
        matched = {**PUSH, "rules": rules, "body": '{"ref": "a-precious-value"}'}
        assert "build" not in [each["name"] for each in (await world.post("/explain", matched, 200))["routes"]]


def many_requests(template: str, *, routes: int = 40, destinations: int = 20) -> str:
    """Return rules by which each of many routes makes many requests of an event."""
    names = [f"d{number}" for number in range(destinations)]
    listed = "".join([f"  {name}: {{url: 'https://{name}.example/'}}\n" for name in names])
    every = "".join(
        [f"  - {{name: r{at}, from: github, to: [{', '.join(names)}]{template}}}\n" for at in range(routes)]
    )
    return f"{RULES.partition('routes:')[0]}{listed}routes:\n{every}"


@pytest.mark.parametrize(
    ("template", "least", "most"),
    [
        ("", 800, 800),
        (", request: {body: {it: '${{ body }}'}}", 20, 100),
        (", request: {headers: {X-A: '${{ body.s }}'}}", 100, 400),
    ],
)
async def test_an_answer_has_its_bounds_and_says_what_is_left_out(
    world: World, template: str, least: int, most: int
) -> None:
    """Rules of 6 KB and an event of 100 KB: with all bodies, 80 MB."""
    body = orjson.dumps({"s": '"' * 5000, "text": "x" * 100_000}).decode()
    given = {**PUSH, "body": body, "rules": many_requests(template)}
    async with stalls() as seen, world.client.post(f"{BASE}/explain", json=given) as response:
        content = await response.read()
    assert response.status == 200, content[:1000]
    assert len(content) < 4 << 20
    assert seen.longest < 0.2
    found = orjson.loads(content)
    assert [each["requests_in_all"] for each in found["routes"]] == [20] * 40
    told = [request for each in found["routes"] for request in each["requests"]]
    bodies = [each["body"] for each in told]
    assert bodies[0] is not None
    assert [each["is_body_left_out"] for each in told] == [each is None for each in bodies]
    assert least <= len(told) <= most
    assert {each["is_event_body"] for each in told} == {"request: {body" not in template}
    by_command = explained_of(found, an_event(body=body.encode()))
    sent = [each.request.body for route in by_command.routes for each in route.requests if each.request is not None]
    expected = [body if each["is_event_body"] else each["body"] or LEFT_OUT.decode() for each in told]
    assert [each.decode() for each in sent] == expected


async def test_what_somebody_doesnt_see_isnt_explained_to_them(world: World) -> None:
    world.become(AccessRole.READER, sources=frozenset({"stripe"}))
    await world.post("/explain", PUSH, 404)
    await world.post("/explain", {**PUSH, "source": "stripe"}, 200)
