"""Which events a replay is for."""

from typing import NamedTuple

from gateway.engine.control.records import Selection
from gateway.engine.jobs.undelivered import Fate, Undelivered
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
    """An event that the route matches. Where its condition failed, `error` says how, as for a new event.

    `fates` tells of each destination what is known of it, where that was asked. `place` is where its record is, if its
    identity alone doesn't tell it from others; else it is empty.
    """

    event: Event
    error: ExpressionError | None
    destinations: tuple[str, ...]
    fates: tuple[Fate, ...] = ()
    place: str = ""

    def undelivered(self) -> "Matched":
        """Return it with those destinations alone that have surely not got it."""
        fates = zip(self.destinations, self.fates, strict=True)
        return self._replace(destinations=tuple([name for name, fate in fates if fate is Fate.UNDELIVERED]))


class Matcher:
    """Picks the events that a replay is for, by the rules that it was last told of. `known` tells of their fates."""

    def __init__(self, selection: Selection, known: Undelivered | None = None) -> None:
        self.destinations: tuple[str, ...] = ()
        self.text = ""
        """The route as an edition of the rules has it."""
        self._selection = selection
        self._known = known
        self._route: Route | None = None
        self._table: RouteTable[Route] = RouteTable(())

    def use(self, rules: Rules) -> str | None:
        """Go by these rules; say what is missing if a replay by them can't be made."""
        name, destination = self._selection.route, self._selection.destination
        route = rules.routes.get(name)
        if route is None:
            return f"expected a route {name}, got rules without it"
        if route is self._route:
            return None
        if destination is not None and destination not in route.destinations:
            return f"expected a destination {destination} of route {name}, got rules without it"
        self.destinations = route.destinations if destination is None else (destination,)
        self.text = routing_revision(rules).routes[name]
        self._route = route
        self._table = RouteTable((route,))
        return None

    def match(self, partition: Partition, record: Record) -> Matched | None:
        """Return the event, if it is one of the selection. What can't be read was dead-lettered when it was routed.

        To which destinations it has been delivered doesn't matter here. Raises NewerRecordError.
        """
        which = self._selection
        if record.appended_at < which.since or (which.until is not None and record.appended_at >= which.until):
            return None  # the clock of the partition went back within the window
        try:
            event = decode_event(record)
        except UndecodableRecordError:
            return None
        if which.source is not None and event.source != which.source:
            return None
        for _, error in self._table.match(EventView.of(event)):
            known = self._known
            if known is None:
                return Matched(event, error, self.destinations)
            fates = [known.fate(partition, record, event, name) for name in self.destinations]
            return Matched(event, error, self.destinations, tuple(fates))
        return None
