"""What is left of ordered routes that the rules no longer have: their groups, whose backlog nobody else would read.

    still a route, but not in order ─▶ after a minute its backlog goes to the shortest tier
    not there for an hour ───────────▶ its backlog is dead-lettered as `route_removed`

Then the group is forgotten: the route, should it come again, begins where the router stands. The owner of the jobs does
this; one that is killed is followed by one that begins anew, so some may be repeated, and none is skipped.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from structlog.typing import FilteringBoundLogger

from gateway.engine.dispatch import UNKNOWN_LIMIT
from gateway.engine.injector import APPENDS_AT_ONCE, Injector
from gateway.engine.ordered import ordered_in
from gateway.engine.successors import Successors
from gateway.log.base import Log, Partition
from gateway.log.records import decode_event, is_newer
from gateway.log.topics import Topics
from gateway.model import DeadLettered, DeadReason, Delivery, UndecodableRecordError, delivery_id
from gateway.rules.expressions import View
from gateway.rules.rules import Route, Rules
from gateway.rules.table import RouteTable

SETTLED = 60.0
"""Seconds without members after which a group is nobody's: a process of newer rules may have made it, and be on its
way to join it."""
PARTS = 3


class Orphan(NamedTuple):
    """A group without a route or a member: since when that is known, and how far its topic went by then."""

    since: float
    ends: Mapping[int, int]


@dataclass(slots=True, kw_only=True)
class Orphans:
    """`remember` now and then, and `look` in the process that owns the jobs."""

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    successors: Successors
    injector: Injector
    logger: FilteringBoundLogger
    _found: dict[str, Orphan] = field(default_factory=dict)
    _known: dict[str, Route] = field(default_factory=dict)
    """Group → the route that it was last wanted for: what it matched is known as long as this process lives."""

    def remember(self) -> None:
        """Keep what is needed of the ordered routes, in every process: any may come to own the jobs."""
        rules = self.rules()
        for place in ordered_in(rules, self.topics):
            self._known[self.topics.ordered_group(*place)] = rules.routes[place[0]]

    async def look(self) -> bool:
        """End the groups whose time has come; tell whether others are on their way to that.

        Raises LogUnavailableError; the next call goes on.
        """
        rules = self.rules()
        wanted = {self.topics.ordered_group(*place) for place in ordered_in(rules, self.topics)}
        prefix = self.topics.group("ordered/")
        groups = (await self.log.groups(prefix)).items()
        # One with members is served by a process of other rules: its backlog ends where that one leaves it.
        unwanted = {group: count for group, count in groups if group not in wanted}
        left = [group for group, count in unwanted.items() if not count]
        self._found = {group: orphan for group, orphan in self._found.items() if group in left}
        now = self.log.now()
        for group in left:
            parts = group.removeprefix(prefix).split("/")
            if len(parts) != PARTS:
                continue  # none of ours
            route, destination, topic = parts
            if group not in self._found:
                ends = {number: end for number, (_, end) in (await self.log.bounds(topic)).items()}
                self._found[group] = Orphan(now, ends)
            age = now - self._found[group].since
            served = rules.routes.get(route)
            if served is not None and served.order is None and destination in served.destinations:
                if age >= SETTLED:
                    await self._end(group, topic, self._known.get(group, served), destination)
            elif age >= UNKNOWN_LIMIT:
                await self._end(group, topic, self._known.get(group), destination, name=route)
        return bool(unwanted)

    async def _end(
        self, group: str, topic: str, route: Route | None, destination: str, name: str | None = None
    ) -> None:
        """Inject the backlog of a route, or dead-letter it where it has a `name` alone; then forget the group.

        Not before a newer version has read what it wrote of it.
        """
        if await self._has_newer(group, topic):
            return
        count = 0
        batch: list[Delivery] = []
        async for delivery in self._backlog(group, topic, route, destination, name):
            count += 1
            if name is not None:
                detail = "the rules no longer name it" + ("" if route else ", nor is known what it matched")
                end = DeadLettered(reason=DeadReason.ROUTE_REMOVED, detail=detail)
                await self.successors.dead_letter(delivery, end)
                continue
            batch.append(delivery)
            if len(batch) == APPENDS_AT_ONCE:
                await self.injector.inject(batch, {})
                batch = []
        await self.injector.inject(batch, {})
        await self.log.forget(group)
        del self._found[group]
        self._known.pop(group, None)
        self.logger.warning("ordered_group_ended", group=group, count=count, is_removed=name is not None)

    async def _has_newer(self, group: str, topic: str) -> bool:
        commits = await self.log.committed(group, topic)
        for number, end in self._found[group].ends.items():
            commit = commits.get(number)
            async for records in self.log.scan(Partition(topic, number), commit.base if commit else end, end):
                for record in records:
                    if commit and not commit.covers(record.offset) and is_newer(record):
                        return True
        return False

    async def _backlog(
        self, group: str, topic: str, route: Route | None, destination: str, name: str | None
    ) -> AsyncIterator[Delivery]:
        """Yield what the group hasn't finished; all there is in the topic where nobody knows what the route matched."""
        table = None if route is None else RouteTable((route,))
        commits = await self.log.committed(group, topic)
        for number, end in self._found[group].ends.items():
            commit = commits.get(number)
            if commit is None:
                continue
            async for records in self.log.scan(Partition(topic, number), commit.base, end):
                for record in records:
                    if commit.covers(record.offset):
                        continue
                    try:
                        event = decode_event(record)
                    except UndecodableRecordError:
                        continue  # the router has kept it
                    if table is None or table.match(View.of(event)):
                        called = route.name if route is not None else name or ""
                        yield Delivery(
                            id=delivery_id(event.id, called, destination),
                            event=event,
                            route=called,
                            destination=destination,
                        )
