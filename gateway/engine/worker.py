"""The delivering side of one process: the router and the ordered routes, with the dispatcher and all they share."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from structlog.typing import FilteringBoundLogger

from gateway.engine.control import Control
from gateway.engine.dispatch import Client, Dispatcher, Surroundings
from gateway.engine.duplicates import Duplicates
from gateway.engine.ordered import ALL_MEMORY, LEAST_MEMORY, Ordered, ordered_in, seed
from gateway.engine.router import Router
from gateway.engine.unread import Unread, UnreadPartitions, still_unread
from gateway.log.base import Log, Partition
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces

REPEAT = 1.0
LOOK_EVERY = 1.0
RETENTION_EVERY = 10.0
DRAIN_TIMEOUT = 20.0
"""Seconds after which what is under way is left to the next owner."""


class Worker:
    """`run` until `stop`. `prepare` before new rules come into force, and `reload` after."""

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
        others: Callable[[], Mapping[Partition, str]] = dict,
    ) -> None:
        """`others` tells what is unread of what others than the worker read in this process."""
        self._around = Surroundings(
            log=log,
            topics=topics,
            rules=rules,
            control=control,
            metrics=metrics,
            logger=logger,
            sleep=sleep,
            traces=traces,
        )
        self._dispatch = Dispatcher(self._around, client)
        self._duplicates = Duplicates(log=log, topics=topics, rules=rules, metrics=metrics, logger=logger, sleep=sleep)
        self._router = Router(self._around, self._dispatch, self._duplicates)
        self._ordered: dict[tuple[str, str, str], tuple[Ordered, asyncio.Task[None]]] = {}
        self._unread = UnreadPartitions(metrics, logger)
        self._others = others
        self._drain_timeout = DRAIN_TIMEOUT
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Route and deliver until `stop`, then drain and commit. Raises what a broken log or a bug makes it raise."""
        async with asyncio.TaskGroup() as tasks:
            self._dispatch.start(tasks)
            await self._begin()
            loops = [
                tasks.create_task(self._router.run(), name="router"),
                tasks.create_task(self._dispatch.run(), name="dispatch"),
                tasks.create_task(self._duplicates.run(), name="duplicates"),
                tasks.create_task(self._keep_ordered(tasks), name="ordered"),
                tasks.create_task(self._keep_looking(), name="unread"),
            ]
            await self._stopped.wait()
            await self._drain(loops)

    async def _begin(self) -> None:
        """Seed and subscribe, however long the log is away: the ingress may serve already."""
        while not self._stopped.is_set():
            try:
                await self.prepare(self._around.rules())
                await self._router.subscribe()
            except LogUnavailableError as error:
                self._around.logger.warning("subscription_repeated", error=str(error))
                await self._around.sleep(REPEAT)
            else:
                self._changed.set()
                return

    def stop(self, drain_timeout: float = DRAIN_TIMEOUT) -> None:
        """Take nothing in any more and let `run` end; attempts under way have so many seconds to end, too."""
        self._drain_timeout = drain_timeout
        self._stopped.set()

    async def prepare(self, rules: Rules) -> None:
        """Let new ordered routes begin where the router stands now. Raises LogUnavailableError.

        To be called before their rules are in force: from then on the router passes over the events of ordered routes.
        """
        await seed(self._around, rules)

    def reload(self) -> None:
        """Act on new rules: limits at once, topics with the next fetch."""
        self._dispatch.limit()
        self._router.reload()
        wanted = ordered_in(self._around.rules(), self._around.topics)
        for place, (member, _) in self._ordered.items():
            if place in wanted:
                member.reload()
            else:
                member.stop_reading()  # in this very step: by the new rules its events would match nothing
        self._changed.set()

    async def _keep_ordered(self, tasks: asyncio.TaskGroup) -> None:
        """Have one member for each ordered route, destination and topic of the rules, and none for others."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = ordered_in(self._around.rules(), self._around.topics)
            for place, (member, task) in [each for each in self._ordered.items() if each[1][0].is_stopped]:
                await member.close(patiently=True)
                member.let_go()
                task.cancel()
                del self._ordered[place]
            memory = max(LEAST_MEMORY, ALL_MEMORY // max(1, len(wanted)))
            for member, _ in self._ordered.values():
                member.allow(memory)
            for place in sorted(wanted.difference(self._ordered)):
                member = Ordered(self._around, self._dispatch, self._duplicates, place, memory=memory)
                self._ordered[place] = member, tasks.create_task(member.run(), name="ordered-" + "-".join(place))

    @property
    def unread(self) -> Mapping[Partition, Unread]:
        """What of the log can't be read now, and since when."""
        return self._unread.partitions

    async def _keep_looking(self) -> None:
        """See what of the log can't be read."""
        others: Mapping[Partition, Unread] = {}
        asked_at = -RETENTION_EVERY
        while True:
            now = self._around.log.now()
            if now >= asked_at + RETENTION_EVERY:
                asked_at = now
                await self._tell_retention(now)
            others = still_unread(others, self._others(), now)
            found = dict(others)
            for member in (self._router, *[member for member, _ in self._ordered.values()]):
                for partition, unread in member.unread.items():
                    found[partition] = min(unread, found.get(partition, unread))
            self._unread.look(found, now)
            await self._around.sleep(LOOK_EVERY)

    async def _tell_retention(self, now: float) -> None:
        """Tell how long it is until the log deletes what isn't done."""
        ages: dict[str, float] = {}
        for member in (self._router, *[member for member, _ in self._ordered.values()]):
            for topic, age in member.ages(now).items():
                ages[topic] = max(age, ages.get(topic, 0.0))
        family = self._around.metrics.retention_left
        with suppress(LogUnavailableError):  # the next time, then
            for topic, kept in (await self._around.log.retentions(ages.keys())).items():
                family.labels(topic).set(kept - ages[topic])

    async def _drain(self, loops: list[asyncio.Task[None]]) -> None:
        """Let what is under way end, leave the rest to the next owner, commit, and leave the groups."""
        until = asyncio.get_running_loop().time() + self._drain_timeout
        ordered = [member for member, _ in self._ordered.values()]
        for member in ordered:
            member.stop_reading()
        # A record of which something was delivered or tried ends here, or the next owner would do that again.
        begun = [item for item in self._router.stop_reading() if item.pending.has_begun]
        await self._dispatch.drain(begun, until)
        for task in [*loops, *[task for _, task in self._ordered.values()]]:
            task.cancel()
        await asyncio.gather(*[member.close() for member in (self._router, *ordered)])
        self._dispatch.abandon()
