"""Replay events from the log: scan a window of it, match by the rules in force, and inject deliveries anew.

    scan ──▶ match ──▶ piece (≤ 100) ──pace──▶ shortest tier, acknowledged ──▶ marker, at 500 or after 1 s

The marker is published after what it covers was acknowledged, so a replay that is killed goes on from there: it repeats
at most what came after the marker, and skips nothing. Where it goes on is told by the orders in force and their markers
alone, never by what the group of jobs has committed. One replay runs at a time, in the order in which they were asked
for, beside all other jobs.

A partition of events that can't be read is passed over. The replay isn't complete without: it says so by its marker,
lets the next one begin, and goes on with that partition once it can. What is undelivered is told without those dead
letters and sightings that can't be read; what that leaves out is told with its end.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from structlog.typing import FilteringBoundLogger

from gateway.engine import tiers
from gateway.engine.commit_progress import WINDOW
from gateway.engine.control.records import DeadFilter, Order, Selection, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.injector import APPENDS_AT_ONCE, Injector
from gateway.engine.jobs.log_reader import BATCH, MARK_EVERY, PIECE_BYTES, RECORDS_AT_ONCE, TURN, records_of
from gateway.engine.jobs.replay_matcher import Matched, Matcher
from gateway.engine.jobs.shared_identities import Identities
from gateway.engine.jobs.undelivered import Dead, Undelivered, open_letters, sighted_of
from gateway.engine.successor_writer import SuccessorWriter
from gateway.engine.unavailable_partitions import Patient
from gateway.log.base import Commit, Log, Partition, Record
from gateway.log.records import decode_event
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import (
    DeadLettered,
    DeadReason,
    Delivery,
    ExpressionError,
    LogUnavailableError,
    NewerRecordError,
    Note,
    UnreadableRecordError,
    delivery_id,
    identity_of,
)
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import Rules

BACKLOG = WINDOW // 2
"""Unfinished records of one partition of the shortest tier above which a replay waits. A window that is three quarters
full cuts deliveries short, so a replay may take half of it; with the tier's 5 s, that is 1,300 deliveries a second."""
RATE_STEP = 0.02
"""Seconds of a rate that are injected at once, at least one delivery; also how much later than its time may be made up
for. So within any second it's at most 4 % more than the rate, or two deliveries."""
GLANCE_INTERVAL = 0.1
"""Seconds between looks, while it waits for its turn, at whether the replay is still to go on."""
POLL_INTERVAL = 0.25
"""Seconds between looks for a replay, or for room in the tier."""
LOOKBACK = 20_000
"""Records before an event among which another one of its identity is looked for: some 0.3 s, once in a partition."""
RECHECK_AFTER = 30.0
"""Seconds after which a replay that has come to a record of a newer version looks whether it may go on."""
READ_AGAIN = 5.0
"""Seconds after which one that waits for partitions looks whether they can be read."""
REVOKE_GRACE = 2.0
"""Seconds that a replay has to come to a marker when its process gives the jobs up: an append or two."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """One replay under way. All below `positions` is injected; `reached` adds what the piece in hand covers.

    `told` and `marked` are the positions and the count of the last marker, and `settled` the dead letters whose
    deliveries were injected since. `unread` are the partitions of events that it has to do without for now,
    `told_unread` is how many the last marker tells, and `missed` are those of letters and sightings that it lacks.
    `text` is the route as an edition has it, "" once it has changed. `identities` are those of the partition in hand,
    once they matter. `next_at` is in the loop's time: the log's steps a little where its estimate of the brokers' clock
    is fixed, and a rate would go with it.
    """

    order: Order
    selection: Selection
    owner: object
    matcher: Matcher
    dead: Dead
    positions: dict[str, int]
    count: int
    told: Mapping[str, int]
    marked: int
    marked_at: float
    unread: Mapping[str, str]
    told_unread: int
    missed: frozenset[str]
    text: str | None = None
    next_at: float = 0.0
    unchecked: int = BATCH
    piece: list[Matched] = field(default_factory=list)
    piece_bytes: int = 0
    reached: dict[str, int] = field(default_factory=dict)
    settled: list[str] = field(default_factory=list)
    identities: Identities | None = None

    @property
    def deliveries(self) -> int:
        return sum([len(matched.destinations) for matched in self.piece])

    @property
    def is_full(self) -> bool:
        most = min(APPENDS_AT_ONCE, BATCH - (self.count - self.marked))
        if self.selection.rate is not None:
            most = min(most, max(1, int(self.selection.rate * RATE_STEP)))
        return self.deliveries >= most or self.piece_bytes >= PIECE_BYTES


class Replays:
    """The replays that are asked for. `run` for ever; they go on while `owner` returns the same, which isn't None.

    `publish` appends to the control topic, and `caught_up` waits until `control` knows all that is there now.
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
        publish: Callable[[Order], Awaitable[object]],
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
        self._publish = publish
        self._caught_up = caught_up
        self._owner = owner
        self._logger = logger
        self._sleep = sleep
        self._patient = Patient(log)
        self._waiting: dict[str, float] = {}
        """The replays that wait for partitions, each until it looks again (in the loop's time)."""
        self.under_way: str | None = None
        """The key of the replay that is under way here."""

    async def run(self) -> None:
        """Make the replays, one after the other, whenever the jobs are ours."""
        while True:
            owner = self._owner()
            order = None if owner is None else self._next()
            if order is None:
                await self._sleep(POLL_INTERVAL)
                continue
            try:
                await self._caught_up()  # with the last marker of the owner before us, and what we have ended ourselves
                if self._owner() is owner and self._next() == order:
                    await self._replay(order, owner)
            except LogUnavailableError as error:
                self._logger.warning("job_retried", order=order.key, error=str(error))
                await self._sleep(1.0)
            except NewerRecordError as error:
                self._logger.warning("replay_waits", order=order.key, error=str(error))
                await self._sleep(RECHECK_AFTER)

    def _next(self) -> Order | None:
        now = asyncio.get_running_loop().time()
        return self._control.next_replay([key for key, until in self._waiting.items() if now < until])

    async def let_go(self) -> None:
        """Wait until a replay that isn't ours any more has come to a marker, for at most 2 s."""
        until = asyncio.get_running_loop().time() + REVOKE_GRACE
        while self.under_way is not None and asyncio.get_running_loop().time() < until:
            await self._sleep(0.01)

    async def _replay(self, order: Order, owner: object) -> None:
        """Go on with a replay from its marker, to its end or until something else stops it."""
        selection = order.selection
        assert selection is not None, order
        count, marker = self._control.injected(order.key), self._control.marker(order.key)
        positions = {**selection.starts, **marker}
        left = {place for place, end in order.marker.items() if positions.get(place, 0) < end}
        unread = await self._unread_of(left)
        told_unread, missed = self._control.unread(order.key), self._control.missed(order.key)
        if left and left == unread.keys() and len(unread) == told_unread:
            self._wait(order, unread)
            return
        dead, known = Dead(), None
        if selection.undelivered:
            readable = self._patient.readable
            dead = await open_letters(self._log, self._topics, self._control, selection, readable=readable)
            sighted = await sighted_of(
                self._log, self._topics, selection, order.marker, readable=readable, sleep=self._sleep
            )
            known = Undelivered(self._control, selection.route, dead, sighted=sighted, rules=self._rules, key=order.key)
            missed |= dead.unread | sighted.unread
        run = _Run(
            order=order,
            selection=selection,
            owner=owner,
            matcher=Matcher(selection, known),
            dead=dead,
            text=self._control.replayed_as(order.key) if marker and marker != selection.starts else None,
            positions=positions,
            count=count,
            told=marker,
            marked=count,
            marked_at=self._log.now(),
            unread=unread,
            told_unread=told_unread,
            missed=missed,
        )
        self.under_way = order.key
        try:
            self._logger.info("replay_began", order=order.key, count=count)
            ending = await self._scan(run)
        except LogUnavailableError:
            await self._mark(run)
            raise
        finally:
            self.under_way = None
        if ending is not None:
            await self._publish(ending)
            self._logger.info(
                "job_finished", order=order.key, state=ending.state, count=ending.count, detail=ending.detail
            )
        elif run.unread and self._goes_on(run):
            self._wait(order, run.unread)

    async def _unread_of(self, places: Collection[str]) -> Mapping[str, str]:
        """Return which of these partitions can't be read, and why."""
        found: dict[str, str] = {}
        for topic in {place.rpartition("/")[0] for place in places}:
            _, unread = await self._patient.readable(topic)
            found |= {f"{topic}/{number}": reason for number, reason in unread.items()}
        return {place: found[place] for place in sorted(found.keys() & places)}

    def _wait(self, order: Order, unread: Mapping[str, str]) -> None:
        """Let a replay wait for what it can't read, and others take their turn meanwhile."""
        if order.key not in self._waiting:
            first, reason = next(iter(unread.items()))
            others = f", and {len(unread) - 1} more" if len(unread) > 1 else ""
            self._logger.warning("replay_waits", order=order.key, error=f"{first}{others}: {reason}")
        asked = {each.key for each in self._control.asked("replay")}
        self._waiting = {key: until for key, until in self._waiting.items() if key in asked}
        self._waiting[order.key] = asyncio.get_running_loop().time() + READ_AGAIN

    async def _scan(self, run: _Run) -> Order | None:
        """Inject what is left of a replay; return its end, None where it isn't to go on here."""
        looked, until = 0, self._log.now() + TURN
        for place, end in sorted(run.order.marker.items()):
            start = run.positions.get(place, 0)
            if start >= end or place in run.unread:
                continue
            topic, _, number = place.rpartition("/")
            partition = Partition(topic, int(number))
            run.identities = None
            async with aclosing(records_of(self._log, partition, start, end)) as records:
                async for record in records:
                    problem = run.matcher.use(self._rules())
                    if problem is not None:
                        await self._mark(run)
                        return run.order.with_state("cancelled", count=run.count, detail=problem)
                    await self._take(run, partition, record)
                    looked += 1
                    if looked % RECORDS_AT_ONCE == 0 or self._log.now() > until:
                        await self._sleep(0)
                        until = self._log.now() + TURN
                    is_due = run.is_full or self._log.now() >= run.marked_at + MARK_EVERY
                    if is_due and not await self._inject(run):
                        return None
            run.reached[place] = end
            if not await self._inject(run):
                return None
        await self._mark(run)
        if run.unread or not self._goes_on(run):
            return None
        unread = run.order.unread + len(run.missed)
        return run.order.with_state("done", count=run.count, unread=unread, detail=_listed(run.missed))

    async def _match(self, run: _Run, partition: Partition, record: Record) -> Matched | None:
        try:
            return run.matcher.match(partition, record)
        except NewerRecordError as error:
            await self._inject(run)  # what comes before it
            await self._mark(run)
            self._successors.undecodable.report_newer(partition, record.offset, error)
            raise

    async def _take(self, run: _Run, partition: Partition, record: Record) -> None:
        """Add an event to the piece in hand, if it is to be replayed."""
        run.text = run.matcher.text if run.text in (None, run.matcher.text) else ""
        matched, place = await self._match(run, partition, record), f"{partition.topic}/{partition.number}"
        if matched is not None and run.identities is None and identity_of(matched.event.id) is not None:
            run.identities = await self._identities_before(run, partition, record.offset)
        told_apart_by = None if run.identities is None else self._offset_in_id(run.identities, record)
        if matched is not None and run.selection.undelivered:
            matched = matched.undelivered()
        if matched is not None and matched.destinations:
            if told_apart_by is not None:
                matched = matched._replace(place=f"{place}@{told_apart_by}")
            run.piece.append(matched)
            run.piece_bytes += len(matched.event.body)
        run.reached[place] = record.offset + 1

    async def _identities_before(self, run: _Run, partition: Partition, offset: int) -> Identities:
        """Look at what came before a record, and may have its identity, injected or not."""
        bounds, unread = await self._log.readable(partition.topic)
        if partition.number in unread:
            raise LogUnavailableError(f"{partition_key(partition)}: {unread[partition.number]}")
        first, _ = bounds.get(partition.number, (offset, offset))
        # Of what is deleted an owner before may have injected some, under the ids of identities.
        is_cut = first > run.selection.starts.get(partition_key(partition), 0)
        identities, looked = Identities(first + LOOKBACK if is_cut else 0), 0
        start = max(first, offset - LOOKBACK)
        async with aclosing(records_of(self._log, partition, start, offset)) as records:
            async for record in records:
                self._offset_in_id(identities, record)
                looked += 1
                if looked % RECORDS_AT_ONCE == 0:
                    await self._sleep(0)
        return identities

    def _offset_in_id(self, identities: Identities, record: Record) -> int | None:
        """Return what tells an event from others of its identity, by the log and by the rules in force."""
        try:
            event = decode_event(record)
        except UnreadableRecordError:
            return None

        def window() -> float | None:
            source = self._rules().sources.get(event.source)
            # Where the rules tell its identity otherwise by now, it is no copy by them.
            return source.dedupe if source is not None and EventBuilder(source).knows(event) else None

        return identities.offset_in_id(event, record, window)

    def _goes_on(self, run: _Run) -> bool:
        return self._owner() is run.owner and self._control.orders.get(run.order.key) == run.order

    async def _inject(self, run: _Run) -> bool:
        """Inject the piece in hand when its time has come, and mark. False where the replay isn't to go on here."""
        if not run.piece or (await self._is_due(run) and await self._append(run)):
            run.positions.update(run.reached)
            run.reached.clear()
            if self._goes_on(run) and run.count - run.marked < BATCH and self._log.now() < run.marked_at + MARK_EVERY:
                return True
        await self._mark(run)
        return not run.piece and self._goes_on(run)

    async def _is_due(self, run: _Run) -> bool:
        """Wait for the rate, and for room in the tier."""
        while self._goes_on(run):
            wait = run.next_at - asyncio.get_running_loop().time()
            if wait <= 0:
                if run.unchecked < BATCH:
                    return True
                if await self._unfinished() < BACKLOG:
                    run.unchecked = 0
                    return True
                wait = POLL_INTERVAL
            await self._sleep(min(wait, GLANCE_INTERVAL))
        return False

    async def _append(self, run: _Run) -> bool:
        def is_wanted() -> bool:
            return self._owner() is run.owner

        order, now = run.order, self._log.now()
        # Numbered from a place of this replay's own: what is still on its way of the original, or of another replay,
        # isn't taken for a copy of these. A piece that is injected twice is.
        first = int(order.at * 1000)
        note = Note(replay=order.name)
        deliveries = [
            (
                Delivery(
                    id=delivery_id(matched.event.id, run.selection.route, destination, matched.place),
                    event=matched.event,
                    route=run.selection.route,
                    destination=destination,
                    successor=first,
                    due=now,
                    since=now,
                ),
                note,
            )
            for matched in run.piece
            if matched.error is None
            for destination in matched.destinations
        ]
        if not await self._injector.inject(deliveries, is_wanted):
            return False
        for matched in run.piece:
            if matched.error is not None and not await self._fail(run, matched, matched.error, is_wanted):
                return False
        for matched in run.piece:
            for destination in matched.destinations:
                run.settled += run.dead.of(matched.event, destination)
        run.count += len(deliveries)
        run.unchecked += len(deliveries)
        if run.selection.rate is not None:
            # What a sleep took too long may be made up for, or the rate would never be reached. It counts from the
            # acknowledgement on: whenever the log has stored these, it was before that.
            done_at = asyncio.get_running_loop().time()
            run.next_at = max(run.next_at, done_at - RATE_STEP) + len(deliveries) / run.selection.rate
        run.piece.clear()
        run.piece_bytes = 0
        return True

    async def _fail(self, run: _Run, matched: Matched, error: ExpressionError, is_wanted: Callable[[], bool]) -> bool:
        """Dead-letter what no condition can decide on, as the router does."""
        end = DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error))
        event, route = matched.event, run.selection.route
        for name in matched.destinations:
            identity = delivery_id(event.id, route, name, matched.place)
            delivery = Delivery(id=identity, event=event, route=route, destination=name)
            if not await self._successors.dead_letter(delivery, end, is_wanted):
                return False
        return True

    async def _mark(self, run: _Run) -> None:
        """Publish how far the replay has come: true for any owner of the jobs, and where the next one goes on."""
        order = run.order
        while run.positions != run.told or len(run.unread) != run.told_unread:
            marker = Order(
                kind="marker",
                name=order.key,
                state="done",
                at=self._log.now(),
                marker=dict(run.positions),
                count=run.count,
                routes=run.text or "",
                unread=len(run.unread),
                detail=_listed(run.missed),
            )
            try:
                if run.settled:
                    await self._publish(_settlement(run))
                    run.settled.clear()
                await self._publish(marker)
            except LogUnavailableError as error:
                if self._owner() is not run.owner:
                    return
                self._logger.warning("append_retried", order=order.key, error=str(error))
                await self._sleep(1.0)
            else:
                run.told, run.marked, run.told_unread = marker.marker, marker.count, marker.unread
        run.marked_at = self._log.now()

    async def _unfinished(self) -> int:
        """Count what is appended and not done of the fullest partition of the shortest tier."""
        commits = await self._log.committed(self._group, self._tier)
        unfinished = 0
        bounds, _ = await self._log.readable(self._tier)
        for number, (start, end) in bounds.items():
            base, done, _ = commits.get(number, Commit(start))
            unfinished = max(unfinished, end - max(base, start) - int.from_bytes(done, "little").bit_count())
        return unfinished


def _listed(places: Collection[str]) -> str:
    return ", ".join(sorted(places))


def _settlement(run: _Run) -> Order:
    """Return the end of an order about the dead letters whose deliveries were injected: they are open no more."""
    return Order(
        kind="dead",
        name=f"{run.order.name}-{run.count}",
        state="done",
        at=run.order.at,
        marker=run.dead.ends,
        filter=DeadFilter(route=run.selection.route, records=tuple(run.settled)),
        count=len(run.settled),
    )
