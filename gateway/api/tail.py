"""The live tail: events that match a query, as the index gets them, in the order in which they were stored.

Nothing is buffered for anybody: a listener's next events are looked up once it has taken the last ones. What is sent is
complete up to a time, a little before that of the index, so that a listener that continues from there misses nothing:

    … sent ──▶ at ──────── the next window ────────▶ end ── SKEW ──▶ complete_to of the index ── not sent yet ──▶
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

MAX_LISTENERS = 16
"""How many listeners a process has at a time."""
MAX_PER_PRINCIPAL = 8
"""How many of them may be one principal's."""
POLL = 1.0
"""Seconds between looks at the index, which reads the log as often."""
PAGE = 100
"""Events that are looked up at a time."""
SKEW = 1.0
"""Seconds by which the clock of a partition's leader may be behind before its records have shown that to the index."""
FURTHEST = 3600.0
"""Seconds by which a listener that comes back may go back: for older events there is the search."""
WIDEST, NARROWEST = 60_000, 1
"""Milliseconds that are searched at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailItem:
    """An event, or with None that there are no more up to `at`, a number of the index to continue from."""

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
        """Take one of the places. Raises ApiError if none is left, or none for this principal."""
        if self._listeners >= MAX_LISTENERS:
            raise ApiError(Code.BUSY, f"at most {MAX_LISTENERS} listeners at a time")
        self._listeners += 1
        try:
            with self._shares.place(principal, MAX_PER_PRINCIPAL, "listeners"):
                yield
        finally:
            self._listeners -= 1


async def tail_events(
    backend: Backend, principal: Principal, *, query: str = "", after: int | None = None
) -> AsyncGenerator[TailItem, None]:
    """Stream the events that match a query as they are stored, from now on or after those that were sent.

    "Now" is by the clock of the partition's leader. Each window ends with a `TailItem` without an event, so a client
    that is catching up advances even if nothing matches. `since` and `until` of the query are ignored. Raises ApiError,
    at once if the query isn't right.
    """
    rules, asked = backend.rules(), query_of(backend, principal, query)
    now = math.floor(backend.log.now() * 1000)
    earliest = (now - round(FURTHEST * 1000)) * SLOTS
    at = now * SLOTS - 1 if after is None else max(min(after, END), earliest)
    width = WIDEST
    while True:
        index = backend.open_index()
        end = math.floor((index.complete_to - SKEW) * 1000) * SLOTS  # events before it
        while at + 1 < end:
            if rules is not backend.rules():  # what is seen may be something else
                rules, asked = backend.rules(), query_of(backend, principal, query)
            upper = min(end, ((at + 1) // SLOTS + width) * SLOTS)
            found = await _on_a_page(backend, asked, at, upper)
            if found is None and width > NARROWEST:
                width = max(NARROWEST, width // 8)
                continue
            for event in await _on_all_pages(backend, asked, at, upper) if found is None else found:
                yield TailItem(at=event.number, event=summary_of(event))
            width = min(WIDEST, width * 2)
            at = upper - 1
            yield TailItem(at=at, event=None, index=currency_of(index))
        yield TailItem(at=at, event=None, index=currency_of(index))
        await asyncio.sleep(POLL)


async def _on_a_page(backend: Backend, asked: Query, at: int, upper: int) -> list[IndexedEvent] | None:
    """Return the events from after a number on to before another, in order; None if a page doesn't have all."""
    events, before = await _page(backend, asked, at, upper)
    return events[::-1] if before is None else None


async def _on_all_pages(backend: Backend, asked: Query, at: int, upper: int) -> list[IndexedEvent]:
    """Return the events from after a number on to before another, in order, however many they are."""
    found: list[IndexedEvent] = []
    before: int | None = upper
    while before is not None:
        events, before = await _page(backend, asked, at, before)
        found += events
    return found[::-1]


async def _page(backend: Backend, asked: Query, at: int, before: int) -> tuple[list[IndexedEvent], int | None]:
    """Return the newest events from after a number on to before another, and before which there are more, if any."""
    window = replace(asked, since=_second(at + 1), until=_second(before + SLOTS - 1))
    async with must_be_available():
        page = await backend.open_index().search(window, limit=PAGE, cursor=before)
    is_more = page.cursor is not None and page.cursor > at + 1
    return [event for event in page.events if event.number > at], page.cursor if is_more else None


def _second(number: int) -> float:
    """Return the time of a number's millisecond: a little less of it, as it is rounded up to milliseconds again."""
    return (number // SLOTS - 0.4) / 1000
