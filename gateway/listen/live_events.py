"""Between what is heard and the live list: a row for each event, and another copy of one when its user wants it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from gateway.listen.feed import Heard, Missed
from gateway.listen.listening import Forwarder, Shown
from gateway.listen.presentation import missed_row, row_of, what_came_of
from gateway.ops.live_list import MAX_ROWS, Listed, State

AHEAD = 100
"""What is heard before it is drawn, at most."""


class LiveEvents:
    """The rows of one list. `show` takes what is heard, `items` and `resend` are for a `LiveDisplay`."""

    def __init__(self, forwarder: Forwarder | None) -> None:
        self._forwarder = forwarder
        self._coming: asyncio.Queue[Listed | State] = asyncio.Queue(AHEAD)
        self._coming.put_nowait(State("connecting"))
        self._events: dict[str, Heard] = {}

    async def show(self, each: Shown | State | Missed) -> None:
        match each:
            case State():
                await self._coming.put(each)
            case Missed():
                await self._coming.put(missed_row(each))
            case Shown(event=event):
                self._events[event.name] = replace(event, fields={})
                if len(self._events) > MAX_ROWS:
                    del self._events[next(iter(self._events))]
                await self._coming.put(row_of(each, None if self._forwarder is None else self._forwarder.host))

    async def items(self) -> AsyncIterator[Listed | State]:
        while True:
            yield await self._coming.get()

    async def resend(self, item: Listed) -> str:
        """Send another copy; return what came of it. Raises ApiRefusedError and ApiUnavailableError."""
        if self._forwarder is None:
            return "expected --forward URL to send it to, got none"
        if (event := self._events.get(item.id)) is None:
            return "this row isn't an event"
        shown = Shown(event=event, sent=await self._forwarder.send(event))
        await self.show(shown)
        return what_came_of(shown)
