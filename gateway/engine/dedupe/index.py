"""Which events a source has sent already: the sightings of its identities in one partition, and the verdict by them.

A sighting says that the record at an offset carried an identity with some content, and was let through. An event is a
duplicate where the same identity with the same content was sighted at a *smaller* offset and at most a window before.
So the verdict doesn't depend on the order in which sightings come to be known: a record that is read again after a
crash isn't its own duplicate, and an owner that has rebuilt its sightings from the log decides as the one before.

The same identity with other content is no duplicate: an `id:` that is badly chosen costs no event.

    bucket ─▶ row row row          row ─▶ ┌──────────────┬───────────┬──────────┬────────┐
    bucket ─▶ row                         │ identity 16 B│ content 8 │ offset 8 │ time 8 │
    bucket ─▶ row row                     └──────────────┴───────────┴──────────┴────────┘

Rows lie in a hash table of byte strings, since CPython finds 16 bytes in 500 in a tenth of a microsecond, and an object
for each row would cost more than the row. The table grows and shrinks by one bucket at a time (linear hashing: Litwin,
"Linear hashing: a new tool for file and table addressing", VLDB 1980), so no step takes long or copies it whole.
"""

from collections.abc import Iterator
from enum import Enum, auto

from gateway.log.records import SIGHTING

ROW = SIGHTING.size
ROWS_A_BUCKET = 12
"""On average, at most. Fewer cost memory (some 50 bytes a bucket), more cost time."""
LEAST_BUCKETS = 8  # a power of two
SIGHTINGS_KEPT = 8
"""Of one identity within a window. One that stands for more contents identifies nothing: what is new is let through."""
SWEEPS_A_ROUND = 256
"""How many sweeps look at every row once."""

_NO_WINDOW = -(1 << 64)
_IDENTITY = slice(0, 16)
_CONTENT = slice(16, 24)
_AT = slice(32, 40)


class Verdict(Enum):
    """What the sightings say of an event."""

    NEW = auto()
    CONFLICT = auto()
    """Its identity was there with other content. It is to be delivered."""
    DUPLICATE = auto()


class Sightings:
    """What was let through of one source in one partition. Times and windows are microseconds of the log's clock."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets = [b""] * LEAST_BUCKETS
        self._half = LEAST_BUCKETS  # a power of two; there are more buckets than that, or as many, and at most twice
        self._horizon = bytes(8)
        self._swept = 0

    def judge(self, row: bytes, window: int) -> Verdict:
        """Tell what an event is by its row, and keep that as a sighting unless it is a duplicate."""
        identity = row[_IDENTITY]
        number = self._number(identity)
        bucket = self._buckets[number]
        verdict = Verdict.NEW
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
        """Return the offset of the sighting that makes an event a duplicate, the newest; None if none does."""
        identity = row[_IDENTITY]
        _, content, offset, at = SIGHTING.unpack(row)
        found: int | None = None
        for other in _rows_of(self._buckets[self._number(identity)], identity):
            _, other_content, other_offset, other_at = SIGHTING.unpack(other)
            if other[_AT] < self._horizon or other_content != content or at - other_at > window:
                continue
            if other_offset < offset and (found is None or other_offset > found):
                found = other_offset
        return found

    def restore(self, rows: bytes) -> None:
        """Add sightings that the log has kept, in any order, as often as one likes."""
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
        """The time before which sightings aren't taken account of."""
        return int.from_bytes(self._horizon, "big")

    def forget_before(self, at: int) -> None:
        """Take no account of sightings before a time. Their memory is given back by and by."""
        self._horizon = max(0, at).to_bytes(8, "big")

    def sweep(self) -> None:
        """Give back some of the memory of what was forgotten; to be called now and then."""
        for _ in range(max(LEAST_BUCKETS, len(self._buckets) // SWEEPS_A_ROUND)):
            if self._swept >= len(self._buckets):
                self._swept = 0
            bucket = self._buckets[self._swept]
            if bucket:
                self._buckets[self._swept] = self._unexpired(bucket)
            self._swept += 1
            if len(self._buckets) > LEAST_BUCKETS and 3 * self.count < ROWS_A_BUCKET * len(self._buckets):
                self._merge()

    def _number(self, identity: bytes) -> int:
        # Python's hash of bytes is keyed by chance, so that nobody can choose identities that share a bucket.
        number = hash(identity) & (2 * self._half - 1)
        return number if number < len(self._buckets) else number - self._half

    def _compare(self, row: bytes, bucket: bytes, window: int) -> tuple[Verdict, bool]:
        """Hold a row against the sightings of its identity: the verdict, and whether it is worth keeping."""
        verdict = Verdict.NEW
        _, content, offset, at = SIGHTING.unpack(row)
        kept = 0
        for other in _rows_of(bucket, row[_IDENTITY]):
            if other[_AT] < self._horizon:
                continue
            _, other_content, other_offset, other_at = SIGHTING.unpack(other)
            is_near = abs(at - other_at) <= window
            kept += is_near
            if other_content != content:
                if is_near:
                    verdict = Verdict.CONFLICT
            elif other_offset < offset and at - other_at <= window:
                # A clock that was set back makes the difference negative: the copy came soon after, all the same.
                return Verdict.DUPLICATE, False
            elif other_offset == offset:
                kept = SIGHTINGS_KEPT  # itself, read again
        return verdict, kept < SIGHTINGS_KEPT

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
