"""What a replay would deliver, and a replay of one event, in the API: for whom, and of what."""

from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import AccessRole
from gateway.api import replay_counts
from gateway.bodies.redaction import MAX_QUICK_BODY
from gateway.ops.output import rfc3339
from tests.api.conftest import RULES, World, world_of
from tests.index.company import Company

HOUR = 3600.0


async def furnish(world: World) -> list[str]:
    """Store three events of github, of which two match build, and one of stripe that matches book; return their ids."""
    company, ids = world.company, list[str]()
    for fields in (
        {"type": "push"},
        {"type": "push"},
        {"type": "ping"},
        {"source": "stripe", "type": "charge", "body": b'{"amount": 11}'},
    ):
        given: dict[str, Any] = fields
        event, *_ = await company.event(**given)
        ids.append(event.id)
    await world.refresh()
    return ids


def asked(world: World, **fields: Any) -> dict[str, Any]:
    return {"since": rfc3339(world.company.log.now() - HOUR), **fields}


async def test_what_would_be_delivered_is_counted_by_source_and_type(world: World) -> None:
    await furnish(world)
    answer = await world.post("/replays/count", asked(world, route="build"), 200)
    [item] = answer["items"]
    assert (item["source"], item["type"], item["count"], item["deliveries"]) == ("github", "push", 2, 2)
    assert answer["destinations"] == [{"name": "ci", "count": 2}]
    assert (answer["looked"], answer["total"], answer["is_cut_short"]) == (3, 3, False)
    assert (answer["failing"], answer["unread_partitions"], answer["under_way"]) == (0, 0, [])
    audit = await world.post("/replays/count", asked(world, route="audit", source="github"), 200)
    assert {each["type"]: each["count"] for each in audit["items"]} == {"push": 2, "ping": 1}
    assert (await world.get("/replays"))["items"] == [], "nothing was stored"
    await world.post("/replays", asked(world, route="build"))
    again = await world.post("/replays/count", asked(world, route="build"), 200)
    assert len(again["under_way"]) == 1


async def test_a_type_that_is_hidden_is_counted_without_its_name(company: Company, tmp_path: Path) -> None:
    path = "    path: /github\n"
    text = RULES.replace(path, f"{path}    redact: [body.kind]\n", 1).replace("    match: {type: push}\n", "")
    async with world_of(company, tmp_path, text) as world:
        for kind in ("patient.admitted", "patient.ill"):
            await company.event(type=kind, body=f'{{"kind": "{kind}"}}'.encode())
        await company.event(type="ping", body=b'{"kind": "none"}')
        await company.event(type="large", body=b'{"text": "%s"}' % (b"x" * MAX_QUICK_BODY))
        answer = await world.post("/replays/count", asked(world, route="build"), 200)
        assert {each["type"]: each["count"] for each in answer["items"]} == {"[redacted]": 3, "ping": 1}
        assert "patient" not in str(answer)


async def test_what_couldnt_be_read_in_time_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await furnish(world)
    monkeypatch.setattr(replay_counts, "SECONDS", -1.0)
    monkeypatch.setattr("gateway.ops.replay_counts.EVENTS_PER_STEP", 2)
    answer = await world.post("/replays/count", asked(world, route="build"), 200)
    assert (answer["looked"], answer["total"], answer["is_cut_short"]) == (2, 3, True)


async def test_who_may_count(world: World) -> None:
    (first, *_) = await furnish(world)
    world.become(AccessRole.VIEWER)
    await world.post("/replays/count", asked(world, route="build"), 403)
    await world.get(f"/events/{first}/routes", 403)
    world.become(AccessRole.READER, sources=frozenset({"stripe"}))
    await world.post("/replays/count", asked(world, route="build"), 404)
    await world.post("/replays/count", asked(world, route="audit"), 403)
    await world.post("/replays/count", asked(world, route="audit", source="stripe"), 200)
    await world.get(f"/events/{first}/routes", 404)
    world.become(AccessRole.READER, owners=frozenset({"platform"}))
    await world.post("/replays/count", asked(world, route="build"), 200)
    answer = await world.get(f"/events/{first}/routes")
    assert (answer["matched"], [each["route"] for each in answer["items"]]) == (["build"], ["build"])
    await world.get(f"/events/{first}/routes", 400, route="book")
    await world.get(f"/events/{first}/routes", 400, destination="ledger")


async def test_by_which_routes_an_event_would_be_delivered(world: World) -> None:
    push, _, ping, charge = await furnish(world)
    answer = await world.get(f"/events/{push}/routes")
    assert {each["route"]: each["destinations"] for each in answer["items"]} == {"build": ["ci"], "audit": ["ledger"]}
    assert (answer["event"], answer["matched"]) == (push, ["build", "audit"])
    assert [each["route"] for each in (await world.get(f"/events/{push}/routes", destination="ci"))["items"]] == [
        "build"
    ]
    none = await world.get(f"/events/{ping}/routes", route="build")
    assert (none["items"], none["matched"]) == ([], ["audit"])
    assert set((await world.get(f"/events/{charge}/routes"))["matched"]) == {"book", "audit"}
    await world.get(f"/events/{push}/routes", 400, route="nothing")
    await world.get("/events/evt_nothing/routes", 404)


async def test_one_event_is_replayed_by_its_position(world: World) -> None:
    push, _, ping, _ = await furnish(world)
    position = (await world.get(f"/events/{push}/routes"))["position"]
    command = await world.post("/replays", {"route": "build", "event": push})
    replay = await world.get(f"/replays/{command['id'].partition('/')[2]}")
    assert (replay["route"], replay["since"], replay["total"]) == ("build", None, 1)
    [asked_for] = [
        each.selection.starts
        for each in (await world.backend.control()).commands.values()
        if each.selection is not None
    ]
    assert {f"{partition}@{offset}" for partition, offset in asked_for.items()} == {position}
    await world.post("/replays", {"route": "build", "event": ping}, 409)
    await world.post("/replays", {"route": "build", "event": "evt_nothing"}, 404)
    for wrong in ({"source": "github"}, {"undelivered": True}, {"since": rfc3339(1.0)}, {"rate": 1.0}):
        await world.post("/replays", {"route": "build", "event": push, **wrong}, 400)
    await world.post("/replays", {"route": "build"}, 400)
    await world.post("/replays/count", {"route": "build", "event": push}, 400)


async def test_an_event_is_replayed_once_by_one_key(world: World) -> None:
    push, *_ = await furnish(world)
    headers = {"Idempotency-Key": '"one"'}
    first = await world.post("/replays", {"route": "build", "event": push}, headers=headers)
    assert await world.post("/replays", {"route": "build", "event": push}, headers=headers) == first
    await world.post("/replays", {"route": "audit", "event": push}, 422, headers=headers)
    assert len((await world.get("/replays"))["items"]) == 1
