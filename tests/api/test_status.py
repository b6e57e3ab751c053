"""The status in the API: what `gateway status` tells, for who may see that.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
a principal with limits                     what is about theirs, and a word of what isn't told
a destination                               what is about it, with the last attempts there
a source that hides something               nothing of what was answered to its events
a console, which receives and delivers none says so: its answer isn't all
one of several processes of one command     says so: the others have their own state
a log that is away                          a problem, and no empty status
much that waits                             what could be read in time
"""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import AccessRole
from gateway.api import status as status_api
from gateway.api.cache import SHARE, CacheByKey
from gateway.api.visibility import OF_OTHERS
from gateway.engine.control.records import ControlRecord
from gateway.log.base import Partition
from gateway.model import LogUnavailableError, RecordMetadata
from gateway.settings import Role
from tests.api.conftest import RULES, World, world_of
from tests.builders import an_attempt
from tests.index.company import Company
from tests.memory_log import MemoryLog

OWN: dict[str, Any] = {
    "version": "1",
    "role": "all",
    "holds": [
        {
            "destination": "ci",
            "why": "breaker_open",
            "after": "503",
            "since": 1_764_532_800.0,
            "until": 1_764_532_860.0,
            "untried_since": None,
        }
    ],
    "log": {"since": 1_764_532_800.0, "reason": "no broker responds"},
    "unread": [{"topic": "gateway.dead", "partition": 0, "since": 1_764_532_800.0, "reason": "no leader"}],
}


@pytest.fixture
async def place(world: World) -> World:
    """A gateway that has given up on one delivery, and waits with two."""
    company = world.company
    for source, route, destination in (("github", "build", "ci"), ("stripe", "book", "ledger")):
        event, *_ = await company.event(source=source)
        await company.retry(event, route=route, destination=destination)
        other, *_ = await company.event(source=source)
        await company.die(other, route=route, destination=destination)
    paused = ControlRecord(kind="pause", name="route/book", state="paused", at=company.log.now(), by="ada")
    await company.command(paused)
    world.backend.status = lambda: OWN
    return world


async def told(world: World, **parameters: Any) -> dict[tuple[str, str], dict[str, Any]]:
    items = (await world.get("/status", **parameters))["items"]
    return {(each["kind"], each["what"]): each for each in items}


async def test_one_of_several_processes_says_that_the_others_arent_asked(place: World) -> None:
    assert (await place.get("/status"))["notes"] == []
    place.backend.status = lambda: {**OWN, "process": 0}
    assert (await place.get("/status", destination="ci"))["notes"] == [status_api.OF_ONE]


async def test_all_is_told_the_worst_first(place: World) -> None:
    answer = await place.get("/status")
    kinds = [(each["kind"], each["what"]) for each in answer["items"]]
    assert set(kinds) == {
        ("not_read", "the log"),
        ("not_read", "gateway.dead/0"),
        ("paused", "route book"),
        ("held", "destination ci"),
        ("waiting", "build → ci"),
        ("waiting", "book → ledger"),
        ("dead", "build → ci"),
        ("dead", "book → ledger"),
    }
    assert [kind for kind, _ in kinds[:3]] == ["not_read", "not_read", "paused"]
    assert (answer["left_out"], answer["attempts"], answer["is_all_seen"], answer["notes"]) == (0, [], True, [])
    found = await told(place)
    own = found["held", "destination ci"]
    assert (own["is_own"], own["by"], own["destination"]) == (True, None, "ci")
    assert own["why"] == "breaker open after 503"
    assert own["steps"][-1] == "gateway destination kick ci"
    paused = found["paused", "route book"]
    assert (paused["is_own"], paused["by"], paused["route"]) == (False, "ada", "book")


async def test_who_has_limits_is_told_what_is_theirs(place: World) -> None:
    place.become(AccessRole.VIEWER, owners=frozenset({"platform"}))
    assert {what for _, what in await told(place)} == {"build → ci"}
    place.become(AccessRole.VIEWER, sources=frozenset({"github"}))
    assert {what for _, what in await told(place)} == {"destination ci", "build → ci"}
    place.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    assert {what for _, what in await told(place)} == {"route book", "book → ledger"}
    assert (await place.get("/status"))["notes"] == [status_api.NOT_TOLD]
    await place.get("/status", 404, destination="ci")
    assert {what for _, what in await told(place, destination="ledger")} == {"route book", "book → ledger"}
    place.become(AccessRole.VIEWER, sources=frozenset({"nobody"}))
    assert await told(place) == {}


async def test_of_what_is_others_too_it_isnt_told_how_much_waits_and_why(place: World) -> None:
    place.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    for source in ("github", "stripe"):
        event, *_ = await place.company.event(source=source)
        tried = (replace(an_attempt(status=503), detail=f"503 no {source}"),)
        await place.company.retry(event, route="audit", destination="ledger", attempts=tried)
        await place.company.die(event, route="audit", destination="ledger", attempts=tried)
    found = await told(place)
    for kind in ("waiting", "dead"):
        its = found[kind, "audit → ledger"]
        assert (its["count"], its["since"], its["why"]) == (None, None, OF_OTHERS)
        assert found[kind, "book → ledger"]["count"] == 1
    assert "github" not in str(found)
    place.become(AccessRole.VIEWER, owners=frozenset({"payments"}))  # who answers for what has no other owner
    items = [each for each in (await place.get("/status"))["items"] if each["what"] == "audit → ledger"]
    assert all(each["why"] != OF_OTHERS for each in items)
    assert sum(each["count"] for each in items if each["kind"] == "dead") == 2


async def test_of_a_quiet_route_with_events_of_others_too_it_isnt_told_of_which_how_many_and_since_when(
    place: World,
) -> None:
    before = {"events": 100, "matched": 50, "event": "evt_of_github"}
    quiet = {
        "route": "audit",
        "sources": ["github", "stripe"],
        "events": 50,
        "since": 1_764_532_800.0,
        "loaded_at": 1_764_532_800.0,
        "changed": ["route audit: when", "source github: type"],
        "before": before,
    }
    missed = {**quiet, "until": 1_764_532_900.0}
    for routes in ({"changed": [quiet], "missed": []}, {"changed": [], "missed": [missed]}):
        place.backend.status = lambda routes=routes: {**OWN, "quiet_routes": {"new": [], **routes}}  # type: ignore[misc] # a lambda's default
        place.become(AccessRole.VIEWER)
        assert "of github, stripe" in (await told(place))["source", "route audit"]["why"]
        place.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
        its = (await told(place))["source", "route audit"]
        assert (its["why"], its["since"], its["until"], its["steps"]) == (OF_OTHERS, None, None, [])
        assert "github" not in str(await place.get("/status"))


async def test_of_dead_letters_of_others_too_no_step_names_an_event_or_a_reason(place: World) -> None:
    steps = []
    for detail in ("body.n > 2: no such overload", "request.body: body.who isn't there", ""):
        event, *_ = await place.company.event(source="github")
        note = RecordMetadata(dead_reason="expression_error" if detail else "exhausted", detail=detail)
        await place.company.carry(place.company.topics.dead, event, route="audit", destination="ledger", metadata=note)
        place.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
        items = (await place.get("/status"))["items"]
        assert event.id not in str(items)
        steps += [step for each in items if each["route"] == "audit" for step in each["steps"]]
    assert set(steps) == {"gateway dead list --route audit --destination ledger"}


async def test_rules_that_lack_a_name_are_those_of_the_process_that_answers(place: World) -> None:
    event, *_ = await place.company.event()
    await place.company.die(event, route="gone", destination="ci")
    answer = await place.get("/status")
    steps = [step for each in answer["items"] if each["route"] == "gone" for step in each["steps"]]
    assert any("the rules of the process that answers have no route gone" in each for each in steps)
    assert "local rules" not in str(answer)


async def test_of_a_destination_the_last_attempts_are_told(place: World) -> None:
    answer = await place.get("/status", destination="ledger")
    assert {each["what"] for each in answer["items"] if each["kind"] != "not_read"} == {"route book", "book → ledger"}
    assert sorted(each["status"] for each in answer["attempts"]) == [400, 503]
    assert {(each["source"], each["route"], each["number"]) for each in answer["attempts"]} == {("stripe", "book", 1)}
    await place.get("/status", 404, destination="nowhere")
    event, *_ = await place.company.event(source="github")
    await place.company.retry(event, route="audit", destination="ledger")
    place.backend.shared = type(place.backend.shared)()
    assert len((await place.get("/status", destination="ledger"))["attempts"]) == 3
    place.become(AccessRole.VIEWER, sources=frozenset({"github"}))
    [attempt] = (await place.get("/status", destination="ledger"))["attempts"]
    assert attempt["source"] == "github"


async def test_what_a_source_hides_isnt_in_what_was_answered(company: Company, tmp_path: Path) -> None:
    text = RULES.replace("    path: /github\n", "    path: /github\n    redact: [body.card]\n", 1)
    tried = (replace(an_attempt(status=503), detail="503 no 4242424242424242"),)
    async with world_of(company, tmp_path, text) as world:
        for source, route, destination in (("github", "build", "ci"), ("stripe", "book", "ledger")):
            event, *_ = await company.event(source=source)
            await company.retry(event, route=route, destination=destination, attempts=tried)
            await company.die(event, route=route, destination=destination, attempts=tried)
        items = (await world.get("/status"))["items"]
        assert {each["what"] for each in items if "4242" in each["why"]} == {"book → ledger"}
        for destination, detail in (("ci", None), ("ledger", "503 no 4242424242424242")):
            answer = await world.get("/status", destination=destination)
            assert {each["detail"] for each in answer["attempts"]} == {detail}


async def test_a_process_that_neither_receives_nor_delivers_says_so(world: World) -> None:
    world.backend.status = lambda: {"version": "1", "role": Role.CONSOLE}
    answer = await world.get("/status")
    assert not answer["is_all_seen"]
    [item] = answer["items"]
    assert (item["what"], item["needs_attention"]) == ("processes", False)


async def test_a_log_that_is_away_is_a_problem(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise LogUnavailableError("no broker responds")

    monkeypatch.setattr(place.company.log, "committed", fail)
    assert (await place.get("/status", 503))["code"] == "log_unavailable"
    monkeypatch.undo()
    await place.get("/status")


async def test_partitions_and_topics_that_are_away_are_told(place: World) -> None:
    log = place.company.log
    assert isinstance(log, MemoryLog)
    log.lose_leader(Partition(place.company.topics.retry("5h"), 1))
    place.backend.may_lack_topics = True
    found = await told(place)
    assert found["not_read", "gateway.retry.5h/1"]["why"].startswith("not read: no leader")
    assert "gateway.events.stripe" not in {what for _, what in found}
    log.delete(place.company.topics.events("stripe"))
    place.backend.shared = type(place.backend.shared)()
    assert ("not_read", "gateway.events.stripe") in await told(place)


async def test_of_much_that_waits_what_could_be_read_is_told(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_api, "WAITING_SECONDS", 0.0)
    answer = await place.get("/status")
    assert answer["notes"] == ["more waits than could be read in 0 s: its numbers are the least that there are"]
    monkeypatch.setattr(status_api, "MOST", 1)
    answer = await place.get("/status")
    assert len(answer["items"]) == 1
    assert answer["left_out"] >= 4


async def test_many_who_ask_at_once_cost_one_reading(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read, now = 0, 0.0
    status = place.backend.status

    def counted() -> Any:
        nonlocal read, now
        read, now = read + 1, now + 1.0
        return status()

    monkeypatch.setattr(place.backend, "status", counted)
    place.backend.shared = CacheByKey(clock=lambda: now)
    await asyncio.gather(*[place.get("/status") for _ in range(20)])
    assert read == 1
    now += SHARE
    await place.get("/status")
    assert read == 2
