"""The jobs that scan the log and put deliveries into the shortest tier again: resumptions, kicks, and the dead letters.

    scan ──▶ batch (≤ 100) ──ours still?──▶ shortest tier, acknowledged ──▶ marker, at 500 or after 1 s ──▶ … ──▶ end

A marker tells how far a job has come, after what it covers was acknowledged. A job whose process gives the jobs up ends
with its next batch and a marker, so the next owner repeats nothing; one that is killed repeats what came after its last
marker, at most 500 deliveries.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from structlog.typing import FilteringBoundLogger

from gateway.engine import tiers
from gateway.engine.control.records import Order, State, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import NEWER, filed_in, read_letter
from gateway.engine.jobs.injector import Injector
from gateway.engine.jobs.kick_outcomes import KickOutcomes
from gateway.engine.jobs.log_reader import RECORDS_AT_ONCE, records_of
from gateway.engine.jobs.scan import NOTHING, Pick, Picked, Run, Scan, ends_of_readable
from gateway.engine.successor_writer import Successors
from gateway.engine.unavailable_partitions import Patient
from gateway.log.base import Commit, Log, Partition, Record
from gateway.log.records import decode_delivery, is_newer
from gateway.log.topics import ROUTER_GROUP, TIERS, Topics
from gateway.model import (
    Delivery,
    Disposition,
    Note,
    UndecodableRecordError,
)
from gateway.rules.rules import Rules

HOLD = 2.5
"""Seconds from a kick's announcement to its scan: a quick attempt, a commit every second, and the news on its way.

An attempt that takes longer is repeated; the operator who kicks a destination that hangs isn't to wait for it."""
COMMITTED_BY = 2.5
"""Seconds in which what is done has been committed."""
GLANCE_INTERVAL = 0.1
LEFT = "up to the first letter of a partition that a newer version of the gateway wrote"


class Scans:
    """The jobs themselves. Each goes on while `owner` returns what it was given, and raises LogUnavailableError."""

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        rules: Callable[[], Rules],
        control: Control,
        successors: Successors,
        injector: Injector,
        publish: Callable[[Order], Awaitable[object]],
        position: Callable[[], int],
        owner: Callable[[], object | None],
        logger: FilteringBoundLogger,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._log = log
        self._topics = topics
        self._rules = rules
        self._control = control
        self._successors = successors
        self._injector = injector
        self._publish = publish
        self._position = position
        self._owner = owner
        self._logger = logger
        self._sleep = sleep
        self._patient = Patient(log)
        self.owed: set[str] = set()
        """Partitions of what is parked that a resumption couldn't read: they are swept from their beginning."""

    # The jobs.

    async def resume(self, order: Order, owner: object) -> None:
        """Inject what was parked by a name that is resumed, until it is paused again."""
        topic = self._topics.parked
        run = self._run(order)

        def pick(partition: Partition, record: Record) -> Picked:
            stored = filed_in(record)
            if stored is None or stored.note.by != order.name or run.is_beyond(partition, record.offset):
                return NOTHING
            return Picked((run,), self._again(stored.delivery, at_once=False))

        def is_wanted() -> bool:
            present = self._control.orders.get(order.key)
            return self._owner() is owner and (present is None or present.state != "paused")

        scan = self._scan([run], is_wanted)
        ends = await self._ends(scan, topic)
        if await scan.go(topic, run.told, ends, pick):
            self.owed |= scan.unread
            await self._end(scan, run, "active")
        elif self._owner() is owner:  # paused again
            await self._take_back(scan, run)

    async def close(self, order: Order, owner: object) -> None:
        """Tell how far a replay had come that is cancelled, and isn't under way any more."""
        run = self._run(order)
        await self._take_back(self._scan([run], lambda: self._owner() is owner), run)

    async def _take_back(self, scan: Scan, run: Run) -> None:
        await scan.tell(run, "cancelled", is_last=True)
        self._logger.info("job_finished", order=run.order.key, state="cancelled", count=run.count, detail=run.detail)

    async def sweep(self, starts: Mapping[str, int], ends: dict[str, int], owner: object) -> bool:
        """Inject what a worker parked after the scan of a resumption, since it hadn't read of it yet.

        Return False where it has not come to its end. The `ends` become those that it has come to.
        """
        runs = {
            order.name: self._run(order)
            for order in self._control.orders.values()
            if order.kind == "pause" and order.state == "active"
        }
        found: dict[str, Run] = {}
        unreadable: list[Record] = []

        def pick(partition: Partition, record: Record) -> Picked:
            stored = filed_in(record)
            if stored is None:
                unreadable.append(record)
                found.update(runs)  # whose markers pass it, so that the next owner doesn't bury it again
                return NOTHING
            run = runs.get(stored.note.by)
            if run is None or run.is_beyond(partition, record.offset):
                return NOTHING
            found[run.order.name] = run
            return Picked((run,), self._again(stored.delivery, at_once=False))

        scan = self._scan(found.values(), lambda: self._owner() is owner, state="done")
        is_through = await scan.go(self._topics.parked, starts, ends, pick)
        for record in unreadable:
            await self._dead_letter_unreadable(self._topics.parked, record)
        if is_through:
            await scan.mark()  # or the next owner of the jobs would inject it again
        ends.update(scan.left)
        ends.update({place: starts.get(place, 0) for place in scan.unread})
        return is_through

    async def _dead_letter_unreadable(self, topic: str, record: Record) -> None:
        try:
            decode_delivery(record)
        except UndecodableRecordError as error:
            await self._successors.dead_letter_unreadable(topic, record, error)

    async def kick(self, owner: object) -> None:
        """Bring on what waits in the tiers for the names that are kicked: of all kicks that are asked for, at once.

        What waits in the shortest tier comes out within 5 s anyway, and is due then.
        """
        control = self._control
        runs = [self._run(order) for order in control.asked("kick")]
        if not runs:
            return  # the owner before us has answered them
        shortest = self._topics.retry(tiers.SHORTEST)

        def is_wanted() -> bool:
            return self._owner() is owner and any(control.is_open(run.order.key) for run in scan.runs)

        scan = self._scan(runs, is_wanted, is_hurried=True)
        near = await self._ends(scan, shortest)
        ends: dict[str, int] = {}
        for topic in self._longer():
            ends |= await self._ends(scan, topic)
        # Before the wait: what comes out meanwhile, and whose end isn't committed yet, may be parked or dead by then.
        outcomes = await self._kick_outcomes(near | ends, self._log.now() - COMMITTED_BY)
        # What is due in the shortest tier meanwhile goes out by what the kick has ended.
        await self._count([run for run in runs if not control.is_begun(run.order.key)], shortest, near, outcomes)
        # From here on nothing of it is taken up, and what was is committed: else it would be delivered twice.
        await self._hold(runs, ends, near)
        if not await self._pass(HOLD, owner):
            return
        # An earlier owner that didn't know yet may have answered some. What they hold comes when it is due, then.
        scan.runs = [run for run in runs if control.is_open(run.order.key)]
        if not scan.runs or not await self._bring_on(scan, scan.runs, ends, outcomes):
            return
        await scan.mark()  # what is brought on isn't again, whatever happens while it is looked at
        await outcomes.poll(lambda: self._commits(shortest), is_wanted=scan.is_wanted, sleep=self._sleep)
        for run in scan.runs:
            run.outcome = outcomes.of(run.order.name, run.count, dropping=self._dropping())
            run.rate = self._rate(run.order.name)
            await self._end(scan, run, "done")

    def _longer(self) -> list[str]:
        """Return the tiers but the shortest."""
        return [self._topics.retry(tier) for tier in TIERS if tier != tiers.SHORTEST]

    async def _bring_on(
        self, scan: Scan, runs: Collection[Run], ends: Mapping[str, int], outcomes: KickOutcomes
    ) -> bool:
        """Inject what the runs of a kick are for of the tiers but the shortest. False where it isn't to go on here."""
        for topic in self._longer():
            commits = await self._commits(topic)
            starts = {place: min([run.told.get(place, 0) for run in runs]) for place in ends}
            for place, commit in commits.items():
                starts[place] = max(starts.get(place, 0), commit.base)
            if not await scan.go(topic, starts, ends, self._kicked(runs, commits, outcomes)):
                return False
        return True

    async def _kick_outcomes(self, ends: Mapping[str, int], since: float) -> KickOutcomes:
        """Follow what kicks bring on, from these ends of the tiers on, knowing what was written since a time before."""
        others: dict[str, int] = {}
        for topic in (self._topics.parked, self._topics.dead):
            others |= await ends_of_readable(self._log, topic)
        starts = {**ends, **others}
        outcomes = KickOutcomes(
            self._log, shortest=self._topics.retry(tiers.SHORTEST), dead=self._topics.dead, starts=starts
        )
        partitions: dict[str, list[int]] = defaultdict(list)
        for place in starts:
            topic, _, number = place.rpartition("/")
            partitions[topic].append(int(number))
        earlier: dict[str, int] = {}
        for topic, numbers in partitions.items():
            offsets = await self._log.offsets_at(topic, since, numbers)
            earlier |= {f"{topic}/{number}": min(at, starts[f"{topic}/{number}"]) for number, at in offsets.items()}
        await outcomes.look_back(earlier, self._sleep)
        return outcomes

    def _dropping(self) -> Collection[str]:
        """Return the routes that drop what gets some answers."""
        routes = self._rules().routes.values()
        return {route.name for route in routes if Disposition.DROP in dict(route.retry.results).values()}

    def _rate(self, name: str) -> float | None:
        """Return the rate that limits what waits for a name, if it is one."""
        kind, _, called = name.partition("/")
        rules = self._rules()
        route = rules.routes.get(called)
        names = (called,) if kind == "destination" else () if route is None else route.destinations
        rates = {rules.destinations[each].rate for each in names if each in rules.destinations}
        return rates.pop() if len(rates) == 1 else None

    async def _hold(self, runs: Collection[Run], ends: Mapping[str, int], near: Mapping[str, int]) -> None:
        """Announce what kicks are about to scan."""
        for run in runs:
            name = f"hold/{run.order.key}"
            at = self._log.now()
            await self._publish(Order(kind="marker", name=name, state="done", at=at, marker=ends, hurried=near))

    def _kicked(self, runs: Collection[Run], commits: Mapping[str, Commit], outcomes: KickOutcomes) -> Pick:
        def pick(partition: Partition, record: Record) -> Picked:
            commit = commits.get(partition_key(partition))
            stored = None if commit is not None and commit.covers(record.offset) else filed_in(record)
            if stored is None:
                return NOTHING
            delivery = stored.delivery
            names = (f"route/{delivery.route}", f"destination/{delivery.destination}")
            counting = [run for run in runs if run.order.name in names and not run.is_beyond(partition, record.offset)]
            if not counting or self._control.is_kicked(delivery.route, delivery.destination, partition, record.offset):
                return NOTHING
            for run in counting:
                outcomes.follow(run.order.name, delivery)
            # For how long its names are unknown goes on: kicked every hour, it would never end.
            note = Note(unknown_since=stored.note.unknown_since)
            return Picked(counting, self._again(delivery, at_once=True), note)

        return pick

    async def _count(self, runs: Sequence[Run], topic: str, ends: Mapping[str, int], outcomes: KickOutcomes) -> None:
        """Count what waits in the shortest tier for each of these."""
        named = {run.order.name: run for run in runs}
        commits = await self._commits(topic)
        looked = 0
        for place, end in ends.items():
            commit = commits.get(place, Commit(0))
            partition = Partition(topic, int(place.rpartition("/")[2]))
            async with aclosing(records_of(self._log, partition, commit.base, end)) as records:
                async for record in records:
                    looked += 1
                    if looked % RECORDS_AT_ONCE == 0:
                        await self._sleep(0)
                    stored = None if commit.covers(record.offset) or is_newer(record) else filed_in(record)
                    if stored is None or stored.note.is_hurried or outcomes.is_superseded(stored.delivery):
                        continue  # an earlier kick has counted it, or it is counted where it waits by now
                    for name in (f"route/{stored.delivery.route}", f"destination/{stored.delivery.destination}"):
                        if name in named:
                            named[name].count += 1
                            outcomes.follow(name, stored.delivery, place, record.offset)

    async def settle(self, order: Order, owner: object) -> None:
        """Inject the dead letters that an order is for, with a life of their own, or give them up."""
        run = self._run(order)
        now = self._log.now()

        def pick(partition: Partition, record: Record) -> Picked:
            letter, stored = read_letter(record)
            if letter.reason == NEWER:
                decode_delivery(record)  # which raises
            if not order.is_for(letter) or self._control.settled(letter, partition, record.offset):
                return NOTHING
            if order.action == "drop" or stored is None:
                return Picked((run,))
            return Picked((run,), self._again(replace(stored.delivery, attempts=(), since=now), at_once=True))

        scan = self._scan([run], lambda: self._owner() is owner)
        await self._ends(scan, self._topics.dead)
        if await scan.go(self._topics.dead, run.told, order.marker, pick):
            await self._end(scan, run, "done")

    # What they share.

    def _run(self, order: Order) -> Run:
        """Go on from the marker of an order's key; what the last job counted stands until it has answered."""
        key = order.key
        told = self._control.marker(key)
        return Run(
            order=order,
            answers=self._position(),
            detail=self._uncounted(order),
            positions=dict(told),
            count=self._control.injected(key) if order.kind == "replay" or self._control.is_begun(key) else 0,
            told=told,
            before=told,
        )

    def _uncounted(self, order: Order) -> str:
        """Tell what an order is for beside what its job counts: what waits for its order waits in no topic."""
        kind, _, name = order.name.partition("/")
        if order.kind not in ("kick", "pause"):
            return ""
        ordered = [
            route.name
            for route in self._rules().routes.values()
            if route.order is not None and name in ((route.name,) if kind == "route" else route.destinations)
        ]
        return ", ".join(ordered)

    def _scan(
        self,
        runs: Collection[Run],
        is_wanted: Callable[[], bool],
        *,
        is_hurried: bool = False,
        state: State = "asked",
    ) -> Scan:
        return Scan(
            log=self._log,
            control=self._control,
            injector=self._injector,
            publish=self._publish,
            is_wanted=is_wanted,
            logger=self._logger,
            sleep=self._sleep,
            leave=self._successors.unreadable.leave,
            runs=runs,
            is_hurried=is_hurried,
            state=state,
        )

    async def _end(self, scan: Scan, run: Run, state: State) -> None:
        """Tell that a job is through: by its order's end, or where a newer one may stand there, by the last marker."""
        order = run.order
        if order.kind != "dead":
            await scan.tell(run, "done", is_last=True)
        elif scan.is_wanted() and self._control.is_asked(order):
            done = order.with_state(state, count=run.count)
            if scan.left:
                done = replace(done, marker={**done.marker, **scan.left}, detail=LEFT)
            missed = {
                place: reached
                for place in scan.unread
                if order.marker.get(place, 0) > (reached := run.positions.get(place, 0))
            }
            done = replace(done, marker={**done.marker, **missed}, unread=order.unread + len(missed))
            await self._publish(done)
        told = {} if run.outcome is None else {"tried": run.outcome.tried, "waiting": dict(run.outcome.waits)}
        self._logger.info("job_finished", order=order.key, state=state, count=run.count, detail=run.detail, **told)

    async def _ends(self, scan: Scan, topic: str) -> dict[str, int]:
        """Return the ends of what can be read of a topic; the rest is left out of the scan, and of what is told of it.

        Raises LogUnavailableError for what couldn't be read only a moment ago.
        """
        bounds, unread = await self._patient.readable(topic)
        scan.unread |= {f"{topic}/{number}" for number in unread}
        return {f"{topic}/{number}": end for number, (_, end) in bounds.items()}

    async def _pass(self, seconds: float, owner: object) -> bool:
        """Let some time pass. False if the jobs are another's meanwhile."""
        until = self._log.now() + seconds
        while self._owner() is owner:
            left = until - self._log.now()
            if left <= 0:
                return True
            await self._sleep(min(left, GLANCE_INTERVAL))
        return False

    async def _commits(self, topic: str) -> dict[str, Commit]:
        commits = await self._log.committed(self._topics.group(ROUTER_GROUP), topic)
        return {f"{topic}/{number}": commit for number, commit in commits.items()}

    def _again(self, delivery: Delivery, *, at_once: bool) -> Delivery:
        """Return what is injected of a delivery: due now, or not before it was due anyway."""
        now = self._log.now()
        return replace(delivery, successor=delivery.successor + 1, due=now if at_once else max(now, delivery.due))
