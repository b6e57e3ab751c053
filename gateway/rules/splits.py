"""`split: body.commits`: one delivery for each item of a list in an event.

All routes that take an event share what is parsed of it, and the budget of its expressions. The delivery of an item
needs its item again, at each attempt: of the events that were split last, what is parsed is kept for that, for all
routes together. Of another event it is parsed again, and kept for the attempts that come next.

Measured with 50 routes and an event of 0.8 MB with 60 items: its 3,000 deliveries are planned in 31 ms, of which
parsing takes 20, and dispatched in 0.13 s; with 50 different conditions on its items, 0.1 s, until the budget is spent.
If each route parsed it and had its own budget, these were 3.0 and 5.3 s in one turn of the event loop. The first
attempt of items with fractions takes 0.1 s for their texts, all others 0.5 ms each.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from threading import Lock

import orjson

from gateway.bodies.codings import MAX_CONTENT
from gateway.model import Event, EventId, ExpressionError, ItemMissingError, Part
from gateway.rules.event_view import MAX_COST, EventView
from gateway.rules.expressions import Expression
from gateway.rules.json_values import dumps, json_type

MAX_ITEMS = 1000
"""Maximum items of one event. Each is a delivery in memory."""
MAX_BYTES = 64 << 20
"""Maximum of an event's bytes times its items, since the record of each retry has the whole body."""
OWN_COST = MAX_COST // 5
"""Cost units that each list may take, however little others have left of the event's budget: else another team's route
would turn this one's deliveries into dead letters. It suffices for a comparison with each of some 280 items."""
MAX_KEPT = MAX_CONTENT
"""Bytes of bodies, and cost units of computed lists, that are kept for all routes together; the last event always is.
"""
MIN_KEPT = 16 << 10
"""As how many bytes an event counts at least: so at most 128 are kept."""
MAX_ADDED = MAX_COST + MAX_CONTENT
"""Cost units of computed lists, and bytes of items as they came, that are kept with one event."""


@dataclass(frozen=True, slots=True)
class Split:
    """The list whose items become deliveries."""

    items: Expression

    def parts(self, event: "SplitEvent") -> Sequence[Part]:
        """Return the parts of an event. Raises ExpressionError, also for a missing field."""
        return event.items(self.items).parts

    def view(self, event: Event, part: Part | None) -> EventView:
        """Return what a delivery's request sees, its item included, even if its position in the list has changed.

        Raises ItemMissingError if it isn't in the list. Raises ExpressionError for a `part` of None: the delivery was
        made while its route had no `split`, and has yet to be split.
        """
        kept = SplitEvent.of(event)
        items = kept.items(self.items)
        view = kept.view()
        view.item = items.values[items.position(part)]
        return view

    def as_json(self, item: object, event: Event, part: Part | None) -> bytes:
        """Return the `item` of a delivery as JSON: as it came, if it has numbers that parsing may change.

        That isn't known of a list that is computed. Raises the same, and ExpressionError for an item that JSON lacks.
        """
        if _has_float(item):
            kept = SplitEvent.of(event)
            if (texts := kept.texts(self.items)) is not None:
                return texts[kept.items(self.items).position(part)]
        return dumps(item)


class SplitEvent:
    """An event, and the lists that routes split off it: each is evaluated once.

    While its deliveries are planned, all that is evaluated over it shares the budget of the given view, of which each
    list has OWN_COST at least. Later each list has a budget of its own: an attempt evaluates one.
    """

    def __init__(self, event: Event, view: EventView) -> None:
        self.event = event
        self._view = view
        self._is_kept = False
        self._lists: dict[Expression, _Items] = {}
        self._added = 0

    @classmethod
    def of(cls, event: Event) -> "SplitEvent":
        """Return the one that is kept of an event, or of its equal, as each retry reads one; else one to be kept."""
        found = _kept.get(event)
        if found is None:
            found = cls(event, EventView.of(event))
            found.keep()
        return found

    @property
    def weight(self) -> int:
        """About the bytes and cost units that it took."""
        return max(MIN_KEPT, self._view.content_bytes) + self._added

    def keep(self) -> None:
        """Keep it for the attempts of its deliveries, which are all planned; without a list, only from the first on."""
        self._view, self._is_kept = self._view.again(), True
        if self._lists:
            _kept.put(self)

    def view(self) -> EventView:
        """Return a view with a budget of its own."""
        return self._view.again()

    def items(self, of: Expression) -> "_Items":
        """Return the items of a list. Raises ExpressionError."""
        found = self._lists.get(of)
        if found is None:
            view = self.view() if self._is_kept else self._view.with_left(OWN_COST)
            left = view.left
            found = _Items(_evaluated(of, self.event, view))
            self._add(left - view.left, of, found)
            if self._is_kept:
                self._view = view.again()  # with what has been parsed by now
                _kept.put(self)
        return found

    def texts(self, of: Expression) -> Sequence[bytes] | None:
        """Return the items' JSON as it came; None if the list isn't a field of a JSON body. Raises ExpressionError."""
        items, path = self.items(of), of.fields[0] if of.is_field else None
        if items.texts is None and path is not None and path.root == "body":
            texts = self._view.texts([segment.key for segment in path.segments])
            is_whole = texts is not None and len(texts) == len(items.values)
            items.texts = texts if texts is not None and is_whole else ()
            self._add(sum(map(len, items.texts)), of, items)
        return items.texts or None

    def _add(self, weight: int, of: Expression, items: "_Items") -> None:
        if self._added + weight > MAX_ADDED:
            self._lists, self._added = {}, 0
        self._lists[of] = items
        self._added += weight


class _Items:
    """The items of a list, and what is computed of all of them."""

    def __init__(self, values: Sequence[object]) -> None:
        self.values = values
        self.texts: Sequence[bytes] | None = None
        """Their JSON as it came, once it is needed; empty if it isn't known."""

    @cached_property
    def parts(self) -> Sequence[Part]:
        """Raises ExpressionError."""
        seen: Counter[str] = Counter()
        parts: list[Part] = []
        for number, value in enumerate(self.values):
            digest = _digest(value)
            parts.append(Part(number, digest, seen[digest]))
            seen[digest] += 1
        return parts

    def position(self, part: Part | None) -> int:
        """Return where the item of a delivery is. Raises ItemMissingError, and ExpressionError for a `part` of None."""
        if part is None:
            raise ExpressionError("split: expected a delivery of one item, got one of the whole event")
        positions = range(len(self.values))
        for position in chain(positions[part.number : part.number + 1], positions):
            if _digest(self.values[position]) == part.digest:
                return position
        raise ItemMissingError("split: expected a list with the item of this delivery, got one without it")


class _Kept:
    """The events that were split last; the lock is for threads that explain events."""

    def __init__(self) -> None:
        self._events: OrderedDict[EventId, SplitEvent] = OrderedDict()
        self._lock = Lock()

    def get(self, event: Event) -> SplitEvent | None:
        with self._lock:
            found = self._events.get(event.id)
            if found is None or (found.event is not event and found.event != event):
                return None
            self._events.move_to_end(event.id)
            return found

    def put(self, event: SplitEvent) -> None:
        with self._lock:
            self._events.pop(event.event.id, None)
            self._events[event.event.id] = event
            weight = sum([each.weight for each in self._events.values()])
            while weight > MAX_KEPT and len(self._events) > 1:
                weight -= self._events.popitem(last=False)[1].weight


_kept = _Kept()


def _evaluated(of: Expression, event: Event, view: EventView) -> list[object]:
    try:
        items = of.evaluate(view)
    except ExpressionError as error:
        raise ExpressionError(f"split: {error}") from error
    if not isinstance(items, list):
        raise ExpressionError(f"split: expected a list, got {json_type(items)}")
    if len(items) > MAX_ITEMS:
        raise ExpressionError(f"split: expected at most {MAX_ITEMS:,} items, got {len(items):,}")
    if len(items) * len(event.body) > MAX_BYTES:
        expected = f"at most {MAX_BYTES >> 20} MiB of bodies for all items together"
        raise ExpressionError(f"split: expected {expected}, got {len(items):,} of {len(event.body):,} bytes")
    return items


def _has_float(item: object) -> bool:
    """Return whether an item has a number that may be another one, or look otherwise, than it came."""
    waiting = [item]
    while waiting:
        match waiting.pop():
            case float():
                return True
            case dict() as fields:
                waiting += fields.values()
            case list() as elements:
                waiting += elements
            case _:
                pass
    return False


def _digest(item: object) -> str:
    try:
        text = orjson.dumps(item, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:  # orjson parses deeper nesting than it can serialize
        raise ExpressionError(f"split: expected items of JSON values: {error}") from error
    return blake2b(text, digest_size=8).hexdigest()
