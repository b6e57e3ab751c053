"""One pass over records of the log for a job, or for several at once: batches of deliveries, and markers on the way."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from structlog.typing import FilteringBoundLogger

from gateway.engine.control.records import Order, State, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.injector import APPENDS_AT_ONCE, Injector
from gateway.engine.jobs.kick_outcomes import KickOutcome
from gateway.engine.jobs.log_reader import BATCH, MARK_EVERY, PIECE_BYTES, RECORDS_AT_ONCE, TURN, records_of
from gateway.log.base import Log, Partition, Record
from gateway.model import (
    NO_NOTE,
    Delivery,
    LogUnavailableError,
    NewerRecordError,
    Note,
)

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
    is_hurried: bool
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
            self._batch.append((picked.delivery, replace(picked.note, is_hurried=self.is_hurried)))
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


async def ends_of_readable(log: Log, topic: str) -> dict[str, int]:
    """Return the end of each partition of a topic that can be read, as "topic/partition" → offset."""
    bounds, _ = await log.readable(topic)
    return {f"{topic}/{number}": end for number, (_, end) in bounds.items()}
