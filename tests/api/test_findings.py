"""What the API tells of other processes, by the log: what waits, what nobody reads, who is silent, what was refused."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import AccessRole
from gateway.api import cache, log_findings
from gateway.api.cache import Cached
from gateway.api.visibility import OF_OTHERS
from gateway.engine.control.records import ControlRecord
from gateway.log.base import Partition
from gateway.log.topics import ROUTER_GROUP
from gateway.model import Event, LogUnavailableError, RecordMetadata, SpillReason
from gateway.ops.backlog_trend import APART
from gateway.quarantine.records import Missing, RejectedRequest, encode_rejected
from tests.api.conftest import RULES, World, world_of
from tests.builders import an_attempt
from tests.index.company import Company
from tests.index.conftest import any_company  # noqa: F401 - a fixture
from tests.memory_log import MemoryLog

ORDERED = RULES.replace("    to: ledger\n    owner", "    to: ledger\n    order: key\n    owner").replace(
    "    path: /stripe\n", "    path: /stripe\n    key: body.id\n"
)
HIDING = RULES.replace("  stripe:\n", "  stripe:\n    redact: [body.card]\n")
BEGAN = 1_764_532_800.0


class Clock:
    """A clock that is set, and that goes on by itself a little."""

    def __init__(self) -> None:
        self.now = BEGAN

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def place(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A gateway whose log is read whenever it is asked for."""
    for name in ("REST", "SILENT_REST"):
        monkeypatch.setattr(log_findings, name, 0.0)
    monkeypatch.setattr(cache, "SHARE", 0.0)
    company = await Company.found(MemoryLog(now=clock), ordered=[("book", "ledger")])
    async with world_of(company, tmp_path, ORDERED) as made:
        yield made


async def found(world: World, **more: Any) -> dict[str, dict[str, Any]]:
    """Return what is told, by what it is about."""
    answer = await world.get("/findings", **more)
    assert answer["left_out"] == 0
    return {f"{each['what']}: {each['why']}": each for each in answer["items"]}


async def refuse(company: Company, reason: str = "bad_signature", source: str = "github", **fields: Any) -> None:
    """Keep a request that was refused."""
    given: dict[str, Any] = {"credentials": (), "salt": b"s" * 16, "query": "", "headers": (), "body": b"{}", "size": 2}
    request = RejectedRequest(
        source=source,
        reason=reason,
        at=company.log.now(),
        address="203.0.113.7",
        method="POST",
        path="/github",
        **given | fields,
    )
    headers = encode_rejected(request)
    await company.log.append(company.topics.rejected, key=source.encode(), value=request.body, headers=headers)


async def hold_up(company: Company, event: Event, **fields: Any) -> None:
    metadata = RecordMetadata(spill_reason=SpillReason.BREAKER_OPEN)
    await company.retry(event, "5h", attempts=(an_attempt(status=503, **fields),), metadata=metadata)


async def test_a_gateway_that_is_well_has_nothing_to_tell(place: World) -> None:
    answer = await place.get("/findings")
    assert (answer["items"], answer["left_out"], answer["notes"]) == ([], 0, [])


async def test_what_waits_is_told_with_its_last_answer_and_the_next_step(place: World, clock: Clock) -> None:
    for _ in range(3):
        event, *_ = await place.company.event()
        await hold_up(place.company, event, at=clock.now, detail="503 Service Unavailable")
    clock.now += 60
    each = next(each for each in (await found(place)).values() if each["route"])
    assert (each["kind"], each["what"], each["count"], each["needs_attention"]) == ("held", "build → ci", 3, True)
    assert each["why"] == "3 wait (breaker open after 503)"
    assert (each["route"], each["destination"], each["source"]) == ("build", "ci", None)
    assert each["steps"] == ["# ci responds with 503: ask its owners first", "gateway destination kick ci"]


async def test_what_a_source_hides_isnt_told_by_an_answer_that_repeats_it(tmp_path: Path, clock: Clock) -> None:
    company = await Company.found(MemoryLog(now=clock))
    async with world_of(company, tmp_path, HIDING) as world:
        for source in ("github", "stripe"):
            event, *_ = await company.event(source=source)
            detail = "503 no card 4242424242424242"
            await company.retry(
                event, route="audit", destination="ledger", attempts=(an_attempt(status=503, detail=detail),)
            )
        clock.now += 60
        told = next(each["why"] for each in (await found(world)).values() if each["route"] == "audit")
        assert told == "1 got 503 no card 4242424242424242, 1 got 503", "that of github, which hides nothing"


async def test_events_that_arent_routed_grow_or_stand_still(place: World, clock: Clock) -> None:
    events = [await place.company.event() for _ in range(5)]
    assert await found(place) == {}, "what is in flight isn't worth telling"
    clock.now += 60
    (before,) = (await found(place)).values()
    assert before["why"] == "events not yet routed and delivered; none was finished for 1 minute"
    _, partition, offset = events[0]
    await place.company.commit(partition, offset + 1)
    for _ in range(7):
        await place.company.event()
    clock.now += 60
    (each,) = (await found(place)).values()
    assert (each["what"], each["source"], each["kind"]) == ("source github", "github", "waiting")
    assert "more than 2 minutes ago" in each["why"]
    assert each["count"] > before["count"]


async def test_a_group_without_a_member_is_told_first(place: World, clock: Clock) -> None:
    event, *_ = await place.company.event()
    await hold_up(place.company, event)
    await place.company.close()
    clock.now += 60
    answer = await place.get("/findings")
    first = answer["items"][0]
    assert (first["kind"], first["what"]) == ("not_read", "source github")
    assert first["why"].endswith(f"the group {place.company.topics.group(ROUTER_GROUP)} has no member")
    place.backend.sees_members = False
    assert {each["kind"] for each in (await found(place)).values()} == {"held", "waiting"}


async def test_an_ordered_route_that_stands_still_may_have_a_halted_key(place: World, clock: Clock) -> None:
    event, *_ = await place.company.event(source="stripe")
    topic = place.company.topics.ordered("book", "ledger")
    await place.company.carry(topic, event, route="book", destination="ledger")
    place.backend.sees_members = False
    clock.now += 60
    await found(place)
    clock.now += APART + 1
    each = next(each for each in (await found(place)).values() if each["route"] == "book")
    assert each["why"].endswith("; a key may be halted")
    assert each["steps"][-1] == "gateway route kick book"
    pause = ControlRecord(kind="pause", name="route/book", state="paused", at=clock.now)
    await place.company.command(pause)
    each = next(each for each in (await found(place)).values() if each["route"] == "book")
    assert each["steps"] == ["gateway route resume book"]


async def test_partitions_that_cant_be_read_are_told(place: World) -> None:
    assert isinstance(place.company.log, MemoryLog)
    place.company.log.lose_leader(Partition(place.company.topics.retry("5h"), 1))
    (each,) = (await found(place)).values()
    assert (each["kind"], each["what"]) == ("not_read", "gateway.retry.5h/1")


async def test_a_source_that_has_fallen_silent_is_told(place: World, clock: Clock) -> None:
    for _ in range(20):
        _, partition, offset = await place.company.event()
        await place.company.commit(partition, offset + 1)
        clock.now += 60
    clock.now += 7200
    (each,) = (await found(place)).values()
    assert (each["kind"], each["source"], each["needs_attention"]) == ("silent", "github", False)
    assert each["steps"][-1] == "gateway send github --url https://…"


async def test_a_large_backlog_is_told_as_at_least_that(
    place: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_findings, "WAITING_SECONDS", 0.0)
    monkeypatch.setattr(log_findings, "UNFINISHED_SECONDS", 0.0)
    event, *_ = await place.company.event()
    await hold_up(place.company, event)
    clock.now += 60
    answer = await place.get("/findings")
    assert answer["items"] == []
    assert "more waits than could be read" in answer["notes"][0]
    assert "weren't looked at anew" in answer["notes"][1]


async def test_the_topics_that_werent_looked_at_come_first_the_next_time(
    place: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_findings, "AT_A_TIME", 1)
    moments = iter(range(10**6))
    monkeypatch.setattr("gateway.api.log_findings.monotonic", lambda: float(next(moments)))
    await place.company.event(source="stripe")
    clock.now += 60
    seen = [await found(place) for _ in range(4)]  # of three topics, one or two at a time
    assert [each["source"] for each in seen[-1].values() if each["source"]] == ["stripe"]


async def test_refused_requests_are_counted_by_reason(place: World) -> None:
    assert (await place.get("/sources/github/refused"))["items"] == [], "there is no quarantine"
    specs = place.company.topics.specs([], has_quarantine=True)
    await place.company.log.create([each for each in specs if each.name == place.company.topics.rejected])
    for _ in range(3):
        await refuse(place.company)
    await refuse(place.company, "stale_timestamp", missing=Missing.BODY)
    await refuse(place.company, source="stripe")
    answer = await place.get("/sources/github/refused")
    assert [(each["reason"], each["count"], each["incomplete"]) for each in answer["items"]] == [
        ("bad_signature", 3, {}),
        ("stale_timestamp", 1, {"body": 1}),
    ]
    assert not answer["is_cut_short"]
    told = [each for each in (await found(place)).values() if each["kind"] == "source"]
    assert {each["source"] for each in told} == {"github", "stripe"}
    assert not any(each["needs_attention"] for each in told)
    assert (await place.get("/sources/none/refused", 404))["code"] == "not_found"
    place.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    await place.get("/sources/github/refused", 404)
    assert {each["source"] for each in (await found(place)).values()} == {"stripe"}


async def test_who_has_limits_sees_what_is_about_theirs(place: World, clock: Clock) -> None:
    for source, route, destination in (("github", "build", "ci"), ("stripe", "book", "ledger")):
        event, *_ = await place.company.event(source=source)
        await place.company.retry(event, "5h", route=route, destination=destination)
    assert isinstance(place.company.log, MemoryLog)
    place.company.log.lose_leader(Partition(place.company.topics.retry("20h"), 1))
    clock.now += 60
    assert len(await found(place)) == 5
    place.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    assert {(each["source"], each["route"]) for each in (await found(place)).values()} == {
        ("stripe", None),
        (None, "book"),
    }
    place.become(AccessRole.VIEWER, owners=frozenset({"platform"}))
    assert {(each["source"], each["route"]) for each in (await found(place)).values()} == {
        ("github", None),
        (None, "build"),
    }


async def test_of_what_is_others_too_it_isnt_told_how_much_waits_and_why(place: World, clock: Clock) -> None:
    for source in ("github", "stripe"):
        event, *_ = await place.company.event(source=source)
        attempts = (an_attempt(status=503, at=clock.now, detail=f"503 no {source}"),)
        await place.company.retry(event, "5h", route="audit", destination="ledger", attempts=attempts)
    event, *_ = await place.company.event(source="stripe")
    await place.company.retry(event, "5h", route="book", destination="ledger")
    clock.now += 60

    async def of(route: str) -> dict[str, Any]:
        return next(each for each in (await found(place)).values() if each["route"] == route)

    assert (await of("audit"))["count"] == 2
    place.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    told = await of("audit")
    assert (told["what"], told["count"], told["since"]) == ("audit → ledger", None, None)
    assert told["why"] == OF_OTHERS
    assert "github" not in str(told)
    assert all(step.startswith("gateway ") for step in told["steps"])
    assert (await of("book"))["count"] == 1
    place.become(AccessRole.VIEWER, owners=frozenset({"payments"}))  # who answers for what has no other owner
    assert (await of("audit"))["count"] == 2


async def test_secrets_that_age_are_told(clock: Clock, tmp_path: Path) -> None:
    secrets = '[{secret: "${TOKEN}", until: 2025-12-03}, {secret: "${TOKEN}2", until: 2025-12-05}]'
    company = await Company.found(MemoryLog(now=clock))
    async with world_of(company, tmp_path, RULES.replace('["${TOKEN}"]', secrets, 1)) as world:
        first, second = (await found(world)).values()
        assert (first["source"], first["needs_attention"]) == ("github", True)
        assert first["why"].startswith("secret 2 expires in 5 days; no other lasts longer")
        assert second["why"] == "secret 1 expires in 3 days"
        (github,) = (await world.get("/sources", name="github"))["items"]
        assert [(each["name"], each["until"], each["is_last"]) for each in github["secrets"]] == [
            ("secret 1", "2025-12-04T00:00:00.000Z", False),
            ("secret 2", "2025-12-06T00:00:00.000Z", True),
        ]


async def test_fifty_who_ask_cost_one_reading(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    committed = place.company.log.committed

    async def counted(*given: Any) -> Any:
        nonlocal read
        read += 1
        await asyncio.sleep(0)
        return await committed(*given)

    monkeypatch.setattr(place.company.log, "committed", counted)
    counts = []
    for askers in (1, 50):
        for name in ("_deliveries", "_sources", "_quarantine"):
            monkeypatch.setattr(place.backend.log_reader, name, Cached[Any](60.0))
        read = 0
        await asyncio.gather(*[place.get("/findings") for _ in range(askers)])
        counts.append(read)
        await place.get("/findings")
        assert read == counts[-1], "what is read is kept"
    assert counts[0] == counts[1] > 0


async def test_what_was_read_is_kept_for_longer_the_longer_it_took() -> None:
    now = 0.0
    numbers = Cached[int](10.0, clock=lambda: now)

    async def read() -> int:
        nonlocal now
        now += 5.0
        return int(now)

    assert await numbers.get(read) == 5
    now = 49.0
    assert await numbers.get(read) == 5
    now = 50.0
    assert await numbers.get(read) == 55


async def test_a_log_that_is_away_is_told_as_such(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise LogUnavailableError("no broker responds")

    monkeypatch.setattr(place.company.log, "committed", fail)
    problem = await place.get("/findings", 503)
    assert (problem["code"], problem["detail"]) == (
        "log_unavailable",
        "the log isn't available: no broker responds",
    )
    monkeypatch.undo()
    await place.get("/findings")


@pytest.mark.rotated
async def test_each_log_is_read(any_company: Company, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    async with world_of(any_company, tmp_path) as world:
        for _ in range(3):
            event, *_ = await any_company.event()
            await hold_up(any_company, event)
        each = next(each for each in (await found(world)).values() if each["route"])
        assert (each["what"], each["count"], each["kind"]) == ("build → ci", 3, "held")
        assert (await world.get("/sources/github/refused"))["items"] == []


async def test_of_many_the_worst_are_told_and_how_many_more_there_are(
    place: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.api.findings.MOST", 2)
    for route, destination in (("build", "ci"), ("audit", "ledger"), ("book", "ledger")):
        event, *_ = await place.company.event()
        await place.company.retry(event, "5h", route=route, destination=destination)
    clock.now += 60
    answer = await place.get("/findings")
    assert (len(answer["items"]), answer["left_out"]) == (2, 2)
    place.become(AccessRole.VIEWER, owners=frozenset({"payments", "platform"}))
    answer = await place.get("/findings")
    assert (len(answer["items"]), answer["left_out"]) == (2, 2)
    assert all(each["needs_attention"] for each in answer["items"])
