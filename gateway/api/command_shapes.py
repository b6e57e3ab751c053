"""Shapes of what operators command through the API, and of what comes of that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from gateway.api.json_shapes import NAME, Limits, Time
from gateway.model import DeadReason

LONGEST_REASON = 500
SELECTION_BYTES = 128 << 10
"""Bytes of a `DeadSelection`, at most: 500 ids of 100 characters, each of which may be escaped."""
Reason = Annotated[str | None, Limits(about="why, for those who read of it later", longest=LONGEST_REASON)]
Name = Annotated[str, NAME]
When = Annotated[str | None, Limits(form="date-time", longest=40)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Why something is done."""

    reason: Reason = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadSelection:
    """Selects open dead letters, of those that exist now: those that match all given criteria.

    `ids` are of deliveries. Without anything else, `all` has to be true.
    """

    ids: Annotated[tuple[Annotated[str, Limits(pattern="^[!-~]+$", longest=100)], ...], Limits(longest=500)] = ()
    route: Name | None = None
    destination: Name | None = None
    dead_reason: DeadReason | None = None
    since: When = None
    until: When = None
    all: bool = False
    reason: Reason = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """Which events a route delivers again: those stored from `since` until before `until` (now), or one `event`.

    `rate` is deliveries a second, over all processes. With `undelivered`, only what the route has missed, and its open
    dead letters, as far as the log shows.
    """

    route: Name
    since: When = None
    until: When = None
    event: Annotated[str | None, Limits(longest=400)] = None
    destination: Name | None = None
    source: Name | None = None
    rate: Annotated[float | None, Limits(minimum=0.001, maximum=1e6)] = None
    undelivered: bool = False
    reason: Reason = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedeliveryRequest:
    """Restricts a redelivery to a route or a destination, or both; by default it is by all that match the event."""

    route: Name | None = None
    destination: Name | None = None
    reason: Reason = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command that is stored in the log, where the processes that carry it out read it.

    `is_new` is false if there was nothing to do: what is paused was paused already, by `by` and since `at`; what isn't
    paused, and has no paused deliveries, wasn't resumed. `GET /commands/{id}` says what has come of it.
    """

    id: str
    at: Time
    by: str | None
    state: str
    is_new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedKick:
    """What became of the deliveries of ordered routes that waited for a kick, as their processes have told.

    If it isn't known (yet), nor will be once a later kick has come, numbers are null. `count` is how many waited, as
    far as processes have told, `unfinished` how many of what was stored before the kick isn't finished now.
    """

    is_known: bool
    count: int | None
    tried: int | None
    delivered: int | None
    waiting: Mapping[str, int]
    failed_by_result: Mapping[str, int]
    repeated_failures: Mapping[str, int]
    dead: int | None
    unfinished: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandState:
    """The state of a command; if several have this name, of the latest.

    `is_read`: a gateway has read it. A pause is `paused` until it is resumed (`resuming`, then `active`); others are
    `requested`, then `done` or `cancelled`. `count` is how many deliveries were queued or dropped so far. Of a kick
    that is done, `tried` and `delivered` are how many of these were, `waiting` why others weren't tried, and
    `failed_by_result` how those failed that were; all without ordered routes, which `ordered` is about: null if what
    was kicked has none. A replay has looked at `scanned` of the `total` records of events.
    """

    id: str
    at: Time
    by: str | None
    state: str
    is_read: bool
    count: int
    tried: int | None
    delivered: int | None
    waiting: Mapping[str, int]
    failed_by_result: Mapping[str, int]
    dead: int
    ordered: OrderedKick | None
    scanned: int | None
    total: int | None
    unread_partitions: int
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replay: what it was asked for, and how far it is. `rate` is deliveries a second.

    `is_final`: it has ended, and a gateway has said how far it had come.
    """

    id: str
    at: Time
    state: str
    route: str
    destination: str | None
    source: str | None
    since: Time | None
    until: Time | None
    rate: float | None
    undelivered: bool
    scanned: int
    total: int
    queued: int
    unread_partitions: int
    is_final: bool
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPage:
    """Replays, the last that was asked for first; ended ones for as long as the log keeps them."""

    items: tuple[Replay, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedeliveredTo:
    """What a redelivery has made of one delivery: `queued`, or `dead`, as its route can't say where the event goes.

    `destination` is null if there is none. `paused_by` is the name ("route/…" or "destination/…") until whose resume it
    will be parked, null if it is delivered.
    """

    route: str
    destination: str | None
    outcome: str
    paused_by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Redelivery:
    """One event that is delivered again: what was asked for, and what has come of it.

    Its state is `requested`, then `done` or `cancelled`. `is_final`: there is nothing more to come; else its deliveries
    are those that were queued so far.
    """

    id: str
    at: Time
    by: str | None
    reason: str | None
    event: str
    position: str
    route: str | None
    destination: str | None
    state: str
    is_final: bool
    detail: str | None
    deliveries: tuple[RedeliveredTo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedeliveryPage:
    """The redeliveries that are remembered, the last that was asked for first."""

    items: tuple[Redelivery, ...]
    next_cursor: str | None
