"""One run: the real engine in processes of a simulated world, the steps of a plan, and the end of it all.

steps of the plan ──▶ healing: no failure any more, every process up, every pause resumed ──▶ everything ends ──▶
the ledger is closed
"""

import asyncio
import contextvars
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import orjson
import pytest
import structlog
from prometheus_client import CollectorRegistry
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger
from typing_extensions import override

from gateway.engine import commit_progress, router
from gateway.engine.control.follower import Follower
from gateway.engine.control.records import ControlRecord, DeadFilter, Selection
from gateway.engine.control.redelivery_records import Redelivery
from gateway.engine.control.state import Control
from gateway.engine.delivery import appends
from gateway.engine.delivery.destination_lanes import MAX_WAIT
from gateway.engine.delivery.queues import IDLE_TICK
from gateway.engine.jobs import redeliver, replay, replay_progress, scan
from gateway.engine.jobs.log_reader import checksum_of
from gateway.engine.jobs.runner import Jobs
from gateway.engine.ordered.route import OWNERSHIP_CHECK_AGE
from gateway.engine.router import TOPIC_CHECK_INTERVAL
from gateway.engine.unavailable_partitions import MISSING_FOR
from gateway.engine.worker import Worker
from gateway.log.base import NO_TOPIC, Partition, RecordHeaders, TopicSpec
from gateway.log.records import Origin, encode_event, encode_origin, event_key
from gateway.log.topics import JOBS_GROUP, TIERS
from gateway.model import Event, ExpressionError, LogUnavailableError, SpillReason, event_id
from gateway.rules import event_view
from gateway.rules.conditions import parse_condition
from gateway.rules.debounce import LONGEST_BURST, Debounce
from gateway.rules.event_view import ITEM, EventView
from gateway.rules.expressions import Expression, naming
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Destination, Egress, Route, Rules, Source
from gateway.rules.splits import Split
from gateway.rules.templates import Template
from gateway.settings import RecordedAttempts
from gateway.telemetry.metrics import Metrics
from gateway.verify.schemes import build_verifier
from tests.simulation.attempt_records import check_counts, check_records
from tests.simulation.broker import REDELIVERY, UNKNOWN_KIND, Broker, Failure, Machine, Segment, SimulatedLog, as_newer
from tests.simulation.destinations import HEALTHY, SimulatedClient, Sink
from tests.simulation.ledger import MARK, PART, ROUTER, TOPICS, InForce, Ledger, Row, RulesVersion, Violation
from tests.simulation.loop import EPOCH, OWNER, LivelockError, SimulatedLoop, SimulatedTask, run
from tests.simulation.plan import GATEWAY_VERSIONS, Plan, RouteSpec, Step

QUIET: FilteringBoundLogger = structlog.wrap_logger(
    structlog.ReturnLogger(), processors=[], wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
)
RELOAD_LAG = 2.0
"""Seconds within which processes see new rules, each at its own time."""
MIN_SLEEP = 0.0005
"""Seconds; a real loop sleeps no less. Without it, a wait for the rest of a float's rounding never ends."""
DRIFT = 0.0005
"""By how much of the time a machine's monotonic clock is fast or slow, at most: what NTP may slew."""
KICK_EVERY = 60.0
NOT_MISSED_AFTER = MISSING_FOR + 2 * TOPIC_CHECK_INTERVAL + 60.0
"""Seconds after everything has ended in which nobody misses a deleted topic any more that no rules name."""
KICKED = 40.0
"""Seconds in which a kick delivers everything that waits, where nothing fails."""
NUMBER = (event_view.Segment(MARK.decode(), -1),)
"""The path to an event's number."""
CONTROL = Partition(TOPICS.control, 0)
OPEN_SOURCE = build_verifier({"scheme": "none"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a run. `digest` is the same for the same seed."""

    violation: Violation | None
    seconds: float
    attempts: int
    digest: str
    trace: list[str]


def simulate(plan: Plan, *, traced: bool = False) -> Outcome:
    """Run a plan to its end, or to the first invariant that doesn't hold."""
    defaults = commit_progress.CommitProgress.__init__.__kwdefaults__
    assert defaults is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit_progress, "WINDOW", plan.window)
        patch.setattr(router, "MAX_BYTES", plan.memory)
        patch.setattr(appends, "MAX_BYTES_IN_APPENDS", plan.memory // 4)
        patch.setitem(defaults, "window", plan.window)
        for module in (scan, replay, replay_progress):
            patch.setattr(module, "CHECKPOINT_EVERY", min(plan.batch, module.CHECKPOINT_EVERY))
        for module in (scan, replay_progress, redeliver):
            patch.setattr(module, "APPENDS_AT_ONCE", min(plan.batch, module.APPENDS_AT_ONCE))
        return run(_simulate(plan, traced=traced))


async def _simulate(plan: Plan, *, traced: bool) -> Outcome:
    world = World(plan, traced=traced)
    await world.run()
    made = [(each.process, each.delivery, each.attempt, each.began, each.ended) for each in world.ledger.attempts]
    return Outcome(
        violation=world.ledger.violation,
        seconds=world.now(),
        attempts=len(made),
        digest=str(Random(repr((made, sorted(world.ledger.appended.items())))).getrandbits(64)),
        trace=world.trace,
    )


class World:
    """Everything there is in a run."""

    def __init__(self, plan: Plan, *, traced: bool) -> None:
        self.plan = plan
        self.trace: list[str] = []
        self.loop = asyncio.get_running_loop()
        self._is_traced = traced
        self.ledger = Ledger(plan, self.now, self.say)
        random = Random(f"{plan.seed}/nodes")
        self.broker = Broker(
            random=Random(f"{plan.seed}/broker"),
            seed=plan.seed,
            witness=self.ledger,
            skews=[random.uniform(-plan.skew, plan.skew) for _ in range(plan.nodes)],
            session=plan.session,
            partitions=self._partitions,
        )
        self.sinks = {
            name: Sink(name, limits["latency"], Random(f"{plan.seed}/{name}"))
            for name, limits in plan.destinations.items()
        }
        self.rules_versions: list[tuple[RulesVersion, Rules]] = []
        self._topics: Mapping[str, str] = {}
        """To which topic events of each source are appended: the ingress is told of new rules, too, some time later."""
        self.processes: dict[str, Process] = {}
        self._born: dict[str, int] = {}
        self._local_steps: dict[str, float] = {}
        self._paused: dict[str, None] = {}
        self._receipts: set[float] = set()
        self.newer: set[str] = set()
        """Slots in which the next process is of the newer version."""
        self._ingress = OUTSIDE
        self.metrics: list[Metrics] = []
        """Of all processes that there have been."""
        self._background: set[asyncio.Task[None]] = set()
        self._healed_at: float | None = None
        self._given: set[bytes] = set()  # keys of commands
        self._redeliveries: dict[str, ControlRecord] = {}
        self._initial_poll_interval = 1.0 if plan.is_long else 0.0
        self._has_rate = any(each["rate"] for each in plan.destinations.values())
        self._longest_delay = max([route.delay for route in plan.routes], default=0.0)

    def now(self) -> float:
        return self.loop.time()

    def say(self, text: str) -> None:
        if self._is_traced:
            self.trace.append(f"{self.now():9.3f}  {text}")

    @property
    def min_poll_interval(self) -> float:
        """The least interval of regular polls: a long wait costs little."""
        if self._healed_at is None:
            return self._initial_poll_interval
        # What a route delays is no long wait: it has to be in time.
        elapsed = self.now() - self._healed_at - self._longest_delay
        # Of an ordered route nothing is begun whose proof is older: asleep for longer, it would ask again for nothing.
        has_order = "reload" in self.plan.faults or any(route.is_ordered for route in self.plan.routes)
        most = OWNERSHIP_CHECK_AGE / 2 if has_order else 20.0
        if self._has_rate and elapsed < 300.0:
            most = MAX_WAIT / 2  # what waits for its turn mustn't be overdue at each look
        return 0.0 if elapsed < 20 else min(most, elapsed / 20)

    async def sleep(self, seconds: float) -> None:
        if seconds >= IDLE_TICK:
            seconds = max(seconds, self.min_poll_interval)
        elif seconds > 0:
            seconds = max(seconds, MIN_SLEEP)
        await asyncio.sleep(seconds)

    # The run.

    async def run(self) -> None:
        self.broker.create(TOPICS.specs(topic_of(self.plan, name) for name in self.plan.sources))
        self._new_version({})
        self._topics = self.rules_versions[-1][0].topics
        self.broker.create(TOPICS.specs((), self.rules_versions[-1][1].ordered))
        for number in range(self.plan.processes):
            self.start(f"p{number}")
        watch = asyncio.create_task(self._watch()) if set(self.plan.faults) <= {"trouble", "gap"} else None
        try:
            for step in self.plan.steps:
                await asyncio.sleep(max(0.0, step.at - self.now()))
                if self.ledger.violation is not None:
                    return
                self.say(f"STEP {step.do} {dict(step.what)}")
                self._take(step)
            await asyncio.sleep(max(0.0, self.plan.horizon - self.now()))
            await self._heal()
            await self._until_everything_ends()
            if self.ledger.violation is None:
                await self._until_nothing_is_held()
                await self._until_nothing_is_missed()
                for process in self.processes.values():
                    self.ledger.at_rest(process.name, process.held())
                    process.check_attempts()
                check_records(self.ledger)
                self.ledger.close(self._counted_as_lost())
        except LivelockError as error:
            self.ledger.violate("19 progress", str(error))
        finally:
            if watch is not None:
                watch.cancel()
            for task in self._background:
                task.cancel()
            for process in list(self.processes.values()):
                self.kill(process)
            await asyncio.sleep(0.01)

    def _counted_as_lost(self) -> Mapping[str, float]:
        """Return how many lost records all processes have counted, by topic."""
        counted = Counter[str]()
        for metrics in self.metrics:
            for (topic,), series in metrics.records_lost.items():
                counted[topic] += int(series.value)
        return counted

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(max(1.0, self.min_poll_interval))
            if self._healed_at is not None and self.min_poll_interval:
                return
            self.ledger.watch(self._ends())

    async def _heal(self) -> None:
        self.say("HEALING")
        self.broker.failures.clear()
        self.broker.find_leaders()
        for sink in self.sinks.values():
            sink.how = HEALTHY
        await self._until_background_ends()
        if GATEWAY_VERSIONS in self.plan.faults:
            self.newer = {f"p{number}" for number in range(self.plan.processes)}
            for process in list(self.processes.values()):
                if not process.is_newer:
                    self._in_background(self._restart(process, 0.1))
            await self._until_background_ends()
        for number in range(self.plan.processes):
            if f"p{number}" not in self.processes:
                self.start(f"p{number}")
        for name in list(self._paused):
            self._order({"kind": "resume", "name": name})
        if any(route.fails for route in self.rules_versions[-1][0].routes):
            self._reload({})
            await self._until_background_ends()
        self._healed_at = self.now()

    async def _until_background_ends(self) -> None:
        while self._background:
            await asyncio.wait(list(self._background))

    async def _until_everything_ends(self) -> None:
        patience = self._patience()
        groups = self._groups()
        halting = [route.name for route in self.plan.routes if route.halts]
        next_kick = self.now() + KICK_EVERY
        if self.plan.is_kicked:
            longest = max([each["timeout"] for each in self.plan.destinations.values()])
            for seconds in (longest, KICKED):  # again for what hung when all was well again, and waits for its retry
                for name in self.plan.destinations:
                    self._order({"kind": "kick", "name": f"destination/{name}"})
                await asyncio.sleep(seconds)
            if waiting := self.ledger.waiting(self._ends(), groups):
                self._tell_left("17 a kick releases everything", waiting)
        while self.ledger.violation is None:
            await asyncio.sleep(max(0.5, self.min_poll_interval))
            if halting and self.now() >= next_kick:  # what has halted waits for an operator
                # Less often than a job looks around, or there would always be one under way. One name after the other:
                # as polls are seldom when only waiting is left, each would let one delivery of a rate out.
                next_kick = self.now() + max(KICK_EVERY, 5 * len(halting) * self.min_poll_interval) / len(halting)
                halting.append(halting.pop(0))
                self._order({"kind": "kick", "name": f"route/{halting[-1]}"})
            if self.ledger.is_finished(self._ends(), groups) and self._orders_are_done():
                return
            assert self._healed_at is not None
            if self.now() - self._healed_at > patience:
                self._tell_left("19 everything ends", self.ledger.left(self._ends(), groups))

    def _tell_left(self, invariant: str, rows: Sequence[Row]) -> None:
        story = self.ledger.story(rows[0].number, [key[1] for key in self.ledger.trails]) if rows else []
        self.ledger.violate(invariant, f"{len(rows)} records are left", [*rows[:10], *story[:40]])

    def _patience(self) -> float:
        """Return the seconds within which everything ends once nothing fails any more.

        One more delay and one more attempt are enough, after a breaker that stays open for about as long as it has been
        open before. A name that is gone is waited for for an hour, and so are clocks that were wrong, and replays.
        """
        waits = [1.2 * max(each.schedule) + each.delay + LONGEST_BURST * each.quiet for each in self.plan.routes]
        longest = max(waits, default=0.0)
        if {"reload", "order", "skew"} & set(self.plan.faults) or {"step", "append"} <= set(self.plan.faults):
            return 3 * 3600.0 + longest * max([route.max_attempts for route in self.plan.routes], default=0)
        return 300.0 + 2 * self.plan.horizon + longest

    async def _until_nothing_is_held(self) -> None:
        """Let processes that lost partitions, or were evicted, find out that others have done the rest."""
        for _ in range(60):
            if not any(any(process.held().values()) for process in self.processes.values()):
                return
            await asyncio.sleep(1.0)

    async def _until_nothing_is_missed(self) -> None:
        """Let processes find out that topics which no rules name were deleted: nobody is told of these for ever."""
        until = self.now() + NOT_MISSED_AFTER
        while any(process.missed() for process in self.processes.values()):
            if self.now() > until:
                missed = {process.name: process.missed() for process in self.processes.values()}
                self.ledger.violate("31 a deleted topic of no source is not missed", f"missed: {missed}")
                return
            await asyncio.sleep(1.0)

    def _groups(self) -> Mapping[str, Collection[str]]:
        tiers = {TOPICS.retry(tier) for tier in TIERS}
        groups = {ROUTER: tiers.union(*(version.topics.values() for version, _ in self.rules_versions))}
        for topic in self.broker.specs:
            place = TOPICS.ordered_target(topic)
            if place is not None:
                groups[TOPICS.ordered_group(*place)] = {topic}
        return groups

    def _ends(self) -> Mapping[Partition, int]:
        return {partition: segment.end for partition, segment in self._segments.items()}

    @property
    def _segments(self) -> Mapping[Partition, Segment]:
        """All but those of attempts, which nobody reads: a plan draws the same of them, whatever is recorded."""
        return {each: segment for each, segment in self.broker.segments.items() if each.topic != TOPICS.attempts}

    def _is_known(self, key: str) -> bool:
        """Return whether all know of a command: not if some hadn't read it as the control topic was deleted."""
        return all(key in each.control.commands for each in self.processes.values() if each.control.recreations)

    def _has_read_orders(self, process: "Process") -> bool:
        """Return whether a process knows all commands that there are: one that has just started may not yet."""
        segment = self.broker.segments.get(CONTROL)
        last = {record.key: record.value for record in segment.records} if segment else {}
        given = {key.decode() for key, value in last.items() if value and key in self._given}
        return given <= process.control.commands.keys()

    def _orders_are_done(self) -> bool:
        return bool(self.processes) and all(
            self._has_read_orders(process)
            and not any(order.is_pending and self._is_known(order.key) for order in process.control.commands.values())
            and not process.control.unacknowledged_cancellations()
            for process in self.processes.values()
        )

    def _partitions(self, spec: TopicSpec) -> int:
        if spec.name == TOPICS.control:
            return 1
        is_of_events = spec.name.startswith(TOPICS.events("")) or TOPICS.ordered_target(spec.name) is not None
        return self.plan.partitions if is_of_events else self.plan.tier_partitions

    # Steps.

    def _take(self, step: Step) -> None:
        takers: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
            "event": self._receive,
            "poison": self._poison,
            "gap": self._skip,
            "behave": self._behave,
            "log": self._fail,
            "skew": lambda what: self.broker.set_clock(what["node"], what["to"]),
            "leaders": lambda what: self.broker.move_leaders(what["by"]),
            "leaderless": self._lose_leader,
            "damage": self._damage,
            "refuse": self._refuse_appends,
            "delete": self._delete,
            "retire": self._retire,
            "remake": self._recreate,
            "fill": self._fill,
            "grow": lambda what: self.broker.grow(f"{TOPICS.prefix}{what['topic']}", what["by"]),
            "crash": self._crash,
            "stop": self._stop,
            "start": lambda what: None if what["process"] in self.processes else self.start(what["process"]),
            "rebalance": self._rebalance,
            "expire": self._expire,
            "clock": self._set_clock,
            "version": self._set_version,
            "ingress": self._set_ingress,
            "reload": self._reload,
            "order": self._order,
            "handover": self._hand_over,
            "redeliver": self._redeliver,
        }
        takers[step.do](step.what)

    def _poison(self, what: Mapping[str, Any]) -> None:
        where, kind, body = what["where"], what.get("kind", 0), b"poison %d" % what["number"]
        if where == "control":
            orders = poisoned_orders() if kind < MISLEADING else misleading_orders(topic_of(self.plan, what["source"]))
            key, value = orders[kind % len(orders)]
            self.broker.store(OUTSIDE, CONTROL, key, value, [])
            return
        ordered = [topic for topic in self.broker.specs if TOPICS.ordered_target(topic) is not None]
        if where == "ordered" and not ordered:
            return
        topics = {
            "ordered": ordered[kind % len(ordered)] if ordered else "",
            "events": topic_of(self.plan, what["source"]),
            "tier": TOPICS.retry("5s"),
            "parked": TOPICS.parked,
            "dead": TOPICS.dead,
            "dedupe": TOPICS.dedupe,
        }
        poisons: Sequence[RecordHeaders] = poisoned_headers(what["source"])
        if where == "events":
            poisons = [headers for headers in poisons if "gw_delivery" not in dict(headers)]  # else it is one
        headers = list(poisons[kind % len(poisons)])
        if origin := what.get("origin"):
            of = Partition(topics["events"], origin["number"])
            at = EPOCH + self.now() + origin["ahead"]
            headers.append(encode_origin(Origin(of, origin["offset"], at)))
        key = f"{topics['events']}/0".encode() if where == "dedupe" else b""
        if topics[where] in self.broker.gone:
            return
        self.broker.store(OUTSIDE, Partition(topics[where], 0), key, body, headers)

    def _named(self, what: Mapping[str, Any]) -> Sequence[Partition]:
        """Return the partitions of the topic that a step names; else all, whose order changes with each new topic."""
        return self.broker.of(TOPICS.prefix + what["topic"]) if "topic" in what else list(self._segments)

    def _skip(self, what: Mapping[str, Any]) -> None:
        partitions = [each for each in self._named(what) if each != CONTROL and each.topic not in self.broker.gone]
        self.broker.skip(partitions[what["number"] % len(partitions)], what["count"])

    def _behave(self, what: Mapping[str, Any]) -> None:
        self.sinks[what["destination"]].how = what

    def _fail(self, what: Mapping[str, Any]) -> None:
        until = self.now() + what["seconds"]
        self.broker.failures.append(Failure(what["what"], what["kind"], until, what["share"]))

    def _lose_leader(self, what: Mapping[str, Any]) -> None:
        partitions = self._named(what)
        if not partitions:
            return  # the topic is away
        partition = partitions[what["number"] % len(partitions)]
        self.broker.lose_leader(partition, what["seconds"])
        if partition == CONTROL:
            self.ledger.deaf(self.now() + what["seconds"])

    def _damage(self, what: Mapping[str, Any]) -> None:
        """Damage a record of a partition; but none of commands, which would be heard by nobody, and not be in force."""
        partitions = [each for each in self._named(what) if each != CONTROL]
        self.broker.damage(partitions[what["number"] % len(partitions)], what["share"], what["seconds"])

    def _refuse_appends(self, what: Mapping[str, Any]) -> None:
        for partition in self.broker.of(TOPICS.prefix + what["topic"]):
            if what["number"] in (None, partition.number):
                self.broker.refuse_appends(partition, what["seconds"])

    def _delete(self, what: Mapping[str, Any]) -> None:
        """Delete the first records of a partition, of one of which something isn't done where there is such a one."""
        partitions = [each for each in self.broker.segments if self.broker.segments[each].records]
        partitions = [each for each in partitions if each.topic.startswith(f"{TOPICS.prefix}{what['kind']}.")]
        partitions = [each for each in partitions if self.ledger.is_open(each)] or partitions
        if partitions:
            partition = partitions[what["number"] % len(partitions)]
            segment = self.broker.segments[partition]
            length = math.ceil(what["share"] * (segment.end - segment.start))
            self.broker.delete_below(partition, segment.start + length)

    def _recreate(self, what: Mapping[str, Any]) -> None:
        """Delete a topic and make it again, one that was used where there is such a one."""
        names = [TOPICS.retry(tier) for tier in TIERS] if what["kind"] == "retry" else [TOPICS.prefix + what["kind"]]
        names = [name for name in names if name not in self.broker.gone]
        used = [name for name in names if any(self.broker.segments[each].end for each in self.broker.of(name))]
        if names := used or names:
            self.broker.recreate(names[what["number"] % len(names)], what["seconds"])
        if what["kind"] == "control":
            self.ledger.deaf(self.now() + what["seconds"])

    def _retire(self, what: Mapping[str, Any]) -> None:
        """Delete the topic of a source that the newest rules don't have; if they do, no operator would."""
        if what["source"] not in self.rules_versions[-1][0].sources:
            topic = topic_of(self.plan, what["source"])
            if topic not in self.broker.gone:
                self.broker.delete(topic)

    def _fill(self, what: Mapping[str, Any]) -> None:
        """Let the control topic have many records, so that a recreated one is shorter for long."""
        for number in range(what["count"]):
            order = ControlRecord(kind="pause", name=f"route/filler-{number}", state="active", at=EPOCH + self.now())
            self.broker.store(OUTSIDE, CONTROL, *order.encode(), [])

    def _crash(self, what: Mapping[str, Any]) -> None:
        process = self.processes.get(what["process"])
        if process is not None:
            self._schedule_crash(process, what["steps"], what["again"])

    def _stop(self, what: Mapping[str, Any]) -> None:
        process = self.processes.get(what["process"])
        if process is not None:
            self._in_background(self._restart(process, what["again"]))

    def _rebalance(self, _: Mapping[str, Any]) -> None:
        for group in list(self.broker.groups.values()):
            group.change()

    def _expire(self, what: Mapping[str, Any]) -> None:
        process = self.processes.get(what["process"])
        for consumer in process.log.consumers if process is not None else ():
            if consumer.group is not None:
                consumer.group.throw_out(consumer, what["learns"])

    def _hand_over(self, what: Mapping[str, Any]) -> None:
        """Let whoever owns the jobs stop gracefully, or be killed soon."""
        group = TOPICS.group(JOBS_GROUP)
        for process in list(self.processes.values()):
            consumers = [each for each in process.log.consumers if each.group is not None and each.group.name == group]
            if any(CONTROL in consumer.owned for consumer in consumers):
                taker = self._crash if what["by"] == "crash" else self._stop
                taker({"process": process.slot, "steps": what["steps"], "again": 0.1})
                return

    def _set_clock(self, what: Mapping[str, Any]) -> None:
        """Set the clock of a machine wrong, or right: of the process there, and of those that follow it."""
        self._local_steps[what["process"]] = what["by"]
        process = self.processes.get(what["process"])
        if process is not None:
            process.machine.step = what["by"]

    def _set_version(self, what: Mapping[str, Any]) -> None:
        """Let the process that comes next in this slot be of the newer version, or of this one."""
        (self.newer.add if what["is_newer"] else self.newer.discard)(what["process"])

    def _set_ingress(self, what: Mapping[str, Any]) -> None:
        self._ingress = NEWER_OUTSIDE if what["is_newer"] else OUTSIDE

    def _receive(self, what: Mapping[str, Any]) -> None:
        number = what["n"]
        if self._topics[what["source"]] in self.broker.deleted:
            return  # refused
        body = Random(what["body"]).randbytes(what["size"])
        event = Event(
            id=event_id(what["source"], what["id"]),
            source=what["source"],
            type=what["type"],
            key=what["key"],
            received_at=self._received_at(number),
            headers=(
                (b"Content-Type", b"application/octet-stream"),
                (b"X-Twice", b"1"),
                (MARK, b"%d" % number),
                (b"x-twice", b"\xff\x00\xfe".replace(b"\x00", b"\x80")),
            ),
            body=body,
        )
        self.ledger.events[number] = event
        partitions = self.broker.of(self._topics[event.source])
        key = event_key(event)
        partition = partitions[Random(key).randrange(len(partitions))]
        record = self.broker.store(self._ingress, partition, key, body, encode_event(event))
        self.ledger.acknowledged(partition, record)

    def _received_at(self, number: int) -> float:
        """Return when an event is received, as no other is to the microsecond: by that, duplicates are told apart."""
        at = round(EPOCH + self.now() + self._error_of_ingress(number), 6)
        while at in self._receipts:
            at = round(at + 1e-6, 6)
        self._receipts.add(at)
        return at

    def _error_of_ingress(self, number: int) -> float:
        """Return by how much the clock is wrong by which an event was received: a broker's, but of another one."""
        if not self.plan.skew:
            return 0.0
        return Random(f"{self.plan.seed}/received/{number}").uniform(-self.plan.skew, self.plan.skew)

    def _order(self, what: Mapping[str, Any]) -> None:
        kind, name, at = what["kind"], what["name"], EPOCH + self.now()
        if (
            CONTROL in self.broker.leaderless
            or CONTROL.topic in self.broker.gone
            or ("for" in what and TOPICS.dead in self.broker.gone)
        ):
            return  # and so says the command to its operator
        match kind:
            case "pause":
                self._paused[name] = None
                self.ledger.paused(name)
                order = ControlRecord(kind="pause", name=name, state="paused", at=at)
            case "resume":
                self._paused.pop(name, None)
                self.ledger.resumed(name)
                order = ControlRecord(kind="pause", name=name, state="resuming", at=at)
                self.ledger.touched[name] += 1
            case "kick":
                order = ControlRecord(kind="kick", name=name, state="requested", at=at)
                self.ledger.touched[name] += 1
                self.ledger.expedited.setdefault(name, self.now())
            case "again":
                topics = set(self.rules_versions[-1][0].topics.values())
                places = {f"{p.topic}/{p.number}": p for p in self.broker.segments if p.topic in topics}
                ends = {place: self.broker.segments[p].end for place, p in places.items()}
                starts = dict.fromkeys(places, 0)
                part = what.get("part", {})
                if "event" in part:  # from where it is, to there
                    found = self.ledger.place_of(part["event"])
                    if found is None:
                        return
                    starts = {f"{found.partition.topic}/{found.partition.number}": found.offset}
                    ends = {place: offset + 1 for place, offset in starts.items()}
                selection = Selection(
                    route=what["route"],
                    destination=part.get("destination"),
                    source=part.get("source"),
                    since=EPOCH + part["since"] if "since" in part else at - 1e6,
                    until=EPOCH + part["until"] if "until" in part else None,
                    rate=what["rate"],
                    starts=starts,
                    undelivered=what.get("undelivered", False),
                )
                order = ControlRecord(
                    kind="replay", name=name, state="requested", at=at, checkpoint=ends, selection=selection
                )
                self.ledger.replayed(name, selection, ends)
            case _:
                word, _, which = what["for"].partition("/")
                segments = {f"{p.topic}/{p.number}": self.broker.segments[p] for p in self.broker.of(TOPICS.dead)}
                ends = {place: segment.end for place, segment in segments.items()}
                last = [each.records[-1] for each in segments.values() if each.records]
                order = ControlRecord(
                    kind="dead",
                    name=name,
                    state="requested",
                    at=at,
                    action=kind,
                    checkpoint=ends,
                    filter=DeadFilter(**{word: which}),
                    latest=max([record.appended_at for record in last], default=None),
                )
                if kind == "replay":
                    self.ledger.touched[what["for"]] += 1
                    self.ledger.expedited.setdefault(what["for"], self.now())
        key, value = order.encode()
        self._given.add(key)
        self.broker.store(OUTSIDE, CONTROL, key, value, [])

    def _redeliver(self, what: Mapping[str, Any]) -> None:
        """Have an event delivered again; or, once that was asked for, ask for it again or cancel it."""
        if CONTROL in self.broker.leaderless or CONTROL.topic in self.broker.gone:
            return  # and so says the command to its operator
        name, at = what["name"], EPOCH + self.now()
        found = self.ledger.place_of(what["event"])
        if name not in self._redeliveries and found is not None and found.event is not None:
            partition_name = f"{found.partition.topic}/{found.partition.number}"
            segment = self.broker.segments[found.partition]
            known = next((checksum_of(as_newer(each)) for each in segment.records if each.offset == found.offset), 0)
            asked = Redelivery(
                event=found.event.id,
                partition=partition_name,
                offset=found.offset,
                route=what.get("route"),
                destination=what.get("destination"),
            )
            self._redeliveries[name] = ControlRecord(
                kind="redeliver",
                name=name,
                state="requested",
                at=at,
                redelivery=asked,
                last_records={partition_name: known},
            )
            self.ledger.redelivered(name, asked, found)
        command = self._redeliveries.get(name)
        if command is None:
            return
        command = replace(command, at=at)
        if what.get("undo"):
            self.ledger.redelivery_undone(name)
            command = command.with_state("cancelled", detail="by an operator")
        key, value = command.encode()
        if GATEWAY_VERSIONS in self.plan.faults:
            value = UNKNOWN_KIND + value.removeprefix(REDELIVERY)
        self._given.add(key)
        self.broker.store(OUTSIDE, CONTROL, key, value, [])

    # Rules.

    def _new_version(self, what: Mapping[str, Any]) -> None:
        """Make rules in which names are missing, or have other policies, conditions, ends, order or topics."""
        without, policies, toggled = what.get("without", ()), what.get("policies", {}), what.get("toggled", ())
        destinations = [name for name in self.plan.destinations if name not in without]
        routes = []
        for planned in self.plan.routes:
            changes = what.get("changes", {}).get(planned.name, {})
            changed: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list | tuple) else value for name, value in changes.items()
            }
            route = replace(planned, **changed)
            to = tuple(name for name in route.to if name in destinations)
            sources = tuple(name for name in route.sources if name not in without)
            if route.name in without or not to or not sources:
                continue
            route = replace(route, to=to, sources=sources)
            if route.name in policies:
                schedule, attempts, age = policies[route.name]
                route = replace(route, schedule=tuple(schedule), max_attempts=attempts, max_age=age)
            if route.name in toggled and not route.parts:
                route = replace(route, is_ordered=not route.is_ordered, halts=False)
            routes.append(replace(route, delay=0.0) if route.is_ordered else replace(route, quiet=0.0))
        version = RulesVersion(
            number=len(self.rules_versions),
            sources=frozenset(name for name in self.plan.sources if name not in without),
            destinations=frozenset(destinations),
            routes=tuple(routes),
            topics={
                name: TOPICS.events(moved) if (moved := what.get("topics", {}).get(name)) else topic_of(self.plan, name)
                for name in self.plan.sources
            },
        )
        topics = {version.topics[name] for name in version.sources}
        self.broker.create(TOPICS.specs(sorted(topics.union(version.topics.values()) - (self.broker.deleted - topics))))
        self.rules_versions.append((version, _rules(self.plan, version, self.ledger)))

    def _reload(self, what: Mapping[str, Any]) -> None:
        self._new_version(what)
        if self.rules_versions[-1][0].topics != self.rules_versions[-2][0].topics:
            seed = f"{self.plan.seed}/ingress/{len(self.rules_versions)}"
            self._in_background(self._append_elsewhere(Random(seed).uniform(0, RELOAD_LAG)))
        random = Random(f"{self.plan.seed}/reload/{len(self.rules_versions)}")
        for process in list(self.processes.values()):
            self._in_background(process.reload(random.uniform(0, what.get("lag", RELOAD_LAG))), owner=process)

    async def _append_elsewhere(self, after: float) -> None:
        await asyncio.sleep(after)
        self._topics = self.rules_versions[-1][0].topics

    # Processes.

    def start(self, name: str) -> None:
        self._born[name] = self._born.get(name, -1) + 1
        random = Random(f"{self.plan.seed}/{name}/{self._born[name]}")
        process = Process(self, name, f"{name}.{self._born[name]}", random, self._machine(name))
        self.processes[name] = process
        self.say(f"{process.name} starts")
        process.start()

    def _machine(self, name: str) -> Machine:
        """Return the clocks of a process that starts: with skew they are off by as much as an hour, and drift."""
        skew = drift = 0.0
        if self.plan.skew:
            random = Random(f"{self.plan.seed}/{name}/{self._born[name]}/clocks")
            skew = random.choice((self.plan.skew, 3600.0)) * random.uniform(-1, 1)
            drift = random.uniform(-DRIFT, DRIFT)
        machine = Machine(self.loop, skew=skew, drift=drift)
        machine.step = self._local_steps.get(name, 0.0)
        return machine

    def _schedule_crash(self, process: "Process", steps: int, again: float) -> None:
        def crash() -> None:
            if self.processes.get(process.slot) is process:
                self.kill(process)
                self._in_background(self._start_later(process.slot, again))

        assert isinstance(self.loop, SimulatedLoop)
        self.loop.kill_after(steps, process, crash)

    def kill(self, process: "Process") -> None:
        """End a process between two of its steps: nothing of it does anything any more."""
        if process.is_dead:
            return
        self.say(f"{process.name} is killed")
        owned: dict[str, Collection[Partition]] = {
            consumer.group.name: consumer.owned for consumer in process.log.consumers if consumer.group is not None
        }
        self.ledger.died(process.name, owned)
        process.is_dead = True
        if process.force is not None:
            process.force.until = self.now()
        self.processes.pop(process.slot, None)
        self.broker.died(process)
        tasks = [task for task in asyncio.all_tasks() if isinstance(task, SimulatedTask) and task.owner is process]
        for task in sorted(tasks, key=hash):
            task.cancel()

    def ended(self, process: "Process", error: BaseException | None) -> None:
        """Hear of a process that ended by itself: a lost log may end it, and an orchestrator starts it again."""
        if process.is_dead:
            return
        if error is not None and not _is_lost_log(error):
            self.ledger.violate("no bug", f"{process.name} died of {_told(error)}")
        self.say(f"{process.name} ended: {error!r}")
        was_asked = process.is_stopping
        self.kill(process)
        if not was_asked:
            self._in_background(self._start_later(process.slot, 1.0))

    async def _restart(self, process: "Process", again: float | None) -> None:
        await process.stop()
        if again is not None:
            await self._start_later(process.slot, again)

    async def _start_later(self, slot: str, after: float) -> None:
        await asyncio.sleep(after)
        if slot not in self.processes:
            self.start(slot)

    def _in_background(self, work: Coroutine[None, None, None], owner: object = None) -> None:
        context = contextvars.copy_context()
        context.run(OWNER.set, owner)
        task = self.loop.create_task(work, context=context)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


@cache
def poisoned_headers(source: str) -> list[RecordHeaders]:
    """Return headers of records that are neither events nor deliveries nor dedupe entries."""
    event = Event(id=event_id(source, "poison"), source=source, type="x", received_at=EPOCH, headers=(), body=b"")
    written = encode_event(event)
    state = {"id": "dlv_1", "route": "r0", "destination": "d0", "successor": 0, "due": 0, "replayed_at": 0, "at": 0}
    values: list[object] = [None, 1e300, [[]], {"unknown_since": "x", "breaks": "x"}, True]
    states: list[dict[str, object]] = [
        {**state, "attempts": [], "metadata": {}, name: value}
        for name in ("id", "attempts", "successor", "due", "metadata")
        for value in values
    ]
    return [
        [("gw_v", b"x")],
        [],
        [(name, b"nan" if name == "gw_at" else text) for name, text in written],
        [(name, b"a: b\r\nno colon" if name == "gw_headers" else text) for name, text in written],
        *[[*written, ("gw_delivery", orjson.dumps(each))] for each in states],
        [("gw_v", b"1"), ("gw_source", source.encode()), ("gw_origin", b"9" * 17)],
        [("gw_v", b"1"), ("gw_source", b"\xff"), ("gw_origin", b"0")],
    ]


@cache
def poisoned_orders() -> list[tuple[bytes, bytes]]:
    """Return keys and values that are no orders, under keys that no order has."""
    keys = (
        b"",
        b"\xff/x",
        b"pause/destination/never",
        b"kick/route/never",
        b"dead/never",
        b"replay/never",
        b"redeliver/never",
        b"checkpoint/kick/route/never",
    )
    values = (
        b"[]",
        b'{"state":',
        b'{"state":["paused"],"at":0,"checkpoint":{},"count":0}',
        b'{"state": "requested","at":"now","checkpoint":{},"count":0}',
        b'{"state": "requested","at":0,"checkpoint":{"x":"y"},"count":0,"filter":[],"selection":{"rate":0}}',
        b'{"state":"done","at":0,"checkpoint":[],"count":0}',
    )
    return [(key, value) for key in keys for value in values]


@cache
def misleading_orders(topic: str) -> list[tuple[bytes, bytes]]:
    """Return control records that can be decoded, of which no gateway wrote any: none is about a route that exists."""
    place = f"{topic}/0"
    ranges = [({place: 5}, {}), ({place: 5}, {place: 500}), ({place: 1 << 53}, {place: 0}), ({"nowhere/7": 9}, {})]
    replays = [
        ControlRecord(
            kind="replay",
            name=f"never-{number}",
            state="requested",
            at=EPOCH,
            checkpoint=ends,
            selection=Selection(route="never", since=0.0, starts=starts, undelivered=True),
        )
        for number, (ends, starts) in enumerate(ranges)
    ]
    redeliveries = [
        ControlRecord(
            kind="redeliver",
            name=f"never-{number}",
            state="requested",
            at=EPOCH,
            redelivery=Redelivery(event="evt_never", partition=partition, offset=offset),
            last_records={place: 7},
        )
        for number, (partition, offset) in enumerate(((place, 0), (place, 1 << 53), ("nowhere/7", 0)))
    ]
    routed = {"nowhere/0": 3}
    history = [
        ControlRecord(kind="rules", name="never", state="done", at=EPOCH, revision="never", routes="x"),
        ControlRecord(kind="rules", name="never-whole", state="done", at=EPOCH, routes="x"),
        ControlRecord(kind="routed", name="never", state="done", at=EPOCH, checkpoint=routed, revision="never"),
    ]
    return [each.encode() for each in (*replays, *history, *redeliveries)]


class Process:
    """A `gateway run --role router`, as `gateway/run.py` puts it together. `name` is unique, `slot` is reused."""

    def __init__(self, world: World, slot: str, name: str, random: Random, machine: Machine) -> None:
        self.slot = slot
        self.name = name
        self.is_dead = False
        self.is_stopping = False
        self.machine = machine
        self.is_newer = slot in world.newer
        self.log = SimulatedLog(world.broker, self, random, lambda: world.min_poll_interval)
        self.force: InForce | None = None
        self._world = world
        self._version, self._rules = world.rules_versions[-1]
        self._logger = world_logger(world, name) if world._is_traced else QUIET
        self._metrics = metrics = Metrics(CollectorRegistry())
        world.metrics.append(metrics)
        self._follower = Follower(self.log, TOPICS, metrics, self._logger)
        services: dict[str, Any] = {
            "log": self.log,
            "topics": TOPICS,
            "rules": lambda: self._rules,
            "metrics": metrics,
            "logger": self._logger,
            "sleep": world.sleep,
        }
        client = SimulatedClient(self, world.sinks.__getitem__, world.ledger)
        attempts = RecordedAttempts(world.plan.attempts)
        self._worker = Worker(client=client, control=self._follower.control, attempts=attempts, **services)
        self._jobs = Jobs(follower=self._follower, **services)
        self._task: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()

    @property
    def control(self) -> Control:
        return self._follower.control

    def held(self) -> Mapping[str, int]:
        """Return what it counts as taken, of what all its destinations and its readers share."""
        worker = self._worker
        budget = worker._dispatcher._queues._budget
        members = [worker._router, *(member for member, _ in worker._ordered.values())]
        return {
            "attempts": budget._in_flight,
            "retries": budget._retries,
            "unresponsive": budget._unresponsive,
            "bytes in flight": budget._in_flight_bytes,
            "bytes of appends": worker._dispatcher._appends.memory_bytes,
            "bytes of recorded attempts": worker._attempt_log._bytes,
            "bytes of records": sum(member._memory_bytes for member in members),
            "bytes by partition": sum(
                abs(tracker.memory_bytes) for member in members for tracker in member.trackers.values()
            ),
        }

    def missed(self) -> Collection[str]:
        """Return the topics that it tells operators to be missing."""
        return sorted({each.topic for each, (_, reason) in self._worker.unread.items() if reason == NO_TOPIC})

    def check_attempts(self) -> None:
        """Check that each attempt is recorded or counted as dropped, as none waits any more."""
        dropped = sum([int(counter.value) for counter in self._metrics.attempt_records_dropped.values()])
        recorded = int(self._metrics.attempt_records.value)
        check_counts(self._world.ledger, self.name, recorded=recorded, dropped=dropped)

    def start(self) -> None:
        context = contextvars.copy_context()
        context.run(OWNER.set, self)
        self._go_by(self._version)
        self._task = self._world.loop.create_task(self._main(), context=context)

    async def _main(self) -> None:
        try:
            await self._make_topics(self._rules)
            async with asyncio.TaskGroup() as tasks:
                caught_up = asyncio.Event()
                others = [tasks.create_task(self._follower.follow(caught_up))]
                await caught_up.wait()
                worker = tasks.create_task(self._worker.run())
                others.append(tasks.create_task(self._jobs.run()))
                await self._stopped.wait()
                self._worker.stop()
                await asyncio.wait([worker])
                for task in others:
                    task.cancel()
        except BaseException as error:
            self._world.ended(self, error)
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            if not self.is_dead:
                self.check_attempts()
            self._world.ended(self, None)

    async def stop(self) -> None:
        """Stop as SIGTERM does, and return when it is over."""
        self.is_stopping = True
        self._stopped.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def reload(self, after: float) -> None:
        """Put the newest rules in force, as `run` does when the file has changed."""
        await asyncio.sleep(after)
        while not self.is_dead:
            version, rules = self._world.rules_versions[-1]
            await self._make_topics(rules)
            if self._world.rules_versions[-1][0] is not version:
                continue
            self._rules = rules
            self._go_by(version)
            self._worker.reload()
            self._world.ledger.reloaded(self.name, self._still_asleep())
            return

    def _still_asleep(self) -> Sequence[str]:
        """Return what waits in memory for longer, as the rules lacked a name that they have again."""
        now, rules = self.log.now(), self._rules
        waiting = [(until, pending) for until, _, pending in self._worker._dispatcher._queues._soon]
        return [
            f"{pending.delivery.id} until {until - now:.1f} s from now"
            for until, pending in waiting
            if pending.metadata.spill_reason == SpillReason.UNKNOWN_NAME
            and pending.delivery.route in rules.routes
            and pending.delivery.destination in rules.destinations
            and until > now + TIERS["5s"]
        ]

    async def _make_topics(self, rules: Rules) -> None:
        while not self.is_dead:
            try:
                await self.log.create(TOPICS.specs((), rules.ordered))
            except LogUnavailableError:
                await asyncio.sleep(1.0)
            else:
                return

    def _go_by(self, version: RulesVersion) -> None:
        now = self._world.now()
        if self.force is not None:
            self.force.until = now
        self.force = InForce(self.name, version, now)
        self._world.ledger.in_force.append(self.force)
        self._world.say(f"{self.name} goes by rules {version.number}")


class _Outside:
    """Who writes events and orders."""

    name = slot = "outside"
    is_dead = False

    @property
    def machine(self) -> Machine:
        return Machine(asyncio.get_running_loop())

    def __init__(self, *, is_newer: bool = False) -> None:
        self.is_newer = is_newer


MISLEADING = 84
"""The kind of poison in the control topic from which on it can be decoded."""
OUTSIDE, NEWER_OUTSIDE = _Outside(), _Outside(is_newer=True)


def world_logger(world: World, name: str) -> FilteringBoundLogger:
    """Make a logger that tells the trace."""

    def tell(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        world.say(f"{name} log: {dict(event)}")
        raise structlog.DropEvent

    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.ReturnLogger(), processors=[tell], wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)
    )
    return logger


def topic_of(plan: Plan, source: str) -> str:
    """Return the topic to which a source appends."""
    return TOPICS.events(plan.sources[0] if plan.is_shared else source)


class WatchedTable(RouteTable[Route]):
    """Reports to the ledger which process matches which event by a version of the rules."""

    def __init__(self, routes: Sequence[Route], version: RulesVersion, ledger: Ledger) -> None:
        super().__init__(routes)
        self._version = version
        self._ledger = ledger

    @override
    def match(self, view: EventView) -> list[tuple[Route, ExpressionError | None]]:
        process = OWNER.get()
        number = view.get("headers", NUMBER)
        task = asyncio.current_task()
        is_of_a_job = task is not None and task.get_name().startswith("jobs-")  # a replay's, which routes nothing
        if isinstance(process, Process) and isinstance(number, str) and not is_of_a_job:
            self._ledger.matched(process.name, int(number), self._version)
        return super().match(view)


def _rules(plan: Plan, version: RulesVersion, ledger: Ledger) -> Rules:
    routes = {route.name: _route(route) for route in version.routes}
    return Rules(
        sources={
            name: Source(
                name=name,
                path=f"/in/{name}",
                verifier=OPEN_SOURCE,
                topic=version.topics[name],
                dedupe=plan.windows.get(name),
            )
            for name in sorted(version.sources)
        },
        destinations={
            name: Destination(
                name=name,
                url=f"http://127.0.0.1:1/{name}",
                timeout=limits["timeout"],
                concurrency=limits["concurrency"],
                rate=limits["rate"],
            )
            for name, limits in plan.destinations.items()
            if name in version.destinations
        },
        routes=routes,
        egress=Egress(),
        table=WatchedTable(list(routes.values()), version, ledger),
        files=(),
    )


with naming({ITEM: ITEM}):
    OF_AN_ITEM = RequestTemplate(
        headers=(
            (MARK.decode(), Template(f"${{{{ headers['{MARK.decode()}'] }}}}")),
            (PART.decode(), Template("${{ item }}")),
        )
    )
    """The request for an item, by which the sink knows its event and which one it is."""


def _route(spec: RouteSpec) -> Route:
    return Route(
        name=spec.name,
        sources=spec.sources,
        match=None if spec.types is None else parse_condition({"type": list(spec.types)}),
        when=_failing(spec.fails) if spec.fails else None,
        destinations=spec.to,
        request=OF_AN_ITEM if spec.parts else None,
        retry=RetryPolicy(
            schedule=spec.schedule, max_attempts=spec.max_attempts, max_age=spec.max_age, jitter=spec.jitter
        ),
        order="key" if spec.is_ordered else None,
        stop=spec.stop,
        catch_all=spec.catch_all,
        delay=spec.delay,
        split=Split(Expression(str(list(range(spec.parts))))) if spec.parts else None,
        on_exhausted="halt" if spec.halts else "dead_letter",
        debounce=Debounce(key=Expression(spec.by), quiet=spec.quiet) if spec.quiet else None,
    )


def _failing(one_in: int) -> Expression:
    """Return a condition that holds, but for one of so many events, for which it fails."""
    number = f"headers['{MARK.decode()}']"
    return Expression(f"int({number}) % {one_in} != 0 || {number} + 1 == 1")


def _is_lost_log(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_lost_log(each) for each in error.exceptions)
    return isinstance(error, LogUnavailableError)


def _told(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = next(each for each in error.exceptions if not _is_lost_log(each))
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{error!r} ({' '.join(frames[-6:])})"
