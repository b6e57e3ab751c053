"""The spool of a process: stores the events that the log doesn't take, and has them moved later."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log, Position, RecordHeaders
from gateway.log.deferred import LogNotOpenError
from gateway.model import GatewayError, LogLostError, LogUnavailableError
from gateway.settings import SpoolSettings
from gateway.spool.counting import count
from gateway.spool.mover import Mover
from gateway.spool.orphans import OrphanedSpools
from gateway.spool.records import size_of, spool_headers
from gateway.spool.store import FileStore, SpoolRefusedError, SpoolStore
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics

LOG_TIMEOUT = 1.0
"""Seconds that an append to the log may take before the event is stored here: its sender waits for both."""
KEY_WAIT = 0.25
"""Seconds of LOG_TIMEOUT in which an event waits for earlier ones of its key to be moved to the log."""
MIN_FREE_RATIO = 0.05
MIN_FREE_BYTES_CAP = 1 << 30
"""This share of a disk has to stay free, or this many bytes, if that is less."""
WATCH_INTERVAL = 1.0
WARN_INTERVAL = 60.0


class Spool:
    """Between the ingress and the log.

    `append` is all that the ingress knows of it. `run` moves what is in the file, and watches it and its disk.
    """

    def __init__(
        self,
        store: SpoolStore,
        *,
        log: Log,
        topics: Callable[[], Collection[str]],
        metrics: Metrics,
        logger: FilteringBoundLogger,
        max_bytes: int,
        max_age: float,
        orphans: Sequence[Path] = (),
    ) -> None:
        self.waiting = Waiting()
        self._orphans = OrphanedSpools(orphans, log=log, metrics=metrics, logger=logger)
        self._store = store
        self._log = log
        self._topics = topics
        self._metrics = metrics
        self._logger = logger
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._loop = asyncio.get_running_loop()
        self._disk_problem = ""
        self._store_problem = ""
        self._storing: set[asyncio.Task[None]] = set()
        self._is_lost = False
        self._refused_size = 0
        """Bytes of the last event that was refused for lack of room, until there is room for it."""
        self._room: int | None = None
        """Bytes that its disk has for it; None if nobody has looked yet."""
        self._began: float | None = None
        self._taken = 0
        self._refused_at = -WARN_INTERVAL
        self.mover = Mover(log=log, store=store, waiting=self.waiting, metrics=metrics, logger=logger)

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position | None:
        """Store an event in the log or, if that takes none or takes too long, in the spool: then return None.

        Raises LogUnavailableError if neither takes it, RecordTooLargeError.
        """
        until = self._loop.time() + LOG_TIMEOUT
        if self.waiting.must_spool(topic, key) and not self._is_lost and not await self._wait_until_free(topic, key):
            await self._store_event(topic, key, value, headers, tried_at=None)
            return None
        tried_at: float | None = self._log.now()
        try:
            async with asyncio.timeout_at(until):
                return await self._log.append(topic, key=key, value=value, headers=headers)
        except TimeoutError:  # it may be stored all the same: the mover looks for it
            reason = f"append to {topic}: expected an acknowledgement within {LOG_TIMEOUT:g} s, got none"
        except LogUnavailableError as error:
            reason = str(error)
            if isinstance(error, LogNotOpenError):
                tried_at = None
        await self._store_event(topic, key, value, headers, tried_at=tried_at)
        if self.waiting.close(topic, key):
            self._mark_began(reason)
        return None

    async def _wait_until_free(self, topic: str, key: bytes) -> bool:
        """Wait briefly until no event of a key is in the spool, if they are being moved; return whether none is.

        Otherwise a key with many events would never leave the spool, as each has to follow the one before.
        """
        if not self.mover.is_moving(topic) or not self.waiting.is_nearly_free(topic, key):
            return False
        freed = asyncio.Event()
        self.waiting.when_free(topic, key, freed.set)
        try:
            async with asyncio.timeout(KEY_WAIT):
                await freed.wait()
        except TimeoutError:
            return False
        finally:
            self.waiting.forget(topic, key, freed.set)
        return not self.waiting.must_spool(topic, key)

    async def _store_event(
        self, topic: str, key: bytes, value: bytes, headers: RecordHeaders, *, tried_at: float | None
    ) -> None:
        size, now = size_of(key, value, headers), self._store.now()
        if problem := self._full_for(topic, size, now):
            self._refused_size = size if problem[0] == "bytes" else self._refused_size
            self._refuse(*problem)
        self.waiting.begin(topic, key, size, at=now)
        headers = spool_headers(headers, tried_at)
        store = self._loop.create_task(self._store.append(topic, key=key, value=value, headers=headers))
        store.add_done_callback(partial(self._end_store, topic, size))
        self._storing.add(store)
        try:
            await asyncio.shield(store)  # it is stored even if its sender goes away
        except LogUnavailableError as error:
            self._store_problem = str(error)
            self._mark_lost(error)
            self._refuse("unavailable", str(error))
        self._store_problem = ""
        self._taken += 1
        self._metrics.spooled.inc()
        self.mover.wake(topic)

    def _end_store(self, topic: str, size: int, store: asyncio.Task[None]) -> None:
        self._storing.discard(store)
        self.waiting.end(topic, size, is_stored=not store.cancelled() and store.exception() is None)

    def _full_for(self, topic: str, size: int, now: float) -> tuple[str, str] | None:
        """Return why an event of a topic isn't taken; None if it is. How long others wait is no reason."""
        return self._limit(size, now, topic, self.waiting.oldest_of(topic))

    def _full_for_all(self, size: int, now: float) -> tuple[str, str] | None:
        """Return why an event of this size isn't taken, whatever its topic; None if it is, of some topic of the rules.

        A topic for which nothing waits takes events, however old those of others are.
        """
        oldest = self.waiting.oldest
        if oldest is None or now - oldest <= self._max_age:
            return self._limit(size, now, "", oldest)
        of_topics = [(self.waiting.oldest_of(name), name) for name in self._topics()]
        oldest, topic = max([(now if at is None else at, name) for at, name in of_topics], default=(now, ""))
        return self._limit(size, now, topic, oldest)

    def _limit(self, size: int, now: float, topic: str, oldest: float | None) -> tuple[str, str] | None:
        held = self.waiting.bytes
        if held + size > self._max_bytes:
            return "bytes", f"expected at most {self._max_bytes} bytes in it, got {held + size}"
        if oldest is not None and now - oldest > self._max_age:
            return "age", f"{topic}: expected nothing older than {self._max_age:g} s in it, got {now - oldest:.0f} s"
        if self._disk_problem:
            return "disk", self._disk_problem
        return None

    def _refuse(self, reason: str, detail: str) -> None:
        self._metrics.spool_refused.labels(reason).inc()
        now = self._loop.time()
        if now >= self._refused_at + WARN_INTERVAL:
            self._refused_at = now
            self._logger.error("spool_refuses", reason=reason, error=detail)
        raise SpoolRefusedError(f"spool: {detail}")

    def _mark_lost(self, error: LogUnavailableError) -> None:
        """Note that the file is lost: new events no longer wait for those in it, which this process can't move."""
        if isinstance(error, LogLostError) and not self._is_lost:
            self._is_lost = True
            self._logger.error("spool_lost", error=str(error), events=self.waiting.records)

    def report_found(self, path: Path) -> None:
        """Log what an earlier process has left, which this one moves."""
        if self.waiting.records:
            self._began, self._taken = self._loop.time(), self.waiting.records
            self._logger.warning("spool_found", path=str(path), events=self._taken, bytes=self.waiting.bytes)

    def _mark_began(self, reason: str) -> None:
        if self._began is None:
            self._began = self._loop.time()
            self._logger.warning("spool_began", error=reason)

    @property
    def takes_events(self) -> bool:
        """Whether it would store an event now, of some topic of the rules."""
        return self._problem() is None

    def _problem(self) -> str | None:
        """Return why it accepts no events, or none as large as the last that it had no room for; None if it does."""
        if self.waiting.bytes + self._refused_size <= self._max_bytes:
            self._refused_size = 0
        full = self._full_for_all(self._refused_size, self._store.now())
        return self._store_problem or (None if full is None else full[1])

    @property
    def used(self) -> float:
        """How much of its nearest limit is used: 1 if it accepts no more, of some topic or of any."""
        waiting = self.waiting
        if not self.takes_events:
            return 1.0
        age = 0.0 if waiting.oldest is None else max(0.0, self._store.now() - waiting.oldest)
        of_all = self._all().bytes  # orphaned spools are on the same disk
        of_disk = 0.0 if self._room is None else of_all / max(1, of_all + self._room)
        return min(1.0, max(waiting.bytes / self._max_bytes, age / self._max_age, of_disk))

    def _all(self) -> "_Held":
        """Return what waits, including in orphaned spools."""
        return _Held.of(self.waiting, *self._orphans.waiting)

    def notes(self) -> Sequence[str]:
        """Return what `/readyz` says of it."""
        events, _, oldest, large = self._all()
        if not events:
            return ()
        notes = list[str]()
        if events > large:
            age = 0.0 if oldest is None else max(0.0, self._store.now() - oldest)
            notes.append(f"spool: {events - large} events wait for the log, the oldest for {age:.0f} s")
        if large:
            notes.append(f"spool: {large} events are too large for their topics")
        return notes

    def status(self) -> Mapping[str, Any]:
        """Return its state, for `/status`."""
        held = self._all()
        return {
            "events": held.events,
            "bytes": held.bytes,
            "oldest": held.oldest,
            "used": round(self.used, 3),
            "refuses": self._problem(),
            "waits": self._orphans.merged_reasons(self.mover.reasons) or None,
        }

    def status_by_topic(self) -> Mapping[str, Any]:
        """Return its state, with what waits for each topic."""
        by_topic: dict[str, _Held] = {}
        for waiting in (self.waiting, *self._orphans.waiting):
            for topic, events, size, oldest in waiting.by_topic():
                if events:
                    by_topic[topic] = by_topic.get(topic, _Held()).with_more(events, size, oldest)
        topics = [
            {"topic": topic, "events": held.events, "bytes": held.bytes, "oldest": held.oldest}
            for topic, held in by_topic.items()
        ]
        return {**self.status(), "topics": topics}

    async def run(self) -> None:
        """Move, and watch the file and its disk, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.mover.run(), name="spool-mover")
            tasks.create_task(self._watch(), name="spool-watch")
            tasks.create_task(self._orphans.run(), name="spool-orphans")

    async def close(self) -> None:
        """Close the file; `run` has ended."""
        await self._store.close()

    async def _watch(self) -> None:
        while True:
            await self.watch_disk()
            await self._watch_file()
            waiting, now = self.waiting, self._store.now()
            events, size, oldest, large = self._all()
            self._metrics.spool_events.set(events)
            self._metrics.spool_too_large.set(large)
            self._metrics.spool_bytes.set(size)
            self._metrics.spool_oldest.set(0.0 if oldest is None else max(0.0, now - oldest))
            self._metrics.spool_up.set(1 if self.takes_events else 0)
            self._metrics.spool_used.set(self.used)
            if not waiting.records and self._began is not None:
                seconds = round(self._loop.time() - self._began, 1)
                self._logger.info("spool_drained", seconds=seconds, events=self._taken)
                self._began, self._taken = None, 0
            await asyncio.sleep(WATCH_INTERVAL)

    async def _watch_file(self) -> None:
        """See whether the file is still there, even while no event comes: if it isn't, nothing of it is moved."""
        try:
            await self._store.check()
        except LogUnavailableError as error:
            if isinstance(error, LogLostError):  # anything else shows when the next event is stored
                self._store_problem = str(error)
                self._mark_lost(error)

    async def watch_disk(self) -> None:
        """See whether the disk has room and, after a failed write, can be written again: `run` does so every second.

        While no event is accepted, `/readyz` keeps events away: none may come that would show it.
        """
        if self._store_problem:
            try:
                await self._store.ping()
                self._store_problem = ""
            except LogUnavailableError as error:
                self._store_problem = str(error)
        try:
            free, total = await self._store.free_bytes()
        except OSError as error:
            self._disk_problem = str(error)
            return
        needed = min(MIN_FREE_BYTES_CAP, int(MIN_FREE_RATIO * total))
        self._room = max(0, free - needed)
        self._disk_problem = "" if free >= needed else f"expected {needed} free bytes on its disk, got {free}"


class _Held(NamedTuple):
    """How many events there are, their bytes, since when the first waits, and how many are too large for the log."""

    events: int = 0
    bytes: int = 0
    oldest: float | None = None
    large: int = 0

    @classmethod
    def of(cls, *found: Waiting) -> "_Held":
        held = cls()
        for each in found:
            held = held.with_more(each.records, each.bytes, each.oldest, each.large)
        return held

    def with_more(self, events: int, size: int, oldest: float | None, large: int = 0) -> "_Held":
        first = min([each for each in (self.oldest, oldest) if each is not None], default=None)
        return _Held(self.events + events, self.bytes + size, first, self.large + large)


async def open_spool(
    settings: SpoolSettings,
    *,
    log: Log,
    topics: Callable[[], Collection[str]],
    metrics: Metrics,
    logger: FilteringBoundLogger,
    orphans: Sequence[Path] = (),
) -> Spool:
    """Open the spool's file, and count what is in it. Raises UsageError, LogUnavailableError.

    `topics` are those of events that may come, by the active rules. The spool also moves what is in the `orphans`, the
    files of processes that no longer exist.
    """
    assert settings.file is not None
    try:
        store = await FileStore.open(settings.file, owner=True)
    except GatewayError as error:
        raise type(error)(f"--spool: {error}") from error
    spool = Spool(
        store,
        log=log,
        topics=topics,
        metrics=metrics,
        logger=logger,
        max_bytes=settings.bytes,
        max_age=settings.days * 86400.0,
        orphans=orphans,
    )
    try:
        await count(store, spool.waiting)
    except BaseException:
        await store.close()
        raise
    spool.report_found(settings.file)
    return spool
