"""The spool of a process in the API: all of it, or what of it is somebody's."""

from pathlib import Path
from typing import Any

from gateway.access.principal import AccessRole
from gateway.api.spools import MOST_TOPICS
from tests.api.conftest import RULES, World, world_of
from tests.index.company import Company

SPOOL: dict[str, Any] = {
    "events": 5,
    "bytes": 700,
    "oldest": 1_764_532_800.0,
    "used": 0.25,
    "refuses": None,
    "waits": {"gateway.events.github": "gateway.events.github/3: no leader"},
    "topics": [
        {"topic": "gateway.events.stripe", "events": 2, "bytes": 200, "oldest": 1_764_532_860.0},
        {"topic": "gateway.events.github", "events": 3, "bytes": 500, "oldest": 1_764_532_800.0},
    ],
}


def spooling(world: World, **fields: Any) -> None:
    world.backend.process = "ingress-0:9090"
    world.backend.spool = lambda: {**SPOOL, **fields}


async def test_a_process_without_a_spool_has_none(world: World) -> None:
    assert await world.get("/spools") == {"items": []}


async def test_a_spool_is_told_by_process_and_topic_the_oldest_first(world: World) -> None:
    spooling(world)
    [spool] = (await world.get("/spools"))["items"]
    first, second = spool.pop("topics")
    assert spool == {
        "process": "ingress-0:9090",
        "events": 5,
        "bytes": 700,
        "oldest": "2025-11-30T20:00:00.000Z",
        "used": 0.25,
        "refuses": None,
        "waits": None,
    }
    assert (first["topic"], first["events"], first["waits"]) == (
        "gateway.events.github",
        3,
        "gateway.events.github/3: no leader",
    )
    assert (second["topic"], second["waits"], second["oldest"]) == (
        "gateway.events.stripe",
        None,
        "2025-11-30T20:01:00.000Z",
    )


async def test_what_holds_up_all_of_it_and_why_it_takes_no_more_are_told(world: World) -> None:
    spooling(world, waits={"": "no broker responds"}, refuses="expected at most 700 bytes in it, got 701", used=1.0)
    [spool] = (await world.get("/spools"))["items"]
    assert (spool["waits"], spool["refuses"], spool["used"]) == (
        "no broker responds",
        "expected at most 700 bytes in it, got 701",
        1.0,
    )


async def test_who_has_limits_sees_the_topics_of_their_sources(world: World) -> None:
    spooling(world, refuses="gateway.events.github: expected nothing older than 60 s in it, got 61 s")
    world.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    [spool] = (await world.get("/spools"))["items"]
    assert [each["topic"] for each in spool["topics"]] == ["gateway.events.stripe"]
    assert (spool["events"], spool["bytes"], spool["oldest"]) == (2, 200, "2025-11-30T20:01:00.000Z")
    assert spool["refuses"] == "it accepts no more"
    world.become(AccessRole.VIEWER, owners=frozenset({"nobody"}))
    [spool] = (await world.get("/spools"))["items"]
    assert (spool["events"], spool["oldest"], spool["topics"]) == (0, None, [])


async def test_a_topic_of_several_sources_is_seen_by_who_sees_them_all(company: Company, tmp_path: Path) -> None:
    shared = RULES
    for owner in ("platform", "payments"):
        shared = shared.replace(f"    owner: {owner}\n    verify", f"    owner: {owner}\n    topic: hooks\n    verify")
    async with world_of(company, tmp_path, shared) as world:
        topics = [{"topic": "hooks", "events": 1, "bytes": 9, "oldest": None}]
        spooling(world, topics=topics)
        for limits, seen in (({"github"}, 0), ({"github", "stripe"}, 1)):
            world.become(AccessRole.VIEWER, sources=frozenset(limits))
            [spool] = (await world.get("/spools"))["items"]
            assert spool["events"] == seen


async def test_of_many_topics_those_that_wait_longest_are_told(world: World) -> None:
    topics = [{"topic": f"t{at}", "events": 1, "bytes": 1, "oldest": float(at)} for at in range(MOST_TOPICS + 9, 0, -1)]
    spooling(world, topics=topics)
    [spool] = (await world.get("/spools"))["items"]
    assert spool["events"] == MOST_TOPICS + 9
    assert [each["topic"] for each in spool["topics"]] == [f"t{at}" for at in range(1, MOST_TOPICS + 1)]
