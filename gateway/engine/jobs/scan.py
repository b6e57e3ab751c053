"""One pass over records of the log for a job, or for several at once: inject batches, publish checkpoints.

    scan ──▶ batch (≤ 100) ──still ours?──▶ shortest tier, acknowledged ──▶ checkpoint, at 500 or after 1 s ──▶ …

A checkpoint says how far a job has come, once what it covers was acknowledged. A job whose process releases the jobs
ends with its current batch and a checkpoint, so the next owner repeats nothing; after a kill, the next owner repeats
what came after the last checkpoint, at most 500 deliveries.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from structlog.typing import FilteringBoundLogger

from gateway.engine.control.records import ControlRecord, State, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.injector import APPENDS_AT_ONCE, Injector
from gateway.engine.jobs.job_progress import LEFT, BatchItem, JobProgress, Picked, Predecessor
from gateway.engine.jobs.log_reader import (
    BATCH_BYTES,
    CHECKPOINT_EVERY,
    CHECKPOINT_INTERVAL,
    RECORDS_PER_STEP,
    TURN,
    records_of,
)
from gateway.engine.successor_writer import SuccessorWriter, always_false
from gateway.engine.unavailable_partitions import PatientReader
from gateway.log.base import Log, Partition, Record, are_of_different_topics
from gateway.log.topics import Topics
from gateway.model import Delivery, LogUnavailableError, NewerRecordError
from gateway.rules.rules import Rules

STUCK_AFTER = 10.0
"""Seconds after which a batch or a dead letter that can't be stored may be given up: two appends that time out."""
REPEAT_CHECKPOINT_AFTER = 5.0
"""Seconds after which a kick's last checkpoint is repeated: routers wait for another no longer than
`KICK_HEARTBEAT_TIMEOUT`."""
MAX_STORED = 10_000
"""Maximum number of stored records that are remembered of batches that were given up."""
STOPPED_AT_NEWER = "up to the first dead letter that a newer version wrote, or may have resolved, in each partition"

Pick = Callable[[Partition, Record], Picked]


async def skip_unreadable(_partition: Partition, _record: Record) -> bool:
    """Default `dead_letter`: leave an unreadable record to another job."""
    return True


@dataclass(slots=True, kw_only=True)
class Scan:
    """One pass over records, for one job or several (`runs`): `scan_topic` for each topic, then the last checkpoint."""

    log: Log
    control: Control
    injector: Injector
    publish: Callable[[ControlRecord], Awaitable[object]]
    is_wanted: Callable[[], bool]
    logger: FilteringBoundLogger
    sleep: Callable[[float], Awaitable[None]]
    report_newer: Callable[[Partition, int, NewerRecordError], None]
    runs: Collection[JobProgress]
    is_expedited: bool
    state: State
    """The state of an intermediate checkpoint: "requested" keeps the count for the next owner."""
    is_preempted: Callable[[], bool]
    """Whether it ends with its current batch, as something more urgent waits."""
    gives_up: Callable[[], bool]
    """Whether it ends before its current batch, which can't be injected now."""
    stored: set[Predecessor]
    """What was stored of batches that jobs of this process have given up: it isn't injected again."""
    dead_letter: Callable[[Partition, Record], Awaitable[bool]]
    """Dead-letter an unreadable record. Returns False if the scan of its partition must end before it."""
    newer_at: dict[str, int] = field(default_factory=dict)
    """The first record of a partition that is left to a newer version: scan and checkpoints end before it."""
    unreadable: set[str] = field(default_factory=set)
    """Partitions that couldn't be read, as "topic/partition": no checkpoint passes their records."""
    topic_ids: dict[str, str] = field(default_factory=dict)
    """The topics' ids as of when their ends were read."""
    flushed: dict[str, int] = field(default_factory=dict)
    """The offset to which each partition has been scanned and its deliveries injected."""
    flush_began: float = 0.0
    """When the injection of the last batch began."""
    was_heartbeat_overdue: bool = False
    """Whether a checkpoint came so late that what a kick holds back may have been released before."""
    _batch: list[BatchItem] = field(default_factory=list)
    _bytes: int = 0
    _reached: dict[str, int] = field(default_factory=dict)
    _latest: dict[str, float] = field(default_factory=dict)
    _since_checkpoint: int = 0
    _checkpoint_at: float = 0.0
    _scanned: int = 0
    _turn_until: float = 0.0

    async def scan_topic(self, topic: str, starts: Mapping[str, int], ends: Mapping[str, int], pick: Pick) -> bool:
        """Scan a range of a topic. Return False if this process must stop the job; then its progress was published.

        Raises LogUnavailableError.
        """
        self._checkpoint_at = self._checkpoint_at or self.log.now()
        self._turn_until = self.log.now() + TURN
        bounds, unreadable = await self.log.readable(topic)
        self.unreadable |= {partition_key(Partition(topic, number)) for number in unreadable}
        if are_of_different_topics(self.topic_ids.get(topic, ""), self.log.topic_id(topic)):
            # Nothing is left of what was to be scanned, and the checkpoint covers nothing of what has come since.
            return await self.flush()
        for number, (first, after_last) in sorted(bounds.items()):
            partition = Partition(topic, number)
            partition_name = partition_key(partition)
            if partition_name not in ends:
                continue
            start = max(first, starts.get(partition_name, 0))
            # It ends earlier if the topic has been recreated since: what comes there then isn't scanned yet.
            end = min(ends[partition_name], after_last)
            if not await self._scan_partition(partition, start, end, pick):
                return False
        return await self.flush()

    async def _scan_partition(self, partition: Partition, start: int, end: int, pick: Pick) -> bool:
        partition_name = partition_key(partition)
        async with aclosing(records_of(self.log, partition, start, end)) as records:
            async for record in records:
                picked = self._pick(pick, partition, record)
                if picked is None:
                    end = self.newer_at[partition_name]
                    break
                if picked.is_undecodable:
                    if not await self.flush():  # what comes before it
                        return False
                    if not await self.dead_letter(partition, record):
                        self._reached[partition_name] = record.offset  # it is read again the next time
                        return await self.flush()
                self._add(Predecessor(partition, record.offset, record.appended_at), picked)
                self._reached[partition_name] = record.offset + 1
                self._latest[partition_name] = max(self._latest.get(partition_name, 0.0), record.appended_at)
                self._scanned += 1
                now = self.log.now()
                if self._is_full or now >= self._checkpoint_at + CHECKPOINT_INTERVAL:
                    if not await self.flush():
                        return False
                    self._turn_until = self.log.now() + TURN
                elif self._scanned % RECORDS_PER_STEP == 0 or now > self._turn_until:
                    await self.sleep(0)
                    self._turn_until = self.log.now() + TURN
        self._reached[partition_name] = end
        return True

    def _pick(self, pick: Pick, partition: Partition, record: Record) -> Picked | None:
        """Return what to do with a record; None if it is left to a newer version: the scan of its partition ends."""
        try:
            picked = pick(partition, record)
        except NewerRecordError as error:
            self.report_newer(partition, record.offset, error)
            picked = LEFT
        if not picked.is_left:
            return picked
        self.newer_at[partition_key(partition)] = record.offset
        return None

    def _add(self, predecessor: Predecessor, picked: Picked) -> None:
        """Add a record to the batch."""
        for run in picked.runs:
            run.batch_count += 1
        if picked.delivery is not None:
            metadata = replace(picked.metadata, is_expedited=self.is_expedited)
            self._batch.append(BatchItem(predecessor, picked.delivery, metadata))
            self._bytes += len(picked.delivery.event.body)

    @property
    def _is_full(self) -> bool:
        return len(self._batch) >= APPENDS_AT_ONCE or self._bytes >= BATCH_BYTES

    async def flush(self) -> bool:
        """Inject the current batch, and publish checkpoints if they are due. Return False if the job must stop here."""
        if await self._inject():
            self._since_checkpoint += len(self._batch)
            self._batch.clear()
            self._bytes = 0
            for run in self.runs:
                for partition_name, offset in self._reached.items():
                    # Another run may have begun earlier: what this one had scanned stays covered.
                    run.positions[partition_name] = max(offset, run.positions.get(partition_name, 0))
                    run.latest[partition_name] = max(
                        self._latest.get(partition_name, 0.0), run.latest.get(partition_name, 0.0)
                    )
                run.count += run.batch_count
                run.batch_count = 0
            self.flushed |= self._reached
            self._reached.clear()
            if self.is_wanted() and not self.is_preempted():
                if (
                    self._since_checkpoint >= CHECKPOINT_EVERY - APPENDS_AT_ONCE
                    or self.log.now() >= self._checkpoint_at + CHECKPOINT_INTERVAL
                ):
                    await self.publish_checkpoints()
                return True
        await self.publish_checkpoints()
        return False

    async def _inject(self) -> bool:
        """Inject the current batch, except what of it was stored before. Return False if it was given up."""
        self.flush_began = self.log.now()

        def is_wanted() -> bool:
            return self.is_wanted() and not self.gives_up()

        if not is_wanted():
            return False
        items = [item for item in self._batch if item.predecessor not in self.stored]
        stored = await self.injector.inject([(item.delivery, item.metadata) for item in items], is_wanted)
        if not all(stored):
            if len(self.stored) > MAX_STORED:
                self.stored.clear()
            self.stored.update(item.predecessor for item, is_stored in zip(items, stored, strict=True) if is_stored)
            return False
        if self.stored:
            self.stored.difference_update(item.predecessor for item in self._batch)
        return True

    @property
    def is_heartbeat_overdue(self) -> bool:
        """Whether a run's last heartbeat is, or ever was, so old that routers may soon no longer wait."""
        last = min([run.last_heartbeat_at for run in self.runs], default=math.inf)
        return self.was_heartbeat_overdue or self.log.now() > last + STUCK_AFTER

    async def publish_checkpoints(self) -> None:
        """Publish each run's checkpoint, from which the next owner continues."""
        now = self.log.now()
        due = [
            run
            for run in self.runs
            if (self.is_expedited and now >= run.last_heartbeat_at + REPEAT_CHECKPOINT_AFTER)
            or run.positions != run.last_checkpoint
        ]
        await at_once([self.publish_checkpoint(run, self.state) for run in due])
        self._since_checkpoint, self._checkpoint_at = 0, self.log.now()

    def _covered_commands_of(self, run: JobProgress) -> int:
        return run.covers_commands_below if run.recreations == self.control.recreations else 0

    async def publish_checkpoint(self, run: JobProgress, state: State, *, is_last: bool = False) -> None:
        """Publish a run's checkpoint, retrying, unless another owner has continued from the last one."""
        key, now = run.command.key, self.log.now()
        while self.control.checkpoint(key) in (run.last_checkpoint, run.previous_checkpoint):
            covered = self._covered_commands_of(run) if is_last else self.control.commands_covered_below(key)
            # A rescan covers no command. It would seem to cover one of a former control topic.
            is_open = not is_last and not covered and self.control.has_pending(key)
            checkpoint = ControlRecord(
                kind="checkpoint",
                name=key,
                state="requested" if is_open else state,
                at=self.log.now(),
                checkpoint=dict(run.positions),
                count=run.count,
                unread=len(self.unreadable | self.newer_at.keys()) if is_last else 0,
                detail=run.detail if is_last else "",
                covers_commands_below=covered,
                routes=self.control.replayed_as(key),
                known_below=self.control.known_below(key),
                identities=self.control.identities_of(key),
                tried=None if run.outcome is None else run.outcome.tried,
                delivered=None if run.outcome is None else run.outcome.delivered,
                untried_by_reason={} if run.outcome is None else run.outcome.untried_by_reason,
                failed_by_result={} if run.outcome is None else run.outcome.failed_by_result,
                repeated_failures={} if run.outcome is None else run.outcome.repeated_failures,
                dead=0 if run.outcome is None else run.outcome.dead,
                rate=run.rate,
                latest=run.latest_of_all,
                latest_by_partition=dict(run.latest),
            )
            try:
                await self.publish(checkpoint)
            except LogUnavailableError as error:
                if not self.is_wanted():
                    return
                self.logger.warning("append_retried", command=key, error=str(error))
                await self.sleep(1.0)
            else:
                run.previous_checkpoint, run.last_checkpoint = run.last_checkpoint, checkpoint.checkpoint
                self.was_heartbeat_overdue |= self.log.now() > run.last_heartbeat_at + STUCK_AFTER
                run.last_heartbeat_at = now
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class JobServices:
    """What the jobs share. `publish` returns once the record is in force here.

    `owner()` returns a token while this process owns the jobs, else None; `control_offset()` is up to where it has read
    `gateway.control`.
    """

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    control: Control
    successors: SuccessorWriter
    injector: Injector
    stored: set[Predecessor] = field(default_factory=set)
    publish: Callable[[ControlRecord], Awaitable[object]]
    control_offset: Callable[[], int]
    owner: Callable[[], object | None]
    logger: FilteringBoundLogger
    sleep: Callable[[float], Awaitable[None]]


class ScanningJob:
    """A job that scans the log. Each runs while `owner()` returns the token that it was started with.

    Each may raise LogUnavailableError.
    """

    def __init__(self, services: JobServices) -> None:
        self._log = services.log
        self._topics = services.topics
        self._rules = services.rules
        self._control = services.control
        self._successors = services.successors
        self._injector = services.injector
        self._stored = services.stored
        self._publish = services.publish
        self._control_offset = services.control_offset
        self._owner = services.owner
        self._logger = services.logger
        self._sleep = services.sleep
        self._patient_reader = PatientReader(services.log)

    async def _first_records(
        self, topics: Collection[str], commands: Iterable[ControlRecord]
    ) -> Mapping[str, tuple[int, float]]:
        """Return where the partitions in these commands' checkpoints begin, and when their first records were appended.

        That is inf without a record. Those are the commands' own checkpoints, and those of their jobs. Partitions that
        can't be read are left out. Raises LogUnavailableError.
        """
        known = {
            partition_name
            for command in commands
            for partition_name in (*command.checkpoint, *self._control.checkpoint(command.key))
        }
        firsts: dict[str, tuple[int, float]] = {}
        for topic in topics:
            bounds, _ = await self._log.readable(topic)
            for number, (start, end) in bounds.items():
                partition = Partition(topic, number)
                if (partition_name := partition_key(partition)) not in known:
                    continue
                firsts[partition_name] = start, math.inf
                async with aclosing(records_of(self._log, partition, start, end)) as records:
                    async for record in records:
                        firsts[partition_name] = start, record.appended_at
                        break
        return firsts

    def _progress_of(
        self,
        command: ControlRecord,
        firsts: Mapping[str, tuple[int, float]] = MappingProxyType({}),
        *,
        detail: str = "",
    ) -> JobProgress:
        """Continue from the last checkpoint of a command's key, with its count if that job was unfinished."""
        key = command.key
        last = self._control.checkpoint(key)
        until = {partition_name: self._control.covered_until(key, partition_name) for partition_name in last}
        positions, latest = dict(last), dict(until)
        for partition_name, (start, appended_at) in firsts.items():
            # A checkpoint covers what was appended before it, so this topic has been recreated since.
            if start < last.get(partition_name, 0) and appended_at > until[partition_name]:
                del positions[partition_name], latest[partition_name]
        return JobProgress(
            command=command,
            covers_commands_below=self._control_offset(),
            recreations=self._control.recreations,
            detail=detail,
            positions=positions,
            latest=latest,
            covered=last,
            covered_until=until,
            count=self._control.injected(key) if command.kind == "replay" or self._control.is_begun(key) else 0,
            last_checkpoint=last,
            previous_checkpoint=last,
            last_heartbeat_at=self._log.now(),
        )

    def _ordered_routes_of(self, command: ControlRecord) -> str:
        """Return the ordered routes that a kick or resume also affects.

        Their deliveries are in no retry topic, so the job can't count them.
        """
        kind, _, name = command.name.partition("/")
        ordered = [
            route.name
            for route in self._rules().routes.values()
            if route.order is not None and name in ((route.name,) if kind == "route" else route.destinations)
        ]
        return ", ".join(ordered)

    def _new_scan(
        self,
        runs: Collection[JobProgress],
        is_wanted: Callable[[], bool],
        *,
        is_expedited: bool = False,
        state: State = "requested",
        is_preempted: Callable[[], bool] = always_false,
        gives_up: Callable[[], bool] = always_false,
        dead_letter: Callable[[Partition, Record], Awaitable[bool]] = skip_unreadable,
    ) -> Scan:
        return Scan(
            log=self._log,
            control=self._control,
            injector=self._injector,
            publish=self._publish,
            is_wanted=is_wanted,
            logger=self._logger,
            sleep=self._sleep,
            report_newer=self._successors.undecodable.report_newer,
            runs=runs,
            is_expedited=is_expedited,
            state=state,
            is_preempted=is_preempted,
            gives_up=gives_up,
            stored=self._stored,
            dead_letter=dead_letter,
        )

    async def _finish_job(self, scan: Scan, run: JobProgress, state: State) -> None:
        """Publish the end of a job: the last checkpoint of its key; for dead letters, the final record of its command.

        A newer command may be stored under that key, except for dead letters, whose commands have keys of their own.
        """
        command, detail = run.command, run.detail
        if command.kind != "dead":
            await scan.publish_checkpoint(run, "done", is_last=True)
        elif scan.is_wanted() and self._control.is_pending(command):
            done = command.with_state(state, count=run.count, latest=run.latest_of_all)
            if scan.newer_at:
                done = replace(done, checkpoint={**done.checkpoint, **scan.newer_at}, detail=STOPPED_AT_NEWER)
            missed = {
                partition_name: reached
                for partition_name in scan.unreadable
                if command.checkpoint.get(partition_name, 0) > (reached := run.positions.get(partition_name, 0))
            }
            done = replace(done, checkpoint={**done.checkpoint, **missed}, unread=command.unread + len(missed))
            await self._publish(done)
            detail = done.detail
        last = (
            {} if run.outcome is None else {"tried": run.outcome.tried, "waiting": dict(run.outcome.untried_by_reason)}
        )
        self._logger.info("job_finished", command=command.key, state=state, count=run.count, detail=detail, **last)

    async def _publish_cancelled(self, scan: Scan, run: JobProgress) -> None:
        await scan.publish_checkpoint(run, "cancelled", is_last=True)
        self._logger.info(
            "job_finished", command=run.command.key, state="cancelled", count=run.count, detail=run.detail
        )

    async def _end_offsets(self, scan: Scan, topic: str) -> dict[str, int]:
        """Return the end offsets of a topic's readable partitions; the others are left out of the scan.

        Raises LogUnavailableError for those that have been unreadable only for a moment.
        """
        bounds, unreadable = await self._patient_reader.readable(topic)
        scan.unreadable |= {f"{topic}/{number}" for number in unreadable}
        scan.topic_ids[topic] = self._log.topic_id(topic)
        return {f"{topic}/{number}": end for number, (_, end) in bounds.items()}

    def _successor_of(self, delivery: Delivery, *, immediately: bool) -> Delivery:
        """Return the successor to inject: due now, or when it was due anyway."""
        now = self._log.now()
        if immediately:
            # Its age begins with the kick at the latest. A delay that ends when it is due would be what keeps it.
            ended_at = min(delivery.delayed_until, math.nextafter(now, 0.0))
            return replace(delivery, successor=delivery.successor + 1, due=now, delayed_until=ended_at)
        return replace(delivery, successor=delivery.successor + 1, due=max(now, delivery.due))


async def at_once(steps: Iterable[Awaitable[object]]) -> None:
    """Wait for steps that take a round trip each. Raises the first error, once all have ended."""
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def ends_of_readable(log: Log, topic: str) -> dict[str, int]:
    """Return the end of each readable partition of a topic, as "topic/partition" → offset."""
    bounds, _ = await log.readable(topic)
    return {f"{topic}/{number}": end for number, (_, end) in bounds.items()}
