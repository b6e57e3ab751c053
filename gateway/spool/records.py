"""A record of the spool: the log's own record, and whether an append to the log may have stored it already."""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from gateway.log.base import Record, RecordHeaders

_TRIED = "gw_spool_tried"
"""The header with the time of an append to the log of which nobody knows the result, by the log's clock (seconds)."""


class SpooledRecord(NamedTuple):
    """A record that has to be moved, with the headers that it has in the log.

    `spooled_at` is when it was stored, by this machine's clock; `tried_at` is when the append to the log that failed,
    or took too long, began, by the log's clock; None if there was none. Both are in seconds.
    """

    offset: int
    spooled_at: float
    key: bytes
    value: bytes
    headers: RecordHeaders
    tried_at: float | None = None

    @property
    def size(self) -> int:
        return size_of(self.key, self.value, self.headers)

    @property
    def digest(self) -> bytes:
        return digest_of(self.key, self.value, self.headers)


def size_of(key: bytes, value: bytes, headers: RecordHeaders) -> int:
    """Return about how many bytes a record takes."""
    return len(key) + len(value) + sum([len(name) + len(text) for name, text in headers])


def digest_of(key: bytes, value: bytes, headers: RecordHeaders) -> bytes:
    """Return a digest of a record's key, value and headers: the same in the log as in the spool, and unique to it.

    Its id and the time of its receipt aren't enough: the events of one request have the time in common, and an id too
    if its sender says so.
    """
    texts = [text for header in headers for text in (header[0].encode(), header[1])]
    sizes = [len(key), len(value), *map(len, texts)]
    digest = blake2b(struct.pack(f">{len(sizes) + 1}Q", len(sizes), *sizes), digest_size=16)
    for text in (*texts, key, value):
        digest.update(text)
    return digest.digest()


def spool_headers(headers: RecordHeaders, tried_at: float | None) -> RecordHeaders:
    """Return a record's headers in the spool."""
    return headers if tried_at is None else [*headers, (_TRIED, b"%.6f" % tried_at)]


def decode(records: Sequence[Record]) -> list[SpooledRecord]:
    """Return records of the spool as they have to be in the log."""
    return [_decode(record) for record in records]


def _decode(record: Record) -> SpooledRecord:
    tried_at: float | None = None
    headers = record.headers
    if headers and headers[-1][0] == _TRIED:
        try:
            tried_at = float(headers[-1][1])
        except ValueError:  # not written by a gateway: search all of the log rather than append it twice
            tried_at = 0.0
        headers = headers[:-1]
    return SpooledRecord(record.offset, record.appended_at, record.key, record.value, headers, tried_at)
