"""Ordered routes where processes go by different rules, and routes that come, leave and come again; in virtual time."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
import structlog
from structlog.testing import CapturingLogger
from typing_extensions import override

from gateway.engine.group_member import REVOKE_GRACE
from gateway.engine.worker import LEFTOVER_INTERVAL, Worker
from gateway.log import records
from gateway.log.base import NewRecord, Partition, Position, RecordHeaders, TopicSpec
from gateway.log.records import encode_event, event_key
from gateway.log.topics import ROUTER_GROUP
from gateway.model import Event, LogUnavailableError, RecordTooLargeError, Result
from gateway.rules.rules import Route, Rules, Source
from gateway.verify.schemes import build_verifier
from tests.builders import a_destination, a_policy, a_route, an_event
from tests.engine.test_ordered import (
    GROUP,
    ORDERED,
    PATIENT,
    an_ordered_route,
    assert_in_order,
    by_key,
    keyed,
    unfinished,
)
from tests.engine.test_ordered_changes import kick_at_once
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    World,
    a_world,
    events,
    operated,
    reload,
    rules_of,
    running,
    virtual,
)
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

FOR_EVER = a_policy(schedule=(5.0,), max_attempts=10**6, max_age=1e9)
OTHER = a_route("audit", match={"type": "none"}, to=("audit",))
GITLAB = TOPICS.events("gitlab")


def with_gitlab(*routes: Route) -> Rules:
    rules = rules_of(*routes)
    gitlab = Source(name="gitlab", path="/in/gitlab", verifier=build_verifier({"scheme": "none"}))
    return replace(rules, sources={**rules.sources, "gitlab": gitlab})


def a_worker(world: World, rules: Callable[[], Rules]) -> Worker:
    """Make the worker of a process that goes by rules of its own."""
    return Worker(
        log=world.log.another(),
        topics=TOPICS,
        rules=rules,
        client=world.client,
        control=world.control,
        metrics=world.metrics,
        logger=world.logger,
        sleep=world.sleep,
    )


async def put_into(world: World, topic: str, *events: Event) -> None:
    for event in events:
        await world.log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))


@virtual
async def test_an_event_read_before_its_source_was_known_reaches_a_new_ordered_route() -> None:
    """The ingress reloads first, and a router of older rules reads what it has accepted."""
    world = await a_world(OTHER)
    newer = with_gitlab(OTHER, an_ordered_route(sources=("gitlab",)))
    await world.log.create(TOPICS.specs([GITLAB]))
    async with running(world) as worker:
        await asyncio.sleep(1)
        await put_into(world, GITLAB, *[an_event(id=f"k.{n}", source="gitlab", key="k") for n in range(5)])
        await asyncio.sleep(5)
        assert world.client.made == []
        await reload(world, worker, newer)
        await asyncio.sleep(120)
    assert sorted(by_key(world)["k"]) == [0, 1, 2, 3, 4]


@virtual
async def test_an_unknown_sources_event_behind_later_ones_is_no_duplicate() -> None:
    """Its tier doesn't take it yet, its source is known meanwhile, and the router is killed: it is read once more."""
    world = await a_world(OTHER)
    world.log = TierIsAway(world.log)
    newer = with_gitlab(OTHER, an_ordered_route(sources=("gitlab",)))
    await world.log.create(TOPICS.specs([GITLAB]))
    task = asyncio.create_task((worker := world.worker()).run())
    await asyncio.sleep(1)
    await put_into(world, GITLAB, an_event(id="k.0", source="gitlab", key="k"))
    await asyncio.sleep(1)
    await reload(world, worker, newer)
    await put_into(world, GITLAB, *[an_event(id=f"k.{n}", source="gitlab", key="k") for n in range(1, 5)])
    await asyncio.sleep(3)
    await killed(world, task)
    world.log.is_away = False
    async with running(world):
        await asyncio.sleep(120)
    assert by_key(world) == {"k": [0, 1, 2, 3, 4]}


@virtual
async def test_a_plain_delivery_behind_later_ones_is_no_duplicate() -> None:
    """Its route gets an order while it is under way, and the router is killed: then it is read once more."""
    patient = a_destination("ci", url="http://127.0.0.1:1/ci", timeout=300.0)
    world = await a_world(a_route(retry=PATIENT), destinations=[patient], ci=[200.0, 200])
    task = asyncio.create_task((worker := world.worker()).run())
    await world.put(an_event(id="k.0", key="k", received_at=now()))
    await asyncio.sleep(1)
    await reload(world, worker, rules_of(an_ordered_route(), destinations=[patient]))
    await world.put(*[an_event(id=f"k.{n}", key="k", received_at=now()) for n in range(1, 5)])
    await asyncio.sleep(3)
    await killed(world, task)
    async with running(world):
        await asyncio.sleep(20)
    assert by_key(world) == {"k": [0, 0, 1, 2, 3, 4]}


@virtual
async def test_a_newer_versions_event_is_not_overtaken_in_its_key() -> None:
    """It is left where it is; read by that version, it would be taken for a copy behind what came after it."""
    world = await a_world(an_ordered_route(), a_route("audit", to=("audit",)))
    first = an_event(id="k.0", key="k", received_at=now())
    headers = [(name, b"2" if name == "gw_v" else value) for name, value in encode_event(first)]
    await world.log.append(EVENTS, key=event_key(first), value=first.body, headers=headers)
    await world.put(*[an_event(id=f"k.{n}", key="k", received_at=now()) for n in range(1, 5)])
    async with running(world):
        await asyncio.sleep(10)
        stopped_at = now()
    assert now() < stopped_at + 5.0, "nothing that has to wait for that version holds a stop up"
    assert by_key(world, "audit") == {"k": [1, 2, 3, 4]}
    assert by_key(world) == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "FORMAT", 2)
        async with running(world):
            await asyncio.sleep(10)
    assert by_key(world) == {"k": [0, 1, 2, 3, 4]}
    assert await unfinished(world) == 0


class TierIsAway(MemoryLog):
    """A log that stores nothing in the tiers for a while."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(now=now)
        self._state = log._state
        self.is_away = True

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if self.is_away and topic.startswith(TOPICS.retry("")):
            raise LogUnavailableError("no leader")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


async def killed(world: World, task: asyncio.Task[None]) -> None:
    """Cancel a worker that commits nothing more, as one that is killed."""
    world.log.fail_commits()
    world.log.fail_appends()
    task.cancel()
    await asyncio.wait([task])
    world.log._state.members.clear()  # its session is over
    world.log.fail_commits(0)
    world.log.fail_appends(0)


@virtual
async def test_a_routers_repeated_append_after_a_crash_is_not_delivered() -> None:
    """A plain route's destination hangs, so the router is to read the events once more; the ordered one is through."""
    world = await a_world(an_ordered_route(), a_route("audit", to=("audit",)), audit=[9.0])
    await world.put(*keyed(3, 4))
    task = asyncio.create_task(world.worker().run())
    await asyncio.sleep(5)
    assert by_key(world) == {f"k{key}": [0, 1, 2, 3] for key in range(3)}
    await killed(world, task)
    world.client.scripts["audit"] = [200]
    async with running(world):
        await asyncio.sleep(20)
    assert by_key(world) == {f"k{key}": [0, 1, 2, 3] for key in range(3)}
    assert len(world.log.records(ORDERED)) == 24, "appended twice, each of them"
    assert await unfinished(world) == 0


@virtual
async def test_the_order_holds_though_appends_fail() -> None:
    world = await a_world(an_ordered_route())
    world.log = Unsteady(world.log)
    async with running(world):
        for number in range(200):
            await world.put(*[an_event(id=f"k{key}.{number}", key=f"k{key}", received_at=now()) for key in range(3)])
            await asyncio.sleep(0.01)
        await asyncio.sleep(60)
    assert by_key(world) == {f"k{key}": list(range(200)) for key in range(3)}
    assert len(world.log.records(ORDERED)) > 600


class Unsteady(MemoryLog):
    """A log that stores some of what is to be appended in order, or all, and says that it didn't; every other time."""

    def __init__(self, log: MemoryLog, largest: int = 1 << 20) -> None:
        super().__init__(now=now)
        self._state = log._state
        self._largest = largest
        self._random = Random(5)

    @override
    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        if any(len(record.value) > self._largest for record in records):
            raise RecordTooLargeError(f"{partition.topic}: expected less")
        if self._largest == 1 << 20 and self._random.random() < 0.5:
            await super().append_in_order(partition, records[: self._random.randint(0, len(records))])
            raise LogUnavailableError("no answer")
        return await super().append_in_order(partition, records)


class NothingIsStored(TierIsAway):
    """Nor in the topics of ordered routes."""

    @override
    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        raise LogUnavailableError("no leader")


@virtual
async def test_repeated_appends_are_one_line_a_second_for_each_topic() -> None:
    """Each delivery tries again every few seconds, and there may be thousands."""
    world = await a_world(an_ordered_route(), a_route("audit", to=("audit",)), audit=[503])
    world.log = NothingIsStored(world.log)
    told = CapturingLogger()
    world.logger = structlog.wrap_logger(
        told, processors=[], wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING)
    )
    await world.put(*keyed(40, 5))
    async with running(world):
        await asyncio.sleep(20)
        lines = [call.kwargs for call in told.calls if call.kwargs["event"] == "append_retried"]
    of_topic = Counter(line["topic"] for line in lines)
    assert of_topic.keys() == {TOPICS.retry("5s"), ORDERED}
    assert max(of_topic.values()) <= 21
    assert sum(line["count"] for line in lines) > 4 * len(lines), "the others are counted in them"


@virtual
async def test_a_new_ordered_route_begins_with_the_first_event_that_the_router_matches_by_it() -> None:
    world = await a_world(OTHER)
    await world.put(*keyed(4, 10))
    async with running(world) as worker:
        await asyncio.sleep(5)
        await reload(world, worker, rules_of(OTHER, an_ordered_route()))
        await world.put(*[an_event(id=f"new.{n}", key="new", received_at=now()) for n in range(3)])
        await asyncio.sleep(5)
    assert by_key(world) == {"new": [0, 1, 2]}


@virtual
async def test_a_restored_route_delivers_no_missed_events() -> None:
    """As a plain route doesn't: what comes meanwhile is counted as unrouted."""
    world = await a_world(OTHER, an_ordered_route())
    rules = world.rules
    async with running(world) as worker:
        await world.put(an_event(id="k.0", key="k", received_at=now()))
        await asyncio.sleep(5)
        await reload(world, worker, rules_of(OTHER))
        await world.put(*[an_event(id=f"missed.{n}", key="k", received_at=now()) for n in range(400)])
        await asyncio.sleep(60)
        await reload(world, worker, rules)
        await world.put(an_event(id="k.1", key="k", received_at=now()))
        await asyncio.sleep(60)
    assert by_key(world) == {"k": [0, 1]}
    assert world.metrics.unrouted.labels("github").value == 400


@virtual
async def test_renamed_there_and_back_each_event_goes_out_once_under_the_name_that_matched_it() -> None:
    world = await a_world(OTHER, an_ordered_route("one"))
    names = ["one", "other", "one"]
    async with running(world) as worker:
        for turn, name in enumerate(names):
            await reload(world, worker, rules_of(OTHER, an_ordered_route(name)))
            await world.put(*[an_event(id=f"k.{4 * turn + n}", key="k", received_at=now()) for n in range(4)])
            await asyncio.sleep(40)
    assert by_key(world) == {"k": list(range(12))}


@virtual
async def test_taking_the_order_away_and_giving_it_again_repeats_nothing() -> None:
    world = await a_world(an_ordered_route(), ci=[0.02])
    async with running(world), running(world) as worker:
        for turn in range(7):
            await world.put(*[an_event(id=f"k{n % 9}.{turn}", key=f"k{n % 9}", received_at=now()) for n in range(9)])
            await asyncio.sleep(0.3)
            await reload(world, worker, rules_of(an_ordered_route() if turn % 2 else a_route(retry=PATIENT)))
        await asyncio.sleep(60)
    assert by_key(world) == {f"k{key}": list(range(7)) for key in range(9)}
    assert await unfinished(world) == 0


@virtual
async def test_events_matched_in_order_are_delivered_in_order_after_their_route_lost_it() -> None:
    world = await a_world(an_ordered_route(), ci=[503])
    async with running(world) as worker:
        await world.put(*keyed(3, 5))
        await asyncio.sleep(5)
        await reload(world, worker, rules_of(a_route(retry=PATIENT)))
        await world.put(an_event(id="plain.0", key="k0", received_at=now()))
        await asyncio.sleep(30)
        world.client.scripts["ci"] = [200]
        await asyncio.sleep(60)
        assert (await world.log.groups(GROUP))[GROUP] == 0, "nobody reads what is through"
    async with running(world):
        await asyncio.sleep(5)
    tried = by_key(world)
    assert tried.pop("plain")
    for numbers in tried.values():
        assert_in_order(numbers, 5)
    assert await unfinished(world) == 0


def test_finished_records_are_not_repeated_by_a_broker_that_forgets_groups_without_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The records of a route that has lost its order stay, and processes come and go."""
    every, patience = 600.0, 600.0 + 2 * LEFTOVER_INTERVAL
    monkeypatch.setattr("gateway.engine.worker.JOIN_EVERY", every)
    forgotten: list[float] = []

    async def forget(world: World) -> None:
        alone_since = now()
        while True:
            await asyncio.sleep(5)
            alone_since = now() if await world.log.members(GROUP) else alone_since
            if now() - alone_since > patience:
                world.log.forget(GROUP)
                forgotten.append(now())

    async def scenario() -> None:
        world = await a_world(an_ordered_route())
        async with running(world) as worker:
            await world.put(*keyed(3, 5))
            await asyncio.sleep(5)
            forgetting = asyncio.create_task(forget(world))
            await reload(world, worker, rules_of(a_route(retry=PATIENT)))
            await asyncio.sleep(60)
            assert await world.log.members(GROUP) == 0
            await world.doze(2.5 * every)
        async with running(world):
            await world.doze(1.5 * every)
        assert await world.log.members(GROUP) == 0
        assert forgotten == []
        for number, (_, end) in (await world.log.bounds(ORDERED)).items():
            world.log.delete_below(Partition(ORDERED, number), end)
        async with running(world):
            await world.doze(2 * every)
        assert forgotten, "without records nobody minds"
        forgetting.cancel()
        assert {len(numbers) for numbers in by_key(world).values()} == {5}

    run(scenario())


@virtual
async def test_the_backlog_of_a_removed_ordered_route_is_dead_lettered_after_an_hour() -> None:
    world = await a_world(OTHER, an_ordered_route(match={"body.wanted": True}, retry=FOR_EVER), ci=[Result.CONNECT])
    async with running(world) as worker:
        for number in range(10):
            await world.put(an_event(id=f"k.{number}", key="k", body={"wanted": number < 7}, received_at=now()))
        await asyncio.sleep(20)
        await reload(world, worker, rules_of(OTHER))
        await world.doze(3500)
        assert world.dead() == []
        await world.doze(300)
        assert [stored.delivery.event.id for stored in world.dead()] == [f"k.{number}" for number in range(7)]
        assert {(stored.delivery.route, stored.metadata.dead_reason) for stored in world.dead()} == {
            ("build", "route_removed")
        }
    assert await unfinished(world) == 0


@virtual
async def test_a_removed_routes_halted_keys_are_dead_lettered() -> None:
    once = a_policy(schedule=(1.0,), max_attempts=1)
    world = await a_world(OTHER, an_ordered_route(halts=True, retry=once), ci=[503])
    async with running(world) as worker:
        await world.put(*keyed(2, 3))
        await asyncio.sleep(20)
        await reload(world, worker, rules_of(OTHER))
        await world.doze(4000)
    assert sorted(stored.delivery.event.id for stored in world.dead()) == sorted(event.id for event in keyed(2, 3))
    assert {stored.metadata.dead_reason for stored in world.dead()} == {"route_removed"}
    assert await unfinished(world) == 0


HALTING = an_ordered_route(when="body.n + 1 > 0", halts=True)


async def halted_without_a_source(world: World, worker: Worker) -> None:
    """Halt a key by its condition, and let the rules be without its source for nearly an hour."""
    await world.put(an_event(id="k.0", key="k", body={"n": "x"}, received_at=now()))
    await asyncio.sleep(5)
    await reload(world, worker, replace(rules_of(HALTING), sources={}))
    await world.doze(3500)
    assert world.dead() == []


@virtual
async def test_what_a_condition_halted_ends_once_its_source_is_gone_for_an_hour() -> None:
    """Nothing can match it again without the source, not even a kick, and others would wait behind it for ever."""
    world = await a_world(HALTING)
    async with running(world) as worker:
        await halted_without_a_source(world, worker)
        await world.doze(300)
    assert [(each.delivery.event.id, each.metadata.dead_reason) for each in world.dead()] == [("k.0", "route_removed")]
    assert await unfinished(world) == 0


@virtual
async def test_what_a_condition_halted_continues_once_its_source_is_back_within_the_hour() -> None:
    world = await a_world(HALTING)
    async with running(world) as worker:
        await halted_without_a_source(world, worker)
        await reload(world, worker, rules_of(an_ordered_route(when="body.n == 'x'", halts=True)))
        await world.doze(300)
    assert world.dead() == []
    assert await unfinished(world) == 0


@virtual
async def test_reloads_do_not_begin_the_hour_of_an_absent_source_anew() -> None:
    world = await a_world(HALTING)
    async with running(world) as worker:
        await halted_without_a_source(world, worker)
        for _ in range(10):
            await reload(world, worker, replace(rules_of(HALTING), sources={}))
            await world.doze(30)
    assert [each.delivery.event.id for each in world.dead()] == ["k.0"]


@asynccontextmanager
async def failed_without_a_destination(*, halts: bool) -> AsyncIterator[tuple[World, Worker]]:
    """Let a delivery whose condition has failed have its turn by rules without its destination, for nearly an hour."""
    world = await a_world(an_ordered_route(when="body.n + 1 > 0", halts=halts))
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await asyncio.sleep(1)
        world.log.stall(GROUP)
        await world.put(an_event(id="k.0", key="k", body={"n": "x"}, received_at=now()))
        await asyncio.sleep(5)
        narrowed = an_ordered_route(when="body.n == 'y'", to=("elsewhere",), halts=halts)
        await reload(world, worker, rules_of(narrowed))
        world.log.go_on(GROUP)
        await world.doze(1750)
        await kick_at_once(world)
        await world.doze(1750)
        assert (world.client.made, world.dead(), await unfinished(world)) == ([], [], 1)
        yield world, worker


@pytest.mark.parametrize("halts", [False, True], ids=["", "halts"])
def test_what_a_condition_failed_for_ends_once_its_destination_is_gone_for_an_hour(*, halts: bool) -> None:
    """Until then, it isn't matched by rules that may be others' former ones, not even by a kick."""

    async def scenario() -> None:
        async with failed_without_a_destination(halts=halts) as (world, _):
            await world.doze(300)
            ends = [(each.delivery.event.id, each.metadata.dead_reason) for each in world.dead()]
            assert ends == [("k.0", "route_removed")]
        assert await unfinished(world) == 0

    run(scenario())


@pytest.mark.parametrize("halts", [False, True], ids=["", "halts"])
@pytest.mark.parametrize(
    ("condition", "end"),
    [("body.n == 'x'", "delivered"), ("body.n == 'y'", "dropped"), ("body.n + 2 > 0", "expression_error")],
)
def test_what_a_condition_failed_for_is_matched_once_its_destination_is_back_within_the_hour(
    condition: str, end: str, *, halts: bool
) -> None:
    async def scenario() -> None:
        async with failed_without_a_destination(halts=halts) as (world, worker):
            await reload(world, worker, rules_of(an_ordered_route(when=condition, halts=halts)))
            await world.doze(300)
            waits = halts and end == "expression_error"
            assert await unfinished(world) == waits
            assert by_key(world) == ({"k": [0]} if end == "delivered" else {})
            assert world.metrics.deliveries.labels("build", "ci", "dropped").value == (end == "dropped")
            reasons = [each.metadata.dead_reason for each in world.dead()]
            assert reasons == ([end] if end == "expression_error" and not halts else [])

    run(scenario())


@virtual
async def test_a_route_restored_within_the_hour_continues_in_order() -> None:
    world = await a_world(OTHER, an_ordered_route(retry=FOR_EVER), ci=[Result.CONNECT])
    rules = world.rules
    async with running(world) as worker:
        await world.put(*keyed(2, 5))
        await asyncio.sleep(20)
        await reload(world, worker, rules_of(OTHER))
        await asyncio.sleep(600)
        world.client.scripts["ci"] = [200]
        await reload(world, worker, rules)
        await asyncio.sleep(120)
    assert world.dead() == []
    for numbers in by_key(world).values():
        assert_in_order(numbers, 5)


@virtual
async def test_appends_by_processes_of_older_rules_are_read_by_newer_ones() -> None:
    """A rolling deployment takes `order: key` away, and a process of the old rules goes on for longer than a look."""
    old = await a_world(an_ordered_route(retry=FOR_EVER), ci=[Result.CONNECT])
    new = replace(old, rules=rules_of(a_route(retry=FOR_EVER)))
    async with running(new):
        async with running(old):
            await old.put(*keyed(6, 2))
            await asyncio.sleep(60)
            await old.put(*[an_event(id=f"late.{number}", key="late", received_at=now()) for number in range(3)])
            await asyncio.sleep(10)
        new.client.scripts["ci"] = [200]
        new.client.made.clear()
        await asyncio.sleep(300)
    assert {event for _, event, _ in new.client.made} == {event.id for event in keyed(6, 2)} | {
        f"late.{number}" for number in range(3)
    }
    assert await unfinished(new) == 0


@virtual
async def test_the_topic_of_one_ordered_route_that_is_away_stops_no_other() -> None:
    world = await a_world(an_ordered_route("one", to=("one",)), an_ordered_route("two", to=("two",)))
    world.log.delete(TOPICS.ordered("one", "one"))
    async with running(world):
        await world.put(*keyed(3, 20))
        await asyncio.sleep(30)
        assert by_key(world, "two") == {f"k{key}": list(range(20)) for key in range(3)}
        assert await unfinished(world, ("two", "two")) == 60, "the router waits for the other"
        await world.log.create(TOPICS.specs([], [("one", "one")]))
        await world.log.rebalance(TOPICS.ordered_group("one", "one"))
        await asyncio.sleep(30)
    assert by_key(world, "one") == {f"k{key}": list(range(20)) for key in range(3)}
    assert await unfinished(world, ("one", "one")) == 0


@virtual
async def test_a_recreated_topic_of_events_is_not_taken_for_the_former() -> None:
    world = await a_world(an_ordered_route())
    async with running(world):
        await world.put(*keyed(2, 10))
        await asyncio.sleep(5)
    world.log.delete(EVENTS)
    await world.log.create(TOPICS.specs([EVENTS]))
    async with running(world):
        await world.put(
            *[an_event(id=f"new{key}.{n}", key=f"k{key}", received_at=now()) for n in range(5) for key in range(2)]
        )
        await asyncio.sleep(5)
    tried = by_key(world)
    assert [tried["new0"], tried["new1"]] == [[0, 1, 2, 3, 4]] * 2


@virtual
async def test_an_event_too_large_for_its_ordered_topic_is_dead_lettered_and_skipped() -> None:
    world = await a_world(an_ordered_route())
    sizes = [10, 900_000, 20]
    made = [an_event(id=f"k.{n}", key="k", body=b"x" * size, received_at=now()) for n, size in enumerate(sizes)]
    await world.put(*made)
    world.log = Unsteady(world.log, largest=500_000)
    async with running(world):
        await asyncio.sleep(5)
    assert by_key(world) == {"k": [0, 2]}
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["too_large"]
    assert await unfinished(world) == 0


# Topics that grow


@virtual
async def test_a_topic_of_events_that_grows_under_an_ordered_route_loses_and_repeats_nothing() -> None:
    world = await a_world(an_ordered_route(), ci=[0.01])
    async with running(world), running(world) as worker:
        for number in range(60):
            await world.put(*[an_event(id=f"k{key}.{number}", key=f"k{key}", received_at=now()) for key in range(20)])
            await asyncio.sleep(0.05)
            if number == 20:
                world.log.grow(TopicSpec(name=EVENTS, partitions=12, retention=None))
                await world.log.rebalance(TOPICS.group("router"))
            if number == 25:  # a reload needs no group without members
                await reload(world, worker, rules_of(an_ordered_route(), an_ordered_route("late", to=("late",))))
        await asyncio.sleep(60)
    tried = by_key(world)
    assert {key: sorted(numbers) for key, numbers in tried.items()} == {f"k{k}": list(range(60)) for k in range(20)}
    settled = {key: [number for number in numbers if number > 30] for key, numbers in tried.items()}
    assert settled == {f"k{key}": list(range(31, 60)) for key in range(20)}, "what came before the growth is through"
    assert await unfinished(world) == 0


@virtual
async def test_keys_stay_where_they_are_in_an_ordered_topic_that_grows() -> None:
    world = await a_world(an_ordered_route(), ci=[0.01])
    async with running(world):
        for number in range(40):
            await world.put(*[an_event(id=f"k{key}.{number}", key=f"k{key}", received_at=now()) for key in range(20)])
            await asyncio.sleep(0.05)
            if number == 20:
                world.log.grow(TopicSpec(name=ORDERED, partitions=12, retention=None))
                await world.log.rebalance(GROUP)
        async with running(world):  # which has never seen it smaller
            await asyncio.sleep(2)
            await world.put(*[an_event(id=f"k{key}.40", key=f"k{key}", received_at=now()) for key in range(20)])
            await asyncio.sleep(60)
    assert by_key(world) == {f"k{key}": list(range(41)) for key in range(20)}
    assert {number for number, (_, end) in (await world.log.bounds(ORDERED)).items() if end} <= set(range(6))


@virtual
async def test_nothing_is_appended_in_order_while_the_owner_of_its_partition_is_unknown() -> None:
    world, group = await a_world(a_route(is_ordered=True)), TOPICS.group(ROUTER_GROUP)
    async with running(world):
        await asyncio.sleep(1)
        world.log.stall(group)
        await world.put(*events(8))
        world.log.fail_appends()
        world.log.go_on(group)
        await asyncio.sleep(1)
        rebalancing = asyncio.create_task(world.log.rebalance(group, takes=10.0))
        await asyncio.sleep(2 * REVOKE_GRACE)
        world.log.fail_appends(0)
        await asyncio.sleep(5)
        assert not world.log.records(TOPICS.ordered("build", "ci")), "another may have delivered them by other rules"
        await rebalancing
        await asyncio.sleep(10)
    assert len(world.client.made) == 8
