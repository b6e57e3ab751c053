"""A spool's file in memory: what was acknowledged survives the process, and faults of the disk are handed in."""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from gateway.log.base import Commit, Record, RecordHeaders
from gateway.log.embedded.unreadable_records import Counted, Unreadable
from gateway.model import LogUnavailableError
from gateway.spool.topic_move import progress_from
from tests.virtual_time import now


class MemoryStore:
    """A store as the file would be: what was acknowledged survives the process. `disk` is shared by its successors."""

    def __init__(self, disk: "Disk", random: Random) -> None:
        self._disk = disk
        self._random = random
        self.gave_back = 0
        self.is_dead = False
        """Its process was killed: whatever it still does is of no effect."""

    def _check(self) -> None:
        if self.is_dead:
            raise LogUnavailableError("its process was killed")

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        await asyncio.sleep(self._random.uniform(0.0, 0.02))
        if self._disk.is_full:
            raise LogUnavailableError("disk full")
        self._check()
        self._disk.add(topic, key, value, headers)
        await asyncio.sleep(0.0)
        if self._disk.is_slow and self._random.random() < 0.1:
            raise LogUnavailableError("no answer of the disk in time")

    async def topics(self) -> Collection[str]:
        return list(self._disk.records)

    async def end(self, topic: str) -> int:
        await asyncio.sleep(0.0)
        return len(self._disk.records[topic])

    async def read(self, topic: str, start: int, end: int) -> tuple[Sequence[Record], int, Sequence[Unreadable]]:
        await asyncio.sleep(self._random.uniform(0.0, 0.005))
        limit, end = end, start + self._random.randint(1, 50)
        deleted = self._disk.deleted[topic]
        found = [each for each in self._disk.records[topic][start:] if each.offset not in deleted][: end - start]
        found = [each for each in found if each.offset < limit]
        end = found[-1].offset + 1 if len(found) == end - start else limit
        lost = [Unreadable(each.offset, each.offset + 1, "") for each in found if each.value in self._disk.damaged]
        return [each for each in found if each.value not in self._disk.damaged], end, lost

    async def counted(self, topic: str, start: int, end: int) -> tuple[Sequence[Counted], int, Sequence[Unreadable]]:
        found, end, lost = await self.read(topic, start, end)
        return [Counted(each.offset, each.key, len(each.value), each.appended_at) for each in found], end, lost

    async def moved(self, topic: str) -> Commit:
        return progress_from(self._disk.commits.get(topic), await self.dropped(topic))

    async def dropped(self, topic: str) -> int:
        return self._disk.dropped.get(topic, 0)

    async def commit(self, commits: Mapping[str, Commit]) -> None:
        try:
            await self._write()
        except LogUnavailableError:
            self._disk.unnoted.update(() if self.is_dead else commits)
            raise
        self._disk.commits.update(commits)
        self._disk.unnoted.difference_update(commits)
        await asyncio.sleep(0.0)

    async def _write(self) -> None:
        await asyncio.sleep(self._random.uniform(0.0, 0.02))
        self._check()
        if self._disk.is_full and self._random.random() < 0.5:
            raise LogUnavailableError("disk full")

    async def delete(self, topic: str, offsets: Sequence[int]) -> Collection[int]:
        await self._write()
        kept = [each for each in offsets if self._disk.records[topic][each].value in self._disk.damaged]
        self._disk.deleted[topic].update(set(offsets).difference(kept))
        await asyncio.sleep(0.0)
        return kept

    async def delete_below(self, topic: str, offset: int) -> None:
        await self.delete(topic, range(offset))

    async def ends(self) -> Mapping[str, int]:
        await asyncio.sleep(0.0)
        return {topic: len(records) for topic, records in self._disk.records.items()}

    async def left(self) -> Mapping[str, int]:
        deleted = self._disk.deleted
        return {topic: end for topic, end in (await self.ends()).items() if len(deleted[topic]) < end}

    async def check(self) -> None:
        self._check()

    async def has_records(self, topic: str) -> bool:
        return topic in await self.left()

    async def give_back(self) -> None:
        self.gave_back += 1
        await asyncio.sleep(0.0)

    async def ping(self) -> None:
        if self._disk.is_full:
            raise LogUnavailableError("disk full")

    def now(self) -> float:
        return now()

    async def free_bytes(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    async def close(self) -> None:
        pass


@dataclass
class Disk:
    """What survives a process."""

    records: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    deleted: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    commits: dict[str, Commit] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    unnoted: set[str] = field(default_factory=set)
    """Topics whose progress couldn't be noted."""
    damaged: set[bytes] = field(default_factory=set)
    is_full: bool = False
    is_slow: bool = False
    """Then some of what it stores it says it hasn't."""

    def drop(self, topic: str) -> None:
        """Do what `gateway spool drop` does."""
        self.dropped[topic] = len(self.records[topic])
        self.deleted[topic].update(range(len(self.records[topic])))

    def add(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        self.records[topic].append(Record(len(self.records[topic]), now(), key, value, tuple(headers)))
