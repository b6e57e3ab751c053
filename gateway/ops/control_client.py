"""Operators' commands: writes control records to `gateway.control`, and waits for their outcome.

pause, cancel                 apply as soon as they are stored and read
resume, kick, replay, drop    are carried out by the running gateway that owns the jobs, which publishes the outcome;
                              so is redeliver (`redeliveries.py`)
"""

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Literal, NamedTuple

from gateway.engine.control.append import append_control_record
from gateway.engine.control.records import (
    ControlRecord,
    DeadFilter,
    Kind,
    Selection,
    State,
    announcement_key,
    decode,
    partition_key,
)
from gateway.engine.control.state import Control
from gateway.engine.jobs.log_reader import last_append_time, last_records, records_of
from gateway.log.audit_records import ActOutcome, AuditRecord
from gateway.log.base import Log, NewRecord, Partition, Position, Record
from gateway.log.records import record_metadata_of
from gateway.log.topics import CONTROL_PARTITION, JOBS_GROUP, Topics
from gateway.model import ForbiddenError, LogUnavailableError, UnreadableRecordError, UsageError
from gateway.ops.audit import Act, Actor, Auditor
from gateway.ops.command_texts import command_words

CANCEL_GRACE = 3.0
"""Seconds within which a gateway publishes how far a cancelled command had come."""
_DONE: Mapping[Kind, State] = {"pause": "active"}
"""The state of a command that its job has carried out, if it isn't "done". A resume is a record of the kind "pause"."""
CONFIRMED_WITHIN = 5.0
"""Seconds within which a running gateway confirms a pause, unless it is rebalancing."""
POLL_EVERY = 0.1
"""Seconds between polls for an outcome."""


class StoredCommand(NamedTuple):
    """A stored control record, and its offset in the control topic.

    `was_paused` is False for a resume of what isn't paused, but has parked deliveries. `act` is its audit record.
    """

    command: ControlRecord
    offset: int
    was_paused: bool = True
    act: AuditRecord | None = None


class DeadLetterEnds(NamedTuple):
    """Where each partition of the dead-letter topic ends at one moment: the offset after its last record.

    `unread` is the number of partitions that can't be read, and `latest` when the last record was appended, None
    without any.
    """

    ends: Mapping[Partition, int]
    unread: int
    latest: float | None


class Pause(NamedTuple):
    """The active pause, whether this command created it, and its offset in the control topic."""

    command: ControlRecord
    is_new: bool
    offset: int | None


Alongside = Callable[[ControlRecord], Sequence[ControlRecord]]
"""Returns what is stored together with a command."""


def _nothing(_: ControlRecord) -> Sequence[ControlRecord]:
    return ()


class ControlClient:
    """Writes and reads the control records of one log. Every method may raise LogUnavailableError.

    Before a command, its audit record is stored, with `actor` (by default the user of this process) and `why`. The
    records that `alongside` returns for a command are stored together with it, or neither is.
    """

    def __init__(
        self,
        log: Log,
        topics: Topics,
        *,
        actor: Actor | None = None,
        why: str = "",
        alongside: Alongside = _nothing,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.audit = Auditor(log, topics, actor or Actor.of_command(), why)
        self._alongside = alongside
        self._log = log
        self._topics = topics
        self._partition = topics.control_partition
        self._sleep = sleep

    async def control(self) -> Control:
        """Return the current control records; unreadable ones are skipped."""
        control = Control()
        await catch_up(self._log, self._topics, control, 0)
        return control

    async def pause(self, name: str) -> Pause:
        """Stop the deliveries of "route/…" or "destination/…"; they are parked until it is resumed.

        If it is already paused, nothing is stored, and that pause remains in force. If two are stored at the same
        moment, so that neither sees the other, the later one applies.
        """
        control = await self.control()
        command = ControlRecord(kind="pause", name=name, state="paused", at=self._log.now(), by=self.audit.actor.who)
        before = control.commands.get(command.key)
        if before is not None and before.state == "paused" and command.key not in control.newer:
            return Pause(before, is_new=False, offset=control.offset_of(command.key))
        placed = await self._place(command)
        return Pause(command, is_new=True, offset=placed.offset)

    async def confirmed(self, pause: Pause, *, timeout: float) -> ControlRecord | None:
        """Return what applies to the name once a running gateway has read a pause; None if none has within `timeout`.

        That is the pause, or a resume that came after it. Only the owner of the jobs commits what it has read. The
        other processes read the pause by themselves, usually within a second; nothing confirms that they have.
        """
        offset, waited = pause.offset, 0.0
        while True:
            commit = (await self._log.committed(self._topics.group(JOBS_GROUP), self._topics.control)).get(0)
            if offset is not None and commit is not None and commit.covers(offset):
                return (await self.control()).commands.get(pause.command.key)
            if waited >= timeout:
                return None
            await self._sleep(POLL_EVERY)
            waited += POLL_EVERY

    async def has_begun(self, placed: StoredCommand) -> bool:
        """Return whether a gateway has begun to carry out a command."""
        return is_begun(await self.control(), placed.command, placed.offset)

    async def resume(self, name: str) -> StoredCommand | None:
        """Resume a paused name, and have its parked deliveries delivered.

        None if it isn't paused and has none: it may have some if the control topic was recreated.
        """
        command = ControlRecord(kind="pause", name=name, state="resuming", at=self._log.now(), by=self.audit.actor.who)
        control = await self.control()
        before = control.commands.get(command.key)
        was_paused = before is not None and before.state != "active"
        if not was_paused and not await self._may_have_parked(name, control):
            return None
        return (await self._place(command))._replace(was_paused=was_paused)

    async def kick(self, name: str) -> StoredCommand:
        """Have everything that waits for a retry retried now."""
        command = ControlRecord(kind="kick", name=name, state="requested", at=self._log.now(), by=self.audit.actor.who)
        return await self._place(command)

    async def dead_letter_ends(self) -> DeadLetterEnds:
        """Return where the dead-letter topic ends now."""
        bounds, unread = await self._log.readable(self._topics.dead)
        ends = {Partition(self._topics.dead, number): end for number, (_, end) in bounds.items()}
        return DeadLetterEnds(ends, len(unread), await last_append_time(self._log, _by_name(ends)))

    async def resolve(
        self,
        action: Literal["replay", "drop"],
        which: DeadFilter,
        *,
        name: str = "",
        ends: DeadLetterEnds | None = None,
    ) -> StoredCommand:
        """Have the dead letters that match the filter replayed or dropped, by a command of that name.

        These are the ones below `ends`, which is what somebody was shown; by default, all that exist now.
        """
        ends = await self.dead_letter_ends() if ends is None else ends
        return await self._place(
            ControlRecord(
                kind="dead",
                name=name or self._new_name(),
                state="requested",
                at=self._log.now(),
                checkpoint=_by_name(ends.ends),
                action=action,
                by=self.audit.actor.who,
                via=self.audit.actor.via,
                filter=which,
                unread=ends.unread,
                latest=ends.latest,
            )
        )

    async def replay(
        self, selection: Selection, ends: Mapping[str, int], *, unread: int = 0, name: str = ""
    ) -> StoredCommand:
        """Have a selection's events below these ends ("topic/partition" → offset) delivered again.

        `unread` is the number of unreadable partitions, which aren't included.
        """
        return await self._place(
            ControlRecord(
                kind="replay",
                name=name or self._new_name(),
                state="requested",
                at=self._log.now(),
                checkpoint=ends,
                selection=selection,
                unread=unread,
                last_records=await last_records(self._log, selection.starts, ends),
            )
        )

    async def cancel(self, name: str) -> StoredCommand | None:
        """Cancel a replay; its current batch is still injected. None if there is no such replay, or it has ended."""
        control = await self.control()
        command = control.commands.get(f"replay/{name}")
        if command is None or command.state != "requested":
            return None
        cancelled = command.with_state("cancelled", count=control.injected(command.key))
        return await self._place(cancelled)

    async def finished(self, placed: StoredCommand, *, timeout: float) -> ControlRecord | None:
        """Return the command with its outcome, or None if it hasn't ended within `timeout` seconds.

        It is "cancelled" if a newer command for its name replaced it; `count` is then how far it had come.
        """
        start = placed.offset + 1
        waited, replaced_at = 0.0, math.inf
        while True:
            end = await self._end()
            async for records in self._log.scan(self._partition, start, end):
                for record in records:
                    command = _decode_related(record, placed.command)
                    if command is None:
                        continue
                    if (ended := _ending(command, placed)) is not None:
                        return await self._ended(placed, ended)
                    if command.state == "paused":
                        replaced_at = min(replaced_at, waited)
            start = max(start, end)
            if waited >= replaced_at + CANCEL_GRACE:  # replaced before any gateway had begun
                return await self._ended(placed, placed.command.with_state("cancelled", count=0))
            if waited >= timeout:
                return None
            await self._sleep(POLL_EVERY)
            waited += POLL_EVERY

    async def _ended(self, placed: StoredCommand, ended: ControlRecord) -> ControlRecord:
        """Record the outcome of a command that this client has given, and return it."""
        if placed.act is not None:
            outcome = ActOutcome.CANCELLED if ended.state == "cancelled" else ActOutcome.DONE
            unknown = await self._unknown_yet(placed.command)
            await self.audit.record_outcome(placed.act, outcome, _count_of(placed.command, ended.count, unknown))
        return ended

    async def record_ordered_outcome(self, placed: StoredCommand, ended: ControlRecord, ordered: str) -> None:
        """Record the outcome of a command that this client has given, once it is known on ordered routes, too."""
        if placed.act is not None and ended.state != "cancelled":
            await self.audit.record_outcome(
                placed.act, ActOutcome.DONE, _count_of(placed.command, ended.count, ordered)
            )

    async def _unknown_yet(self, command: ControlRecord) -> str:
        """Return what isn't known yet of a command that has ended: its job counts nothing on ordered routes."""
        if command.kind not in ("kick", "pause"):
            return ""
        kind, _, called = command.name.partition("/")
        targets = [self._topics.ordered_target(topic) for topic in await self._log.topics()]
        has_ordered = any(each is not None and each[0 if kind == "route" else 1] == called for each in targets)
        return "; what came of it on ordered routes isn't known yet" if has_ordered else ""

    async def ordered_outcomes(self, placed: StoredCommand) -> Mapping[str, ControlRecord]:
        """Return a kick's outcome on each partition of ordered routes, by the name of its checkpoint.

        Their members publish them after the last announcement of this kick's job, which comes before its checkpoint.
        Outcomes after the announcement of a later kick are about that one. Members of older versions publish none.
        """
        end = await self._end()
        announcement = announcement_key(placed.command.key)
        announced_at, is_answered = math.inf, False
        outcomes: list[ControlRecord] = []
        async for records in self._log.scan(self._partition, placed.offset + 1, end):
            for record in records:
                if not record.key.startswith(b"checkpoint/"):
                    continue
                with suppress(UnreadableRecordError):
                    command = decode(record.key, record.value)
                    if command.name.startswith("tried/"):
                        outcomes.append(command)
                    elif command.name == announcement and not is_answered:
                        announced_at = command.at
                    elif command.name == placed.command.key:
                        is_answered |= command.covers_commands_below > placed.offset
        found: dict[str, ControlRecord] = {}
        for outcome in outcomes:
            if outcome.at >= announced_at:
                found.setdefault(outcome.name, outcome)
        return found

    async def _may_have_parked(self, name: str, control: Control) -> bool:
        """Return whether a name has parked deliveries that no resume has reached, as far as partitions can be read."""
        bounds, unread = await self._log.readable(self._topics.parked)
        for number, (start, end) in bounds.items():
            partition = Partition(self._topics.parked, number)
            async with aclosing(records_of(self._log, partition, start, end)) as records:
                async for record in records:
                    if record_metadata_of(record).paused_name == name and not control.has_scanned(
                        f"pause/{name}", partition, record.offset, record.appended_at
                    ):
                        return True
        return bool(unread)

    async def _end(self) -> int:
        """Return the offset after the last control record."""
        return (await self._log.bounds(self._topics.control)).get(CONTROL_PARTITION, (0, 0))[1]

    def _new_name(self) -> str:
        return f"{int(self._log.now() * 1000):x}-{secrets.token_hex(4)}"

    async def _place(self, command: ControlRecord) -> StoredCommand:
        position, act = await place_command(self._log, self._topics, command, self.audit, alongside=self._alongside)
        return StoredCommand(command, position.offset, act=act)

    async def note(self, record: ControlRecord) -> None:
        """Store a record that is no command."""
        await append_control_record(self._log, self._topics, record)


def _by_name(offsets: Mapping[Partition, int]) -> Mapping[str, int]:
    """Return offsets as records have them: by "topic/partition"."""
    return {partition_key(partition): offset for partition, offset in offsets.items()}


async def place_command(
    log: Log, topics: Topics, command: ControlRecord, audit: Auditor, *, alongside: Alongside = _nothing
) -> tuple[Position, AuditRecord]:
    """Store a command, unless its audit record can't be stored.

    Raises LogUnavailableError, whose message warns if the command may be stored all the same, and UsageError for one
    that no process can read.
    """
    try:
        decode(*command.encode())
    except UnreadableRecordError as error:
        raise UsageError(str(error)) from error
    act = await audit.begin(*command_words(command))
    try:
        if others := alongside(command):
            records = [NewRecord(*each.encode(), []) for each in (command, *others)]
            position, *_ = await log.append_in_order(topics.control_partition, records)
        else:
            position = await append_control_record(log, topics, command)
    except ForbiddenError as error:
        await audit.record_outcome(act, ActOutcome.FAILED, str(error))
        raise
    except LogUnavailableError as error:
        await audit.record_outcome(act, ActOutcome.FAILED, str(error))
        raise type(error)(
            f"{error}; perhaps {command.key} is stored all the same, and then it is carried out"
        ) from error
    await audit.record_outcome(act, ActOutcome.ACCEPTED, command.key)
    return position, act


async def catch_up(log: Log, topics: Topics, control: Control, position: int) -> int:
    """Apply the control records from an offset on, and return the offset after the last one.

    Reads until nothing new is there: a record is compacted away once its key has a newer one, which may be after the
    end that was known at the start. Unreadable records are skipped.
    """
    while True:
        start, end = (await log.bounds(topics.control)).get(CONTROL_PARTITION, (0, 0))
        position = max(position, start)
        if end <= position:
            return position
        async for records in log.scan(topics.control_partition, position, end):
            for record in records:
                with suppress(UnreadableRecordError):  # the running gateway reports it
                    control.decode_and_apply(record.key, record.value, record.offset, record.appended_at)
        position = end


def is_begun(control: Control, command: ControlRecord, offset: int) -> bool:
    """Return whether a gateway has begun to carry out a command, which is at an offset of the control topic.

    It has announced it, or has published a checkpoint of its key since. A long job publishes one each second, but only
    the last one covers the command: the earlier ones are recognised by their time.
    """
    last = control.last_checkpoint(command.key)
    return control.announced(command.key) is not None or (
        last is not None and (last.covers_commands_below > offset or last.at >= command.at)
    )


_NAMED_ONCE = ("replay", "dead", "redeliver")
"""Kinds whose commands each have a name of their own, so that the current record of a name is this command's."""


def current_outcome(act: Act, control: Control) -> Act:
    """Return an act with the outcome that is known by now, if nobody has waited for it."""
    if act.outcome is not ActOutcome.ACCEPTED or not act.detail.startswith(_NAMED_ONCE):
        return act
    command = control.commands.get(act.detail)
    if command is None or command.state not in ("done", "cancelled"):
        return act
    outcome = ActOutcome.DONE if command.state == "done" else ActOutcome.CANCELLED
    return replace(act, outcome=outcome, detail=_count_of(command, command.count))


def _count_of(command: ControlRecord, number: int, ordered: str = "") -> str:
    """Return the outcome of a command as text; `ordered` is appended, about ordered routes."""
    if ordered and not number:
        waited = "nothing waited for a retry" if command.kind == "kick" else "nothing was parked"
        return f"{command.key}: {waited}{ordered}"
    return f"{command.key}: {number:,} {'delivery' if number == 1 else 'deliveries'}{ordered}"


def _decode_related(record: Record, placed: ControlRecord) -> ControlRecord | None:
    """Decode a record of the control topic if it has the key of this command or of its checkpoint."""
    if record.key not in (placed.key.encode(), f"checkpoint/{placed.key}".encode()):
        return None
    try:
        return decode(record.key, record.value)
    except UnreadableRecordError:
        return None


def _ending(command: ControlRecord, placed: StoredCommand) -> ControlRecord | None:
    """Return how a command has ended: by the checkpoint that covers it, or by its own final record."""
    if command.kind == "checkpoint":
        if command.state not in ("done", "cancelled") or command.covers_commands_below <= placed.offset:
            return None
        state = command.state if command.state == "cancelled" else _DONE.get(placed.command.kind, "done")
        return placed.command.with_state(
            state,
            count=command.count,
            detail=command.detail,
            tried=command.tried,
            delivered=command.delivered,
            untried_by_reason=command.untried_by_reason,
            failed_by_result=command.failed_by_result,
            repeated_failures=command.repeated_failures,
            dead=command.dead,
            rate=command.rate,
            unread=command.unread,
        )
    # `at` distinguishes it from the end of an earlier command for the same name.
    return command if command.state in ("done", "active") and command.at == placed.command.at else None
