"""One pass over records of the log for a job, or for several at once: batches of deliveries, and markers on the way.

    scan ──▶ batch (≤ 100) ──ours still?──▶ shortest tier, acknowledged ──▶ marker, at 500 or after 1 s ──▶ … ──▶ end

A marker tells how far a job has come, after what it covers was acknowledged. A job whose process gives the jobs up ends
with its next batch and a marker, so the next owner repeats nothing; one that is killed repeats what came after its last
marker, at most 500 deliveries.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from structlog.typing import FilteringBoundLogger

from gateway.engine.control.records import Order, State, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.injector import APPENDS_AT_ONCE, Injector
from gateway.engine.jobs.kick_outcomes import KickOutcome
from gateway.engine.jobs.log_reader import BATCH, MARK_EVERY, PIECE_BYTES, RECORDS_AT_ONCE, TURN, records_of
from gateway.engine.successor_writer import SuccessorWriter
from gateway.engine.unavailable_partitions import Patient
from gateway.log.base import Log, Partition, Record
from gateway.log.topics import Topics
from gateway.model import (
    NO_NOTE,
    Delivery,
    LogUnavailableError,
    NewerRecordError,
    Note,
)
from gateway.rules.rules import Rules

LEFT = "up to the first letter of a partition that a newer version of the gateway wrote"

Pick = Callable[[Partition, Record], "Picked"]


@dataclass(slots=True, kw_only=True)
class Run:
    """A job under way: its order, up to which it answers, up to where it has scanned, and what it has counted."""

    order: Order
    answers: int
    detail: str
    positions: dict[str, int]
    count: int
    fresh: int = 0
    """What is counted of the batch in hand."""
    told: Mapping[str, int]
    """What its last marker says."""
    before: Mapping[str, int]
    """What the one before said: which is in force may not be known here yet."""
    outcome: KickOutcome | None = None
    """What has become of what it counted, where that is known."""
    rate: float | None = None

    def is_beyond(self, partition: Partition, offset: int) -> bool:
        """Return whether an earlier job of its key has scanned a record."""
        return offset < self.told.get(partition_key(partition), 0)


@dataclass(frozen=True, slots=True)
class Picked:
    """What comes of a record: a delivery to inject, and the runs that count it."""

    runs: Sequence[Run] = ()
    delivery: Delivery | None = None
    note: Note = NO_NOTE


NOTHING = Picked()


@dataclass(slots=True, kw_only=True)
class Scan:
    """One pass over records, for one run or for several at once. `go` over each topic, and then it is told to end."""

    log: Log
    control: Control
    injector: Injector
    publish: Callable[[Order], Awaitable[object]]
    is_wanted: Callable[[], bool]
    logger: FilteringBoundLogger
    sleep: Callable[[float], Awaitable[None]]
    leave: Callable[[Partition, int, NewerRecordError], None]
    runs: Collection[Run]
    is_expedited: bool
    state: State
    """Of a marker on the way: "asked" keeps the count for who goes on."""
    left: dict[str, int] = field(default_factory=dict)
    """The first record of a partition that a newer version wrote: scan and markers end before it."""
    unread: set[str] = field(default_factory=set)
    """What couldn't be read, as "topic/partition": no marker passes anything of it."""
    _batch: list[tuple[Delivery, Note]] = field(default_factory=list)
    _bytes: int = 0
    _reached: dict[str, int] = field(default_factory=dict)
    _unmarked: int = 0
    _marked_at: float = 0.0

    async def go(self, topic: str, starts: Mapping[str, int], ends: Mapping[str, int], pick: Pick) -> bool:
        """Scan a range of a topic. False where the job isn't to go on here; how far it has come is marked then.

        Raises LogUnavailableError.
        """
        self._marked_at = self._marked_at or self.log.now()
        looked, until = 0, self.log.now() + TURN
        bounds, unread = await self.log.readable(topic)
        self.unread |= {partition_key(Partition(topic, number)) for number in unread}
        for number, (first, _) in sorted(bounds.items()):
            partition = Partition(topic, number)
            place = partition_key(partition)
            if place not in ends:
                continue
            end = ends[place]
            async with aclosing(records_of(self.log, partition, max(first, starts.get(place, 0)), end)) as records:
                async for record in records:
                    if not self._take(pick, partition, record):
                        end = self.left[place]
                        break
                    self._reached[place] = record.offset + 1
                    looked += 1
                    now = self.log.now()
                    if self._is_full or now >= self._marked_at + MARK_EVERY:
                        if not await self.flush():
                            return False
                        until = self.log.now() + TURN
                    elif looked % RECORDS_AT_ONCE == 0 or now > until:
                        await self.sleep(0)
                        until = self.log.now() + TURN
            self._reached[place] = end
        return await self.flush()

    def _take(self, pick: Pick, partition: Partition, record: Record) -> bool:
        """Take a record in. False if it is left to a newer version of the gateway, and with it what follows."""
        try:
            picked = pick(partition, record)
        except NewerRecordError as error:
            self.left[partition_key(partition)] = record.offset
            self.leave(partition, record.offset, error)
            return False
        for run in picked.runs:
            run.fresh += 1
        if picked.delivery is not None:
            self._batch.append((picked.delivery, replace(picked.note, is_expedited=self.is_expedited)))
            self._bytes += len(picked.delivery.event.body)
        return True

    @property
    def _is_full(self) -> bool:
        return len(self._batch) >= APPENDS_AT_ONCE or self._bytes >= PIECE_BYTES

    async def flush(self) -> bool:
        """Inject the batch in hand, and mark when it is time. False where the job isn't to go on here."""
        if self.is_wanted() and await self.injector.inject(self._batch, self.is_wanted):
            self._unmarked += len(self._batch)
            self._batch.clear()
            self._bytes = 0
            for run in self.runs:
                run.positions.update(self._reached)
                run.count += run.fresh
                run.fresh = 0
            self._reached.clear()
            if self.is_wanted():
                if self._unmarked >= BATCH - APPENDS_AT_ONCE or self.log.now() >= self._marked_at + MARK_EVERY:
                    await self.mark()
                return True
        await self.mark()
        return False

    async def mark(self) -> None:
        """Publish how far each run has come: where the next owner goes on."""
        for run in self.runs:
            if run.positions != run.told:
                await self.tell(run, self.state)
        self._unmarked, self._marked_at = 0, self.log.now()

    async def tell(self, run: Run, state: State, *, is_last: bool = False) -> None:
        """Publish a run's marker, unless another owner has gone on from the last one. Tried until it is stored."""
        key = run.order.key
        while self.control.marker(key) in (run.told, run.before):
            marker = Order(
                kind="marker",
                name=key,
                state=state,
                at=self.log.now(),
                marker=dict(run.positions),
                count=run.count,
                unread=len(self.unread) if is_last else 0,
                detail=run.detail if is_last else "",
                answers=run.answers if is_last else self.control.answered(key),
                routes=self.control.replayed_as(key),
                tried=None if run.outcome is None else run.outcome.tried,
                delivered=None if run.outcome is None else run.outcome.delivered,
                waits={} if run.outcome is None else run.outcome.waits,
                got={} if run.outcome is None else run.outcome.got,
                again={} if run.outcome is None else run.outcome.again,
                rate=run.rate,
            )
            try:
                await self.publish(marker)
            except LogUnavailableError as error:
                if not self.is_wanted():
                    return
                self.logger.warning("append_retried", order=key, error=str(error))
                await self.sleep(1.0)
            else:
                run.before, run.told = run.told, marker.marker
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class JobServices:
    """What the jobs share. `publish` waits until the record is in force here; `owner` is whoever owns the jobs now."""

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    control: Control
    successors: SuccessorWriter
    injector: Injector
    publish: Callable[[Order], Awaitable[object]]
    position: Callable[[], int]
    owner: Callable[[], object | None]
    logger: FilteringBoundLogger
    sleep: Callable[[float], Awaitable[None]]


class ScanningJob:
    """A job that scans the log, and continues only while `owner` returns what it was started with.

    Each of them may raise LogUnavailableError.
    """

    def __init__(self, services: JobServices) -> None:
        self._log = services.log
        self._topics = services.topics
        self._rules = services.rules
        self._control = services.control
        self._successors = services.successors
        self._injector = services.injector
        self._publish = services.publish
        self._position = services.position
        self._owner = services.owner
        self._logger = services.logger
        self._sleep = services.sleep
        self._patient = Patient(services.log)

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
        is_expedited: bool = False,
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
            leave=self._successors.undecodable.report_newer,
            runs=runs,
            is_expedited=is_expedited,
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

    async def _take_back(self, scan: Scan, run: Run) -> None:
        await scan.tell(run, "cancelled", is_last=True)
        self._logger.info("job_finished", order=run.order.key, state="cancelled", count=run.count, detail=run.detail)

    async def _ends(self, scan: Scan, topic: str) -> dict[str, int]:
        """Return the ends of what can be read of a topic; the rest is left out of the scan, and of what is told of it.

        Raises LogUnavailableError for what couldn't be read only a moment ago.
        """
        bounds, unread = await self._patient.readable(topic)
        scan.unread |= {f"{topic}/{number}" for number in unread}
        return {f"{topic}/{number}": end for number, (_, end) in bounds.items()}

    def _again(self, delivery: Delivery, *, at_once: bool) -> Delivery:
        """Return what is injected of a delivery: due now, or not before it was due anyway."""
        now = self._log.now()
        return replace(delivery, successor=delivery.successor + 1, due=now if at_once else max(now, delivery.due))


async def ends_of_readable(log: Log, topic: str) -> dict[str, int]:
    """Return the end of each partition of a topic that can be read, as "topic/partition" → offset."""
    bounds, _ = await log.readable(topic)
    return {f"{topic}/{number}": end for number, (_, end) in bounds.items()}
