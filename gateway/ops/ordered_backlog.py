"""How many deliveries of ordered routes aren't finished, by their groups' commits."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.log.base import Commit, Log, Partition
from gateway.log.topics import Topics


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedBacklog:
    """The number of unfinished records before these ends of ordered routes' topics."""

    ends: Mapping[Partition, int]
    count: int


async def ordered_backlog_of(log: Log, topics: Topics, name: str) -> OrderedBacklog:
    """Return the unfinished records of the ordered routes that a "route/…" or "destination/…" names.

    Raises LogUnavailableError.
    """
    kind, _, called = name.partition("/")
    ends: dict[Partition, int] = {}
    for topic in await log.topics():
        target = topics.ordered_target(topic)
        if target is not None and target[0 if kind == "route" else 1] == called:
            bounds, _ = await log.readable(topic)
            ends |= {Partition(topic, number): end for number, (_, end) in bounds.items()}
    return OrderedBacklog(ends=ends, count=await unfinished_before(log, topics, ends))


async def unfinished_before(log: Log, topics: Topics, ends: Mapping[Partition, int]) -> int:
    """Return how many records before these ends aren't finished. Raises LogUnavailableError."""
    count = 0
    for topic in {partition.topic for partition in ends}:
        target = topics.ordered_target(topic)
        assert target is not None
        commits = await log.committed(topics.ordered_group(*target), topic)
        bounds, _ = await log.readable(topic)
        for number, (start, _) in bounds.items():
            if (end := ends.get(Partition(topic, number))) is not None:
                count += _unfinished(commits.get(number, Commit(start)), start, end)
    return count


def _unfinished(commit: Commit, start: int, end: int) -> int:
    first = max(start, commit.base)
    length = max(0, end - first)
    done = (int.from_bytes(commit.done, "little") >> (first - commit.base)) & ((1 << length) - 1)
    return length - done.bit_count()
