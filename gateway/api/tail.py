"""The live tail: events that match a query, as the index gets them, in the order in which they were stored.

Nothing is buffered for anybody: a listener's next events are looked up once it has taken the last ones. What is told is
complete up to a time, that of the index, so that who goes on from there misses nothing:

    … told ──▶ at ──────── the next window ────────▶ complete_to of the index ── not told yet ──▶
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.events import currency_of, query_of, summary_of
from gateway.api.problems import ApiError, Code
from gateway.api.shares import Shares
from gateway.index.event_numbers import END, SLOTS
from gateway.index.query import Query
from gateway.index.results import IndexedEvent

LISTENERS = 16
"""At a time, in one process."""
EACH = 8
"""Of these, at most, those of one principal."""
POLL = 1.0
"""Seconds between looks at the index, which reads the log as often."""
PAGE = 100
"""Events that are looked up at a time."""
FURTHEST = 3600.0
"""Seconds by which a listener that comes back may go back: what is older, a search finds."""
WIDEST, NARROWEST = 60_000, 1
"""Milliseconds that are looked through at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An event, or with None that there are no more up to `at`, a number of the index: where to go on from."""

    at: int
    event: shapes.EventSummary | None
    index: shapes.Currency | None = None


class Tails:
    """The listeners of one process."""

    def __init__(self) -> None:
        self._listeners = 0
        self._shares = Shares()

    @contextmanager
    def place(self, principal: Principal) -> Iterator[None]:
        """Take one of the places. Raises ApiError if there is none left, or none for them."""
        if self._listeners >= LISTENERS:
            raise ApiError(Code.BUSY, f"expected at most {LISTENERS} listeners at a time, got one more")
        self._listeners += 1
        try:
            with self._shares.place(principal, EACH, "listeners"):
                yield
        finally:
            self._listeners -= 1


async def tail_events(
    backend: Backend, principal: Principal, *, query: str = "", after: int | None = None
) -> AsyncGenerator[Told, None]:
    """Tell the events that match a query as they are stored, from now on or after those that were told.

    After those of a window comes one without an event, whose number is the end of the window. `since` and `until` of
    the query don't count. Raises ApiError, at once if the query isn't right.
    """
    rules, asked = backend.rules(), query_of(backend, principal, query)
    now = math.floor(backend.log.now() * 1000)
    earliest = (now - round(FURTHEST * 1000)) * SLOTS
    at = now * SLOTS - 1 if after is None else max(min(after, END), earliest)
    width = WIDEST
    while True:
        index = backend.open_index()
        end = math.floor(index.complete_to * 1000) * SLOTS  # events before it
        while at + 1 < end:
            if rules is not backend.rules():  # what is seen may be something else
                rules, asked = backend.rules(), query_of(backend, principal, query)
            upper = min(end, ((at + 1) // SLOTS + width) * SLOTS)
            found, is_whole = await _window(backend, asked, at, upper, is_narrow=width <= NARROWEST)
            if not is_whole:
                width = max(NARROWEST, width // 8)
                continue
            for event in found:
                yield Told(at=event.number, event=summary_of(event))
            width = min(WIDEST, width * 2)
            at = upper - 1
        yield Told(at=at, event=None, index=currency_of(index))
        await asyncio.sleep(POLL)


async def _window(
    backend: Backend, asked: Query, at: int, upper: int, *, is_narrow: bool
) -> tuple[list[IndexedEvent], bool]:
    """Return the events from after a number on to before another, in order, and whether these are all of them.

    There are more if they don't fit a page; of a millisecond, all are looked up.
    """
    window = replace(asked, since=_second(at + 1), until=_second(upper))
    found: list[IndexedEvent] = []
    cursor: int | None = upper
    while cursor is not None:
        async with must_be_available():
            page = await backend.open_index().search(window, limit=PAGE, cursor=cursor)
        found += [event for event in page.events if event.number > at]
        cursor = page.cursor
        if cursor is not None and cursor <= at + 1:
            break
        if cursor is not None and not is_narrow:
            return [], False
    return found[::-1], True


def _second(number: int) -> float:
    """Return the time of a number's millisecond: a little less of it, as it is rounded up to milliseconds again."""
    return (number // SLOTS - 0.4) / 1000
