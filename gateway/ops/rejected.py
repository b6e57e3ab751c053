"""Refused requests that were kept, and what became of each.

A request stays in its topic, whatever is done about it. It is open until a command has admitted or dropped it.
"""

import re
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import quote

from gateway.log.base import Log, Partition, Record
from gateway.log.topics import DAY, Topics
from gateway.model import NewerRecordError, UndecodableRecordError, UsageError
from gateway.ops.findings import SOURCE, Finding
from gateway.ops.log_search import newest_first
from gateway.quarantine.records import Marker, Missing, RejectedRequest, RequestOutcome, decode
from gateway.text import MASK

UNREADABLE = "unreadable"
"""The reason of a record that can't be read."""
_SECRET_NAME = re.compile(rb"auth|token|secret|passw|credential|cookie|session|api-?key|access-?key", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedFilter:
    """Which refused requests are meant. Times are those of their storage, in Unix seconds; None is any."""

    source: str | None = None
    reason: str | None = None
    since: float | None = None
    until: float | None = None
    positions: Collection[str] = ()

    def covers(self, rejected: "Rejected") -> bool:
        return (
            self.source in (None, rejected.source)
            and self.reason in (None, rejected.reason)
            and (self.since is None or rejected.record.appended_at >= self.since)
            and (self.until is None or rejected.record.appended_at <= self.until)
            and (not self.positions or rejected.position in self.positions)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A record of `gateway.rejected`. `request` is None if it can't be read; `problem` says why."""

    partition: Partition
    record: Record
    request: RejectedRequest | None
    problem: str
    outcome: RequestOutcome | None

    @property
    def position(self) -> str:
        """Return its partition and offset, which even an unreadable one has."""
        return f"{self.partition.number}@{self.record.offset}"

    @property
    def source(self) -> str:
        """Return its source; of an unreadable one what its key says."""
        return self.record.key.decode(errors="replace") if self.request is None else self.request.source

    @property
    def reason(self) -> str:
        return UNREADABLE if self.request is None else self.request.reason

    @property
    def status(self) -> str:
        return "open" if self.outcome is None else self.outcome.value

    @property
    def missing(self) -> Missing:
        return Missing.NOTHING if self.request is None else self.request.missing


async def read_rejected(
    log: Log,
    topics: Topics,
    which: RejectedFilter,
    *,
    include_resolved: bool = False,
    unread: dict[Partition, str] | None = None,
) -> AsyncGenerator[Rejected, None]:
    """Yield the refused requests that the filter covers, newest first: the open ones, or with `include_resolved` all.

    So a request's markers, which come after it, are read before it. With `unread`, unreadable partitions are skipped
    and recorded there, with the reason.
    """
    outcomes: dict[Partition, dict[int, RequestOutcome]] = {}
    async with aclosing(newest_first(log, [topics.rejected], since=which.since, unread=unread)) as history:
        async for partition, record in history:
            known = outcomes.setdefault(partition, {})
            request, problem = None, ""
            try:
                decoded = decode(record)
            except (UndecodableRecordError, NewerRecordError) as error:
                problem = str(error)
            else:
                if isinstance(decoded, Marker):
                    known.update(decoded.outcomes)
                    continue
                request = decoded
            outcome = known.get(record.offset)
            found = Rejected(partition=partition, record=record, request=request, problem=problem, outcome=outcome)
            if which.covers(found) and (include_resolved or outcome is None):
                yield found


class RejectedGroup:
    """Refused requests of one source, for one reason; `missing` are those that can't be verified again, by why."""

    def __init__(self, source: str, reason: str) -> None:
        self.source, self.reason = source, reason
        self.count = 0
        self.missing: dict[Missing, int] = {}
        self.oldest, self.newest = float("inf"), 0.0

    def add(self, rejected: Rejected) -> None:
        self.count += 1
        if rejected.missing:
            self.missing[rejected.missing] = self.missing.get(rejected.missing, 0) + 1
        at = rejected.record.appended_at
        self.oldest, self.newest = min(self.oldest, at), max(self.newest, at)


class RejectedGroups:
    """Refused requests by source and reason. Beyond MAX_GROUPS, which only foreign records reach, they share one."""

    MAX_GROUPS = 1000

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], RejectedGroup] = {}

    def add(self, rejected: Rejected) -> None:
        key = rejected.source, rejected.reason
        if key not in self._groups and len(self._groups) >= self.MAX_GROUPS:
            key = "(others)", UNREADABLE
        self._groups.setdefault(key, RejectedGroup(*key)).add(rejected)

    def largest_first(self) -> Sequence[RejectedGroup]:
        return sorted(self._groups.values(), key=lambda group: (-group.count, group.source, group.reason))


async def find_rejected(log: Log, topics: Topics, position: str) -> Rejected | None:
    """Return the refused request at a position (PARTITION@OFFSET), resolved or not; None if there is none."""
    which = RejectedFilter(positions=(position,))
    async with aclosing(read_rejected(log, topics, which, include_resolved=True)) as found:
        async for rejected in found:
            return rejected
    return None


def shown_headers(request: RejectedRequest) -> Sequence[tuple[bytes, bytes]]:
    """Return a refused request's headers as people may see them.

    Those that its scheme knows as credentials weren't kept; others are masked by their names, as anybody may have sent
    anything. A signature is shown: it is good for this request alone.
    """
    return [(name, MASK.encode() if _SECRET_NAME.search(name) else value) for name, value in request.headers]


def shown_query(request: RejectedRequest) -> str:
    """Return the names of a refused request's query parameters, with their values masked."""
    parts = [part.partition("=") for part in request.query.split("&") if part]
    return "&".join([f"{quote(name, safe='%+')}{sign}{MASK if value else ''}" for name, sign, value in parts])


def shown_body(request: RejectedRequest) -> bytes | None:
    """Return what was kept of the body; None if a credential is in it."""
    return None if request.is_body_secret else request.body


async def refuse_open(log: Log, topics: Topics) -> None:
    """Raise UsageError if a log has open refused requests: they can't be moved, since their time is their record's."""
    async with aclosing(read_rejected(log, topics, RejectedFilter())) as found:
        async for _ in found:
            raise UsageError(
                f"{topics.rejected}: expected no open refused requests, which can't be moved, got some: "
                "run `gateway rejected retry SOURCE` or `gateway rejected drop --all` first"
            )


MAX_GROUPS_SHOWN = 5
STATUS_RECORDS, STATUS_BYTES = 20_000, 64 << 20
"""How much of the topic `gateway status` reads at most, the newest first."""


async def rejected_findings(log: Log, topics: Topics, unread: dict[Partition, str]) -> list[Finding]:
    """Return what is kept of each source's refused requests of the last day. Raises LogUnavailableError.

    None needs attention: most of it may be forgeries, and whether it is, only people know.
    """
    groups, count, size, is_all = RejectedGroups(), 0, 0, True
    which = RejectedFilter(since=log.now() - DAY)
    async with aclosing(read_rejected(log, topics, which, unread=unread)) as found:
        async for rejected in found:
            count, size = count + 1, size + len(rejected.record.value)
            if count > STATUS_RECORDS or size > STATUS_BYTES:
                is_all = False
                break
            groups.add(rejected)
    return group_findings(groups, is_all=is_all)


def group_findings(groups: RejectedGroups, *, is_all: bool, most: int = MAX_GROUPS_SHOWN) -> list[Finding]:
    """Return the largest groups of refused requests that are kept; without `is_all`, there are more than were read."""
    return [
        Finding(
            rank=SOURCE,
            what=f"source {group.source}",
            why=f"refused requests in quarantine: {group.reason}" + ("" if is_all else " (at least)"),
            needs_attention=False,
            since=group.oldest,
            next=(
                f"gateway rejected list {group.source} --reason {group.reason}",
                "# if its provider has another secret than the rules had: once they have that,",
                f"gateway rejected retry {group.source}",
            ),
            count=group.count,
            source=group.source,
        )
        for group in groups.largest_first()[:most]
    ]
