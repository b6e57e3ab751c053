"""How many events of each source a process has routed, and how many each route has matched, since it started."""

from collections.abc import Collection, Iterable

from gateway.model import Event


class RouteMatches:
    """Totals by name, and the ids of the last events. Names that the rules have never had have none."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}
        """Of each source."""
        self.matched: dict[str, int] = {}
        """Of each route."""
        self.last_event: dict[str, str] = {}
        self.last_match: dict[str, str] = {}

    def add(self, event: Event, routes: Iterable[str]) -> None:
        """Count an event that was routed, with the routes that match it."""
        source, id_, matched = event.source, event.id, self.matched
        self.events[source] = self.events.get(source, 0) + 1
        self.last_event[source] = id_
        for name in routes:
            matched[name] = matched.get(name, 0) + 1
            self.last_match[name] = id_

    def keep(self, sources: Collection[str], routes: Collection[str]) -> None:
        """Forget the other names, which are no longer in the rules."""
        for totals, names in (
            (self.events, sources),
            (self.last_event, sources),
            (self.matched, routes),
            (self.last_match, routes),
        ):
            for name in totals.keys() - names:
                del totals[name]
