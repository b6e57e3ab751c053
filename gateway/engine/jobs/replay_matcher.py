"""Select the events of a replay."""

from typing import NamedTuple

from gateway.engine.control.records import Selection
from gateway.engine.jobs.undelivered import Fate, Undelivered, identities_of
from gateway.log.base import Partition, Record
from gateway.log.records import decode_event
from gateway.model import (
    Event,
    ExpressionError,
    UndecodableRecordError,
)
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import routing_revision
from gateway.rules.rules import Route, Rules


class Matched(NamedTuple):
    """An event that the route matches. If its condition failed, `error` is the failure, as for a new event.

    `fates` is what is known of each destination's delivery, if that was asked for. `position` is that of its
    record if its identity alone doesn't distinguish it from others, else empty.
    """

    event: Event
    error: ExpressionError | None
    destinations: tuple[str, ...]
    fates: tuple[Fate, ...] = ()
    position: str = ""

    def undelivered(self) -> "Matched":
        """Return it with only those destinations that certainly didn't get it."""
        fates = zip(self.destinations, self.fates, strict=True)
        return self._replace(destinations=tuple([name for name, fate in fates if fate is Fate.UNDELIVERED]))


class Matcher:
    """Selects the events of a replay by the rules last given to `use`. `undelivered` returns their fates."""

    def __init__(self, selection: Selection, undelivered: Undelivered | None = None) -> None:
        self.destinations: tuple[str, ...] = ()
        self.route_revision = ""
        """The route as in a routing revision."""
        self.identities = ""
        """How the route's sources identify events, as in `identities_of`."""
        self._selection = selection
        self._undelivered = undelivered
        self._route: Route | None = None
        self._table: RouteTable[Route] = RouteTable(())

    def use(self, rules: Rules) -> str | None:
        """Switch to these rules; return what is missing for a replay by them, None if nothing is."""
        name, destination = self._selection.route, self._selection.destination
        route = rules.routes.get(name)
        if route is None:
            return f"expected a route {name}, got rules without it"
        if route is self._route:
            return None
        if destination is not None and destination not in route.destinations:
            return f"expected a destination {destination} of route {name}, got rules without it"
        self.destinations = route.destinations if destination is None else (destination,)
        self.route_revision = routing_revision(rules).routes[name]
        self.identities = identities_of(rules, route)
        self._route = route
        self._table = RouteTable((route,))
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
        for _, error in self._table.match(EventView.of(event)):
            undelivered = self._undelivered
            if undelivered is None:
                return Matched(event, error, self.destinations)
            fates = [undelivered.fate(partition, record, event, name) for name in self.destinations]
            return Matched(event, error, self.destinations, tuple(fates))
        return None
