"""What operators command: control records as CLI commands write them, each once for each idempotency key.

what crosses                                what has to come of it
──────────────────────────────────────────  ──────────────────────────────────────────────────
the same key again                          the same answer, and one command
… after a restart, in another process       the same, by the log alone
… with another request, by somebody else    422; a command of their own
an append whose answer is lost              the next try finds the command
a second command of the name in between     the first key's answer stays
a newer record in the way                   as for commands
limits to owners and sources                no command about what is others', too
"""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from typing_extensions import override

from gateway.access.principal import AccessRole, Principal
from gateway.api.endpoints import BASE
from gateway.engine.control.records import ControlRecord, DeadFilter, decode
from gateway.engine.jobs.dead_letters import read_dead_letter
from gateway.log.base import NewRecord, Partition, Position, Record
from gateway.model import LogUnavailableError, UsageError
from gateway.ops import keyed_requests
from gateway.ops.audit import Act, read_acts
from gateway.ops.control_client import ControlClient
from tests.api.conftest import RULES, World, rules_of, world_of
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog
from tests.stalls import stalls

KEY = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}
SINCE = "2020-01-01T00:00:00Z"


class Recording(MemoryLog):
    """A log that knows also what was compacted away."""

    appended: list[tuple[str, bytes, bytes]]

    @override
    async def append(self, topic: str, *, key: bytes, value: bytes, **others: Any) -> Position:
        position = await super().append(topic, key=key, value=value, **others)
        self.appended.append((topic, key, value))
        return position

    @override
    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        positions = await super().append_in_order(partition, records)
        self.appended += [(partition.topic, record.key, record.value) for record in records]
        return positions


@pytest.fixture
async def company() -> Company:
    log = Recording(now=Ticking())
    log.appended = []
    return await Company.found(log)


async def commands(world: World) -> list[ControlRecord]:
    """Return all commands that were ever stored, oldest first."""
    log = world.company.log
    assert isinstance(log, Recording)
    found = [decode(key, value) for topic, key, value in log.appended if topic == world.company.topics.control]
    return [each for each in found if each.kind != "checkpoint"]


@pytest.mark.parametrize("kind", ["route", "destination"])
async def test_a_name_is_paused_resumed_and_kicked_as_by_command(world: World, kind: str) -> None:
    name = "build" if kind == "route" else "ci"
    world.become(AccessRole.OPERATOR)
    paused = await world.post(f"/{kind}s/{name}/pause", {"reason": "it is being moved"})
    assert (paused["id"], paused["state"], paused["is_new"]) == (f"pause/{kind}/{name}", "paused", True)
    again = await world.post(f"/{kind}s/{name}/pause", {})
    assert again == {**paused, "is_new": False}
    shown = await world.get(f"/{kind}s/{name}")
    assert shown["pause"] == {"state": "paused", "since": paused["at"], "by": "anna"}
    client = ControlClient(world.company.log, world.company.topics)
    assert (await client.control()).paused_by("build", "ci") == f"{kind}/{name}"
    state = await world.get(f"/commands/pause%2F{kind}%2F{name}")
    assert (state["state"], state["is_read"]) == ("paused", False)
    resumed = await world.post(f"/{kind}s/{name}/resume", {})
    assert resumed["state"] == "resuming"
    kicked = await world.post(f"/{kind}s/{name}/kick", {})
    assert (kicked["id"], kicked["state"]) == (f"kick/{kind}/{name}", "requested")
    assert [each.state for each in await commands(world)] == ["paused", "resuming", "requested"]


async def test_a_command_that_is_half_done_has_been_read(world: World) -> None:
    await world.post("/routes/build/pause", {})
    given = await world.post("/routes/build/resume", {})
    path = f"/commands/{quote(given['id'], safe='')}"
    assert not (await world.get(path))["is_read"]
    client = ControlClient(world.company.log, world.company.topics)
    control = await client.control()
    # As a job does while it goes on: it commits the command once it is carried out.
    await client.note(
        ControlRecord(
            kind="checkpoint",
            name=given["id"],
            state="requested",
            at=control.commands[given["id"]].at + 1.0,
            checkpoint={f"{world.company.topics.parked}/0": 40},
            count=40,
        )
    )
    state = await world.get(path)
    assert (state["state"], state["is_read"], state["count"]) == ("resuming", True, 40)
    await world.post("/routes/build/pause", {})
    assert not (await world.get(path))["is_read"], "that checkpoint is of the resume"


async def test_nothing_is_resumed_that_isnt_paused(world: World) -> None:
    answer = await world.post("/routes/build/resume", {}, headers=KEY)
    assert (answer["is_new"], answer["state"]) == (False, "active")
    assert await commands(world) == []
    assert await world.post("/routes/build/resume", {}, headers=KEY) == answer


COMMANDS: Sequence[tuple[str, Mapping[str, object]]] = (
    ("/routes/build/pause", {}),
    ("/destinations/ci/kick", {}),
    ("/dead-letters/replay", {"route": "build"}),
    ("/dead-letters/drop", {"all": True}),
    ("/replays", {"route": "build", "since": SINCE}),
)


@pytest.mark.parametrize(("path", "body"), COMMANDS, ids=[path for path, _ in COMMANDS])
async def test_a_key_is_one_command_whoever_serves_it(
    world: World, tmp_path: Path, path: str, body: Mapping[str, object]
) -> None:
    event, *_ = await world.company.event()
    await world.company.die(event)
    first = await world.post(path, body, headers=KEY)
    assert await world.post(path, body, headers=KEY) == first
    if path == "/routes/build/pause":  # something else happens to the name meanwhile
        await world.post("/routes/build/resume", {})
    (elsewhere := tmp_path / "elsewhere").mkdir()
    async with world_of(world.company, elsewhere) as other:
        assert await other.post(path, body, headers=KEY) == first
        refused = await other.post(path, {**body, "reason": "another"}, 422, headers=KEY)
        assert refused["code"] == "key_reused"
        other.become(AccessRole.OPERATOR)
        await other.post(path, body, headers=KEY)
    kind = first["id"].partition("/")[0]
    stored = [each for each in await commands(world) if each.kind == kind and each.state != "resuming"]
    assert len(stored) == 2, "one of each of the two operators"


async def test_a_key_is_nobody_elses_whatever_they_are_called(world: World) -> None:
    for number, via in enumerate(["token", "oidc", "loopback"], 1):
        world.access.principal = Principal(name="local", role=AccessRole.OPERATOR, via=via)
        for _ in range(2):
            await world.post("/destinations/ci/kick", {}, headers=KEY)
        assert len(await commands(world)) == number
    for via in ("token_session", "identity_header"):  # who has signed in with that token, or as that person
        world.access.principal = Principal(name="local", role=AccessRole.OPERATOR, via=via)
        await world.post("/destinations/ci/kick", {}, headers=KEY)
        assert (await world.post("/destinations/ci/pause", {}, 422, headers=KEY))["code"] == "key_reused"
    assert len(await commands(world)) == 3


async def test_each_command_is_in_the_audit_records_with_who_from_where_and_why(world: World) -> None:
    world.become(AccessRole.OPERATOR)
    for _ in range(2):
        await world.post("/destinations/ci/kick", {"reason": "it is back"}, headers=KEY)
    await world.post("/dead-letters/drop", {"route": "build", "reason": "gone for good"})
    acts = [each async for each in read_acts(world.company.log, world.company.topics)]
    assert all(isinstance(each, Act) for each in acts)
    records = [each.record for each in acts if isinstance(each, Act)]
    assert [(each.what, each.on, each.who, each.via, each.origin, each.why) for each in records] == [
        ("dead drop", "--route build", "anna", "test", "127.0.0.1", "gone for good"),
        ("kick", "destination/ci", "anna", "test", "127.0.0.1", "it is back"),
    ]


async def test_nothing_is_commanded_that_cant_be_recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    log, audit = world.company.log, world.company.topics.audit
    append = log.append

    async def fail(topic: str, **given: Any) -> Position:
        if topic == audit:
            raise LogUnavailableError("away")
        return await append(topic, **given)

    monkeypatch.setattr(log, "append", fail)
    assert (await world.post("/destinations/ci/kick", {}, 503))["code"] == "log_unavailable"
    assert await commands(world) == []


async def test_without_a_key_each_request_is_a_command(world: World) -> None:
    for _ in range(2):
        await world.post("/destinations/ci/kick", {})
    assert len(await commands(world)) == 2


async def test_many_at_once_with_one_key_are_one_command(world: World) -> None:
    answers = await asyncio.gather(*[world.post("/destinations/ci/kick", {}, headers=KEY) for _ in range(8)])
    assert len(await commands(world)) == 1
    assert all(each == answers[0] for each in answers)


async def test_a_command_whose_append_gave_no_answer_is_found_by_the_next_try(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = world.company.log
    append = log.append_in_order

    async def lose(partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        await append(partition, records)
        raise LogUnavailableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(log, "append_in_order", lose)
        assert (await world.post("/destinations/ci/kick", {}, 503, headers=KEY))["code"] == "log_unavailable"
    answer = await world.post("/destinations/ci/kick", {}, headers=KEY)
    (command,) = await commands(world)
    assert (answer["id"], command.kind) == ("kick/destination/ci", "kick")


async def test_a_command_and_its_answer_are_stored_together_or_not_at_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Partition, __: Sequence[NewRecord]) -> Sequence[Position]:
        raise LogUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.company.log, "append_in_order", fail)
        await world.post("/destinations/ci/kick", {}, 503, headers=KEY)
    assert await commands(world) == []
    await world.post("/destinations/ci/kick", {}, headers=KEY)
    assert len(await commands(world)) == 1


async def test_answers_are_forgotten_after_a_day(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.post("/destinations/ci/kick", {}, headers=KEY)
    monkeypatch.setattr(keyed_requests, "KEPT", -1.0)
    await world.post("/destinations/ci/kick", {}, headers=KEY)
    assert len(await commands(world)) == 2
    monkeypatch.undo()
    monkeypatch.setattr(keyed_requests, "KEPT", -1.0)
    await world.post("/routes/build/kick", {}, headers={"Idempotency-Key": "another"})
    answers = await world.backend.answers()
    assert len(answers.forgotten(now=world.company.log.now())) == 1, "the last one; the others are deleted"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/routes/build/pause", {}),
        ("/destinations/ci/kick", {}),
        ("/routes/build/resume", {}),
        ("/dead-letters/replay", {"route": "build"}),
        ("/replays", {"route": "build", "since": SINCE}),
        ("/events/EVENT/redeliver", {"route": "build"}),
    ],
)
async def test_a_key_is_answered_as_at_first_after_the_rules_have_changed(
    world: World, tmp_path: Path, path: str, body: Mapping[str, object]
) -> None:
    event, *_ = await world.company.event(type="push")
    await world.refresh()
    path = path.replace("EVENT", event.id)
    first = await world.post(path, body, headers=KEY)
    text = (
        RULES.replace("name: build", "name: build-on-push").replace("ci:", "builder:").replace("to: ci", "to: builder")
    )
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "new.yaml", text)
    assert await world.post(path, body, headers=KEY) == first
    if not path.startswith("/dead-letters"):  # these may be of what the rules have no longer
        async with world.client.post(f"{BASE}{path}", json=body) as response:
            assert response.status in (400, 404)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/dead-letters/replay", {"route": "build"}),
        ("/replays", {"route": "build", "since": SINCE}),
        ("/events/EVENT/redeliver", {}),
    ],
)
async def test_a_key_whose_answer_is_forgotten_gives_another_command(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str, body: Mapping[str, object]
) -> None:
    """The command is known for longer than its answer."""
    event, *_ = await world.company.event()
    await world.company.die(event)
    await world.refresh()
    path = path.replace("EVENT", event.id)
    given = [await world.post(path, body, headers=KEY)]
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(keyed_requests, "KEPT", -1.0)  # a day later
            given.append(await world.post(path, body, headers=KEY))
        assert await world.post(path, body, headers=KEY) == given[-1]
    assert [each.key for each in await commands(world)] == [each["id"] for each in given]
    assert len({each["id"] for each in given}) == 3
    with monkeypatch.context() as patch:
        patch.setattr(keyed_requests, "KEPT", -1.0)
        other = await world.post("/dead-letters/drop", {"all": True, "reason": "gone"}, headers=KEY)
    assert (await commands(world))[-1].key == other["id"]


async def test_a_command_without_its_answer_is_found_within_the_day_by_the_same_request_alone(world: World) -> None:
    async def lose() -> None:
        late = world.company.log.now() + 2 * keyed_requests.KEPT
        client = ControlClient(world.company.log, world.company.topics)
        for answer in (await world.backend.answers()).forgotten(now=late):
            await client.note(answer)

    await world.company.event()
    given = await world.post("/replays", {"route": "build", "since": SINCE}, headers=KEY)
    await lose()
    assert await world.post("/replays", {"route": "build", "since": SINCE}, headers=KEY) == given
    assert len(await commands(world)) == 1
    await lose()
    assert (await world.post("/replays", {"route": "audit", "since": SINCE}, headers=KEY))["id"] != given["id"]
    assert len(await commands(world)) == 2


async def test_a_key_has_its_form(world: World) -> None:
    for key in ("", "a b", "\xe9", "x" * 256):
        problem = await world.post("/destinations/ci/kick", {}, 400, headers={"Idempotency-Key": key})
        assert problem["detail"].startswith("Idempotency-Key: expected one key")
    assert await commands(world) == []


async def test_dead_letters_need_a_selection(world: World) -> None:
    for action in ("replay", "drop"):
        assert (await world.post(f"/dead-letters/{action}", {}, 400))["code"] == "invalid_request"
        placed = await world.post(f"/dead-letters/{action}", {"dead_reason": "exhausted", "since": SINCE})
        command = (await world.backend.control()).commands[placed["id"]]
        assert (command.action, command.filter.reason, command.filter.since) == (action, "exhausted", 1577836800.0)


async def test_a_command_that_no_process_could_read_is_refused(world: World) -> None:
    """It would be in the log for good, and each process would report it as foreign."""
    client = ControlClient(world.company.log, world.company.topics)
    with pytest.raises(UsageError, match="expected a number from 0"):
        await client.resolve("drop", DeadFilter(since=-1.0))
    assert await commands(world) == []


async def test_a_replay_is_started_followed_and_cancelled(world: World) -> None:
    for _ in range(3):
        await world.company.event()
    placed = await world.post("/replays", {"route": "build", "since": SINCE, "destination": "ci", "rate": 5})
    replay = placed["id"].removeprefix("replay/")
    shown = await world.get(f"/replays/{replay}")
    assert (shown["state"], shown["total"], shown["queued"], shown["rate"]) == ("requested", 3, 0, 5)
    assert (await world.get("/replays"))["items"] == [shown]
    state = await world.get(f"/commands/replay%2F{replay}")
    assert (state["total"], state["scanned"]) == (3, 0)
    cancelled = await world.post(f"/replays/{replay}/cancel", {})
    assert (cancelled["state"], cancelled["is_new"]) == ("cancelled", True)
    assert (await world.post(f"/replays/{replay}/cancel", {}))["is_new"] is False
    assert (await world.get(f"/replays/{replay}"))["state"] == "cancelled"


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"route": "nothing", "since": SINCE}, 404, "expected a route"),
        ({"route": "build", "since": SINCE, "source": "stripe"}, 400, "body.source: expected one of route build"),
        ({"route": "build", "since": SINCE, "destination": "ledger"}, 400, "body.destination: expected one of"),
        ({"route": "build", "since": "2999-01-01T00:00:00Z"}, 400, "body.since: expected a time before"),
        ({"route": "build", "since": SINCE, "until": "2020-01-02T00:00:00Z"}, 409, "expected events of that time"),
        ({"route": "build", "since": "0001-01-01T00:00:00Z"}, 400, "body.since: expected a time"),
        ({"route": "build", "since": "9999-12-31T23:59:59-01:00"}, 400, "body.since: expected a time"),
        ({"route": "No Name", "since": SINCE}, 400, "body.route: expected a name as rules have it"),
        ({"route": "build"}, 400, "body.since: expected a value, got none"),
        ({"route": "build", "since": SINCE, "rate": 0}, 400, "body.rate: expected a number from 0.001"),
        ({"route": "build", "since": SINCE, "rat": 1}, 400, "body.rat: unknown name; expected one of"),
        ([], 400, "body: expected an object"),
    ],
)
async def test_a_replay_that_isnt_possible_is_refused(world: World, body: object, status: int, detail: str) -> None:
    await world.company.event()
    assert (await world.post("/replays", body, status))["detail"].startswith(detail)
    assert await commands(world) == []


async def test_replays_are_listed_page_by_page(world: World) -> None:
    await world.company.event()
    ids = [(await world.post("/replays", {"route": "build", "since": SINCE}))["id"] for _ in range(3)]
    first = await world.get("/replays", limit=2)
    rest = await world.get("/replays", limit=2, cursor=first["next_cursor"])
    listed = [f"replay/{each['id']}" for each in (*first["items"], *rest["items"])]
    assert listed == ids[::-1]


async def test_an_event_is_delivered_again(world: World) -> None:
    event, *_ = await world.company.event()
    await world.refresh()
    first = await world.post(f"/events/{event.id}/redeliver", {"route": "build", "reason": "lost"}, headers=KEY)
    assert await world.post(f"/events/{event.id}/redeliver", {"route": "build", "reason": "lost"}, headers=KEY) == first
    (command,) = await commands(world)
    assert command.redelivery is not None
    assert (command.redelivery.event, command.redelivery.route, command.by) == (event.id, "build", "local")
    assert (await world.get(f"/commands/{first['id'].replace('/', '%2F')}"))["state"] == "requested"
    await world.post("/events/evt_1/redeliver", {}, 404)
    await world.post(f"/events/{event.id}/redeliver", {"route": "nothing"}, 400)


async def test_limits_let_nobody_act_on_what_is_others(world: World) -> None:
    """The ledger gets events of both sources: whoever has one of these doesn't pause it for the other."""
    theirs, *_ = await world.company.event(source="github")
    await world.refresh()
    world.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    await world.post("/routes/book/pause", {})
    assert (await world.post("/destinations/ledger/pause", {}, 403))["code"] == "forbidden"
    assert (await world.post("/routes/audit/kick", {}, 403))["code"] == "forbidden"
    await world.post("/routes/build/pause", {}, 404)
    await world.post("/destinations/ci/pause", {}, 404)
    await world.post(f"/events/{theirs.id}/redeliver", {}, 404)
    for body in ({"all": True}, {"route": "build"}, {"destination": "ledger"}):
        assert (await world.post("/dead-letters/drop", body, 403))["code"] == "forbidden"
    await world.post("/dead-letters/drop", {"ids": ["dlv_1"]}, 404)
    await world.post("/dead-letters/drop", {"route": "book"})
    assert {each.name.rpartition("/")[2] for each in await commands(world) if each.kind == "pause"} == {"book"}
    world.become(AccessRole.OPERATOR, owners=frozenset({"payments"}))
    await world.post("/destinations/ledger/pause", {})
    await world.post("/routes/audit/pause", {}, 404)


async def died(world: World, source: str, route: str, destination: str, **fields: Any) -> str:
    """Let a delivery of an event become a dead letter; return its id."""
    event, *_ = await world.company.event(source=source, **fields)
    delivery, *_ = await world.company.die(event, route=route, destination=destination)
    return str(delivery.id)


async def test_dead_letters_by_id_are_acted_on_by_who_may_act_on_their_deliveries(world: World) -> None:
    """Whose event it is, or who answers for it and acts on its route or destination; others' ids are as none."""
    seen = await died(world, "stripe", "build", "ci")  # by a route that is others'
    book = await died(world, "stripe", "book", "ledger")
    own = await died(world, "stripe", "audit", "ledger")  # by a route of both sources
    others = await died(world, "github", "audit", "ledger")
    build = await died(world, "github", "build", "ci")
    world.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    command = await world.post("/dead-letters/drop", {"ids": [book, own]}, headers=KEY)
    await world.post("/dead-letters/replay", {"ids": [own], "route": "audit", "since": SINCE})
    for ids in ([others], [book, others], [build], ["dlv_1"], [book, "dlv_1"]):
        for body in ({"ids": ids}, {"ids": ids, "route": "build"}):
            problem = await world.post("/dead-letters/drop", body, 404)
            assert problem["detail"] == "body.ids: not all are ids of deliveries with dead letters"
    await world.post("/dead-letters/drop", {"ids": [book], "since": "2030-01-01T00:00:00Z"}, 404)
    world.become(AccessRole.OPERATOR, owners=frozenset({"payments"}))
    await world.post("/dead-letters/drop", {"ids": [book, own, others]})
    problem = await world.post("/dead-letters/drop", {"ids": [book, seen]}, 403)
    assert problem["detail"] == f"body.ids: you may not operate {seen}"
    await world.post("/dead-letters/drop", {"ids": [build]}, 404)
    assert [each.filter.ids for each in await commands(world)] == [(book, own), (own,), (book, own, others)]
    assert await status_of(world, command["id"]) == 200
    assert world.access.principal is not None
    world.access.principal = replace(world.access.principal, name="bert")
    assert await status_of(world, command["id"]) == 404


async def test_a_command_about_dead_letters_by_id_is_answered_alike_once_they_are_resolved(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await died(world, "stripe", "book", "ledger")
    world.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    first = await world.post("/dead-letters/drop", {"ids": [name]}, headers=KEY)
    (command,) = [each for each in await commands(world) if each.kind == "dead"]
    await ControlClient(world.company.log, world.company.topics).note(command.with_state("done", count=1))
    assert await world.post("/dead-letters/drop", {"ids": [name]}, headers=KEY) == first
    monkeypatch.setattr("gateway.api.dead_letters.SECONDS_BY_ID", -1.0)  # and once they are among very many
    assert await world.post("/dead-letters/drop", {"ids": [name]}, headers=KEY) == first


async def test_large_dead_letters_are_judged_one_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [await died(world, "stripe", "book", "ledger", body={"text": "x" * 200_000}) for _ in range(40)]

    def read(record: Record) -> Any:
        """As from a log on disk: what is read is new."""
        letter, stored = read_dead_letter(record)
        assert stored is not None
        event = replace(stored.delivery.event, body=bytes(bytearray(stored.delivery.event.body)))
        return letter, replace(stored, delivery=replace(stored.delivery, event=event))

    monkeypatch.setattr("gateway.api.dead_letters.read_dead_letter", read)
    world.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    tracemalloc.start()
    await world.post("/dead-letters/drop", {"ids": names})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


async def test_dead_letters_that_arent_found_in_time_need_a_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    name = await died(world, "stripe", "book", "ledger")
    monkeypatch.setattr("gateway.api.dead_letters.SECONDS_BY_ID", -1.0)
    world.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    problem = await world.post("/dead-letters/drop", {"ids": [name]}, 409)
    assert "name their route or destination" in problem["detail"]
    await world.post("/dead-letters/drop", {"ids": [name], "route": "book"})


async def test_limits_let_nobody_deliver_again_by_what_is_others(world: World) -> None:
    """An event of theirs goes to others by routes that aren't theirs, and to whom these send it isn't theirs to say."""
    event, *_ = await world.company.event(source="stripe", body={"amount": 20})
    await world.refresh()
    path = f"/events/{event.id}/redeliver"
    world.become(AccessRole.OPERATOR, owners=frozenset({"payments"}))
    for name in ("audit", "build", "nothing"):  # as others' names are, so is one that isn't there
        assert f"of the rules, got '{name}'" in (await world.post(path, {"route": name}, 400))["detail"]
    for name in ("ci", "nothing"):
        assert f"of the rules, got '{name}'" in (await world.post(path, {"destination": name}, 400))["detail"]
    refused = await world.post(path, {}, 403)
    assert (refused["code"], "audit" in refused["detail"]) == ("forbidden", False)
    assert await commands(world) == []
    for body in ({"route": "book"}, {"destination": "ledger"}, {"route": "book", "destination": "ledger"}):
        await world.post(path, body)
    world.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    for body in ({}, {"route": "audit"}):  # whose events they are
        await world.post(path, body)
    assert len(await commands(world)) == 5


async def test_who_has_limits_cancels_the_replays_that_they_start_and_knows_of_no_others(world: World) -> None:
    for source in ("github", "stripe"):
        await world.company.event(source=source)
    others = (await world.post("/replays", {"route": "build", "since": SINCE}))["id"].partition("/")[2]
    both = (await world.post("/replays", {"route": "audit", "since": SINCE}))["id"].partition("/")[2]
    world.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    started = await world.post("/replays", {"route": "audit", "source": "stripe", "since": SINCE})
    own = started["id"].partition("/")[2]
    assert [each["id"] for each in (await world.get("/replays"))["items"]] == [own]
    for name, status in ((others, 404), (both, 404), (own, 200)):
        await world.get(f"/replays/{name}", status)
        await world.get(f"/commands/replay%2F{name}", status)
    for name, status in ((others, 404), (both, 403), (own, 202)):
        await world.post(f"/replays/{name}/cancel", {}, status)


async def test_what_has_come_of_a_command_is_told_to_who_may_give_one_like_it(world: World) -> None:
    await world.company.die((await world.company.event())[0], route="book", destination="ledger")
    theirs = [
        (await world.post("/routes/book/pause", {}))["id"],
        (await world.post("/dead-letters/replay", {"route": "book", "destination": "ledger"}))["id"],
    ]
    others = [
        (await world.post("/routes/audit/pause", {}))["id"],
        (await world.post("/destinations/ledger/kick", {}))["id"],
        (await world.post("/dead-letters/replay", {"route": "audit"}))["id"],
        (await world.post("/dead-letters/replay", {"all": True}))["id"],
    ]
    assert {await status_of(world, each) for each in (*theirs, *others)} == {200}
    world.become(AccessRole.VIEWER, sources=frozenset({"stripe"}))
    assert [await status_of(world, each) for each in theirs] == [200, 200]
    assert [await status_of(world, each) for each in others] == [404, 404, 404, 404]


async def status_of(world: World, command: str) -> int:
    async with world.client.get(f"{BASE}/commands/{quote(command, safe='')}") as response:
        return response.status


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {},
    ],
)
async def test_only_json_is_taken(world: World, headers: dict[str, str]) -> None:
    given: dict[str, Any] = {"data": b"{}", "headers": headers, "skip_auto_headers": ["Content-Type"]}
    assert (await world.ask("POST", "/routes/build/pause", 415, **given))["code"] == "unsupported_media_type"
    assert await commands(world) == []


async def _in_pieces(content: bytes) -> AsyncIterator[bytes]:
    """Yield a content whose length nobody is told beforehand."""
    for at in range(0, len(content), 1 << 16):
        yield content[at : at + (1 << 16)]


async def test_a_body_that_says_it_is_too_large_isnt_read(world: World) -> None:
    async def beginning() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    headers = {"Content-Type": "application/json", "Content-Length": str((64 << 10) + 1)}
    problem = await world.ask("POST", "/routes/build/pause", 413, data=beginning(), headers=headers)
    assert problem["code"] == "too_large"


async def test_a_body_has_its_bounds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"headers": {"Content-Type": "application/json"}}
    for path, most in (("/routes/build/pause", 64 << 10), ("/dead-letters/drop", 128 << 10), ("/explain", 3 << 20)):
        for data in (BytesIO(b" " * (most + 1)), _in_pieces(b" " * (most + 1))):
            problem = await world.ask("POST", path, 413, data=data, **given)
            assert (problem["code"], problem["detail"]) == (
                "too_large",
                f"expected a body of at most {most} bytes",
            )
        assert (await world.ask("POST", path, 400, data=BytesIO(b" " * most), **given))["code"] == "invalid_request"
    assert "at most 500" in (await world.post("/routes/build/pause", {"reason": "x" * 501}, 400))["detail"]
    assert (await world.ask("POST", "/routes/build/pause", 400, data=b"{", **given))["code"] == "invalid_request"
    monkeypatch.setattr("gateway.api.application.BODY_SECONDS", 0.1)

    async def slowly() -> Any:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    assert "within 0.1 s" in (await world.ask("POST", "/routes/build/pause", 400, data=slowly(), **given))["detail"]


MANY_MISTAKES: Sequence[tuple[str, Any]] = (
    ("/explain", {"source": "github", "headers": [0] * 300_000}),
    ("/explain", {"source": "github", "headers": [{"name": "a", "value": 0}] * 100}),
    ("/explain", {f"f{number}": 0 for number in range(100_000)}),
    ("/explain", {"source": "github", "headers": [{f"f{number}": 0 for number in range(2_000)}] * 100}),
    ("/dead-letters/drop", {"ids": [" "] * 30_000}),
    ("/dead-letters/drop", {"ids": [" "] * 500}),
    ("/dead-letters/drop", {"ids": ["a"] * 30_000}),
)


@pytest.mark.parametrize(("path", "body"), MANY_MISTAKES, ids=[str(number) for number in range(len(MANY_MISTAKES))])
async def test_many_mistakes_take_no_time_and_make_no_long_answer(world: World, path: str, body: object) -> None:
    content = orjson.dumps(body)
    async with stalls() as seen:
        given: dict[str, Any] = {"data": BytesIO(content), "headers": {"Content-Type": "application/json"}}
        problem = await world.ask("POST", path, 400, **given)
    assert len(str(problem)) < 16 << 10
    assert len(problem["detail"].splitlines()) <= 51
    assert seen.longest < 0.2


async def test_many_wrong_parameters_make_no_long_answer(world: World) -> None:
    async with stalls() as seen:
        problem = await world.ask("GET", "/deliveries?" + "&".join([f"p{number}" for number in range(1_000)]), 400)
    assert problem["detail"].splitlines()[-1] == "and more"
    assert len(str(problem)) < 16 << 10
    assert seen.longest < 0.2


async def test_a_control_topic_that_is_recreated_is_read_anew(world: World) -> None:
    await world.post("/routes/build/pause", {}, headers=KEY)
    log = world.company.log
    assert isinstance(log, Recording)
    await log.recreate(world.company.topics.control)
    assert (await world.get("/routes/build"))["pause"] is None
    await world.post("/routes/build/pause", {}, headers=KEY)
    assert (await world.get("/routes/build"))["pause"] is not None
