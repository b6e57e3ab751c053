"""HTTP/1.1 framing, as far as a request and its response need it: bytes out, bytes in, no I/O.

We write requests ourselves because header bytes must be preserved: aiohttp's client takes text, encodes it as UTF-8 and
drops bytes that weren't UTF-8. And because it is cheap: the response's body is only counted, and kept only on request.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress

RESPONSE_LIMIT = 16 * 1024  # Maximum bytes of a body that we read to reuse its connection.
HEAD_LIMIT = 64 * 1024  # Maximum bytes of a response's heads, interim ones included: twice that of the usual servers.
_HEAD_END = re.compile(rb"\n\r?\n")  # RFC 9112 §2.2: a lone LF may be recognised as the end of a line
_CHUNK_LINE_LIMIT = 1024
_DIGITS = 16  # of a length: an exabyte
_CHUNKED = frozenset((b"chunked",))
_NO_CODING = (b"", b"identity")  # RFC 9110 §5.6.1; of RFC 2616 §3.6, which some servers still follow
_HEX = frozenset(b"0123456789abcdefABCDEF")


class MalformedResponseError(Exception):
    """The destination's response isn't HTTP/1.1."""


def encode_head(start: bytes, headers: Iterable[tuple[bytes, bytes]], length: int | None) -> bytes:
    """Return the head of a request whose body has `length` bytes; `start` is the request line with `Host`, CRLF each.

    A length of None is for a method that has no body (RFC 9110 §8.6). Raises ValueError for a header with a control
    character that would end it: what follows could be a second request.
    """
    fields = list(map(b": ".join, headers))
    if length is not None:
        fields.append(b"Content-Length: %d" % length)
    lines = len(fields) + 3  # the request line, Host, and the empty one
    fields.append(b"\r\n")
    head = start + b"\r\n".join(fields)
    if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
        raise ValueError("request head: expected header values without CR, LF and NUL, got one with them")
    return head


class ResponseReader:
    """Reads one response (RFC 9112). `status` is 0 until its head is complete; interim responses (1xx) are skipped.

    At the end, `is_reusable` is whether the connection may carry another request. `kept` is the body read so far, up to
    `limit` bytes, of a response that is no success, and with `keeps_body` of any; `body` is the complete one: None
    before its end, and if it is longer. Both are None of one in a transfer coding other than chunks. One that
    `needs_body` has the time of the whole response for it. `started_at` is when its first byte came, as the connection
    that feeds it knows.
    """

    __slots__ = (
        *("_body", "_head", "_head_room", "_left", "_limit", "_lines", "_seen"),
        *("body", "has_started", "is_reusable", "kept", "needs_body", "retry_after", "started_at", "status"),
    )

    def __init__(self, *, keeps_body: bool = False, needs_body: bool = False, limit: int = RESPONSE_LIMIT) -> None:
        self.needs_body = needs_body
        self.has_started = False
        self.started_at = 0.0
        self.body: bytes | None = None
        self.status = 0
        self.retry_after: bytes | None = None
        self._lines: list[bytes] = []
        self.is_reusable = False
        self._head = bytearray()
        self._head_room = HEAD_LIMIT
        self._left: int | None = 0  # of the body; None where the end of the connection, or of the chunks, ends it
        self._limit = limit
        self._seen = 0
        self.kept: bytearray | None = bytearray() if keeps_body or needs_body else None
        self._body: Generator[None, bytes, bytes] | None = None

    def feed(self, data: bytes) -> bool:
        """Parse received bytes; return whether the response, or the part of it that we read, is complete.

        Raises MalformedResponseError.
        """
        self.has_started = True
        if self.status:
            return self._feed_body(data)
        looked_at = len(self._head)
        self._head += data
        while True:
            # The end of a head may have begun in the previous bytes, but at most two bytes before their end.
            end = _HEAD_END.search(self._head, max(0, looked_at - 2))
            length = len(self._head) if end is None else end.end()
            if length > self._head_room or not b"HTTP/1.".startswith(self._head[:7]):
                raise MalformedResponseError("malformed response: expected the head of an HTTP/1.1 response")
            if end is None:
                return False
            status = self._read_head(bytes(self._head[: end.start()]))
            del self._head[:length]
            self._head_room -= length
            looked_at = 0
            if status >= 200 or status == 101:  # noqa: PLR2004 - RFC 9110 §15.2: others are interim responses
                self.status = status
                return self._feed_body(bytes(self._head))

    def _read_head(self, head: bytes) -> int:
        first, *lines = head.split(b"\n")
        self._lines = lines
        status, is_http_1_1 = _status(first)
        is_reusable = is_http_1_1
        length: int | None = None
        is_closing = False
        codings: list[bytes] = []
        self.retry_after = None  # an interim response's doesn't apply to the final one
        for line in lines:
            name, _, value = line.partition(b":")
            match name.lower():
                case b"content-length":
                    value = value.strip()
                    if not value.isdigit() or len(value) > _DIGITS or length not in (None, int(value)):
                        raise MalformedResponseError("malformed response: expected one Content-Length in digits")
                    length = int(value)
                case b"transfer-encoding":
                    names = [coding.strip().lower() for coding in value.split(b",")]
                    is_closing = is_closing or not _CHUNKED.issuperset(names)
                    codings += names
                case b"connection":
                    options = value.lower()
                    is_closing = is_closing or b"close" in options
                    is_reusable = is_reusable or b"keep-alive" in options
                case b"retry-after":
                    self.retry_after = value.strip()
                case _:
                    pass
        if is_closing or status == 101:  # noqa: PLR2004 - RFC 9110 §15.2.2: from here on it speaks something else
            is_reusable = False
        self._keep_failure(status)
        if status in (204, 304):  # RFC 9110 §15.3.5, §15.4.5: without a body, whatever the head says
            length = 0
        elif codings and status >= 200:  # noqa: PLR2004 - RFC 9112 §6.1: an interim response has no body
            is_reusable = is_reusable and is_http_1_1 and length is None
            length = self._expect_coded(codings, length)
        self._left = length
        self.is_reusable = is_reusable and (length is not None or self._body is not None)
        return status

    def _keep_failure(self, status: int) -> None:
        """Keep the body, if the response is no success."""
        if self.kept is None and status >= 300:  # noqa: PLR2004 - RFC 9110 §15
            self.kept = bytearray()

    def _expect_coded(self, codings: Sequence[bytes], length: int | None) -> int | None:
        """Return the length of a body with transfer codings: None if it is in chunks, which end it (RFC 9112 §6.3).

        We ask for no coding (`TE`) and undo chunks alone: of a body in another one nothing is kept.
        """
        applied = [coding for coding in codings if coding not in _NO_CODING]
        if not _CHUNKED.issuperset(applied):
            self.kept = None
        if applied[-1:] != [b"chunked"]:
            return length
        self._body = _chunks(self.kept)
        next(self._body)
        return None

    def _feed_body(self, data: bytes) -> bool:
        self._seen += len(data)
        if self._seen > self._limit:
            self.is_reusable = False
            self._keep_within_limit(data)
            return True
        if self._body is not None:
            try:
                self._body.send(data)
            except StopIteration as end:
                self.is_reusable = self.is_reusable and not end.value
                return self._end()
        else:
            if self.kept is not None:
                self.kept += data
            if self._left is not None:
                self._left -= len(data)
                if self._left <= 0:
                    self.is_reusable = self.is_reusable and self._left == 0
                    return self._end()
        return False

    def _keep_within_limit(self, data: bytes) -> None:
        """Keep of the last bytes that are read what is within the limit."""
        within = data[: len(data) - (self._seen - self._limit)]
        if self.kept is None:
            return
        if self._body is None:
            self.kept += within
            return
        with suppress(StopIteration, MalformedResponseError):  # the head has decided
            self._body.send(within)

    @property
    def header_lines(self) -> Sequence[bytes]:
        """Return the lines of its head after the first, each perhaps with the CR of its end."""
        return self._lines

    def header(self, wanted: bytes) -> bytes | None:
        """Return the value of the first header of this (lower-case) name, if the response has one."""
        return next(self._values(wanted), None)

    def header_list(self, wanted: bytes) -> bytes | None:
        """Return the list that all headers of this (lower-case) name are (RFC 9110 §5.3), if the response has one."""
        values = list(self._values(wanted))
        return b", ".join(filter(None, values)) if values else None

    def _values(self, wanted: bytes) -> Iterator[bytes]:
        for line in self._lines:
            name, _, value = line.partition(b":")
            if name.lower() == wanted:
                yield value.strip()

    def feed_eof(self) -> None:
        """Handle the end of the connection, which ends a body without a length."""
        if self.status and self._left is None and self._body is None and self._seen <= self._limit:
            self._end()

    def _end(self) -> bool:
        if self.kept is not None:
            self.body = bytes(self.kept[: len(self.kept) + min(0, self._left or 0)])
        return True


def _status(line: bytes) -> tuple[int, bool]:
    """Parse a status line; return the status, and whether by its version the connection stays open."""
    version, code = line[:9], line[9:12]
    if version not in (b"HTTP/1.1 ", b"HTTP/1.0 ") or not code.isdigit() or line[12:13].strip():
        raise MalformedResponseError("malformed response: expected the head of an HTTP/1.1 response")
    return int(code), version == b"HTTP/1.1 "


def _chunks(kept: bytearray | None) -> Generator[None, bytes, bytes]:
    """Read a chunked body (RFC 9112 §7.1), sent in piece by piece, and keep it; return the bytes after it.

    What is already read of a piece stays in front of `at`: copying the rest for each of many small chunks takes long.
    """
    data, at = b"", 0
    while True:
        size, data, at = yield from _line(data, at)
        digits = size.partition(b";")[0].strip()
        if not 0 < len(digits) <= _DIGITS or not _HEX.issuperset(digits):
            raise MalformedResponseError("malformed response: expected the size of a chunk in hexadecimal digits")
        left = int(digits, 16)
        if not left:
            break
        while len(data) - at < left:
            if kept is not None:
                kept += data[at:]
            left -= len(data) - at
            data, at = (yield), 0
        if kept is not None:
            kept += data[at : at + left]
        end, data, at = yield from _line(data, at + left)
        if end:
            raise MalformedResponseError("malformed response: expected the end of a chunk, got more of it")
    while size:
        size, data, at = yield from _line(data, at)  # the trailers, up to the empty line
    return data[at:]


def _line(data: bytes, at: int) -> Generator[None, bytes, tuple[bytes, bytes, int]]:
    """Return the line that begins at a position, the data that it is in, and the position after it."""
    while True:
        end = data.find(b"\n", at)
        if (len(data) if end < 0 else end) - at > _CHUNK_LINE_LIMIT:
            raise MalformedResponseError("malformed response: expected a chunk's line to end")
        if end >= 0:
            return data[at:end].strip(), data, end + 1
        data, at = data[at:] + (yield), 0
