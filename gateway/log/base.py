"""The contract of the durable, partitioned log, which Kafka and the embedded log both keep.

A topic has partitions; a partition's offsets ascend, with gaps. A record exists once `append` has returned, and then
survives any crash. `tests/log/test_contract.py` holds every implementation to what is said here.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from zlib import crc32

CLOCK = b"clock"
"""What the key begins with of a record that says nothing, and was appended for the time of its acknowledgement."""

RecordHeaders = Sequence[tuple[str, bytes]]

COMMIT_BYTES = 3_060
"""Bytes that a commit has for `done` and `note`: in base64 they fit the 4,096 characters that Kafka keeps."""


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    number: int


ALL = -1
"""Instead of a partition's number: the whole topic."""

NO_APPENDS = "takes no appends"
"""How the reason begins for which a partition is of no use that can be read."""


def partition_of(key: bytes, partitions: int) -> int:
    """Return the number of the partition, of so many, that a record of this key goes to."""
    return crc32(key) % partitions  # Java's murmur2 costs 7 µs in Python.


class Record(NamedTuple):
    """A record as read. `appended_at` is the log's own clock at the append (LogAppendTime), in seconds."""

    offset: int
    appended_at: float
    key: bytes
    value: bytes
    headers: RecordHeaders


class NewRecord(NamedTuple):
    """A record that is to be appended."""

    key: bytes
    value: bytes
    headers: RecordHeaders


class Batch(NamedTuple):
    """Records of one partition, offsets ascending; an offset that is skipped is a gap, not a loss."""

    partition: Partition
    records: Sequence[Record]


class Position(NamedTuple):
    """Where a record was stored, and when by the log's clock (seconds)."""

    partition: int
    offset: int
    appended_at: float


class Commit(NamedTuple):
    """What a group has finished of a partition: all below `base`, and each bit set in `done`.

    Bit `i` (least significant first: byte `i // 8`, bit `i % 8`) stands for the offset `base + i`. At most 2,048 bytes.
    `note` is what the group wants to know again of the records below `base`; with `done` at most `COMMIT_BYTES`.
    """

    base: int
    done: bytes = b""
    note: bytes = b""

    def covers(self, offset: int) -> bool:
        """Return whether a record is finished by it."""
        index = offset - self.base
        return index < 0 or (index < len(self.done) * 8 and bool(self.done[index // 8] >> (index % 8) & 1))


class Assignment(NamedTuple):
    """A partition that this consumer now owns, and where to go on.

    `log_start` is the smallest offset that the log still has; where nothing was committed, `commit.base` is it.
    A `commit.base` below `log_start` means that records were deleted unread: the consumer reads on from `log_start`.
    `is_committed` tells whether the group has a commit; it has none any more where the topic was deleted.
    """

    partition: Partition
    commit: Commit
    log_start: int
    is_committed: bool = True


class Listener(Protocol):
    """Who owns the records of a consumer. No record is fetched while one of its methods runs."""

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Take over these partitions; every one not revoked since the last call stays. Returns at once.

        A partition of which it isn't known where to go on (it has no leader, say) comes later than the others.
        """

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        """Give up these partitions; the consumer commits what is returned before another owner can start.

        Until it returns they are still ours, unless the group has thrown us out, and all its members stand still: it
        may let what is under way end, for a few seconds.
        """

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Hear that the log has deleted records before they were returned; what comes next is after their offsets."""

    def replaced(self, assignment: Assignment) -> None:
        """Begin anew with a partition: its records aren't those any more that were read, whatever their offsets.

        Its topic was made again, or it has lost its end. What was finished of it must not be committed.
        """


class Consumer(Protocol):
    """A member of a consumer group (or, without a group, a reader of every partition from its start)."""

    async def fetch(self, *, timeout: float) -> Sequence[Batch]:
        """Return the next records of the partitions that aren't paused; empty when `timeout` seconds pass first.

        At most 500 records or (but for a single larger one) 1 MiB a partition. Raises nothing when the log is away:
        it returns empty batches until the log is back.
        """

    def pause(self, partition: Partition) -> None:
        """Stop fetching a partition, until `resume`. A new assignment starts unpaused. Unknown ones are ignored."""

    def resume(self, partition: Partition) -> None:
        """Fetch a paused partition again, from the record after the last one that was returned."""

    async def commit(self, commits: Mapping[Partition, Commit]) -> None:
        """Store what is finished. A partition that isn't assigned any more is left out, never sent.

        Raises LogUnavailableError when nothing can be said of the result; committing again is always safe.
        """

    def lag(self) -> Mapping[Partition, int]:
        """Tell how many records after the last fetched one each assigned partition has; unknown ones are left out."""

    def unread(self) -> Mapping[Partition, str]:
        """Tell which partitions that are this consumer's can't be read now, and why.

        The number is `ALL` where nothing of a topic can be: it isn't there, or its group can't be joined. A log that
        is away as a whole says nothing here; see `ping`.
        """

    async def close(self) -> None:
        """Call the listener's `revoked` for all that is assigned, commit what it returns, and leave the group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """What a topic has to be. `retention` is in seconds, None keeps records for ever.

    `partitions` are those that it is made with. An operator may add some, unless the topic is `whole`: its records keep
    one order, which more partitions would break. One that is `fixed` has its keys in these alone, whatever is added.
    """

    name: str
    partitions: int
    retention: float | None
    compacted: bool = False
    whole: bool = False
    until_done: bool = False
    """Nobody reads again what is done: the log may delete all below the smallest base that was committed."""
    fixed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicProblem:
    """A topic's configuration that breaks a promise (`is_fatal`) or could not be read.

    Where one `is_borne` by who runs with `--dev`, events may be lost; without that, nothing would work as it is told.
    """

    topic: str
    message: str
    is_fatal: bool
    is_borne: bool = True


class Log(Protocol):
    """A durable, partitioned log. Every method may raise LogUnavailableError."""

    max_record_bytes: int
    """How large key + value + headers of a record may be."""

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position:
        """Store a record; when this returns, it is durable (`acks=all`, or a committed fsync).

        The partition follows from the key. Raises LogUnavailableError within the log's append timeout (the record may
        be stored all the same), RecordTooLargeError at once. Cancelling the wait doesn't undo the append.
        """

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        """Store records in one partition, one after the other; when this returns, all of them are durable.

        Where it raises LogUnavailableError, within the append timeout for each 256 KiB, none of them is stored before
        all that come before it are: whoever repeats it from the first on, until it returns, may append what follows.
        Raises RecordTooLargeError where one is too large; those before it may be stored. A call at a time.
        """

    async def consume(self, *, group: str | None, topics: Sequence[str], listener: Listener) -> Consumer:
        """Join a group (or, with None, read every partition from its start, without commits).

        A member reads what can be read, and the rest once it can. Without a group all has to be there.
        """

    def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        """Read the records with `start <= offset < end`, in batches, outside of any group."""

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        """Return how many partitions each topic has that is there, whether they can be read or not."""

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        """Return (first offset, offset after the last one) of each partition of a topic; empty if there is none.

        Raises LogUnavailableError where one can't be asked, as `offsets_at` does: nothing is left out.
        """

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        """Return the same of the partitions that can be read now, and why the others can't."""

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        """Return the first offset that was appended at or after a time by the log's clock (seconds).

        Of each partition, or of these alone. That is the partition's end where there is none; empty if there is no such
        topic. Where the clock of a partition went back (its leader changed), some record that follows may be older.
        """

    async def topics(self) -> Collection[str]:
        """Return the names of all topics."""

    async def topics_of(self, group: str) -> Collection[str]:
        """Return the names of the topics of which a group has committed something; perhaps of some that are gone."""

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        """Return what a group has committed of a topic's partitions; a partition without a commit is left out."""

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        """Store commits for a group that has no member yet. Where it has committed something, that stands."""

    async def groups(self, prefix: str) -> Mapping[str, int]:
        """Return the groups that have committed something and whose names begin so, each with its number of members."""

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        """Create the topics that are missing and return their names; those that exist are left as they are."""

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        """Compare what is there with what has to be."""

    async def retentions(self, topics: Collection[str]) -> Mapping[str, float]:
        """Return for how many seconds each topic keeps its records, as it is; infinity where it is for ever.

        A topic that isn't there, or may not be asked, is left out.
        """

    def now(self) -> float:
        """Return the log's clock (Unix seconds), by which `appended_at` is stamped; it never goes back.

        Before `synchronize` has returned, it may be this machine's clock, and then go back once.
        """

    async def synchronize(self, topic: str) -> None:
        """Let `now` be the log's clock from here on. It may append an empty record to a topic, of the key `CLOCK`.

        Raises LogUnavailableError; the first append that is acknowledged then does it.
        """

    async def ping(self) -> None:
        """Return when the log answers, and takes appends.

        Raises LogUnavailableError also while it refuses them: from one that was refused, but for what the record or its
        topic is, until one as large has succeeded, or would; a LogNearlyFullError where small ones are stored.
        """

    async def refusing(self) -> Mapping[Partition, str]:
        """Return which partitions refuse what is appended while others take it, and why (`NO_APPENDS`, and more).

        Where all of it is refused, `ping` says so, and this nothing.
        """

    async def close(self) -> None:
        """Finish the appends under way and let go of everything."""
