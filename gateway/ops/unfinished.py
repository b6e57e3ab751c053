"""Events, and deliveries of ordered routes, that aren't finished: by the commits of their groups."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway.engine.delivery.dispatcher import UNKNOWN_MAX_AGE
from gateway.engine.delivery.outcomes import LATE
from gateway.log.base import Commit, Log, Partition
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import SpillReason
from gateway.ops.findings import DEAD_BY_THEN, LOCAL_RULES, WAITING, Finding, unknown_name_steps
from gateway.ops.log_search import bounds_of
from gateway.ops.process_status import UNREADABLE
from gateway.ops.waiting_deliveries import WAIT_REASONS
from gateway.rules.debounce import MAX_QUIET
from gateway.rules.rules import Rules


class Reading(NamedTuple):
    """Whose records a topic has, and which group reads it.

    `target` are the ordered route and its destination; None for events, of these `sources`.
    """

    topic: str
    group: str
    target: tuple[str, str] | None
    sources: tuple[str, ...] = ()


class Unfinished(NamedTuple):
    """How many records of a topic aren't finished, when the oldest was appended, and the topic's partitions.

    `finished` is how many are, over all its time; `oldest` is now if all are.
    """

    number: int
    oldest: float
    partitions: int
    finished: int


def readings_of(names: Iterable[str], topics: Topics, rules: Rules | None = None) -> list[Reading]:
    """Return which of these topics have events, or deliveries of ordered routes, by name.

    Which ones sources share, or have named themselves, the rules say.
    """
    named: dict[str, list[str]] = {}
    for source in () if rules is None else rules.sources.values():
        if source.topic:
            named.setdefault(source.topic, []).append(source.name)
    found: list[Reading] = []
    for topic in sorted(names):
        target, prefix = topics.ordered_target(topic), topics.events("")
        if target is not None:
            found.append(Reading(topic, topics.ordered_group(*target), target))
        elif topic in named or topic.startswith(prefix):
            sources = tuple(sorted(named.get(topic, ()))) or (topic.removeprefix(prefix),)
            found.append(Reading(topic, topics.group(ROUTER_GROUP), None, sources))
    return found


async def unfinished_in(log: Log, reading: Reading, unread: dict[Partition, str]) -> Unfinished:
    """Return what isn't finished of a topic; `unread` gets the unreadable partitions. Raises LogUnavailableError."""
    commits = await log.committed(reading.group, reading.topic)
    number, finished, oldest = 0, 0, log.now()
    bounds = await bounds_of(log, reading.topic, unread)
    for partition, (start, end) in bounds.items():
        commit = commits.get(partition, Commit(start))
        first, done = max(start, commit.base), int.from_bytes(commit.done, "little").bit_count()
        number += max(0, end - first - done)
        finished += first + done
        times = _append_times(log, Partition(reading.topic, partition), first, min(end, first + 1))
        async with aclosing(times):
            async for at in times:
                oldest = min(oldest, at)
    return Unfinished(number, oldest, len(bounds), finished)


async def unfinished_findings(
    log: Log,
    topics: Topics,
    unread: dict[Partition, str],
    *,
    statuses: Sequence[tuple[Mapping[str, Any], str]] = (),
    rules: Rules | None = None,
) -> list[Finding]:
    """Return the events, and the deliveries of ordered routes, that aren't finished. Raises LogUnavailableError.

    `statuses` are processes' /status responses with their addresses: these know which ordered keys are blocked, halted
    or quiet, whose first deliveries `process_findings` reports, and which names their rules lack. `rules` are the local
    ones.
    """
    found = []
    for reading in readings_of(await log.topics(), topics, rules):
        unfinished = await unfinished_in(log, reading, unread)
        found += findings_of(reading, unfinished, log.now(), statuses=statuses, rules=rules)
    return found


def findings_of(
    reading: Reading,
    unfinished: Unfinished,
    now: float,
    *,
    statuses: Sequence[tuple[Mapping[str, Any], str]] = (),
    rules: Rules | None = None,
) -> list[Finding]:
    """Return what a topic's unfinished records mean, as of a time (Unix seconds)."""
    if not unfinished.number:
        return []
    age = now - unfinished.oldest
    if reading.target is not None:
        state = _OrderedState.of(reading.target, statuses)
        is_late = age > LATE + _quiet_of(reading.target[0], rules, state)
        return _ordered_findings(reading.target, unfinished, state, rules, is_late=is_late)
    if age <= LATE:  # events in flight aren't worth reporting
        return []
    return [
        Finding(
            rank=WAITING,
            what=f"source{'s' if len(reading.sources) > 1 else ''} {', '.join(reading.sources)}",
            why="events not yet routed and delivered",
            since=unfinished.oldest,
            count=unfinished.number,
            source=reading.sources[0] if len(reading.sources) == 1 else "",
        )
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _OrderedState:
    """What processes know of an ordered route to a destination; how many of its partitions are theirs."""

    partitions: int
    first: int
    """The number of blocked, halted and quiet keys, so of their first deliveries."""
    has_quiet: bool
    """Whether keys wait until they were quiet."""
    unknown_since: float | None
    by: str
    """The address of a process whose rules lack it."""

    @classmethod
    def of(cls, target: tuple[str, str], statuses: Sequence[tuple[Mapping[str, Any], str]]) -> "_OrderedState":
        partitions = first = quiet = 0
        unknown: list[tuple[float, str]] = []
        for status, address in statuses:
            try:
                for keys in status["ordered"]:
                    number = int(keys.get("partitions", 0))  # an older version doesn't send it
                    if (keys["route"], keys["destination"]) != target or not number:
                        continue
                    partitions += number
                    quiet += int(keys.get("quiet", 0))
                    first += int(keys["halted"]) + int(keys["blocked"]) + int(keys.get("quiet", 0))
                    if (since := keys["unknown_since"]) is not None:
                        unknown.append((float(since), address))
            except UNREADABLE:  # `process_findings` reports it
                continue
        since, by = min(unknown, default=(None, ""))
        return cls(partitions=partitions, first=first, has_quiet=quiet > 0, unknown_since=since, by=by)


def _quiet_of(name: str, rules: Rules | None, state: _OrderedState) -> float:
    """Return for how many seconds a key of a route may wait until it was quiet; 0 if that isn't known of it."""
    route = None if rules is None else rules.routes.get(name)
    if route is not None:
        return 0.0 if route.debounce is None else route.debounce.quiet
    return MAX_QUIET if state.has_quiet else 0.0


def _ordered_findings(
    target: tuple[str, str], unfinished: Unfinished, state: _OrderedState, rules: Rules | None, *, is_late: bool
) -> list[Finding]:
    """Return what waits on an ordered route: for its turn, or for its name to be in the rules again."""
    what = " → ".join(target)
    count, oldest, partitions = unfinished.number, unfinished.oldest, unfinished.partitions
    if state.unknown_since is not None:
        return [
            Finding(
                rank=WAITING,
                what=what,
                why=f"{WAIT_REASONS[SpillReason.UNKNOWN_NAME]}{DEAD_BY_THEN}",
                needs_attention=is_late,
                since=state.unknown_since,
                until=max(state.unknown_since, oldest) + UNKNOWN_MAX_AGE,
                by=state.by,
                next=unknown_name_steps(*target, rules) if is_late else (),
                count=count,
                route=target[0],
                destination=target[1],
            )
        ]
    is_known = rules is None or (target[0] in rules.routes and target[1] in rules.destinations)
    if not is_known and not state.partitions:
        return [
            Finding(
                rank=WAITING,
                what=what,
                why=f"not in {LOCAL_RULES}: if processes lack it, too, they become dead letters (route_removed) after "
                "an hour",
                needs_attention=is_late,
                since=oldest,
                next=unknown_name_steps(*target, rules) if is_late else (),
                count=count,
                route=target[0],
                destination=target[1],
            )
        ]
    has_all = state.partitions >= partitions
    waiting = max(0, count - state.first) if has_all else count
    why = "waiting for their turn" if has_all else "waiting for their turn, or blocked"
    if _quiet_of(target[0], rules, state):
        why = "waiting for their turn, or until their key was quiet"
    finding = Finding(
        rank=WAITING,
        what=what,
        why=why,
        needs_attention=is_late,
        since=oldest,
        count=waiting,
        route=target[0],
        destination=target[1],
    )
    return [finding] if waiting else []


async def _append_times(log: Log, partition: Partition, start: int, end: int) -> AsyncGenerator[float, None]:
    async for records in log.scan(partition, start, end):
        for record in records:
            yield record.appended_at
