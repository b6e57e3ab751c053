"""What a route has delivered and what it hasn't, as far as the log shows. Successful deliveries leave no record.

    has an open dead letter ─────────────────────────────────▶ undelivered
    a redelivery has brought it ─────────────────────────────▶ ended
    dropped as a duplicate, which it isn't by today's rules ─▶ undelivered, unless a replay has covered it since
    routed by a revision in which the route matches it ──────▶ ended: delivered, on its way, or given up on purpose
    ... if that revision isn't known ────────────────────────▶ unknown
    ... of an ordered route, but perhaps by another before ──▶ unknown: what came after it may have gone first
    a replay of the route, as it was then, has covered it ───▶ ended, unless it left it to a router of other rules
    else: the route was different, or there was none ────────▶ undelivered

The first that applies counts. What is undelivered is unknown if a newer version has written a command after the event
was stored, by which it, or its dead letter, may have been delivered.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import sha256
from math import inf
from typing import NamedTuple

from gateway.engine.control.records import (
    ControlRecord,
    DeadFilter,
    DeadLetterProperties,
    Kind,
    Selection,
    partition_key,
)
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import NEWER_VERSION, read_dead_letter
from gateway.engine.jobs.let_through import LetThrough
from gateway.engine.jobs.log_reader import records_in_turns
from gateway.engine.unavailable_partitions import Readable
from gateway.log.base import LEADER_CLOCK_SKEW, Log, Partition, Record
from gateway.log.topics import Topics
from gateway.model import Event, identity_of
from gateway.rules.event_builder import EventBuilder
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import PastRoute, past_route, routing_revision
from gateway.rules.rules import Route, RoutingRevision, Rules

UNREAD = "unread"
"""In place of a digest of identities: dedupe entries couldn't be read, so what was dropped as a duplicate is left out.
"""


_BRINGING: Collection[Kind] = ("replay", "redeliver", "dead")
"""The kinds of commands that deliver events again."""


class Fate(Enum):
    """What the log shows of one delivery."""

    UNDELIVERED = auto()
    ENDED = auto()
    """Delivered, on its way, or given up on purpose."""
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDeadLetters:
    """The open dead letters of a route: their positions as PARTITION@OFFSET, by event and destination.

    `ends` is how far they were read.
    """

    route: str
    letters: Mapping[tuple[str, float, str], Sequence[str]] = field(default_factory=dict)
    places: Mapping[str, tuple[DeadLetterProperties, Partition, int]] = field(default_factory=dict)
    """What and where each of them is, by its position."""
    ends: Mapping[str, int] = field(default_factory=dict)
    latest: float = 0.0
    """When the last of them was appended."""
    items: int = 0
    """How many others are of items of split events: a replay of such an event would repeat its other items."""
    unreadable: frozenset[str] = frozenset()
    """Partitions ("topic/partition") that couldn't be read, or not wholly: a newer version wrote open dead letters, or
    commands that may have resolved some."""

    def of(self, event: Event, destination: str, route: Route | None) -> Sequence[str]:
        """Return those of one delivery: with a chosen destination, also of the event when it named none."""
        own = self.letters.get((event.id, event.received_at, destination), ())
        if not destination or route is None or not route.is_chosen(destination):
            return own
        return [*own, *self.letters.get((event.id, event.received_at, ""), ())]


async def open_dead_letters(
    log: Log,
    topics: Topics,
    control: Control,
    selection: Selection,
    *,
    readable: Readable,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    is_wanted: Callable[[], bool] = lambda: True,
) -> OpenDeadLetters:
    """Read the open dead letters of a selection's route, from the partitions that are `readable`.

    Which route those of a newer version are of isn't known. Stops reading once they aren't wanted.
    """
    letters: dict[tuple[str, float, str], list[str]] = {}
    places: dict[str, tuple[DeadLetterProperties, Partition, int]] = {}
    latest, items = 0.0, 0
    which = DeadFilter(route=selection.route)
    # Also of events that named no declared destination: by now they may name this one.
    destinations = None if selection.destination is None else (selection.destination, "")
    # A dead letter from before the first event was appended isn't about any of them.
    bounds, unreadable = await readable(topics.dead)
    starts = await log.offsets_at(topics.dead, max(0.0, selection.since - LEADER_CLOCK_SKEW), bounds.keys())
    unread = {f"{topics.dead}/{number}" for number in unreadable}
    if selection.since <= control.newer_until(_BRINGING) + LEADER_CLOCK_SKEW:
        unread.add(partition_key(topics.control_partition))
    ranges = {number: (max(first, starts.get(number, first)), end) for number, (first, end) in bounds.items()}
    async with aclosing(records_in_turns(log, topics.dead, ranges, sleep=sleep, is_wanted=is_wanted)) as records:
        async for partition, record in records:
            letter, stored = read_dead_letter(record)
            if letter.reason == NEWER_VERSION and not control.resolved_by(letter, partition, record.offset):
                unread.add(partition_key(partition))
            if stored is None or not which.covers(letter) or control.resolved_by(letter, partition, record.offset):
                continue
            if destinations is not None and letter.destination not in destinations:
                continue
            if stored.delivery.part is not None:
                items += 1
                continue
            event = stored.delivery.event
            latest = max(latest, letter.at)
            about = letters.setdefault((event.id, event.received_at, stored.delivery.destination), [])
            about.append(position := f"{partition.number}@{record.offset}")
            places[position] = letter, partition, record.offset
    ends = {f"{topics.dead}/{number}": end for number, (_, end) in bounds.items()}
    return OpenDeadLetters(
        route=selection.route,
        letters=letters,
        places=places,
        ends=ends,
        latest=latest,
        unreadable=frozenset(unread),
        items=items,
    )


def knows_all(control: Control) -> bool:
    """Return whether no newer version has written anything by which fates are judged."""
    return control.newer_until((*_BRINGING, "rules", "routed")) == -inf


def resolution(
    command: ControlRecord, dead: OpenDeadLetters, letters: Sequence[str], *, count: int, deliveries: int
) -> ControlRecord:
    """Return a completed command about dead letters whose deliveries a replay has injected: they are resolved.

    `deliveries` is how many these were, `count` how many the replay has injected in all. No other letters have its key:
    those of a replay that was killed before its checkpoint stay resolved.
    """
    digest = sha256(",".join(letters).encode()).hexdigest()[:16]
    return ControlRecord(
        kind="dead",
        name=f"{command.name}-{count}-{digest}",
        state="done",
        at=command.at,
        checkpoint=dead.ends,
        filter=DeadFilter(route=dead.route, records=tuple(letters)),
        count=deliveries,
        latest=dead.latest,
    )


def injected_by(command: ControlRecord, control: Control) -> int:
    """Return how many deliveries a replay has injected: up to its checkpoint, and since then with resolved letters.

    Those aren't injected again.
    """
    count = before = control.injected(command.key)
    prefix = f"dead/{command.name}-"
    for key, resolved in control.commands.items():
        if key.startswith(prefix):
            number = key.removeprefix(prefix).partition("-")[0]
            count += resolved.count if number.isdecimal() and int(number) > before else 0
    return count


def identities_of(rules: Rules, route: Route) -> str:
    """Return a digest of how the sources of a route identify events, and of which `dedupe` drops duplicates."""
    known = [
        (name, source.dedupe, EventBuilder(source).expression_texts()["id"])
        for name in sorted(route.sources)
        if (source := rules.sources.get(name)) is not None
    ]
    return sha256(repr(known).encode()).hexdigest()[:16]


class Undelivered:
    """Returns the fates of one route's deliveries, as of the start of the replay with the `key`.

    Redeliveries count that have come since. Without a key, the fates after all replays that are asked for have ended.
    """

    def __init__(
        self,
        control: Control,
        route: str,
        dead: OpenDeadLetters,
        *,
        let_through: LetThrough | None = None,
        rules: Callable[[], Rules],
        key: str = "",
    ) -> None:
        self._control = control
        self._history = control.history
        self._route = route
        self._name = key.removeprefix("replay/")
        self._dead = dead
        self._let_through = let_through
        self.knows_duplicates = let_through is None or not let_through.unreadable
        self._rules = rules
        replays = _replays_of(control, route, key)
        self._replays = [_Replay(command, control, is_foretold=not key) for command in replays]
        self._redelivered_as_of, self._redelivered = -1, dict[tuple[str, int, str], list[ControlRecord]]()
        self._newer_until = control.newer_until(_BRINGING)
        self._identified_by: tuple[Rules | None, str] = None, ""
        self._known: dict[str, tuple[PastRoute | None, RouteTable[Route] | None]] = {}

    def fate(self, partition: Partition, record: Record, event: Event, destination: str) -> Fate:
        """Return the fate of an event's delivery by the route to a destination."""
        fate = self._known_fate(partition, record, event, destination)
        may_be_brought = record.appended_at <= self._newer_until + LEADER_CLOCK_SKEW
        return Fate.UNKNOWN if fate is Fate.UNDELIVERED and may_be_brought else fate

    def has_ended_since(self, partition: Partition, record: Record, event: Event, destination: str) -> bool:
        """Return whether a command has brought or dropped a delivery that was undelivered when the replay began.

        Dead letters that the replay itself has resolved are those of another event of that identity.
        """
        letters = self._dead.of(event, destination, self._rules().routes.get(self._route))
        if not letters:
            return self._was_redelivered(partition, record, event, destination)
        commands = [self._control.resolved_by(*self._dead.places[position]) for position in letters]
        return all(command is not None and not command.name.startswith(f"{self._name}-") for command in commands)

    def _known_fate(self, partition: Partition, record: Record, event: Event, destination: str) -> Fate:
        """Return the fate of a delivery without what newer versions have written."""
        if self._dead.of(event, destination, self._rules().routes.get(self._route)):
            return Fate.UNDELIVERED
        if self._was_redelivered(partition, record, event, destination):
            return Fate.ENDED
        which = _Candidate(partition, record, event, EventView.of(event), destination)
        revision = self._history.revision_at(partition, record.offset)
        routed = self._routed_by(revision, which)
        if routed is not Fate.ENDED:
            return self._after_replays(routed, which, is_judged_by_routing=True)
        text = "" if revision is None else revision.routes[self._route]
        if self._was_dropped_as_duplicate(text, which):
            return self._after_replays(Fate.UNDELIVERED, which, is_judged_by_routing=False)
        if self._may_have_been_overtaken(which):
            return self._after_replays(Fate.UNKNOWN, which, is_judged_by_routing=False)
        return Fate.ENDED

    def _was_redelivered(self, partition: Partition, record: Record, event: Event, destination: str) -> bool:
        """Return whether a redelivery has brought an event; not one that was asked for before the event was stored.

        That was of another one, in a topic that has been recreated since.
        """
        if self._redelivered_as_of != self._control.redeliveries:
            self._redelivered_as_of = self._control.redeliveries
            self._redelivered = _redelivered_by(self._control, self._route)
        return any(
            event.id == command.redelivery.event and record.appended_at <= command.at + LEADER_CLOCK_SKEW
            for command in self._redelivered.get((partition_key(partition), record.offset, destination), ())
            if command.redelivery is not None
        )

    def _after_replays(self, known: Fate, which: "_Candidate", *, is_judged_by_routing: bool) -> Fate:
        """Return what replays have made of a fate. A replay of the undelivered has injected what is UNDELIVERED.

        With `is_judged_by_routing` that follows from the routing history, which it may have known less of.
        """
        fate = known
        for replay in self._replays:
            if not replay.covers(which):
                continue
            replayed = self._by(replay.text, which.view, which.destination) if replay.text else Fate.UNKNOWN
            if replayed is Fate.ENDED and replay.is_of_undelivered:
                if known is Fate.UNKNOWN:
                    continue
                if is_judged_by_routing:
                    replayed = self._judged_by(replay, which)
                elif replay.identities == UNREAD and replay.has_scanned(which.partition, which.record.offset):
                    continue
                elif replay.identities != self._identities():
                    replayed = Fate.UNKNOWN  # it may have taken the event for a duplicate
            if replayed is Fate.ENDED:
                return Fate.ENDED
            if replayed is Fate.UNKNOWN:
                fate = Fate.UNKNOWN
        return fate

    def _identities(self) -> str:
        rules = self._rules()
        if rules is not self._identified_by[0]:
            route = rules.routes.get(self._route)
            self._identified_by = rules, "" if route is None else identities_of(rules, route)
        return self._identified_by[1]

    def _judged_by(self, replay: "_Replay", which: "_Candidate") -> Fate:
        """Return ENDED if a replay of the undelivered has injected, or will inject, an event that it covers.

        UNDELIVERED if it left the event to the router, which then had other rules; UNKNOWN if they changed during the
        replay.
        """
        partition, offset = which.partition, which.record.offset
        if not replay.has_scanned(partition, offset):
            return Fate.ENDED
        revisions = self._history.revisions_between(partition, offset, *replay.known_below)
        # Most of up to 200 revisions have the route as others have it: its condition is evaluated once for each kind.
        kinds = {None if revision is None else (revision.routes.get(self._route),) for revision in revisions}
        was_missed = {
            kind is not None and self._by(*kind, which.view, which.destination) is Fate.UNDELIVERED for kind in kinds
        }
        if len(was_missed) > 1:
            return Fate.UNKNOWN
        return Fate.ENDED if was_missed == {True} else Fate.UNDELIVERED

    def _may_have_been_overtaken(self, which: "_Candidate") -> bool:
        """Return whether the route is ordered, and an earlier owner may have read the event for others alone.

        If that owner then appended what came after it, the event wasn't delivered when it was read again.
        """
        route = self._rules().routes.get(self._route)
        if route is None or route.order is None:
            return False
        revisions = self._history.may_have_been_routed_before(which.partition, which.record)
        return any(self._routed_by(revision, which) is not Fate.ENDED for revision in revisions)

    def _was_dropped_as_duplicate(self, text: str, which: "_Candidate") -> bool:
        """Return whether an event was dropped as a duplicate, and isn't one by the active rules."""
        then, _ = self._known[text]
        event = which.event
        if (
            self._let_through is None
            or then is None
            or event.source not in then.deduped
            or identity_of(event.id) is None
        ):
            return False
        if not self._let_through.was_dropped_as_duplicate(which.partition, which.record.offset):
            return False
        source = self._rules().sources.get(event.source)
        return source is None or source.dedupe is None or not EventBuilder(source).reproduces_id_of(event)

    def _routed_by(self, revision: RoutingRevision | None, which: "_Candidate") -> Fate:
        """Return the fate of an event that was routed by a revision, UNKNOWN if that isn't known."""
        if revision is None:
            return Fate.UNKNOWN
        return self._by(revision.routes.get(self._route), which.view, which.destination)

    def _by(self, text: str | None, view: EventView, destination: str) -> Fate:
        """Return the fate of an event that was routed by a revision with the route as `text`, None if without it."""
        if text is None:
            return Fate.UNDELIVERED
        if text not in self._known:
            then = past_route(self._route, text)
            self._known[text] = then, None if then is None or then.route is None else RouteTable((then.route,))
        then, table = self._known[text]
        if then is None:
            return Fate.UNKNOWN
        is_chosen = then.route is not None and then.route.choice is not None
        if view.source not in then.sources or not (is_chosen or destination in then.destinations):
            # Where its condition is hidden it may have chosen none, which is a dead letter that was replayed since.
            is_unclear = view.source in then.sources and then.route is None and self._is_chosen(destination)
            return Fate.UNKNOWN if is_unclear else Fate.UNDELIVERED
        if table is not None and not then.is_alone:
            table = self._table_with_others(text)
        if table is None:
            return Fate.UNKNOWN
        # An event whose condition failed is a dead letter, or was resolved on purpose.
        names = {
            target.destination
            for route, _ in table.match(view)
            if route.name == self._route
            for target in route.targets(view, None)
        }
        if "" in names and self._is_chosen(destination):
            return Fate.ENDED  # it named no declared destination: its dead letter was replayed, or dropped
        return Fate.ENDED if destination in names else Fate.UNDELIVERED

    def _is_chosen(self, destination: str) -> bool:
        route = self._rules().routes.get(self._route)
        return route is not None and route.is_chosen(destination)

    def _table_with_others(self, text: str) -> RouteTable[Route] | None:
        """Return the routes that decided what a route takes, if they are those of the active rules; else None."""
        rules = self._rules()
        return rules.table if routing_revision(rules).routes.get(self._route) == text else None


class _Candidate(NamedTuple):
    """An event and a destination, whose fate is asked for."""

    partition: Partition
    record: Record
    event: Event
    view: EventView
    destination: str


class _Replay:
    """The events that a replay has covered, or will cover if it `is_foretold`, and its route as in a routing revision.

    That is "" if it has changed meanwhile. A waiting replay has covered what is below its checkpoint.
    """

    def __init__(self, command: ControlRecord, control: Control, *, is_foretold: bool) -> None:
        assert command.selection is not None, command
        self._selection = command.selection
        is_through = command.state == "done" or (command.state == "requested" and is_foretold)
        self._reach = command.checkpoint if is_through else control.checkpoint(command.key)
        self.text = control.replayed_as(command.key)
        self.is_of_undelivered = command.selection.undelivered
        self.known_below = control.known_below(command.key) or (-1, inf)  # -1: of a former control topic
        """Up to which offsets of the control topic it knew the routing, from its start to where it has scanned."""
        self.identities = control.identities_of(command.key)
        self._scanned = command.checkpoint if command.state == "done" else control.checkpoint(command.key)

    def has_scanned(self, partition: Partition, offset: int) -> bool:
        return offset < self._scanned.get(partition_key(partition), 0)

    def covers(self, asked: _Candidate) -> bool:
        which, partition_name, record = self._selection, partition_key(asked.partition), asked.record
        return (
            which.starts.get(partition_name, record.offset + 1) <= record.offset < self._reach.get(partition_name, 0)
            and which.since <= record.appended_at
            and (which.until is None or record.appended_at < which.until)
            and which.source in (None, asked.event.source)
            and which.destination in (None, asked.destination)
        )


def _redelivered_by(control: Control, route: str) -> dict[tuple[str, int, str], list[ControlRecord]]:
    """Return the redeliveries by a route: by the event's partition, its offset, and the destination."""
    found: dict[tuple[str, int, str], list[ControlRecord]] = {}
    for command in control.commands.values():
        last = None if command.redelivery is None else control.last_checkpoint(command.key)
        if last is None or command.redelivery is None:
            continue
        for each in last.results:
            if each.route == route:
                place = command.redelivery.partition, command.redelivery.offset, each.destination
                found.setdefault(place, []).append(command)
    return found


def _replays_of(control: Control, route: str, key: str) -> Sequence[ControlRecord]:
    return [
        command
        for command in control.commands.values()
        if command.selection is not None and command.selection.route == route and command.key != key
    ]
