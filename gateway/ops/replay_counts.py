"""What a replay would deliver, counted from the log by rules at hand: nothing is done."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import astuple, dataclass, field

from gateway.engine.control.records import Selection
from gateway.engine.control.state import Control
from gateway.engine.jobs.let_through import read_let_through
from gateway.engine.jobs.replay_matcher import Matched
from gateway.engine.jobs.undelivered import Fate, Undelivered, open_dead_letters
from gateway.log.base import Log
from gateway.log.topics import Topics
from gateway.model import Event
from gateway.ops.redaction import shown_type
from gateway.ops.replays import Window, would_replay
from gateway.rules.event_view import EventView
from gateway.rules.routing_revision import routing_revision
from gateway.rules.rules import Route, Rules

EVENTS_PER_STEP = 16
"""Records whose events are matched before other tasks run: a millisecond or two."""


@dataclass(slots=True)
class Counted:
    """Events and deliveries that a replay would queue; and of all that match, those not delivered."""

    count: int = 0
    deliveries: int = 0
    matching: int = 0
    undelivered: int = 0
    unknown: int = 0

    def add(self, matched: Matched, chosen: Collection[str]) -> None:
        """Count an event, which would be delivered to the chosen destinations."""
        self.count += bool(chosen)
        self.deliveries += len(chosen)
        self.matching += len(matched.fates)
        self.undelivered += matched.fates.count(Fate.UNDELIVERED)
        self.unknown += matched.fates.count(Fate.UNKNOWN)


@dataclass(slots=True, kw_only=True)
class ReplayCount:
    """What a replay would deliver: by the source and shown type of events, and by destination, in the route's order.

    `failing` are events of which the route can't be decided, `dead_items` open dead letters of items, which a replay of
    events leaves alone. `under_way` are replays of the route that haven't ended, `unread` how many partitions couldn't
    be read. `looked` of `total` records were read; with `is_chosen`, the route chooses its destinations.
    """

    selection: Selection
    total: int
    destinations: dict[str, int]
    is_chosen: bool
    under_way: tuple[str, ...]
    dead_items: int = 0
    unread: int = 0
    failing: int = 0
    looked: int = 0
    by: defaultdict[tuple[str, str], Counted] = field(default_factory=lambda: defaultdict(Counted))

    @property
    def in_all(self) -> Counted:
        return Counted(*[sum(numbers) for numbers in zip(*[astuple(each) for each in self.by.values()], strict=True)])


async def count_replay(
    log: Log,
    topics: Topics,
    selection: Selection,
    window: Window,
    *,
    control: Control,
    rules: Rules,
    show: Callable[[ReplayCount], None] = lambda _: None,
    seconds: float | None = None,
) -> ReplayCount:
    """Count what a replay would deliver; after so many seconds, what was read by then.

    Raises UsageError if the rules have no such route or destination, and LogUnavailableError.
    """
    route = rules.routes[selection.route]
    found = ReplayCount(
        selection=selection,
        total=window.total,
        destinations=dict.fromkeys(route.destinations, 0),
        is_chosen=route.choice is not None,
        under_way=_under_way(control, selection.route),
    )
    end = None if seconds is None else time.monotonic() + seconds
    dead = await open_dead_letters(log, topics, control, selection, readable=log.readable)
    let_through = await read_let_through(log, topics, selection, window.ends, readable=log.readable)
    found.unread = len([*window.unread, *dead.unreadable, *let_through.unreadable])
    found.dead_items = dead.items
    known = Undelivered(control, selection.route, dead, let_through=let_through, rules=lambda: rules)
    async with aclosing(would_replay(log, rules, selection, window, known)) as looked:
        async for number, matched in looked:
            found.looked = number
            if matched is not None:
                _add(found, matched, rules)
            show(found)
            if number % EVENTS_PER_STEP == 0:
                await asyncio.sleep(0)
                if end is not None and time.monotonic() > end:
                    break
    return found


def _add(found: ReplayCount, matched: Matched, rules: Rules) -> None:
    found.failing += any(target.end for target in matched.targets)
    if (attempted := matched.attempted()).targets:
        to = (attempted.undelivered() if found.selection.undelivered else attempted).destinations
        found.by[matched.event.source, shown_type(rules, matched.event)].add(attempted, to)
        for name in to:
            found.destinations[name] = found.destinations.get(name, 0) + 1


def _under_way(control: Control, route: str) -> tuple[str, ...]:
    """Return the replays of a route that haven't ended: what they queue may be counted, too."""
    return tuple(
        [
            each.name
            for each in control.commands.values()
            if each.selection is not None and each.selection.route == route and each.state == "requested"
        ]
    )


def changed_before(control: Control, rules: Rules, selection: Selection, window: Window) -> float | None:
    """Return since when the route of a selection has delivered events by itself as it does now; None if unknown."""
    text = routing_revision(rules).routes[selection.route]
    return control.history.since(selection.route, text, window.ends)


def routes_of(
    rules: Rules, event: Event, *, route: str | None, destination: str | None
) -> tuple[Sequence[Route], Sequence[Route]]:
    """Return the routes that match an event, and those of them that are asked for: by a name, or to a destination."""
    view = EventView.of(event)
    matched = [each for each, _ in rules.table.match(view)]
    asked = [
        each
        for each in matched
        if route in (None, each.name) and destination in (None, *[name for name, _ in each.targets(view, None)])
    ]
    return matched, asked
