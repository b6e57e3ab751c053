"""What happened in a run, row by row, and what must hold of it (the numbers are those of the design's invariants).

Rows are records, attempts and commits. A record is *finished* when each of its deliveries has had a 2xx or has an
acknowledged successor record; that is judged from what went over the wires alone, never from what the engine believes.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from typing_extensions import override

from gateway.client.request import Outbound
from gateway.engine import tiers
from gateway.engine.commit_progress import WINDOW
from gateway.engine.control.records import ControlRecord, Selection, decode
from gateway.engine.control.redelivery_records import Redelivery
from gateway.engine.delivery.destination_lanes import BURST, MAX_BYTES
from gateway.engine.delivery.retry_decision import SHORT_AGE, SHORT_ATTEMPTS
from gateway.engine.ordered.route import OWNERSHIP_CHECK_AGE
from gateway.log.base import LEADER_CLOCK_SKEW, Assignment, Commit, Partition, Record
from gateway.log.records import (
    Origin,
    StoredDelivery,
    decode_delivery,
    decode_event,
    encode_record_metadata,
    order_key_of,
    origin_of,
)
from gateway.log.topics import JOBS_GROUP, ROUTER_GROUP, TIERS, Topics
from gateway.model import (
    Attempt,
    Delivery,
    DeliveryId,
    Event,
    Part,
    Result,
    SpillReason,
    UndecodableRecordError,
    delivery_id,
    part_id,
)
from tests.simulation.broker import Client, as_newer
from tests.simulation.loop import EPOCH
from tests.simulation.plan import GRACEFUL, HANDOVER, NARROWED, RECREATE, REDELIVERED, RETENTION, Plan, RouteSpec

TOPICS = Topics()
ROUTER = TOPICS.group(ROUTER_GROUP)
SHORTEST = TOPICS.retry(tiers.SHORTEST)
MARK = b"x-sim-number"
"""A header of every event, by which the sink knows which one it is, whatever its identity says."""
PART = b"x-sim-part"
"""A header of every request for an item of an event."""
LATE = 1.0
"""Seconds that a healthy destination may wait longer than it takes, while others fail."""
REASSIGNED = 5.0
"""Seconds for which a partition may be nobody's each time it gets another owner: attempts in flight have two to end,
and the only process is back after two."""
OLDEST = 24.0
"""Seconds of age of the lowest unfinished record beside its last attempt: `MAX_STAY_IN_MEMORY` and one wait more in
memory, a second in a lane, an append and a commit."""
FAILURES = frozenset({Result.SERVER_ERROR, Result.TIMEOUT, Result.CONNECT, Result.DNS})
"""What tells that a destination is down: a 429 asks for patience, and a 404 is about the event."""
ORDERED = TOPICS.group("ordered.")
OF_EVENTS = (TOPICS.events(""), TOPICS.retry(""), TOPICS.dead, TOPICS.parked, ORDERED)
"""What topics of events and deliveries begin with."""
CLOCK_ERROR = 5.0
"""Seconds by which a process may misjudge the log's time: it hears of it with each append, and its clock drifts."""
PAUSE_LAG = 2.0
"""Seconds within which every process has read an order."""
COMMIT_LAG = 60.0
"""Seconds within which it is committed that a delivery has ended, also while a long quiet time is slept through."""
UNKNOWN_SEEN = 300.0
"""Seconds within which surely somebody has looked whether a name is known by now."""
STARTED_WITHIN = 8.0
"""Seconds in which processes that start one after the other take everything from each other."""

Target = tuple[str, str]
Key = tuple[int, str]
"""The number of an event, and the id of a delivery."""


class Violation(NamedTuple):
    """An invariant that doesn't hold, and the rows concerned."""

    invariant: str
    text: str
    rows: Sequence[str]

    @override
    def __str__(self) -> str:
        return "\n".join([f"{self.invariant}: {self.text}", *[f"    {row}" for row in self.rows]])


@dataclass(frozen=True, slots=True)
class RulesVersion:
    """One version of the rules."""

    number: int
    sources: frozenset[str]
    destinations: frozenset[str]
    routes: tuple[RouteSpec, ...]
    topics: Mapping[str, str]
    """To which topic each source of the plan appends."""

    def targets(self, event: Event) -> frozenset[Target]:
        """Return the routes and destinations that an event is for."""
        if event.source not in self.sources:
            return frozenset()
        return frozenset((route.name, to) for route in self.taking(event) for to in route.to)

    def taking(self, event: Event) -> list[RouteSpec]:
        """Return the routes that take an event: as long as none with `stop` does, and a catch-all if no other does."""
        taking: list[RouteSpec] = []
        for is_last_resort in (False, True):
            for route in self.routes if not taking else ():
                if route.catch_all is is_last_resort and route.matches(event.source, event.type):
                    taking.append(route)
                    if route.stop:
                        break
        return taking

    def names(self, delivery: Delivery) -> bool:
        """Return whether a delivery is for what the rules know."""
        if not delivery.route:
            return delivery.event.source in self.sources
        return delivery.destination in self.destinations and any(each.name == delivery.route for each in self.routes)


@dataclass(slots=True)
class InForce:
    """When a process went by a version of the rules."""

    process: str
    version: RulesVersion
    since: float
    until: float | None = None


class Reading(NamedTuple):
    """By which rules a process has matched an event, and when."""

    at: float
    process: str
    version: RulesVersion


class Takeover(NamedTuple):
    """When a partition got an owner, and whether nothing was committed of it before."""

    at: float
    is_first: bool


@dataclass(slots=True, eq=False)
class Row:
    """A record. `event` is None where it can't be read, `stored` where it isn't a delivery."""

    partition: Partition
    offset: int
    at: float
    writer: str
    value: bytes
    appended_at: float
    """By the clock of its partition's leader, as a Unix time."""
    number: int = -1
    event: Event | None = None
    stored: StoredDelivery | None = None
    origin: Origin | None = None
    """Of a record of an ordered route: the event's record, whose place in the order it has."""
    is_acknowledged: bool = False
    is_deleted: bool = False
    is_left: bool = False
    """Whether it was uncommitted when the owner of its partition was killed, evicted or released it."""
    is_of_evicted: bool = False
    """Whether its writer had been evicted when it sent it, and didn't know."""
    is_of_newer: bool = False
    """Whether a newer version has written it, in a format of its own."""
    gone_at: float = math.inf
    """When its topic was deleted, to be recreated."""

    @override
    def __str__(self) -> str:
        where = f"{self.at:9.3f} record {self.partition.topic}/{self.partition.number}@{self.offset} by {self.writer}"
        deleted = ", deleted" if self.is_deleted else ""
        return f"{where}: {self.what()}{'' if self.is_acknowledged else ', not acknowledged'}{deleted}"

    def what(self) -> str:
        if self.stored is None:
            return "what can't be read" if self.event is None else f"event {self.number}"
        delivery = self.stored.delivery
        return (
            f"{delivery.route}→{delivery.destination} of event {self.number}, successor {delivery.successor}, "
            f"{len(delivery.attempts)} attempts, {encode_record_metadata(self.stored.metadata)}"
        )


@dataclass(slots=True, eq=False)
class ObservedAttempt:
    """An attempt."""

    process: str
    number: int
    delivery: str
    route: str
    destination: str
    attempt: int
    began: float
    is_timed: bool = True
    """Whether its process has to know the log's clock: one that has asked for it in vain goes by its own."""
    ended: float | None = None
    result: Attempt | None = None
    is_cut: bool = False
    """Whether its process has cut it off, and may have ended with that."""

    @override
    def __str__(self) -> str:
        end = (
            "never ended" if self.ended is None or self.result is None else f"{self.result.result} at {self.ended:.3f}"
        )
        return (
            f"{self.began:9.3f} attempt {self.attempt} by {self.process} of event {self.number} "
            f"{self.route}→{self.destination}: {end}"
        )


@dataclass(slots=True)
class Trail:
    """What is known of one delivery of one event."""

    attempts: list[ObservedAttempt] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    is_carried: bool = False
    """Whether there are rows of it, or of the whole event of which it is an item."""
    is_delivered: bool = False
    is_dead: bool = False
    ended_at: float = math.inf
    """When it first had a success, or a dead letter."""
    successor: int = 0  # acknowledged
    written: int = 0  # stored
    allowed_repeats: int = 0
    allowed_repeats_if_unordered: int = 0
    """Repeats that are allowed besides, unless its route keeps the order."""
    lives: set[float] = field(default_factory=set)


@dataclass(slots=True)
class Readings:
    """By which rules events were matched, by their numbers."""

    of: dict[int, list[Reading]] = field(default_factory=lambda: defaultdict(list))
    committed: dict[int, RulesVersion] = field(default_factory=dict)
    """The rules that the committing process matched it by."""
    committed_by: dict[int, str] = field(default_factory=dict)
    """That process."""


@dataclass(slots=True)
class Deletions:
    """Unfinished records that the log has deleted."""

    lost: dict[tuple[str, Partition], set[int]] = field(default_factory=lambda: defaultdict(set))
    """Those that no commit of a group covered."""
    unreportable: dict[tuple[str, Partition], set[int]] = field(default_factory=lambda: defaultdict(set))
    """Of these, the ones nobody can know of: the group hadn't committed anything, or the log's start wasn't known."""
    reported: Counter[str] = field(default_factory=Counter)
    """How many deleted records of each topic were reported to members, at most."""
    excused_deliveries: dict[Key, int] = field(default_factory=dict)
    """The deliveries concerned, and the furthest step of each that was deleted."""
    recreated_at: dict[Partition, float] = field(default_factory=dict)
    """When a topic was last recreated."""
    events: dict[int, Row] = field(default_factory=dict)
    """The records of events that were deleted with their topic, by their numbers."""
    left_to_kicks: list[tuple[str, Mapping[str, int], float]] = field(default_factory=list)
    """For which names what routers held of the tiers was left to a kick, up to where, and since when."""


class Ledger:
    """The witness of everything."""

    def __init__(self, plan: Plan, now: Callable[[], float], say: Callable[[str], None]) -> None:
        self.plan = plan
        self.violation: Violation | None = None
        self.events: dict[int, Event] = {}
        self.rows: dict[Partition, dict[int, Row]] = defaultdict(dict)
        self.trails: dict[Key, Trail] = defaultdict(Trail)
        self.in_force: list[InForce] = []
        self._readings = Readings()
        self.attempts: list[ObservedAttempt] = []
        self.dead_values, self.attempt_records = set[bytes](), defaultdict[str, list[Record]](list)  # by their writers
        self.commits: dict[tuple[str, Partition], Commit] = {}
        self.appended, self._takeovers = Counter[str](), defaultdict[Partition, list[Takeover]](list)
        self._routes = {route.name: route for route in plan.routes}
        self.touched = Counter[str]()
        """How many orders of a name may each repeat its deliveries."""
        self.expedited: dict[str, float] = {}
        """Names of which an order may bring deliveries on before they are due, and since when."""
        self._covered: dict[tuple[str, Partition], set[int]] = defaultdict(set)
        self._under_way: Counter[tuple[str, str]] = Counter()
        self._begun: defaultdict[tuple[str, str], deque[float]] = defaultdict(deque)
        self._begun_by_all: defaultdict[str, deque[ObservedAttempt]] = defaultdict(deque)
        self._is_still = set(plan.faults) <= {"trouble", "gap", "poison", "order"}
        """No process takes anything from another, once all are there."""
        self._is_time_sure = not {"step", "append"} <= set(plan.faults)
        """No process has to begin by its own clock, though that is wrong: the log takes an append."""
        self._quiet: dict[tuple[str, str], tuple[float, float]] = {}
        """Since when and until when a destination has asked a process for silence."""
        self._paused_at: dict[str, float] = {}
        self._unreadable_until = 0.0
        self._zombies: set[str] = set()
        self._evicted_at: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._loose: dict[str, set[Key]] = defaultdict(set)
        """What a process may have in flight from revoked partitions: a late append, an attempt that hangs."""
        self._replays, self._redeliveries = list[_Replay](), dict[str, _Redelivery]()
        self._kicks: dict[str, dict[int, float]] = {}
        """When kicks were given that aren't answered yet, by key and offset."""
        self._owners_killed, self._kicks_again, self._newer_resolved_until = 0, Counter[str](), -math.inf
        """How often a process died that owned the jobs; how many more kicks of a name were announced than given; and
        until when dead letters were stored that a newer version's command may have resolved."""
        self._kicked: defaultdict[str, list[float]] = defaultdict(list)
        """When breakers were kicked, by destination."""
        self._resolutions: list[tuple[ControlRecord, float]] = []
        self._resolved_at: dict[str, float] = {}
        """When commands for dead letters were reported done."""
        self._incomplete: set[str] = set()  # commands for dead letters that report an unread partition
        self._deletions = Deletions()
        self._appended: dict[tuple[Partition, int, float], Row] = {}
        """All rows, those of topics that are gone, too."""
        self._identities: dict[tuple[Partition, str, bytes], list[Row]] = defaultdict(list)
        self._targets = list(_all_targets(plan))
        self._now = now
        self._say = say

    def violate(self, invariant: str, text: str, rows: Iterable[object] = ()) -> None:
        """Note what doesn't hold; the first counts."""
        if self.violation is None:
            self.violation = Violation(invariant, f"at {self._now():.3f} s: {text}", [str(row) for row in rows])
            self._say(f"VIOLATION {invariant}: {text}")

    # The log's witness.

    def stored(self, client: Client, partition: Partition, record: Record, *, by_evicted: bool) -> None:
        record = as_newer(record)
        if partition.topic == TOPICS.control:
            with suppress(UndecodableRecordError):
                self._see_order(order := decode(record.key, record.value), record.offset)
                if client.is_newer and order.kind == "dead":
                    self._newer_resolved_until = record.appended_at + LEADER_CLOCK_SKEW
        if partition.topic == TOPICS.attempts:
            self.attempt_records[client.name].append(record)
        if not partition.topic.startswith(OF_EVENTS):
            return
        row = Row(partition, record.offset, self._now(), client.name, record.value, record.appended_at)
        row.is_of_evicted = by_evicted or self.is_zombie(client.name)
        row.is_of_newer = client.is_newer
        self.rows[partition][record.offset] = row
        self._appended[partition, record.offset, record.appended_at] = row
        self.appended[partition.topic] += 1
        try:
            if partition.topic.startswith(TOPICS.events("")):
                row.event = decode_event(record)
            else:
                row.stored = decode_delivery(record)
                row.event = row.stored.delivery.event
                row.origin = origin_of(record)
        except UndecodableRecordError:
            if partition.topic == TOPICS.dead:
                self.dead_values.add(record.value)
            return
        row.number = int(dict(row.event.headers)[MARK])
        if row.stored is not None:
            self._carried(row, row.stored)
            # What an ordered route's topic has twice is told apart there, and made once.
            is_one_of_two = row.origin is not None and self._was_ordered(row.stored.delivery.route)
            self.trails[row.number, row.stored.delivery.id].allowed_repeats_if_unordered += is_one_of_two
            for key in () if is_one_of_two else self._keys(row):  # each that an unknown source may come to
                self._see_whose(client.name, key, is_over=client.is_dead or by_evicted)
        else:
            self._identities[partition, row.event.id, row.event.body].append(row)
        self._say(f"{row.what()} is stored by {row.writer} at {partition.topic}/{partition.number}@{record.offset}")

    def _carried(self, row: Row, stored: StoredDelivery) -> None:
        delivery = stored.delivery
        trail = self.trails[row.number, delivery.id]
        trail.rows.append(row)
        trail.written = max(trail.written, delivery.successor)
        if len(trail.rows) % 64 == 0:
            self._see_how_many(trail)
        expected = self.events[row.number]
        if replace(delivery.event, received_at=expected.received_at) != expected:
            self.violate("6 bytes", "the event of a successor isn't what was received", [row])
        items = self._items_of(delivery.id, delivery.route) if delivery.part is None else []
        for each in (trail, *[self.trails[row.number, name] for name in items]):
            each.is_carried = True
            if delivery.replayed_at:
                each.lives.add(delivery.replayed_at)
        self._see_times(row, delivery, trail)
        if row.partition.topic == TOPICS.dead:
            reason = stored.metadata.dead_reason
            trail.is_dead = True
            trail.ended_at = min(trail.ended_at, row.at)
            tried = len(delivery.attempts)
            if reason in ("expired", "exhausted", "permanent", "gone") and not tried:
                self.violate("7 nothing ends untried", f"dead as {reason} without an attempt", [row])
            if reason in ("expired", "exhausted", "permanent", "gone", "expression_error") and self._halts(delivery):
                self.violate("22 order", "a route that halts dead-lettered", [row])
            if reason == "bug":
                self.violate("no bug", f"a delivery was dead-lettered as a bug: {stored.metadata}", [row])
            why = self._why_not(reason, row, delivery, trail)
            if why:
                self.violate("7 ends have their reason", f"dead as {reason}, but {why}", self._told(trail))

    def _items_of(self, whole: str, route: str) -> list[DeliveryId]:
        """Return the ids of the deliveries of an event's items instead of the one of all of it; none if it is one."""
        parts = self._routes[route].parts if route in self._routes else 0
        return [part_id(DeliveryId(whole), _part(number)) for number in range(parts)]

    def _delay(self, route: str) -> float:
        return self._routes[route].delay if route in self._routes else 0.0

    def _made_of(self, number: int, event: Event, target: Target) -> list[DeliveryId]:
        """Return the ids of the deliveries that an event becomes by a route and destination.

        One of the whole event, if that is what goes on until it is split.
        """
        whole = delivery_id(event.id, *target)
        return [whole] if self._goes_on(number, whole) else self._items_of(whole, target[0]) or [whole]

    def _ends_of(self, event: Event, target: Target) -> list[DeliveryId]:
        """Return the ids of the deliveries that have an end once an event has: of its items, if it is split."""
        whole = delivery_id(event.id, *target)
        return self._items_of(whole, target[0]) or [whole]

    def _see_times(self, row: Row, delivery: Delivery, trail: Trail) -> None:
        """Check that what is told of an attempt is the log's time, whatever the clock of the process says."""
        for attempt in delivery.attempts:
            attempts = [each for each in trail.attempts if each.attempt == attempt.number]
            if all(
                each.is_timed and abs(attempt.at - EPOCH - each.began) > 2 * self.plan.skew + CLOCK_ERROR
                for each in attempts
            ):
                told = f"attempt {attempt.number} is told to have begun at {attempt.at - EPOCH:.3f}"
                self.violate("23 one clock", told, [row, *self._told(trail)])

    def _policies(self, delivery: Delivery, trail: Trail, until: float) -> list[RouteSpec]:
        """Return the policies by one of which it was decided what followed from a delivery's last attempt."""
        last = delivery.attempts[-1].number
        since = min([each.began for each in trail.attempts if each.attempt == last], default=0.0)
        return [
            route
            for version in self.rules_versions(since, until)
            for route in version.routes
            if route.name == delivery.route
        ]

    def _why_not(self, reason: str, row: Row, delivery: Delivery, trail: Trail) -> str:
        """Return why a delivery can't have ended for this reason, or nothing."""
        if reason == "route_removed":
            return self._was_known(row, delivery)
        if reason == "expression_error":
            failing = [each for each in self._specs(delivery.route) if each.fails and not row.number % each.fails]
            return "" if failing else "no condition fails for it"
        if reason not in ("exhausted", "expired", "permanent", "gone"):
            return "nothing leads to it here"
        policies = self._policies(delivery, trail, row.at) if delivery.attempts else []
        if not policies:
            return ""  # whoever decided it is gone
        last = delivery.attempts[-1]
        least, least_age = min(each.max_attempts for each in policies), min(each.max_age for each in policies)
        asked = [
            each.result.retry_after or 0.0 for each in trail.attempts if each.attempt == last.number and each.result
        ]
        most = max(_most_delay(last, policy) for policy in policies)
        due = last.at + last.seconds + max([most, *asked]) + 1.0  # a record doesn't tell how long it was asked to wait
        if self.plan.skew or not self._is_time_sure:
            due = math.inf
        age = max(due, EPOCH + row.at) - self._age_began_at(row.number, delivery)
        refusals = list(takewhile(_is_refusal, reversed(delivery.attempts)))
        is_refused = bool(refusals) and (len(refusals) >= SHORT_ATTEMPTS or due > refusals[-1].at + SHORT_AGE)
        return {
            "exhausted": "" if last.number >= least else f"it may have {least} attempts",
            "expired": "" if age > least_age else f"it had {least_age:.0f} s",
            "gone": "" if last.status == 410 else f"the last status is {last.status}",
            "permanent": "" if is_refused else f"it was refused {len(refusals)} times",
        }[reason]

    def _age_began_at(self, number: int, delivery: Delivery) -> float:
        """Return since when a delivery has grown old, at the earliest: since its replay, or the end of its delay.

        A kick of its route ends the delay, of what may have been split since, too: once it has announced itself, and
        when the record that it has expedited was due. A kick of its destination ends none, and no kick prolongs one.
        `plans/expired-since-a-kick-ended-its-delay.json` needs it.
        """
        # By rules by which it kept an order, it had no delay.
        ends = [delivery.event.received_at + min([each.delay for each in self._specs(delivery.route)], default=0.0)]
        names = [delivery.id]
        if (part := delivery.part) is not None:
            wholes = self._ids(delivery.event, delivery.route, delivery.destination)
            names += [DeliveryId(name) for name in wholes if part_id(DeliveryId(name), part) == delivery.id]
        for trail in [self.trails.get((number, name), Trail()) for name in names]:
            stored = [(row, row.stored) for row in trail.rows if row.stored is not None]
            for step in [each.delivery for _, each in stored if each.metadata.is_expedited]:
                if step.replayed_at == delivery.replayed_at:
                    before = [row for row, each in stored if each.delivery.successor == step.successor - 1]
                    ends += [max(EPOCH + at, step.due) for row in before for at in self._kicked_with(row)]
        return max(delivery.replayed_at, min(ends))

    def _kicked_with(self, row: Row) -> Iterator[float]:
        """Yield when kicks of its route announced themselves that were of a record."""
        if row.stored is not None:
            name, place = f"route/{row.stored.delivery.route}", _place(row.partition)
            for kicked, ends, at in self._deletions.left_to_kicks:
                if kicked == name and row.offset < ends.get(place, 0):
                    yield at

    def _specs(self, route: str) -> list[RouteSpec]:
        """Return a route as it was, or is, by rules that some process went by."""
        return [each for force in self.in_force for each in force.version.routes if each.name == route]

    def _was_known(self, row: Row, delivery: Delivery) -> str:
        """Return when the rules named what a delivery is for within the hour before it ended as nobody's."""
        if not self._is_time_sure:
            return ""
        at = row.at - 3600.0 + 2 * self.plan.skew + 1.0
        while at < row.at:
            versions = list(self.rules_versions(at, at + UNKNOWN_SEEN))
            if versions and all(version.names(delivery) for version in versions):
                return f"it was known from {at:.0f} s on"
            at += UNKNOWN_SEEN / 2
        return ""

    def _halts(self, delivery: Delivery) -> bool:
        """Return whether it waits for an operator instead of ending; a replay of it has no order to keep."""
        routes = self._specs(delivery.route)
        return not delivery.replayed_at and bool(routes) and all(route.halts for route in routes)

    def acknowledged(self, partition: Partition, record: Record) -> None:
        row = self._appended.get((partition, record.offset, record.appended_at))
        if row is None:
            return
        row.is_acknowledged = True
        if row.stored is not None:
            trail = self.trails[row.number, row.stored.delivery.id]
            trail.successor = max(trail.successor, row.stored.delivery.successor)
        if row.gone_at < math.inf:
            self._see_gone(row)

    def unacknowledged(self, partition: Partition, record: Record) -> None:
        row = self._appended.get((partition, record.offset, record.appended_at))
        if row is not None and row.stored is not None and row.origin is None:
            for key in self._keys(row):  # its items', too, if it is split later
                self.trails[key].allowed_repeats += 1

    def committed(self, client: Client, group: str, partition: Partition, commit: Commit, *, is_stale: bool) -> None:
        """Note what is done by a commit. One that is stale speaks of a topic of that name that is gone."""
        if not group.startswith((ROUTER, TOPICS.group("ordered/"))):
            return
        self._say(
            f"commit by {client.name} to {group} of {partition.topic}/{partition.number}: {_offsets_done(commit)}"
        )
        if is_stale:
            return
        self.commits[group, partition] = commit
        covered = self._covered[group, partition]
        if covered.difference(covers(commit, covered)):
            self.violate(
                "2 no commit goes back",
                f"{client.name} committed {group} of {partition}: {_offsets_done(commit)}",
            )
        for offset in covers(commit, self.rows[partition].keys() - covered):
            covered.add(offset)
            row = self.rows[partition][offset]
            is_to_match = row.stored is None or not row.stored.delivery.route
            if group == ROUTER and is_to_match and (readings := self._readings_by(client.name, row)):
                self._readings.committed[row.number] = readings[-1].version
                self._readings.committed_by[row.number] = client.name
            unfinished = [] if self._is_forgone(row) else self._unfinished(row, group, reader=client.name)
            if unfinished:
                self.violate(
                    "2 no commit covers an unfinished delivery",
                    f"{client.name} committed {group} {partition.topic}/{partition.number}@{offset}",
                    [row, *self.story(row.number, unfinished)],
                )

    def seeded(self, group: str, partition: Partition, commit: Commit) -> None:
        """Note where a new group begins: what is before that is not its own."""
        self._covered[group, partition].update(covers(commit, self.rows[partition].keys()))

    def deleted(self, partition: Partition, start: int) -> None:
        """Note what is there no more; of what wasn't done of it no end is demanded, but it is to be counted."""
        group = group_of(partition)
        covered = self._covered[group, partition]
        commit = self.commits.get((group, partition))
        for offset, row in self.rows[partition].items():
            if offset >= start or row.is_deleted:
                continue
            row.is_deleted = True
            if row.stored is not None and row.origin is not None and (commit is None or offset >= commit.base):
                # The next owner would read there that the event has come: a router that appends it again repeats it.
                self.trails[row.number, row.stored.delivery.id].allowed_repeats += 1
            if offset not in covered:
                self._deletions.lost[group, partition].add(offset)
                self._say(f"{partition.topic}/{partition.number}@{offset} is deleted: {row.what()}")
                self._excuse(row)

    def _excuse(self, row: Row) -> None:
        """Demand no end of what a record carries, up to its step."""
        step = 0 if row.stored is None else row.stored.delivery.successor
        excused_deliveries = self._deletions.excused_deliveries
        excused_deliveries.update({key: max(excused_deliveries.get(key, 0), step) for key in self._keys_of_all(row)})

    def recreated(self, partition: Partition) -> None:
        """Note that an operator has deleted a topic, which begins anew: what was in it is nowhere any more."""
        rows = self.rows.pop(partition, {})
        for row in rows.values():
            row.is_deleted, row.gone_at = True, self._now()
            if row.stored is None and row.event is not None:
                self._deletions.events[row.number] = row
        for row in rows.values():
            self._see_gone(row)
        self._covered.pop((group_of(partition), partition), None)
        self.commits.pop((group_of(partition), partition), None)
        self._deletions.recreated_at[partition] = self._now()
        if partition.topic == TOPICS.control:  # what was asked for before comes before all that is in the new one
            self._kicks = {key: {-1: min(asked.values())} for key, asked in self._kicks.items() if asked}
        self._say(f"{_place(partition)} is recreated")

    def _see_gone(self, row: Row) -> None:
        """Demand no end of what was nowhere but in a topic that was deleted; nobody knows how much that was.

        What wasn't acknowledged, nor is a duplicate of what was, is carried by the record before it still; and a dead
        letter is an end.
        """
        group = group_of(row.partition)
        is_carried = row.stored is None or self._is_carried_here(row)
        is_open = is_carried and row.offset not in self._covered[group, row.partition]
        if is_open and row.partition.topic != TOPICS.dead and self._unfinished(row, group):
            self._excuse(row)
            self._say(f"{_place(row.partition)}@{row.offset} is deleted with its topic: {row.what()}")

    def _is_carried_here(self, row: Row) -> bool:
        """Return whether the step of a record was acknowledged: of this one, or of a duplicate."""
        if row.stored is None:
            return False
        delivery = row.stored.delivery
        return self.trails[row.number, delivery.id].successor >= delivery.successor

    def restarted(self, group: str, partitions: Collection[Partition]) -> None:
        """What was begun before a member saw that a topic was recreated may be done once more from its start."""
        self.hit(group, partitions)

    def _keys_of_all(self, row: Row) -> Iterator[Key]:
        """Yield what a record is for, as one of an unknown source, too."""
        if row.event is not None:
            yield from self._keys(row)
            if row.stored is None or not row.stored.delivery.route:
                yield row.number, delivery_id(row.event.id, "", "")

    def took_over(self, group: str, assignment: Assignment, *, is_first: bool) -> None:
        """Note what a new owner is told to be deleted; nobody can tell it where nothing was committed before."""
        partition, commit, start, *_ = assignment
        self._takeovers[partition].append(Takeover(self._now(), is_first))
        if is_first:
            lost = self._deletions.lost[group, partition]
            self._deletions.unreportable[group, partition].update(each for each in lost if each < start)
        self._deletions.reported[partition.topic] += sum(
            not commit.covers(offset) for offset in range(commit.base, start)
        )

    def records_deleted(self, group: str, partition: Partition, deleted: range, *, is_told: bool) -> None:
        if is_told:
            self._deletions.reported[partition.topic] += len(deleted)
        else:
            lost = self._deletions.lost[group, partition]
            self._deletions.unreportable[group, partition].update(each for each in lost if each in deleted)

    def is_open(self, partition: Partition) -> bool:
        """Return whether a partition has records that aren't committed."""
        covered = self._covered[group_of(partition), partition]
        return any(offset not in covered and not row.is_deleted for offset, row in self.rows[partition].items())

    def gave_up(self, client: Client, group: str, partitions: Collection[Partition]) -> None:
        """What was begun and isn't committed may be done once more by the next owner."""
        self._say(f"{client.name} released {len(partitions)} partitions of {group}")
        self._loose[client.name] |= self.hit(group, partitions)
        if group == ROUTER:
            self._zombies.discard(client.name)

    def evicted(self, client: Client, group: str, partitions: Collection[Partition]) -> None:
        self._evicted_at[client.name, group].append(self._now())
        self._say(f"{client.name} was evicted from {group}")
        self.hit(group, partitions)
        self._zombies.add(client.name)

    def is_zombie(self, name: str) -> bool:
        return name in self._zombies

    def died(self, name: str, owned: Mapping[str, Collection[Partition]]) -> None:
        for group, partitions in owned.items():
            self.hit(group, partitions)
        self._owners_killed += bool(owned.get(TOPICS.group(JOBS_GROUP)))
        self._zombies.discard(name)

    def hit(self, group: str, partitions: Collection[Partition]) -> set[Key]:
        """Allow each delivery that was begun from an uncommitted record to be made once more; return the others."""
        others: set[Key] = set()
        for partition in partitions:
            covered = self._covered[group, partition]
            for offset, row in self.rows[partition].items():
                if offset in covered or row.event is None:
                    continue
                row.is_left = True
                is_kept = bool(self._nowhere(row).rows)
                for key in self._keys(row):
                    trail = self.trails[key]
                    if row.stored is None and self._is_sequenced(trail):
                        trail.allowed_repeats_if_unordered += 1  # appended again perhaps, and not attempted again
                        continue
                    if trail.attempts or trail.is_carried or is_kept:
                        trail.allowed_repeats += 1
                    else:
                        others.add(key)
        return others

    def _is_sequenced(self, trail: Trail) -> bool:
        """Return whether a delivery has its place in the order of a route that keeps one, and always has."""
        first = next((row for row in trail.rows if row.origin is not None), None)
        return first is not None and first.stored is not None and self._was_ordered(first.stored.delivery.route)

    def _was_ordered(self, route: str, since: float = 0.0) -> bool:
        """Return whether a route kept the order by all rules in force since a time."""
        versions = self.rules_versions(since, self._now())
        return all(each.is_ordered for version in versions for each in version.routes if each.name == route)

    def _was_keyed_alike(self, route: str) -> bool:
        """Return whether a route kept the order by all rules in force, and by the same key.

        What it has in its topic by two keys, it can't tell apart.
        """
        versions = self.rules_versions(0.0, self._now())
        keys = {each.quiet and each.by for version in versions for each in version.routes if each.name == route}
        return self._was_ordered(route) and len(keys) <= 1

    # Attempts.

    def begin(
        self, process: str, destination: str, outbound: Outbound, attempt: int, *, is_timed: bool
    ) -> ObservedAttempt:
        headers = dict(outbound.headers)
        number = int(headers[MARK])
        event = self.events[number]
        made = ObservedAttempt(
            process=process,
            number=number,
            delivery=headers[b"gateway-delivery-id"].decode(),
            route=headers[b"gateway-route"].decode(),
            destination=destination,
            attempt=attempt,
            began=self._now(),
            is_timed=is_timed,
        )
        part = headers.get(PART)
        is_whole = outbound.body == event.body and outbound.headers[: len(event.headers)] == event.headers
        if not is_whole if part is None else outbound.body != part:
            self.violate("6 bytes", "the sink got other bytes than the sender sent", [made])
        ids = list(self._ids(event, made.route, destination))
        if part is not None:
            ids = [part_id(DeliveryId(each), _part(int(part))) for each in ids]
        if made.delivery not in ids or (part is None) is bool(self._items_of("", made.route)):
            self.violate("6 ids", "the delivery's id isn't that of its event, route and destination", [made])
        self.attempts.append(made)
        trail = self.trails[number, made.delivery]
        trail.attempts.append(made)
        self._see_limits(made)
        self._see_whose(process, (number, made.delivery))
        self._see_when(made, trail)
        return made

    def _ids(self, event: Event, route: str, destination: str) -> Iterator[str]:
        """Yield the ids that a delivery may have: if replayed, with the place of its record, or of its original's."""
        yield delivery_id(event.id, route, destination)
        if self._replays or self._redeliveries:
            for row in self._identities_of(event):
                if row.event is not None and row.event.body == event.body:
                    yield delivery_id(event.id, route, destination, f"{_place(row.partition)}@{row.offset}")

    def _identities_of(self, event: Event) -> Iterator[Row]:
        for (_, name, _), rows in self._identities.items():
            if name == event.id:
                yield from rows

    def _see_whose(self, process: str, key: Key, *, is_over: bool = False) -> None:
        """Allow a repetition of what is done for a partition that is another's by now."""
        loose = self._loose[process]
        if process in self._zombies or is_over or key in loose:
            self.trails[key].allowed_repeats += 1
            loose.discard(key)

    def _see_limits(self, made: ObservedAttempt) -> None:
        """Check that a destination gets no more at once than it takes, and nothing where it shall have silence."""
        lane = made.process, made.destination
        self._under_way[lane] += 1
        if self._under_way[lane] > self.plan.destinations[made.destination]["concurrency"]:
            self.violate("24 no more than its cap", f"{self._under_way[lane]} attempts at once", [made])
        if self._is_still and made.began > STARTED_WITHIN:
            self._see_limits_of_all(made)
        # With a clock that jumps it may end early, and a destination that was away is begun with anew.
        is_sure = not self.plan.skew and self._is_time_sure and "reload" not in self.plan.faults
        since, quiet_until = self._quiet.get(lane, (0.0, 0.0))
        # A kick ends it, in each process as soon as that hears of it.
        is_kicked = any(at <= made.began and since <= at + PAUSE_LAG for at in self._kicked[made.destination])
        if is_sure and made.began < quiet_until - 0.01 and not is_kicked:
            self.violate("17 throttled is silent", f"it had asked for silence until {quiet_until:.3f}", [made])
        rate = self.plan.destinations[made.destination]["rate"]
        if rate is not None:
            begun = self._begun[lane]
            begun.append(made.began)
            while begun[0] <= made.began - 1.0:
                begun.popleft()
            if len(begun) > rate + max(1.0, BURST * rate) + 1:
                self.violate("24 no more than its rate", f"{len(begun)} attempts within a second", [made])
        for name in _names(made) & self._paused_at.keys():
            heard_at = max(self._paused_at[name], self._unreadable_until) + PAUSE_LAG
            if "slow" not in self.plan.faults and made.began > heard_at:
                self.violate("12 paused is silent", f"{name} was paused at {self._paused_at[name]:.3f}", [made])

    def _see_limits_of_all(self, made: ObservedAttempt) -> None:
        """Check that all processes together keep the limits: each of them rounds its share up."""
        limits = self.plan.destinations[made.destination]
        begun = self._begun_by_all[made.destination]
        begun.append(made)
        under_way = sum(each.ended is None for each in begun)
        if under_way > limits["concurrency"] + self.plan.processes:
            self.violate("24 no more than its cap", f"{under_way} attempts of all processes at once", [made])
        while begun[0].began <= made.began - 1.0 and begun[0].ended is not None:
            begun.popleft()
        rate = limits["rate"]
        lately = sum(each.began > made.began - 1.0 for each in begun)
        if rate is not None and lately > rate + self.plan.processes * (max(1.0, BURST * rate) + 1):
            self.violate("24 no more than its rate", f"{lately} attempts of all processes within a second", [made])

    def paused(self, name: str) -> None:
        self._paused_at.setdefault(name, self._now())

    def deaf(self, until: float) -> None:
        """Note until when nobody can read what is ordered."""
        self._unreadable_until = max(self._unreadable_until, until)

    def resumed(self, name: str) -> None:
        self._paused_at.pop(name, None)

    def end(self, made: ObservedAttempt, attempt: Attempt) -> None:
        made.ended, made.result = self._now(), attempt
        lane = made.process, made.destination
        self._under_way[lane] -= 1
        if attempt.retry_after and attempt.status in (429, 503):
            since, until = self._quiet.get(lane, (0.0, 0.0))
            is_lifted = any(since <= at + PAUSE_LAG for at in self._kicked[made.destination])
            self._quiet[lane] = made.ended, max(0.0 if is_lifted else until, made.ended + attempt.retry_after)
        if attempt.result is Result.SUCCESS:
            trail = self.trails[made.number, made.delivery]
            trail.is_delivered = True
            trail.ended_at = min(trail.ended_at, made.ended)
        self._say(str(made)[10:])

    def _see_when(self, made: ObservedAttempt, trail: Trail) -> None:
        """Check that an attempt isn't early, and isn't one too many."""
        policies = [route for force in self.in_force for route in force.version.routes if route.name == made.route]
        self._see_delay(made, trail, policies)
        if policies and made.attempt > max(policy.max_attempts for policy in policies):
            self.violate("7 attempts", "more attempts than the policy allows", trail.attempts)
        before = [each for each in trail.attempts if each.attempt == made.attempt - 1]
        if (
            made.attempt == 1
            or any(made.began >= self.expedited.get(name, math.inf) for name in _names(made))
            or self.plan.skew
            or not self._is_time_sure
            or not all(each.is_timed for each in (made, *before))  # when it is due was said by the one before
            or not policies
        ):
            return
        ends = [each.ended + _least_delay(each, policies) for each in before if each.ended is not None]
        if not ends or made.began < min(ends) - 0.01:
            self.violate("7 not before it is due", "an attempt is early", trail.attempts)
        begins = self.events[made.number].received_at - EPOCH + self._delay(made.route)
        begins = max([begins, *[row.at + self._longest_quiet(row) for row in trail.rows]])
        latest = begins + max(policy.max_age for policy in policies)
        if ends and min(ends) > latest + 0.1 and not trail.lives:
            self.violate("7 nothing is tried for ever", f"planned {min(ends) - latest:.3f} s too late", trail.attempts)

    # What is finished.

    def _see_delay(self, made: ObservedAttempt, trail: Trail, policies: Sequence[RouteSpec]) -> None:
        """Check that an event isn't delivered before its route's delay is over, unless that route was kicked."""
        is_sure = not self.plan.skew and self._is_time_sure and made.is_timed
        is_kicked = made.began >= self.expedited.get(f"route/{made.route}", math.inf)
        if made.attempt > 1 or not policies or not is_sure or is_kicked:
            return
        due = self.events[made.number].received_at - EPOCH + min(policy.delay for policy in policies)
        if made.began < due - 0.01:
            self.violate("39 not before its delay is over", f"{due - made.began:.3f} s early", trail.attempts)

    def rules_versions(self, since: float, until: float, process: str | None = None) -> Iterator[RulesVersion]:
        """Yield the versions of the rules by which some process went in that time, or this one."""
        for force in self.in_force:
            is_meant = process is None or force.process == process
            if is_meant and force.since <= until and (force.until is None or force.until >= since):
                yield force.version

    def matched(self, process: str, number: int, version: RulesVersion) -> None:
        """Note that a process has looked by these rules where an event is to go."""
        self._readings.of[number].append(Reading(self._now(), process, version))

    def _readings_by(self, process: str, row: Row) -> list[Reading]:
        return [each for each in self._readings.of.get(row.number, ()) if each.process == process]

    def _required_of(self, row: Row, event: Event, reader: str | None = None) -> frozenset[Target]:
        """Return the targets to which the event of a record has to go: by the rules by which it was read.

        By a reader that commits it, or else by the process that has committed it. Where nobody has matched it, the
        rules are meant by which one may have done that without our hearing of it.
        """
        readings = [] if reader is None else self._readings_by(reader, row)
        version = readings[-1].version if readings else self._readings.committed.get(row.number)
        return self.required(event, row.at, self._now(), reader) if version is None else version.targets(event)

    def required(self, event: Event, since: float, until: float, reader: str | None = None) -> frozenset[Target]:
        """Return the targets to which an event has to go, whoever read it in that time, or by a reader."""
        versions = {version.number: version for version in self.rules_versions(since, until, reader)}
        # By rules that don't know its source an event waits for others.
        sets = [version.targets(event) for version in versions.values() if event.source in version.sources]
        return frozenset.intersection(*sets) if sets else frozenset()

    def unfinished(self, row: Row, group: str) -> list[str]:
        """Return the ids of the deliveries of a record that aren't finished, and could be."""
        return [] if self._is_forgone(row) else self._unfinished(row, group)

    def _is_forgone(self, row: Row) -> bool:
        """Return whether a record, or another of the same step or a later one of what it carries, was deleted.

        Or its event: an evicted reader of it may put it in order behind what the next owner went on with.
        """
        places = [(row.partition, row.offset)]
        if row.origin is not None:
            places.append((row.origin.partition, row.origin.offset))
        if any(offset in self._deletions.lost[group_of(each), each] for each, offset in places):
            return True
        if row.stored is None:
            return False
        return (
            self._deletions.excused_deliveries.get((row.number, row.stored.delivery.id), -1)
            >= row.stored.delivery.successor
        )

    def _unfinished(self, row: Row, group: str, reader: str | None = None) -> list[str]:
        """Return the same, whatever was deleted; by the rules by which a reader has read it, if it is one's commit."""
        if row.event is None:
            return [] if row.value in self.dead_values else ["unreadable"]
        if row.stored is not None:
            delivery = row.stored.delivery
            trail = self.trails[row.number, delivery.id]
            if trail.is_delivered or trail.successor > delivery.successor or self._has_duplicate(row, trail, group):
                return []
            twins = [each for each in trail.rows if each.partition == row.partition]  # appended once more
            former = [each for each in twins if each.offset <= row.offset]  # of which it is a duplicate
            is_unwanted, is_superseded = any(map(self._is_unwanted, former)), any(map(self._may_be_superseded, twins))
            if is_unwanted or is_superseded or self._is_overtaken(row, trail):
                return []
            if delivery.route or self._is_nowhere(row, trail):
                items = self._items_of(delivery.id, delivery.route) if delivery.part is None else []
                return [each for each in items if not self._goes_on(row.number, each)] if items else [delivery.id]
        if self.may_be_dropped(row) or (row.stored is None and self._nowhere(row).successor):
            return []
        unfinished: list[str] = []
        for target in self._required_of(row, row.event, reader):
            ids = self._made_of(row.number, row.event, target)
            unfinished += [each for each in ids if not self._goes_on(row.number, each)]
        return unfinished

    def _is_unwanted(self, row: Row, until: float = math.inf) -> bool:
        """Return whether a record's delivery is one whose condition failed, and that wasn't wanted any more by then.

        It is matched again, so by rules that know its source, its route and its destination, and send the event
        elsewhere. That is so after a crash, too, although other rules have let it be attempted before.
        """
        if row.stored is None or not row.stored.metadata.dead_reason:
            return False
        delivery = row.stored.delivery
        return any(
            delivery.event.source in version.sources
            and version.names(delivery)
            and (delivery.route, delivery.destination) not in version.targets(delivery.event)
            for version in self.rules_versions(row.at, min(until, self._now()))
        )

    def _goes_on(self, number: int, delivery: str) -> bool:
        """Return whether a delivery has arrived, or another record goes on with it."""
        trail = self.trails[number, delivery]
        return trail.is_delivered or trail.successor > 0

    def may_be_dropped(self, row: Row) -> bool:
        """Return whether an event duplicates an earlier one of its partition, roughly within the source's window."""
        return any(self._earlier(row, 2 * self.plan.skew + 0.1))

    def must_be_dropped(self, row: Row) -> bool:
        """Return whether it is a duplicate of one that surely was delivered, and surely within the window."""
        return any(not self.may_be_dropped(other) for other in self._earlier(row, -0.1))

    def _earlier(self, row: Row, slack: float) -> Iterator[Row]:
        assert row.event is not None
        window = self.plan.windows.get(row.event.source)
        if window is None:
            return
        for other in self._identities[row.partition, row.event.id, row.event.body]:
            if other.offset < row.offset and row.at - other.at < window + slack:
                yield other

    def replayed(self, name: str, which: Selection, ends: Mapping[str, int]) -> None:
        """Note that an operator wants events of a route, up to these ends, once more, or what is undelivered."""
        self._replays.append(_Replay(name, which, ends, self._now()))

    def redelivered(self, name: str, asked: Redelivery, row: Row) -> None:
        """Note that an operator wants one event once more."""
        self._redeliveries[name] = _Redelivery(name, asked, row, self._now())

    def redelivery_undone(self, name: str) -> None:
        """Note that an operator doesn't want it any more."""
        self._redeliveries[name].is_undone = True

    def place_of(self, number: int) -> Row | None:
        """Return the record of an event, the last one if it was stored again; None if there is none."""
        found = [row for rows in self.rows.values() for row in rows.values() if row.number == number]
        return max([row for row in found if row.stored is None], key=lambda row: row.at, default=None)

    def _is_nowhere(self, row: Row, trail: Trail) -> bool:
        """Return whether an event of an unknown source was forgotten: no rules name it, and no record carries it."""
        assert row.event is not None
        if any(row.event.source in version.sources for version in self.rules_versions(row.at, self._now())):
            return False  # its own targets tell
        return not any(other.is_acknowledged and other.at > row.at for other in trail.rows)

    def _has_duplicate(self, row: Row, trail: Trail, group: str) -> bool:
        """Return whether another record of the partition carries the same step of the delivery, and is still there."""
        assert row.stored is not None
        return any(
            other is not row
            and other.partition == row.partition
            and other.stored is not None
            and other.stored.delivery.successor == row.stored.delivery.successor
            and other.offset not in self._covered[group, row.partition]
            and other.gone_at == math.inf
            # Of what no commit covers, the first is nobody's duplicate.
            and (row.partition.topic != TOPICS.parked or other.offset < row.offset)
            for other in trail.rows
        )

    def _is_overtaken(self, row: Row, trail: Trail) -> bool:
        """Return whether an ordered record may count as a duplicate though none of its topic is the first.

        Its event was read once more, after later ones, and by new rules: by those before it was carried on as one of a
        plain route or of an unknown source, or was nothing for the route. Or its owner took it for a duplicate, but
        the previous one, which didn't know yet that it was no longer the owner, did not.
        `plans/evicted-reader-goes-by-rules-that-came-back.json` needs it.
        """
        origin = row.origin
        if origin is None or row.event is None:
            return False
        is_behind = any(self._before_in_spite_of_order(row))
        event = self._event_of(row.number, origin)
        is_carried_on = self._goes_on_from_a_tier(row) or any(
            each.is_acknowledged and each.partition.topic != row.partition.topic for each in trail.rows
        )
        return is_behind and (is_carried_on or self.may_be_dropped(event) or self._is_newly_matched(row, event))

    def _event_of(self, number: int, origin: Origin) -> Row:
        """Return the record of an event from which an ordered route has got a delivery."""
        gone = self._deletions.events.get(number)
        return self.rows[origin.partition][origin.offset] if gone is None else gone

    def _may_be_superseded(self, row: Row) -> bool:
        """Return whether the event of another record is delivered instead, by a route that is debounced."""
        if row.stored is None or row.event is None:
            return False
        quiet = self._longest_quiet(row)
        return quiet > 0 and any(self._supersedes(other, row, quiet) for other in self.rows[row.partition].values())

    def _longest_quiet(self, row: Row) -> float:
        """Return for how long a key had to be quiet, by any rules in force since a record was appended."""
        if row.stored is None or TOPICS.ordered_target(row.partition.topic) is None:
            return 0.0
        routes = [each for version in self.rules_versions(row.at, self._now()) for each in version.routes]
        return max([each.quiet for each in routes if each.name == row.stored.delivery.route], default=0.0)

    def _supersedes(self, other: Row, row: Row, quiet: float) -> bool:
        """Return whether a record's event is a newer one of the same key, and was appended soon after, or before."""
        if other.event is None or row.event is None or other.number == row.number:
            return False
        if other.stored is None or row.stored is None or _key_of(other) != _key_of(row):
            return False
        if not (_has_burst(other) and _has_burst(row)) or _debounced_by(other) != _debounced_by(row):
            return False
        earlier, later = sorted((row, other), key=lambda each: each.offset)
        if later.appended_at >= earlier.appended_at + quiet and not (self.plan.skew or not self._is_time_sure):
            return False
        return other is later if _is_in_order(earlier, later) else other is earlier

    def _before_in_spite_of_order(self, row: Row) -> Iterator[Row]:
        """Yield what an ordered topic has before a record though its event comes after the record's event."""
        origin = row.origin
        if origin is None:
            return
        for other in self.rows[row.partition].values():
            if other.origin is None or other.offset >= row.offset or other.origin.partition != origin.partition:
                continue
            if other.origin.offset > origin.offset:
                yield other

    def _is_newly_matched(self, row: Row, event: Row) -> bool:
        """Return whether an event is for a route only by new rules, though that kept the order by those before.

        What came after the event may then be appended already when its reader leaves it to another one uncommitted, or
        when one reads it that was evicted and doesn't know. By the rules before, that is: by which the event isn't for
        the route, and by which the process that appended what came after it has read both. What is read by the new
        rules has to wait until the event is committed: after that, it is only the record of one that was evicted, or of
        one that had left the event to the one which committed it, and whose append took that long.
        `plans/evicted-reader-goes-by-rules-that-came-back.json` needs it.
        """
        assert row.stored is not None
        assert event.event is not None
        target = row.stored.delivery.route, row.stored.delivery.destination
        committed = self._readings.committed.get(event.number)
        was_left = event.is_left and row.writer != self._readings.committed_by.get(event.number)
        is_nobodys = (
            (row.is_of_evicted or was_left)
            and committed is not None
            and event.event.source in committed.sources
            and target not in committed.targets(event.event)
        )
        for other in self._before_in_spite_of_order(row):
            if not (event.is_left or row.is_of_evicted or other.is_of_evicted):
                continue
            if is_nobodys:
                return True
            before = [each.version for each in self._readings_by(other.writer, event)]
            if not before:  # nobody looks where an event of an unknown source is to go
                versions = self.rules_versions(event.at, other.at, other.writer)
                before = [version for version in versions if event.event.source not in version.sources]
            after = [each.version for each in self._readings_by(other.writer, other) if each.at <= other.at]
            if all(
                any(self._is_nothing(event.event, target, each) for each in versions) for versions in (before, after)
            ):
                return True
        return False

    def _is_nothing(self, event: Event, target: Target, version: RulesVersion) -> bool:
        """Return whether an event isn't for a route and destination by rules by which that route keeps the order."""
        is_ordered = any(route.name == target[0] and route.is_ordered for route in version.routes)
        return is_ordered and target not in version.targets(event)

    def _nowhere(self, row: Row) -> Trail:
        """Return what became of an event as one of an unknown source."""
        assert row.event is not None
        return self.trails.get((row.number, delivery_id(row.event.id, "", "")), Trail())

    def _goes_on_from_a_tier(self, row: Row) -> bool:
        """Return whether a tier still has an event as one of an unknown source."""
        rows = [other for other in self._nowhere(row).rows if other.gone_at == math.inf]
        return any(other.offset not in self._covered[ROUTER, other.partition] for other in rows)

    def _keys(self, row: Row) -> Iterator[Key]:
        if row.stored is not None and (route := row.stored.delivery.route):
            whole = row.stored.delivery.id
            items = self._items_of(whole, route) if row.stored.delivery.part is None else []
            yield from [(row.number, each) for each in (whole, *items)]
        elif row.event is not None:
            for target in self._targets:
                whole = delivery_id(row.event.id, *target)
                yield from [(row.number, each) for each in dict.fromkeys((whole, *self._ends_of(row.event, target)))]

    def story(self, number: int, deliveries: Iterable[str]) -> list[str]:
        """Return the rows of deliveries, in the order of time."""
        rows: list[tuple[float, str]] = []
        for delivery in deliveries:
            trail = self.trails.get((number, delivery), Trail())
            rows += [(made.began, str(made)) for made in trail.attempts]
            rows += [(row.at, str(row)) for row in trail.rows]
        return [text for _, text in sorted(rows)]

    # In the course of a run.

    def watch(self, ends: Mapping[Partition, int]) -> None:
        """Look at the age of what isn't committed; only where nothing but destinations fails."""
        now = self._now()
        for partition in ends:
            if partition.topic.startswith(TOPICS.group("events.")):
                delay = 0.0
            elif partition.topic.startswith(TOPICS.group("retry.")):
                delay = TIERS[partition.topic.rpartition(".")[2]]
            else:
                continue
            covered = self._covered[ROUTER, partition]
            for offset, row in self.rows[partition].items():
                if offset not in covered and now - row.at - delay > OLDEST + self._longest_attempt(row):
                    self.violate("15 age of the lowest unfinished record", f"{now - row.at:.1f} s", [row])
                    break

    def _longest_attempt(self, row: Row) -> float:
        """Return the longest timeout of a destination that a record is for."""
        if row.event is None:
            return 0.0
        if row.stored is not None and row.stored.delivery.route:
            to = {row.stored.delivery.destination}
        else:
            to = {to for _, to in self.required(row.event, row.at, self._now())}
        return max([self.plan.destinations[name]["timeout"] for name in to], default=0.0)

    # At the end.

    def is_finished(self, ends: Mapping[Partition, int], groups: Mapping[str, Collection[str]]) -> bool:
        """Return whether every group has committed all there is of its topics, and nothing is parked."""
        return not self.left(ends, groups) and not any(self._parked())

    def left(self, ends: Mapping[Partition, int], groups: Mapping[str, Collection[str]]) -> list[Row]:
        """Return the records that a group hasn't committed."""
        return [
            row
            for group, topics in groups.items()
            for partition in ends
            if partition.topic in topics
            and (rows := self.rows.get(partition)) is not None
            and len(covered := self._covered[group, partition]) < len(rows)
            for offset, row in rows.items()
            if offset not in covered and not self._is_unknown(group, partition, offset)
        ]

    def waiting(self, ends: Mapping[Partition, int], groups: Mapping[str, Collection[str]]) -> list[Row]:
        """Return the records of deliveries that a group hasn't committed, and that have no end by another record."""
        stored = [(row, row.stored.delivery.id) for row in self.left(ends, groups) if row.stored is not None]
        is_over = self._is_forgone
        return [row for row, name in stored if math.isinf(self.trails[row.number, name].ended_at) and not is_over(row)]

    def reloaded(self, process: str, asleep: Sequence[str]) -> None:
        """Check that new rules have woken what waited in a process's memory for a name that is back."""
        if asleep:
            self.violate("21 a name that is back is not waited for", f"{process} lets wait {asleep[:3]}")

    def at_rest(self, process: str, held: Mapping[str, int]) -> None:
        """Check that a process in which nothing is under way counts nothing as taken: it would take less and less."""
        if any(held.values()):
            self.violate("25 nothing is held at rest", f"{process} holds {dict(held)}")

    def close(self, counted_as_lost: Mapping[str, float]) -> None:
        """Check what must hold once everything has ended."""
        self._check_losses(counted_as_lost)
        self._check_parked()
        self._check_ends()
        self._check_repeats()
        self._check_storms()
        self._check_replays()
        self._check_redeliveries()
        self._check_resolutions()
        self._check_injections()
        self._check_duplicates()
        self._check_order()
        self._check_bursts()
        if set(self.plan.faults) <= {"trouble", "gap", "order"}:
            self._check_breakers()
        if set(self.plan.faults) <= {"trouble", "gap"} and not self.plan.is_long:
            self._check_isolation()
        has_room = self.plan.memory >= MAX_BYTES and self.plan.window >= WINDOW
        if set(self.plan.faults) <= {*GRACEFUL, "trouble", "gap"} and has_room and not self.plan.is_long:
            self._check_reassignments()

    def _check_ends(self) -> None:
        for partition, rows in self.rows.items():
            for row in rows.values():
                if self._is_forgone(row):
                    continue
                if row.event is None:
                    # What was parked before anything was resumed is looked at by nobody.
                    if partition.topic not in (TOPICS.dead, TOPICS.parked) and row.value not in self.dead_values:
                        self.violate("21 a defined end", "a record that can't be read has no dead letter", [row])
                elif row.stored is None:
                    self._check_end_of(row, row.event)
                elif partition.topic not in (TOPICS.dead, TOPICS.parked) and self.unfinished(row, group_of(partition)):
                    story = self.story(row.number, [row.stored.delivery.id])
                    self.violate("1 nothing is lost", "a record of a delivery has no end", [row, *story])

    def _check_end_of(self, row: Row, event: Event) -> None:
        nowhere = row.number, delivery_id(event.id, "", "")
        if self.may_be_dropped(row) or self._nowhere(row).is_dead or nowhere in self._deletions.excused_deliveries:
            return
        required = sorted(self._required_of(row, event))
        for target, name in [(each, name) for each in required for name in self._ends_of(event, each)]:
            key, whole = (row.number, name), (row.number, delivery_id(event.id, *target))
            trail = self.trails[key]
            if trail.is_delivered or self.trails[whole].is_dead or trail.is_dead:
                continue
            if not self._deletions.excused_deliveries.keys().isdisjoint((key, whole)):
                continue
            if any(self._may_be_superseded(each) or self._is_unwanted(each) for each in trail.rows):
                continue
            if not any(each.origin is not None and self._is_newly_matched(each, row) for each in trail.rows):
                self.violate("1 nothing is lost", f"no end for {target}", [row, *self.story(*_one(key))])

    def _check_losses(self, counted: Mapping[str, float]) -> None:
        """What was deleted and has no other end is counted, and nothing that no member was told of."""
        lost: dict[str, dict[object, Row]] = defaultdict(dict)
        for (group, partition), offsets in self._deletions.lost.items():
            for offset in offsets:
                row = self.rows[partition][offset]
                is_open = self._unfinished(row, group) and not self._is_unknown(group, partition, offset)
                if is_open and not self._is_left_to_a_kick(row):
                    step = offset if row.stored is None else (row.stored.delivery.id, row.stored.delivery.successor)
                    lost[partition.topic][partition, row.number, step] = row
        for topic, rows in lost.items():
            if counted.get(topic, 0) < len(rows):
                text = f"{counted.get(topic, 0):.0f} of {topic} are counted, and {len(rows)} were lost"
                self.violate("3 losses are reported", text, rows.values())
        is_exact = self.plan.processes == 1 and set(self.plan.faults) <= {"trouble", "order", "poison", RETENTION}
        is_exact = is_exact and not any(step.do == "stop" for step in self.plan.steps)
        for topic in {*counted, *self._deletions.reported}:
            count, told = counted.get(topic, 0), self._deletions.reported[topic]
            if count > told or (is_exact and count < told):
                self.violate("3 losses are reported", f"{count:.0f} of {topic} are counted, of {told} deleted")

    def _is_unknown(self, group: str, partition: Partition, offset: int) -> bool:
        """Return whether nobody can know that a record was deleted that a group hadn't committed.

        Nor is anybody told what a route has left that keeps no order by the rules in force, where its group hasn't
        committed anything: the count of it finds an empty partition, and no member reads it.
        """
        if offset in self._deletions.unreportable[group, partition]:
            return True
        if offset not in self._deletions.lost[group, partition] or (group, partition) in self.commits:
            return False
        place, now = TOPICS.ordered_target(partition.topic), self._now()
        if place is None:
            return False
        routes = [route for version in self.rules_versions(now, now) for route in version.routes if route.is_ordered]
        return not any(route.name == place[0] and place[1] in route.to for route in routes)

    def _is_left_to_a_kick(self, row: Row) -> bool:
        """Return whether a router may have left a record that it held to a kick, which found it deleted."""
        if row.stored is None:
            return False
        delivery, place = row.stored.delivery, _place(row.partition)
        names = (f"route/{delivery.route}", f"destination/{delivery.destination}")
        left = self._deletions.left_to_kicks
        return any(name in names and row.offset < ends.get(place, 0) for name, ends, _ in left)

    def _check_parked(self) -> None:
        for row in self._parked():
            self.violate("12 nothing is skipped", "what was parked was never resumed", [row])

    def _parked(self) -> Iterator[Row]:
        """Yield what was parked and not resumed. What was parked late is found by a job, some seconds later."""
        for partition, rows in self.rows.items():
            if partition.topic == TOPICS.parked:
                yield from [row for row in rows.values() if row.event is not None and self.unfinished(row, ROUTER)]

    def _check_replays(self) -> None:
        for replay in self._replays:
            name, which, since = replay.name, replay.which, replay.since
            self._check_part(replay)
            for rows in self.rows.values():
                for row in rows.values():
                    if row.event is None or not replay.has_to_bring(row) or self.may_be_dropped(row):
                        continue
                    if any(
                        row.event.source not in version.sources for version in self.rules_versions(since, self._now())
                    ):
                        continue  # it may have been cancelled, as by these rules there is nothing to replay
                    for route, to in self.required(row.event, since, self._now()):
                        ids = list(self._ids(row.event, route, to))
                        trails = [self.trails[row.number, each] for each in ids]
                        of_items = [self.trails[row.number, each] for id_ in ids for each in self._items_of(id_, route)]
                        notes = [
                            each.stored.metadata for trail in trails for each in trail.rows if each.stored is not None
                        ]
                        is_replayed = any(note.replay == name for note in notes)
                        if route != which.route or which.destination not in (None, to):
                            continue
                        if which.undelivered:
                            is_unknown = any(self._is_unclear(each, replay, row, to) for each in self._replays)
                            self._check_undelivered(
                                name, row, (route, to), trails, of_items, is_replayed=is_replayed, is_unknown=is_unknown
                            )
                        elif not is_replayed:
                            self.violate("12 nothing is skipped", f"replay {name} left out {route}→{to}", [row])

        self._check_ids_of_replays()

    def _check_redeliveries(self) -> None:
        """A redelivery brings what was asked for, all of it, says what that was, and does so once under its name."""
        for each in self._redeliveries.values():
            injected: Counter[Target] = Counter()
            for trail in self.trails.values():
                for row in trail.rows:
                    if row.stored is None or row.stored.metadata.replay != each.name:
                        continue
                    delivery = row.stored.delivery
                    if row.number != each.row.number or not each.is_to(delivery.route, delivery.destination):
                        told = f"redelivery {each.name} brought more"
                        self.violate("12 a redelivery is of what was asked for", told, [row])
                    # In an item's place, or behind an attempt, it has gone on; else only a job gives it such a number.
                    is_first = delivery.part is None and not delivery.attempts and delivery.successor in each.numbers
                    if is_first and row.partition.topic in (SHORTEST, TOPICS.dead):
                        injected[delivery.route, delivery.destination] += 1
            self._check_redelivery(each, injected)

    def _check_redelivery(self, each: "_Redelivery", injected: Mapping[Target, int]) -> None:
        answer = each.answer
        if answer is None:
            return  # what is left undone is told elsewhere, and a control topic that is recreated has forgotten it
        results = Counter([(result.route, result.destination) for result in answer.results])
        told = [each.row, f"{answer.state}: {answer.detail}", *map(str, results), *map(str, injected.items())]
        if max(results.values(), default=0) > 1:
            self.violate("31 a redelivery reports truly", f"{each.name} has two results of one delivery", told)
        queued = {(one.route, one.destination) for one in answer.results if one.outcome == "queued"}
        if not queued <= injected.keys():
            self.violate("31 a redelivery reports truly", f"{each.name} says that more is queued than is", told)
        event = each.row.event
        assert event is not None
        wanted = {to for to in self.required(event, each.since, each.answered_at) if each.is_to(*to)}
        are_all_known = all(event.source in v.sources for v in self.rules_versions(each.since, each.answered_at))
        is_there = each.row.gone_at > each.answered_at and not each.row.is_deleted
        if answer.state == "done" and not wanted <= results.keys():
            self.violate("12 nothing is skipped", f"redelivery {each.name} left out {wanted - results.keys()}", told)
        if answer.state == "cancelled" and wanted and is_there and are_all_known and not each.is_undone:
            self.violate("12 nothing is skipped", f"redelivery {each.name} was refused", told)
        if set(self.plan.faults) <= {*GRACEFUL, HANDOVER, REDELIVERED, "crash", "order", "trouble", "gap", "poison"}:
            if max(injected.values(), default=0) > 1 + self._owners_killed:
                self.violate("12 a redelivery is done once", f"{each.name} has injected more", told)
            if not self._owners_killed and injected.keys() != results.keys():
                self.violate("31 a redelivery reports truly", f"{each.name} has queued what it doesn't say", told)

    def _check_part(self, replay: "_Replay") -> None:
        """A replay brings nothing that wasn't asked for: of another route or destination, or of other events."""
        # Of one whose append was reported as failed there may be two records, and one has its place.
        wanted = {row.number for row in self._appended.values() if row.stored is None and replay.is_for(row)}
        for trail in self.trails.values():
            for row in trail.rows:
                if row.stored is None or row.stored.metadata.replay != replay.name:
                    continue
                delivery = row.stored.delivery
                is_there = delivery.route == replay.which.route
                is_there &= replay.which.destination in (None, delivery.destination)
                if not is_there or row.number not in wanted:
                    self.violate("12 a replay is of what was asked for", f"replay {replay.name} brought more", [row])

    def _was_left_to_others(self, row: Row, target: Target) -> bool:
        """Return whether one process has begun an event, and another ended it by rules by which it isn't for a target.

        What the first has delivered isn't stored then, as its record wasn't done.
        """
        version = self._readings.committed.get(row.number)
        return (
            row.is_left and version is not None and row.event is not None and target not in version.targets(row.event)
        )

    def _is_unclear(self, earlier: "_Replay", replay: "_Replay", row: Row, to: str) -> bool:
        """Return whether an earlier replay may have brought an event, or not, since its route changed meanwhile.

        What it has brought by which rules isn't stored, so the fate of what it covers is unknown.
        """
        if earlier.since > replay.since or earlier is replay or earlier.which.route != replay.which.route:
            return False
        if not earlier.is_for(row) or earlier.which.destination not in (None, to):
            return False
        versions = self.rules_versions(earlier.since, earlier.ended)
        routes = [[route for route in version.routes if route.name == earlier.which.route] for version in versions]
        return len({tuple([(route.sources, route.types, route.to) for route in each]) for each in routes}) > 1

    def _check_undelivered(
        self,
        name: str,
        row: Row,
        target: Target,
        trails: Sequence[Trail],
        of_items: Sequence[Trail],
        *,
        is_replayed: bool,
        is_unknown: bool,
    ) -> None:
        """Where all is known of how events were routed, a replay brings what nobody has, and nothing else.

        A kill within the moment in which a process has new rules and hasn't said so makes that wrong of some events.
        """
        if not set(self.plan.faults) <= {
            *GRACEFUL,
            RECREATE,
            NARROWED,
            REDELIVERED,
            "reload",
            "order",
            "trouble",
            "gap",
            "poison",
        }:
            return
        if self.plan.has_stops:
            return  # what others took by former rules isn't known
        if not is_unknown and not any(trail.attempts or trail.rows for trail in (*trails, *of_items)):
            self.violate("31 what is undelivered", f"replay {name} left out what nobody has delivered", [row])
        # A dead letter is undelivered, though a replay has delivered its event meanwhile, perhaps under another id.
        is_dead = any(trail.is_dead for trail in trails)
        before = [trail.ended_at for trail in (*trails, *of_items) if trail.is_delivered and not is_dead]
        injected = [
            each.at
            for trail in trails
            for each in trail.rows
            if each.stored is not None and each.stored.metadata.replay == name
        ]
        if self._nowhere(row).rows or self._was_left_to_others(row, target):
            return
        if is_replayed and before and min(before) < min(injected):
            told = [line for trail in trails for line in self._told(trail)]
            self.violate("31 what is undelivered", f"replay {name} repeated what had been delivered", told)

    def _check_ids_of_replays(self) -> None:
        """What has one id in a replay has one content, whatever its identity says, as long as its partition is one."""
        if any(step.do == "grow" and step.what["topic"].startswith("events.") for step in self.plan.steps):
            return
        bodies: dict[tuple[str, str], bytes] = {}
        for trail in self.trails.values():
            for row in trail.rows:
                if row.stored is None or row.event is None or not row.stored.metadata.replay:
                    continue
                key = row.stored.metadata.replay, row.stored.delivery.id
                if bodies.setdefault(key, row.event.body) != row.event.body:
                    self.violate("6 ids", "a replay gave events of different content one delivery id", [row])

    def _see_order(self, order: ControlRecord, offset: int) -> None:
        """Note what an operator wants, and check what a kick has left behind once it is said to be done."""
        # An operator's orders are asked for; a replay's, of the dead letters whose deliveries it has queued, come done.
        if order.kind == "dead" and (order.state == "requested" or (order.state == "done" and order.filter.records)):
            self._resolutions.append((order, self._now()))
        if order.kind == "dead" and order.state == "done":
            self._resolved_at[order.name] = self._now()
            self._leave_from_newer_on(order)
            if order.unread:
                self._incomplete.add(order.name)
        if order.kind == "replay" and order.state in ("done", "cancelled"):
            for replay in self._replays:
                if replay.name == order.name:
                    replay.ended = min(replay.ended, self._now())
        self._see_redelivery(order)
        self._see_kick(order)
        if order.kind == "kick" and order.state == "requested":
            self._kicks_again[order.name] -= 1
            self._kicks.setdefault(order.key, {})[offset] = self._now()
        if order.kind == "checkpoint" and order.state == "done" and order.name in self._kicks:
            asked = self._kicks[order.name]
            answers = order.covers_commands_below if order.covers_commands_below <= offset else 0  # of a topic before
            answered = [each for each in asked if each < answers]
            if answered:
                self._see_what_was_tried(order, min(asked[each] for each in answered))
                self._see_what_is_left(order, max(asked.pop(each) for each in answered))

    def _see_redelivery(self, order: ControlRecord) -> None:
        """Note a redelivery's answer, and when it was asked for: its deliveries are numbered by that."""
        is_answer = order.kind == "checkpoint" and order.name.startswith("redeliver/")
        each = self._redeliveries.get(order.name.removeprefix("redeliver/"))
        if each is None or not (is_answer or order.kind == "redeliver"):
            return
        if not is_answer:
            each.numbers.add(int(order.at * 1000))
        elif not order.is_pending:
            if each.answer is None:
                each.answered_at = self._now()
            each.answer = order if each.answer is None or order.extent >= each.answer.extent else each.answer

    def _see_what_was_tried(self, answer: ControlRecord, since: float) -> None:
        """A kick reports no more attempts than there were, and nothing of what it has expedited is left out."""
        if answer.tried is None:
            return
        name = answer.name.removeprefix("kick/")
        attempts: defaultdict[Key, list[ObservedAttempt]] = defaultdict(list)
        for made in self.attempts:
            if name in _names(made) and (made.ended is None or made.ended >= since - COMMIT_LAG):
                attempts[made.number, made.delivery].append(made)
        # A delivery and replays of it have one id.
        tried = sum([min(len(made), 1 + len(self.trails[key].lives)) for key, made in attempts.items()])
        # One that retention deletes moments after it was stored isn't anywhere any more, like one that was delivered.
        gone = [key for key in self._deletions.excused_deliveries if self._is_of(key, name)]
        gone += [key for key in self._unseen_since(since) if key not in gone and self._is_of(key, name)]
        tried += len([key for key in gone if key not in attempts])
        if answer.tried > tried:
            self.violate(
                "12 a kick reports truly", f"{answer.tried} tried, and {tried} were", list(answer.untried_by_reason)
            )
        delivered = sum(
            [
                made.result is not None and made.result.result is Result.SUCCESS
                for each in attempts.values()
                for made in each
            ]
        ) + len(gone)
        if answer.delivered is not None and answer.delivered > min(tried, delivered):
            told = f"{answer.delivered} delivered, and {delivered} were"
            self.violate("12 a kick reports truly", told, list(answer.untried_by_reason))
        if answer.tried + sum(answer.untried_by_reason.values()) != answer.count:
            self.violate(
                "12 a kick reports truly", f"{answer.tried} of {answer.count}", list(answer.untried_by_reason.items())
            )

    def _unseen_since(self, since: float) -> list[Key]:
        """Return deliveries of which a record came into a topic that was recreated while a kick was carried out.

        Whoever looks there for what has become of them reads on where the topic before had ended.
        """
        anew = {partition for partition, at in self._deletions.recreated_at.items() if at >= since - COMMIT_LAG}
        keys = [(row.number, row.stored.delivery.id) for each in anew for row in self.rows[each].values() if row.stored]
        return list(dict.fromkeys(keys))

    def _is_of(self, key: Key, name: str) -> bool:
        """Return whether a delivery is one of a "route/…" or "destination/…"."""
        deliveries = [row.stored.delivery for row in self.trails[key].rows if row.stored is not None]
        return any(name in (f"route/{each.route}", f"destination/{each.destination}") for each in deliveries)

    def _see_what_is_left(self, answer: ControlRecord, since: float) -> None:
        """Check that what waited in a tier for a name isn't there any more; it leaves the shortest soon anyway.

        But for as many partitions as the answer says that it couldn't read.
        """
        name = answer.name.removeprefix("kick/")
        left: dict[Partition, Sequence[str]] = {}
        for partition, rows in self.rows.items():
            if not partition.topic.startswith(TOPICS.retry("")) or partition.topic == SHORTEST:
                continue
            covered = self._covered[ROUTER, partition]
            for offset, row in rows.items():
                if offset in covered or row.at > since or row.stored is None:
                    continue
                delivery = row.stored.delivery
                if name not in (f"route/{delivery.route}", f"destination/{delivery.destination}"):
                    continue
                delay = self._delay(delivery.route)
                is_delayed = delay and not delivery.attempts and delivery.due == delivery.event.received_at + delay
                if name.startswith("destination/") and is_delayed:
                    continue
                if self.unfinished(row, ROUTER):
                    left[partition] = self._told(self.trails[row.number, delivery.id])
        if len(left) > answer.unread:
            told = next(iter(left.values()))
            self.violate("12 nothing is skipped", f"{name} was kicked, and this is where it was", told)

    def _leave_from_newer_on(self, done: ControlRecord) -> None:
        """Expect nothing of a command from where it has met a dead letter that is left to a newer version."""
        ends = {
            name: done.checkpoint[name]
            for partition, rows in self.rows.items()
            if (name := f"{partition.topic}/{partition.number}") in done.checkpoint
            and (row := rows.get(done.checkpoint[name])) is not None
            and (row.is_of_newer or row.appended_at <= self._newer_resolved_until)
        }
        self._resolutions = [
            (replace(order, checkpoint={**order.checkpoint, **ends}) if order.name == done.name else order, at)
            for order, at in self._resolutions
        ]

    def _see_kick(self, order: ControlRecord) -> None:
        """Note which breakers a kick that is announced may move."""
        if order.kind != "checkpoint" or not order.name.startswith("announcement/kick/"):
            return
        kicked = order.name.removeprefix("announcement/kick/")
        self._deletions.left_to_kicks.append((kicked, order.checkpoint, self._now()))
        self._kicks_again[kicked] += 1
        _, _, kind, name = order.name.split("/", 3)
        of_route = [to for route, to in self._targets if route == name]
        for destination in [name] if kind == "destination" else of_route:
            self._kicked[destination].append(self._now())

    def _check_resolutions(self) -> None:
        """A replayed dead letter goes through a tier with a life of its own, a dropped one doesn't."""
        replays_of = self._replays_of_deliveries()
        for key, trail in self.trails.items():
            if not trail.is_dead:
                continue
            replays = replays_of[key]
            injected = [
                row
                for row in trail.rows
                if row.stored is not None
                and row.partition.topic.startswith(TOPICS.retry(""))
                and row.stored.delivery.replayed_at not in {0.0, *replays}
            ]
            is_replayed = False
            for row in trail.rows:
                if row.partition.topic != TOPICS.dead:
                    continue
                resolved_by = [each for each in self._resolutions if _is_for(*each, row)]
                of_operators = [each for each in resolved_by if not each[0].filter.records]
                if len(of_operators) < len(resolved_by) and not self._is_replayed(row):
                    self.violate("12 nothing is skipped", "a replay resolved what it has not queued", [row])
                # A drop that couldn't read all may have left this one open, for the next command.
                binding = [
                    each for each in of_operators if each[0].action != "drop" or each[0].name not in self._incomplete
                ]
                order, at = next(iter(binding), (None, 0.0))
                if order is None or order.action == "drop":
                    continue
                is_replayed = True
                is_gone = row.gone_at < self._resolved_at.get(order.name, math.inf)
                if len(of_operators) < len(resolved_by) or is_gone or order.name in self._incomplete:
                    continue  # the replay may have come first, or its topic's deletion; or it couldn't read all
                before = {each.stored.delivery.replayed_at for each in trail.rows if each.stored and each.at <= at}
                if not any(
                    each.is_acknowledged
                    and each.stored is not None
                    and each.stored.delivery.replayed_at not in before
                    and not each.stored.delivery.attempts
                    for each in injected
                ):
                    self.violate("12 nothing is skipped", f"{order.name} left this out", [row, *self._told(trail)])
            if injected and not is_replayed:
                self.violate("12 what is dropped stays so", "nobody wanted it replayed", self._told(trail))

    def _is_replayed(self, row: Row) -> bool:
        """Return whether a replay has queued a dead letter's delivery, under its own id where that one is shared."""
        assert row.event is not None
        assert row.stored is not None
        delivery = row.stored.delivery
        ids = self._ids(row.event, delivery.route, delivery.destination)
        rows = [other for each in ids for other in self.trails.get((row.number, each), Trail()).rows]
        return any(other.stored.metadata.replay for other in rows if other.stored is not None)

    def _check_injections(self) -> None:
        """What jobs inject they inject once, whoever owns them, but for a batch of it after each kill.

        Once of each record: two owners of a partition may both have parked a delivery.
        """
        if not set(self.plan.faults) <= {*GRACEFUL, HANDOVER, "crash", "order", "trouble", "gap", "poison"}:
            return
        injected: Counter[tuple[int, str, int]] = Counter()
        again: dict[tuple[int, str, int], int] = {}
        for trail in self.trails.values():
            stored = [(row, row.stored) for row in trail.rows if row.stored is not None]
            parents = {
                (each.delivery.successor, count)
                for row, each in stored
                if row.partition.topic in (TOPICS.parked, TOPICS.dead)
                for count in (0, len(each.delivery.attempts))
            }
            counts = Counter([each.delivery.successor for _, each in stored])
            for row, each in stored:
                step = each.delivery.successor
                # What a breaker has sent away, or an attempt, is the router's, of a duplicate that was parked, too.
                is_resumed = not each.metadata.breaker_deferrals and (step - 1, len(each.delivery.attempts)) in parents
                if row.partition.topic == SHORTEST and (each.metadata.is_expedited or is_resumed):
                    key = row.number, each.delivery.id, step
                    injected[key] += 1
                    again[key] = injected[key] - max(1, counts[step - 1])
        most = self._owners_killed * self.plan.batch
        if sum([count for count in again.values() if count > 0]) > most:
            repeated = [key for key, count in again.items() if count > 0]
            told = [line for number, name, _ in repeated for line in self._told(self.trails[number, DeliveryId(name)])]
            self.violate("12 jobs resume where they were", f"more than {most} injected once more", told[:40])

    def _check_duplicates(self) -> None:
        """Where nothing fails, what is known of duplicates is complete, and none is delivered."""
        if not set(self.plan.faults) <= {"trouble", "poison", "stop", "join", "rebalance"}:
            return
        for rows in self.rows.values():
            for row in rows.values():
                if row.stored is None and row.event is not None and self.must_be_dropped(row):
                    attempts = [each for key in self._keys(row) for each in self.trails[key].attempts]
                    if attempts:
                        self.violate("10 duplicates", "a duplicate was delivered", [row, *attempts])

    def _carried_out_again(self, name: str) -> int:
        """Return how often a kick moved before it was answered: its next owner lets halted keys try once more."""
        moves = len(self._takeovers[Partition(TOPICS.control, 0)])
        return min(max(0, self._kicks_again[name]), moves)

    def _kicked_by_two(self, trail: Trail) -> int:
        """Return how often a kick may have reached a delivery of an ordered route at two owners, one after the other.

        Each hears it by itself, and nothing stored says what the one before has done.
        """
        kicks = self._kicked[trail.attempts[0].destination]
        return sum(
            any(0.0 <= taken.at - at < PAUSE_LAG for at in kicks)
            for partition in {row.partition for row in trail.rows if row.origin is not None}
            for taken in self._takeovers[partition]
            if not taken.is_first
        )

    def _check_repeats(self) -> None:
        for (number, _), trail in self.trails.items():
            made = Counter(each.attempt for each in trail.attempts)
            allowed = 0 if self.plan.is_graceful else trail.allowed_repeats
            # What has gone through a tier as of an unknown source has no place in the order, which shows duplicates.
            is_displaced = bool(self.trails.get((number, delivery_id(self.events[number].id, "", "")), Trail()).rows)
            if trail.attempts and (is_displaced or not self._was_keyed_alike(trail.attempts[0].route)):
                allowed += trail.allowed_repeats_if_unordered
            lives = 1 + len(trail.lives)
            most = max(made.values(), default=0)
            if trail.attempts:
                names = _names(trail.attempts[0])
                allowed += sum([self.touched[name] + self._carried_out_again(name) for name in names])
                allowed += self._kicked_by_two(trail)
            if most > lives * (1 + allowed):
                allowed += self._repeated_as_misjudged(trail)
            if most > lives * (1 + allowed):
                self.violate(
                    "8 repeats", f"{most} times the same attempt, where {allowed} may repeat it", self._told(trail)
                )

    def _replays_of_deliveries(self) -> Mapping[Key, set[float]]:
        """Return when each delivery was replayed; also those of items, if that of their event was, and split later."""
        found: defaultdict[Key, set[float]] = defaultdict(set)
        for (number, name), trail in self.trails.items():
            for stored in [row.stored for row in trail.rows if row.stored and row.stored.metadata.replay]:
                items = self._items_of(name, stored.delivery.route) if stored.delivery.part is None else []
                for each in (name, *items):
                    found[number, each].add(stored.delivery.replayed_at)
        return found

    def _told(self, trail: Trail) -> list[str]:
        rows = [(each.began, str(each)) for each in trail.attempts] + [(row.at, str(row)) for row in trail.rows]
        return [text for _, text in sorted(rows)]

    def _check_storms(self) -> None:
        """A delivery's records are bounded: hops of each delay, and one spill for each time that it came back."""
        for trail in self.trails.values():
            if trail.rows:
                self._see_how_many(trail)

    def _see_how_many(self, trail: Trail) -> None:
        seconds = self._now() - trail.rows[0].at
        bound = (1 + trail.allowed_repeats) * (1 + len(trail.lives)) * (30 + 12 * len(trail.attempts) + seconds / 10)
        if len(trail.rows) > bound:
            self.violate("7 appends are bounded", f"{len(trail.rows)} records of a delivery", self._told(trail)[:40])

    def _check_order(self) -> None:
        """The events of a key are tried in the order of their partition: so the router reads them, and appends them."""
        changes_keys = _changes_keys(self.plan)
        last: dict[tuple[str, str, Partition, float, str], tuple[int, ObservedAttempt]] = {}
        places = self._deletions.events | {
            row.number: row
            for rows in self.rows.values()
            for row in rows.values()
            if row.stored is None and row.event is not None
        }
        for made in self.attempts:
            row = places[made.number]
            trail = self.trails[made.number, made.delivery]
            if row.event is None or row.event.key is None or not self._has_place(row, trail, made):
                continue
            if row.offset in self._deletions.lost[ROUTER, row.partition]:
                continue  # told as lost by the next owner: the append that its last one had begun may come later
            group = TOPICS.ordered_group(made.route, made.destination)
            if any(gone <= made.began < gone + OWNERSHIP_CHECK_AGE for gone in self._evicted_at[made.process, group]):
                continue  # no group evicts a member that has committed a moment ago
            if any(each.stored is not None and each.stored.delivery.burst is not None for each in trail.rows):
                if changes_keys:
                    continue  # by another key, an event is in the order of others
                key = next(_key_of(each) for each in trail.rows if each.origin is not None)
            else:
                key = f"{row.event.source}/{row.event.key}"
            where = made.route, made.destination, row.partition, row.gone_at, key
            offset, before = last.get(where, (-1, made))
            if row.offset < offset and (self._is_misjudged(trail) or self._is_appended_again(trail, made)):
                continue
            if row.offset < offset:
                self.violate("22 order", f"{key}: an attempt after one of a later event", [before, made])
            last[where] = row.offset, made
            is_over = (
                before.number == made.number or (before.number, before.delivery) in self._deletions.excused_deliveries
            )
            ended = self.trails[before.number, before.delivery]
            is_over = is_over or any(
                self._may_be_superseded(each) or self._is_unwanted(each, made.began) for each in ended.rows
            )
            if not is_over and ended.ended_at > made.began:
                self.violate("22 order", f"{key}: the next began before this one had ended", [before, made])

    def _check_bursts(self) -> None:
        """The last event of a burst is delivered alone, and at most one more for each new owner of its partition."""
        is_sure = set(self.plan.faults) <= {"trouble", "gap", "crash", "expire", "rebalance", "join", "stop"}
        quiet = {route.name: route.quiet for route in self.plan.routes if route.quiet}
        if not is_sure or not quiet or self.plan.memory < MAX_BYTES or self.plan.window < WINDOW:
            return
        for partition, rows in self.rows.items():
            place = TOPICS.ordered_target(partition.topic)
            if place is None or place[0] not in quiet:
                continue
            tried = {row.number for row in rows.values() if self.trails[row.number, _id_of(row)].attempts}
            last = {row.number for burst in _bursts(rows.values(), quiet[place[0]]) for row in burst[-1:]}
            others = tried - last
            if len(others) > sum(not each.is_first for each in self._takeovers[partition]):
                told = [row for row in rows.values() if row.number in others]
                self.violate("41 one of a burst", f"{len(others)} others were delivered", told)

    def _has_place(self, row: Row, trail: Trail, made: ObservedAttempt) -> bool:
        """Return whether the order holds for a delivery: it never was one of an unknown source, nor of a plain route.

        A replay goes through the tiers.
        """
        is_read_in_order = any(each.origin is not None for each in trail.rows) and not self._nowhere(row).rows
        return is_read_in_order and not trail.lives and self._was_ordered(made.route, row.at)

    def _is_appended_again(self, trail: Trail, made: ObservedAttempt) -> bool:
        """Return whether a delivery that had ended is repeated, as its ordered topic has deleted that it came.

        The router hadn't committed its event, and appended it again, with those after it.
        """
        is_repeated = trail.ended_at <= made.began
        return is_repeated and any(each.is_deleted and each.origin is not None for each in trail.rows)

    def _is_misjudged(self, trail: Trail) -> bool:
        """Return whether a delivery comes after later ones because its event, or one before it, was misjudged."""
        return any(
            self._is_misjudged_between(other, row)
            for row in trail.rows
            for other in self._before_in_spite_of_order(row)
        )

    def _repeated_as_misjudged(self, trail: Trail) -> int:
        """Return how many of a delivery's records repeat one that its topic had before a misjudged event."""
        return sum(
            any(
                other.partition == row.partition
                and other.origin == row.origin is not None
                and self._is_misjudged_between(other, row)
                for other in trail.rows
            )
            for row in trail.rows
        )

    def _is_misjudged_between(self, before: Row, row: Row) -> bool:
        """Return whether an event that is newly matched was taken for one of a recreated topic.

        Like such a one, it was appended later than what the ordered topic has before it, by its leaders' clocks, and so
        is what comes after it there, which is then delivered once more.
        `plans/clock-set-back-before-a-crash-and-new-rules.json` needs it.
        """
        return (
            before.origin is not None
            and row.origin is not None
            and any(
                before.offset < first.offset <= row.offset
                and first.origin is not None
                and first.origin.partition == row.origin.partition
                and first.origin.offset <= row.origin.offset
                and first.origin.appended_at > before.origin.appended_at
                and self._is_newly_matched(first, self._event_of(first.number, first.origin))
                for first in self.rows[row.partition].values()
            )
        )

    def _check_isolation(self) -> None:
        """What is healthy all the time isn't delayed by what isn't."""
        undelayed = self._undelayed()
        ordered = {route.name for route in self.plan.routes if route.is_ordered}
        at = {number: row.at for number, row in self._deletions.events.items()} | {
            row.number: row.at
            for rows in self.rows.values()
            for row in rows.values()
            if row.stored is None and row.event is not None
        }
        moved = Counter(
            (row.number, row.stored.delivery.route, row.stored.delivery.destination)
            for rows in self.rows.values()
            for row in rows.values()
            if row.stored is not None and row.stored.metadata.spill_reason == SpillReason.WINDOW_FULL
        )
        for made in self.attempts:
            if made.destination not in undelayed or made.route in ordered or at[made.number] < STARTED_WITHIN:
                continue
            delay = self._delay(made.route)
            waited = made.began - at[made.number] - delay
            # What waits for its due time may have to leave a full window, for the shortest tier. Others wait there for
            # theirs in memory, and if those fill the window, it isn't read before one of them has ended.
            moves = moved[made.number, made.route, made.destination] if delay else 0
            turn = tiers.WAIT_IN_MEMORY if self.plan.window < WINDOW else 0.0
            if waited > LATE + moves * (TIERS[tiers.SHORTEST] + turn):
                self.violate("15 isolation", f"a healthy destination waited {waited:.2f} s", [made])

    def _check_reassignments(self) -> None:
        """What a healthy destination gets is on its way as soon as its partition has an owner, and that is soon."""
        undelayed = self._undelayed()
        ordered = {route.name for route in self.plan.routes if route.is_ordered}
        places = {
            row.number: row
            for rows in self.rows.values()
            for row in rows.values()
            if row.stored is None and row.event is not None
        }
        for trail in self.trails.values():
            if not trail.attempts:
                continue
            made = min(trail.attempts, key=lambda each: each.began)
            if made.destination not in undelayed or made.route in ordered:
                continue
            event = places[made.number]
            due = event.at + self._delay(made.route)
            # Who gives a partition up moves what waits beside what has been delivered to the shortest tier; what is
            # delayed and will be split, as a whole.
            assert event.event is not None
            whole = self.trails.get((made.number, delivery_id(event.event.id, made.route, made.destination)), trail)
            rows = trail.rows if trail is whole else [*whole.rows, *trail.rows]
            moves = [row for row in rows if row.at < made.began and row.partition.topic == SHORTEST]
            moved_until = [row.at + TIERS[tiers.SHORTEST] for row in moves]
            taken_over_at = [
                each.at
                for row in (event, *moves)
                for each in self._takeovers[row.partition]
                if row.at <= each.at <= made.began
            ]
            waited = made.began - max([due, *moved_until, *taken_over_at])
            most = len(moves) * TIERS[tiers.SHORTEST] + len(taken_over_at) * REASSIGNED
            if waited > LATE or made.began - due > LATE + most:
                told = f"{made.began - due:.2f} s until the first attempt, the last {waited:.2f} of them with an owner"
                self.violate("19 reading continues", told, [event, *self._told(trail)])

    def _undelayed(self) -> set[str]:
        """Return the destinations that are healthy all the time, and take what comes."""
        troubled = {step.what["destination"] for step in self.plan.steps if step.do == "behave"}
        limits = self.plan.destinations.items()
        roomy = {name for name, each in limits if each["concurrency"] >= 50 and each["rate"] is None}
        return roomy - troubled

    def _check_breakers(self) -> None:
        """After five failures in a row, one at a time, and never closer than the first open time, until a success.

        Each kick allows one more, once.
        """
        by_lane: dict[tuple[str, str], list[ObservedAttempt]] = defaultdict(list)
        for made in self.attempts:
            by_lane[made.process, made.destination].append(made)
        for (_, destination), attempts in by_lane.items():
            kicks = list(self._kicked[destination])
            ended = sorted([each for each in attempts if each.ended is not None], key=lambda each: each.ended or 0.0)
            in_a_row, closed = 0, 0.0
            for each in ended:
                assert each.result is not None
                assert each.ended is not None
                in_a_row = in_a_row + 1 if each.result.result in FAILURES else 0
                if in_a_row < 5 or each.ended <= closed:
                    continue
                after = [other for other in attempts if other.began > each.ended]
                closed = min([o.ended for o in after if _is_answer(o) and o.ended is not None], default=math.inf)
                for first, second in pairwise([other for other in after if other.began < closed]):
                    if second.began - first.began >= 4.9:
                        continue
                    kick = next((at for at in kicks if first.began - PAUSE_LAG <= at <= second.began), None)
                    if kick is None:
                        self.violate("17 breaker", "two probes within the open time", [each, first, second])
                    else:
                        kicks.remove(kick)
        self._check_openings()

    def _check_openings(self) -> None:
        """What a breaker has put off, as its note says, had failures enough: five, whichever process met them."""
        failed: dict[str, list[float]] = defaultdict(list)
        for made in self.attempts:
            if made.ended is not None and made.result is not None and made.result.result in FAILURES:
                failed[made.destination].append(made.ended)
        for trail in self.trails.values():
            for row in trail.rows:
                if row.stored is None or not row.stored.metadata.breaker_deferrals:
                    continue
                count = sum(at <= row.at for at in failed[row.stored.delivery.destination])
                if count < 5:
                    self.violate("17 breaker", f"open after {count} failures", [row])


def _is_in_order(earlier: Row, later: Row) -> bool:
    """Return whether an event is newer than one that an ordered topic has before it."""
    assert earlier.event is not None
    assert later.event is not None
    places = [None if row.origin is None else row.origin.partition for row in (earlier, later)]
    return (places[0] is not None and places[0] == places[1]) or later.event.received_at >= earlier.event.received_at


def _changes_keys(plan: Plan) -> bool:
    """Return whether a reload has routes debounced by other keys, or no longer, or ones that weren't before."""
    is_debounced = {route.name: route.quiet > 0 for route in plan.routes}
    return any(
        "by" in changed or ("quiet" in changed and (changed["quiet"] > 0) != is_debounced[name])
        for step in plan.steps
        for name, changed in step.what.get("changes", {}).items()
    )


def _key_of(row: Row) -> str:
    """Return within which key a record of an ordered topic waits; events of one identity without a key share that."""
    assert row.stored is not None
    return order_key_of(row.stored.delivery)


def _has_burst(row: Row) -> bool:
    """Return whether a record is of an event with a key by which its route was debounced when it was appended."""
    return row.stored is not None and bool(row.stored.delivery.burst)


def _debounced_by(row: Row) -> str:
    """Return by which key a route was debounced when it got a record, as a digest."""
    return "" if row.origin is None else row.origin.debounce_key


def _id_of(row: Row) -> DeliveryId:
    assert row.stored is not None
    return row.stored.delivery.id


def _bursts(rows: Iterable[Row], quiet: float) -> Iterator[list[Row]]:
    """Yield the records of an ordered topic that follow one another by key, each with the one that is delivered last.

    One without a key is a burst of its own, and so is one after ten times that long.
    """
    open_: dict[str, list[Row]] = {}
    seen: set[int] = set()
    for row in sorted(rows, key=lambda each: each.offset):
        if row.event is None or row.number in seen:  # a router that began again has appended it once more
            continue
        seen.add(row.number)
        if not _has_burst(row):
            yield [row]
            continue
        key = _key_of(row)
        burst = open_.get(key)
        until = -math.inf if burst is None else min(burst[-1].appended_at, burst[0].appended_at + 9 * quiet) + quiet
        if burst is None or row.appended_at >= until:
            if burst is not None:
                yield burst
            open_[key] = [row]
        elif _is_in_order(burst[-1], row):
            burst.append(row)
    yield from open_.values()


def _part(number: int) -> Part:
    """Return the part of an event that is a number in a list of them, in order."""
    return Part(number, blake2b(b"%d" % number, digest_size=8).hexdigest())


def _all_targets(plan: Plan) -> Mapping[Target, None]:
    """Return all routes and destinations that there will be by some rules."""
    changes = [change for step in plan.steps for change in step.what.get("changes", {}).items()]
    tos = [(route.name, route.to) for route in plan.routes] + [(name, change.get("to", ())) for name, change in changes]
    return dict.fromkeys((name, to) for name, of_route in tos for to in of_route)


def group_of(partition: Partition) -> str:
    """Return the group that reads a topic of events or deliveries."""
    place = TOPICS.ordered_target(partition.topic)
    return ROUTER if place is None else TOPICS.ordered_group(*place)


def _offsets_done(commit: Commit) -> str:
    """Return what a commit calls done, as text: all below its base, and the offsets after that."""
    bits = int.from_bytes(commit.done, "little")
    return f"{commit.base}" + "".join([f" {commit.base + bit}" for bit in range(bits.bit_length()) if bits >> bit & 1])


def covers(commit: Commit, offsets: Iterable[int]) -> list[int]:
    """Return the offsets that a commit calls done."""
    bits = int.from_bytes(commit.done, "little")
    return [offset for offset in offsets if offset < commit.base or bits >> (offset - commit.base) & 1]


@dataclass(slots=True)
class _Replay:
    """A replay, which events it is of, up to where, when it was asked for, and when it was done or cancelled."""

    name: str
    which: Selection
    ends: Mapping[str, int]
    since: float
    ended: float = math.inf

    def is_for(self, row: Row) -> bool:
        """Return whether a record is an event that it is of, whatever the route matches."""
        which, place = self.which, f"{row.partition.topic}/{row.partition.number}"
        return (
            row.stored is None
            and row.event is not None
            and which.starts.get(place, row.offset + 1) <= row.offset < self.ends.get(place, 0)
            and row.at < self.ended  # another topic of its name may have that offset later
            and row.appended_at >= which.since
            and (which.until is None or row.appended_at < which.until)
            and which.source in (None, row.event.source)
        )

    def has_to_bring(self, row: Row) -> bool:
        """Return whether it is of an event that was there when it was asked for, and still is.

        Of a topic that was recreated since, nobody has asked for what came later.
        """
        return self.is_for(row) and row.at <= self.since and not row.is_deleted


@dataclass(slots=True)
class _Redelivery:
    """A redelivery: of which event, since when, by which numbers its deliveries are known, and what is told of it."""

    name: str
    asked: Redelivery
    row: Row
    since: float
    is_undone: bool = False
    numbers: set[int] = field(default_factory=set)
    answer: ControlRecord | None = None
    answered_at: float = math.inf

    def is_to(self, route: str, destination: str) -> bool:
        return self.asked.route in (None, route) and self.asked.destination in (None, destination)


def _is_for(order: ControlRecord, at: float, row: Row) -> bool:
    """Return whether a command for dead letters covers this one, which was there when it was given."""
    assert row.stored is not None
    delivery = row.stored.delivery
    return (
        row.at <= at < row.gone_at
        and row.offset < order.checkpoint.get(f"{row.partition.topic}/{row.partition.number}", 0)
        and order.filter.route in (None, delivery.route)
        and order.filter.destination in (None, delivery.destination)
        and (not order.filter.ids or delivery.id in order.filter.ids)
        and (not order.filter.records or _is_listed(order, row))
    )


def _is_listed(order: ControlRecord, row: Row) -> bool:
    """Return whether a dead letter is one that a replay has listed: its topic may have been recreated since."""
    is_from_then = order.latest is None or row.appended_at <= order.latest
    return is_from_then and f"{row.partition.number}@{row.offset}" in order.filter.records


def _names(made: ObservedAttempt) -> set[str]:
    return {f"route/{made.route}", f"destination/{made.destination}"}


def _is_answer(made: ObservedAttempt) -> bool:
    return made.result is not None and made.result.result in (
        Result.SUCCESS,
        Result.THROTTLED,
        Result.CLIENT_ERROR,
        Result.REDIRECT,
    )


def _is_refusal(attempt: Attempt) -> bool:
    return attempt.status is not None and 300 <= attempt.status < 500 and attempt.status not in (408, 410, 425, 429)


def _most_delay(last: Attempt, policy: RouteSpec) -> float:
    """Return the longest delay after an attempt that a policy allows."""
    return policy.schedule[min(last.number, len(policy.schedule)) - 1] * (1 + policy.jitter)


def _least_delay(made: ObservedAttempt, policies: Sequence[RouteSpec]) -> float:
    """Return the shortest delay after an attempt that any policy allows."""
    least = min(
        policy.schedule[min(made.attempt, len(policy.schedule)) - 1] * (1 - policy.jitter) for policy in policies
    )
    result: Any = made.result
    if result.retry_after and result.status in (429, 503):
        least = max(least, result.retry_after)
    return least


def _one(key: Key) -> tuple[int, list[str]]:
    return key[0], [key[1]]


def _place(partition: Partition) -> str:
    return f"{partition.topic}/{partition.number}"
