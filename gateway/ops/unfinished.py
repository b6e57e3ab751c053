"""Events, and deliveries of ordered routes, that aren't finished: by the commits of their groups."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway.engine.delivery.dispatcher import UNKNOWN_MAX_AGE
from gateway.engine.delivery.outcomes import LATE
from gateway.log.base import Commit, Log, Partition
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import SpillReason
from gateway.ops.findings import DEAD_BY_THEN, WAITING, Finding, unknown_name_steps
from gateway.ops.log_search import bounds_of
from gateway.ops.process_status import UNREADABLE
from gateway.ops.waiting_deliveries import WAIT_REASONS
from gateway.rules.debounce import MAX_QUIET
from gateway.rules.rules import Rules


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
    for topic in sorted(await log.topics()):
        target = topics.ordered_target(topic)
        if target is None and not topic.startswith(topics.events("")):
            continue
        group = topics.group(ROUTER_GROUP) if target is None else topics.ordered_group(*target)
        commits = await log.committed(group, topic)
        count, oldest = 0, log.now()
        bounds = await bounds_of(log, topic, unread)
        for number, (start, end) in bounds.items():
            commit = commits.get(number, Commit(start))
            first = max(start, commit.base)
            count += max(0, end - first - int.from_bytes(commit.done, "little").bit_count())
            async with aclosing(_append_times(log, Partition(topic, number), first, min(end, first + 1))) as times:
                async for at in times:
                    oldest = min(oldest, at)
        if not count:
            continue
        age = log.now() - oldest
        is_late = age > LATE
        if target is not None:
            state = _OrderedState.of(target, statuses)
            is_late = age > LATE + _quiet_of(target[0], rules, state)
            found += _ordered_findings(target, _Unfinished(count, oldest, len(bounds)), state, rules, is_late=is_late)
        elif is_late:  # events in flight aren't worth reporting
            what = f"source {topic.removeprefix(topics.events(''))}"
            why = "events not yet routed and delivered"
            found.append(Finding(rank=WAITING, what=what, why=why, since=oldest, count=count))
    return found


class _Unfinished(NamedTuple):
    """How many records of a topic aren't finished, when the oldest was appended, and the topic's partitions."""

    number: int
    oldest: float
    partitions: int


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
    target: tuple[str, str], unfinished: _Unfinished, state: _OrderedState, rules: Rules | None, *, is_late: bool
) -> list[Finding]:
    """Return what waits on an ordered route: for its turn, or for its name to be in the rules again."""
    what = " → ".join(target)
    count, oldest, partitions = unfinished
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
            )
        ]
    is_known = rules is None or (target[0] in rules.routes and target[1] in rules.destinations)
    if not is_known and not state.partitions:
        return [
            Finding(
                rank=WAITING,
                what=what,
                why="not in the local rules: if processes lack it, too, they become dead letters (route_removed) after "
                "an hour",
                needs_attention=is_late,
                since=oldest,
                next=unknown_name_steps(*target, rules) if is_late else (),
                count=count,
            )
        ]
    has_all = state.partitions >= partitions
    waiting = max(0, count - state.first) if has_all else count
    why = "waiting for their turn" if has_all else "waiting for their turn, or blocked"
    if _quiet_of(target[0], rules, state):
        why = "waiting for their turn, or until their key was quiet"
    finding = Finding(rank=WAITING, what=what, why=why, needs_attention=is_late, since=oldest, count=waiting)
    return [finding] if waiting else []


async def _append_times(log: Log, partition: Partition, start: int, end: int) -> AsyncGenerator[float, None]:
    async for records in log.scan(partition, start, end):
        for record in records:
            yield record.appended_at
