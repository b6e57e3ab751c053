"""Deliver one event again: a replay of one position, by every route that takes it.

    read ──▶ match ──▶ batches (≤ 100), acknowledged in the shortest tier ──▶ checkpoint, with the results ──▶ done

It differs from a replay in three things. It doesn't wait for the turn of one, which may last for days. All is injected
before its checkpoint, at most as many deliveries as a replay has between two. And it is carried out once under its
name, however often that is asked for: the checkpoint is the answer to all commands of its key. What it has injected by
the time that it must stop is in a checkpoint, too, and the next owner injects the rest.
"""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from gateway.engine import tiers
from gateway.engine.control.records import ControlRecord, State, partition_key
from gateway.engine.control.redelivery_records import Redelivery, RedeliveryResult
from gateway.engine.control.state import Control
from gateway.engine.jobs.identities_before import identities_before, offset_in_id_of
from gateway.engine.jobs.injector import APPENDS_AT_ONCE, BACKLOG, most_unfinished
from gateway.engine.jobs.log_reader import BATCH_BYTES, checksum_of, records_of
from gateway.engine.jobs.redelivery_plan import PlannedDelivery, plan
from gateway.engine.jobs.scan import JobServices
from gateway.log.base import Partition, Record
from gateway.log.records import decode_event
from gateway.log.topics import DAY, ROUTER_GROUP
from gateway.model import (
    Delivery,
    Event,
    LogUnavailableError,
    NewerRecordError,
    RecordMetadata,
    UndecodableRecordError,
    delivery_id,
    identity_of,
)
from gateway.telemetry.logs import traceback_of

RETRY_INTERVAL = 5.0
"""Seconds after which a redelivery is tried again whose event can't be read."""
POLL_INTERVAL = 0.1
"""Seconds between checks for capacity in the tier, and whether it is still wanted."""
KEEP_FOR = 7 * DAY
"""Seconds for which an ended redelivery is remembered; longer while the log has its event, which it has delivered."""
MAX_KEPT = 5_000
"""Redeliveries that are remembered longer, at most: the newest."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """A redelivery that runs under an `owner`'s token; `results` are those so far, of which a checkpoint has `stored`.

    It `is_complete` once nothing is left to inject; until then, or until it has a `problem`, it isn't answered.
    """

    command: ControlRecord
    asked: Redelivery
    owner: object
    results: list[RedeliveryResult]
    stored: int
    is_complete: bool = False
    problem: str = ""


class Redeliveries:
    """Runs redeliveries, each while `owner()` returns the token that it was started with."""

    def __init__(self, services: JobServices) -> None:
        self._log = services.log
        self._tier = services.topics.retry(tiers.SHORTEST)
        self._group = services.topics.group(ROUTER_GROUP)
        self._rules = services.rules
        self._control = services.control
        self._successors = services.successors
        self._injector = services.injector
        self._publish = services.publish
        self._owner = services.owner
        self._logger = services.logger
        self._sleep = services.sleep
        self._unread: dict[str, float] = {}
        """Partitions whose events can't be read now, each with the time of its next try (in the loop's time)."""
        self._newer: dict[str, float] = {}
        """The same of redeliveries whose event was written by a newer version, by key."""
        self._told: dict[str, str] = {}
        """Why those wait that have been tried, by key."""

    def ready_commands(self) -> list[ControlRecord]:
        """Return the redeliveries that are asked for, without those that wait for their event.

        Those that were never tried come first: however many wait for what isn't there, no other waits for these.
        """
        pending = self._control.pending("redeliver")
        if self._told or self._unread or self._newer:
            now, keys = asyncio.get_running_loop().time(), {command.key for command in pending}
            self._unread = {name: until for name, until in self._unread.items() if until > now}
            self._newer = {key: until for key, until in self._newer.items() if until > now}
            self._told = {key: reason for key, reason in self._told.items() if key in keys}
        ready = [
            command
            for command in pending
            if command.redelivery is not None
            and command.redelivery.partition not in self._unread
            and command.key not in self._newer
        ]
        return sorted(ready, key=lambda command: command.key in self._told) if self._told else ready

    async def redeliver(self, command: ControlRecord, owner: object) -> None:
        """Carry out a redelivery, or what is left of it; one that was answered before gets the same answer."""
        run, last = self._run_of(command, owner), self._control.last_checkpoint(command.key)
        if last is not None and not last.is_pending:
            await self._end(run, last.state, last.detail)
            return
        try:
            await self._carry_out(run)
        except LogUnavailableError as error:
            self._unread[run.asked.partition] = asyncio.get_running_loop().time() + RETRY_INTERVAL
            await self._wait(run, str(error))
            return
        except NewerRecordError as error:
            self._newer[command.key] = asyncio.get_running_loop().time() + RETRY_INTERVAL
            await self._wait(run, str(error))
            return
        except Exception as error:  # noqa: BLE001 - it would end each process that owns the jobs, one after the other
            run.problem = (
                f"this redelivery can't be carried out: {type(error).__name__}, a bug; the log has its traceback"
            )
            self._logger.error("job_failed", command=command.key, error=run.problem, exception=traceback_of(error))
        if run.is_complete:
            await self._end(run, "done", "")
        elif run.problem:
            await self._end(run, "cancelled", run.problem)
        else:
            await self._stop(run)

    async def acknowledge_cancellation(self, command: ControlRecord, owner: object) -> None:
        """Publish the last checkpoint of a redelivery that was cancelled while it didn't run."""
        run = self._run_of(command, owner)
        if await self._publish_until_stored(run, _checkpoint(run, "cancelled", command.detail)):
            self._log_end(run, "cancelled", command.detail)

    def _run_of(self, command: ControlRecord, owner: object) -> _Run:
        last = self._control.last_checkpoint(command.key)
        results = [] if last is None else list(last.results)
        assert command.redelivery is not None, command
        return _Run(command=command, asked=command.redelivery, owner=owner, results=results, stored=len(results))

    async def _carry_out(self, run: _Run) -> None:
        """Inject what is left. Raises LogUnavailableError and NewerRecordError if the event can't be read now."""
        topic, _, number = run.asked.partition.rpartition("/")
        partition = Partition(topic, int(number))
        read = await self._event(run, partition)
        if isinstance(read, str):
            run.problem = read
            return
        record, event = read
        planned = plan(self._rules(), event, run.asked)
        if isinstance(planned, str):
            run.problem = planned
            return
        done = {(each.route, each.destination) for each in run.results}
        left = [each for each in planned if (each.route, each.destination) not in done]
        position = await self._position_in_ids(partition, record, event)
        size = max(1, min(APPENDS_AT_ONCE, BATCH_BYTES // (len(event.body) or 1)))
        for first in range(0, len(left), size):
            batch = left[first : first + size]
            if not await self._wait_for_room(run) or not await self._inject(run, event, position, batch):
                return
        run.is_complete = True

    async def _event(self, run: _Run, partition: Partition) -> tuple[Record, Event] | str:
        """Return the record and its event; or why it isn't there."""
        asked = run.asked
        bounds, unreadable = await self._log.readable(partition.topic)
        if partition.number in unreadable:
            raise LogUnavailableError(f"{asked.partition}: {unreadable[partition.number]}")
        if partition.number not in bounds:
            return f"expected {asked.event} at {asked.position}, got a log without that partition"
        async with aclosing(records_of(self._log, partition, asked.offset, asked.offset + 1)) as records:
            record = await anext(records, None)
        if record is None:
            return f"expected {asked.event} at {asked.position}, got no record: the log has deleted it"
        known = run.command.last_records.get(asked.partition)
        try:
            event = decode_event(record)
        except UndecodableRecordError as error:
            return f"expected {asked.event} at {asked.position}, got a record that can't be read: {error}"
        if event.id != asked.event or known not in (None, checksum_of(record)):
            return f"expected {asked.event} at {asked.position}, got another record: its topic has been recreated"
        return record, event

    async def _position_in_ids(self, partition: Partition, record: Record, event: Event) -> str:
        """Return the position for the ids of its deliveries, as a replay has it: "" if they need none."""
        if identity_of(event.id) is None:
            return ""
        identities = await identities_before(
            self._log, partition, record.offset, self._rules, start=record.offset, sleep=self._sleep
        )
        offset = offset_in_id_of(identities, record, self._rules)
        return "" if offset is None else f"{partition_key(partition)}@{offset}"

    async def _wait_for_room(self, run: _Run) -> bool:
        """Wait until the tier has room, as a replay does. Return False if it must stop here."""
        while self._is_wanted(run):
            if await most_unfinished(self._log, self._group, self._tier) < BACKLOG:
                return True
            await self._sleep(POLL_INTERVAL)
        return False

    async def _inject(self, run: _Run, event: Event, position: str, batch: Sequence[PlannedDelivery]) -> bool:
        """Inject a batch, and note what was stored of it. Return False if it must stop here."""
        is_wanted, now = partial(self._is_wanted, run), self._log.now()
        metadata = RecordMetadata(replay=run.command.name)
        alive = [each for each in batch if each.end is None]
        deliveries = [
            Delivery(
                id=delivery_id(event.id, each.route, each.destination, position),
                event=event,
                route=each.route,
                destination=each.destination,
                successor=int(run.command.at * 1000),  # as a replay's
                due=max(now, each.delayed_until),
                replayed_at=now,
                delayed_until=each.delayed_until,
            )
            for each in alive
        ]
        stored = await self._injector.inject([(delivery, metadata) for delivery in deliveries], is_wanted)
        run.results += [self._result(each) for each, is_stored in zip(alive, stored, strict=True) if is_stored]
        if not all(stored):
            return False
        for each in batch:
            if each.end is not None:
                id_ = delivery_id(event.id, each.route, each.destination, position)
                letter = Delivery(id=id_, event=event, route=each.route, destination=each.destination)
                if not await self._successors.dead_letter(letter, each.end, is_wanted, may_move=True):
                    return False
                run.results.append(self._result(each))
        return True

    def _result(self, planned: PlannedDelivery) -> RedeliveryResult:
        paused = self._control.paused_by(planned.route, planned.destination)
        return RedeliveryResult(
            route=planned.route,
            destination=planned.destination,
            outcome="queued" if planned.end is None else "dead",
            paused_by=paused or "" if planned.end is None else "",
        )

    def _is_wanted(self, run: _Run) -> bool:
        return self._owner() is run.owner and self._control.commands.get(run.command.key) == run.command

    async def _wait(self, run: _Run, reason: str) -> None:
        """Let it wait for its event, or the tier, which can't be read now; others may run meanwhile."""
        if self._told.get(run.command.key) != reason:
            self._logger.warning("job_retried", command=run.command.key, error=reason)
        self._told[run.command.key] = reason
        await self._stop(run)

    async def _stop(self, run: _Run) -> None:
        """Leave the rest to the next owner, or to nobody if it is cancelled: with what was injected by now."""
        current = self._control.commands.get(run.command.key)
        is_cancelled = current is not None and current.state == "cancelled"
        if is_cancelled or len(run.results) > run.stored:
            await self._publish_until_stored(run, _checkpoint(run, "cancelled" if is_cancelled else "requested", ""))
        if is_cancelled:
            self._log_end(run, "cancelled", "")

    async def _end(self, run: _Run, state: State, detail: str) -> None:
        """Publish the answer: as the checkpoint, which no repetition of the command undoes, and as its end."""
        if await self._publish_until_stored(run, _checkpoint(run, state, detail)) and self._is_wanted(run):
            ended = run.command.with_state(state, count=_queued(run.results), detail=detail, results=tuple(run.results))
            await self._publish(ended)
            self._log_end(run, state, detail)

    async def _publish_until_stored(self, run: _Run, checkpoint: ControlRecord) -> bool:
        """Publish a checkpoint. Return False if it can't be stored and the jobs are another's by now."""
        while True:
            try:
                await self._publish(checkpoint)
            except LogUnavailableError as error:
                if self._owner() is not run.owner:
                    return False
                self._logger.warning("append_retried", command=run.command.key, error=str(error))
                await self._sleep(1.0)
            else:
                return True

    def _log_end(self, run: _Run, state: State, detail: str) -> None:
        count = _queued(run.results)
        self._logger.info("job_finished", command=run.command.key, state=state, count=count, detail=detail)


def ended_redeliveries(control: Control, before: float) -> list[ControlRecord]:
    """Return the redeliveries that were asked for before a time and have ended, the first ones first."""
    return [
        command
        for command in control.commands.values()
        if command.kind == "redeliver" and command.at < before and not command.is_pending
    ]


def _checkpoint(run: _Run, state: State, detail: str) -> ControlRecord:
    return ControlRecord(
        kind="checkpoint",
        name=run.command.key,
        state=state,
        at=run.command.at,
        count=_queued(run.results),
        detail=detail,
        results=tuple(run.results),
    )


def _queued(results: Iterable[RedeliveryResult]) -> int:
    return sum([each.outcome == "queued" for each in results])
