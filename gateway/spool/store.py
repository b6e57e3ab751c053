"""The spool's file: an embedded log, with a topic for each topic of the log that has records in it.

So it has that log's group commit, its lock, its checks of the file and of the disk, and its commands.
"""

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from gateway.log.base import Commit, Record, RecordHeaders, TopicSpec
from gateway.log.embedded import statements
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.embedded.unreadable_records import (
    Counted,
    Unreadable,
    UnreadableCommitsError,
    behind_damage,
    committed_around_damage,
    count_around_damage,
    delete_around_damage,
    may_have_records,
    offsets_from,
    read_around_damage,
    topics_with_records,
    vacuum_some,
)
from gateway.model import LogUnavailableError, UsageError
from gateway.spool.topic_move import progress_from

GROUP = "gateway.spool"
"""The consumer group whose commits say what has been moved."""
DROPPED = "gateway.spool.dropped"
"""The consumer group whose commits say below which offset an operator has dropped everything."""
FOREVER = 100 * 365 * 86400.0
"""Seconds: nothing is deleted because of its age."""
APPEND_TIMEOUT = 3.0
"""Seconds that a disk may take: a sender waits."""
COUNTED_AT_ONCE = 10_000
DELETED_AT_ONCE = 1_000
"""Records in a step; appends run in between."""
_KINDS = "SELECT coalesce(max(name) FILTER (WHERE compacted), ''), coalesce(max(retention = ?), 0) FROM topics"
"""Only a log has a compacted topic (`gateway.control`), only a spool one that keeps records forever."""
_ENDS = "SELECT json_group_array(json_array(name, next)) FROM topics"
_ADVICE = "restart, or run `gateway spool move`: that moves what isn't in its damaged pages"


class SpoolStore(Protocol):
    """Records by topic, each with ascending offsets."""

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        """Store a record; when this returns, it is durable on this disk. Raises LogUnavailableError."""

    async def topics(self) -> Collection[str]: ...

    async def end(self, topic: str) -> int:
        """Return the offset after the last record."""

    async def read(self, topic: str, start: int, end: int) -> tuple[Sequence[Record], int, Sequence[Unreadable]]:
        """Return the first records with `start <= offset < end`, where to go on, and what of it can't be read."""

    async def counted(self, topic: str, start: int, end: int) -> tuple[Sequence[Counted], int, Sequence[Unreadable]]:
        """Return what `read` does, without the values."""

    async def moved(self, topic: str) -> Commit:
        """Return which records of a topic have been moved; if that can't be read, that any may be in the log."""

    async def dropped(self, topic: str) -> int:
        """Return below which offset an operator has dropped everything."""

    async def commit(self, commits: Mapping[str, Commit]) -> None:
        """Store which records have been moved."""

    async def delete(self, topic: str, offsets: Sequence[int]) -> Collection[int]:
        """Delete records; return which of them can't be, since the file is damaged there."""

    async def delete_below(self, topic: str, offset: int) -> None:
        """Delete what an earlier process has moved and not deleted."""

    async def ends(self) -> Mapping[str, int]:
        """Return the offset after the last record of each topic."""

    async def left(self) -> Mapping[str, int]:
        """Return what `ends` does, for the topics that have records only."""

    async def has_records(self, topic: str) -> bool:
        """Return whether a topic has records, or may have some where the file is damaged."""

    async def give_back(self) -> None:
        """Give the space of what was deleted back to the disk."""

    async def ping(self) -> None:
        """Raise LogUnavailableError unless records can be stored, also one as large as the last that could not."""

    def now(self) -> float: ...

    async def check(self) -> None:
        """Raise LogLostError if the next process won't find the file, LogUnavailableError if that isn't known."""

    async def free_bytes(self) -> tuple[int, int]:
        """Return how many bytes of the disk are free for us, and how many it has. Raises OSError."""

    async def close(self) -> None: ...


class FileStore:
    """The file. It has one owner; others may read."""

    def __init__(self, log: EmbeddedLog, path: Path) -> None:
        self._log = log
        self.path = path
        self._topics: set[str] = set()
        self._unreadable_commits = ""
        """Why commits can't be read or stored; "" if they can, as far as is known."""
        self._creating = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path, *, owner: bool) -> "FileStore":
        """Open the file; its owner creates it. Raises UsageError, LogUnavailableError, as EmbeddedLog does.

        A log is refused, too (UsageError): its events would be moved or dropped as those of a spool.
        """
        log = await EmbeddedLog.open(
            path, owner=owner, append_timeout=APPEND_TIMEOUT, sweep_interval=None, advice=_ADVICE
        )
        store = cls(log, path)
        try:
            await _refuse_log(log, path)
            store._topics.update(await log.topics())
        except BaseException:
            await log.close()
            raise
        return store

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        if topic not in self._topics:
            async with self._creating:
                await self._log.create([_spec(topic)])
                self._topics.add(topic)
        await self._log.append(topic, key=key, value=value, headers=headers)

    async def topics(self) -> Collection[str]:
        return await self._log.topics()

    async def end(self, topic: str) -> int:
        return (await self._log.bounds(topic)).get(0, (0, 0))[1]

    async def read(self, topic: str, start: int, end: int) -> tuple[Sequence[Record], int, Sequence[Unreadable]]:
        return await self._log.read(read_around_damage, topic, start, end, self._log.now())

    async def moved(self, topic: str) -> Commit:
        first = max((await self._log.bounds(topic)).get(0, (0, 0))[0], await self.dropped(topic))
        found = None if self._unreadable_commits else await self._committed(GROUP, topic)
        if self._unreadable_commits:
            return Commit(first, metadata=b"damaged")
        return progress_from(found, first)

    async def dropped(self, topic: str) -> int:
        found = await self._committed(DROPPED, topic)
        return 0 if found is None else found.base

    async def _committed(self, group: str, topic: str) -> Commit | None:
        try:
            return await self._log.read(committed_around_damage, group, topic)
        except UnreadableCommitsError as error:
            self._unreadable_commits = f"{self.path}: what has been moved can't be stored: {error}"
            return None

    async def commit(self, commits: Mapping[str, Commit]) -> None:
        await self._commit(GROUP, commits)

    async def _commit(self, group: str, commits: Mapping[str, Commit]) -> None:
        if self._unreadable_commits:  # a failed write there would make EmbeddedLog take the file for lost
            raise LogUnavailableError(self._unreadable_commits)
        await self._log.commit(group, [(topic, *statements.encode_commit(each)) for topic, each in commits.items()])

    async def drop(self, topic: str, end: int) -> None:
        """Give up what a topic has below an offset; what can't be deleted, since its page is damaged, is ignored.

        Raises LogUnavailableError.
        """
        start = (await self.moved(topic)).base
        await self._commit(DROPPED, {topic: Commit(max(end, await self.dropped(topic)))})
        await self.delete_below(topic, start)
        while start < end:
            found, start, _ = await self.counted(topic, start, end)
            await self.delete(topic, [each.offset for each in found])

    async def delete(self, topic: str, offsets: Sequence[int]) -> Collection[int]:
        kept: list[int] = []
        for start in range(0, len(offsets), DELETED_AT_ONCE):
            kept += await self._log.write(delete_around_damage, topic, offsets[start : start + DELETED_AT_ONCE])
        return kept

    async def delete_below(self, topic: str, offset: int) -> None:
        start, at_once = 0, DELETED_AT_ONCE
        while start < offset:
            found = await self._log.read(offsets_from, topic, start, offset, at_once)
            if found is not None:
                await self.delete(topic, found)
                start, at_once = found[-1] + 1 if found else offset, min(2 * at_once, DELETED_AT_ONCE)
            elif at_once > 1:  # those before the damaged page can be found
                at_once //= 2
            else:
                start = await self._log.read(behind_damage, topic, start, offset)

    async def ends(self) -> Mapping[str, int]:
        return dict(await self._log.read(statements.rows, _ENDS))

    async def left(self) -> Mapping[str, int]:
        return await self._log.read(topics_with_records)

    async def has_records(self, topic: str) -> bool:
        return await self._log.read(may_have_records, topic)

    async def give_back(self) -> None:
        while await self._log.write(vacuum_some):
            pass

    async def counted(self, topic: str, start: int, end: int) -> tuple[Sequence[Counted], int, Sequence[Unreadable]]:
        return await self._log.read(
            count_around_damage, topic, start, min(end, start + COUNTED_AT_ONCE), self._log.now()
        )

    async def ping(self) -> None:
        await self._log.ping()

    def now(self) -> float:
        return self._log.now()

    async def check(self) -> None:
        await self._log.check_file()

    async def free_bytes(self) -> tuple[int, int]:
        """Return how many bytes of the disk are free for us, and how many it has. Raises OSError."""
        found = await asyncio.to_thread(os.statvfs, self.path.parent)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    async def close(self) -> None:
        await self._log.close()


async def _refuse_log(log: EmbeddedLog, path: Path) -> None:
    compacted, _ = await _kinds(log)
    if compacted:
        raise UsageError(f"{path}: expected a spool, got a gateway's log: {compacted} is in it")


async def refuse_spool(log: EmbeddedLog, path: Path) -> None:
    """Raise UsageError if a file that is opened as a log is a spool: a router would read its records as events."""
    compacted, keeps_forever = await _kinds(log)
    if keeps_forever and not compacted:
        raise UsageError(f"{path}: expected a gateway's log, got a spool; `gateway spool list` shows what is in it")


async def _kinds(log: EmbeddedLog) -> tuple[str, bool]:
    """Return a compacted topic, "" if there is none, and whether a topic keeps its records forever."""
    row = await log.read(statements.first_row, _KINDS, FOREVER)
    assert row is not None
    return row[0], bool(row[1])


def _spec(topic: str) -> TopicSpec:
    return TopicSpec(name=topic, partitions=1, retention=FOREVER)


class SpoolRefusedError(LogUnavailableError):
    """The spool stores no event: its bytes, age or free disk space are at the limit, or its file can't be written."""
