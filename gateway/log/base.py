"""The contract of the durable, partitioned log, which Kafka and the embedded log both implement.

A topic has partitions; a partition's offsets ascend, with gaps. A record exists once `append` has returned, and then
survives any crash. `tests/log/test_contract.py` tests every implementation against this contract.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from zlib import crc32

CLOCK = b"clock"
"""Prefix of the key of an empty record that was only appended to learn the log's time from its acknowledgement."""

RecordHeaders = Sequence[tuple[str, bytes]]

FETCH_RECORDS, FETCH_BYTES = 500, 1 << 20
"""Maximum records of a partition that one fetch returns, and their bytes: of keys, values and headers."""

COMMIT_BYTES = 3_040
"""Maximum bytes of a commit's `done` and `metadata`: in base64 they fit the 4,096 characters that Kafka stores."""


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    number: int


ALL = -1
"""Used instead of a partition's number for the whole topic."""

NO_APPENDS = "takes no appends"
"""Prefix of the reason for which a readable partition is unusable."""

NO_TOPIC = "no such topic"
"""The reason why nothing of a topic can be read or appended that doesn't exist."""


def partition_of(key: bytes, partitions: int) -> int:
    """Return the number of the partition for a key, given the number of partitions."""
    return crc32(key) % partitions  # Java's murmur2 costs 7 µs in Python.


class Record(NamedTuple):
    """A record as read. `appended_at` is the log's own clock at the append (LogAppendTime), in seconds."""

    offset: int
    appended_at: float
    key: bytes
    value: bytes
    headers: RecordHeaders


def content_size(record: Record) -> int:
    """Return the bytes of a record's key, value and headers, by which a fetch is limited."""
    _, _, key, value, headers = record
    return len(key) + len(value) + sum([len(name) + len(text) for name, text in headers])


class NewRecord(NamedTuple):
    """A record to append."""

    key: bytes
    value: bytes
    headers: RecordHeaders


class Batch(NamedTuple):
    """Records of one partition, with ascending offsets; a skipped offset is a gap, not a loss."""

    partition: Partition
    records: Sequence[Record]


LEADER_CLOCK_SKEW = 60.0
"""Seconds by which the clocks of two partitions' leaders may differ."""


class Position(NamedTuple):
    """Where a record was stored, and when by the log's clock (seconds)."""

    partition: int
    offset: int
    appended_at: float


class Commit(NamedTuple):
    """The records of a partition that are done for a group: all below `base`, and those whose bit is set in `done`.

    Bit `i` (least significant first: byte `i // 8`, bit `i % 8`) stands for the offset `base + i`. At most 2,048 bytes.
    `metadata` is the group's own metadata about records below `base`; with `done` at most `COMMIT_BYTES`.
    `topic_id` is that of the topic of these records, as 32 hex digits, "" where it isn't known. Consumers set it.
    """

    base: int
    done: bytes = b""
    metadata: bytes = b""
    topic_id: str = ""

    def covers(self, offset: int) -> bool:
        """Return whether the record at an offset is finished by this commit."""
        index = offset - self.base
        return index < 0 or (index < len(self.done) * 8 and bool(self.done[index // 8] >> (index % 8) & 1))


def are_of_different_topics(one: str, other: str) -> bool:
    """Return whether two ids are known to be of different topics."""
    return bool(one and other and one != other)


class Assignment(NamedTuple):
    """A partition that is now assigned to this consumer, and where it continues.

    `log_start` is the smallest offset that the log still has, and `commit.base` if nothing was committed.
    A `commit.base` below `log_start` means that records were deleted unread: the consumer continues at `log_start`.
    `is_committed`: whether the group has a commit; after a topic's deletion it has none any more.
    `is_stale`: whether it still has one of records that are gone, which has to be replaced at once: when the partition
    has grown as far, its next owner would skip records that nobody has read.
    `topic_id`: that of the topic, "" where it isn't known: a recreated one has another.
    """

    partition: Partition
    commit: Commit
    log_start: int
    is_committed: bool = True
    is_stale: bool = False
    topic_id: str = ""


class Listener(Protocol):
    """Takes over what a consumer reads. No record is fetched while one of its methods runs."""

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        """Take over these partitions, in addition to those assigned earlier and not revoked since. Returns at once.

        The partitions `without_position` are this consumer's as well, but their positions aren't known yet (one has no
        leader, or nobody responds): they come in a later call. If the group gives one to another member before that,
        this is the last that the listener hears of it: `revoked` names only partitions that were taken over.
        """

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        """Release these partitions; the consumer commits what is returned before another owner can start.

        Until it returns they are still ours, unless the group has evicted us, and all of its members wait: it may let
        attempts in flight end, for a few seconds.
        """

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Called when the log has deleted records before they were returned; the next records have higher offsets."""

    def restarted(self, assignment: Assignment) -> None:
        """Start a partition again: its topic was recreated, or its end was lost, so offsets mean other records now.

        What was finished before must not be committed.
        """


class Consumer(Protocol):
    """A member of a consumer group (or, without a group, a reader of every partition from its start)."""

    async def fetch(self, *, timeout: float, max_bytes: int = FETCH_BYTES) -> Sequence[Batch]:
        """Return the next records of the partitions that aren't paused; nothing if `timeout` seconds pass first.

        At most 500 records or (except for a single larger one) `max_bytes` bytes per partition, 1 MiB at the most.
        Doesn't raise if the log is unavailable: it returns nothing until the log is back.
        """

    def pause(self, partition: Partition) -> None:
        """Stop fetching a partition until `resume`. A new assignment isn't paused. Unknown partitions are ignored."""

    def resume(self, partition: Partition) -> None:
        """Fetch a paused partition again, from the record after the last one that was returned."""

    async def commit(self, commits: Mapping[Partition, Commit]) -> None:
        """Store what is finished. Partitions that aren't assigned any more are ignored, once `revoked` has returned.

        Raises LogUnavailableError if the result is unknown; committing again is always safe.
        """

    def lag(self) -> Mapping[Partition, int]:
        """Return how many records each assigned partition has after the last fetched one; omitted if unknown."""

    def unreadable(self) -> Mapping[Partition, str]:
        """Return which of this consumer's partitions can't be read now, and why.

        The number is `ALL` if a whole topic can't: it doesn't exist, or its group can't be joined. If the whole log is
        unavailable, this is empty; see `ping`.
        """

    async def close(self) -> None:
        """Call the listener's `revoked` for all assigned partitions, commit what it returns, and leave the group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """How a topic has to be configured. `retention` is in seconds, None keeps records forever.

    It is created with `partitions`. An operator may add some, unless the topic has a `total_order`. With `fixed_keys`,
    keys stay in the first `partitions`, however many are added.
    """

    name: str
    partitions: int
    retention: float | None
    compacted: bool = False
    total_order: bool = False
    until_done: bool = False
    """Finished records aren't read again: the log may delete all below the smallest committed base."""
    fixed_keys: bool = False
    is_best_effort: bool = False
    """No delivery depends on its records, so that no configuration of it breaks a guarantee."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicProblem:
    """A topic's configuration that breaks a guarantee (`is_fatal`) or couldn't be read, or that a topic `is_missing`.

    One that `is_tolerable` with `--dev` may only lose events; otherwise operators' commands wouldn't work.
    """

    topic: str
    message: str
    is_fatal: bool
    is_tolerable: bool = True
    is_missing: bool = False


def missing_problem(spec: TopicSpec) -> TopicProblem:
    """Return the problem of a topic that doesn't exist."""
    return TopicProblem(topic=spec.name, message="expected a topic, got none", is_fatal=True, is_missing=True)


class Log(Protocol):
    """A durable, partitioned log. Every method may raise LogUnavailableError.

    It is a ForbiddenError, at once, where a right is missing or a topic's name isn't possible.
    """

    max_record_bytes: int
    """Maximum size of a record's key, value and headers together."""

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        """Store a record; when this returns, it is durable (`acks=all`, or a committed fsync).

        The partition follows from the key, unless it is given. Raises LogUnavailableError within the log's append
        timeout (the record may be stored all the same), RecordTooLargeError at once. Cancelling the wait doesn't undo
        the append.
        """

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        """Store records in one partition, in order; when this returns, all of them are durable.

        If it raises LogUnavailableError (within the append timeout per 256 KiB), a prefix of them may be stored; repeat
        the whole call until it returns, before appending what follows. Raises RecordTooLargeError if one is too large;
        those before it may be stored. One call at a time.
        """

    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> Consumer:
        """Join a group (or, with None, read every partition from its start, without commits).

        Without a group, `since` (seconds, the log's clock) is when the first record was appended, as in `offsets_at`.
        A member reads the partitions that can be read, and the others as soon as they can, also those of a topic that
        doesn't exist yet. Without a group, all of them have to be readable.
        """

    def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        """Read the records with `start <= offset < end`, in batches, outside of any group."""

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        """Return how many partitions each existing topic has, whether they can be read or not.

        A topic that we may not see is omitted.
        """

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        """Return (first offset, offset after the last one) of each partition of a topic; empty if there is none.

        Raises LogUnavailableError if one can't be queried, as `offsets_at` does: none is omitted.
        """

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        """Return the same for the partitions that can be read now, and why the others can't."""

    async def settled(
        self, topic: str, numbers: Collection[int]
    ) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        """Return the same for some partitions, once all that they have stored by now can be read.

        What was stored without an acknowledgement can't be as long as a replica lacks it. Raises LogUnavailableError if
        that is still so after 2 s.
        """

    def topic_id(self, topic: str) -> str:
        """Return a topic's id as of the last look at it, "" if it isn't known: a recreated one has another."""

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        """Return the offset of each partition's first record appended at or after a time (seconds, the log's clock).

        `numbers` limits the partitions. The offset is the partition's end if there is no such record; empty if there is
        no such topic. If a partition's clock went back (its leader changed), some later record may be older.
        """

    async def topics(self) -> Collection[str]:
        """Return the names of all topics that we may see."""

    async def topics_of(self, group: str) -> Collection[str]:
        """Return the names of the topics for which a group has commits, perhaps including deleted ones."""

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        """Return a group's commits of a topic's partitions; a partition without a commit is omitted."""

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        """Store commits for a group that has no member yet. Existing commits are kept."""

    async def groups(self, prefix: str) -> Mapping[str, int]:
        """Return the groups with commits whose names have a prefix, each with its number of members."""

    async def members(self, group: str) -> int:
        """Return how many members a group has, whether it has commits or not; one that was killed, for a while."""

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        """Create the topics that are missing and return their names; existing ones aren't changed."""

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        """Compare the topics with their specifications."""

    async def retentions(self, topics: Collection[str]) -> Mapping[str, float]:
        """Return for how many seconds each topic keeps its records, as configured now; infinity if forever.

        A topic that doesn't exist, or that we may not see or whose configuration we may not read, is omitted.
        """

    def now(self) -> float:
        """Return the time by the log's clock (Unix seconds), as in `appended_at`; it never goes back.

        Before `synchronize` has returned, it may be this machine's clock, and may then go back once.
        """

    async def synchronize(self, topic: str) -> None:
        """Make `now` the log's clock from here on. May append an empty record, with a key of `CLOCK`, to the topic.

        If it raises LogUnavailableError, the first acknowledged append does the same.
        """

    async def ping(self) -> None:
        """Return if the log responds and accepts appends.

        Raises LogUnavailableError also while it refuses them: after a refusal that isn't due to the record or its
        topic, until an append of the same size succeeds, or would; LogNearlyFullError if small ones are stored.
        """

    async def refusing(self) -> Mapping[Partition, str]:
        """Return which partitions refuse appends while others accept them, and why (beginning with `NO_APPENDS`).

        If all appends are refused, this is empty, and `ping` raises the reason.
        """

    async def close(self) -> None:
        """Finish the appends in flight and release all resources."""
