"""The lives of a delivery, as rows of the index: pure decisions.

A replay begins another life with a record, and has a row of its own. A kick begins one without: it resets the attempts
of an ordered delivery at which a key has halted, and that is still the one whose record the ordered topic has. So its
row goes on, as that of the latest life, until the record is done; after a crash, an earlier life may go on. If it
becomes a dead letter, that record continues the one in the ordered topic, whichever of the two is read first.
"""

from collections.abc import Iterable

from gateway.index.settlement import AttemptOutcome, DeliveryKey, DeliveryRow, after_attempt, after_record
from gateway.index.statuses import OPEN


class Row:
    """A row, whether its record is in an ordered topic, and the key that it has in the file, None if it is new."""

    __slots__ = ("is_ordered", "now", "stored")

    def __init__(self, row: DeliveryRow, *, is_ordered: bool, stored: DeliveryKey | None = None) -> None:
        self.now = row
        self.is_ordered = is_ordered
        self.stored = stored


class Lives:
    """The rows of one delivery of an event."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def add_record(self, record: DeliveryRow, *, is_ordered: bool) -> None:
        """Note what a record says, that of an ordered topic or another."""
        for each in self.rows:
            if each.now.key == record.key:
                each.is_ordered = is_ordered if record.successor >= each.now.successor else each.is_ordered
                each.now = after_record(each.now, record)
                return
        for each in self.rows:
            if each.is_ordered and each.now.successor + 1 == record.successor:
                each.now, each.is_ordered = _continued(each.now, record), is_ordered
                return
            if is_ordered and record.successor + 1 == each.now.successor:
                each.now = _continued(record, each.now)
                return
        self.rows.append(Row(record, is_ordered=is_ordered))

    def add_attempt(self, first: DeliveryRow, outcome: AttemptOutcome) -> None:
        """Note an attempt; `first` is what there is of its delivery if nothing else is known of its life."""
        found = self._row_of(first)
        if found is None:
            self.rows.append(Row(after_attempt(None, first, outcome), is_ordered=False))
            return
        row = found.now
        if row.key != first.key:  # the numbers of its attempts begin again
            row = row._replace(key=max(row.key, first.key), attempts=0)
        found.now = after_attempt(row, first, outcome)

    def _row_of(self, first: DeliveryRow) -> Row | None:
        """Return the row of an attempt's life: its own, one that had it before a kick, or the first in its order."""
        own = [each for each in self.rows if each.now.key == first.key]
        before = [each for each in self.rows if each.now.key > first.key and each.now.began <= first.began]
        kicked = [
            each for each in self.rows if each.is_ordered and each.now.status in OPEN and each.now.key < first.key
        ]
        return next(iter([*own, *before, *sorted(kicked, key=lambda each: each.now.offset)]), None)


def _continued(ordered: DeliveryRow, successor: DeliveryRow) -> DeliveryRow:
    """Return what is known of a delivery by its record in an ordered topic and by the next one, of another life."""
    return after_record(ordered._replace(attempts=0), successor)._replace(key=max(ordered.key, successor.key))
