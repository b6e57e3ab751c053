"""`split: body.commits`: a delivery of its own for each item of a list in an event."""

from dataclasses import dataclass

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression, json_type

MAX_ITEMS = 1000
"""Maximum items of one event: each is a delivery in memory, with the event's body."""


@dataclass(frozen=True, slots=True)
class Split:
    """The list by whose items a route splits its events."""

    items: Expression

    def count(self, view: EventView) -> int:
        """Return how many items an event has. Raises ExpressionError, also for a missing field."""
        return len(self._items(view))

    def choose(self, view: EventView, part: int | None) -> None:
        """Make an item of the event the one that its expressions name. Raises ExpressionError.

        `part` is None for a delivery that was made while its route split nothing: another makes those of its items.
        """
        items = self._items(view)
        if part is None or part >= len(items):
            got = "a delivery of the whole event" if part is None else f"{len(items)}"
            raise ExpressionError(f"split: expected a delivery of one item, got {got}")
        view.item = items[part]

    def _items(self, view: EventView) -> list[object]:
        try:
            items = self.items.evaluate(view)
        except ExpressionError as error:
            raise ExpressionError(f"split: {error}") from error
        if not isinstance(items, list):
            raise ExpressionError(f"split: expected a list, got {json_type(items)}")
        if len(items) > MAX_ITEMS:
            raise ExpressionError(f"split: expected at most {MAX_ITEMS:,} items, got {len(items):,}")
        return items
