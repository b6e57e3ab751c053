"""Records that can't be decoded: garbage is dead-lettered or skipped, newer formats are left, the rest continues."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import orjson
import pytest
from structlog.testing import CapturingLogger

from gateway.engine.commit_progress import WINDOW
from gateway.engine.control import records as control_records
from gateway.engine.control.records import ControlRecord, DeadFilter, Selection, State
from gateway.log import records
from gateway.log.base import LEADER_CLOCK_SKEW, Commit, NewRecord, Partition, RecordHeaders
from gateway.log.records import Origin, encode_dedupe_entries, encode_delivery, encode_event, encode_origin, event_key
from gateway.log.topics import JOBS_GROUP, ORDERED_PARTITIONS, ROUTER_GROUP
from gateway.model import (
    NO_METADATA,
    Delivery,
    RecordMetadata,
)
from gateway.ops.control_client import ControlClient
from tests.builders import a_delivery, a_policy, a_route, an_event
from tests.engine.test_jobs import NAME, SlowLog, a_backlog, injected, once
from tests.engine.test_ordered import ORDERED, an_ordered_route, by_key, keyed
from tests.engine.test_replay import MortalLog, owning
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    World,
    a_world,
    events,
    operated,
    publish,
    rules_of,
    running,
    virtual,
)
from tests.virtual_time import now, run

NEXT = records.FORMAT + 1


def of_version(headers: RecordHeaders, version: bytes = b"%d" % NEXT) -> RecordHeaders:
    return [(name, version if name == "gw_v" else value) for name, value in headers]


async def put_newer(world: World, *names: str, key: str | None = None) -> None:
    for name in names:
        event = an_event(id=name, key=key, received_at=now())
        await world.log.append(EVENTS, key=event_key(event), value=event.body, headers=of_version(encode_event(event)))


async def file_newer(world: World, topic: str, delivery: Delivery, note: RecordMetadata = NO_METADATA) -> None:
    headers = of_version(encode_delivery(delivery, note, at=now()))
    await world.log.append(topic, key=b"ci", value=delivery.event.body, headers=headers)


def a_filed(name: str, *, due: float = 0.0) -> Delivery:
    return a_delivery(event=an_event(id=name, received_at=now()), successor=1, due=due)


@pytest.fixture(autouse=True)
def _of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what a test rolls forward be this version again."""
    monkeypatch.setattr(records, "FORMAT", records.FORMAT)
    monkeypatch.setattr(control_records, "FORMAT", control_records.FORMAT)


def roll_forward() -> None:
    """Have the processes that start from here on be of the newer version."""
    records.FORMAT = NEXT
    control_records.FORMAT = NEXT


@contextmanager
def of_newer_version() -> Iterator[None]:
    """Have what is encoded meanwhile be of the newer version."""
    before = control_records.FORMAT
    control_records.FORMAT = NEXT
    yield
    control_records.FORMAT = before


def made(world: World) -> list[str]:
    return [name for _, name, _ in world.client.made]


def newer_records(world: World, kind: str) -> float:
    return world.metrics.records_newer.labels(kind).value


async def covered(world: World, topic: str, offset: int, group: str = ROUTER_GROUP) -> bool:
    """Return whether a commit calls the record done; topics have one partition where it is asked for."""
    return (await world.log.committed(TOPICS.group(group), topic)).get(0, Commit(0)).covers(offset)


POISON: list[tuple[str, bytes, bytes, RecordHeaders]] = [
    (topic, key, value, headers)
    for topic in (EVENTS, TOPICS.retry("5s"), TOPICS.retry("20h"), TOPICS.parked, TOPICS.dead, TOPICS.dedupe)
    for key, value, headers in (
        (b"", b"", []),
        (b"\xff", b"\xff\x00", [("gw_v", b"1")]),
        (b"k", b"{}", [("gw_v", b"")]),
        (b"k", b"{}", [*encode_event(an_event()), ("gw_delivery", b'{"id": ["list"]}')]),
        (b"k", b"{}", [*encode_event(an_event()), ("gw_delivery", b"[" * 2000)]),
        (
            b"k",
            b"{}",
            [
                *encode_event(an_event()),
                (
                    "gw_delivery",
                    orjson.dumps(
                        {
                            "id": "dlv_1",
                            "route": "gone",
                            "destination": "gone",
                            "attempts": [],
                            "successor": 0,
                            "due": 0,
                            "replayed_at": 0,
                            "at": 0,
                            "metadata": {"unknown_since": "yesterday"},
                        }
                    ),
                ),
            ],
        ),
        (f"{EVENTS}/0".encode(), b"short", encode_dedupe_entries("github", 0)),
        (f"{EVENTS}/0".encode(), b"", encode_dedupe_entries("github", 1 << 62)),
    )
    if topic != EVENTS or not any(name == "ce_id" for name, _ in headers)
]
COMMANDS = [
    (b"", b""),
    (b"\xff/\xff", b"{}"),
    (b"pause", b"{}"),
    (b"pause/destination/ci", b'{"state": "paused"'),
    (b"pause/destination/ci", b'{"state": 1, "at": "now", "checkpoint": [], "count": null}'),
    (b"kick/destination/ci", b'{"state": "requested", "at": 0, "checkpoint": {"x": "y"}, "count": 0}'),
    (b"dead/1", b'{"state": "requested", "at": 0, "checkpoint": {}, "count": 0, "filter": {"ids": 7}}'),
    (b"replay/1", b'{"state": "requested", "at": 0, "checkpoint": {"a/b": 1}, "count": 0, "selection": {"route": 1}}'),
    (b"checkpoint/replay/1", b"[]"),
]


@virtual
async def test_garbage_in_any_topic_stops_nothing_and_is_counted() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(6.0,), max_attempts=3)), ci=[503, 200])
    world.rules = replace(
        world.rules, sources={name: replace(each, dedupe=60.0) for name, each in world.rules.sources.items()}
    )
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(1))
        for topic, key, value, headers in POISON:
            await world.log.append(topic, key=key, value=value, headers=headers)
        for key, value in COMMANDS:
            await world.log.append(TOPICS.control, key=key, value=value, headers=[])
        await world.put(an_event(id="evt_after", received_at=now()))
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        await publish(world, ControlRecord(kind="kick", name="destination/ci", state="requested", at=now()))
        ends = {f"{TOPICS.dead}/{number}": end for number, (_, end) in (await world.log.bounds(TOPICS.dead)).items()}
        await publish(world, ControlRecord(kind="dead", name="1", state="requested", at=now(), checkpoint=ends))
        await asyncio.sleep(30)
        states = {command.key: command.state for command in control.commands.values()}
    async with operated(world) as control, running(world, world.worker(control)):  # those that read all of it again
        await world.put(an_event(id="evt_again", received_at=now()))
        await asyncio.sleep(30)
    assert sorted(made(world)) == ["evt_0", "evt_0", "evt_after", "evt_again"]
    assert states == {"pause/destination/ci": "active", "kick/destination/ci": "done", "dead/1": "done"}
    for topic in (EVENTS, TOPICS.retry("5s")):
        assert await world.unfinished(topic) == 0
    counted = {kind: world.metrics.records_undecodable.labels(kind).value for kind in ("events", "retry", "dedupe")}
    per_topic = {topic: sum(each[0] == topic for each in POISON) for topic in (EVENTS, TOPICS.retry("5s"))}
    assert counted["events"] == per_topic[EVENTS]
    assert counted["retry"] == per_topic[TOPICS.retry("5s")]  # the other tier's are due tomorrow
    assert counted["dedupe"] > 0
    assert world.metrics.records_undecodable.labels("control").value >= len(COMMANDS) - 1  # one says nothing at all


@pytest.mark.parametrize(
    ("is_delivery", "ahead"), [(False, 3e9), (False, 100.0), (True, 3e9)], ids=["garbage", "garbage of now", "delivery"]
)
def test_a_foreign_record_with_a_position_makes_no_event_a_duplicate(is_delivery: bool, ahead: float) -> None:  # noqa: FBT001 - a parameter
    """Of each partition of events it says that all below a far offset has been appended, in this owner and the next."""

    async def scenario() -> None:
        world = await a_world(an_ordered_route())
        foreign = a_delivery(event=an_event(id="foreign.0", key="k0", received_at=now()), successor=1)
        headers = encode_delivery(foreign, NO_METADATA, at=now()) if is_delivery else []
        async with running(world):
            await world.put(*keyed(2, 3))
            await asyncio.sleep(3)
            for number in range(ORDERED_PARTITIONS):
                origins = [Origin(Partition(EVENTS, each), 10**14 - 1, now() + ahead) for each in range(6)]
                poison = [NewRecord(b"k", b"garbage", [*headers, encode_origin(each)]) for each in origins]
                await world.log.append_in_order(Partition(ORDERED, number), poison)
            await asyncio.sleep(10)
            await world.put(*keyed(2, 6)[6:])
            await asyncio.sleep(10)
        async with running(world):
            await world.put(*keyed(2, 9)[12:])
            await asyncio.sleep(10)
        tried = by_key(world)
        assert [tried[key] for key in ("k0", "k1")] == [list(range(9))] * 2
        assert len(world.log.records(TOPICS.dead)) == (0 if is_delivery else 6 * ORDERED_PARTITIONS)

    run(scenario())


@virtual
async def test_a_line_a_second_counts_many_records_that_cannot_be_read() -> None:
    world = await a_world(a_route())
    world.logger = logger = CapturingLogger()
    async with running(world):
        for _ in range(3):
            for number in range(500):
                await world.log.append(EVENTS, key=b"%d" % number, value=b"", headers=[])
            await asyncio.sleep(1.5)
    counts = [call.kwargs["count"] for call in logger.calls if call.args == ("record_undecodable",)]
    assert len(counts) <= 4
    assert counts[0] == 1
    assert world.metrics.records_undecodable.labels("events").value == 1500


@virtual
async def test_an_event_of_a_newer_version_waits_but_the_others_continue() -> None:
    world = await a_world(a_route())
    await put_newer(world, "evt_newer", key="one")
    first = next(iter(world.log.records(EVENTS)))
    await world.put(*[an_event(id=f"evt_{number}", key="one", received_at=now()) for number in range(5)])
    async with running(world):
        await asyncio.sleep(2)
        assert newer_records(world, "events") == 1
    async with running(world), running(world):  # a rebalance, and a rolling restart
        await asyncio.sleep(2)
    assert sorted(made(world)) == [f"evt_{number}" for number in range(5)]
    assert await world.unfinished() == 1
    assert world.log.records(TOPICS.dead) == []
    assert first.value
    roll_forward()
    async with running(world):
        await asyncio.sleep(2)
    assert made(world)[5:] == ["evt_newer"]
    assert await world.unfinished() == 0


@virtual
async def test_no_commit_passes_a_newer_record_however_much_follows() -> None:
    world = await a_world(a_route())
    await put_newer(world, "evt_newer", key="one")
    await world.put(*[an_event(id=f"evt_{n}", key="one", received_at=now()) for n in range(WINDOW + 500)])
    async with running(world):
        await asyncio.sleep(60)
    assert len(made(world)) == WINDOW - 1
    assert await world.unfinished() == 502
    roll_forward()
    async with running(world):
        await asyncio.sleep(60)
    assert len(set(made(world))) == len(made(world)) == WINDOW + 501


@virtual
async def test_an_ordered_route_stops_at_a_newer_event() -> None:
    """What follows may be of its key."""
    world = await a_world(an_ordered_route())
    one, two, *rest = keyed(1, 6)
    await world.put(one)
    await world.log.append(EVENTS, key=event_key(two), value=two.body, headers=of_version(encode_event(two)))
    await world.put(*rest)
    async with running(world):
        await asyncio.sleep(5)
        assert by_key(world) == {"k0": [0]}
    roll_forward()
    async with running(world):
        await asyncio.sleep(5)
    assert by_key(world) == {"k0": [0, 1, 2, 3, 4, 5]}


@virtual
async def test_an_ordered_route_stops_at_a_newer_record_of_its_own_topic() -> None:
    """What follows there may be of its key, too."""
    world = await a_world(an_ordered_route())
    for number, event in enumerate(keyed(1, 4)):
        headers = encode_delivery(a_delivery(event=event, successor=1), NO_METADATA, at=now())
        written = of_version(headers) if number == 1 else headers
        await world.log.append(ORDERED, key=b"k0", value=event.body, headers=written)
    async with running(world):
        await asyncio.sleep(5)
        assert by_key(world) == {"k0": [0]}
    roll_forward()
    async with running(world):
        await asyncio.sleep(5)
    assert by_key(world) == {"k0": [0, 1, 2, 3]}


@virtual
async def test_a_newer_record_of_a_tier_waits_through_kicks() -> None:
    world = await a_world(a_route())
    tier = TOPICS.retry("20s")
    await file_newer(world, tier, a_filed("evt_newer", due=now() + 15))
    later = a_filed("evt_later", due=now() + 15)
    await world.log.append(
        tier, key=b"ci", value=later.event.body, headers=encode_delivery(later, NO_METADATA, at=now())
    )
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, ControlRecord(kind="kick", name="destination/ci", state="requested", at=now()))
        await asyncio.sleep(60)
        assert made(world) == ["evt_later"]
        assert newer_records(world, "retry") == 1
    roll_forward()
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
    assert made(world) == ["evt_later", "evt_newer"]
    assert world.log.records(TOPICS.dead) == []


@virtual
async def test_a_parked_record_is_dead_lettered_once_though_rescans_give_way_to_resumes() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    late = RecordMetadata(paused_name="route/other")
    await publish(world, ControlRecord(kind="pause", name=late.paused_name, state="active", at=now()))
    async with owning(world, SlowLog(world.log, seconds=1.5)):
        await asyncio.sleep(7)
        await world.log.append(TOPICS.parked, key=b"x", value=b"{}", headers=[("gw_v", b"x")])
        for number in range(1500):
            delivery = a_delivery(event=an_event(id=f"evt_{number}", received_at=now()), successor=1)
            headers = encode_delivery(delivery, late, at=now())
            await world.log.append(TOPICS.parked, key=b"x", value=delivery.event.body, headers=headers)
        for _ in range(3):
            await asyncio.sleep(7)
            await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
            placed = await commands.resume("destination/ci")
            assert placed is not None
            assert await commands.finished(placed, timeout=10) is not None
            assert injected(world).total() < 1500
        await asyncio.sleep(120)
    assert injected(world) == once(1500)
    assert len(world.log.records(TOPICS.dead)) == 1


@virtual
async def test_a_parked_record_is_dead_lettered_though_its_rescan_is_killed_behind_it() -> None:
    world = await a_world(a_route())
    late = RecordMetadata(paused_name="route/other")
    await publish(world, ControlRecord(kind="pause", name=late.paused_name, state="active", at=now()))
    await world.log.append(TOPICS.parked, key=b"x", value=b"{}", headers=[("gw_v", b"x")])
    for number in range(1500):
        delivery = a_delivery(event=an_event(id=f"evt_{number}", received_at=now()), successor=1)
        headers = encode_delivery(delivery, late, at=now())
        await world.log.append(TOPICS.parked, key=b"x", value=delivery.event.body, headers=headers)
    mortal = MortalLog(world.log, appends=1000, is_stored=True)
    async with owning(world, mortal):
        await publish(world, ControlRecord(kind="pause", name="route/third", state="resuming", at=now()))
        async with asyncio.timeout(60):
            await mortal.died.wait()
        world.log.fail_commits(1)  # dead, it commits nothing
    world.log.fail_commits(0)
    async with owning(world):
        await asyncio.sleep(60)
    assert len(injected(world)) == 1500
    assert len(world.log.records(TOPICS.dead)) == 1


@virtual
async def test_a_resume_ends_though_a_parked_record_cannot_be_dead_lettered() -> None:
    """The dead-letter topic has no leader, and a rescan waits for one with the record that can't be decoded."""
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    await commands.pause(NAME)
    await a_backlog(world, "resume", 3)
    await garbage_is_parked(world)
    dead = [Partition(TOPICS.dead, number) for number in await world.log.bounds(TOPICS.dead)]
    for partition in dead:
        world.log.lose_leader(partition)
    async with owning(world):
        await asyncio.sleep(20)
        placed = await commands.resume(NAME)
        assert placed is not None
        done = await commands.finished(placed, timeout=60)
        assert done is not None
        assert done.count == 3
        for partition in dead:
            world.log.find_leader(partition)
        await asyncio.sleep(30)
    assert len(world.log.records(TOPICS.dead)) == 1


@virtual
async def test_a_parked_record_is_dead_lettered_though_stored_while_nothing_ran_or_resumed() -> None:
    world = await a_world(a_route())
    await garbage_is_parked(world)
    for _ in range(2):
        async with owning(world):
            await asyncio.sleep(60)
    assert len(world.log.records(TOPICS.dead)) == 1


@virtual
async def test_a_parked_record_is_dead_lettered_though_a_resume_has_passed_it_and_its_owner_ends() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    await commands.pause(NAME)
    async with owning(world):
        await asyncio.sleep(22)  # the next rescan is at 25 s
        await garbage_is_parked(world)
        await a_backlog(world, "resume", 3)
        placed = await commands.resume(NAME)
        assert placed is not None
        assert await commands.finished(placed, timeout=2)
    async with owning(world):
        await asyncio.sleep(60)
    assert len(world.log.records(TOPICS.dead)) == 1


async def garbage_is_parked(world: World) -> None:
    await world.log.append(TOPICS.parked, key=b"x", value=b"{", headers=[("gw_delivery", b"{")])


@virtual
async def test_a_resume_leaves_a_newer_versions_records() -> None:
    world = await a_world(a_route())
    for name in ("evt_before", "evt_after"):
        parked = a_filed(name)
        note = RecordMetadata(paused_name="destination/ci")
        await world.log.append(
            TOPICS.parked, key=b"ci", value=parked.event.body, headers=encode_delivery(parked, note, at=now())
        )
        if name == "evt_before":
            await file_newer(world, TOPICS.parked, a_filed("evt_newer"), RecordMetadata(paused_name="destination/ci"))
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        await asyncio.sleep(30)
        assert control.commands["pause/destination/ci"].count == 1
        assert newer_records(world, "parked") == 1
    assert made(world) == ["evt_before"]
    roll_forward()
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
    assert sorted(made(world)) == ["evt_after", "evt_before", "evt_newer"]
    assert world.log.records(TOPICS.dead) == []


@virtual
async def test_a_dead_letter_of_a_newer_version_is_neither_replayed_nor_resolved() -> None:
    world = await a_world(a_route())
    logger = world.logger = CapturingLogger()
    for name in ("evt_before", "evt_newer", "evt_after"):
        letter = a_filed(name)
        if name == "evt_newer":
            await file_newer(world, TOPICS.dead, letter, RecordMetadata(dead_reason="gone"))
        else:
            headers = encode_delivery(letter, RecordMetadata(dead_reason="gone", detail=""), at=now())
            await world.log.append(TOPICS.dead, key=b"ci", value=letter.event.body, headers=headers)
    number, (_, end) = next(
        (number, bounds) for number, bounds in (await world.log.bounds(TOPICS.dead)).items() if bounds[1]
    )
    command = ControlRecord(
        kind="dead",
        name="1",
        state="requested",
        at=now(),
        checkpoint={f"{TOPICS.dead}/{number}": end},
        filter=DeadFilter(destination="ci"),
    )
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, command)
        await asyncio.sleep(30)
        done = control.commands["dead/1"]
        assert (done.state, done.count) == ("done", 1)
        assert "newer version" in done.detail
        [finished] = [call.kwargs for call in logger.calls if call.args == ("job_finished",)]
        assert finished["detail"] == done.detail
        assert newer_records(world, "dead") == 1
        assert world.metrics.dead_letter_backlog.value == 2
    assert made(world) == ["evt_before"]
    roll_forward()
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, replace(command, name="2", at=now()))
        await asyncio.sleep(30)
        assert world.metrics.dead_letter_backlog.value == 0
    assert sorted(made(world)) == ["evt_after", "evt_before", "evt_newer"]


@virtual
async def test_what_a_newer_version_may_have_dropped_is_not_replayed() -> None:
    world = await a_world(a_route())

    async def bury(name: str) -> None:
        letter = a_filed(name)
        headers = encode_delivery(letter, RecordMetadata(dead_reason="gone", detail=""), at=now())
        await world.log.append(TOPICS.dead, key=b"ci", value=letter.event.body, headers=headers)

    async def command(name: str, state: State, action: Literal["replay", "drop"] = "replay") -> ControlRecord:
        ends = {f"{TOPICS.dead}/{number}": end for number, (_, end) in (await world.log.bounds(TOPICS.dead)).items()}
        its = DeadFilter(destination="ci")
        return ControlRecord(kind="dead", name=name, state=state, at=now(), action=action, checkpoint=ends, filter=its)

    await bury("evt_dropped")
    dropped = await command("1", "done", "drop")
    with of_newer_version():
        key, value = dropped.encode()
    await world.log.append(TOPICS.control, key=key, value=value, headers=[])
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(2 * LEADER_CLOCK_SKEW)
        await bury("evt_later")
        await publish(world, await command("2", "requested"))
        await asyncio.sleep(30)
        done = control.commands["dead/2"]
        assert (done.state, done.count) == ("done", 0)
        assert "newer version" in done.detail
    assert made(world) == []
    roll_forward()
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, await command("3", "requested"))
        await asyncio.sleep(30)
    assert made(world) == ["evt_later"]


@virtual
async def test_a_command_of_a_newer_version_is_not_lost() -> None:
    world = await a_world(a_route())
    waiting = a_filed("evt_waiting", due=now() + 900)
    await world.log.append(
        TOPICS.retry("20m"),
        key=b"ci",
        value=waiting.event.body,
        headers=encode_delivery(waiting, NO_METADATA, at=now()),
    )
    kick = ControlRecord(kind="kick", name="destination/ci", state="requested", at=now())
    key, value = kick.encode()
    newer = orjson.dumps({**orjson.loads(value), "v": NEXT})
    await world.log.append(TOPICS.control, key=key, value=newer, headers=[])
    await publish(world, ControlRecord(kind="kick", name="route/other", state="requested", at=now()))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
        assert control.commands["kick/route/other"].state == "done"
        assert newer_records(world, "control") == 1
    assert made(world) == []
    assert not await covered(world, TOPICS.control, 0, JOBS_GROUP)
    assert await covered(world, TOPICS.control, 1, JOBS_GROUP)


@virtual
async def test_a_command_of_a_newer_version_is_carried_out_by_it() -> None:
    world = await a_world(a_route())
    waiting = a_filed("evt_waiting", due=now() + 900)
    await world.log.append(
        TOPICS.retry("20m"),
        key=b"ci",
        value=waiting.event.body,
        headers=encode_delivery(waiting, NO_METADATA, at=now()),
    )
    key, value = ControlRecord(kind="kick", name="destination/ci", state="requested", at=now()).encode()
    newer = orjson.dumps({**orjson.loads(value), "v": NEXT})
    await world.log.append(TOPICS.control, key=key, value=newer, headers=[])
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
    assert made(world) == []
    roll_forward()
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
    assert made(world) == ["evt_waiting"]


@virtual
async def test_a_replay_waits_at_a_newer_event_and_then_continues() -> None:
    world = await a_world(a_route())
    await world.put(an_event(id="evt_before", key="one", received_at=now()))
    await put_newer(world, "evt_newer", key="one")
    await world.put(an_event(id="evt_after", key="one", received_at=now()))
    ends = {f"{EVENTS}/{number}": end for number, (_, end) in (await world.log.bounds(EVENTS)).items()}
    command = ControlRecord(
        kind="replay",
        name="1",
        state="requested",
        at=now(),
        checkpoint=ends,
        selection=Selection(route="build", since=0.0),
    )
    await publish(world, command)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(90)
        assert control.injected("replay/1") == 1
        assert control.commands["replay/1"].state == "requested"
    assert sorted(made(world)) == ["evt_after", "evt_before", "evt_before"]
    roll_forward()
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
        assert (control.commands["replay/1"].state, control.commands["replay/1"].count) == ("done", 3)
    assert sorted(made(world)) == ["evt_after"] * 2 + ["evt_before"] * 2 + ["evt_newer"] * 2


@virtual
async def test_a_replay_that_waits_at_a_newer_event_does_not_delay_the_next() -> None:
    world = await a_world(a_route())
    await put_newer(world, "evt_newer", key="one")
    before = {name: start for name, (start, _) in (await _bounds(world)).items()}
    at = now()
    await asyncio.sleep(60)
    await world.put(an_event(id="evt_after", key="one", received_at=now()))
    ends = {name: end for name, (_, end) in (await _bounds(world)).items()}
    after = {name: end - 1 if end > start else end for name, (start, end) in (await _bounds(world)).items()}
    for name, starts in (("1", before), ("2", after)):
        command = ControlRecord(
            kind="replay",
            name=name,
            state="requested",
            at=at,
            checkpoint=ends,
            selection=Selection(route="build", since=0.0, starts=starts),
        )
        await publish(world, command)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(20)
        assert control.commands["replay/1"].state == "requested"
        assert (control.commands["replay/2"].state, control.commands["replay/2"].count) == ("done", 1)


async def _bounds(world: World) -> dict[str, tuple[int, int]]:
    return {f"{EVENTS}/{number}": bounds for number, bounds in (await world.log.bounds(EVENTS)).items()}


@virtual
async def test_ordered_events_behind_a_newer_one_are_routed_by_the_rules_in_force_then() -> None:
    world = await a_world(an_ordered_route(), ci=[503])
    one, two, three = keyed(1, 3)
    await world.put(one)
    await world.log.append(EVENTS, key=event_key(two), value=two.body, headers=of_version(encode_event(two)))
    await world.put(three)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(5)
        world.rules = rules_of(a_route("other", match={"body.never": True}))
        await world.doze(2 * 3600)
    assert {stored.delivery.event.id for stored in world.dead()} <= {"k0.0"}  # which was under way
    roll_forward()
    async with operated(world) as control, running(world, world.worker(control)):
        await world.doze(2 * 3600)
    assert {stored.delivery.event.id for stored in world.dead()} == {"k0.0"}
    assert world.metrics.unrouted.labels("github").value == 2
