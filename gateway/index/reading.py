"""The index for who only reads it: a command, while another process keeps the file."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from gateway.index.delivery_query import DeliveryCursor, DeliveryQuery
from gateway.index.file import open_to_read, translated
from gateway.index.notes import Note, noted
from gateway.index.query import Query
from gateway.index.results import IndexedDelivery, IndexedEvent, ListedDelivery, Page, place_of
from gateway.index.search import Searcher
from gateway.model import immutable

MOST = 500
"""Events of a page, at most."""


@immutable
class Currency:
    """How current an index is (Unix seconds, 0 if unknown).

    All events that were stored before `complete_to` are in it, except from a partition whose leader has a clock that is
    behind and hasn't shown it yet (`leader_clocks.py`); statuses are at least those of `settled_at`.
    """

    complete_to: float
    settled_at: float


class Reading:
    """An index that is open to read. Each method raises IndexUnavailableError."""

    def __init__(self, path: Path, searcher: Searcher, currency: Currency) -> None:
        """Used by `index_to_read`. `currency` is as of the opening: what is found may be newer."""
        self._path = path
        self._searcher = searcher
        self.currency = currency

    def search(self, query: Query, limit: int) -> Iterator[IndexedEvent]:
        """Yield the newest events that match a query, so many at most, however long that takes."""
        cursor: int | None = None
        while limit:
            page = self._page(query, min(limit, MOST), cursor)
            yield from page.events
            limit, cursor = limit - len(page.events), page.cursor
            if cursor is None:
                return

    def _page(self, query: Query, limit: int, cursor: int | None) -> Page:
        with translated(self._path):
            return self._searcher.search(query, limit=limit, cursor=cursor)

    def event(self, id: str, position: str) -> IndexedEvent | None:  # noqa: A002 - what it is
        """Return the event with an id that is stored at a position (`topic/partition@offset`); None if it lacks it."""
        place = place_of(position)
        with translated(self._path):
            return None if place is None else self._searcher.event_at(id, *place)

    def newest(self, id: str) -> IndexedEvent | None:  # noqa: A002 - what it is
        """Return the newest event with an id whose record's position is known; None if there is none.

        Of more than `lookups.LAST_RECEIVED` with the id in a segment, it is one of those that were received last.
        """
        with translated(self._path):
            return next((each for each in self._searcher.events(id) if each.position), None)

    def has_namesake(self, event: IndexedEvent) -> bool:
        """Return whether another event with an event's id came in one request with it."""
        with translated(self._path):
            return len(self._searcher.namesakes(event.id, event.received_at, 2)) > 1

    def list_deliveries(self, query: DeliveryQuery, limit: int) -> tuple[list[ListedDelivery], float | None]:
        """Return the first deliveries that a query is for, so many at most, however long that takes.

        And since when events were appended of which some deliveries may wait without a record; None if none may.
        """
        found: list[ListedDelivery] = []
        cursor: DeliveryCursor | None = None
        while True:
            with translated(self._path):
                page = self._searcher.list_deliveries(query, limit=min(limit - len(found), MOST), cursor=cursor)
            found += page.deliveries
            cursor = page.cursor
            if cursor is None or len(found) >= limit:
                return found, page.unrecorded_since

    def deliveries(self, event: IndexedEvent) -> list[IndexedDelivery]:
        """Return what is known of an event's deliveries."""
        with translated(self._path):
            return self._searcher.deliveries(event.number)


@contextmanager
def index_to_read(path: Path) -> Iterator[Reading]:
    """Open an index to read it. Raises UsageError if there is none of this version, and IndexUnavailableError."""
    with closing(open_to_read(path)) as connection:
        with translated(path):
            currency = Currency(
                complete_to=noted(connection, Note.COMPLETE_TO), settled_at=noted(connection, Note.SETTLED_AT)
            )
        yield Reading(path, Searcher(connection), currency)
