"""The live tail as server-sent events, which browsers and curl read (https://html.spec.whatwg.org/#server-sent-events).

id: 451722396160                   where to go on from: `Last-Event-ID`, which browsers send by themselves
event: event                       or `progress`: there are no more up to this `id`; or `cut`: why it ends
data: {"id":"evt_…",…}
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import orjson
from aiohttp import web

from gateway.api.problems import ApiError, Code
from gateway.api.tail import TailItem

EVENT_STREAM = "text/event-stream"
SLOW = 10.0
"""Seconds within which a listener has to read what it is sent."""
HEARTBEAT = 15.0
"""Seconds without anything new after which it is sent its progress: a listener that is gone is noticed by a write."""
ASKED_AGAIN = 1.0
"""Seconds after which it is checked again whether a listener may listen: a look at the access file in memory."""
GRACE = 5.0
"""Seconds in which a listener that is cut may read why."""

SENT_AHEAD = 64 << 10
"""Bytes that the system keeps of what a listener hasn't read: by itself it would keep megabytes of each."""
_NO_LONGER = ApiError(Code.FORBIDDEN, "you may no longer listen")


async def stream(
    request: web.Request,
    items: AsyncGenerator[TailItem, None],
    headers: Mapping[str, str],
    may_listen: Callable[[], bool],
    written: Callable[[object], bytes],
) -> web.StreamResponse:
    """Send a listener what there is until it leaves, is too slow, or may no longer listen.

    Raises ApiError only before anything is sent. `written` turns a shape into JSON.
    """
    clock = asyncio.get_running_loop().time
    async with aclosing(items):
        first = await anext(items)  # raises what is wrong with the query
        response = web.StreamResponse(headers={**headers, "Content-Type": EVENT_STREAM, "X-Accel-Buffering": "no"})
        response.force_close()
        if request.transport is not None and (connection := request.transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT_AHEAD)
        await response.prepare(request)
        at, quiet_since, asked_at = first.at, 0.0, clock()
        try:
            await _write(response, _message(first, written))
            async for each in items:
                if clock() > asked_at + ASKED_AGAIN:
                    asked_at = clock()
                    if not may_listen():
                        await _cut(request, response, _NO_LONGER)
                        break
                if each.event is None and each.at == at and clock() < quiet_since + HEARTBEAT:
                    continue
                at, quiet_since = each.at, clock()
                await _write(response, _message(each, written))
        except ApiError as error:
            await _cut(request, response, error)
        except ConnectionError:  # the listener has left
            pass
        return response


async def _write(response: web.StreamResponse, message: bytes) -> None:
    try:
        async with asyncio.timeout(SLOW):
            await response.write(message)
    except TimeoutError:
        raise ApiError(Code.BUSY, f"a listener has to read what it is sent within {SLOW:g} s") from None


async def _cut(request: web.Request, response: web.StreamResponse, error: ApiError) -> None:
    """Say why, to a listener that may not be reading, and end the connection."""
    message = b"event: cut\ndata: " + orjson.dumps(error.problem) + b"\n\n"
    try:
        async with asyncio.timeout(0.1):
            await response.write(message)
    except TimeoutError:
        if (transport := request.transport) is not None:
            transport.close()  # once what is on its way has been read
            asyncio.get_running_loop().call_later(GRACE, transport.abort)
    except ConnectionError:
        pass


def _message(item: TailItem, written: Callable[[object], bytes]) -> bytes:
    kind, shape = ("progress", item.index) if item.event is None else ("event", item.event)
    return f"id: {item.at}\nevent: {kind}\ndata: ".encode() + written(shape) + b"\n\n"
