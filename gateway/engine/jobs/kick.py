"""Kick: put what waits in the tiers for a route or a destination into the shortest tier, to be retried now."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing

from gateway.engine import tiers
from gateway.engine.control.records import Order, partition_key
from gateway.engine.jobs.dead_letters import filed_in
from gateway.engine.jobs.kick_outcomes import KickOutcomes
from gateway.engine.jobs.log_reader import RECORDS_AT_ONCE, records_of
from gateway.engine.jobs.scan import NOTHING, Pick, Picked, Run, Scan, ScanningJob, ends_of_readable
from gateway.log.base import Commit, Partition, Record
from gateway.log.records import is_newer
from gateway.log.topics import ROUTER_GROUP, TIERS
from gateway.model import (
    Disposition,
    Note,
)

HOLD = 2.5
"""Seconds from a kick's announcement to its scan: a quick attempt, a commit every second, and the news on its way.

An attempt that takes longer is repeated; the operator who kicks a destination that hangs isn't to wait for it."""
COMMITTED_BY = 2.5
"""Seconds in which what is done has been committed."""
GLANCE_INTERVAL = 0.1


class Kicks(ScanningJob):
    """One job for all kicks that are asked for."""

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

        scan = self._scan(runs, is_wanted, is_expedited=True)
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
            await self._publish(Order(kind="marker", name=name, state="done", at=at, marker=ends, expedited=near))

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
                    if stored is None or stored.note.is_expedited or outcomes.is_superseded(stored.delivery):
                        continue  # an earlier kick has counted it, or it is counted where it waits by now
                    for name in (f"route/{stored.delivery.route}", f"destination/{stored.delivery.destination}"):
                        if name in named:
                            named[name].count += 1
                            outcomes.follow(name, stored.delivery, place, record.offset)

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
