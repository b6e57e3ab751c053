"""What replays have queued of missed events, by the control topic."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from typing_extensions import override

from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control

MOMENT = 0.001
"""Resolution, in seconds, of the times in printed replay commands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What replays have queued of a period: deliveries, and of how many events. `is_done` once all have ended.

    An event counts once for each route; `most` is of how many events a single route has queued some.
    """

    queued: int
    events: int
    most: int
    is_done: bool

    @override
    def __str__(self) -> str:
        return f"replayed since: {self.queued:,} queued" if self.is_done else f"being replayed: {self.queued:,} queued"


def replayed(
    control: Control,
    sources: Collection[str],
    routes: Collection[str] | None,
    *,
    since: float,
    until: float,
    fan_out: Mapping[str, int] | None = None,
) -> Replayed | None:
    """Return what the replays have queued that overlap a period in which these routes missed events of these sources.

    None if there are none. `routes` None means all. A replay counts deliveries, so its events are that number divided
    by the number of the route's destinations (`fan_out`, 1 if unknown). The sum may be too large: an event may match
    several routes, and a replay may reach beyond the period.
    """
    commands = [
        command
        for command in control.commands.values()
        if command.selection is not None
        and (routes is None or command.selection.route in routes)
        and _overlaps(command, sources, since, until)
    ]
    events = Counter[str]()
    for command in commands:
        events[_route(command)] += _queued(command, control) // (fan_out or {}).get(_route(command), 1)
    return _sum(commands, control, events)


def covered(control: Control, routes: Mapping[str, Iterable[str]], *, since: float, until: float) -> Replayed | None:
    """Return what replays have queued if, for each of these routes (by source), one covers the whole period, else None.

    A replay covers it if it was commanded after `until`, when the rules became active, and excludes no destination,
    partition or moment. The number includes the replays that only overlap the period.
    """
    commands: dict[str, ControlRecord] = {}
    for source, names in routes.items():
        for name in names:
            every = [command for command in control.commands.values() if _route(command) == name]
            if not any(covers(command, name, source=source, since=since, until=until) for command in every):
                return None
            commands |= {command.key: command for command in every if _overlaps(command, (source,), since, until)}
    return _sum(commands.values(), control, Counter())


def covers(command: ControlRecord, route: str, *, source: str | None, since: float, until: float) -> bool:
    """Return whether a replay matches a route's events of a whole period again, by rules loaded after it."""
    which = command.selection
    return (
        which is not None
        and which.since > 0  # or it is of one event
        and command.state in ("requested", "done")
        and not command.unread
        and command.at >= until
        and which.route == route
        and which.source in (None, source)
        and which.destination is None
        and which.since <= since + MOMENT
        and (which.until is None or which.until >= until)
    )


def _overlaps(command: ControlRecord, sources: Collection[str], since: float, until: float) -> bool:
    which = command.selection
    return (
        which is not None
        and command.kind == "replay"
        and which.source in (None, *sources)
        and command.at > since
        and which.since < until
        and (which.until is None or which.until > since)
    )


def _route(command: ControlRecord) -> str:
    return "" if command.selection is None else command.selection.route


def _queued(command: ControlRecord, control: Control) -> int:
    return command.count if command.state == "done" else max(command.count, control.injected(command.key))


def _sum(commands: Collection[ControlRecord], control: Control, events: Counter[str]) -> Replayed | None:
    if not commands:
        return None
    queued = sum([_queued(command, control) for command in commands])
    is_done = all(command.state != "requested" for command in commands)
    return Replayed(queued=queued, events=events.total(), most=max(events.values(), default=0), is_done=is_done)
