"""Kick: put what waits in the retry tiers for a route or destination into the shortest tier, due now."""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from gateway.engine import tiers
from gateway.engine.control.records import ControlRecord, announcement_key, partition_key
from gateway.engine.jobs.dead_letters import delivery_in
from gateway.engine.jobs.job_progress import NOTHING, JobProgress, Picked
from gateway.engine.jobs.kick_outcomes import MIN_EARLIER_RECORDS, KickOutcomes
from gateway.engine.jobs.log_reader import RECORDS_PER_STEP, records_of
from gateway.engine.jobs.scan import STUCK_AFTER, JobServices, Pick, Scan, ScanningJob, at_once, ends_of_readable
from gateway.log.base import Commit, Partition, Record
from gateway.log.records import is_newer
from gateway.log.topics import ROUTER_GROUP, TIERS
from gateway.model import Disposition, RecordMetadata

KICK_DELAY = 2.5
"""Seconds from a kick's announcement to its scan, for a short attempt, the next commit, and propagation.

A delivery whose attempt takes longer is delivered twice: operators who kick a hanging destination shouldn't have to
wait for it.
"""
MAX_KICKS = 200
"""Maximum kicks of one job: announcements and heartbeats of all of them are published in the time of a heartbeat."""
COMMIT_LAG = 2.5
"""Seconds within which completed records are committed."""
STUCK_BACKOFF = 20.0
"""Seconds for which a kick that could inject nothing backs off."""
OWNER_POLL_INTERVAL = 0.1
"""Seconds between checks whether this process still owns the jobs, while it waits."""


class Kicks(ScanningJob):
    """One job for all open kicks."""

    def __init__(self, services: JobServices) -> None:
        super().__init__(services)
        self._backing_off_until: dict[str, float] = {}
        """The keys of kicks that could inject nothing, each with the time of its next try (in the loop's time)."""

    def ready_commands(self) -> list[ControlRecord]:
        """Return the kicks to carry out now, by one job: the oldest ones."""
        now = asyncio.get_running_loop().time()
        self._backing_off_until = {key: until for key, until in self._backing_off_until.items() if now < until}
        pending = self._control.pending("kick")
        return [command for command in pending if command.key not in self._backing_off_until][:MAX_KICKS]

    async def kick(self, owner: object) -> None:
        """Expedite the deliveries in the tiers of the targeted names: one job for all kicks that are asked for.

        Those in the shortest tier come out within 5 s anyway; they are only marked as due.
        """
        control = self._control
        commands = self.ready_commands()
        if not commands:
            return  # the previous owner has completed them
        firsts = await self._first_records(self._longer_tiers(), commands)
        runs = [self._progress_of(command, firsts, detail=self._ordered_routes_of(command)) for command in commands]
        shortest = self._topics.retry(tiers.SHORTEST)

        def is_wanted() -> bool:
            return self._owner() is owner and any(control.has_pending(run.command.key) for run in scan.runs)

        # Routers hold back announced records while the kick's heartbeats keep coming. Once they may have released some,
        # it starts over with a new announcement, and with what is committed by then.
        scan = self._new_scan(runs, is_wanted, is_expedited=True, gives_up=lambda: scan.is_heartbeat_overdue)
        shortest_ends = await self._end_offsets(scan, shortest)
        longer_ends: dict[str, int] = {}
        for topic in self._longer_tiers():
            longer_ends |= await self._end_offsets(scan, topic)
        # Look back before the wait: a delivery that comes due meanwhile, and whose completion isn't committed yet, may
        # be parked or dead afterwards.
        outcomes = await self._start_outcomes(shortest_ends | longer_ends, self._log.now() - COMMIT_LAG)
        # Deliveries that come due in the shortest tier meanwhile go out anyway, as the kick has lifted the holds.
        unannounced = self._unannounced(runs)
        await self._count_shortest(unannounced, shortest, shortest_ends, outcomes)
        # From here on routers don't release these records, and what they released before is committed after the wait.
        # Otherwise some would be delivered twice.
        await self._announce(runs, longer_ends, shortest_ends)
        if not await self._sleep_while_owner(KICK_DELAY, owner):
            return
        # An evicted owner that didn't know it yet may have completed some of these kicks; their deliveries then
        # come when they are due.
        scan.runs = [run for run in runs if control.has_pending(run.command.key)]
        if not scan.runs or not await self._expedite(scan, scan.runs, longer_ends, outcomes):
            if scan.is_heartbeat_overdue and self._owner() is owner:
                await self._back_off(scan.runs)
            return
        await scan.publish_checkpoints()  # before polling: an interruption while polling expedites nothing twice
        await outcomes.poll(lambda: self._commits(shortest), is_wanted=scan.is_wanted, sleep=self._sleep)
        for run in scan.runs:
            # What the previous owner has injected isn't tracked, and copies of it are dropped as duplicates: it would
            # look delivered.
            if run in unannounced:
                run.outcome = outcomes.of(run.command.name, run.count, dropping=self._dropping_routes())
            run.rate = self._rate(run.command.name)
        await at_once([self._finish_job(scan, run, "done") for run in scan.runs])

    def _unannounced(self, runs: Iterable[JobProgress]) -> Sequence[JobProgress]:
        """Return the runs that were neither announced nor begun; announced ones get the count of their announcement."""
        unannounced = []
        for run in runs:
            announced = self._control.announced(run.command.key)
            if self._control.is_begun(run.command.key):
                continue
            if announced is None:
                unannounced.append(run)
            else:  # what was counted then may have left the tier by now
                run.count = announced.count
        return unannounced

    async def _back_off(self, runs: Collection[JobProgress]) -> None:
        """Let kicks back off: others take their turn, and what they have announced is released when due."""
        until = asyncio.get_running_loop().time() + STUCK_BACKOFF
        self._backing_off_until |= dict.fromkeys([run.command.key for run in runs], until)
        for run in runs:
            error = f"expected the log to acknowledge the expedited deliveries within {STUCK_AFTER:g} s"
            self._logger.warning("job_retried", command=run.command.key, error=error)
        announced = [self._control.announced(run.command.key) for run in runs]
        await at_once([self._publish(replace(each, checkpoint={})) for each in announced if each is not None])

    def _longer_tiers(self) -> list[str]:
        """Return the tiers except the shortest."""
        return [self._topics.retry(tier) for tier in TIERS if tier != tiers.SHORTEST]

    async def _expedite(
        self, scan: Scan, runs: Collection[JobProgress], longer_ends: Mapping[str, int], outcomes: KickOutcomes
    ) -> bool:
        """Inject the matching deliveries of all but the shortest tier. Return False if the job must stop here."""
        for topic in self._longer_tiers():
            commits = await self._commits(topic)
            starts = {
                partition_name: min([run.positions.get(partition_name, 0) for run in runs])
                for partition_name in longer_ends
            }
            for partition_name, commit in commits.items():
                starts[partition_name] = max(starts.get(partition_name, 0), commit.base)
            if not await scan.scan_topic(topic, starts, longer_ends, self._pick_kicked(runs, commits, outcomes)):
                return False
        return True

    async def _start_outcomes(self, ends: Mapping[str, int], since: float) -> KickOutcomes:
        """Track outcomes from these end offsets on; first read what was appended since a time."""
        others: dict[str, int] = {}
        for topic in (self._topics.parked, self._topics.dead):
            others |= await ends_of_readable(self._log, topic)
        starts = {**ends, **others}
        outcomes = KickOutcomes(
            self._log,
            topics=[*map(self._topics.retry, TIERS), self._topics.parked, self._topics.dead],
            shortest=self._topics.retry(tiers.SHORTEST),
            dead=self._topics.dead,
            starts=starts,
            since=since,
        )
        partitions: dict[str, list[int]] = defaultdict(list)
        for partition_name in starts:
            topic, _, number = partition_name.rpartition("/")
            partitions[topic].append(int(number))
        earlier: dict[str, int] = {}
        for topic, numbers in partitions.items():
            offsets = await self._log.offsets_at(topic, since, numbers)
            back = {number: starts[f"{topic}/{number}"] - MIN_EARLIER_RECORDS for number in offsets}
            earlier |= {f"{topic}/{number}": min(at, back[number]) for number, at in offsets.items()}
        await outcomes.read_earlier(earlier, self._sleep)
        return outcomes

    def _dropping_routes(self) -> Collection[str]:
        """Return the routes whose policy drops deliveries on certain responses."""
        routes = self._rules().routes.values()
        return {route.name for route in routes if Disposition.DROP in dict(route.retry.results).values()}

    def _rate(self, name: str) -> float | None:
        """Return the rate of the destination of a name, if there is exactly one."""
        kind, _, target_name = name.partition("/")
        rules = self._rules()
        route = rules.routes.get(target_name)
        names = (target_name,) if kind == "destination" else () if route is None else route.destinations
        rates = {rules.destinations[each].rate for each in names if each in rules.destinations}
        return rates.pop() if len(rates) == 1 else None

    async def _announce(
        self, runs: Collection[JobProgress], longer_ends: Mapping[str, int], shortest_ends: Mapping[str, int]
    ) -> None:
        """Announce what kicks are about to scan: as of one moment, so that ordered routes act on all of them once."""
        at = self._log.now()
        announcements = []
        for run in runs:
            run.last_heartbeat_at = at
            announcement = ControlRecord(
                kind="checkpoint",
                name=announcement_key(run.command.key),
                state="done",
                at=at,
                checkpoint=longer_ends,
                expedited=shortest_ends,
                count=run.count,
                covers_commands_below=self._control_offset(),
            )
            announcements.append(self._publish(announcement))
        await at_once(announcements)

    def _pick_kicked(
        self, runs: Collection[JobProgress], commits: Mapping[str, Commit], outcomes: KickOutcomes
    ) -> Pick:
        def pick(partition: Partition, record: Record) -> Picked:
            commit = commits.get(partition_key(partition))
            stored = None if commit is not None and commit.covers(record.offset) else delivery_in(record)
            if stored is None:
                return NOTHING
            delivery = stored.delivery
            route, destination = delivery.kick_target
            names = (f"route/{route}", f"destination/{destination}")
            matching_runs = [run for run in runs if run.command.name in names and not run.is_covered(partition, record)]
            args = (route, destination, partition, record.offset, record.appended_at)
            if not matching_runs or self._control.was_injected_by_kick(*args):
                return NOTHING
            for run in matching_runs:
                outcomes.track(run.command.name, delivery)
            # Keep `unknown_since`: if each kick reset it, a delivery kicked every hour would never expire.
            metadata = RecordMetadata(unknown_since=stored.metadata.unknown_since)
            return Picked(matching_runs, self._successor_of(delivery, immediately=True), metadata)

        return pick

    async def _count_shortest(
        self, runs: Sequence[JobProgress], topic: str, ends: Mapping[str, int], outcomes: KickOutcomes
    ) -> None:
        """Count the deliveries in the shortest tier for each run's name."""
        named = {run.command.name: run for run in runs}
        commits = await self._commits(topic)
        scanned = 0
        for partition_name, end in ends.items():
            commit = commits.get(partition_name, Commit(0))
            partition = Partition(topic, int(partition_name.rpartition("/")[2]))
            async with aclosing(records_of(self._log, partition, commit.base, end)) as records:
                async for record in records:
                    scanned += 1
                    if scanned % RECORDS_PER_STEP == 0:
                        await self._sleep(0)
                    stored = None if commit.covers(record.offset) or is_newer(record) else delivery_in(record)
                    if stored is None or stored.metadata.is_expedited or outcomes.has_newer_successor(stored.delivery):
                        continue  # an earlier kick has counted it, or it is counted where it waits now
                    route, destination = stored.delivery.kick_target
                    for name in (f"route/{route}", f"destination/{destination}"):
                        if name in named:
                            named[name].count += 1
                            outcomes.track(name, stored.delivery, partition_name, record.offset)

    async def _sleep_while_owner(self, seconds: float, owner: object) -> bool:
        """Let some time pass. False if this process has lost ownership of the jobs in the meantime."""
        until = self._log.now() + seconds
        while self._owner() is owner:
            remaining = until - self._log.now()
            if remaining <= 0:
                return True
            await self._sleep(min(remaining, OWNER_POLL_INTERVAL))
        return False

    async def _commits(self, topic: str) -> dict[str, Commit]:
        commits = await self._log.committed(self._topics.group(ROUTER_GROUP), topic)
        return {f"{topic}/{number}": commit for number, commit in commits.items()}
