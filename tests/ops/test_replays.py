"""What operators see of replays: their records, their events, and their progress."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.engine.control.records import ControlRecord, Selection
from gateway.engine.unavailable_partitions import UNAVAILABLE_AFTER
from gateway.log.base import ALL, Partition
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import UsageError
from gateway.ops.control_client import ControlClient
from gateway.ops.replays import ReplayStatus, Window, follow, until_elected, window_of, would_replay
from tests.builders import NOW, a_route, an_event
from tests.engine.test_worker import rules_of
from tests.memory_log import MemoryLog

TOPICS = Topics()
EVENTS = TOPICS.events("github")


class Clock:
    """The time of a log, which the test moves on."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


async def a_log(clock: Clock, *, events: int = 0, every: float = 10.0) -> MemoryLog:
    """Make a log with an event every so many seconds, each third one an issue."""
    log = MemoryLog(now=clock)
    await log.create(TOPICS.specs([EVENTS]))
    for number in range(events):
        event = an_event(id=f"evt_{number}", type="push" if number % 3 else "issues")
        await log.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))
        clock.now += every
    return log


async def publish(log: MemoryLog, command: ControlRecord) -> None:
    key, value = command.encode()
    await log.append(TOPICS.control, key=key, value=value, headers=[])


async def test_a_window_has_the_records_of_its_time() -> None:
    log = await a_log(Clock(), events=100)
    window = await window_of(log, [EVENTS], NOW + 100, NOW + 300)
    assert window.total == 20
    assert (await window_of(log, [EVENTS], NOW + 900, None)).total == 10
    assert (await window_of(log, [EVENTS], NOW + 10_000, None)).total == 0
    assert (await window_of(log, ["none"], NOW, None)) == Window({}, {})


async def test_a_window_reports_its_unreadable_part() -> None:
    log = await a_log(Clock(), events=100)
    whole = await window_of(log, [EVENTS], NOW + 100, NOW + 300)
    log.lose_leader(Partition(EVENTS, 2))
    for until in (NOW + 300, None):
        window = await window_of(log, [EVENTS], NOW + 100, until)
        assert window.unread == {f"{EVENTS}/2": "no leader"}
        assert window.starts == {place: at for place, at in whole.starts.items() if place != f"{EVENTS}/2"}
        assert window.ends.keys() == window.starts.keys()


async def test_a_missing_topic_is_named_as_a_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(_: MemoryLog, topic: str) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:  # as Kafka's does
        assert topic == EVENTS
        return {}, {ALL: "no topic"}

    log = await a_log(Clock())
    monkeypatch.setattr(MemoryLog, "readable", gone)
    assert (await window_of(log, [EVENTS], NOW, None)).unread == {f"{EVENTS}/all": "no topic"}


async def test_a_leader_that_is_being_elected_is_waited_for_and_no_longer() -> None:
    log = await a_log(Clock())
    for seconds in (2.0, 100.0):
        log.lose_leader(Partition(EVENTS, 2))
        slept = 0.0

        async def sleep(for_seconds: float, *, elected_after: float = seconds) -> None:
            nonlocal slept
            slept += for_seconds
            if slept >= elected_after:
                log.find_leader(Partition(EVENTS, 2))

        await until_elected(log, [EVENTS, "none", EVENTS], sleep=sleep)
        assert slept == pytest.approx(min(seconds, UNAVAILABLE_AFTER))


async def test_a_dry_run_finds_a_replays_deliveries() -> None:
    log = await a_log(Clock(), events=30)
    rules = rules_of(a_route(match={"type": "push"}))
    selection = Selection(route="build", since=NOW + 100)
    window = await window_of(log, [EVENTS], selection.since, None)
    steps = [step async for step in would_replay(log, rules, selection, window)]
    assert [number for number, _ in steps] == [*range(1, 21), 20]
    ids = {matched.event.id for _, matched in steps if matched is not None}
    assert ids == {f"evt_{number}" for number in range(10, 30) if number % 3}


async def test_a_dry_run_of_an_unknown_route_is_refused() -> None:
    log = await a_log(Clock())
    for selection in (Selection(route="none", since=0.0), Selection(route="build", destination="none", since=0.0)):
        with pytest.raises(UsageError, match=r"got none$"):
            await anext(would_replay(log, rules_of(a_route()), selection, Window({}, {})))


async def test_a_replay_is_followed_from_its_command_to_its_end() -> None:
    clock = Clock()
    log = await a_log(clock, events=30)
    window = await window_of(log, [EVENTS], 0.0, None)
    command = (
        await ControlClient(log, TOPICS).replay(Selection(route="build", since=0.0, starts=window.starts), window.ends)
    ).command
    place, end = max(window.ends.items(), key=lambda item: item[1])
    halfway = {**window.starts, place: end}
    checkpoint = ControlRecord(kind="checkpoint", name=command.key, state="done", at=NOW, checkpoint=halfway, count=4)
    happens = [[], [checkpoint], [], [command.with_state("done", count=20)]]

    async def sleep(_: float) -> None:
        for one in happens.pop(0):
            await publish(log, one)

    steps = [step async for step in follow(log, TOPICS, command.name, timeout=60.0, sleep=sleep)]
    assert steps == [
        ReplayStatus(command, 0, 30, 0),
        ReplayStatus(command, end, 30, 4),
        ReplayStatus(command.with_state("done", count=20), 30, 30, 20),
    ]
    assert happens == []


async def test_a_replay_that_ends_during_the_read_is_reported_as_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is replaced, and thereby deleted, after the end was looked up up to which is read."""
    log = await EmbeddedLog.open(tmp_path / "gateway.db", owner=True)
    try:
        await log.create(TOPICS.specs([EVENTS]))
        client = ControlClient(log, TOPICS)
        command = (await client.replay(Selection(route="build", since=0.0), {})).command
        done = command.with_state("done", count=0)
        bounds = log.bounds

        async def bounds_of_a_moment_ago(topic: str) -> Mapping[int, tuple[int, int]]:
            found = await bounds(topic)
            if happens:
                key, value = happens.pop().encode()
                await log.append(topic, key=key, value=value, headers=[])
            return found

        monkeypatch.setattr(log, "bounds", bounds_of_a_moment_ago)
        happens = [done]
        assert [step.command async for step in follow(log, TOPICS, command.name, timeout=10.0)] == [done]
        happens = [done]
        assert (await client.control()).commands == {command.key: done}
    finally:
        await log.close()


async def test_a_replay_that_nobody_is_at_is_given_up_after_a_while() -> None:
    log = await a_log(Clock(), events=3)
    window = await window_of(log, [EVENTS], 0.0, None)
    command = (
        await ControlClient(log, TOPICS).replay(Selection(route="build", since=0.0, starts=window.starts), window.ends)
    ).command
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    steps = [step async for step in follow(log, TOPICS, command.name, timeout=10.0, sleep=sleep)]
    assert steps == [ReplayStatus(command, 0, 3, 0)]
    assert 10 <= sum(slept) < 11


async def test_a_replay_that_is_not_there_has_no_progress() -> None:
    log = await a_log(Clock())
    assert [step async for step in follow(log, TOPICS, "x", timeout=10.0)] == []


async def test_only_a_replay_under_way_is_cancelled() -> None:
    log = await a_log(Clock())
    commands = ControlClient(log, TOPICS)
    assert await commands.cancel("x") is None
    command = (await commands.replay(Selection(route="build", since=0.0), {})).command
    await publish(log, ControlRecord(kind="checkpoint", name=command.key, state="done", at=NOW, count=7))
    placed = await commands.cancel(command.name)
    assert placed is not None
    cancelled = placed.command
    assert cancelled == command.with_state("cancelled", count=7)
    assert (await commands.control()).commands[command.key] == cancelled
    assert await commands.cancel(command.name) is None
