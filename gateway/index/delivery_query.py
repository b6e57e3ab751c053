"""Which deliveries are listed, and the statements that yield them, newest events first: pure.

Each statement looks at so many rows of one order at most, whatever of them is wanted: so what a list costs is bounded
by how many statements it takes, not by how many deliveries there are. What is open has indexes of its own, by route
and by destination, that don't grow with what has ended.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.index.statuses import OPEN, Status

WAITING = frozenset({Status.PARKED, Status.RETRYING, Status.PENDING})
"""What is neither ended nor a dead letter."""


class DeliveryCursor(NamedTuple):
    """A place in the list: behind the delivery with this key."""

    event: int
    delivery: str
    replayed: int


FIRST = DeliveryCursor(1 << 62, "", 0)
"""Before all deliveries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryQuery:
    """Which deliveries are listed: those of a route, destination, source and of some statuses; None for any.

    `sees` tells by source, route and destination whether a delivery may be known at all.
    """

    route: str | None = None
    destination: str | None = None
    source: str | None = None
    statuses: frozenset[Status] | None = None
    sees: Callable[[str, str, str], bool] | None = None

    @property
    def decides_alone(self) -> bool:
        """Whether the rows that its statements yield are all wanted."""
        ways = sum([each is not None for each in (self.route, self.destination)])
        is_by_rows = self.source is None and self.sees is None
        return is_by_rows and ways <= 1 and (self.statuses is None or self.is_by_status)

    @property
    def is_by_status(self) -> bool:
        """Whether its statements yield rows of these statuses alone."""
        if self.statuses is None:
            return False
        return self.statuses <= frozenset(OPEN) or (self.route is None and self.destination is None)

    def holds(self, route: str, destination: str, status: Status) -> bool:
        """Return whether a row is wanted, as far as it tells: not by its event's source."""
        return (
            self.route in (None, route)
            and self.destination in (None, destination)
            and (self.statuses is None or status in self.statuses)
        )

    def holds_with(self, source: str, route: str, destination: str) -> bool:
        """Return whether a row is wanted whose event is of a source."""
        return self.source in (None, source) and (self.sees is None or self.sees(source, route, destination))


def statement_of(query: DeliveryQuery, columns: str) -> tuple[str, Mapping[str, str]]:
    """Return a statement with the rows behind the parameters `event`, `delivery` and `replayed`, `count` of each order.

    And its other parameters. It returns them as one JSON array, in order.
    """
    named = {"route": query.route, "destination": query.destination}
    parameters = {name: value for name, value in named.items() if value is not None}
    behind = "(event, delivery, replayed) < (:event, :delivery, :replayed)"
    newest = "ORDER BY event DESC, delivery DESC, replayed DESC LIMIT :count"
    selects = [f"SELECT * FROM deliveries {way} {behind} {newest}" for way in _ways(query)]  # noqa: S608 - our own names
    together = " UNION ALL ".join([f"SELECT * FROM ({select})" for select in selects])  # noqa: S608 - as above
    listed = selects[0] if len(selects) == 1 else f"SELECT * FROM ({together}) {newest}"  # noqa: S608 - as above
    return f"SELECT json_group_array(json_array({columns})) FROM ({listed})", parameters  # noqa: S608 - as above


def _ways(query: DeliveryQuery) -> Sequence[str]:
    """Return the beginnings of WHERE clauses, one for each order in which rows are looked at."""
    statuses = sorted(query.statuses) if query.statuses is not None and query.is_by_status else []
    column = "destination" if query.destination is not None else "route" if query.route is not None else ""
    if column and statuses:
        by = f"INDEXED BY open_by_{column} WHERE is_open = 1 AND {column} = :{column}"
        return [f"{by} AND status = '{status}' AND" for status in statuses]
    if column:
        return [f"INDEXED BY deliveries_by_{column} WHERE {column} = :{column} AND"]
    if statuses:
        return [f"INDEXED BY deliveries_by_status WHERE status = '{status}' AND" for status in statuses]
    return ["WHERE"]
