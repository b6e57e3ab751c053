"""Traffic in the API: numbers by time, for whom they are, and beside lists."""

from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import AccessRole
from gateway.log.attempt_records import Decision
from gateway.model import Result
from gateway.ops.output import rfc3339
from tests.api.conftest import World, world_of
from tests.index.company import Company


async def furnish(world: World) -> None:
    """Store two events of github, of which one has died, and one of stripe, which was delivered after a failure."""
    company = world.company
    await company.event(body=b"12345")
    dying, *_ = await company.event(body=b"12345")
    await company.die(dying)
    paid, *_ = await company.event(source="stripe")
    to: dict[str, Any] = {"route": "book", "destination": "ledger"}
    await company.attempt(paid, **to, result=Result.TIMEOUT, status=None, decision=Decision.RETRY)
    await company.attempt(paid, **to, number=2)
    await world.refresh()


async def test_traffic_is_told_in_all_and_in_steps(world: World) -> None:
    await furnish(world)
    answer = await world.get("/traffic")
    traffic = answer["traffic"]
    assert (traffic["received"], traffic["step_seconds"], traffic["attempts_recorded"]) == (3, 3600, "all")
    assert traffic["deliveries"] == {
        "begun": 2,
        "delivered": 1,
        "done": 0,
        "dropped": 0,
        "waiting": 0,
        "unknown": 0,
        "died": 1,
        "dead": 1,
        "reasons": [{"name": "exhausted", "count": 1}],
    }
    attempts = traffic["attempts"]
    assert (attempts["made"], attempts["failed"], attempts["retries"]) == (2, 1, 1)
    assert {each["name"]: each["count"] for each in attempts["results"]} == {"2xx": 1, "timeout": 1}
    assert 0.005 < attempts["p50_seconds"] <= attempts["p95_seconds"] <= 0.01
    assert 24 <= len(traffic["steps"]) <= 26
    assert sum(step["received"] for step in traffic["steps"]) == 3
    assert answer["index"]["complete_to"] == traffic["until"]


async def test_traffic_is_of_what_is_asked_for(world: World) -> None:
    await furnish(world)
    build = (await world.get("/traffic", route="build"))["traffic"]
    assert (build["received"], build["duplicates"], build["deliveries"]["died"]) == (None, None, 1)
    ledger = (await world.get("/traffic", destination="ledger"))["traffic"]
    assert (ledger["deliveries"]["delivered"], ledger["attempts"]["made"]) == (1, 2)
    github = (await world.get("/traffic", source="github"))["traffic"]
    assert (github["received"], github["bytes"], github["attempts"]["made"]) == (2, 10, 0)
    former = (await world.get("/traffic", route="a-former-name"))["traffic"]
    assert former["deliveries"]["begun"] == 0


async def test_steps_are_as_short_as_they_are_kept_for_the_time(world: World) -> None:
    await furnish(world)
    now = world.company.log.now()
    for ago, expected in ((3000, 300), (2 * 3600, 300), (24 * 3600, 3600), (5 * 86_400, 86_400)):
        traffic = (await world.get("/traffic", since=rfc3339(now - ago)))["traffic"]
        assert traffic["step_seconds"] == expected
        assert traffic["received"] == 3
    days = (await world.get("/traffic", since=rfc3339(now - 3600), step="1d"))["traffic"]
    assert (days["step_seconds"], len(days["steps"])) == (86_400, 1 if days["since"][:10] == days["until"][:10] else 2)
    far = (await world.get("/traffic", since="1970-01-01T00:00:00Z", step="5m"))["traffic"]
    assert len(far["steps"]) <= 38
    for parameters in ({"since": "yesterday"}, {"step": "7m"}):
        await world.get("/traffic", 400, **parameters)


async def test_whoever_is_limited_sees_their_part_of_it(world: World) -> None:
    await furnish(world)
    world.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    traffic = (await world.get("/traffic"))["traffic"]
    assert (traffic["received"], traffic["deliveries"]["begun"], traffic["deliveries"]["died"]) == (1, 1, 0)
    assert (await world.get("/traffic", source="github"))["traffic"]["received"] == 0
    assert (await world.get("/traffic", route="build"))["traffic"]["deliveries"]["begun"] == 0
    [audit, book] = (await world.get("/routes", traffic="true"))["items"]
    assert (audit["name"], book["name"], book["traffic"]["attempts"]["made"]) == ("audit", "book", 2)
    world.become(AccessRole.VIEWER, owners=frozenset({"platform"}))
    traffic = (await world.get("/traffic"))["traffic"]
    assert (traffic["received"], traffic["deliveries"]["begun"], traffic["attempts"]["made"]) == (2, 1, 0)


async def test_a_route_of_several_sources_has_only_the_traffic_of_those_that_are_seen(world: World) -> None:
    company = world.company
    for source in ("github", "github", "stripe"):
        event, *_ = await company.event(source=source)
        await company.die(event, route="audit", destination="ledger")
    await world.refresh()
    assert (await world.get("/traffic", route="audit"))["traffic"]["deliveries"]["died"] == 3
    world.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    assert (await world.get("/traffic", route="audit"))["traffic"]["deliveries"]["died"] == 1
    [audit, _] = (await world.get("/routes", traffic="true"))["items"]
    assert audit["traffic"]["deliveries"]["died"] == 1
    [ledger] = (await world.get("/destinations", traffic="true"))["items"]
    assert ledger["traffic"]["deliveries"]["died"] == 1


async def test_lists_have_the_traffic_of_the_last_day_if_it_is_asked_for(world: World) -> None:
    await furnish(world)
    for path in ("/sources", "/routes", "/destinations"):
        assert {each["traffic"] for each in (await world.get(path))["items"]} == {None}
    routes = {each["name"]: each["traffic"] for each in (await world.get("/routes", traffic="true"))["items"]}
    assert {name: each["deliveries"]["begun"] for name, each in routes.items()} == {"audit": 0, "book": 1, "build": 1}
    sources = {each["name"]: each["traffic"] for each in (await world.get("/sources", traffic="true"))["items"]}
    assert {name: each["received"] for name, each in sources.items()} == {"github": 2, "stripe": 1}
    assert (await world.get("/routes/build"))["traffic"] is None


async def test_the_lines_of_routes_in_the_rule_file_have_their_traffic(world: World) -> None:
    await furnish(world)
    lines = (await world.get("/rules/file", traffic="true"))["lines"]
    told = {each["name"]: each["traffic"]["deliveries"]["begun"] for each in lines if each["traffic"]}
    assert told == {"build": 1, "book": 1, "audit": 0}
    assert {each["traffic"] for each in (await world.get("/rules/file"))["lines"]} == {None}
    world.become(AccessRole.VIEWER, sources=frozenset({"github"}))
    lines = (await world.get("/rules/file", traffic="true"))["lines"]
    assert {each["name"] for each in lines if each["traffic"]} == {"build", "audit"}


async def test_without_an_index_lists_are_as_usual(world: World) -> None:
    await furnish(world)
    world.index = None
    assert {each["traffic"] for each in (await world.get("/routes", traffic="true"))["items"]} == {None}
    assert (await world.get("/traffic", 503))["code"] == "index_unavailable"


async def test_the_traffic_of_ten_thousand_routes_is_listed_a_page_at_a_time(company: Company, tmp_path: Path) -> None:
    names = [f"r{number:05}" for number in range(10_000)]
    rules = "\n".join([f"  - {{name: {name}, from: github, to: ci}}" for name in names])
    text = f"""
version: 1
sources:
  github: {{path: /github, verify: {{scheme: token, header: X-Token, secrets: ["${{TOKEN}}"]}}}}
destinations:
  ci: {{url: "https://ci.example/"}}
routes:
{rules}
"""
    async with world_of(company, tmp_path, text) as world:
        for name in names[:: len(names) // 40]:
            await company.die((await company.event())[0], route=name)
        await world.refresh()
        page = await world.get("/routes", traffic="true", limit="200")
        assert sum(each["traffic"]["deliveries"]["died"] for each in page["items"]) == 1
        assert page["next_cursor"]
        assert (await world.get("/traffic", destination="ci"))["traffic"]["deliveries"]["died"] == 40


@pytest.mark.parametrize("role", [AccessRole.VIEWER, AccessRole.OPERATOR])
async def test_every_role_may_look(world: World, role: AccessRole) -> None:
    await furnish(world)
    world.become(role)
    assert (await world.get("/traffic"))["traffic"]["received"] == 3
