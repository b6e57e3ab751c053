"""A posted request is explained by the active rules, or by rules that are posted with it: never by other files."""

import asyncio
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.access.principal import AccessRole
from gateway.api.endpoints import BASE
from gateway.ops.api_answers import LEFT_OUT, explained_of
from tests.api.conftest import RULES, World, world_of
from tests.builders import an_event
from tests.index.company import Company
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


NINE = [f"{at}: &n{at} [{', '.join([f'*n{at - 1}' if at else '0'] * 9)}]" for at in range(6)]
"""Less than 300 bytes, of nine to the power of six values."""


def many_items(items: int, values: int, *, value: str = "1") -> str:
    """Return a route that is written once for each of many items, with many values each."""
    body = ", ".join([f"k{at}: {value}" for at in range(values)])
    listed = ", ".join(map(str, range(items)))
    return (
        f"  - {{name: 's${{{{ each }}}}', foreach: [{listed}], from: github, to: ci, request: {{body: {{{body}}}}}}}\n"
    )


MUCH = {
    "aliases": "\n".join(NINE),
    "aliases among tests": "\n".join(["tests:", *[f"  - {line}" for line in NINE]]),
    "aliases of mappings": f"a: &a k\nb: &b {{*a : [{'*a, ' * 300}]}}\nc: [{'*b, ' * 300}]",
    "an alias to itself": "a: &a [*a]",
    "many values": f"a: [{'0,' * 120_000}]",
    "many values by foreach": many_items(1900, 500),
    "much text by foreach": many_items(40, 1, value=f"'{'x' * 100_000}{'${{ each }}' * 1000}'"),
    "long paths": "".join([f"{' ' * at}{'k' * 1000}:\n" for at in range(60)]) + f"{' ' * 60}[{'0,' * 20_000}]",
}


@pytest.mark.parametrize("text", MUCH.values(), ids=MUCH)
async def test_rules_that_are_much_more_than_their_text_are_refused_at_once(world: World, text: str) -> None:
    began = time.process_time()
    problem = await world.post("/explain", {**PUSH, "rules": f"{RULES}{text}\n"}, 422)
    assert time.process_time() - began < 2
    assert problem["detail"].startswith("routes.yaml: expected at most"), problem
    assert len(problem["detail"]) < 1000


async def test_ten_thousand_routes_are_tried_if_foreach_writes_them(world: World) -> None:
    names = ", ".join([f"t{number}" for number in range(10_000)])
    route = "name: 'r-${{ each }}', from: github, match: {body.tenant: '${{ each }}'}, to: ci"
    rules = f"{RULES}  - {{foreach: [{names}], {route}}}\n"
    found = await world.post("/explain", {**PUSH, "rules": rules, "body": '{"tenant": "t9999"}'}, 200)
    assert [each["name"] for each in found["routes"]] == ["audit", "r-t9999"]
    assert found["routes_left_out"] == 10_001


async def test_problems_of_posted_rules_are_told_in_few_words(world: World) -> None:
    keys = "".join([f"{' ' * (at + 1)}{'k' * 1000}:\n" for at in range(30)])
    text = f"routes:\n{keys}{' ' * 40}[{'{a: 1, a: 1}, ' * 80}]\n"
    problem = await world.post("/explain", {**PUSH, "rules": text}, 422)
    assert len(problem["detail"]) < 50_000


def slow_rules(routes: int) -> str:
    """Return rules of which each route takes some milliseconds to read: one expression, by many aliases."""
    when = " && ".join([f'body.a{number}.b.c == "{number}"' for number in range(150)])
    first = f"  - {{name: s, from: github, when: &w '{when}', to: ci}}\n"
    others = [f"  - {{name: s{number}, from: github, when: *w, to: ci}}\n" for number in range(routes)]
    return f"{RULES.partition('routes:')[0]}routes:\n{first}{''.join(others)}"


async def test_rules_that_take_long_end_and_keep_nobody_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some that are being read leave searches and other explanations their turns."""
    monkeypatch.setattr("gateway.api.explaining.MOST_SECONDS", 0.5)
    event, *_ = await world.company.event()
    await world.refresh()
    given = {**PUSH, "rules": slow_rules(1500)}
    world.become(AccessRole.OPERATOR)
    world.access.others = iter(["bob", "cleo", "dan"])
    rounds = 0
    async with stalls() as seen, asyncio.TaskGroup() as group:
        tries = [group.create_task(world.post("/explain", given, 422)) for _ in range(3)]
        while not any(each.done() for each in tries):
            assert (await world.get("/events"))["items"]
            assert "items" in await world.get("/status")
            assert (await world.get(f"/events/{event.id}/explanation"))["routes"]
            rounds += 1
    assert rounds > 2, "the others have waited for the first"
    assert seen.longest < 0.2
    assert "reading and trying the rules took longer than 0.5 s" in tries[0].result()["detail"]
    await world.post("/explain", {**PUSH, "rules": RULES}, 200)


ONE_VALUE = "  - {name: s, from: github, to: ci, request: {body: '" + "${{1+1}}" * 30_000 + "'}}\n"
MANY_ITEMS = many_items(230, 500, value="'${{ each }} ${{ body.a }}'")


@pytest.mark.parametrize("route", [ONE_VALUE, MANY_ITEMS], ids=["one value", "many items"])
async def test_a_single_route_that_takes_long_ends_too(
    world: World, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr("gateway.api.explaining.MOST_SECONDS", 0.3)
    began = time.process_time()
    problem = await world.post("/explain", {**PUSH, "rules": f"{RULES.partition('routes:')[0]}routes:\n{route}"}, 422)
    assert time.process_time() - began < 1.2  # 0.5 s; 2 s to their end
    assert "reading and trying the rules took longer than 0.3 s" in problem["detail"]


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


@pytest.mark.parametrize("limits", [{"sources": frozenset({"stripe"})}, {"owners": frozenset({"payments"})}], ids=str)
async def test_what_somebody_doesnt_see_isnt_explained_to_them(world: World, limits: dict[str, frozenset[str]]) -> None:
    """Of an event that they see they see the deliveries, by whichever route; of other routes not even the number."""
    event, *_ = await world.company.event(source="stripe", body={"amount": 9})
    await world.refresh()
    world.become(AccessRole.READER, **limits)
    await world.post("/explain", PUSH, 404)
    await world.get("/routes/build", 404)
    for with_unmatched, names, left_out in ((True, ["book", "audit"], 0), (False, ["audit"], 1)):
        given = {"source": "stripe", "body": '{"amount": 9}', "include_unmatched": with_unmatched}
        stored = await world.get(f"/events/{event.id}/explanation", include_unmatched=str(with_unmatched).lower())
        for found in (await world.post("/explain", given, 200), stored):
            assert [each["name"] for each in found["routes"]] == names
            assert found["routes_left_out"] == left_out
            assert not [word for word in ("build", "platform", "github") if word in str(found)]
    own = await world.post("/explain", {"source": "stripe", "rules": RULES, "include_unmatched": True}, 200)
    assert [each["name"] for each in own["routes"]] == ["build", "book", "audit"], "they have written it themselves"


async def test_a_route_that_takes_no_events_of_a_source_names_those_that_are_seen(
    company: Company, tmp_path: Path
) -> None:
    shop = 'sources:\n  shop: {path: /shop, verify: {scheme: token, header: X-Token, secrets: ["${TOKEN}"]}}\n'
    text = RULES.replace("sources:\n", shop, 1) + "  - {name: both, from: [github, shop], to: ledger}\n"
    asked = {"source": "stripe", "body": "{}", "include_unmatched": True}
    async with world_of(company, tmp_path, text) as world:
        of_all = await world.post("/explain", asked, 200)
        world.become(AccessRole.READER, sources=frozenset({"stripe", "shop"}))
        of_some = await world.post("/explain", asked, 200)
        for found, expected in ((of_all, "github or shop"), (of_some, "shop")):
            (both,) = [each for each in found["routes"] if each["name"] == "both"]
            assert both["reason"] == f"from: expected {expected}, got stripe"
        assert "github" not in str(of_some)
