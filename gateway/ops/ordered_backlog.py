"""How many deliveries of ordered routes aren't finished, by their groups' commits, and the outcome of a kick there."""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from typing_extensions import override

from gateway.engine.control.records import ControlRecord, announcement_key, tried_name
from gateway.engine.control.state import Control
from gateway.log.base import Commit, Log, Partition
from gateway.log.topics import Topics
from gateway.ops.control_client import ControlClient, StoredCommand
from gateway.ops.kick_report import combined, describe_kick

POLLS, POLL_INTERVAL = 12, 0.25
"""Number of polls, and seconds between them: ordered routes act on a command within seconds, including one attempt."""
PUBLISHED_AFTER = 5.0
"""Seconds after a kick's announcement by which a process that had anything waiting has published what came of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedBacklog:
    """The number of unfinished records before these ends of ordered routes' topics, by partition.

    `targets` are the route and destination of each topic.
    """

    ends: Mapping[Partition, int]
    unfinished: Mapping[Partition, int]
    targets: Mapping[str, tuple[str, str]]

    @property
    def count(self) -> int:
        return sum(self.unfinished.values())

    @property
    def blocked(self) -> Collection[tuple[str, str]]:
        """The routes and destinations with unfinished records."""
        return {self.targets[partition.topic] for partition, number in self.unfinished.items() if number}

    def tried_name(self, partition: Partition) -> str:
        """Return the name of the checkpoint with a kick's outcome on a partition."""
        return tried_name(*self.targets[partition.topic], partition.number)


async def ordered_backlog_of(log: Log, topics: Topics, name: str) -> OrderedBacklog:
    """Return the unfinished records of the ordered routes that a "route/…" or "destination/…" names.

    Raises LogUnavailableError.
    """
    kind, _, called = name.partition("/")
    ends: dict[Partition, int] = {}
    targets: dict[str, tuple[str, str]] = {}
    for topic in await log.topics():
        target = topics.ordered_target(topic)
        if target is not None and target[0 if kind == "route" else 1] == called:
            bounds, _ = await log.readable(topic)
            targets[topic] = target
            ends |= {Partition(topic, number): end for number, (_, end) in bounds.items()}
    return OrderedBacklog(ends=ends, unfinished=await unfinished_before(log, topics, ends), targets=targets)


async def unfinished_before(log: Log, topics: Topics, ends: Mapping[Partition, int]) -> Mapping[Partition, int]:
    """Return how many records before these ends aren't finished, by partition. Raises LogUnavailableError."""
    unfinished: dict[Partition, int] = {}
    for topic in {partition.topic for partition in ends}:
        target = topics.ordered_target(topic)
        assert target is not None
        commits = await log.committed(topics.ordered_group(*target), topic)
        bounds, _ = await log.readable(topic)
        for number, (start, _) in bounds.items():
            partition = Partition(topic, number)
            if (end := ends.get(partition)) is not None:
                unfinished[partition] = _unfinished(commits.get(number, Commit(start)), start, end)
    return unfinished


def _unfinished(commit: Commit, start: int, end: int) -> int:
    first = max(start, commit.base)
    length = max(0, end - first)
    done = (int.from_bytes(commit.done, "little") >> (first - commit.base)) & ((1 << length) - 1)
    return length - done.bit_count()


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedOutcome:
    """How many deliveries of ordered routes waited before a command, and how many of them still wait.

    `kick` has how many of them a kick tried, and why the others wait, if all their processes have published it. For one
    whose backlog nobody has looked at before, `note` says that it isn't known, or that no process has told of any.
    """

    waited: int = 0
    wait: int = 0
    kick: ControlRecord | None = None
    note: str = ""

    @property
    def as_json(self) -> Mapping[str, object]:
        if self.note:
            return {"is_known": self.note != NOT_KNOWN, "waited": None}
        if not self.waited:
            return {}
        fields: dict[str, object] = {"waited": self.waited, "waiting": self.wait}
        if self.kick is not None:
            fields |= {
                "tried": self.kick.tried,
                "delivered": self.kick.delivered,
                "waits": self.kick.untried_by_reason,
                "failed_by_result": self.kick.failed_by_result,
                "repeated_failures": self.kick.repeated_failures,
                "dead": self.kick.dead,
            }
        return fields

    @override
    def __str__(self) -> str:
        """Return the end of a line about them; "" without any."""
        if self.note:
            return f"; {self.note}"
        if not self.waited:
            return ""
        if self.kick is not None:
            return f"; on ordered routes {describe_kick(self.kick)}"
        wait = f"{self.wait:,} of them still {'waits' if self.wait == 1 else 'wait'}" if self.wait else "none waits now"
        return f"; on ordered routes {self.waited:,} waited, {wait}"


NOT_KNOWN = "what was tried on ordered routes isn't known yet"
UNTOLD = "on ordered routes, no process has told of any"


async def ordered_outcome_of(
    log: Log, topics: Topics, before: OrderedBacklog, client: ControlClient, placed: StoredCommand
) -> OrderedOutcome:
    """Return the outcome of a command on ordered routes, once that is known or a few seconds have passed."""
    kick: ControlRecord | None = None
    left: Mapping[Partition, int] = {}
    outcomes: dict[str, ControlRecord] = {}
    for poll in range(POLLS + 1):
        if poll:
            await asyncio.sleep(POLL_INTERVAL)
        left = await unfinished_before(log, topics, before.ends)
        if placed.command.kind == "kick":
            # What was read stays: a later kick replaces it in the log.
            outcomes = {**await client.ordered_outcomes(placed), **outcomes}
            kick = _kick_outcome(before, left, outcomes, placed.command)
        is_committed = kick is not None and sum(left.values()) <= kick.count - (kick.delivered or 0)
        if is_committed or not any(left.values()):
            break
    return OrderedOutcome(waited=before.count, wait=sum(left.values()), kick=kick)


def _kick_outcome(
    before: OrderedBacklog, left: Mapping[Partition, int], outcomes: Mapping[str, ControlRecord], command: ControlRecord
) -> ControlRecord | None:
    """Return the outcome of a kick on ordered routes; None unless it is known of each partition with a backlog."""
    found: list[ControlRecord] = []
    for partition, number in before.unfinished.items():
        outcome = outcomes.get(before.tried_name(partition))
        if outcome is not None:
            found.append(outcome)
        elif number and left.get(partition):
            return None
    return combined(found, command) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedKick:
    """What the processes of ordered routes have published of a kick, in all; None if that isn't known (yet).

    `unfinished` is how many deliveries that were stored before the kick aren't finished now, as far as that was read.
    """

    outcome: ControlRecord | None = None
    unfinished: int = 0


async def ordered_kick_of(log: Log, topics: Topics, control: Control, command: ControlRecord) -> OrderedKick | None:
    """Return what the last kick of its name came to on ordered routes; None if the name has none.

    Unlike `ordered_outcome_of`, this needs nothing that was read before the kick. Raises LogUnavailableError.
    """
    kind, _, called = command.name.partition("/")
    targets = {topic: target for topic in await log.topics() if (target := topics.ordered_target(topic)) is not None}
    targets = {topic: target for topic, target in targets.items() if target[0 if kind == "route" else 1] == called}
    if not targets:
        return None
    announced, offset = control.last_checkpoint(announcement_key(command.key)), control.offset_of(command.key)
    if command.state != "done" or announced is None or offset is None or announced.covers_commands_below <= offset:
        return OrderedKick()
    ends: dict[Partition, int] = {}
    is_known = True
    for topic in targets:
        bounds, unread = await log.readable(topic)
        is_known &= not unread
        before = await log.offsets_at(topic, announced.at, bounds)
        ends |= {Partition(topic, number): end for number, end in before.items()}
    unfinished = await unfinished_before(log, topics, ends)
    is_published = log.now() >= announced.at + PUBLISHED_AFTER
    found: list[ControlRecord] = []
    for partition, number in unfinished.items():
        target = targets[partition.topic]
        outcome = control.last_checkpoint(tried_name(*target, partition.number))
        if outcome is not None and outcome.at == announced.at:
            found.append(outcome)
        elif number or not is_published or control.kicked_at(*target) != announced.at:  # a later one replaces it
            is_known = False
    return OrderedKick(outcome=combined(found, command) if is_known else None, unfinished=sum(unfinished.values()))
