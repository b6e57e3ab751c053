"""The delivering side of one process: the router and the ordered routes, with the dispatcher and all they share."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import TYPE_CHECKING

from structlog.typing import FilteringBoundLogger

from gateway.engine.control.state import Control
from gateway.engine.dedupe.filter import DuplicateFilter
from gateway.engine.delivery.attempt_log import AttemptLog
from gateway.engine.delivery.dispatcher import Dispatcher
from gateway.engine.delivery.holds import Hold
from gateway.engine.group_member import REVOKE_GRACE
from gateway.engine.ordered.blocked_keys import RouteState
from gateway.engine.ordered.route import OrderedRoute
from gateway.engine.router import Router
from gateway.engine.services import Client, Services
from gateway.engine.unavailable_partitions import Unread, UnreadPartitions, still_unread
from gateway.log.base import Commit, Log, Partition
from gateway.log.topics import Topics
from gateway.model import ForbiddenError, LogUnavailableError
from gateway.rules.rules import Rules
from gateway.settings import RecordedAttempts
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces

RETRY_DELAY = 1.0
POLL_INTERVAL = 1.0
RETENTION_EVERY = 10.0
LEFTOVER_INTERVAL = 30.0
"""Seconds between checks for topics of removed ordered routes that still have unfinished records."""
JOIN_EVERY, JOINED_AT_ONCE = 12 * 3600.0, 10
"""Seconds after which a process joins, for a moment, the groups of such topics that have nothing unfinished, and how
many at a time. Brokers forget what a group without members has committed (`offsets.retention.minutes`, by default 7
days), perhaps before the last records are deleted: all of them would look unfinished then."""
MAX_ORDERED_MEMORY = 128 << 20
"""Bytes of records in memory of all ordered routes of a process; each has its share, so that none stops another."""
MIN_ORDERED_MEMORY = 4 << 20
DRAIN_TIMEOUT = 20.0
"""Seconds after which a drain leaves what is in flight to the next owner."""


class Worker:
    """Call `run`, `stop` to end it, and `reload` once new rules are active."""

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        rules: Callable[[], Rules],
        client: Client,
        control: Control,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        traces: "Traces | None" = None,
        attempts: RecordedAttempts = RecordedAttempts.OFF,
        others: Callable[[], Mapping[Partition, str]] = dict,
        refusing: Callable[[], Mapping[Partition, str]] = dict,
    ) -> None:
        """Create a worker.

        `others` returns the unreadable partitions of other readers in this process, `refusing` the partitions that
        reject appends; both are reported together with the worker's own unreadable partitions.
        """
        self._services = Services(
            log=log,
            topics=topics,
            rules=rules,
            control=control,
            metrics=metrics,
            logger=logger,
            sleep=sleep,
            traces=traces,
        )
        self._attempt_log = AttemptLog(self._services, attempts)
        self._dispatcher = Dispatcher(self._services, client, self._attempt_log)
        self._duplicates = DuplicateFilter(
            log=log, topics=topics, rules=rules, metrics=metrics, logger=logger, sleep=sleep
        )
        self._router = Router(self._services, self._dispatcher, self._duplicates)
        self._ordered: dict[tuple[str, str], tuple[OrderedRoute, asyncio.Task[None]]] = {}
        self._joined_at: dict[tuple[str, str], float] = {}
        self._unread = UnreadPartitions(metrics, logger)
        self._gauged: AbstractSet[str] = frozenset()
        self._others = others
        self._refusing = refusing
        self._drain_timeout = DRAIN_TIMEOUT
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Route and deliver until `stop`, then drain and commit. Errors of the log and bugs propagate."""
        async with asyncio.TaskGroup() as tasks:
            self._dispatcher.bind(tasks)
            await self._begin()
            recording = tasks.create_task(self._attempt_log.run(), name="attempts")
            loops = [
                tasks.create_task(self._router.run(), name="router"),
                tasks.create_task(self._dispatcher.run(), name="dispatch"),
                tasks.create_task(self._duplicates.run(), name="duplicates"),
                tasks.create_task(self._keep_ordered(tasks), name="ordered"),
                tasks.create_task(self._keep_looking(), name="unread"),
            ]
            await self._stopped.wait()
            await self._drain(loops)
            await self._attempt_log.flush()
            recording.cancel()

    async def _begin(self) -> None:
        """Subscribe, retrying for as long as the log is unavailable: the ingress may serve already.

        Raises ForbiddenError.
        """
        while not self._stopped.is_set():
            try:
                await self._router.subscribe()
            except ForbiddenError:
                raise
            except LogUnavailableError as error:
                self._services.logger.warning("subscription_retried", error=str(error))
                await self._services.sleep(RETRY_DELAY)
            else:
                self._changed.set()
                return

    def stop(self, drain_timeout: float = DRAIN_TIMEOUT) -> None:
        """Let `run` end: attempts in flight have `drain_timeout` seconds to end."""
        self._drain_timeout = drain_timeout
        self._stopped.set()

    def reload(self) -> None:
        """Apply new rules: to what waits at once, topics with the next fetch."""
        self._dispatcher.reload()
        self._duplicates.reload()
        for member in (self._router, *[member for member, _ in self._ordered.values()]):
            member.reload()
        self._changed.set()

    async def _keep_ordered(self, tasks: asyncio.TaskGroup) -> None:
        """Run a member for each ordered route and destination of the rules, and for those with unfinished records."""
        while True:
            try:
                async with asyncio.timeout(LEFTOVER_INTERVAL):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            wanted = self._services.rules().ordered
            self._have(wanted.union(self._ordered), tasks)
            try:
                unfinished = await self._targets_with_leftovers(wanted)
            except LogUnavailableError as error:
                self._services.logger.warning("subscription_retried", group="ordered", error=str(error))
                continue
            self._have(wanted | unfinished, tasks)
            # All at once: each may wait for its group's coordinator, and what a reload adds waits for this.
            async with asyncio.TaskGroup() as leaving:
                for target in sorted(self._ordered.keys() - wanted - unfinished):
                    leaving.create_task(self._leave(target), name="ordered-leave")

    async def _leave(self, target: tuple[str, str]) -> None:
        """Leave the group of an ordered route that is gone and has no unfinished records."""
        member, task = self._ordered[target]
        member.stop_reading()
        await member.close(let_attempts_end=True)
        member.forget_partitions()
        task.cancel()
        del self._ordered[target]

    def _have(self, wanted: Collection[tuple[str, str]], tasks: asyncio.TaskGroup) -> None:
        """Start missing members."""
        memory = max(MIN_ORDERED_MEMORY, MAX_ORDERED_MEMORY // max(1, len(wanted)))
        for member, _ in self._ordered.values():
            member.set_memory_limit(memory)
        for target in () if self._stopped.is_set() else sorted(set(wanted).difference(self._ordered)):
            member = OrderedRoute(self._services, self._dispatcher, target, memory=memory)
            self._ordered[target] = member, tasks.create_task(member.run(), name="ordered-" + "-".join(target))

    async def _targets_with_leftovers(self, wanted: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
        """Return other routes and destinations whose ordered topics still have unfinished records.

        They aren't ordered any more, or were removed; events that they matched before are still delivered. Some with
        finished records are among them, if this process has joined their group long ago.
        """
        log, topics = self._services.log, self._services.topics
        now = asyncio.get_running_loop().time()
        self._joined_at |= dict.fromkeys(self._ordered, now)
        finished: dict[tuple[str, str], float] = {}
        unfinished = set()
        for topic in await log.topics():
            target = topics.ordered_target(topic)
            if target is None or target in wanted:
                continue
            commits = await log.committed(topics.ordered_group(*target), topic)
            bounds, unreadable = await log.readable(topic)
            if unreadable:
                unfinished.add(target)  # perhaps: its member learns which they are, and ends once they can be read
            for number, (start, end) in bounds.items():
                # Deleted records, too: its member counts them.
                base, done, *_ = commits.get(number, Commit(start))
                if end - base > int.from_bytes(done, "little").bit_count():
                    unfinished.add(target)
                elif end > start:
                    finished[target] = self._joined_at.get(target, -math.inf)
        self._joined_at = finished
        due = [target for target, at in sorted(finished.items()) if at <= now - JOIN_EVERY]
        return unfinished.union(due[:JOINED_AT_ONCE])

    @property
    def unread(self) -> Mapping[Partition, Unread]:
        """The partitions that can't be read now, since when, and why."""
        return self._unread.partitions

    @property
    def holds(self) -> Mapping[str, Hold]:
        """Which destinations are sent nothing for a while, why, and until when at least."""
        return self._dispatcher.holds.active

    @property
    def ordered_states(self) -> Mapping[tuple[str, str], RouteState]:
        """The keys whose head delivery has failed, and more, by ordered route and destination."""
        return {target: member.state for target, (member, _) in self._ordered.items()}

    async def _keep_looking(self) -> None:
        """Check which partitions can't be read."""
        others: Mapping[Partition, Unread] = {}
        refusing: Mapping[Partition, Unread] = {}
        time = asyncio.get_running_loop().time  # the log's goes back if this machine's clock was ahead at first
        asked_at = -math.inf
        while True:
            now = self._services.log.now()
            if time() >= asked_at + RETENTION_EVERY:
                asked_at = time()
                await self._set_retention_gauges(now)
            others = still_unread(others, {**self._others(), **self._duplicates.unreadable()}, now)
            found = dict(others)
            for member in (self._router, *[member for member, _ in self._ordered.values()]):
                for partition, unread in member.unread.items():
                    found[partition] = min(unread, found.get(partition, unread))
            refusing = still_unread(refusing, self._refusing(), now)
            self._unread.update({**refusing, **found}, now)
            await self._services.sleep(POLL_INTERVAL)

    async def _set_retention_gauges(self, now: float) -> None:
        """Set the gauges of the time until the log deletes unfinished records."""
        ages: dict[str, float] = {}
        for member in (self._router, *[member for member, _ in self._ordered.values()]):
            for topic, age in member.ages(now).items():
                ages[topic] = max(age, ages.get(topic, 0.0))
        family = self._services.metrics.retention_left
        with suppress(LogUnavailableError):  # retried next time
            kept = await self._services.log.retentions(ages.keys())
            for topic, seconds in kept.items():
                family.labels(topic).set(seconds - ages[topic])
            for topic in self._gauged - kept.keys():
                family.pop((topic,), None)
            self._gauged = kept.keys()

    async def _drain(self, loops: list[asyncio.Task[None]]) -> None:
        """Let what is in flight end, leave the rest to the next owner, commit, and leave the groups."""
        until = asyncio.get_running_loop().time() + self._drain_timeout
        await self._dispatcher.let_slow_attempts_end(until - REVOKE_GRACE)
        ordered = [member for member, _ in self._ordered.values()]
        for member in ordered:
            member.stop_reading()
        await self._dispatcher.drain(self._router.stop_reading(), until)
        # Before their loops end: one may be leaving its group already, to join it for other topics.
        await asyncio.gather(*[member.close() for member in (self._router, *ordered)])
        for task in [*loops, *[task for _, task in self._ordered.values()]]:
            task.cancel()
        self._dispatcher.abandon()
