"""The state that results from the records of `gateway.control` (see `records.py`): which commands are in force.

Operators write commands; the one owner of the jobs (`jobs/runner.py`) writes the checkpoints, under keys of their own,
so neither can undo the other's. A checkpoint is published after the deliveries that it covers were injected: a job that
is killed repeats some, and skips none. A record without a value deletes its key.

A newer pause, resume or kick replaces an older one of its key, and one job may answer several. So the last checkpoint
of a job covers all commands of its key below an offset of the control topic, and thereby ends them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from math import inf

from gateway.engine.control.records import (
    ControlRecord,
    DeadLetterProperties,
    Kind,
    State,
    announcement_key,
    decode,
    kind_and_name,
    partition_key,
)
from gateway.engine.control.resolved_index import ResolvedIndex
from gateway.engine.control.routing_history import History
from gateway.log.base import Partition
from gateway.model import NewerRecordError

ANNOUNCEMENT_TOLERANCE = 1.0
"""Seconds after an announcement within which a record may be dated that it covers: the brokers' clocks differ."""
KICK_HEARTBEAT_TIMEOUT = 20.0
"""Seconds after the last heartbeat of a kick for which what it has announced is reserved for it."""
_ANNOUNCEMENT, _ANNOUNCED_KICK = announcement_key(""), announcement_key("kick/")


class Control:
    """The commands in force, and the checkpoints of their jobs."""

    def __init__(self, records: Iterable[ControlRecord] = ()) -> None:
        self.commands: dict[str, ControlRecord] = {}
        self.read_at = 0.0
        """When the control topic was last fetched, in the event loop's time."""
        self.resolutions = 0
        """Incremented whenever more dead letters were resolved: fewer may then be open."""
        self.redeliveries = 0
        """Incremented whenever a redelivery has progressed."""
        self.kicks = 0
        """The number of kicks announced so far."""
        self.recreations = 0
        """How often the control topic was recreated: earlier offsets are meaningless."""
        self.newer: dict[str, float] = {}
        """The keys whose last record is in a newer format, and when that was appended: this version doesn't act on it.
        """
        self._pending: dict[str, ControlRecord] = {}
        self._offsets: dict[str, int] = {}  # key → where its command is in the control topic
        self._unacknowledged_cancellations: dict[str, ControlRecord] = {}
        self.history = History()
        self._paused: frozenset[str] = frozenset()
        self._checkpoints: dict[str, ControlRecord] = {}
        self._overwritten: dict[str, ControlRecord] = {}  # by name: last checkpoints, in the topic, by an earlier one
        self._last_heartbeats: dict[str, float] = {}
        """When the last checkpoint or announcement of a kick was read, by its key."""
        self._last_kicks: dict[str, int] = {}  # name → the number of its last kick
        self._resolved = ResolvedIndex()
        self._resolving: dict[str, ControlRecord] = {}  # key → the command as far as it is carried out
        self._last_resolutions: dict[str, int] = {}
        for command in records:
            self.apply(command)

    def decode_and_apply(self, key: bytes, value: bytes, offset: int = 0, appended_at: float = inf) -> None:
        """Decode and apply a record of the control topic. Raises UndecodableRecordError without changing anything.

        Raises NewerRecordError for a newer format: the key's previous record then no longer counts, and what it may
        have paused is treated as paused, since deliveries made in spite of a pause can't be undone.

        A checkpoint can't cover commands after itself: if it says so, it means offsets of a former control topic.
        """
        name = key.decode(errors="surrogateescape")
        self.newer.pop(name, None)
        kind, command_name = kind_and_name(key)
        if not value and kind is None:
            return  # of a command of a newer version
        try:
            command = decode(key, value)
        except NewerRecordError:
            self.newer[name] = appended_at
            if kind == "routed":
                self.history.apply_newer(command_name, offset)
            elif kind is not None and kind != "checkpoint":
                self.apply(
                    ControlRecord(
                        kind=kind, name=command_name, state="paused" if kind == "pause" else "deleted", at=0.0
                    ),
                    offset,
                )
            raise
        self.apply(
            replace(command, covers_commands_below=0) if command.covers_commands_below > offset else command, offset
        )

    def forget_offsets(self) -> None:
        """Begin again with a recreated topic. Commands in force remain so, as if they preceded the new records."""
        self.recreations += 1
        self._offsets = dict.fromkeys(self._offsets, -1)
        self._checkpoints = {
            name: replace(checkpoint, covers_commands_below=0, known_below=None)
            for name, checkpoint in self._checkpoints.items()
        }
        self._overwritten.clear()
        self.history.forget_offsets()

    def offset_of(self, key: str) -> int | None:
        """Return where the command of a key is in the control topic."""
        return self._offsets.get(key)

    def is_left_to_newer_version(self, key: str) -> bool:
        """Return whether only a newer version may act on a command, as it has written the command or a checkpoint."""
        return not self.newer.keys().isdisjoint((key, f"checkpoint/{key}", f"checkpoint/{announcement_key(key)}"))

    def newer_until(self, kinds: Collection[Kind]) -> float:
        """Return when the last record that a newer version wrote of commands of some kinds was appended; -inf if none.

        That counts their checkpoints, too.
        """
        prefixes = tuple([prefix for kind in kinds for prefix in (f"{kind}/", f"checkpoint/{kind}/")])
        return max([at for key, at in self.newer.items() if key.startswith(prefixes)], default=-inf)

    def apply(self, command: ControlRecord, offset: int = 0) -> None:
        """Apply the next record of the control topic, decoded, with its offset there."""
        if command.kind in ("rules", "routed"):
            self.history.apply(command, offset)
            return
        if command.kind == "checkpoint":
            self._apply_checkpoint(command)
            return
        key = command.key
        self._pending.pop(key, None)
        self._offsets[key] = offset
        if command.state == "deleted":
            self.commands.pop(key, None)
            self._forget_offset_if_gone(key)
        else:
            self.commands[key] = command
            if command.is_pending:
                self._pending[key] = command
        if command.kind in ("replay", "redeliver"):
            self._update_cancellation(key)
        if command.kind == "pause":
            added = {command.name} if command.state == "paused" else set[str]()
            self._paused = (self._paused - {command.name}) | added
        if command.kind == "dead":
            self._update_resolution(key)

    def _apply_checkpoint(self, checkpoint: ControlRecord) -> None:
        name = checkpoint.name
        if checkpoint.state == "deleted":
            self._checkpoints.pop(name, None)
            self._overwritten.pop(name, None)
            self._last_heartbeats.pop(name, None)
            self._forget_offset_if_gone(name)
            return
        before = self._checkpoints.get(name)
        if before is not None and self._is_late(before, checkpoint):
            self._overwritten[name] = before
            return
        self._overwritten.pop(name, None)
        self._checkpoints[name] = checkpoint
        command = self._pending.get(name)
        is_answered = checkpoint.state == "done" and self._offsets.get(name, 0) < checkpoint.covers_commands_below
        if command is not None and command.kind in ("pause", "kick") and is_answered:
            del self._pending[name]
            ended: State = "active" if command.kind == "pause" else "done"
            self.commands[name] = command.with_state(
                ended,
                count=checkpoint.count,
                detail=checkpoint.detail,
                tried=checkpoint.tried,
                delivered=checkpoint.delivered,
                untried_by_reason=checkpoint.untried_by_reason,
                failed_by_result=checkpoint.failed_by_result,
                repeated_failures=checkpoint.repeated_failures,
                dead=checkpoint.dead,
                rate=checkpoint.rate,
                unread=checkpoint.unread,
            )
        if name.startswith(_ANNOUNCED_KICK) and (before is None or before.at != checkpoint.at):  # else it is withdrawn
            self.kicks += 1
            self._last_kicks[name.removeprefix(_ANNOUNCED_KICK)] = self.kicks
        if (kick := name.removeprefix(_ANNOUNCEMENT)).startswith("kick/"):
            self._last_heartbeats[kick] = self.read_at
        if name.startswith("dead/"):
            self._update_resolution(name)
        if name.startswith(("replay/", "redeliver/")):
            self._update_cancellation(name)
            self.redeliveries += name.startswith("redeliver/")

    def _forget_offset_if_gone(self, key: str) -> None:
        """Forget where a command was, once neither it nor its checkpoint is left."""
        if key not in self.commands and key not in self._checkpoints:
            self._offsets.pop(key, None)

    def _is_late(self, before: ControlRecord, checkpoint: ControlRecord) -> bool:
        """Return whether a checkpoint of a command was appended late, by a try without an answer.

        A later one covers no fewer commands, one of a replay is nowhere behind, and one of a redelivery has no fewer
        results. One that isn't the last comes after the last one only for another command.
        """
        if checkpoint.name not in self._offsets:
            return False
        if checkpoint.name.startswith("redeliver/"):
            return checkpoint.extent < before.extent
        if checkpoint.name.startswith("replay/"):
            later = checkpoint.checkpoint
            return any(offset > later.get(name, 0) for name, offset in before.checkpoint.items())
        if before.state == "done" and checkpoint.state == "requested" and not self.has_pending(checkpoint.name):
            return checkpoint.covers_commands_below <= before.covers_commands_below
        return checkpoint.covers_commands_below < before.covers_commands_below

    def _update_cancellation(self, key: str) -> None:
        """Update whether the last checkpoint of a cancelled replay or redelivery is missing."""
        command, checkpoint = self.commands.get(key), self._checkpoints.get(key)
        is_closed = checkpoint is not None and checkpoint.state == "cancelled"
        if command is not None and command.state == "cancelled" and not is_closed:
            self._unacknowledged_cancellations[key] = command
        else:
            self._unacknowledged_cancellations.pop(key, None)

    def _update_resolution(self, key: str) -> None:
        """Index a command about dead letters as far as it is carried out: up to its checkpoint until it is done."""
        before = self._resolving.pop(key, None)
        if before is not None:
            self._resolved.remove(before)
        command, checkpoint = self.commands.get(key), self._checkpoints.get(key)
        if command is None or (command.state != "done" and checkpoint is None):
            self._last_resolutions.pop(key, None)
            return
        reached = (
            command
            if command.state == "done" or checkpoint is None
            else replace(command, checkpoint=checkpoint.checkpoint, latest=checkpoint.covered_until)
        )
        self._resolving[key] = reached
        self._resolved.add(reached)
        self.resolutions += 1
        self._last_resolutions[key] = self.resolutions

    def resolved_after(self, number: int) -> list[ControlRecord]:
        """Return the commands about dead letters that have progressed since `resolutions` had that value."""
        return [
            self._resolving[key]
            for key, last in self._last_resolutions.items()
            if last > number and key in self._resolving
        ]

    def pending(self, kind: Kind) -> list[ControlRecord]:
        """Return the commands of a kind that a job has to carry out, oldest first."""
        return [
            command
            for command in self._pending.values()
            if command.kind == kind and not self.is_left_to_newer_version(command.key)
        ]

    def has_pending(self, key: str) -> bool:
        """Return whether a command with a key still has to be carried out."""
        return key in self._pending

    def is_pending(self, command: ControlRecord) -> bool:
        """Return whether a command is in force and still has to be carried out."""
        return self._pending.get(command.key) == command

    def commands_covered_below(self, key: str) -> int:
        """Return the offset below which the commands of a key are covered by a checkpoint."""
        checkpoint = self._checkpoints.get(key)
        return 0 if checkpoint is None else checkpoint.covers_commands_below

    def unacknowledged_cancellations(self) -> list[ControlRecord]:
        """Return the cancelled replays and redeliveries whose last checkpoint is missing."""
        return [
            command
            for key, command in self._unacknowledged_cancellations.items()
            if not self.is_left_to_newer_version(key)
        ]

    def overwritten_checkpoints(self) -> Collection[ControlRecord]:
        """Return the last checkpoints that are to be published again, as earlier ones were appended late.

        Otherwise processes that start later take the commands for pending, once the topic is compacted.
        """
        return self._overwritten.values()

    def last_checkpoint(self, key: str) -> ControlRecord | None:
        return self._checkpoints.get(key)

    def checkpoint(self, key: str) -> Mapping[str, int]:
        """Return up to where the jobs of a command have scanned: "topic/partition" → offset."""
        command = self._checkpoints.get(key)
        return {} if command is None else command.checkpoint

    def covered_until(self, key: str, partition_name: str) -> float:
        """Return the time after which no record of a partition below a command's checkpoint was appended; else 0.0."""
        command = self._checkpoints.get(key)
        return 0.0 if command is None else command.covered_until_in(partition_name)

    def injected(self, key: str) -> int:
        """Return the number of deliveries that the job of a command has injected up to its checkpoint."""
        command = self._checkpoints.get(key)
        return 0 if command is None else command.count

    def is_begun(self, key: str) -> bool:
        """Return whether a command's checkpoint is an intermediate one."""
        command = self._checkpoints.get(key)
        return command is not None and command.is_pending

    def announced(self, key: str) -> ControlRecord | None:
        """Return the announcement of a kick that is still open, if there is one."""
        announced = self._checkpoints.get(announcement_key(key))
        is_of_this = announced is not None and self._offsets.get(key, -1) < announced.covers_commands_below
        return announced if is_of_this and key in self._pending else None

    def unread(self, key: str) -> int:
        """Return the number of partitions that the job of a command couldn't read as of its checkpoint."""
        command = self._checkpoints.get(key)
        return 0 if command is None else command.unread

    def missed(self, key: str) -> frozenset[str]:
        """Return the partitions that a replay of the undelivered couldn't consider, up to its checkpoint."""
        command = self._checkpoints.get(key)
        return frozenset() if command is None or not command.detail else frozenset(command.detail.split(", "))

    def replayed_as(self, key: str) -> str:
        """Return a replay's route as in a routing revision; "" if it has changed meanwhile, or is unknown."""
        command = self._checkpoints.get(key)
        return "" if command is None else command.routes

    def known_below(self, key: str) -> tuple[int, int] | None:
        """Return up to which offsets a replay knew the control topic, at its start and at its checkpoint; else None."""
        command = self._checkpoints.get(key)
        return None if command is None else command.known_below

    def identities_of(self, key: str) -> str:
        """Return how a replay's sources identified events; "" if that has changed meanwhile, or is unknown."""
        command = self._checkpoints.get(key)
        return "" if command is None else command.identities

    def kicked_at(self, route: str, destination: str) -> float:
        """Return when the last kick of either was announced, by the log's clock then; 0.0 if none was.

        The last is the one that was announced after the other: the clock may have been set back in between.
        """
        names = (f"destination/{destination}", f"route/{route}")
        last = max(names, key=lambda name: self._last_kicks.get(name, 0))
        announced = self._checkpoints.get(announcement_key(f"kick/{last}"))
        return 0.0 if announced is None else announced.at

    def kicked_after(self, count: int) -> list[str]:
        """Return the names ("route/…" or "destination/…") with a kick after the first `count` ones."""
        return [name for name, number in self._last_kicks.items() if number > count]

    def has_scanned(self, key: str, partition: Partition, offset: int, appended_at: float) -> bool:
        """Return whether a job of a key has scanned a record."""
        command = self._checkpoints.get(key)
        return command is not None and command.is_before_checkpoint(partition, offset, appended_at)

    def paused_by(self, route: str, destination: str) -> str | None:
        """Return the paused name that stops a delivery ("route/…" or "destination/…"), if one does."""
        if not self._paused:
            return None
        for name in (f"destination/{destination}", f"route/{route}"):
            if name in self._paused:
                return name
        return None

    def was_injected_by_kick(
        self, route: str, destination: str, partition: Partition, offset: int, appended_at: float
    ) -> bool:
        """Return whether a kick has injected this record, so that it is skipped when it comes due."""
        if not self._checkpoints:
            return False
        return any(
            self.has_scanned(f"kick/{name}", partition, offset, appended_at)
            for name in (f"destination/{destination}", f"route/{route}")
        )

    def is_kick_pending(self, route: str, destination: str, partition: Partition, offset: int) -> bool:
        """Return whether a kick is about to inject this record, so that it has to wait for that.

        This is no longer so once the kick has ended, even by a process that wrongly took itself for the owner; nor
        once it backs off, or its heartbeats have stopped: the log doesn't take what it injects.
        """
        partition_name = partition_key(partition)
        for key in (f"kick/destination/{destination}", f"kick/route/{route}"):
            if (
                key in self._pending
                and offset < self.checkpoint(announcement_key(key)).get(partition_name, 0)
                and self.read_at < self._last_heartbeats.get(key, 0.0) + KICK_HEARTBEAT_TIMEOUT
            ):
                return True
        return False

    def is_expedited(self, route: str, destination: str, partition: Partition, offset: int, appended_at: float) -> bool:
        """Return whether a kick has expedited this record in the shortest tier: it is due as soon as it is read."""
        partition_name = partition_key(partition)
        for key in (f"kick/destination/{destination}", f"kick/route/{route}"):
            announced = self._checkpoints.get(announcement_key(key))
            if announced is None or appended_at > announced.at + ANNOUNCEMENT_TOLERANCE:
                continue
            if offset < announced.expedited.get(partition_name, 0):
                return True
        return False

    def next_replay(self, waiting: Collection[str] = ()) -> ControlRecord | None:
        """Return the first replay that is asked for and isn't `waiting`."""
        return next((command for command in self.pending("replay") if command.key not in waiting), None)

    def resolved_by(self, letter: DeadLetterProperties, partition: Partition, offset: int) -> ControlRecord | None:
        """Return the command that replayed or dropped a dead letter, the first one if several did."""
        found = self._resolved.resolving(letter, partition, offset)
        return min(found, key=lambda command: command.at, default=None)

    def ended(self, before: float) -> list[ControlRecord]:
        """Return the replays and dead-letter commands from before a time that have ended.

        They have no effect any more once what they are about is gone: until then a dead letter would be open again, and
        an event undelivered. Pauses and kicks are kept: there are no more of them than names, and a new one must not be
        taken for the old one.
        """
        return [
            command
            for command in self.commands.values()
            if command.at < before and command.kind in ("replay", "dead") and command.state in ("done", "cancelled")
        ]
