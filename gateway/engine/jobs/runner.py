"""Carry out what operators command, in the one process that owns the jobs.

Every process follows `gateway.control` (`control/follower.py`); one of them, the owner of its partition in the
group of jobs, carries the commands out (`Jobs`), each in a task of its own: a long one delays no other. What is to be
done follows from the commands in force and their checkpoints alone; whatever kills a job, the next owner continues from
its last checkpoint. A command's own offset is committed once it is carried out.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from structlog.typing import FilteringBoundLogger

from gateway.engine import tiers
from gateway.engine.commit_progress import CommitProgress
from gateway.engine.control.append import append_control_record
from gateway.engine.control.follower import Follower
from gateway.engine.control.records import ControlRecord, by_topic, decode
from gateway.engine.jobs.backlog_counts import BacklogCounts
from gateway.engine.jobs.cancelled_replay import CancelledReplays
from gateway.engine.jobs.injector import Injector
from gateway.engine.jobs.kick import Kicks
from gateway.engine.jobs.redeliver import KEEP_FOR, MAX_KEPT, Redeliveries, ended_redeliveries
from gateway.engine.jobs.replay import Replays
from gateway.engine.jobs.resolve_dead_letters import DeadLetterResolutions
from gateway.engine.jobs.resume import ResumeJobs
from gateway.engine.jobs.scan import JobServices, ends_of_readable
from gateway.engine.successor_writer import SuccessorWriter
from gateway.log.base import Assignment, Commit, Consumer, Log, Partition, Record
from gateway.log.topics import DAY, JOBS_GROUP, Topics
from gateway.model import ForbiddenError, LogUnavailableError, NewerRecordError, UndecodableRecordError
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

RETRY_DELAY = 1.0
MAX_JOBS_PER_KIND = 4
"""Maximum concurrent jobs of one kind; the others wait."""
START_INTERVAL = 0.25
"""Seconds between checks for jobs to start; a command that is read also triggers one."""
FOLLOWER_POLL_INTERVAL = 0.02
"""Seconds between checks whether the follower has applied a record."""
END_POLL_INTERVAL = 1.0
"""Seconds after which the end of the control topic is queried again, while the follower hasn't come to it."""
OWNER_POLL_INTERVAL = 0.1
"""Seconds between checks, during waits, whether this process still owns the jobs."""
CHECKPOINT_GRACE = 2.0
"""Seconds that jobs have to reach a checkpoint when their process releases them: an append or two."""
RESCAN_INTERVAL = 5.0
"""Seconds between rescans for deliveries that a worker parked before it read the resume."""
KEEP_COMMANDS_FOR = 30 * DAY
"""Seconds for which a completed command is remembered; longer while a dead letter or event exists that it covers."""
FORGET_RULES_INTERVAL = 600.0
"""Seconds between checks for routing history of events that the log no longer has."""
BEYOND_ALL = 1 << 62
"""An offset above all others."""
MAX_FORGOTTEN_PER_SWEEP = 50
"""Commands that are looked at and forgotten per sweep, so that those that wait aren't delayed."""


_Turn = tuple[str, ControlRecord | None, Callable[[], Awaitable[object]]]
"""A job to start: its name, its command unless it is for several, and the function that does it."""


class _Rescanned(NamedTuple):
    """Up to where a partition of parked deliveries was rescanned, and when that was its end."""

    end: int
    at: float


class Jobs:
    """Runs the jobs, in the process that owns the control partition."""

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        rules: Callable[[], Rules],
        follower: Follower,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._log = log
        self._topics = topics
        self._rules = rules
        self._follower = follower
        self._metrics = metrics
        self._logger = logger
        self._sleep = sleep
        self._successors = SuccessorWriter(
            log=log, topics=topics, rules=rules, metrics=metrics, logger=logger, sleep=sleep
        )
        self._injector = Injector(self._successors, topics.retry(tiers.SHORTEST))
        self._replays = Replays(
            log=log,
            topics=topics,
            rules=rules,
            control=follower.control,
            successors=self._successors,
            injector=self._injector,
            control_offset=lambda: follower.position,
            publish=self._append_record,
            caught_up=self._caught_up,
            owner=lambda: self._progress,
            logger=logger,
            sleep=sleep,
        )
        services = JobServices(
            log=log,
            topics=topics,
            rules=rules,
            control=follower.control,
            successors=self._successors,
            injector=self._injector,
            publish=self._publish,
            control_offset=lambda: follower.position,
            owner=lambda: self._progress,
            logger=logger,
            sleep=sleep,
        )
        self._resume_jobs = ResumeJobs(services)
        self._kicks = Kicks(services)
        self._dead_letters = DeadLetterResolutions(services)
        self._redeliveries = Redeliveries(services)
        self._cancelled = CancelledReplays(services)
        self._backlog_counts = BacklogCounts(
            log=log,
            topics=topics,
            control=follower.control,
            metrics=metrics,
            logger=logger,
            is_ours=lambda: self._progress is not None,
            sleep=sleep,
        )
        # In the loop's time: the log's goes back if this machine's clock was ahead until the first acknowledgement.
        self._time = asyncio.get_running_loop().time
        self._next_rescan = self._next_forgetting = self._next_forgetting_of_rules = -math.inf
        self._looked_at = 0  # which ended commands were, by turns
        self._progress: CommitProgress | None = None
        self._rescanned: dict[str, _Rescanned] | None = None
        self._unfinished: dict[int, ControlRecord] = {}  # by offset: what was read and isn't carried out yet
        self._running: dict[str, asyncio.Task[None]] = {}
        self._partition = topics.control_partition

    def unreadable(self) -> Mapping[Partition, str]:
        """Return which partitions of dead letters and parked deliveries can't be read, and why."""
        return self._backlog_counts.unreadable

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:  # noqa: ARG002 - the listener's signature
        for assignment in assignments:
            if assignment.partition == self._partition:
                self._progress = CommitProgress(assignment.commit, assignment.log_start)
                self._rescanned = None
                self._unfinished.clear()
                self._backlog_counts.begin()

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        if self._partition not in partitions or self._progress is None:
            return {}
        progress, self._progress = self._progress, None
        self._backlog_counts.end()
        until = asyncio.get_running_loop().time() + CHECKPOINT_GRACE
        while self._is_busy and asyncio.get_running_loop().time() < until:
            await self._sleep(0.01)
        commit = progress.committable()
        return {} if commit is None else {self._partition: commit}

    @property
    def _is_busy(self) -> bool:
        """Whether a job hasn't reached a checkpoint yet."""
        return bool(self._running) or self._replays.under_way is not None

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Ignored: compaction deletes only what newer records replace."""

    def restarted(self, assignment: Assignment) -> None:
        if assignment.partition == self._partition:
            self._progress = None
            self.assigned([assignment])

    async def run(self) -> None:
        """Carry out commands until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._replays.run(), name="jobs-replays")
            tasks.create_task(self._keep_starting(tasks), name="jobs-start")
            tasks.create_task(self._keep_counting(), name="jobs-backlogs")
            await self._keep_reading(tasks)

    async def _keep_reading(self, tasks: asyncio.TaskGroup) -> None:
        """Read as a member of the group, and commit what was carried out."""
        consumer = await self._join()
        try:
            while True:
                for batch in await consumer.fetch(timeout=self._fetch_timeout):
                    for record in batch.records if batch.partition == self._partition else ():
                        self._accept(record)
                    self._start(tasks)
                try:
                    await self._commit(consumer)
                    await self._forget_obsolete()
                except LogUnavailableError as error:
                    self._logger.warning("jobs_waiting", error=str(error))
                    await self._sleep(1.0)
        finally:
            await consumer.close()  # and releases the jobs, which reach their checkpoints first

    @property
    def _fetch_timeout(self) -> float:
        """Seconds to wait for records: short while one that was read isn't applied yet, which may end its command."""
        is_behind = any(offset >= self._follower.position for offset in self._unfinished)
        return FOLLOWER_POLL_INTERVAL if is_behind else 1.0

    def _accept(self, record: Record) -> None:
        """Take a record in.

        It isn't done before the follower has applied it. That isn't waited for here: it may never be, if the topic was
        recreated meanwhile.
        """
        progress = self._progress
        if progress is None or not progress.received(record.offset):
            return
        try:
            command = decode(record.key, record.value)
        except UndecodableRecordError:
            command = None  # logged by the follower
        except NewerRecordError:
            return  # it stays unfinished
        if command is not None and command.kind == "pause":
            self._log_pause(command)
        if command is None or command.kind in ("replay", "redeliver"):
            progress.mark_done(record.offset)
        else:
            self._unfinished[record.offset] = command

    def _log_pause(self, command: ControlRecord) -> None:
        """Log that something was paused or resumed, in one process of all."""
        if command.state == "paused":
            self._logger.warning("deliveries_paused", name=command.name, by=command.by)
        elif command.state == "resuming":
            self._logger.info("deliveries_resumed", name=command.name, by=command.by)

    async def _commit(self, consumer: Consumer) -> None:
        progress = self._progress
        if progress is None:
            return
        for offset, command in list(self._unfinished.items()):
            if offset < self._follower.position and not self._follower.control.is_pending(command):
                progress.mark_done(offset)
                del self._unfinished[offset]
        commit = progress.committable()
        if commit is not None:
            await consumer.commit({self._partition: commit})
            progress.committed(commit)

    # Jobs.

    async def _keep_starting(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            self._start(tasks)
            await self._sleep(START_INTERVAL)

    def _start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the jobs whose turn it is: one per command, and one for all kicks."""
        owner = self._progress
        if owner is None:
            return
        for key, command, job in (
            *self._name_jobs(owner),
            *self._dead_letter_jobs(owner),
            *self._redelivery_jobs(owner),
        ):
            if key not in self._running:
                self._running[key] = tasks.create_task(self._run(key, command, job, owner), name=f"jobs-{key}")

    def _name_jobs(self, owner: object) -> Iterator[_Turn]:
        control = self._follower.control
        if self._kicks.ready_commands():
            yield "kick", None, partial(self._kicks.kick, owner)
        for command in control.unacknowledged_cancellations():
            if command.kind == "replay" and self._replays.under_way != command.key:
                yield command.key, command, partial(self._cancelled.publish_last_checkpoint, command, owner)
        for checkpoint in control.overwritten_checkpoints():
            yield checkpoint.key, None, partial(self._publish, checkpoint)
        if "rescan" in self._running:
            return  # it gives way to a resume: both would inject the same
        room = MAX_JOBS_PER_KIND - self._count("pause/")
        resumed = [command for command in control.pending("pause") if command.key not in self._running]
        for command in resumed[:room]:
            yield command.key, command, partial(self._resume_jobs.resume, command, owner)
        if room == MAX_JOBS_PER_KIND and not resumed and self._time() >= self._next_rescan:
            yield "rescan", None, partial(self._rescan, owner)

    def _dead_letter_jobs(self, owner: object) -> Iterator[_Turn]:
        room = MAX_JOBS_PER_KIND - self._count("dead/")
        earlier: list[ControlRecord] = []
        for command in self._follower.control.pending("dead"):
            if room <= 0:
                return  # hundreds may wait, and each would be compared with all before it
            # A dead letter that two commands cover is resolved by the first of them.
            if command.key not in self._running and not any(
                each.filter.may_overlap(command.filter) for each in earlier
            ):
                room -= 1
                yield command.key, command, partial(self._dead_letters.resolve, command, owner)
            earlier.append(command)

    def _redelivery_jobs(self, owner: object) -> Iterator[_Turn]:
        for command in self._follower.control.unacknowledged_cancellations():
            if command.kind == "redeliver":
                yield command.key, command, partial(self._redeliveries.acknowledge_cancellation, command, owner)
        room = MAX_JOBS_PER_KIND - self._count("redeliver/")
        waiting = [command for command in self._redeliveries.ready_commands() if command.key not in self._running]
        for command in waiting[: max(0, room)]:
            yield command.key, command, partial(self._redeliveries.redeliver, command, owner)

    def _count(self, prefix: str) -> int:
        return sum([key.startswith(prefix) for key in self._running])

    async def _run(
        self, key: str, command: ControlRecord | None, job: Callable[[], Awaitable[object]], owner: object
    ) -> None:
        """Run a job; on failure, it is started again soon, and continues from its checkpoint."""
        try:
            await self._caught_up()  # with the previous owner's last checkpoint
            if self._progress is owner and (
                command is None or self._follower.control.commands.get(command.key) == command
            ):
                await job()
        except LogUnavailableError as error:
            self._logger.warning("job_retried", command=key, error=str(error))
            until = asyncio.get_running_loop().time() + RETRY_DELAY
            while self._progress is owner and asyncio.get_running_loop().time() < until:
                await self._sleep(OWNER_POLL_INTERVAL)
        finally:
            del self._running[key]

    async def _join(self) -> Consumer:
        """Join the group of jobs, retrying for as long as the log is unavailable."""
        group = self._topics.group(JOBS_GROUP)
        while True:
            try:
                return await self._log.consume(group=group, topics=[self._topics.control], listener=self)
            except LogUnavailableError as error:
                self._logger.warning("subscription_retried", group=group, error=str(error))
                await self._sleep(1.0)

    async def _keep_counting(self) -> None:
        while True:
            await self._sleep(RESCAN_INTERVAL)
            try:
                if self._progress is not None:
                    await self._backlog_counts.count()
            except LogUnavailableError as error:
                self._logger.warning("jobs_waiting", error=str(error))

    async def _forget_obsolete(self) -> None:
        """Do the regular cleanups that are due."""
        now = self._time()
        if self._progress is not None and now >= self._next_forgetting:
            await self._forget_commands()
            self._next_forgetting = now + RESCAN_INTERVAL
        if self._progress is not None and now >= self._next_forgetting_of_rules:
            await self._forget_rules()
            self._next_forgetting_of_rules = now + FORGET_RULES_INTERVAL

    async def _rescan(self, owner: object) -> None:
        """Inject deliveries that were parked after the scan of their resume."""
        topic = self._topics.parked
        read_at = self._log.now()
        ends = await ends_of_readable(self._log, topic)
        if self._progress is not owner:
            return  # `_rescanned` is reset when the ownership changes
        if self._rescanned is None:
            known = await self._resume_jobs.rescanned()
            if self._progress is not owner:
                return
            self._rescanned = {
                partition_name: _Rescanned(known.get(partition_name, 0), read_at) for partition_name in ends
            }
        rescanned = self._rescanned
        # From the beginning, until they are read: what was injected of them is below a checkpoint, and is skipped.
        rescanned.update({partition_name: _Rescanned(0, read_at) for partition_name in self._resume_jobs.unread_parked})
        self._resume_jobs.unread_parked.clear()
        starts = {
            partition_name: rescanned[partition_name].end if partition_name in rescanned else 0
            for partition_name in ends
        }
        # Not only behind what was rescanned: a topic that was recreated since begins with what is parked after that.
        for at in {rescanned[partition_name].at for partition_name in ends if partition_name in rescanned}:
            numbers = [
                int(partition_name.rpartition("/")[2])
                for partition_name in ends
                if partition_name in rescanned and rescanned[partition_name].at == at
            ]
            for number, first in (await self._log.offsets_at(topic, at, numbers)).items():
                partition_name = f"{topic}/{number}"
                starts[partition_name] = min(starts[partition_name], first)
        if starts != ends:
            ends = dict(await self._resume_jobs.rescan(starts, ends, owner))
        rescanned.update({partition_name: _Rescanned(end, read_at) for partition_name, end in ends.items()})
        self._next_rescan = self._time() + RESCAN_INTERVAL

    async def _forget_commands(self) -> None:
        """Delete the keys of obsolete commands: otherwise the control topic would grow forever."""
        control, now = self._follower.control, self._log.now()
        redeliveries = ended_redeliveries(control, now - KEEP_FOR)
        obsolete = redeliveries[:-MAX_KEPT][:MAX_FORGOTTEN_PER_SWEEP]
        if not obsolete:
            ended = [*control.ended(now - KEEP_COMMANDS_FOR), *redeliveries]
            first = self._looked_at % (len(ended) or 1)
            looked_at = [*ended[first:], *ended[:first]][:MAX_FORGOTTEN_PER_SWEEP]
            self._looked_at = first + len(looked_at)
            names = {name for command in looked_at for name in command.reach}
            starts, without_topic = await self._log_starts(by_topic(names))
            starts |= dict.fromkeys(without_topic, BEYOND_ALL)
            obsolete = [command for command in looked_at if command.is_gone(starts)]
        for command in obsolete:
            # The checkpoint first: it is found through its command.
            if control.last_checkpoint(command.key) is not None:
                await self._append_record(ControlRecord(kind="checkpoint", name=command.key, state="deleted", at=0.0))
            await self._append_record(ControlRecord(kind=command.kind, name=command.name, state="deleted", at=0.0))

    async def _forget_rules(self) -> None:
        """Delete the routing history of events that the log no longer has."""
        history = self._follower.control.history
        starts, without_topic = await self._log_starts(history.partitions())
        for command in list(history.obsolete(self._log.now(), starts, without_topic)):
            await self._append_record(ControlRecord(kind=command.kind, name=command.name, state="deleted", at=0.0))

    async def _log_starts(self, partitions: Mapping[str, Mapping[str, int]]) -> tuple[dict[str, int], set[str]]:
        """Return the first offsets of partitions (as of `by_topic`), and the names of those without a topic.

        Those that are forbidden are left out.
        """
        if not partitions:
            return {}, set()
        in_rules = {source.topic or self._topics.events(source.name) for source in self._rules().sources.values()}
        known = {self._topics.dead, *in_rules, *await self._log.topics()}
        starts: dict[str, int] = {}
        without_topic: set[str] = set()
        for topic, names in partitions.items():
            if topic not in known:  # its source was removed, and then the topic, or our rights to it
                without_topic.update(names)
                continue
            try:
                bounds, unreadable = await self._log.readable(topic)
            except ForbiddenError:
                continue
            absent = {number: (0 if number in unreadable else BEYOND_ALL) for number in names.values()}
            starts |= {
                name: bounds[number][0] if number in bounds else absent[number] for name, number in names.items()
            }
        return starts, without_topic

    async def _publish(self, command: ControlRecord) -> None:
        """Append a record and wait until it is in force here: the next one depends on it."""
        owner, recreations = self._progress, self._follower.control.recreations
        offset = await self._append_record(command)
        while owner is not None and self._progress is owner and self._follower.position <= offset:
            if self._follower.control.recreations != recreations:
                return  # it may have been in the former topic
            await self._sleep(FOLLOWER_POLL_INTERVAL)

    async def _append_record(self, command: ControlRecord) -> int:
        return (await append_control_record(self._log, self._topics, command)).offset

    async def _caught_up(self) -> None:
        """Wait until everything now in the control topic was applied, or the jobs are another's.

        If it was recreated meanwhile, its records may never reach the end that it had.
        """
        owner, end = self._progress, BEYOND_ALL
        while self._progress is owner:
            end = min(end, (await self._log.bounds(self._topics.control)).get(self._partition.number, (0, 0))[1])
            until = asyncio.get_running_loop().time() + END_POLL_INTERVAL
            while self._follower.position < end and asyncio.get_running_loop().time() < until:
                await self._sleep(FOLLOWER_POLL_INTERVAL)
            if self._follower.position >= end:
                return
