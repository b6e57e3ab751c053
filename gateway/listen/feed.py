"""The events that a process tells, over connections that may be cut: nothing twice, and nothing missing.

    connect ─▶ told ─▶ … ─▶ cut ─▶ wait ─▶ connect, after the last number that was told ─▶ …

Until something was told, a failure is the end: nothing has begun that could go on.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import orjson

from gateway.index.event_numbers import SLOTS
from gateway.listen.cursor import Cursor
from gateway.listen.messages import MalformedStreamError, Message, Messages
from gateway.ops.api_client import ApiClient, ApiUnavailableError
from gateway.ops.live_list import State
from gateway.ops.output import when

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the next connection: twice as long after each that has told nothing new."""
REACH = 3600.0
"""Seconds by which a process goes back, at most."""
BEHIND = 15.0
"""Seconds by which an index may be behind before that is said: it reads the log every second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """An event as the API tells it. `fields` are all that it tells, those that this version doesn't know as well."""

    id: str
    source: str
    type: str
    at: float
    """When it was received, in Unix seconds."""
    status: str
    destinations: tuple[str, ...]
    position: str | None
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return self.position or self.id


class Missed(NamedTuple):
    """Events of a time (Unix seconds) that aren't told any more: they have to be searched for."""

    since: float
    until: float


class Feed:
    """The events that match a query. `api` is closed by who has made it."""

    def __init__(self, api: ApiClient, query: str) -> None:
        self._api = api
        self._query = query
        self._cursor = Cursor()
        self._state: str | None = None
        self._currency = ""

    async def events(self) -> AsyncGenerator[Heard | State | Missed, None]:
        """Yield what is told from now on, and the state of the connection, or else of the index behind it.

        Raises ApiRefusedError, and ApiUnavailableError if it doesn't even begin.
        """
        wait = FIRST_WAIT
        while True:
            before, after = self._cursor.last, 0.0
            try:
                async with aclosing(self._connection()) as told:
                    async for each in told:
                        yield each
                why = f"{self._api.url}: the connection was ended"
            except ApiUnavailableError as error:
                if self._cursor.last is None:
                    raise
                why, after = str(error), error.retry_after
            if self._cursor.last != before:
                wait = FIRST_WAIT
            delay = max(wait * random.uniform(0.5, 1.0), min(after, LONGEST_WAIT))  # noqa: S311 - no secret
            wait = min(2 * wait, LONGEST_WAIT)
            for state in self._changed(f"reconnecting in {delay:.1f} s: {why}"):
                yield state
            await asyncio.sleep(delay)

    async def _connection(self) -> AsyncGenerator[Heard | State | Missed, None]:
        """Yield what is told until it is cut."""
        after = self._cursor.resume
        async with self._api.tail(self._query, after) as tail:
            offset = 0.0 if tail.began_at is None else tail.began_at - time.time()
            reach = time.time() + offset - REACH
            if after is not None and (since := after / SLOTS / 1000) < reach:
                yield Missed(since, reach)
            messages = Messages()
            async for piece in tail.pieces:
                for message in self._read(messages, piece):
                    for each in self._told(message, time.time() + offset):
                        yield each

    def _read(self, messages: Messages, piece: bytes) -> list[Message]:
        try:
            return messages.feed(piece)
        except MalformedStreamError as error:
            raise ApiUnavailableError(f"{self._api.url}: {error}") from error

    def _told(self, message: Message, now: float) -> list[Heard | State]:
        try:
            fields = orjson.loads(message.data)
            match message.event:
                case "event":
                    heard, number = _heard(fields), int(message.id)
                    identity = f"{heard.id} {fields['received_at']}"
                    is_new = self._cursor.hear(number, position=heard.position, identity=identity)
                    return [*self._changed(self._currency), *([heard] if is_new else [])]
                case "progress":
                    self._cursor.reach(int(message.id))
                    self._currency = _currency(fields, now)
                    return [*self._changed(self._currency)]
                case "cut":
                    detail, code = str(fields["detail"]), str(fields["code"])
                    raise ApiUnavailableError(f"{self._api.url}: {detail}", code=code)
                case _:  # of a later version
                    return []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ApiUnavailableError(f"{self._api.url}: the answer isn't a live tail of a gateway") from error

    def _changed(self, state: str) -> list[State]:
        """Return what there is to know now, if it isn't what was said last."""
        if state == self._state:
            return []
        self._state = state
        return [State(state)]


def _heard(fields: Mapping[str, Any]) -> Heard:
    position = fields["position"]
    return Heard(
        id=str(fields["id"]),
        source=str(fields["source"]),
        type=str(fields["type"]),
        at=datetime.fromisoformat(fields["received_at"]).timestamp(),
        status=str(fields["status"]),
        destinations=tuple(dict.fromkeys([str(each["destination"]) for each in fields["deliveries"]])),
        position=None if position is None else str(position),
        fields=fields,
    )


def _currency(fields: Mapping[str, Any], now: float) -> str:
    """Return what there is to know of an index; empty if it is current."""
    problem = f": {fields['problem']}" if fields["problem"] else ""
    if fields["complete_to"] is None:
        return f"the index isn't complete to any time yet{problem}"
    complete_to = datetime.fromisoformat(fields["complete_to"]).timestamp()
    if now - complete_to > BEHIND or problem:
        return f"the index is behind, complete to {when(complete_to)}{problem}"
    return ""
