"""The worker on the log in memory, in virtual time: what is committed, and what becomes of each delivery."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import orjson
import pytest
import structlog
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger
from typing_extensions import override

from gateway.client.request import Outbound
from gateway.engine.control.follower import Follower
from gateway.engine.control.records import ControlRecord, DeadFilter, decode
from gateway.engine.control.state import Control
from gateway.engine.delivery.queues import IDLE_TICK
from gateway.engine.jobs.runner import Jobs
from gateway.engine.worker import Worker
from gateway.log.base import Commit, Partition
from gateway.log.records import StoredDelivery, decode_delivery, encode_delivery, encode_event, event_key
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import (
    NO_METADATA,
    Attempt,
    Disposition,
    Event,
    RecordMetadata,
    Result,
    UndecodableRecordError,
)
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Contact, Destination, Egress, OnGone, Route, Rules, Source
from gateway.rules.templates import Template
from gateway.settings import RecordedAttempts
from gateway.telemetry.metrics import Metrics
from gateway.verify.schemes import build_verifier
from tests.builders import a_delivery, a_destination, a_policy, a_route, an_event
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

DROWSY = 5.0
"""Seconds; less than any tier delays, so that a fetch that finds nothing is late for none by much."""
QUIET: FilteringBoundLogger = structlog.wrap_logger(
    structlog.ReturnLogger(), processors=[], wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
)
TOPICS = Topics()
EVENTS = TOPICS.events("github")


@dataclass(frozen=True)
class Busy:
    """A 429 that asks for so many seconds of silence."""

    seconds: float


Answer = int | Result | float | Busy
"""A status, a failure, or seconds of silence before a 200."""


class ScriptedClient:
    """Answers attempts by destination: the next item of its script, and the last one for ever."""

    def __init__(self, scripts: Mapping[str, Sequence[Answer]]) -> None:
        self.scripts = {name: list(script) for name, script in scripts.items()}
        self.made: list[tuple[str, str, int]] = []
        self.at: list[float] = []
        self.under_way = 0

    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        name = outbound.url.rpartition("/")[2]
        headers = dict(outbound.headers)
        self.made.append((name, headers[b"gateway-event-id"].decode(), number))
        self.at.append(now())
        script = self.scripts.get(name, [200])
        answer = script.pop(0) if len(script) > 1 else script[0]
        began = now()
        if isinstance(answer, float):
            self.under_way += 1
            try:
                await asyncio.sleep(min(answer, timeout))
            finally:
                self.under_way -= 1
            answer = Result.TIMEOUT if answer >= timeout else 200
        if isinstance(answer, Busy):
            return Attempt(
                number=number, at=began, seconds=0.0, result=Result.THROTTLED, status=429, retry_after=answer.seconds
            )
        if isinstance(answer, Result):
            return Attempt(number=number, at=began, seconds=now() - began, result=answer, detail="scripted")
        kind = {2: Result.SUCCESS, 4: Result.CLIENT_ERROR, 5: Result.SERVER_ERROR}[answer // 100]
        return Attempt(number=number, at=began, seconds=now() - began, result=kind, status=answer)


def rules_of(*routes: Route, destinations: Sequence[Destination] = ()) -> Rules:
    named = {destination.name: destination for destination in destinations}
    for route in routes:
        for name in route.destinations:
            named.setdefault(name, a_destination(name, url=f"http://127.0.0.1:1/{name}"))
    return Rules(
        sources={"github": Source(name="github", path="/in/github", verifier=build_verifier({"scheme": "none"}))},
        destinations=named,
        routes={route.name: route for route in routes},
        egress=Egress(),
        table=RouteTable(routes),
        files=(),
    )


@dataclass
class World:
    """A log, its topics, and workers on it."""

    log: MemoryLog
    rules: Rules
    client: ScriptedClient
    control: Control = field(default_factory=Control)
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))
    logger: FilteringBoundLogger = QUIET
    attempts: RecordedAttempts = RecordedAttempts.OFF
    drowsy: float = 0.0

    async def doze(self, seconds: float) -> None:
        """Let hours pass, in which whoever only looks around does so every few seconds."""
        self.drowsy = DROWSY
        self.log.be_patient(DROWSY)
        await asyncio.sleep(seconds)
        self.drowsy = 0.0
        self.log.be_patient(0.0)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, self.drowsy) if seconds >= IDLE_TICK else seconds)

    def worker(self, control: Control | None = None) -> Worker:
        return Worker(
            log=self.log.another(),
            topics=TOPICS,
            rules=lambda: self.rules,
            client=self.client,
            control=control or self.control,
            metrics=self.metrics,
            logger=self.logger,
            sleep=self.sleep,
            attempts=self.attempts,
        )

    async def put(self, *events: Event) -> None:
        for event in events:
            await self.log.append(EVENTS, key=event_key(event), value=event.body, headers=encode_event(event))

    def stored(self, topic: str) -> list[StoredDelivery]:
        return [decode_delivery(record) for record in self.log.records(topic)]

    def dead(self) -> list[StoredDelivery]:
        return self.stored(TOPICS.dead)

    async def unfinished(self, topic: str = EVENTS) -> int:
        """Count the records that no commit calls done."""
        commits = await self.log.committed(TOPICS.group(ROUTER_GROUP), topic)
        count = 0
        for number, (start, end) in (await self.log.bounds(topic)).items():
            commit = commits.get(number, Commit(start))
            bits = int.from_bytes(commit.done, "little")
            count += sum(not bits >> (offset - commit.base) & 1 for offset in range(max(start, commit.base), end))
        return count


async def reload(world: World, worker: Worker, rules: Rules) -> None:
    """Put rules in force, as a process does once the topics are there."""
    await world.log.create(TOPICS.specs([], rules.ordered))
    world.rules = rules
    worker.reload()


@asynccontextmanager
async def running(world: World, worker: Worker | None = None) -> AsyncIterator[Worker]:
    """Run a worker, and end it gracefully."""
    worker = worker or world.worker()
    task = asyncio.create_task(worker.run())
    yield worker
    worker.stop()
    await task


async def a_world(*routes: Route, destinations: Sequence[Destination] = (), **scripts: Sequence[Answer]) -> World:
    log = MemoryLog(now=now)
    rules = rules_of(*routes, destinations=destinations)
    await log.create(TOPICS.specs([EVENTS], rules.ordered))
    return World(log=log, rules=rules, client=ScriptedClient(scripts))


def events(count: int) -> list[Event]:
    return [an_event(id=f"evt_{index}", received_at=now()) for index in range(count)]


@asynccontextmanager
async def operated(world: World) -> AsyncIterator[Control]:
    """Let commands be followed and carried out, as a process of the gateway does."""
    follower = Follower(world.log.another(), TOPICS, world.metrics, world.logger)
    jobs = Jobs(
        log=world.log.another(),
        topics=TOPICS,
        rules=lambda: world.rules,
        follower=follower,
        metrics=world.metrics,
        logger=world.logger,
        sleep=world.sleep,
    )
    caught_up = asyncio.Event()
    tasks = [asyncio.create_task(follower.follow(caught_up)), asyncio.create_task(jobs.run())]
    await caught_up.wait()
    yield follower.control
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def publish(world: World, command: ControlRecord) -> None:
    key, value = command.encode()
    await world.log.append(TOPICS.control, key=key, value=value, headers=[])


Scenario = Callable[[], Coroutine[None, None, None]]


def virtual(scenario: Scenario) -> Callable[[], None]:
    """Run a test on virtual time."""

    def test() -> None:
        run(scenario())

    test.__name__ = scenario.__name__
    test.__doc__ = scenario.__doc__
    return test


@virtual
async def test_every_event_reaches_every_destination_once_and_is_committed() -> None:
    world = await a_world(a_route(to=("ci", "audit")))
    await world.put(*events(200))
    async with running(world):
        await asyncio.sleep(3)
    assert sorted(world.client.made) == sorted(
        (name, f"evt_{index}", 1) for index in range(200) for name in ("ci", "audit")
    )
    assert await world.unfinished() == 0


class Turns(World):
    """Counts how often something gives way to other tasks."""

    turns = 0

    @override
    async def sleep(self, seconds: float) -> None:
        self.turns += seconds == 0
        await super().sleep(seconds)


def test_records_that_take_long_to_match_are_routed_one_at_a_time() -> None:
    async def turns(cost: float) -> int:
        """Route 30 events of one partition, while each look at the clock costs so many seconds."""
        spent = 0.0

        def clock() -> float:
            nonlocal spent
            spent += cost
            return now() + spent

        log = MemoryLog(now=clock)
        await log.create(TOPICS.specs([EVENTS]))
        world = Turns(log=log, rules=rules_of(a_route()), client=ScriptedClient({}))
        await world.put(*[an_event(id=f"evt_{number}", key="same", received_at=now()) for number in range(30)])
        async with running(world):
            await asyncio.sleep(3)
        assert len(world.client.made) == 30
        return world.turns

    assert run(turns(0.004)) >= run(turns(0.0)) + 30


@virtual
async def test_an_unfinished_record_holds_the_commit_back_and_the_rest_is_done() -> None:
    world = await a_world(
        a_route(match={"body.slow": True}, to=("slow",)),
        a_route("other", match={"body.slow": False}),
        destinations=[a_destination("slow", url="http://127.0.0.1:1/slow", timeout=100.0)],
        slow=[50.0],
    )
    made = [an_event(id=f"evt_{n}", key="same", body={"slow": n == 0}, received_at=now()) for n in range(10)]
    await world.put(*made)
    async with running(world):
        await asyncio.sleep(5)
        commits = await world.log.committed(TOPICS.group(ROUTER_GROUP), EVENTS)
        (commit,) = [commit for commit in commits.values() if commit.done]
        assert commit == Commit(0, b"\xfe\x03")
        assert await world.unfinished() == 1
        await asyncio.sleep(60)
        assert await world.unfinished() == 0


@virtual
async def test_a_failed_attempt_is_retried_when_it_is_due_and_not_before() -> None:
    world = await a_world(
        a_route(retry=a_policy(schedule=(30.0, 120.0), max_attempts=5, max_age=3600.0)), ci=[503, 503, 200]
    )
    began = now()
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(200)
    first, second, third = world.client.at
    assert first - began < 0.5
    assert 30 <= second - first < 32
    assert 120 <= third - second < 122
    assert [number for _, _, number in world.client.made] == [1, 2, 3]
    assert world.dead() == []
    assert await world.unfinished() == 0
    assert sum([await world.unfinished(TOPICS.retry(tier)) for tier in ("5s", "20s", "80s")]) == 0


@virtual
async def test_a_dead_letter_says_who_answers_for_its_route_or_else_for_its_destination() -> None:
    policy = a_policy(max_attempts=1)
    world = await a_world(
        a_route(retry=policy), a_route("other", to=("ci", "audit"), retry=policy), ci=[503], audit=[503]
    )
    contacts = {
        ("route", "build"): Contact("team-build", "https://wiki.example/build"),
        ("destination", "ci"): Contact("team-ci"),
        ("source", "github"): Contact("team-hub"),
    }
    world.rules = replace(world.rules, contacts=contacts)
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(3)
    told = {
        (each.delivery.route, each.delivery.destination): (each.metadata.owner, each.metadata.runbook)
        for each in world.dead()
    }
    assert told == {
        ("build", "ci"): ("team-build", "https://wiki.example/build"),
        ("other", "ci"): ("team-ci", ""),
        ("other", "audit"): ("", ""),
    }


@virtual
async def test_the_successor_is_acknowledged_before_the_predecessor_is_done() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(30.0,), max_age=3600.0)), ci=[503, 200])
    await world.put(*events(1))
    world.log.fail_appends()
    async with running(world):
        await asyncio.sleep(10)
        assert await world.unfinished() == 1, "no commit while the retry record isn't stored"
        world.log.fail_appends(0)
        await asyncio.sleep(60)
    assert world.client.made == [("ci", "evt_0", 1), ("ci", "evt_0", 2)]
    assert await world.unfinished() == 0


@virtual
async def test_a_dead_letter_that_cannot_be_written_keeps_its_record_unfinished() -> None:
    world = await a_world(a_route(retry=a_policy(max_attempts=1)), ci=[503])
    await world.put(*events(1))
    world.log.fail_appends()
    async with running(world):
        await asyncio.sleep(30)
        assert world.dead() == []
        assert await world.unfinished() == 1
        world.log.fail_appends(0)
        await asyncio.sleep(10)
        assert len(world.dead()) == 1
        await asyncio.sleep(2)
    assert await world.unfinished() == 0


@virtual
async def test_a_dead_letter_has_its_reason_and_every_attempt() -> None:
    world = await a_world(
        a_route(retry=a_policy(schedule=(10.0,), max_attempts=3, max_age=3600.0)), ci=[503, Result.TIMEOUT, 500]
    )
    world.rules = replace(world.rules, version="8f31c0de")
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(60)
    (stored,) = world.dead()
    assert stored.metadata == RecordMetadata(dead_reason="exhausted", detail="500 after 3 attempts", rules="8f31c0de")
    assert [(attempt.number, attempt.result) for attempt in stored.delivery.attempts] == [
        (1, "5xx"),
        (2, "timeout"),
        (3, "5xx"),
    ]
    assert stored.delivery.event == replace(events(1)[0], received_at=stored.delivery.event.received_at)


@virtual
async def test_an_event_that_no_route_matches_is_done_and_counted() -> None:
    world = await a_world(a_route(match={"type": "issues"}))
    await world.put(*events(3))
    async with running(world):
        await asyncio.sleep(2)
    assert world.client.made == []
    assert await world.unfinished() == 0
    assert world.metrics.unrouted.labels("github").value == 3
    assert world.metrics.route_matches.events == {"github": 3}
    assert world.metrics.route_matches.matched == {}


@virtual
async def test_a_failing_expression_dead_letters_its_route_and_no_other() -> None:
    world = await a_world(a_route("bad", when="body.ref + 1 > 2", to=("audit",)), a_route())
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(2)
    assert world.client.made == [("ci", "evt_0", 1)]
    (stored,) = world.dead()
    assert (stored.delivery.route, stored.metadata.dead_reason) == ("bad", "expression_error")


@virtual
async def test_a_template_that_cannot_be_rendered_dead_letters() -> None:
    template = RequestTemplate(body=Template({"text": "${{ body.absent }}"}))
    world = await a_world(a_route(request=template))
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(2)
    assert world.client.made == []
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["expression_error"]


@virtual
async def test_an_unreadable_record_is_kept_as_a_dead_letter_and_blocks_nothing() -> None:
    world = await a_world(a_route())
    await world.log.append(EVENTS, key=b"k", value=b"\xff\x00", headers=[("gw_v", b"x")])
    await world.put(*events(2))
    async with running(world):
        await asyncio.sleep(2)
    assert len(world.client.made) == 2
    assert await world.unfinished() == 0
    (record,) = world.log.records(TOPICS.dead)
    assert record.value == b"\xff\x00"
    assert dict(record.headers)["gw_undecodable"] == b"gw_v: expected 1, got b'x'"
    with pytest.raises(UndecodableRecordError):
        decode_delivery(record)


@virtual
async def test_a_paused_destination_is_parked_and_resumed_once() -> None:
    world = await a_world(a_route(to=("ci", "audit")))
    async with operated(world) as control:
        command = ControlRecord(kind="pause", name="destination/ci", state="paused", at=now())
        await publish(world, command)
        await asyncio.sleep(1)
        async with running(world, world.worker(control)):
            await world.put(*events(20))
            await asyncio.sleep(3)
            assert {name for name, _, _ in world.client.made} == {"audit"}
            assert len(world.stored(TOPICS.parked)) == 20
            assert await world.unfinished() == 0
            await publish(world, command.with_state("resuming"))
            await asyncio.sleep(20)
            assert sorted(world.client.made).count(("ci", "evt_7", 1)) == 1
            assert len(world.client.made) == 40
            assert control.commands["pause/destination/ci"].state == "active"
            assert control.commands["pause/destination/ci"].count == 20
            # A second pause and resume brings back only what was parked since.
            await publish(world, replace(control.commands["pause/destination/ci"], state="paused"))
            await asyncio.sleep(1)
            await world.put(an_event(id="evt_late", received_at=now()))
            await asyncio.sleep(2)
            await publish(world, replace(control.commands["pause/destination/ci"], state="resuming"))
            await asyncio.sleep(20)
        assert len(world.client.made) == 42


@virtual
async def test_late_parked_deliveries_are_rescanned_after_the_resume() -> None:
    world = await a_world(a_route())
    async with operated(world) as control:
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        await asyncio.sleep(2)
        late = a_delivery(event=an_event(received_at=now()), successor=1)
        await world.log.append(
            TOPICS.parked,
            key=b"ci",
            value=late.event.body,
            headers=encode_delivery(late, RecordMetadata(paused_name="destination/ci"), at=now()),
        )
        async with running(world, world.worker(control)):
            await asyncio.sleep(20)
        assert len(world.client.made) == 1


@virtual
async def test_rescanned_deliveries_are_left_by_the_next_owner_of_the_jobs() -> None:
    world = await a_world(a_route())
    async with operated(world) as control:
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        async with running(world, world.worker(control)):
            await asyncio.sleep(10)
            assert control.commands["pause/destination/ci"].state == "active"
            late = a_delivery(event=an_event(received_at=now()), successor=1)
            await world.log.append(
                TOPICS.parked,
                key=b"ci",
                value=late.event.body,
                headers=encode_delivery(late, RecordMetadata(paused_name="destination/ci"), at=now()),
            )
            await asyncio.sleep(20)
            assert len(world.client.made) == 1
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(20)
    assert len(world.client.made) == 1


@virtual
async def test_a_kick_makes_waiting_retries_at_once_and_only_once() -> None:
    policy = a_policy(schedule=(3600.0,), max_attempts=5, max_age=86400.0)
    world = await a_world(a_route(retry=policy), ci=[503, 503, 503, 200])
    async with operated(world) as control:
        async with running(world, world.worker(control)):
            await world.put(*events(3))
            await asyncio.sleep(60)
            assert len(world.client.made) == 3
            await publish(world, ControlRecord(kind="kick", name="destination/ci", state="requested", at=now()))
            await asyncio.sleep(30)
            assert sorted(world.client.made[3:]) == [("ci", f"evt_{index}", 2) for index in range(3)]
            await world.doze(3 * 3600)
        assert len(world.client.made) == 6
        assert control.commands["kick/destination/ci"].count == 3


@virtual
async def test_a_replay_of_dead_letters_restarts_their_attempts_and_resolves_them() -> None:
    policy = a_policy(schedule=(1.0,), max_attempts=2)
    world = await a_world(a_route(retry=policy), ci=[503, 503, 503, 503, 503, 200])
    async with operated(world) as control:
        async with running(world, world.worker(control)):
            await world.put(*events(2))
            await asyncio.sleep(600)
            assert len(world.dead()) == 2
            ends = {f"{TOPICS.dead}/{n}": end for n, (_, end) in (await world.log.bounds(TOPICS.dead)).items()}
            for name in ("first", "again"):
                await publish(
                    world,
                    ControlRecord(
                        kind="dead",
                        name=name,
                        state="requested",
                        at=now(),
                        filter=DeadFilter(route="build"),
                        checkpoint=ends,
                    ),
                )
            await asyncio.sleep(60)
        assert [number for _, _, number in world.client.made] == [1, 1, 2, 2, 1, 1, 2]
        assert len(world.dead()) == 2
        assert [control.commands[f"dead/{name}"].count for name in ("first", "again")] == [2, 0]


@virtual
async def test_attempts_in_flight_are_adopted_when_their_partition_returns() -> None:
    world = await a_world(a_route(), ci=[5.0])
    await world.put(*events(8))
    async with running(world):
        await asyncio.sleep(1)
        assert world.client.under_way == 8
        await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
        await asyncio.sleep(30)
    assert len(world.client.made) == 8
    assert await world.unfinished() == 0


@virtual
async def test_a_partition_that_moves_is_read_again_by_its_new_owner_and_a_late_end_changes_nothing() -> None:
    world = await a_world(a_route(), ci=[5.0])
    await world.put(*events(60))
    async with running(world):
        await asyncio.sleep(1)
        async with running(world):
            await asyncio.sleep(30)
            assert await world.unfinished() == 0
    delivered = {event for _, event, _ in world.client.made}
    assert len(delivered) == 60
    assert len(world.client.made) <= 60 + 50  # what was under way as the partitions moved may come twice


@virtual
async def test_a_graceful_restart_repeats_nothing() -> None:
    world = await a_world(a_route(), ci=[0.5])
    await world.put(*events(300))
    for _ in range(6):
        async with running(world):
            await asyncio.sleep(0.7)
    async with running(world):
        await asyncio.sleep(60)
    assert sorted(set(world.client.made)) == sorted(world.client.made)
    assert len({event for _, event, _ in world.client.made}) == 300
    assert await world.unfinished() == 0


@virtual
async def test_a_destination_that_hangs_delays_no_other_and_no_commit() -> None:
    world = await a_world(a_route(to=("stuck",)), a_route("other", to=("ci",)), stuck=[1e9])
    async with running(world):
        for index in range(500):
            await world.put(an_event(id=f"evt_{index}", received_at=now()))
            await asyncio.sleep(0.01)
        at = [at for (name, _, _), at in zip(world.client.made, world.client.at, strict=True) if name == "ci"]
        assert len(at) == 500
        assert all(later - earlier < 0.2 for earlier, later in pairwise(at))
        await asyncio.sleep(15)
        assert await world.unfinished() <= 1


@virtual
async def test_a_name_that_the_rules_do_not_know_waits_an_hour_and_is_dead_lettered() -> None:
    world = await a_world(a_route())
    delivery = a_delivery(event=an_event(received_at=now()), route="gone", successor=1)
    await world.log.append(
        TOPICS.retry("5s"),
        key=b"ci",
        value=delivery.event.body,
        headers=encode_delivery(delivery, NO_METADATA, at=now()),
    )
    where = ("gone", "ci", "route_removed")
    async with running(world):
        await world.doze(3000)
        assert world.dead() == []
        counter = world.metrics.dead_letters.get(where)
        assert counter is not None, "its series appears before it counts, or an alert would miss it"
        assert counter.value == 0
        await world.doze(1000)
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["route_removed"]
    assert counter.value == 1
    assert world.client.made == []


@virtual
async def test_a_route_that_arrives_late_is_still_served() -> None:
    world = await a_world(a_route())
    delivery = a_delivery(event=an_event(received_at=now()), route="new", successor=1)
    await world.log.append(
        TOPICS.retry("5s"),
        key=b"ci",
        value=delivery.event.body,
        headers=encode_delivery(delivery, NO_METADATA, at=now()),
    )
    async with running(world):
        await asyncio.sleep(600)
        world.rules = rules_of(a_route(), a_route("new"))
        await asyncio.sleep(120)
    assert len(world.client.made) == 1
    assert world.dead() == []


@virtual
async def test_duplicates_that_a_crash_made_are_delivered_once() -> None:
    world = await a_world(a_route())
    delivery = a_delivery(event=an_event(received_at=now()), successor=1)
    for _ in range(3):
        await world.log.append(
            TOPICS.retry("5s"),
            key=b"ci",
            value=delivery.event.body,
            headers=encode_delivery(delivery, NO_METADATA, at=now()),
        )
    async with running(world):
        await asyncio.sleep(10)
    assert len(world.client.made) == 1


@virtual
async def test_events_that_share_an_identity_are_not_duplicates_of_each_other() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(10.0,))), ci=[503, 503, 503, 200])
    twice = an_event(id="evt_same", body=b'{"n":1}', received_at=now())
    await world.put(twice, replace(twice, body=b'{"n":2}'), replace(twice, received_at=now() + 0.001))
    async with running(world):
        await asyncio.sleep(60)
    assert [number for _, _, number in world.client.made] == [1, 1, 1, 2, 2, 2]


@virtual
async def test_a_replay_is_no_duplicate_of_what_it_repeats() -> None:
    world = await a_world(a_route())
    waiting = a_delivery(event=an_event(received_at=now()), successor=1, due=now() + 4)
    for delivery in (waiting, waiting, replace(waiting, replayed_at=now())):
        headers = encode_delivery(delivery, NO_METADATA, at=now())
        await world.log.append(TOPICS.retry("5s"), key=b"ci", value=delivery.event.body, headers=headers)
    async with running(world):
        await asyncio.sleep(30)
    assert len(world.client.made) == 2


@virtual
async def test_a_backlog_for_one_fast_destination_is_not_spilled() -> None:
    world = await a_world(a_route(), ci=[0.002])
    await world.put(*events(3000))
    async with running(world):
        await asyncio.sleep(30)
    assert len(world.client.made) == 3000
    assert world.log.records(TOPICS.retry("5s")) == []


@virtual
async def test_a_backlog_for_a_slow_destination_costs_a_small_multiple_of_appends() -> None:
    slow = a_destination("ci", url="http://127.0.0.1:1/ci", rate=20.0)
    world = await a_world(a_route(), destinations=[slow])
    await world.put(*events(1000))
    async with running(world):
        await asyncio.sleep(120)
    assert len(world.client.made) == 1000
    assert len({event for _, event, _ in world.client.made}) == 1000
    spans = [sum(at <= other < at + 1 for other in world.client.at) for at in world.client.at]
    assert max(spans) <= 20 + 2 + 1
    appended = sum(len(world.log.records(TOPICS.retry(tier))) for tier in ("5s", "20s", "80s", "5m"))
    assert appended < 4 * 1000


@pytest.mark.rotated(share=1 / 5, group="full windows")
@virtual
async def test_the_lowest_unfinished_record_is_cut_short_when_the_window_fills() -> None:
    patient = a_destination("stuck", url="http://127.0.0.1:1/stuck", timeout=300.0)
    world = await a_world(
        a_route("first", match={"body.slow": True}, to=("stuck",), retry=a_policy(schedule=(3600.0,), max_age=86400.0)),
        a_route(match={"body.slow": False}),
        destinations=[patient],
        stuck=[1e9],
    )
    made = [an_event(id=f"evt_{n}", key="same", body={"slow": n == 0}, received_at=now()) for n in range(13_000)]
    await world.put(*made)
    async with running(world):
        await asyncio.sleep(60)
        assert await world.unfinished() == 0
    assert len(world.client.made) == 13_000


async def put_before_healthy(world: World, names: Sequence[str]) -> None:
    """Store an event for each of these, and more than a window of events for `healthy`, in one partition."""
    to = [*names, *["healthy"] * 20_000]
    await world.put(
        *[an_event(id=f"evt_{n}", key="same", body={"to": name}, received_at=now()) for n, name in enumerate(to)]
    )


async def deliver_healthy_soon(world: World) -> None:
    """Wait for the attempts to the destination that is healthy, which nothing delays."""
    began = now()
    while sum(name == "ci" for name, _, _ in world.client.made) < 20_000:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.1)
    assert now() < began + 1.0


@pytest.mark.rotated(share=1 / 5, group="full windows")
@virtual
async def test_attempts_that_hang_are_cut_short_together_when_the_window_fills() -> None:
    """One after the other they would keep the events of others from being read for a quarter of a second each."""
    names = [f"stuck{number}" for number in range(8)]
    later = a_policy(schedule=(3600.0,), max_age=86400.0)
    world = await a_world(
        *[a_route(name, match={"body.to": name}, to=(name,), retry=later) for name in names],
        a_route(match={"body.to": "healthy"}),
        destinations=[a_destination(name, url=f"http://127.0.0.1:1/{name}", timeout=300.0) for name in names],
        **{name: [1e9] for name in names},
    )
    await put_before_healthy(world, names * 10)
    async with running(world):
        await deliver_healthy_soon(world)
        await asyncio.sleep(60)
        assert await world.unfinished() == 0


@pytest.mark.rotated(share=1 / 5, group="full windows")
@virtual
async def test_retries_that_wait_leave_together_when_the_window_fills() -> None:
    """One after the other they would keep the events of others from being read for as long as they wait."""
    names = [f"failing{number}" for number in range(20)]
    soon = a_policy(schedule=(4.0,), max_attempts=3)
    world = await a_world(
        *[a_route(name, match={"body.to": name}, to=(name,), retry=soon) for name in names],
        a_route(match={"body.to": "healthy"}),
        destinations=[a_destination(name, url=f"http://127.0.0.1:1/{name}") for name in names],
        **{name: [503] for name in names},
    )
    await put_before_healthy(world, names * 4)
    async with running(world):
        await deliver_healthy_soon(world)
        await asyncio.sleep(600)
    assert len(world.dead()) == 80


@virtual
async def test_a_failed_commit_is_retried() -> None:
    world = await a_world(a_route())
    world.log.fail_commits(3)
    await world.put(*events(5))
    async with running(world):
        await asyncio.sleep(8)
        assert await world.unfinished() == 0


@virtual
async def test_counters_add_up() -> None:
    world = await a_world(
        a_route(to=("ci", "down", "flaky"), retry=a_policy(schedule=(1.0,), max_attempts=2)),
        down=[404],
        flaky=[503, 200],
    )
    await world.put(*events(40))
    async with running(world):
        await asyncio.sleep(600)
    totals: dict[str, float] = {}
    for (_, destination, outcome), child in world.metrics.deliveries.items():
        totals[f"{destination} {outcome}"] = child.value
    assert sum(totals.values()) == 40 * 3
    assert totals["down dead_lettered"] == 40
    assert totals["ci delivered"] == 40


@virtual
async def test_a_bug_dead_letters_one_delivery_only() -> None:
    world = await a_world(a_route())

    async def attempt(outbound: Outbound, **fields: Any) -> Attempt:
        if b"evt_0" in dict(outbound.headers)[b"gateway-event-id"]:
            try:
                "a piece of \ud800 a body".encode()
            except UnicodeEncodeError as error:
                raise KeyError("a piece of a body") from error
        return await ScriptedClient.attempt(world.client, outbound, **fields)

    world.client.attempt = attempt  # type: ignore[method-assign]  # the only way to cause it
    await world.put(*events(3))
    world.logger = structlog.get_logger()
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await asyncio.sleep(3)
    assert len(world.client.made) == 2
    (stored,) = world.dead()
    assert stored.metadata.dead_reason == "bug"
    assert re.fullmatch(r"KeyError at tests\.engine\.test_worker:\d+", stored.metadata.detail)
    (failed,) = [line for line in lines if line["log_level"] == "error"]
    assert failed["event"] == "delivery_bug"
    assert failed["exception"].endswith("KeyError")
    assert not [line for line in lines if "exc_info" in line or "a piece of a body'" in repr(line)]


def test_control_records_survive_their_encoding() -> None:
    command = ControlRecord(
        kind="dead",
        name="x",
        state="requested",
        at=1.5,
        checkpoint={"a/0": 3},
        action="drop",
        filter=DeadFilter(ids=("a", "b"), since=2.0),
    )
    key, value = command.encode()
    assert decode(key, value) == command
    assert orjson.loads(value)["filter"]["ids"] == ["a", "b"]
    assert Partition("a", 0) == ("a", 0)


@virtual
async def test_a_destination_that_responds_410_is_paused_by_the_rules() -> None:
    policy = a_policy(results=(("410", Disposition.DEAD_LETTER),))
    gone = a_destination("ci", url="http://127.0.0.1:1/ci", on_gone=OnGone.PAUSE, concurrency=1)
    world = await a_world(a_route(retry=policy), destinations=[gone], ci=[410])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(1))
        await asyncio.sleep(2)
        assert control.paused_by("", "ci") == "destination/ci"
        await world.put(an_event(id="evt_later", received_at=now()))
        await asyncio.sleep(2)
    assert len(world.client.made) == 1
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["gone"]
    assert [stored.metadata.paused_name for stored in world.stored(TOPICS.parked)] == ["destination/ci"]


@virtual
async def test_a_destination_with_another_url_is_not_paused_for_a_410_of_the_former() -> None:
    """Not by a pause that couldn't be stored until then, and that nobody was told of."""
    policy = a_policy(results=(("410", Disposition.DEAD_LETTER),))
    former, present = [
        a_destination("ci", url=f"http://127.0.0.1:1/{path}", on_gone=OnGone.PAUSE) for path in ("former", "present")
    ]
    world = await a_world(a_route(retry=policy), destinations=[former], former=[410])
    with structlog.testing.capture_logs() as lines:
        world.logger = structlog.get_logger()
        async with operated(world) as control, running(world, world.worker(control)):
            world.log.refuse_appends(TOPICS.control_partition)
            await world.put(*events(1))
            await asyncio.sleep(10)
            world.rules = rules_of(a_route(retry=policy), destinations=[present])
            world.log.accept_appends()
            await asyncio.sleep(10)
            assert control.paused_by("", "ci") is None
            await world.put(an_event(id="evt_later", received_at=now()))
            await asyncio.sleep(2)
    assert [name for name, _, _ in world.client.made] == ["former", "present"]
    assert "destination_paused" not in {line["event"] for line in lines}
