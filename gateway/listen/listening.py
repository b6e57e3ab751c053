"""What a listener hears, and the copies that it sends on, one after the other, in the order of the events.

    feed ──▶ show (waiting) ──▶ so many may wait ──▶ fetch ──▶ send ──▶ show (what came of it)

Where the copies are slow, the feed waits: nothing is read any more, the API cuts the connection, and the next one goes
on from there.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gateway.client.client import Client
from gateway.listen.copies import Target, copy_of
from gateway.listen.feed import Feed, Heard, Missed
from gateway.model import Result
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError
from gateway.ops.live_list import State

WAITING = 100
"""Events that wait to be sent on, at most."""
SEND_TIMEOUT = 30.0
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0
"""Seconds before an event is asked for again, if there was no answer: each time twice as long."""
GONE = "not_found"
ITS_TURN = "its turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What came of a copy: `status` is None without a response, and `detail` then says why."""

    is_success: bool
    status: int | None
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An event, and what came of its copy: None if none is sent, or not yet. `waits_for` says what it waits for."""

    event: Heard
    sent: Sent | None = None
    waits_for: str = ""


Show = Callable[[Shown | State | Missed], Awaitable[None]]


class Forwarder:
    """Sends copies of events to a target, one at a time. A context manager. `api` is closed by who has made it."""

    def __init__(self, api: ApiClient, target: Target) -> None:
        self._api = api
        self._target = target
        self._client = Client(target.guard)
        self._turn = asyncio.Lock()

    @property
    def host(self) -> str:
        """Where they go to, for people."""
        return self._target.host

    async def __aenter__(self) -> Self:
        """Raises ApiRefusedError if events aren't for the eyes of who asks, so that nothing could be sent."""
        role = (await self._api.get("me")).get("role")
        if role == "viewer":
            raise ApiRefusedError(
                "--forward: expected a token of the role reader, got one of a viewer, who sees no headers or bodies;"
                " without --forward, events are listed"
            )
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def send(self, event: Heard) -> Sent:
        """Send a copy of an event; return what came of it. Raises ApiRefusedError and ApiUnavailableError."""
        async with self._turn:
            try:
                outbound = copy_of(await self._api.get("events", event.name, "raw"), self._target.url)
            except ApiRefusedError as error:
                if error.code != GONE:
                    raise
                return _unsent("the API doesn't have it any more")
            except (ValueError, KeyError, TypeError):
                return _unsent("the answer isn't an event of the API")
            try:
                attempt = await self._client.attempt(outbound, timeout=SEND_TIMEOUT, number=1)
            except ValueError as error:  # a header that can't be sent
                return _unsent(str(error))
        return Sent(
            is_success=attempt.result is Result.SUCCESS,
            status=attempt.status,
            seconds=attempt.seconds,
            detail=attempt.detail,
        )


class Listening:
    """Shows what is heard and, with a forwarder, what came of its copies."""

    def __init__(self, feed: Feed, forwarder: Forwarder | None, show: Show) -> None:
        self._feed = feed
        self._forwarder = forwarder
        self._show = show
        self._waiting: asyncio.Queue[Heard] = asyncio.Queue(WAITING)

    async def run(self) -> None:
        """Listen until it is cancelled. Raises ApiRefusedError, and ApiUnavailableError if it doesn't even begin."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._hear(), name="listen-feed")
                if self._forwarder is not None:
                    tasks.create_task(self._send_on(self._forwarder), name="listen-copies")
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _hear(self) -> None:
        async with aclosing(self._feed.events()) as told:
            async for each in told:
                if not isinstance(each, Heard):
                    await self._show(each)
                elif self._forwarder is None:
                    await self._show(Shown(event=each))
                else:
                    await self._show(Shown(event=each, waits_for=ITS_TURN))
                    await self._waiting.put(each)

    async def _send_on(self, forwarder: Forwarder) -> None:
        while True:
            event = await self._waiting.get()
            await self._show(Shown(event=event, sent=await self._sent(forwarder, event)))

    async def _sent(self, forwarder: Forwarder, event: Heard) -> Sent:
        """Send a copy, once the API answers."""
        wait = FIRST_WAIT
        while True:
            try:
                return await forwarder.send(event)
            except ApiUnavailableError as error:
                await self._show(Shown(event=event, waits_for=str(error)))
                await asyncio.sleep(max(wait, min(error.retry_after, LONGEST_WAIT)))
                wait = min(2 * wait, LONGEST_WAIT)


def _unsent(why: str) -> Sent:
    return Sent(is_success=False, status=None, seconds=0.0, detail=why)
