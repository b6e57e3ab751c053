"""Carry out what operators order: one scan that injects records again, then publishes its marker.

Every process follows `gateway.control` (`Follower`); one of them, the owner of its only partition in the group of jobs,
carries the orders out (`Jobs`). A job injects first and publishes after, and the order's own offset is committed last:
whatever kills it, the next owner does it again from the marker before. Nothing is skipped, some may be repeated.

Replays of events take hours where they are told to; they are made beside all others (`replay.py`).
"""

import asyncio
from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from structlog.typing import FilteringBoundLogger

from gateway.engine import planner
from gateway.engine.control import Control, Letter, Order, decode
from gateway.engine.injector import APPENDS_AT_ONCE, Injector
from gateway.engine.orphans import Orphans
from gateway.engine.progress import Progress
from gateway.engine.replay import Replays
from gateway.engine.successors import Successors
from gateway.log.base import Assignment, Commit, Consumer, Log, Partition, Record
from gateway.log.records import Filed, decode_delivery, note_of
from gateway.log.topics import DAY, JOBS_GROUP, ROUTER_GROUP, TIERS, Topics
from gateway.model import DeadReason, Delivery, LogUnavailableError, UndecodableRecordError
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

HOLD = 2.5
"""Seconds from a kick's announcement to its scan: a quick attempt, a commit every second, and the news on its way.

An attempt that takes longer is repeated; the operator who kicks a destination that hangs isn't to wait for it."""
ORPHANS_EVERY = 30.0
"""Seconds between looks for ordered routes that are there no more."""
SWEEP_EVERY = 5.0
"""Seconds between looks for what was parked by a worker that had not yet read of a resumption."""
KEPT = 30 * DAY
"""Seconds for which an order that was carried out is remembered; longer, while a dead letter is left that it covers."""
FORGOTTEN_AT_ONCE = 50
"""Orders that are forgotten in one sweep, so that those which wait aren't held up."""


class Follower:
    """Keep a `Control` at the state of `gateway.control`."""

    def __init__(self, log: Log, topics: Topics, logger: FilteringBoundLogger) -> None:
        self.control = Control()
        self.position = 0
        self._log = log
        self._topic = topics.control
        self._logger = logger
        self._consumer: Consumer | None = None

    def unread(self) -> Mapping[Partition, str]:
        """Tell what can't be read of the topic, and why: no order is heard of meanwhile."""
        return {} if self._consumer is None else self._consumer.unread()

    async def _begin(self) -> tuple[Consumer, int, int]:
        """Begin to read, however long the topic is away; return also its bounds."""
        while True:
            try:
                start, end = (await self._log.bounds(self._topic)).get(0, (0, 0))
                return await self._log.consume(group=None, topics=[self._topic], listener=self), start, end
            except LogUnavailableError as error:
                self._logger.warning("subscription_repeated", topic=self._topic, error=str(error))
                await asyncio.sleep(1.0)

    async def follow(self, caught_up: asyncio.Event) -> None:
        """Apply every order, for ever; `caught_up` is set once all that was there at the start is in force."""
        consumer, start, end = await self._begin()
        self._consumer = consumer
        try:
            if start == end:
                caught_up.set()
            while True:
                for batch in await consumer.fetch(timeout=1.0):
                    for record in batch.records:
                        self._apply(record)
                # A compacted topic may end in a gap, so what counts is that nothing is left to read.
                lag = consumer.lag()  # empty as long as nothing is known
                if not caught_up.is_set() and (self.position >= end or (lag and not any(lag.values()))):
                    caught_up.set()
        finally:
            await consumer.close()

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Nothing to take over: a reader without a group starts at the topic's beginning."""

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the listener's signature
        return {}

    def _apply(self, record: Record) -> None:
        self.position = record.offset + 1
        try:
            self.control.apply(decode(record.key, record.value))
        except UndecodableRecordError as error:
            self._logger.error("control_record_skipped", offset=record.offset, error=str(error))


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
        self._successors = Successors(log=log, topics=topics, metrics=metrics, logger=logger, sleep=sleep)
        self._injector = Injector(self._successors, topics.retry(planner.SHORTEST))
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
        self._orphans = Orphans(
            log=log,
            topics=topics,
            rules=rules,
            successors=self._successors,
            injector=self._injector,
            logger=logger,
        )
        self._next_sweep = self._next_look = 0.0
        self._progress: Progress | None = None
        self._swept: dict[str, int] | None = None
        self._settlements = 0
        self._counted: dict[str, int] = {}  # up to where dead letters were read
        self._open: dict[int, array[int]] = {}  # the offsets of the open ones, by partition
        self._parked_to: dict[str, int] | None = None  # up to where the parked were read
        self._parked: dict[tuple[str, int], array[int]] = {}  # the offsets of what isn't resumed, by name and partition
        self._partition = Partition(topics.control, 0)

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            if assignment.partition == self._partition:
                self._progress = Progress(assignment.commit, assignment.log_start)
                self._swept = None
                self._counted, self._open = {}, {}
                self._parked_to, self._parked = None, {}

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        if self._partition not in partitions or self._progress is None:
            return {}
        commit = self._progress.committable()
        self._progress = None
        for backlog in (self._metrics.dead_letter_backlog, self._metrics.parked_backlog):
            backlog.set(0)  # another process tells of it
        await self._replays.let_go()
        return {} if commit is None else {self._partition: commit}

    async def run(self) -> None:
        """Carry out orders, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._replays.run(), name="jobs-replays")
            await self._carry_orders_out()

    async def _carry_orders_out(self) -> None:
        consumer = await self._join()
        try:
            while True:
                for batch in await consumer.fetch(timeout=1.0):
                    for record in batch.records:
                        progress = self._progress
                        if progress is None or not progress.received(record.offset):
                            continue
                        await self._obey(record)
                        progress.finished(record.offset)
                commit = self._progress.committable() if self._progress else None
                try:
                    if commit is not None:
                        await consumer.commit({self._partition: commit})
                        if self._progress is not None:
                            self._progress.committed(commit)
                    await self._look_around()
                except LogUnavailableError as error:
                    self._logger.warning("jobs_waiting", error=str(error))
                    await self._sleep(1.0)
        finally:
            await consumer.close()  # and so of a replay, which comes to its marker first

    def reload(self) -> None:
        """Look at once for ordered routes that new rules don't have."""
        self._next_look = 0.0

    async def _join(self) -> Consumer:
        """Join the group of jobs, however long the log is away."""
        group = self._topics.group(JOBS_GROUP)
        while True:
            try:
                return await self._log.consume(group=group, topics=[self._topics.control], listener=self)
            except LogUnavailableError as error:
                self._logger.warning("subscription_repeated", group=group, error=str(error))
                await self._sleep(1.0)

    async def _look_around(self) -> None:
        """See to what nobody orders, every few seconds."""
        now = self._log.now()
        if self._progress is not None and now >= self._next_sweep:
            await self._sweep()
            await self._count_dead()
            await self._count_parked()
            await self._forget()
            self._next_sweep = now + SWEEP_EVERY
        if now >= self._next_look:
            self._orphans.remember()
            is_busy = self._progress is not None and await self._orphans.look()
            self._next_look = now + (SWEEP_EVERY if is_busy else ORPHANS_EVERY)

    async def _obey(self, record: Record) -> None:
        await self._seen(record.offset)
        try:
            order = decode(record.key, record.value)
        except UndecodableRecordError:
            return  # the follower has logged it
        if order.kind == "replay":
            return  # whoever owns the jobs finds it among the orders in force
        while self._present(order) == order and order.state in ("resuming", "asked"):
            try:
                done = await self._carry_out(order)
                if self._present(order) == order:  # else another was given meanwhile, and stands
                    await self._publish(done)
            except LogUnavailableError as error:
                self._logger.warning("job_repeated", order=order.key, error=str(error))
                await self._sleep(1.0)
            else:
                self._logger.info("job_finished", order=order.key, state=done.state, count=done.count)
                return

    def _present(self, order: Order) -> Order | None:
        return self._follower.control.orders.get(order.key)

    async def _carry_out(self, order: Order) -> Order:
        match order.kind:
            case "pause":
                return await self._resume(order)
            case "kick":
                return await self._kick(order)
            case "dead":
                return await self._settle(order)
            case "replay" | "marker":
                return order
            case _ as never:
                assert_never(never)

    async def _resume(self, order: Order) -> Order:
        ends = await self._ends(self._topics.parked)
        found = self._filed(self._topics.parked, self._follower.control.marker(order.key), ends)
        parked = (filed.delivery async for _, _, filed in found if filed and filed.note.get("by") == order.name)
        count = await self._inject(parked, at_once=False)
        await self._mark(order, ends)
        return order.with_state("active", count=count)

    async def _kick(self, order: Order) -> Order:
        kind, _, name = order.name.partition("/")
        control = self._follower.control
        topics = [self._topics.retry(tier) for tier in TIERS]
        ends: dict[str, int] = {}
        for topic in topics:
            ends |= await self._ends(topic)
        # From here on nothing of it is taken up, and what was is committed: else it would be delivered twice.
        await self._mark(order, ends, f"hold/{order.key}")
        await self._sleep(HOLD)
        count = 0
        for topic in topics:
            commits = await self._log.committed(self._topics.group(ROUTER_GROUP), topic)
            starts = dict(control.marker(order.key))
            for number, commit in commits.items():
                key = f"{topic}/{number}"
                starts[key] = max(starts.get(key, 0), commit.base)
            count += await self._inject(
                filed.delivery
                async for partition, record, filed in self._filed(topic, starts, ends)
                if filed
                and name == (filed.delivery.route if kind == "route" else filed.delivery.destination)
                and not (partition.number in commits and commits[partition.number].covers(record.offset))
                and not control.is_kicked(filed.delivery.route, filed.delivery.destination, partition, record.offset)
            )
        await self._mark(order, ends)
        return order.with_state("done", count=count)

    async def _settle(self, order: Order) -> Order:
        now = self._log.now()
        found = self._meant(order)
        if order.action == "replay":
            count = await self._inject(
                replace(filed.delivery, attempts=(), since=now) async for filed in found if filed
            )
        else:
            count = 0
            async for _ in found:
                count += 1
        return order.with_state("done", count=count)

    async def _meant(self, order: Order) -> AsyncIterator[Filed | None]:
        """Yield what an order about dead letters is for, and isn't settled yet; None for what can't be read."""
        control = self._follower.control
        async for partition, record in self._records(self._topics.dead, {}, order.marker):
            letter, filed = read_letter(record)
            if order.is_for(letter) and not control.settled(letter, partition, record.offset):
                yield filed

    async def _sweep(self) -> None:
        """Inject what a worker parked after the scan of a resumption, since it hadn't read of it yet."""
        topic = self._topics.parked
        control = self._follower.control
        ends = await self._ends(topic)
        active = {
            order.name: order for order in control.orders.values() if order.kind == "pause" and order.state == "active"
        }
        if self._swept is None:
            markers = [control.marker(order.key) for order in active.values()]
            self._swept = {
                key: min([marker.get(key, 0) for marker in markers], default=end) for key, end in ends.items()
            }
        if self._swept == ends:
            return
        late: list[Delivery] = []
        names: set[str] = set()
        async for partition, record, filed in self._filed(topic, self._swept, ends):
            if filed is None:
                await self._bury(topic, record)
                continue
            order = active.get(filed.note.get("by", ""))
            if order is not None and not control.has_scanned(order.key, partition, record.offset):
                names.add(order.name)
                late.append(filed.delivery)
                if len(late) == APPENDS_AT_ONCE:
                    await self._append(late, at_once=False)
                    late = []
        await self._append(late, at_once=False)
        for name in names:
            await self._mark(active[name], ends)
        self._swept = ends

    async def _count_dead(self) -> None:
        """Count the open dead letters: those that came since the last look, or all of them after an order."""
        control, topic = self._follower.control, self._topics.dead
        if control.settlements != self._settlements:
            self._settlements, self._counted, self._open = control.settlements, {}, {}
        ends = await self._ends(topic)
        async for partition, record in self._records(topic, self._counted, ends):
            letter, _ = read_letter(record)
            if not control.settled(letter, partition, record.offset):
                self._open.setdefault(partition.number, array("q")).append(record.offset)
        self._counted = ends
        for number, (start, _) in (await self._log.bounds(topic)).items():
            offsets = self._open.get(number)
            if offsets and offsets[0] < start:
                self._open[number] = array("q", [offset for offset in offsets if offset >= start])
        self._metrics.dead_letter_backlog.set(sum(map(len, self._open.values())))

    async def _count_parked(self) -> None:
        """Count what is parked: what came since the last look, as far as no resumption has scanned it."""
        control, topic = self._follower.control, self._topics.parked
        bounds = await self._log.bounds(topic)
        ends = {f"{topic}/{number}": end for number, (_, end) in bounds.items()}
        if self._parked_to is None:
            markers = [control.marker(order.key) for order in control.orders.values() if order.kind == "pause"]
            firsts = {key: [marker.get(key, 0) for marker in markers] for key in ends}
            self._parked_to = {key: min(firsts[key], default=end) for key, end in ends.items()}
        seen, parked = self._parked_to, self._parked  # those of this ownership, should it end meanwhile
        async for partition, record in self._records(topic, seen, ends):
            where = (note_of(record).get("by", ""), partition.number)
            parked.setdefault(where, array("q")).append(record.offset)
            seen[f"{topic}/{partition.number}"] = record.offset + 1
        for (name, number), offsets in parked.items():
            scanned = control.marker(f"pause/{name}").get(f"{topic}/{number}", 0)
            del offsets[: bisect_left(offsets, max(scanned, bounds[number][0]))]
        if self._progress is not None:
            self._metrics.parked_backlog.set(sum(map(len, parked.values())))

    async def _forget(self) -> None:
        """Give up the keys of orders that can't be about anything any more: the control topic would grow for ever."""
        control = self._follower.control
        starts = {
            f"{self._topics.dead}/{number}": start
            for number, (start, _) in (await self._log.bounds(self._topics.dead)).items()
        }
        for order in control.obsolete(self._log.now() - KEPT, starts)[:FORGOTTEN_AT_ONCE]:
            # The marker first: it is found by way of its order.
            if control.marker(order.key):
                await self._append_order(Order(kind="marker", name=order.key, state="gone", at=0.0))
            await self._append_order(Order(kind=order.kind, name=order.name, state="gone", at=0.0))

    async def _bury(self, topic: str, record: Record) -> None:
        try:
            decode_delivery(record)
        except UndecodableRecordError as error:
            await self._successors.bury(topic, record, error)

    async def _ends(self, topic: str) -> dict[str, int]:
        return {f"{topic}/{number}": end for number, (_, end) in (await self._log.bounds(topic)).items()}

    async def _filed(
        self, topic: str, starts: Mapping[str, int], ends: Mapping[str, int]
    ) -> AsyncIterator[tuple[Partition, Record, Filed | None]]:
        """Yield the deliveries of a range, None for one that can't be read."""
        async for partition, record in self._records(topic, starts, ends):
            try:
                filed = decode_delivery(record)
            except UndecodableRecordError:
                yield partition, record, None
            else:
                yield partition, record, filed

    async def _records(
        self, topic: str, starts: Mapping[str, int], ends: Mapping[str, int]
    ) -> AsyncIterator[tuple[Partition, Record]]:
        for number, (first, last) in (await self._log.bounds(topic)).items():
            key = f"{topic}/{number}"
            partition = Partition(topic, number)
            async for records in self._log.scan(partition, max(first, starts.get(key, 0)), min(last, ends.get(key, 0))):
                for record in records:
                    yield partition, record

    async def _inject(self, deliveries: AsyncIterator[Delivery], *, at_once: bool = True) -> int:
        """Append deliveries to the shortest tier, due now, or `at_once=False` not before they were due anyway."""
        count = 0
        batch: list[Delivery] = []
        async for delivery in deliveries:
            batch.append(delivery)
            count += 1
            if len(batch) == APPENDS_AT_ONCE:
                await self._append(batch, at_once=at_once)
                batch = []
        await self._append(batch, at_once=at_once)
        return count

    async def _append(self, batch: Sequence[Delivery], *, at_once: bool) -> None:
        now = self._log.now()
        await self._injector.inject(
            [
                replace(delivery, successor=delivery.successor + 1, due=now if at_once else max(now, delivery.due))
                for delivery in batch
            ],
            {},
        )

    async def _mark(self, order: Order, ends: Mapping[str, int], name: str | None = None) -> None:
        """Publish up to where the jobs of an order have scanned, or something else of it under another name."""
        marker = Order(kind="marker", name=name or order.key, state="done", at=self._log.now(), marker=ends)
        await self._publish(marker)

    async def _publish(self, order: Order) -> None:
        await self._seen(await self._append_order(order))  # by ourselves: the next order is judged by this one

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


def read_letter(record: Record) -> tuple[Letter, Filed | None]:
    """Read a record of the dead-letter topic: what filters look at, and what it holds if that can be read."""
    try:
        filed = decode_delivery(record)
    except UndecodableRecordError:
        return Letter(id="", route="", destination="", reason=DeadReason.UNDECODABLE, at=record.appended_at), None
    delivery = filed.delivery
    letter = Letter(
        id=delivery.id,
        route=delivery.route,
        destination=delivery.destination,
        reason=filed.note.get("reason", ""),
        at=record.appended_at,
    )
    return letter, filed
