"""Select the events of a replay."""

from itertools import compress
from typing import NamedTuple

from gateway.engine.control.records import Selection
from gateway.engine.jobs.undelivered import UNREAD, Fate, Undelivered, identities_of
from gateway.log.base import Partition, Record
from gateway.log.records import decode_event
from gateway.model import (
    Event,
    UndecodableRecordError,
)
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import is_decided_by_others, routing_revision
from gateway.rules.rules import Route, Rules, Target


class Matched(NamedTuple):
    """An event that the route takes, where it is, and where it goes, as for a new event.

    `fates` is what is known of each target's delivery, if that was asked for. `position` is that of its
    record if its identity alone doesn't distinguish it from others, else empty.
    """

    event: Event
    partition: Partition
    record: Record
    targets: tuple[Target, ...]
    fates: tuple[Fate, ...] = ()
    position: str = ""
    delayed_until: float = 0.0
    """Until when the route delays it (Unix seconds), or 0."""

    @property
    def destinations(self) -> tuple[str, ...]:
        return tuple([target.destination for target in self.targets])

    def undelivered(self) -> "Matched":
        """Return it with only those targets that certainly didn't get it."""
        fates = zip(self.targets, self.fates, strict=True)
        return self._replace(targets=tuple([target for target, fate in fates if fate is Fate.UNDELIVERED]))

    def attempted(self) -> "Matched":
        """Return it without the targets that end without an attempt."""
        kept = [target.end is None for target in self.targets]
        return self._replace(targets=tuple(compress(self.targets, kept)), fates=tuple(compress(self.fates, kept)))


class Matcher:
    """Selects the events of a replay by the rules last given to `use`. `undelivered` returns their fates."""

    def __init__(self, selection: Selection, undelivered: Undelivered | None = None) -> None:
        self.destinations: tuple[str, ...] = ()
        self.route_revision = ""
        """The route as in a routing revision."""
        self.identities = ""
        """How the route's sources identify events, as in `identities_of`, or `UNREAD`."""
        self._selection = selection
        self._undelivered = undelivered
        self._knows_duplicates = undelivered is None or undelivered.knows_duplicates
        self._route: Route | None = None
        self._table: RouteTable[Route] = RouteTable(())

    def use(self, rules: Rules) -> str | None:
        """Switch to these rules; return what is missing for a replay by them, None if nothing is."""
        name, destination = self._selection.route, self._selection.destination
        route = rules.routes.get(name)
        if route is None:
            return f"expected a route of the rules, got {name}"
        if route is self._route:
            return None
        if destination is not None and destination not in route.destinations:
            return f"expected a destination of route {name}, got {destination}"
        self.destinations = route.destinations if destination is None else (destination,)
        self.route_revision = routing_revision(rules).routes[name]
        self.identities = identities_of(rules, route) if self._knows_duplicates else UNREAD
        self._route = route
        self._table = rules.table if is_decided_by_others(self.route_revision) else RouteTable((route,))
        return None

    def match(self, partition: Partition, record: Record) -> Matched | None:
        """Return the event, if the replay is for it. Undecodable records were dead-lettered when they were routed.

        This doesn't depend on where it was delivered. Raises NewerRecordError.
        """
        which = self._selection
        if record.appended_at < which.since or (which.until is not None and record.appended_at >= which.until):
            return None  # the partition's clock went back within the window
        try:
            event = decode_event(record)
        except UndecodableRecordError:
            return None
        if which.source is not None and event.source != which.source:
            return None
        view, route = EventView.of(event), self._route
        for each, error in self._table.match(view):
            if each is not route:
                continue
            targets = tuple(
                [each for each in route.targets(view, error) if which.destination in (None, each.destination)]
            )
            until = event.received_at + route.delay if route.delay else 0.0
            known = self._undelivered
            fates = [] if known is None else [known.fate(partition, record, event, name) for name, _ in targets]
            return Matched(event, partition, record, targets, tuple(fates), delayed_until=until)
        return None

    def still_undelivered(self, matched: Matched) -> Matched:
        """Return it without the targets that a command has ended since they were found undelivered, if that counts."""
        known = self._undelivered
        if known is None:
            return matched
        where = matched.partition, matched.record, matched.event
        targets = [target for target in matched.targets if not known.has_ended_since(*where, target.destination)]
        return matched._replace(targets=tuple(targets))
