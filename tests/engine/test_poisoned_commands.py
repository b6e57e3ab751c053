"""Control records that no gateway wrote, though they can be decoded: they end no owner of the jobs."""

import asyncio
from collections.abc import Iterator, Mapping

import pytest
import structlog
from structlog.testing import capture_logs

from gateway.engine.control.records import ControlRecord, Selection, decode
from gateway.engine.jobs import replay
from gateway.engine.jobs.let_through import LetThrough
from gateway.log.base import Commit, Partition
from gateway.log.records import DEDUPE_ENTRY
from gateway.model import UsageError
from gateway.rules.routing_revision import encode
from gateway.rules.rules import RoutingRevision
from tests.builders import a_route
from tests.engine.test_replay import TIER, Owner, a_replay, ended, events_of, owning
from tests.engine.test_worker import EVENTS, World, a_world, publish, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

PLACE = f"{EVENTS}/0"


async def withstood(world: World, *ends: str) -> list[ControlRecord]:
    """See that no process ends that owns the jobs, one after the other; return how these replays ended."""
    found = []
    for _ in range(3):
        owner = Owner(world)
        await owner.start()
        await asyncio.sleep(10)
        found = [owner.control.commands[f"replay/{name}"] for name in ends]
        await owner.stop()  # which sees that it hadn't ended
    return found


RANGES: Mapping[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "no start": ({PLACE: 5}, {}),
    "an end before its start": ({PLACE: 5}, {PLACE: 500}),
    "an end that no log reaches": ({PLACE: 1 << 53}, {PLACE: 0}),
    "no topic": ({"nowhere/3": 5}, {"nowhere/3": 0}),
}


@pytest.mark.parametrize(("ends", "starts"), RANGES.values(), ids=RANGES)
def test_a_replay_of_an_impossible_range_ends_no_process(ends: Mapping[str, int], starts: Mapping[str, int]) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await events_of(world, 3)
        selection = Selection(route="build", since=0.0, starts=starts, undelivered=True)
        command = ControlRecord(
            kind="replay", name="bad", state="requested", at=now(), checkpoint=ends, selection=selection
        )
        assert decode(*command.encode()) == command
        await publish(world, command)
        await a_replay(world)
        bad, good = await withstood(world, "bad", "x")
        assert bad.state == "done"
        assert (good.state, good.count) == ("done", 3)

    run(scenario())


def poison(kind: str, text: str, ends: Mapping[str, int]) -> Iterator[ControlRecord]:
    """Yield records by which the route, as events of all partitions were routed or replayed by it, is a text."""
    if kind == "checkpoint":
        selection = Selection(route="build", since=0.0, starts=dict.fromkeys(ends, 0))
        yield ControlRecord(kind="replay", name="bad", state="done", at=now(), checkpoint=ends, selection=selection)
        yield ControlRecord(kind="checkpoint", name="replay/bad", state="done", at=now(), checkpoint=ends, routes=text)
        return
    revision = encode(RoutingRevision("bad", {"build": text}), None) if kind == "rules" else text
    yield ControlRecord(
        kind="rules", name="bad", state="done", at=now(), routes=revision, revision="bad" if kind == "itself" else ""
    )
    yield ControlRecord(
        kind="routed", name="bad", state="done", at=now(), checkpoint=dict.fromkeys(ends, 0), revision="bad"
    )


@pytest.mark.parametrize("kind", ["checkpoint", "rules", "whole", "itself"])
@pytest.mark.parametrize("text", ["garbage", "[]", '{"from": 1, "to": []}', '{"from":["github"],"to":["ci"],"when":7}'])
def test_foreign_route_texts_are_unknown_and_end_no_process(kind: str, text: str) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await events_of(world, 3)
        ends = {f"{EVENTS}/{number}": end for number, (_, end) in (await world.log.bounds(EVENTS)).items()}
        for each in poison(kind, text, ends):
            assert decode(*each.encode()) == each
            await publish(world, each)
        await a_replay(world, undelivered=True)
        (command,) = await withstood(world, "x")
        assert (command.state, command.count) == ("done", 0)

    run(scenario())


@virtual
async def test_a_replay_that_fails_is_cancelled_and_not_tried_again_and_the_next_begin() -> None:
    """Whatever a record contains that nobody has thought of."""
    world = await a_world(a_route())
    world.logger = structlog.get_logger()
    await events_of(world, 3)
    await a_replay(world, "bad", undelivered=True)
    await a_replay(world, "good")

    error = KeyError("what was not foreseen")

    async def open_dead_letters(*_: object, **__: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, capture_logs() as lines:
        patch.setattr(replay, "open_dead_letters", open_dead_letters)
        bad, good = await withstood(world, "bad", "good")
    assert bad.state == "cancelled"
    assert bad.detail == "this replay can't be carried out: KeyError, a bug; the log has its traceback"
    assert (good.state, good.count) == ("done", 3)
    (line,) = [line for line in lines if line["event"] == "job_failed"]
    assert (line["command"], line["log_level"]) == ("replay/bad", "error")
    assert "open_dead_letters" in line["exception"]
    assert "not foreseen" not in str(line), "it may be a piece of a body"


@virtual
async def test_a_replay_that_fails_while_its_end_cannot_be_stored_is_not_tried_meanwhile() -> None:
    world = await a_world(a_route())
    await events_of(world, 3)
    tries = []

    async def open_dead_letters(*_: object, **__: object) -> None:
        tries.append(now())
        world.log.fail_appends()
        raise KeyError("what was not foreseen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "open_dead_letters", open_dead_letters)
        await a_replay(world, "bad", undelivered=True)
        async with owning(world) as control:
            await asyncio.sleep(60)
            world.log.fail_appends(0)
            assert (await ended(control, "bad")).state == "cancelled"
    assert len(tries) == 1


@virtual
async def test_a_replay_that_fails_and_whose_end_is_too_large_to_be_stored_ends_no_process() -> None:
    world = await a_world(a_route())
    await events_of(world, 3)
    places = {f"{EVENTS}/{number}": 5 for number in range(1000)}
    selection = Selection(route="build", since=0.0, starts=places, undelivered=True)
    command = ControlRecord(
        kind="replay", name="bad", state="requested", at=now(), checkpoint=places, selection=selection
    )
    await publish(world, command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryLog, "max_record_bytes", sum(map(len, command.encode())))
        await a_replay(world)
        (good,) = await withstood(world, "x")
    assert (good.state, good.count) == ("done", 3)


def rows(*offsets: int) -> bytes:
    return b"".join([DEDUPE_ENTRY.pack(b"i" * 16, b"f" * 8, offset, 0) for offset in offsets])


def test_memory_of_duplicates_grows_with_them_and_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.engine.jobs.let_through.MAX_BLOCKS", 3)
    let_through = LetThrough({PLACE: 10}, {PLACE: 1 << 53}, {PLACE: Commit(1 << 53)})
    let_through.add(PLACE, rows(3, 10, 12, 1 << 40, 1 << 53))
    partition = Partition(EVENTS, 0)
    assert [offset for offset in (3, 10, 11, 12, 13) if let_through.was_dropped_as_duplicate(partition, offset)] == [
        11,
        13,
    ]
    assert not let_through.was_dropped_as_duplicate(partition, 1 << 40)
    assert let_through.was_dropped_as_duplicate(partition, (1 << 40) + 1)
    let_through.add(PLACE, rows(1 << 41))
    with pytest.raises(UsageError, match="replay a part of it at a time"):
        let_through.add(PLACE, rows(1 << 42))


@virtual
async def test_a_replay_of_too_many_events_to_keep_in_memory_is_cancelled_and_says_so() -> None:
    world = await a_world(a_route())
    await events_of(world, 3)

    async def read_let_through(*_: object, **__: object) -> None:
        raise UsageError("replay a part of it at a time")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "read_let_through", read_let_through)
        await a_replay(world, undelivered=True)
        async with owning(world) as control:
            command = await ended(control)
    assert (command.state, command.detail) == ("cancelled", "replay a part of it at a time")
    assert not world.log.records(TIER)
