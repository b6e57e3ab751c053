"""Moving an embedded log: whatever interrupts it, in the end the same records are unfinished."""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from gateway.engine.control.records import ControlRecord, DeadFilter, Selection, decode, partition_key
from gateway.engine.control.redelivery_records import Redelivery, RedeliveryResult
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import read_dead_letter
from gateway.engine.jobs.log_reader import checksum_of, last_records
from gateway.engine.ordered.duplicate_appends import DuplicateAppends
from gateway.log.base import Assignment, Commit, Log, Partition, Position, Record, RecordHeaders, partition_of
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import (
    DEDUPE_ENTRY,
    Origin,
    decode_dedupe_entries,
    decode_delivery,
    decode_event,
    dedupe_entries_key,
    encode_dedupe_entries,
    encode_delivery,
    encode_event,
    encode_origin,
    event_key,
    order_key,
    origin_of,
)
from gateway.log.topics import TIERS, Topics
from gateway.model import NO_METADATA, LogUnavailableError, RecordMetadata, UsageError
from gateway.ops.log_search import find_event
from gateway.ops.migrate import MOVED, Moved, migrate
from gateway.rules.routing_revision import encode
from gateway.rules.rules import RoutingRevision
from tests.builders import a_delivery, an_event
from tests.memory_log import MemoryLog

TOPICS = Topics()
EVENTS = TOPICS.events("github")
ROUTER = TOPICS.group("router")
PAIR = ("mirror", "mirror")
MIRROR, ORDERED = TOPICS.ordered(*PAIR), TOPICS.ordered_group(*PAIR)
COUNT = 60


class Broken(MemoryLog):
    """A log whose appends fail as a test wants it."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.fails = fails
        self.appends = 0

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        self.appends += 1
        if self.fails(self.appends - 1):
            raise LogUnavailableError("gone")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


def never(_: int) -> bool:
    return False


async def interrupted(source: Log) -> Broken:
    """Return a log that all was moved to, but for the last command and the commits."""
    whole = Broken(never)
    await move(source, whole)
    target = Broken(lambda number: number >= whole.appends - 1)
    with pytest.raises(LogUnavailableError):
        await move(source, target)
    target.fails = never
    return target


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[EmbeddedLog]:
    log = await EmbeddedLog.open(tmp_path / "gateway.db", owner=True)
    await log.create(TOPICS.specs([EVENTS]))
    yield log
    await log.close()


@asynccontextmanager
async def emptied(tmp_path: Path, name: str) -> AsyncIterator[EmbeddedLog]:
    log = await EmbeddedLog.open(tmp_path / name, owner=True)
    await log.create(TOPICS.specs([EVENTS]))
    try:
        yield log
    finally:
        await log.close()


async def put(log: Log, topic: str, delivery: Any, by: str = "", reason: str = "") -> int:
    headers = encode_delivery(delivery, RecordMetadata(paused_name=by, dead_reason=reason), at=time.time())
    key = delivery.destination.encode()
    return (await log.append(topic, key=key, value=delivery.event.body, headers=headers)).offset


async def put_in_order(log: Log, number: int) -> None:
    """Append the delivery of an event to its ordered route, as the router does."""
    event = an_event(id=f"evt_{number}", key=f"repo-{number % 7}", body=b"%d" % number)
    delivery = a_delivery(event=event, route="mirror", destination="mirror", successor=1)
    origin = Origin(Partition(EVENTS, 0), number, 1_700_000_000.0 + number)
    headers = [*encode_delivery(delivery, NO_METADATA, at=time.time()), encode_origin(origin)]
    await log.append(MIRROR, key=order_key(event).encode(), value=event.body, headers=headers)


async def give(log: Log, given: ControlRecord) -> None:
    key, value = given.encode()
    await log.append(TOPICS.control, key=key, value=value, headers=[])


async def fill(log: Log, *, base: int = 10) -> None:
    """Leave something unfinished of everything that there is."""
    now = time.time()
    for number in range(COUNT):
        event = an_event(id=f"evt_{number}", key=f"repo-{number % 7}", body=b"%d" % number)
        await log.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))
    # Done: 0 to 9, and of those that follow each third; by the ordered group 0 to 4, and 6.
    bits = sum([1 << bit for bit in range(0, COUNT - base, 3) if bit])
    await log.seed(ROUTER, {Partition(EVENTS, 0): Commit(base, bits.to_bytes(8, "little").rstrip(b"\0"))})
    await log.create(TOPICS.specs([], [PAIR]))
    for number in range(COUNT // 2):
        await put_in_order(log, number)
    await put_in_order(log, 20)  # as after a crash
    await log.seed(ORDERED, {Partition(MIRROR, 0): Commit(5, b"\x02")})
    for number, tier in enumerate(TIERS):
        for of_it in range(3):
            delivery = a_delivery(id=f"dlv_{tier}_{of_it}", due=now + 10_000.0, successor=number)
            await put(log, TOPICS.retry(tier), delivery)
        await log.seed(ROUTER, {Partition(TOPICS.retry(tier), 0): Commit(1)})
    for number in range(4):
        await put(log, TOPICS.parked, a_delivery(id=f"dlv_parked_{number}"), by="destination/ci")
        await put(log, TOPICS.dead, a_delivery(id=f"dlv_dead_{number}"), reason="exhausted")
    await give(log, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now))
    reached = {f"{TOPICS.parked}/0": 1}  # by the resume of an earlier pause
    await give(
        log,
        ControlRecord(kind="checkpoint", name="pause/destination/ci", state="done", at=log.now(), checkpoint=reached),
    )
    settled = {f"{TOPICS.dead}/0": 2}
    await give(log, ControlRecord(kind="dead", name="1", state="done", at=log.now(), checkpoint=settled, action="drop"))
    rows = [
        DEDUPE_ENTRY.pack(b"%016d" % number, b"contents", number, 1_700_000_000_000_000 + number) for number in range(9)
    ]
    headers = encode_dedupe_entries("github", 17)
    await log.append(TOPICS.dedupe, key=dedupe_entries_key(Partition(EVENTS, 0)), value=b"".join(rows), headers=headers)


async def records(log: Log, topic: str) -> list[tuple[Partition, Record]]:
    return [
        (Partition(topic, number), record)
        for number, (start, end) in sorted((await log.bounds(topic)).items())
        async for batch in log.scan(Partition(topic, number), start, end)
        for record in batch
    ]


async def control_of(log: Log) -> Control:
    return Control(decode(record.key, record.value) for _, record in await records(log, TOPICS.control))


async def give_all(log: Log) -> None:
    """Give a replay, which has begun, and a command about dead letters, of which there are none."""
    place = f"{EVENTS}/0"
    selection = Selection(route="mirror", since=1.0, until=2.0, starts={place: 11})
    await give(
        log,
        ControlRecord(kind="replay", name="r", state="requested", at=1.0, checkpoint={place: 40}, selection=selection),
    )
    await give(
        log, ControlRecord(kind="checkpoint", name="replay/r", state="done", at=2.0, checkpoint={place: 20}, count=9)
    )
    which = DeadFilter(destination="erp", since=1.0)
    checkpoint = {f"{TOPICS.dead}/0": 4}
    await give(
        log, ControlRecord(kind="dead", name="2", state="requested", at=3.0, checkpoint=checkpoint, filter=which)
    )


async def meant_by(given: ControlRecord, log: Log) -> list[str]:
    """Return the deliveries whose letters a command is for."""
    return sorted(
        letter.id
        for partition, record in await records(log, TOPICS.dead)
        for letter in [read_dead_letter(record)[0]]
        if given.is_for(letter) and record.offset < given.checkpoint[partition_key(partition)]
    )


async def unfinished(log: Log) -> list[tuple[str, ...]]:  # noqa: C901 - one loop for each kind of topic
    """Return everything that is still to be seen to, with how often it is there."""
    found: list[tuple[str, ...]] = []
    for group, topic in ((ROUTER, EVENTS), (ORDERED, MIRROR)):
        commits = await log.committed(group, topic)
        seen = DuplicateAppends()
        for partition, record in await records(log, topic):
            commit, origin = commits.get(partition.number), origin_of(record)
            is_duplicate = origin is not None and seen.is_duplicate(record.offset, origin)
            if not is_duplicate and (commit is None or not commit.covers(record.offset)):
                found.append((group, decode_event(record).id, record.value.decode()))
    for tier in TIERS:
        commits = await log.committed(ROUTER, TOPICS.retry(tier))
        for partition, record in await records(log, TOPICS.retry(tier)):
            if not commits.get(partition.number, Commit(0)).covers(record.offset):
                found.append(("retry", decode_delivery(record).delivery.id))
    control = await control_of(log)
    for partition, record in await records(log, TOPICS.parked):
        if not control.has_scanned("pause/destination/ci", partition, record.offset, record.appended_at):
            found.append(("parked", decode_delivery(record).delivery.id))
    for partition, record in await records(log, TOPICS.dead):
        letter, _ = read_dead_letter(record)
        if control.resolved_by(letter, partition, record.offset) is None:
            found.append(("dead", letter.id))
    return sorted(found)


async def move(source: Log, target: Log) -> Mapping[str, Moved]:
    moved = await migrate(source, target, TOPICS, [EVENTS], lambda _: lambda _done, _told: None)
    return {each.topic: each for each in moved.topics}


# What is unfinished


async def test_unfinished_records_stay_unfinished_and_done_ones_done(source: EmbeddedLog) -> None:
    await fill(source)
    target = MemoryLog()
    expected = await unfinished(source)
    moved = await move(source, target)
    assert await unfinished(target) == expected
    assert {kind for kind, *_ in expected} == {ROUTER, ORDERED, "retry", "parked", "dead"}
    assert (moved[EVENTS].records, moved[EVENTS].unfinished) == (COUNT, 34)
    assert (moved[MIRROR].records, moved[MIRROR].unfinished) == (31, 24)
    assert [moved[topic].records for topic in (TOPICS.parked, TOPICS.dead, TOPICS.control)] == [3, 2, 1]


async def test_records_are_moved_as_they_are_and_those_of_a_key_in_their_order(source: EmbeddedLog) -> None:
    await fill(source)
    target = MemoryLog()
    await move(source, target)
    plain = [
        record._replace(headers=tuple([each for each in record.headers if each[0] != MOVED]))
        for _, record in await records(target, EVENTS)
    ]
    content = {record.value: (record.key, tuple(record.headers)) for record in plain}
    assert content == {record.value: (record.key, tuple(record.headers)) for _, record in await records(source, EVENTS)}
    for key in {record.key for record in plain}:
        numbers = [int(record.value) for record in plain if record.key == key]
        assert numbers == sorted(numbers)
        assert len(numbers) > 1


@pytest.mark.parametrize(
    ("left", "tier"), [(-5.0, "5s"), (2.0, "5s"), (28.0, "20s"), (100.0, "80s"), (70_000.0, "5h"), (90_000.0, "20h")]
)
async def test_a_retry_waits_its_remaining_delay(source: EmbeddedLog, left: float, tier: str) -> None:
    await put(source, TOPICS.retry("80m"), a_delivery(due=time.time() + left))
    target = MemoryLog()
    await move(source, target)
    assert [name for name in TIERS if target.records(TOPICS.retry(name))] == [tier]


async def test_a_kicks_injected_originals_are_not_moved(source: EmbeddedLog) -> None:
    await put(source, TOPICS.retry("5h"), a_delivery(id="dlv_old", due=time.time() + 9000))
    await put(source, TOPICS.retry("5s"), a_delivery(id="dlv_old", successor=1))
    checkpoint = {f"{TOPICS.retry('5h')}/0": 1}
    await give(
        source,
        ControlRecord(
            kind="checkpoint", name="kick/destination/ci", state="done", at=source.now(), checkpoint=checkpoint
        ),
    )
    target = MemoryLog()
    await move(source, target)
    assert len([record for tier in TIERS for record in target.records(TOPICS.retry(tier))]) == 1


async def test_unreadable_records_are_moved_for_the_router(source: EmbeddedLog) -> None:
    for topic in (EVENTS, TOPICS.retry("5m"), TOPICS.parked, TOPICS.dead):
        await source.append(topic, key=b"k", value=b"?", headers=[("x", b"y")])
    target = MemoryLog()
    await move(source, target)
    for topic in (EVENTS, TOPICS.retry("5s"), TOPICS.parked, TOPICS.dead):
        assert [record.value for record in target.records(topic)] == [b"?"]


async def test_a_foreign_record_with_a_position_makes_no_ordered_delivery_a_duplicate(source: EmbeddedLog) -> None:
    await fill(source)
    foreign = encode_origin(Origin(Partition(EVENTS, 0), 10**14 - 1, 1_700_001_000.0))
    await source.append(MIRROR, key=b"k", value=b"?", headers=[foreign])
    await put_in_order(source, COUNT - 1)
    target = MemoryLog()
    await move(source, target)
    commits = await target.committed(ORDERED, MIRROR)
    last = b"%d" % (COUNT - 1)
    (place,) = [place for place, record in await records(target, MIRROR) if record.value == last]
    (record,) = [record for record in target.records(MIRROR) if record.value == last]
    assert place.number not in commits or not commits[place.number].covers(record.offset)


# What was seen, and commanded


async def test_dedupe_entries_follow_the_events_to_their_partitions(source: EmbeddedLog) -> None:
    await fill(source)
    target = MemoryLog()
    await move(source, target)
    places = {(partition, record.offset): int(record.value) for partition, record in await records(target, EVENTS)}
    found = []
    for _, record in await records(target, TOPICS.dedupe):
        entries = decode_dedupe_entries(record)
        assert (entries.source, entries.origin) == ("github", 17)
        number = int(record.key.rpartition(b"/")[2])
        for identity, content, offset, at in DEDUPE_ENTRY.iter_unpack(entries.rows):
            event = places[Partition(EVENTS, number), offset]
            assert (identity, content, at) == (b"%016d" % event, b"contents", 1_700_000_000_000_000 + event)
            found.append(event)
    assert sorted(found) == list(range(9))


async def test_a_replay_in_progress_resumes_with_the_same_events(source: EmbeddedLog) -> None:
    await fill(source)
    place = f"{EVENTS}/0"
    selection = Selection(route="mirror", since=1.0, until=2.0, starts={place: 11})
    asked = ControlRecord(
        kind="replay", name="r", state="requested", at=1.0, checkpoint={place: 40}, selection=selection
    )
    await give(source, replace(asked, last_records=await last_records(source, {}, asked.checkpoint)))
    await give(
        source, ControlRecord(kind="checkpoint", name="replay/r", state="done", at=2.0, checkpoint={place: 20}, count=9)
    )
    target = MemoryLog()
    await move(source, target)
    control = await control_of(target)
    moved = control.next_replay()
    assert moved is not None
    assert moved.selection is not None
    assert (moved.selection.since, moved.selection.until) == (0.0, None)  # by the append, which is later now
    begun = {**moved.selection.starts, **control.checkpoint("replay/r")}
    left = [
        int(record.value)
        for partition, record in await records(target, EVENTS)
        if begun[f"{EVENTS}/{partition.number}"] <= record.offset < moved.checkpoint[f"{EVENTS}/{partition.number}"]
    ]
    assert sorted(left) == list(range(20, 40))
    assert control.injected("replay/r") == 9
    assert moved.last_records == await last_records(target, moved.selection.starts, moved.checkpoint)


async def test_by_which_rules_events_were_routed_is_known_of_the_same_ones(source: EmbeddedLog) -> None:
    await fill(source)
    revisions = [RoutingRevision(f"e{number}", {"build": str(number)}) for number in range(2)]
    for revision, offset in zip(revisions, (0, 12), strict=True):
        await give(
            source, ControlRecord(kind="rules", name=revision.name, state="done", at=1.0, routes=encode(revision, None))
        )
        checkpoint = {f"{EVENTS}/0": offset, "gone/0": 7}
        told = ControlRecord(
            kind="routed", name=f"r{offset}", state="done", at=1.0, checkpoint=checkpoint, revision=revision.name
        )
        await give(source, told)
    target = MemoryLog()
    await move(source, target)
    history = (await control_of(target)).history
    for partition, record in await records(target, EVENTS):
        assert history.revision_at(partition, record.offset) == revisions[int(record.value) >= 12]
    given = len(await records(target, TOPICS.control))
    await move(source, target)
    assert len(await records(target, TOPICS.control)) == given


async def test_a_command_for_dead_letters_keeps_its_selection(source: EmbeddedLog) -> None:
    for number in range(6):
        await put(source, TOPICS.dead, a_delivery(id=f"dlv_{number}"), reason="exhausted" if number % 2 else "gone")
    since = (await records(source, TOPICS.dead))[1][1].appended_at
    which = DeadFilter(reason="exhausted", since=since)
    await give(
        source,
        ControlRecord(
            kind="dead", name="1", state="requested", at=source.now(), checkpoint={f"{TOPICS.dead}/0": 5}, filter=which
        ),
    )
    target = MemoryLog()
    await move(source, target)
    moved = (await control_of(target)).commands["dead/1"]
    assert await meant_by(moved, target) == ["dlv_1", "dlv_3"]


# Interruptions


async def test_a_run_killed_anywhere_is_resumed(source: EmbeddedLog) -> None:
    await fill(source)
    expected = await unfinished(source)
    whole = Broken(never)
    await move(source, whole)
    for killed_at in range(0, whole.appends, 7):
        target = Broken(lambda number, killed_at=killed_at: number >= killed_at)  # type: ignore[misc] # mypy knows no type for a lambda with a default
        with pytest.raises(LogUnavailableError):
            await move(source, target)
        target.fails = never
        await move(source, target)
        assert await unfinished(target) == expected, killed_at
        for topic in (EVENTS, TOPICS.parked, TOPICS.dead):
            assert len(target.records(topic)) == len(whole.records(topic))


@pytest.mark.parametrize("lost", [0, 1, 17, 30, 58, 59])
async def test_an_append_that_fails_alone_does_not_change_the_order(source: EmbeddedLog, lost: int) -> None:
    """What was stored behind it counts for nothing, and is stored again."""
    await fill(source)
    expected = await unfinished(source)
    target = Broken(lambda number: number == lost)
    with pytest.raises(LogUnavailableError):
        await move(source, target)
    await move(source, target)
    assert await unfinished(target) == expected
    commits = await target.committed(ORDERED, MIRROR)
    by_key: dict[bytes, list[int]] = {}
    for partition, record in await records(target, MIRROR):
        if not commits[partition.number].covers(record.offset):
            by_key.setdefault(record.key, []).append(int(record.value))
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


async def test_once_it_is_done_another_run_changes_nothing(source: EmbeddedLog) -> None:
    await fill(source)
    target = Broken(never)
    await move(source, target)
    expected, appends = await unfinished(target), target.appends
    await move(source, target)
    assert await unfinished(target) == expected
    assert target.appends == appends


async def test_commands_that_are_there_are_not_given_again(source: EmbeddedLog) -> None:
    await fill(source)
    await give_all(source)
    target = Broken(never)
    await move(source, target)
    appends = target.appends
    await move(source, target)
    assert target.appends == appends


async def test_a_command_that_was_carried_out_after_an_interruption_is_not_carried_out_again(
    source: EmbeddedLog,
) -> None:
    await fill(source)
    await give_all(source)
    target = await interrupted(source)
    for given in (await control_of(source)).commands.values():
        if given.state == "requested":
            await give(source, given.with_state("done"))
    await give(source, ControlRecord(kind="checkpoint", name="replay/r", state="deleted", at=0.0))
    await move(source, target)
    control = await control_of(target)
    assert [each.key for each in control.commands.values()] == ["pause/destination/ci"]
    assert not control.checkpoint("replay/r")


async def test_a_redelivery_that_waits_is_of_the_same_event_wherever_that_is_now(source: EmbeddedLog) -> None:
    await fill(source)
    found = await find_event(source, [EVENTS], f"{EVENTS}/0@7")
    assert found is not None
    wanted = decode_event(found.record)
    asked = Redelivery(event=wanted.id, partition=f"{EVENTS}/0", offset=7, route="build")
    command = ControlRecord(kind="redeliver", name="one", state="requested", at=1.0, redelivery=asked, by="me")
    await give(source, command)
    results = (RedeliveryResult(route="build", destination="ci", outcome="queued"),)
    await give(source, ControlRecord(kind="checkpoint", name=command.key, state="requested", at=1.0, results=results))
    await give(source, replace(command, name="gone", redelivery=replace(asked, offset=10**6)))
    await give(source, replace(command, name="ended", state="done"))
    target = MemoryLog()
    await move(source, target)
    control = await control_of(target)
    assert [each.name for each in control.commands.values() if each.kind == "redeliver"] == ["one"]
    moved = control.commands[command.key]
    assert moved.redelivery is not None
    there = await find_event(target, [EVENTS], moved.redelivery.position)
    assert there is not None
    assert decode_event(there.record) == wanted
    assert moved.last_records == {moved.redelivery.partition: checksum_of(there.record)}
    assert (moved.redelivery.route, moved.by) == ("build", "me")
    last = control.last_checkpoint(command.key)
    assert last is not None
    assert last.results == results


async def test_a_dead_letter_beside_a_failed_append_is_there_once(source: EmbeddedLog) -> None:
    await fill(source)
    for lost in range(COUNT, COUNT + 2):  # the dead letters follow the events
        target = Broken(lambda number, lost=lost: number == lost)  # type: ignore[misc] # mypy knows no type for a lambda with a default
        with pytest.raises(LogUnavailableError):
            await move(source, target)
        await move(source, target)
        assert await unfinished(target) == await unfinished(source)


async def test_a_command_for_dead_letters_keeps_its_selection_in_another_order(
    source: EmbeddedLog,
) -> None:
    for number in range(3):
        await put(source, TOPICS.dead, a_delivery(id=f"dlv_{number}"), reason="exhausted")
    await give(
        source,
        ControlRecord(kind="dead", name="1", state="requested", at=source.now(), checkpoint={f"{TOPICS.dead}/0": 2}),
    )
    target = Broken(lambda number: number == 1)
    with pytest.raises(LogUnavailableError):
        await move(source, target)
    await move(source, target)
    moved = (await control_of(target)).commands["dead/1"]
    assert await meant_by(moved, target) == ["dlv_0", "dlv_1"]


async def test_an_event_that_was_stored_twice_before_the_first_commit_is_done_once(source: EmbeddedLog) -> None:
    event = an_event(key="one")
    await source.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))
    target = MemoryLog()
    await move(source, target)
    (record,) = target.records(EVENTS)
    await target.append(EVENTS, key=record.key, value=record.value, headers=record.headers)
    target.forget(ROUTER)
    await move(source, target)
    assert [kind for kind, *_ in await unfinished(target)].count(ROUTER) == 1


async def test_a_retry_that_was_stored_twice_is_tried_once(source: EmbeddedLog) -> None:
    await put(source, TOPICS.retry("5m"), a_delivery(due=time.time() + 250))
    target = MemoryLog()
    await move(source, target)
    (record,) = target.records(TOPICS.retry("80s"))
    await target.append(TOPICS.retry("80s"), key=record.key, value=record.value, headers=record.headers)
    await move(source, target)
    assert await unfinished(target) == await unfinished(source)


# What is refused


async def test_a_record_that_is_not_the_same_there_is_noticed(source: EmbeddedLog) -> None:
    class Careless(MemoryLog):
        @override
        async def append(
            self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
        ) -> Position:
            return await super().append(
                topic, key=key, value=value.replace(b"42", b"43"), headers=headers, partition=partition
            )

    await fill(source)
    target = Careless()
    with pytest.raises(LogUnavailableError, match="expected the moved record to be the same"):
        await move(source, target)
    assert not await target.committed(ROUTER, EVENTS)


async def test_a_record_that_is_missing_there_is_noticed(source: EmbeddedLog) -> None:
    class Forgetful(MemoryLog):
        @override
        async def append(
            self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
        ) -> Position:
            position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
            if value == b"42":
                segment = self._state.segments[Partition(topic, position.partition)]
                segment.records = [record for record in segment.records if record.value != b"42"]
            return position

    await fill(source)
    with pytest.raises(LogUnavailableError, match=f"expected {COUNT} records moved, found {COUNT - 1}"):
        await move(source, Forgetful())


async def test_a_log_with_records_of_others_is_left_alone(tmp_path: Path, source: EmbeddedLog) -> None:
    await fill(source)
    async with emptied(tmp_path, "other.db") as other:
        await fill(other)
        target = MemoryLog()
        await move(other, target)
        with pytest.raises(UsageError, match="expected only records moved from this log"):
            await move(source, target)


async def test_a_log_at_which_a_gateway_works_is_left_alone(source: EmbeddedLog) -> None:
    class Idle:
        def assigned(self, assignments: object, without_position: object = ()) -> None:  # noqa: ARG002 - the listener's signature
            assert assignments

        def records_deleted(self, partition: Partition, deleted: range) -> None:
            pass

        def restarted(self, assignment: Assignment) -> None:
            pass

        async def revoked(self, partitions: object) -> Mapping[Partition, Commit]:
            assert partitions
            return {}

    target = MemoryLog()
    await target.create(TOPICS.specs([EVENTS]))
    await target.seed(ROUTER, {Partition(EVENTS, 0): Commit(0)})
    consumer = await target.consume(group=ROUTER, topics=[EVENTS], listener=Idle())
    with pytest.raises(UsageError, match="expected no gateway on the log"):
        await move(source, target)
    await consumer.close()


async def test_a_prefix_that_the_log_does_not_have_is_refused(source: EmbeddedLog) -> None:
    await fill(source)
    target = MemoryLog()
    for wrong, events in (("prod.", "prod.events.github"), ("", EVENTS)):
        with pytest.raises(UsageError, match=rf"^--topic-prefix: expected 'gateway\.', .* got '{wrong}'"):
            await migrate(source, target, Topics(wrong), [events], lambda _: lambda _done, _told: None)
    assert not await target.topics()


async def test_a_log_that_no_gateway_has_worked_on_is_refused(tmp_path: Path) -> None:
    log = await EmbeddedLog.open(tmp_path / "new.db", owner=True)
    with pytest.raises(UsageError, match="got one without topics"):
        await move(log, MemoryLog())
    await log.close()


async def test_another_prefix_is_reported(source: EmbeddedLog) -> None:
    other = Topics("prod.")
    await source.create(other.specs([other.events("github")]))
    await source.append(other.events("github"), key=b"k", value=b"v", headers=[])
    moved = await migrate(source, MemoryLog(), TOPICS, [EVENTS], lambda _: lambda _done, _told: None)
    assert moved.left == [other.events("github")]


async def test_an_event_after_the_comparison_is_unfinished_and_reported(source: EmbeddedLog) -> None:
    """An ingress is nobody's member: who looks at the groups doesn't see it."""

    class Served(MemoryLog):
        @override
        async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Any]:
            if partition == Partition(TOPICS.dead, 0) and len(self.records(EVENTS)) == COUNT:
                late = an_event(id="evt_late", key="repo-1", body=b"late")
                await self.append(EVENTS, key=event_key(late), value=late.body, headers=encode_event(late))
            async for batch in super().scan(partition, start, end):
                yield batch

    await fill(source)
    expected = await unfinished(source)
    target = Served()
    with pytest.raises(UsageError, match=rf"^{EVENTS}/\d@\d+: expected no other writer .* is unfinished"):
        await move(source, target)
    late = [(ROUTER, "evt_late", "late")]
    assert await unfinished(target) == sorted([*expected, *late])


@pytest.mark.parametrize("group", [ROUTER, TOPICS.ordered_group("new", "new")])
async def test_commits_of_a_gateway_that_was_started_there_are_refused_before_anything_is_moved(
    source: EmbeddedLog, group: str
) -> None:
    """On an empty log a gateway leaves no record, but a new ordered route its first commits."""
    await fill(source)
    target = Broken(never)
    await target.create(TOPICS.specs([EVENTS]))
    await target.seed(group, {Partition(EVENTS, number): Commit(0) for number in range(6)})
    with pytest.raises(
        UsageError, match=rf"^{group}: expected only the commits .* delete the topics and the groups there"
    ):
        await move(source, target)
    assert target.appends == 0


async def test_a_log_with_appends_after_its_move_is_refused_at_once(source: EmbeddedLog) -> None:
    await fill(source)
    target = Broken(never)
    await move(source, target)
    expected, appends = await unfinished(target), target.appends
    event = an_event(id="evt_new")
    await source.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))
    with pytest.raises(UsageError, match="expected only the commits"):
        await move(source, target)
    assert (await unfinished(target), target.appends) == (expected, appends)


@pytest.mark.parametrize("worked", ["here", "there"])
async def test_events_delivered_after_a_move_are_not_unfinished(source: EmbeddedLog, worked: str) -> None:
    await fill(source)
    target = Broken(never)
    await move(source, target)
    appends = target.appends
    log = source if worked == "here" else target
    if worked == "here":
        await source.write(lambda file: file.execute("DELETE FROM commits WHERE member = ?", (ROUTER,)))
    else:
        target.forget(ROUTER)
    done = [Partition(EVENTS, number) for number in await log.bounds(EVENTS)]
    await log.seed(ROUTER, {partition: Commit(COUNT) for partition in done})
    await log.seed(ROUTER, {Partition(TOPICS.retry(tier), 0): Commit(1) for tier in TIERS if worked == "here"})
    with pytest.raises(UsageError, match=rf"^{ROUTER}: expected only the commits"):
        await move(source, target)
    assert target.appends == appends


async def test_a_commit_that_another_stored_meanwhile_is_noticed(source: EmbeddedLog) -> None:
    class Hurried(MemoryLog):
        @override
        async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
            await super().seed(group, {Partition(EVENTS, 3): Commit(0)})
            await super().seed(group, commits)

    await fill(source)
    with pytest.raises(UsageError, match="expected only the commits"):
        await move(source, Hurried())


@pytest.mark.parametrize("topic", [TOPICS.parked, TOPICS.dead])
async def test_deliveries_that_ended_since_an_interruption_stay_ended(source: EmbeddedLog, topic: str) -> None:
    await fill(source)
    target = await interrupted(source)
    appends = target.appends
    reached = {f"{topic}/0": 4}
    if topic == TOPICS.parked:
        name = "pause/destination/ci"
        await give(
            source, ControlRecord(kind="checkpoint", name=name, state="done", at=source.now(), checkpoint=reached)
        )
        await give(source, ControlRecord(kind="pause", name="destination/ci", state="active", at=9.0))
    else:
        await give(source, ControlRecord(kind="dead", name="2", state="done", at=source.now(), checkpoint=reached))
    with pytest.raises(UsageError, match=rf"^{topic}@\d: expected .* still open, got one that has ended .* delete"):
        await move(source, target)
    assert target.appends == appends
    assert not await target.committed(ROUTER, EVENTS)


async def test_a_command_that_another_gave_there_is_refused(source: EmbeddedLog) -> None:
    await fill(source)
    target = Broken(never)
    await target.create(TOPICS.specs([EVENTS]))
    await give(target, ControlRecord(kind="pause", name="destination/erp", state="paused", at=1.0))
    with pytest.raises(UsageError, match="expected only records moved from this log"):
        await move(source, target)
    assert target.appends == 1


async def test_duplicates_of_a_retry_far_apart_are_reported(source: EmbeddedLog) -> None:
    """A commit can't call the second one done, and the router knows copies that are near each other only."""
    tier = TOPICS.retry("80s")
    delivery = a_delivery(due=time.time() + 250)
    await put(source, TOPICS.retry("5m"), delivery)
    target = MemoryLog()
    await move(source, target)
    (record,) = target.records(tier)
    number = partition_of(record.key, 4)
    target.skip_offsets(Partition(tier, number), 16_384)
    await target.append(tier, key=record.key, value=record.value, headers=record.headers)
    moved = await move(source, target)
    assert moved[tier].twice == 1
    assert await unfinished(target) == [("retry", delivery.id)] * 2


@pytest.mark.parametrize("topic", [TOPICS.parked, TOPICS.dead])
async def test_a_duplicate_of_an_uncommitted_record_is_reported(source: EmbeddedLog, topic: str) -> None:
    await fill(source)
    target = await interrupted(source)
    record = target.records(topic)[0]
    await target.append(topic, key=record.key, value=record.value, headers=record.headers)
    moved = await move(source, target)
    assert {name: each.twice for name, each in moved.items() if each.twice} == {topic: 1}


async def test_a_retry_that_ended_since_an_interruption_is_refused_without_a_commit(
    source: EmbeddedLog,
) -> None:
    class Sparse(Broken):
        @override
        async def append(
            self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
        ) -> Position:
            position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
            self.skip_offsets(Partition(topic, position.partition), 16_384)
            return position

    await give(source, ControlRecord(kind="pause", name="destination/ci", state="paused", at=1.0))
    await source.seed(ROUTER, {Partition(EVENTS, 0): Commit(0)})
    for number in range(2):
        await put(source, TOPICS.retry("5m"), a_delivery(id=f"dlv_{number}", due=time.time() + 250))
    target = Sparse(lambda number: number == 2)
    with pytest.raises(LogUnavailableError):
        await move(source, target)
    await source.seed(ROUTER, {Partition(TOPICS.retry("5m"), 0): Commit(0, b"\x02")})
    with pytest.raises(UsageError, match="expected completed records within 16384"):
        await move(source, target)
    assert not await target.groups(TOPICS.prefix)


async def test_records_too_far_apart_are_refused_before_a_commit(source: EmbeddedLog) -> None:
    """A commit can't tell that records are done so far behind one that isn't."""
    event = an_event(key="one")
    for _ in range(2):
        await source.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))
    await source.seed(ROUTER, {Partition(EVENTS, 0): Commit(0, b"\x02")})

    class Sparse(MemoryLog):
        @override
        async def append(
            self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
        ) -> Position:
            position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
            self.skip_offsets(Partition(topic, position.partition), 16_384)
            return position

    target = Sparse()
    with pytest.raises(UsageError, match="expected completed records within 16384"):
        await move(source, target)
    assert not await target.groups(TOPICS.prefix)
