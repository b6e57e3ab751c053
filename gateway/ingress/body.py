"""Reads request bodies within a deadline, and as far as there is memory. What they decompress to: `bodies/codings`."""

import asyncio
from time import perf_counter

from aiohttp import web
from typing_extensions import override

from gateway.ingress.body_memory import BodyMemory, BodyReservation, Share
from gateway.model import RefusedError


class BodyReader(BodyReservation):
    """Reads one body, reserving memory for it as it arrives."""

    __slots__ = ("_deadline", "_limit", "_memory", "_request")

    def __init__(self, request: web.BaseRequest, memory: BodyMemory, share: Share, limit: int) -> None:
        super().__init__(share)
        self._request = request
        self._memory = memory
        self._limit = limit
        self._deadline: asyncio.Timeout | None = None

    async def read(self, seconds: float) -> bytes:
        """Return the body; its memory stays reserved until the reservation is closed. Raises RefusedError."""
        request, stream = self._request, self._request.content
        try:
            if (request.content_length or 0) > self._limit:
                raise too_large(self._limit)
            if "Expect" in request.headers:
                await _ask_to_continue(request)
            body = bytearray()  # not a list of chunks, which may be single bytes
            async with asyncio.timeout(seconds) as self._deadline:
                while chunk := await stream.readany():
                    self._take(len(chunk))
                    body += chunk
            return bytes(body)
        except TimeoutError:
            if self.is_evicted:
                raise evicted() from None
            raise RefusedError(408, "body_slow", f"expected the whole body within {seconds:g} s") from None
        except web.RequestPayloadError as error:
            forget_frames(error)
            raise RefusedError(400, "malformed_body", "the body isn't framed correctly") from error
        except (ConnectionError, RuntimeError) as error:
            # aiohttp reports "Connection closed." as a RuntimeError. Nobody will read the response.
            forget_frames(error)
            raise RefusedError(499, "disconnected", "the sender went away") from error

    def _take(self, more: int) -> None:
        if self.size + more > self._limit:
            raise too_large(self._limit)
        if not self._memory.grow(self, more, now=perf_counter()):
            raise evicted() if self.is_evicted else no_room(self._memory)

    @override
    def evict(self) -> None:
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(0.0)


def too_large(limit: int) -> RefusedError:
    return RefusedError(413, "body_too_large", f"expected at most {limit} bytes of body in addition to these headers")


def no_room(memory: BodyMemory) -> RefusedError:
    """Return the refusal of a body that has just got no memory: the reason says what uses it."""
    if memory.is_full_of_slow_bodies:  # anyone may send them: more processes would only hold more
        return RefusedError(503, "slow_bodies", "too many slow bodies are in progress")
    return RefusedError(503, "overloaded", "too many requests are in progress")


def evicted() -> RefusedError:
    """Return the refusal of a body that was evicted."""
    # Not a 503, which would mean that we can't serve: the sender kept us waiting.
    return RefusedError(408, "evicted", "the body arrived too slowly: its memory was needed for others")


def forget_frames(error: BaseException | None) -> None:
    """Let go of where the error of a request was raised.

    The request keeps the error, and the frames refer to the request: only the garbage collector would free them. What
    it finds of a thousand refused connections holds all others up for 30 ms.
    """
    if error is not None:
        error.__traceback__ = None


async def _ask_to_continue(request: web.BaseRequest) -> None:
    """Send `100 Continue` to a sender that waits for it (RFC 9110 §10.1.1), as curl does before a large body."""
    if request.headers["Expect"].lower() == "100-continue" and request.version >= (1, 1):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # As aiohttp's own applications do: what is written next is still the start of the response.
        request.writer.output_size = 0
