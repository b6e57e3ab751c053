"""Who has done what, by the API.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
what came of an act, stored after others    it is told with the act, on whichever page that is
an act of which nothing came                it is told as such
a record that can't be read                 it is told where it is, and the others are listed
a list that takes long                      goes on with the next page
limits to owners and sources                nothing: it is about what is others', too
"""

from typing import Any

import pytest

from gateway.access.principal import AccessRole
from gateway.log.audit_records import ActOutcome
from gateway.ops.audit import Actor, Auditor
from gateway.ops.control_client import ControlClient
from tests.api.conftest import World

ADA = Actor(who="ada@laptop", via="command", origin="laptop", is_proven=False)
BOB = Actor(who="bob", via="token", origin="192.0.2.1", is_proven=True)


def auditor(world: World, actor: Actor, why: str = "") -> Auditor:
    return Auditor(world.company.log, world.company.topics, actor, why)


async def pages(world: World, limit: int, **query: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    cursor = None
    while True:
        given = query if cursor is None else {**query, "cursor": cursor}
        page = await world.get("/audit", limit=limit, **given)
        assert len(page["items"]) <= limit
        items += page["items"]
        if (cursor := page["next_cursor"]) is None:
            return items


async def test_acts_are_listed_with_what_came_of_them_whichever_page_they_are_on(world: World) -> None:
    world.become(AccessRole.OPERATOR)
    begun = [await auditor(world, ADA if number % 2 else BOB).begin("pause", f"route/{number}") for number in range(6)]
    for act in begun[:-1]:  # all of them after all acts
        await auditor(world, BOB).record_outcome(act, ActOutcome.ACCEPTED, f"pause/{act.on}")
    await auditor(world, BOB).record_outcome(begun[0], ActOutcome.DONE, "1 delivery")
    for limit in (1, 2, 5):
        assert await pages(world, limit) == await pages(world, 200)
    found = await pages(world, 200)
    assert [each["on"] for each in found] == [f"route/{number}" for number in reversed(range(6))]
    assert [each["outcome"] for each in found] == [None, *4 * ["accepted"], "done"]
    assert (found[-1]["who"], found[-1]["is_proven"], found[-1]["detail"]) == ("bob", True, "1 delivery")
    assert found[0]["outcome_at"] is None
    assert [each["on"] for each in await pages(world, 2, who="ada")] == ["route/5", "route/3", "route/1"]
    assert await pages(world, 2, who="laptop") == []
    assert await pages(world, 2, since="2100-01-01T00:00:00Z") == []


async def test_a_command_that_nobody_has_waited_for_is_told_as_it_is_by_now(world: World) -> None:
    world.become(AccessRole.OPERATOR)
    event, *_ = await world.company.event()
    await world.company.die(event)
    answer = await world.post("/dead-letters/drop", {"all": True, "reason": "a test"})
    (act,) = await pages(world, 5)
    assert (act["what"], act["on"], act["why"], act["who"]) == ("dead drop", "--all", "a test", "anna")
    assert (act["outcome"], act["detail"]) == ("accepted", answer["id"])
    client = ControlClient(world.company.log, world.company.topics)
    command = (await client.control()).commands[answer["id"]]
    await world.company.command(command.with_state("done", count=1))
    (act,) = await pages(world, 5)
    assert (act["outcome"], act["detail"]) == ("done", f"{answer['id']}: 1 delivery")


async def test_a_record_that_cant_be_read_is_told_among_the_others(world: World) -> None:
    world.become(AccessRole.OPERATOR)
    await auditor(world, ADA).begin("pause", "route/a")
    await world.company.log.append(world.company.topics.audit, key=b"?", value=b"?", headers=[])
    await auditor(world, ADA).begin("kick", "route/a")
    kick, unreadable, pause = await pages(world, 1)
    assert (kick["what"], pause["what"]) == ("kick", "pause")
    assert unreadable["position"].startswith(world.company.topics.audit)
    assert unreadable["problem"]
    assert unreadable["who"] is None
    assert len(await pages(world, 5, who="ada")) == 2


async def test_a_list_that_takes_long_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.become(AccessRole.OPERATOR)
    await auditor(world, ADA).begin("pause", "route/a")
    monkeypatch.setattr("gateway.api.audit.SECONDS", -1.0)
    page = await world.get("/audit")
    assert (page["items"], page["is_cut_short"]) == ([], True)
    monkeypatch.setattr("gateway.api.audit.SECONDS", 5.0)
    assert len((await world.get("/audit", cursor=page["next_cursor"]))["items"]) == 1


async def test_who_has_limits_or_another_list_is_refused(world: World) -> None:
    for number in range(2):
        await auditor(world, ADA).begin("pause", f"route/{number}")
    world.become(AccessRole.OPERATOR, sources=frozenset({"github"}))
    assert (await world.get("/audit", 403))["code"] == "forbidden"
    world.become(AccessRole.OPERATOR)
    page = await world.get("/audit", limit=1)
    assert (await world.get("/audit", 400, who="ada", cursor=page["next_cursor"]))["code"] == "invalid_cursor"
