"""Replay events from the log: scan a time range of it, match by the active rules, and inject deliveries anew.

    scan ──▶ match ──▶ batch (≤ 100) ──pace──▶ shortest tier, acknowledged ──▶ checkpoint, at 500 or after 1 s

The checkpoint is published after what it covers was acknowledged, so after a kill the replay continues from there: it
repeats at most what came after the checkpoint, and skips nothing. Its position follows from the commands in force and
their checkpoints alone, never from the commit of the group of jobs. One replay runs at a time, in the order in which
they were asked for, concurrently with all other jobs.

A partition of events that can't be read is skipped. The replay isn't complete without it: its checkpoint says so, the
next replay may start, and this one continues with that partition once it can be read. Dead letters and dedupe entries
that can't be read, or that a newer version wrote, are ignored when deciding what is undelivered, and reported with the
replay's end.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from functools import partial

from structlog.typing import FilteringBoundLogger

from gateway.engine import tiers
from gateway.engine.control.records import ControlRecord, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.identities_before import identities_before, offset_in_id_of
from gateway.engine.jobs.injector import BACKLOG, Injector, most_unfinished
from gateway.engine.jobs.let_through import read_let_through
from gateway.engine.jobs.log_reader import (
    CHECKPOINT_EVERY,
    CHECKPOINT_INTERVAL,
    RECORDS_PER_STEP,
    TURN,
    last_records,
    records_of,
)
from gateway.engine.jobs.replay_matcher import Matched, Matcher
from gateway.engine.jobs.replay_progress import RATE_STEP, ReplayProgress, reason_of
from gateway.engine.jobs.undelivered import (
    OpenDeadLetters,
    Undelivered,
    injected_by,
    knows_all,
    open_dead_letters,
    resolution,
)
from gateway.engine.successor_writer import SuccessorWriter
from gateway.engine.unavailable_partitions import PatientReader
from gateway.log.base import Log, Partition, Record
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import (
    Delivery,
    ForbiddenError,
    GatewayError,
    LogUnavailableError,
    NewerRecordError,
    RecordMetadata,
    RecordTooLargeError,
    delivery_id,
    identity_of,
)
from gateway.rules.rules import Rules
from gateway.telemetry.logs import traceback_of

OWNER_POLL_INTERVAL = 0.1
"""Seconds between checks, during waits, whether the replay is still wanted."""
POLL_INTERVAL = 0.25
"""Seconds between checks for a replay to start, or for capacity in the tier."""
RECHECK_INTERVAL = 30.0
"""Seconds after which a replay that stopped at a record in a newer format tries again."""
REREAD_INTERVAL = 5.0
"""Seconds after which a replay that waits for partitions tries to read them again."""


class Replays:
    """Runs replays. `owner` returns a token while this process owns the jobs, else None; each runs under one token.

    `publish` appends to the control topic, and `caught_up` waits until `control` has applied everything now in it.
    """

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        rules: Callable[[], Rules],
        control: Control,
        successors: SuccessorWriter,
        injector: Injector,
        control_offset: Callable[[], int],
        publish: Callable[[ControlRecord], Awaitable[object]],
        caught_up: Callable[[], Awaitable[None]],
        owner: Callable[[], object | None],
        logger: FilteringBoundLogger,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._log = log
        self._topics = topics
        self._tier = topics.retry(tiers.SHORTEST)
        self._group = topics.group(ROUTER_GROUP)
        self._rules = rules
        self._control = control
        self._successors = successors
        self._injector = injector
        self._control_offset = control_offset
        self._publish = publish
        self._caught_up = caught_up
        self._owner = owner
        self._logger = logger
        self._sleep = sleep
        self._patient_reader = PatientReader(log)
        self._waiting: dict[str, float] = {}
        """The replays that wait for what can't be read, each with the time of its next try (in the loop's time)."""
        self._failed: dict[str, ControlRecord] = {}
        """The replays that this process doesn't try again, by key."""
        self.under_way: str | None = None
        """The key of the replay that runs here."""

    async def run(self) -> None:
        """Run the replays, one after the other, whenever this process owns the jobs."""
        while True:
            owner = self._owner()
            command = None if owner is None else self._next()
            if command is None:
                await self._sleep(POLL_INTERVAL)
                continue
            try:
                await self._caught_up()  # with the previous owner's last checkpoint, and what we have ended ourselves
                if self._owner() is owner and self._next() == command:
                    await self._replay(command, owner)
            except ForbiddenError as error:
                self._wait(command, str(error))
            except LogUnavailableError as error:
                self._logger.warning("job_retried", command=command.key, error=str(error))
                await self._sleep(1.0)
            except NewerRecordError as error:
                self._wait(command, str(error), RECHECK_INTERVAL)
            except Exception as error:  # noqa: BLE001 - it would end each process that owns the jobs, one after the other
                await self._fail(command, error, owner)

    async def _fail(self, command: ControlRecord, error: Exception, owner: object) -> None:
        """Cancel a replay that can't be carried out: it asks for too much, or no gateway has written its record."""
        if isinstance(error, GatewayError):
            detail, trace = str(error), {}
        else:  # without the error's own text, which may contain a piece of a body
            detail = f"this replay can't be carried out: {type(error).__name__}, a bug; the log has its traceback"
            trace = {"exception": traceback_of(error)}
        self._logger.error("job_failed", command=command.key, error=detail, **trace)
        self._failed = {key: one for key, one in self._failed.items() if self._control.commands.get(key) == one}
        self._failed[command.key] = command
        while self._owner() is owner and self._control.commands.get(command.key) == command:
            count = self._control.injected(command.key)
            try:
                await self._publish(command.with_state("cancelled", count=count, detail=detail))
                await self._caught_up()
            except LogUnavailableError as unavailable:
                self._logger.warning("append_retried", command=command.key, error=str(unavailable))
                await self._sleep(1.0)
            except RecordTooLargeError:
                return  # a record of ours leaves room for that
            else:
                return

    def _next(self) -> ControlRecord | None:
        now = asyncio.get_running_loop().time()
        waiting = [key for key, until in self._waiting.items() if now < until]
        failed = [key for key, one in self._failed.items() if self._control.commands.get(key) == one]
        return self._control.next_replay([*waiting, *failed])

    async def _replay(self, command: ControlRecord, owner: object) -> None:
        """Continue a replay from its checkpoint, until it ends or has to stop."""
        selection = command.selection
        assert selection is not None, command
        count, checkpoint = injected_by(command, self._control), self._control.checkpoint(command.key)
        positions = {**selection.starts, **checkpoint}
        remaining = {name for name, end in command.checkpoint.items() if positions.get(name, 0) < end}
        unreadable = await self._unreadable_of(remaining)
        checkpoint_unreadable, missed = self._control.unread(command.key), self._control.missed(command.key)
        if remaining and remaining == unreadable.keys() and len(unreadable) == checkpoint_unreadable:
            self._wait(command, reason_of(unreadable))
            return
        known_below: int | None = self._control_offset()
        recreations = self._control.recreations
        open_dead, undelivered = OpenDeadLetters(route=selection.route), None
        if selection.undelivered:
            readable, is_wanted = self._patient_reader.readable, partial(self._is_asked, command, owner)
            open_dead = await open_dead_letters(
                self._log,
                self._topics,
                self._control,
                selection,
                readable=readable,
                sleep=self._sleep,
                is_wanted=is_wanted,
            )
            ends = {name: end for name, end in command.checkpoint.items() if name not in unreadable}
            let_through = await read_let_through(
                self._log, self._topics, selection, ends, readable=readable, sleep=self._sleep, is_wanted=is_wanted
            )
            if not is_wanted():
                return
            undelivered = Undelivered(
                self._control, selection.route, open_dead, let_through=let_through, rules=self._rules, key=command.key
            )
            missed |= open_dead.unreadable | let_through.unreadable
        is_new = not checkpoint or checkpoint == selection.starts
        if not is_new:
            known_below, _ = self._control.known_below(command.key) or (None, 0)
        run = ReplayProgress(
            command=command,
            selection=selection,
            owner=owner,
            matcher=Matcher(selection, undelivered),
            open_dead=open_dead,
            route_revision=None if is_new else self._control.replayed_as(command.key),
            identities_by=None if is_new else self._control.identities_of(command.key),
            positions=positions,
            count=count,
            last_checkpoint=checkpoint,
            checkpoint_count=count,
            checkpoint_at=self._log.now(),
            unreadable=unreadable,
            checkpoint_unreadable=checkpoint_unreadable,
            missed=missed,
            known_below=known_below,
            recreations=recreations,
        )
        self.under_way = command.key
        try:
            self._logger.info("replay_began", command=command.key, count=count)
            ending = await self._scan(run)
        except LogUnavailableError:
            await self._publish_checkpoint(run)
            raise
        finally:
            self.under_way = None
        if ending is not None:
            await self._publish(ending)
            self._logger.info(
                "job_finished", command=command.key, state=ending.state, count=ending.count, detail=ending.detail
            )
        elif run.unreadable and self._is_wanted(run):
            self._wait(command, reason_of(run.unreadable))

    async def _unreadable_of(self, partition_names: Collection[str]) -> Mapping[str, str]:
        """Return which of these partitions can't be read, and why."""
        found: dict[str, str] = {}
        for topic in {partition_name.rpartition("/")[0] for partition_name in partition_names}:
            try:
                _, unreadable = await self._patient_reader.readable(topic)
            except ForbiddenError as error:
                found |= {name: str(error) for name in partition_names if name.rpartition("/")[0] == topic}
            else:
                found |= {f"{topic}/{number}": reason for number, reason in unreadable.items()}
        return {partition_name: found[partition_name] for partition_name in sorted(found.keys() & partition_names)}

    def _wait(self, command: ControlRecord, reason: str, seconds: float = REREAD_INTERVAL) -> None:
        """Let a replay wait for what can't be read; others may run meanwhile."""
        if command.key not in self._waiting:
            self._logger.warning("replay_waits", command=command.key, error=reason)
        asked = {each.key for each in self._control.pending("replay")}
        self._waiting = {key: until for key, until in self._waiting.items() if key in asked}
        self._waiting[command.key] = asyncio.get_running_loop().time() + seconds

    async def _scan(self, run: ReplayProgress) -> ControlRecord | None:
        """Inject the rest of a replay; return its end, None if it must stop here."""
        scanned, until = 0, self._log.now() + TURN
        for partition_name, end in sorted(run.command.checkpoint.items()):
            start = run.positions.get(partition_name, 0)
            if start >= end or partition_name in run.unreadable:
                continue
            topic, _, number = partition_name.rpartition("/")
            partition = Partition(topic, int(number))
            run.identities = None
            if await self._is_recreated(run, partition_name, end):
                start = end  # what is there now was never asked for
            async with aclosing(records_of(self._log, partition, start, end)) as records:
                async for record in records:
                    problem = run.matcher.use(self._rules())
                    if problem is not None:
                        await self._publish_checkpoint(run)
                        return run.command.with_state("cancelled", count=run.count, detail=problem)
                    await self._add(run, partition, record)
                    scanned += 1
                    if scanned % RECORDS_PER_STEP == 0 or self._log.now() > until:
                        await self._sleep(0)
                        until = self._log.now() + TURN
                    is_due = run.is_full or self._log.now() >= run.checkpoint_at + CHECKPOINT_INTERVAL
                    if is_due and not await self._inject(run):
                        return None
            run.reached[partition_name] = end
            if not await self._inject(run):
                return None
        await self._publish_checkpoint(run)
        if run.unreadable or not self._is_wanted(run):
            return None
        unreadable = run.command.unread + len(run.missed)
        return run.command.with_state("done", count=run.count, unread=unreadable, detail=", ".join(sorted(run.missed)))

    async def _is_recreated(self, run: ReplayProgress, partition_name: str, end: int) -> bool:
        """Return whether the topic of a partition has been recreated since the replay was asked for."""
        known = run.command.last_records.get(partition_name)
        found = await last_records(self._log, run.selection.starts, {partition_name: end})
        return known is not None and known != found.get(partition_name)

    async def _match(self, run: ReplayProgress, partition: Partition, record: Record) -> Matched | None:
        try:
            return run.matcher.match(partition, record)
        except NewerRecordError as error:
            await self._inject(run)  # what comes before it
            await self._publish_checkpoint(run)
            self._successors.undecodable.report_newer(partition, record.offset, error)
            raise

    async def _add(self, run: ReplayProgress, partition: Partition, record: Record) -> None:
        """Add an event to the current batch, if it is to be replayed."""
        revision = run.matcher.route_revision
        run.route_revision = revision if run.route_revision in (None, revision) else ""
        identities = run.matcher.identities
        run.identities_by = identities if run.identities_by in (None, identities) else ""
        matched, partition_name = await self._match(run, partition, record), partition_key(partition)
        if matched is not None and run.identities is None and identity_of(matched.event.id) is not None:
            start = run.selection.starts.get(partition_name, 0)
            run.identities = await identities_before(
                self._log, partition, record.offset, self._rules, start=start, sleep=self._sleep
            )
        offset_in_id = None if run.identities is None else offset_in_id_of(run.identities, record, self._rules)
        if matched is not None and run.selection.undelivered:
            matched = matched.undelivered()
        if matched is not None and matched.destinations:
            if offset_in_id is not None:
                matched = matched._replace(position=f"{partition_name}@{offset_in_id}")
            run.batch.append(matched)
            run.batch_bytes += len(matched.event.body)
        run.reached[partition_name] = record.offset + 1

    def _is_wanted(self, run: ReplayProgress) -> bool:
        return self._is_asked(run.command, run.owner)

    def _is_asked(self, command: ControlRecord, owner: object) -> bool:
        return self._owner() is owner and self._control.commands.get(command.key) == command

    async def _inject(self, run: ReplayProgress) -> bool:
        """Inject the current batch when it is due, and publish a checkpoint if due. Return False to stop here."""
        if not run.batch or (await self._wait_until_due(run) and await self._append(run)):
            run.positions.update(run.reached)
            run.reached.clear()
            if (
                self._is_wanted(run)
                and run.count - run.checkpoint_count < CHECKPOINT_EVERY
                and self._log.now() < run.checkpoint_at + CHECKPOINT_INTERVAL
            ):
                return True
        await self._publish_checkpoint(run)
        return not run.batch and self._is_wanted(run)

    async def _wait_until_due(self, run: ReplayProgress) -> bool:
        """Wait until the rate and the tier's capacity allow the next batch. Return False if it must stop here."""
        while self._is_wanted(run):
            wait = run.next_at - asyncio.get_running_loop().time()
            if wait <= 0:
                if run.since_backlog_check < CHECKPOINT_EVERY:
                    return True
                if await most_unfinished(self._log, self._group, self._tier) < BACKLOG:
                    run.since_backlog_check = 0
                    return True
                wait = POLL_INTERVAL
            await self._sleep(min(wait, OWNER_POLL_INTERVAL))
        return False

    async def _append(self, run: ReplayProgress) -> bool:
        """Inject the current batch. Return False if the replay must stop: what was stored of it is counted, then.

        Commands may have ended some of it while it waited, for hours if the rate is low.
        """
        run.batch = [still for matched in run.batch if (still := run.matcher.still_undelivered(matched)).targets]
        is_wanted = partial(self._is_wanted, run)
        command, now = run.command, self._log.now()
        # Successor numbers start at one of this replay's own: deliveries of the original, or of another replay, that
        # are still pending aren't taken for duplicates of these. Those of a batch that is injected twice are.
        first = int(command.at * 1000)
        metadata = RecordMetadata(replay=command.name)
        deliveries = [
            (
                Delivery(
                    id=delivery_id(matched.event.id, run.selection.route, destination, matched.position),
                    event=matched.event,
                    route=run.selection.route,
                    destination=destination,
                    successor=first,
                    due=max(now, matched.delayed_until),
                    replayed_at=now,
                    delayed_until=matched.delayed_until,
                ),
                metadata,
            )
            for matched in run.batch
            for destination, end in matched.targets
            if end is None
        ]
        stored = await self._injector.inject(deliveries, is_wanted)
        if not all(stored):
            if self._owner() is run.owner:  # cancelled; otherwise the next owner injects all of it again, and counts it
                run.count += sum(stored)
            return False
        for matched in run.batch:
            if not await self._dead_letter(run, matched, is_wanted):
                return False
        route = self._rules().routes.get(run.selection.route)
        for matched in run.batch:
            for destination, end in matched.targets:
                letters = run.open_dead.of(matched.event, destination, route)
                run.resolved += letters
                run.resolved_count += bool(letters) and end is None
        run.count += len(deliveries)
        run.since_backlog_check += len(deliveries)
        if run.selection.rate is not None:
            # A sleep that took too long may be caught up, or the rate would never be reached. It counts from the
            # acknowledgement: the log stored these deliveries before that.
            done_at = asyncio.get_running_loop().time()
            run.next_at = max(run.next_at, done_at - RATE_STEP) + len(deliveries) / run.selection.rate
        run.batch.clear()
        run.batch_bytes = 0
        return True

    async def _dead_letter(self, run: ReplayProgress, matched: Matched, is_wanted: Callable[[], bool]) -> bool:
        """Dead-letter what ends without an attempt, as the router does. Return False if it isn't wanted any more."""
        event, route = matched.event, run.selection.route
        for name, end in matched.targets:
            id_ = delivery_id(event.id, route, name, matched.position)
            delivery = Delivery(id=id_, event=event, route=route, destination=name)
            if end is not None and not await self._successors.dead_letter(delivery, end, is_wanted, may_move=True):
                return False
        return True

    async def _publish_checkpoint(self, run: ReplayProgress) -> None:
        """Publish the replay's checkpoint, from which any next owner continues, unless another has come further."""
        command = run.command
        while not self._is_overtaken(run) and (
            run.positions != run.last_checkpoint
            or run.count != run.checkpoint_count
            or len(run.unreadable) != run.checkpoint_unreadable
        ):
            is_known = run.recreations == self._control.recreations and knows_all(self._control)
            checkpoint = run.checkpoint(at=self._log.now(), known_below=self._control_offset() if is_known else None)
            try:
                if run.resolved:
                    await self._publish(
                        resolution(command, run.open_dead, run.resolved, count=run.count, deliveries=run.resolved_count)
                    )
                    run.resolved.clear()
                    run.resolved_count = 0
                await self._publish(checkpoint)
            except LogUnavailableError as error:
                if self._owner() is not run.owner:
                    return
                self._logger.warning("append_retried", command=command.key, error=str(error))
                await self._sleep(1.0)
            else:
                run.last_checkpoint, run.checkpoint_count = checkpoint.checkpoint, checkpoint.count
                run.checkpoint_unreadable = checkpoint.unread
        run.checkpoint_at = self._log.now()

    def _is_overtaken(self, run: ReplayProgress) -> bool:
        checkpoint = self._control.checkpoint(run.command.key)
        return any(offset > run.positions.get(partition_name, 0) for partition_name, offset in checkpoint.items())
