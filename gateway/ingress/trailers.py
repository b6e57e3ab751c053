"""A connection on which no trailer of a request is a header of the next one.

aiohttp's parser (3.14, in C) keeps the last field of a chunked request's trailers, and begins the headers of the next
request with it. Behind a proxy that reuses connections, the next request may be another client's, with a header that
somebody else has chosen (header injection). So no parser reads anything after a chunked request: the connection gets
another, or is closed after its response if the next request has begun in the same data.
"""

import asyncio
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpParser
from typing_extensions import override


class WithoutTrailers(web.RequestHandler):
    """aiohttp's connection, but with a new parser after each chunked request. Bodies stay compressed; no access log."""

    __slots__ = ("_chunked",)

    def __init__(
        self,
        server: web.Server,
        *,
        loop: asyncio.AbstractEventLoop,
        max_line_size: int,
        keepalive_timeout: float,
        lingering_time: float,
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # None turns it off; the annotation forgets that
            auto_decompress=False,
            keepalive_timeout=keepalive_timeout,
            lingering_time=lingering_time,
            max_field_size=max_line_size,
            max_line_size=max_line_size,
        )
        self._chunked: StreamReader | None = None  # the body of the last request, if it is chunked, until its end

    def _separate(self, new: int) -> bool:
        """Read nothing by a parser after a chunked request; return whether the connection is read on.

        `new` of the queued requests are new. It has to be called after each read with a part of a chunked request, or
        with more than one request.
        """
        # The first queued request that isn't known to be safe: those from it on may begin with somebody's trailer.
        first = len(self._messages) - new
        while first < len(self._messages):
            if self._chunked is not None and self._chunked.is_eof():
                break
            message, body = self._messages[first]
            self._chunked = body if getattr(message, "chunked", False) else None  # an error has no such attribute
            first += 1
        return self._chunked is None or not self._chunked.is_eof() or self._replace_parser(first)

    def _replace_parser(self, safe: int) -> bool:
        """Replace the parser, if this one has nothing of the next request; otherwise close the connection in time.

        Then only the first `safe` requests that wait are served: they came before the trailers.
        """
        waiting, parser = self._messages, self._parser
        is_last = len(waiting) == safe and len(waiting) < self._max_msg_queue_size  # or the parser has kept more
        if parser is None or not is_last or is_in_head(parser):
            while len(waiting) > safe:
                waiting.pop()
            self.read_no_more()
            return False
        self._chunked = None
        self._parser = HttpRequestParser(
            self,
            self._loop,
            self._read_bufsize,
            max_line_size=self.max_line_size,
            max_field_size=self.max_line_size,
            max_headers=self.max_headers,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=self._max_msg_queue_size,
        )
        return True

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._chunked = None  # a reference cycle

    def read_no_more(self) -> None:
        """Read no further request; close the connection after the response to the one in progress, or to the next."""
        self._message_tail = b""
        self.close()
        self._pause_reading_for_buffer()


def is_in_head(parser: HttpParser[Any]) -> bool:
    """Return whether a parser has read a part of a head. If so, it can't be used any more."""
    try:
        return parser.feed_eof() is not None
    except (HttpProcessingError, ValueError):
        return True
