"""Carry out what operators order, in the one process that owns the jobs.

Every process follows `gateway.control` (`control/follower.py`); one of them, the owner of its only partition in the
group of jobs, carries the orders out (`Jobs`), each in a task of its own: a long one delays no other. What is to be
done follows from the orders in force and their markers alone; whatever kills a job, the next owner continues from its
last marker. An order's own offset is committed once it is carried out.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial

from structlog.typing import FilteringBoundLogger

from gateway.engine import tiers
from gateway.engine.commit_progress import Progress
from gateway.engine.control.follower import Follower
from gateway.engine.control.records import Order, decode
from gateway.engine.jobs.backlog_counts import Backlogs
from gateway.engine.jobs.cancelled_replay import CancelledReplays
from gateway.engine.jobs.injector import Injector
from gateway.engine.jobs.kick import Kicks
from gateway.engine.jobs.replay import Replays
from gateway.engine.jobs.resolve_dead_letters import DeadLetterJobs
from gateway.engine.jobs.resume import Resumptions
from gateway.engine.jobs.scan import JobServices, ends_of_readable
from gateway.engine.successor_writer import SuccessorWriter
from gateway.log.base import Assignment, Commit, Consumer, Log, Partition, Record
from gateway.log.topics import DAY, JOBS_GROUP, Topics
from gateway.model import LogUnavailableError, NewerRecordError, UndecodableRecordError
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

RETRY_DELAY = 1.0
AT_ONCE = 4
"""Jobs of one kind beside each other; the rest waits for its turn."""
START_EVERY = 0.25
"""Seconds between looks for orders, beside those that each order makes."""
GLANCE_INTERVAL = 0.1
"""Seconds between looks, while something is waited for, at whether the jobs are ours still."""
REVOKE_GRACE = 2.0
"""Seconds that jobs have to come to a marker when their process gives them up: an append or two."""
SWEEP_EVERY = 5.0
"""Seconds between looks for what was parked by a worker that had not yet read of a resumption."""
KEPT = 30 * DAY
"""Seconds for which an order that was carried out is remembered; longer, while a dead letter is left that it covers."""
FORGET_RULES_EVERY = 600.0
"""Seconds between looks for what is known of events that the log no longer has."""
GONE = 1 << 62
"""Above every offset."""
FORGOTTEN_AT_ONCE = 50
"""Orders that are forgotten in one sweep, so that those which wait aren't held up."""


_Turn = tuple[str, Order | None, Callable[[], Awaitable[object]]]
"""A job whose turn it is: its name, its order if it has one alone, and what does it."""


class Jobs:
    """The jobs of the orders, in the process that owns the control partition."""

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
        self._follower = follower
        self._metrics = metrics
        self._logger = logger
        self._sleep = sleep
        self._successors = SuccessorWriter(log=log, topics=topics, metrics=metrics, logger=logger, sleep=sleep)
        self._injector = Injector(self._successors, topics.retry(tiers.SHORTEST))
        self._replays = Replays(
            log=log,
            topics=topics,
            rules=rules,
            control=follower.control,
            successors=self._successors,
            injector=self._injector,
            publish=self._append_order,
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
            position=lambda: follower.position,
            owner=lambda: self._progress,
            logger=logger,
            sleep=sleep,
        )
        self._resumptions = Resumptions(services)
        self._kicks = Kicks(services)
        self._dead_letters = DeadLetterJobs(services)
        self._cancelled = CancelledReplays(services)
        self._backlogs = Backlogs(
            log=log,
            topics=topics,
            control=follower.control,
            metrics=metrics,
            logger=logger,
            is_ours=lambda: self._progress is not None,
            sleep=sleep,
        )
        self._next_sweep = self._next_forgetting = self._next_forgetting_of_rules = 0.0
        self._progress: Progress | None = None
        self._swept: dict[str, int] | None = None
        self._unfinished: dict[int, Order] = {}  # by offset: what was read and isn't carried out
        self._running: dict[str, asyncio.Task[None]] = {}
        self._partition = Partition(topics.control, 0)

    def unread(self) -> Mapping[Partition, str]:
        """Tell what of the dead letters and of what is parked can't be read, and why."""
        return self._backlogs.unread

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            if assignment.partition == self._partition:
                self._progress = Progress(assignment.commit, assignment.log_start)
                self._swept = None
                self._unfinished.clear()
                self._backlogs.begin()

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        if self._partition not in partitions or self._progress is None:
            return {}
        progress, self._progress = self._progress, None
        self._backlogs.end()
        until = asyncio.get_running_loop().time() + REVOKE_GRACE
        while self._is_busy and asyncio.get_running_loop().time() < until:
            await self._sleep(0.01)
        commit = progress.committable()
        return {} if commit is None else {self._partition: commit}

    @property
    def _is_busy(self) -> bool:
        """Whether a job has yet to come to a marker."""
        return bool(self._running) or self._replays.under_way is not None

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Nothing is deleted of a compacted topic but what newer orders replace."""

    def replaced(self, assignment: Assignment) -> None:
        self._progress = None
        self.assigned([assignment])

    async def run(self) -> None:
        """Carry out orders, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._replays.run(), name="jobs-replays")
            tasks.create_task(self._keep_starting(tasks), name="jobs-start")
            tasks.create_task(self._keep_counting(), name="jobs-backlogs")
            await self._keep_reading(tasks)

    async def _keep_reading(self, tasks: asyncio.TaskGroup) -> None:
        """Be a member of the group, and commit what is carried out."""
        consumer = await self._join()
        try:
            while True:
                for batch in await consumer.fetch(timeout=1.0):
                    for record in batch.records:
                        await self._take(record)
                    self._start(tasks)
                try:
                    await self._commit(consumer)
                    await self._look_around()
                except LogUnavailableError as error:
                    self._logger.warning("jobs_waiting", error=str(error))
                    await self._sleep(1.0)
        finally:
            await consumer.close()  # and so of the jobs, which come to their markers first

    async def _take(self, record: Record) -> None:
        progress = self._progress
        if progress is None or not progress.received(record.offset):
            return
        await self._seen(record.offset)
        try:
            order = decode(record.key, record.value)
        except UndecodableRecordError:
            order = None  # the follower has told of it
        except NewerRecordError:
            return  # and stays unfinished
        if order is not None and order.kind == "pause":
            self._tell_pause(order)
        if order is None or order.kind == "replay" or not self._follower.control.is_asked(order):
            progress.finished(record.offset)
        elif self._progress is progress:
            self._unfinished[record.offset] = order

    def _tell_pause(self, order: Order) -> None:
        """Tell in one line of all processes that something was paused or resumed."""
        if order.state == "paused":
            self._logger.warning("deliveries_paused", name=order.name, by=order.by)
        elif order.state == "resuming":
            self._logger.info("deliveries_resumed", name=order.name, by=order.by)

    async def _commit(self, consumer: Consumer) -> None:
        progress = self._progress
        if progress is None:
            return
        for offset, order in list(self._unfinished.items()):
            if not self._follower.control.is_asked(order):
                progress.finished(offset)
                del self._unfinished[offset]
        commit = progress.committable()
        if commit is not None:
            await consumer.commit({self._partition: commit})
            progress.committed(commit)

    # Jobs.

    async def _keep_starting(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            self._start(tasks)
            await self._sleep(START_EVERY)

    def _start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the jobs whose turn it is: one for each order, and one for all kicks."""
        owner = self._progress
        if owner is None:
            return
        for key, order, job in (*self._of_names(owner), *self._of_letters(owner)):
            if key not in self._running:
                self._running[key] = tasks.create_task(self._run(key, order, job, owner), name=f"jobs-{key}")

    def _of_names(self, owner: object) -> Iterator[_Turn]:
        control = self._follower.control
        if control.asked("kick"):
            yield "kick", None, partial(self._kicks.kick, owner)
        for order in control.unclosed():
            if self._replays.under_way != order.key:
                yield order.key, order, partial(self._cancelled.close, order, owner)
        if "sweep" in self._running:
            return
        room = AT_ONCE - self._count("pause/")
        resumed = [order for order in control.asked("pause") if order.key not in self._running]
        for order in resumed[:room]:
            yield order.key, order, partial(self._resumptions.resume, order, owner)
        if room == AT_ONCE and not resumed and self._log.now() >= self._next_sweep:
            yield "sweep", None, partial(self._sweep, owner)

    def _of_letters(self, owner: object) -> Iterator[_Turn]:
        room = AT_ONCE - self._count("dead/")
        earlier: list[Order] = []
        for order in self._follower.control.asked("dead"):
            # A letter that two of them cover is settled by the first of them.
            is_free = not any(each.filter.may_share(order.filter) for each in earlier)
            earlier.append(order)
            if is_free and room > 0 and order.key not in self._running:
                room -= 1
                yield order.key, order, partial(self._dead_letters.settle, order, owner)

    def _count(self, prefix: str) -> int:
        return sum([key.startswith(prefix) for key in self._running])

    async def _run(self, key: str, order: Order | None, job: Callable[[], Awaitable[object]], owner: object) -> None:
        """Do a job, or begin it anew soon: what it has marked isn't done again."""
        try:
            await self._caught_up()  # with the last marker of the owner before us
            if self._progress is owner and (order is None or self._follower.control.orders.get(order.key) == order):
                await job()
        except LogUnavailableError as error:
            self._logger.warning("job_retried", order=key, error=str(error))
            until = asyncio.get_running_loop().time() + RETRY_DELAY
            while self._progress is owner and asyncio.get_running_loop().time() < until:
                await self._sleep(GLANCE_INTERVAL)
        finally:
            del self._running[key]

    async def _join(self) -> Consumer:
        """Join the group of jobs, however long the log is away."""
        group = self._topics.group(JOBS_GROUP)
        while True:
            try:
                return await self._log.consume(group=group, topics=[self._topics.control], listener=self)
            except LogUnavailableError as error:
                self._logger.warning("subscription_retried", group=group, error=str(error))
                await self._sleep(1.0)

    async def _keep_counting(self) -> None:
        while True:
            await self._sleep(SWEEP_EVERY)
            try:
                if self._progress is not None:
                    await self._backlogs.count()
            except LogUnavailableError as error:
                self._logger.warning("jobs_waiting", error=str(error))

    async def _look_around(self) -> None:
        """See to what nobody orders, every few seconds."""
        now = self._log.now()
        if self._progress is not None and now >= self._next_forgetting:
            await self._forget()
            self._next_forgetting = now + SWEEP_EVERY
        if self._progress is not None and now >= self._next_forgetting_of_rules:
            await self._forget_rules()
            self._next_forgetting_of_rules = now + FORGET_RULES_EVERY

    async def _sweep(self, owner: object) -> None:
        """Have injected what was parked after the scan of its resumption."""
        control, topic = self._follower.control, self._topics.parked
        ends = await ends_of_readable(self._log, topic)
        if self._progress is not owner:
            return  # what was swept is forgotten with that
        if self._swept is None:
            active = [order for order in control.orders.values() if order.kind == "pause" and order.state == "active"]
            markers = [control.marker(order.key) for order in active]
            self._swept = {
                key: min([marker.get(key, 0) for marker in markers], default=end) for key, end in ends.items()
            }
        swept = self._swept
        owed = self._resumptions.owed & ends.keys()
        self._resumptions.owed -= owed
        swept.update(dict.fromkeys(owed, 0))  # what was injected of it is below a marker
        if swept.items() >= ends.items() or await self._resumptions.sweep(swept, ends, owner):
            swept.update(ends)
        self._next_sweep = self._log.now() + SWEEP_EVERY

    async def _forget(self) -> None:
        """Give up the keys of orders that can't be about anything any more: the control topic would grow for ever."""
        control = self._follower.control
        bounds, unread = await self._log.readable(self._topics.dead)
        if unread:
            return  # of whose letters it isn't known which are left
        starts = {f"{self._topics.dead}/{number}": start for number, (start, _) in bounds.items()}
        for order in control.obsolete(self._log.now() - KEPT, starts)[:FORGOTTEN_AT_ONCE]:
            # The marker first: it is found by way of its order.
            if control.marker(order.key):
                await self._append_order(Order(kind="marker", name=order.key, state="gone", at=0.0))
            await self._append_order(Order(kind=order.kind, name=order.name, state="gone", at=0.0))

    async def _forget_rules(self) -> None:
        """Give up what is known of how events were routed that the log no longer has."""
        history = self._follower.control.history
        starts: dict[str, int] = {}
        for topic, places in history.places().items():
            bounds, unread = await self._log.readable(topic)
            gone = {number: (0 if number in unread else GONE) for number in places.values()}
            starts |= {
                place: bounds[number][0] if number in bounds else gone[number] for place, number in places.items()
            }
        for order in list(history.obsolete(self._log.now(), starts)):
            await self._append_order(Order(kind=order.kind, name=order.name, state="gone", at=0.0))

    async def _publish(self, order: Order) -> None:
        """Append an order and wait until it is in force here: the next one is judged by it."""
        owner = self._progress
        offset = await self._append_order(order)
        while owner is not None and self._progress is owner and self._follower.position <= offset:
            await self._sleep(0.02)

    async def _append_order(self, order: Order) -> int:
        key, value = order.encode()
        position = await self._log.append(self._topics.control, key=key, value=value, headers=[])
        return position.offset

    async def _caught_up(self) -> None:
        """Return when the orders in force are all that there are now."""
        for _, end in (await self._log.bounds(self._topics.control)).values():
            await self._seen(end - 1)

    async def _seen(self, offset: int) -> None:
        while self._follower.position <= offset:
            await self._sleep(0.02)
