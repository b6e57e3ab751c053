"""Which events a source has already sent: an index of the dedupe entries of one partition, and the verdict.

An entry (a row, `DEDUPE_ENTRY` of `log/records.py`) says that the record at an offset had an identity and a content,
and was let through. An event is a duplicate if an entry at a *smaller* offset, within the window, has the same identity
and content. So the verdict doesn't depend on the order in which entries are added: a record that is read again after a
crash isn't its own duplicate, and an owner that has rebuilt the index from the log decides like the previous one.

The same identity with other content isn't a duplicate: a badly chosen `id:` costs no event.

    bucket ─▶ row row row          row ─▶ ┌──────────────┬───────────┬──────────┬────────┐
    bucket ─▶ row                         │ identity 16 B│ content 8 │ offset 8 │ time 8 │
    bucket ─▶ row row                     └──────────────┴───────────┴──────────┴────────┘

Rows lie in a hash table of byte strings, since CPython finds 16 bytes in 500 in a tenth of a microsecond, and an object
for each row would cost more than the row. The table grows and shrinks by one bucket at a time (linear hashing: Litwin,
"Linear hashing: a new tool for file and table addressing", VLDB 1980), so no step takes long or copies it whole.
"""

from collections.abc import Iterator
from enum import Enum, auto

from gateway.log.records import DEDUPE_ENTRY

ROW = DEDUPE_ENTRY.size
ROWS_A_BUCKET = 12
"""Maximum average. Fewer cost memory (some 50 bytes per bucket), more cost time."""
MIN_BUCKETS = 8  # a power of two
ENTRIES_KEPT = 8
"""Maximum entries of one identity within a window. With more contents it identifies nothing, and new ones are let
through."""
SWEEPS_A_ROUND = 256
"""Number of sweeps that check every row once."""

_NO_WINDOW = -(1 << 64)
_IDENTITY = slice(0, 16)
_CONTENT = slice(16, 24)
_AT = slice(32, 40)


class DedupeVerdict(Enum):
    """The result of checking an event against the index."""

    NEW = auto()
    CONFLICT = auto()
    """Its identity exists with other content. It is to be delivered."""
    DUPLICATE = auto()


class DedupeIndex:
    """The entries of one source in one partition. Times and windows are microseconds of the log's clock."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets = [b""] * MIN_BUCKETS
        self._half = MIN_BUCKETS  # a power of two; there are more buckets than that, or as many, and at most twice
        self._horizon = bytes(8)
        self._swept = 0

    def add(self, row: bytes, window: int) -> DedupeVerdict:
        """Check an event by its row, and add the row unless it is a duplicate."""
        identity = row[_IDENTITY]
        number = self._number(identity)
        bucket = self._buckets[number]
        verdict = DedupeVerdict.NEW
        if identity in bucket:
            verdict, is_wanted = self._compare(row, bucket, window)
            if not is_wanted:
                return verdict
        if bucket and bucket[_AT] < self._horizon:
            bucket = self._unexpired(bucket)
        self._buckets[number] = bucket + row
        self.count += 1
        if self.count > ROWS_A_BUCKET * len(self._buckets):
            self._split()
        return verdict

    def original(self, row: bytes, window: int) -> int | None:
        """Return the offset of the newest entry that makes an event a duplicate; None if none does."""
        identity = row[_IDENTITY]
        _, content, offset, at = DEDUPE_ENTRY.unpack(row)
        found: int | None = None
        for other in _rows_of(self._buckets[self._number(identity)], identity):
            _, other_content, other_offset, other_at = DEDUPE_ENTRY.unpack(other)
            if other[_AT] < self._horizon or other_content != content or at - other_at > window:
                continue
            if other_offset < offset and (found is None or other_offset > found):
                found = other_offset
        return found

    def restore(self, rows: bytes) -> None:
        """Add entries from the log, in any order and repeatedly."""
        buckets, half, length = self._buckets, self._half, len(self._buckets)
        mask, horizon, added = 2 * half - 1, self._horizon, 0
        for start in range(0, len(rows), ROW):
            row = rows[start : start + ROW]
            identity = row[_IDENTITY]
            number = hash(identity) & mask  # as `_number`, which would take as long as all the rest
            if number >= length:
                number -= half
            bucket = buckets[number]
            if row[_AT] >= horizon and (identity not in bucket or self._compare(row, bucket, _NO_WINDOW)[1]):
                buckets[number] = bucket + row
                added += 1
        self.count += added
        while self.count > ROWS_A_BUCKET * len(self._buckets):
            self._split()

    @property
    def horizon(self) -> int:
        """The time before which entries are ignored."""
        return int.from_bytes(self._horizon, "big")

    def forget_before(self, at: int) -> None:
        """Ignore entries from before a time. Their memory is released gradually."""
        self._horizon = max(0, at).to_bytes(8, "big")

    def sweep(self) -> None:
        """Release some memory of expired entries; to be called regularly."""
        for _ in range(max(MIN_BUCKETS, len(self._buckets) // SWEEPS_A_ROUND)):
            if self._swept >= len(self._buckets):
                self._swept = 0
            bucket = self._buckets[self._swept]
            if bucket:
                self._buckets[self._swept] = self._unexpired(bucket)
            self._swept += 1
            if len(self._buckets) > MIN_BUCKETS and 3 * self.count < ROWS_A_BUCKET * len(self._buckets):
                self._merge()

    def _number(self, identity: bytes) -> int:
        # Python's hash of bytes is keyed by chance, so that nobody can choose identities that share a bucket.
        number = hash(identity) & (2 * self._half - 1)
        return number if number < len(self._buckets) else number - self._half

    def _compare(self, row: bytes, bucket: bytes, window: int) -> tuple[DedupeVerdict, bool]:
        """Compare a row with the entries of its identity: return the verdict, and whether to keep the row."""
        verdict = DedupeVerdict.NEW
        _, content, offset, at = DEDUPE_ENTRY.unpack(row)
        kept = 0
        for other in _rows_of(bucket, row[_IDENTITY]):
            if other[_AT] < self._horizon:
                continue
            _, other_content, other_offset, other_at = DEDUPE_ENTRY.unpack(other)
            is_near = abs(at - other_at) <= window
            kept += is_near
            if other_content != content:
                if is_near:
                    verdict = DedupeVerdict.CONFLICT
            elif other_offset < offset and at - other_at <= window:
                # A clock that was set back makes the difference negative: the duplicate still came soon after.
                return DedupeVerdict.DUPLICATE, False
            elif other_offset == offset:
                kept = ENTRIES_KEPT  # the event itself, read again
        return verdict, kept < ENTRIES_KEPT

    def _unexpired(self, bucket: bytes) -> bytes:
        horizon = self._horizon
        rows = [row for row in _split_rows(bucket) if row[_AT] >= horizon]
        self.count -= len(bucket) // ROW - len(rows)
        return b"".join(rows)

    def _split(self) -> None:
        """Add a bucket, with the rows of the next one in turn whose hash says so."""
        if len(self._buckets) == 2 * self._half:
            self._half *= 2
        number = len(self._buckets) - self._half
        staying: list[bytes] = []
        moving: list[bytes] = []
        for row in _split_rows(self._buckets[number]):
            (moving if hash(row[_IDENTITY]) & self._half else staying).append(row)
        self._buckets[number] = b"".join(staying)
        self._buckets.append(b"".join(moving))

    def _merge(self) -> None:
        """Undo the last split."""
        if len(self._buckets) == self._half:
            self._half //= 2
        rows = self._buckets.pop()
        self._buckets[len(self._buckets) - self._half] += rows


def _split_rows(bucket: bytes) -> list[bytes]:
    return [bucket[start : start + ROW] for start in range(0, len(bucket), ROW)]


def _rows_of(bucket: bytes, identity: bytes) -> Iterator[bytes]:
    start = bucket.find(identity)
    while start >= 0:
        within = start % ROW
        if not within:
            yield bucket[start : start + ROW]
        start = bucket.find(identity, start + ROW - within)
