"""`split: body.commits`: one delivery for each item of a list in an event."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain

import orjson

from gateway.model import Event, ExpressionError, ItemMissingError, Part
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.json_values import dumps, json_type

MAX_ITEMS = 1000
"""Maximum items of one event. Each is a delivery in memory."""
MAX_BYTES = 64 << 20
"""Maximum of an event's bytes times its items, since the record of each retry has the whole body."""


@dataclass(slots=True)
class Split:
    """The list whose items become deliveries."""

    items: Expression
    _last: tuple[Event, list[object]] | None = field(default=None, init=False, compare=False, repr=False)
    """The last event and its items, cached because all of its deliveries need them one after another."""
    _last_texts: tuple[Event, Sequence[bytes] | None] | None = field(
        default=None, init=False, compare=False, repr=False
    )

    def parts(self, event: Event) -> Iterator[Part]:
        """Yield the parts of an event. Raises ExpressionError, also for a missing field."""
        seen: Counter[str] = Counter()
        for number, item in enumerate(self._items(event)):
            digest = _digest(item)
            yield Part(number, digest, seen[digest])
            seen[digest] += 1

    def item(self, event: Event, part: Part | None) -> object:
        """Return the item that a delivery is for, even if its position in the list has changed.

        Raises ItemMissingError if it isn't in the list. Raises ExpressionError for a `part` of None: the delivery was
        made while its route had no `split`, and has yet to be split.
        """
        return self._items(event)[self._position(event, part)]

    def as_json(self, item: object, event: Event, part: Part | None) -> bytes:
        """Return the `item` of a delivery as JSON: as it came, if it has numbers that parsing may change.

        That isn't known of a list that is computed. Raises the same, and ExpressionError for an item that JSON lacks.
        """
        if _has_float(item) and (texts := self._texts_of(event)) is not None:
            return texts[self._position(event, part)]
        return dumps(item)

    def _position(self, event: Event, part: Part | None) -> int:
        if part is None:
            raise ExpressionError("split: expected a delivery of one item, got one of the whole event")
        items = self._items(event)
        positions = range(len(items))
        for position in chain(positions[part.number : part.number + 1], positions):
            if _digest(items[position]) == part.digest:
                return position
        raise ItemMissingError("split: expected a list with the item of this delivery, got one without it")

    def _texts_of(self, event: Event) -> Sequence[bytes] | None:
        """Return the items' JSON as it came; None if the list isn't a field of a JSON body."""
        if self._last_texts is None or self._last_texts[0] is not event:
            texts, path = None, self.items.fields[0] if self.items.is_field else None
            if path is not None and path.root == "body":
                texts = EventView.of(event).texts([segment.key for segment in path.segments])
            is_whole = texts is not None and len(texts) == len(self._items(event))
            self._last_texts = event, texts if is_whole else None
        return self._last_texts[1]

    def _items(self, event: Event) -> Sequence[object]:
        if self._last is None or self._last[0] is not event:
            self._last = event, self._evaluated(event)
        return self._last[1]

    def _evaluated(self, event: Event) -> list[object]:
        try:
            items = self.items.evaluate(EventView.of(event))
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
