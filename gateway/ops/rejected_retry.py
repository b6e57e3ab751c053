"""Verifies refused requests again, by today's rules, and admits those that pass; or drops them.

    verify ─▶ claim the partition ─▶ what is in the log already? ─▶ append events ─▶ marker ─▶ … ─▶ end of the claim
                                          ▲                              │
                                          └───── killed here, the next retry finds them ─────┘

An event that is admitted has the id that the ingress would have given it, or, if its sender gives none, one made from
where its request was kept. So before anything is appended, the log is searched for events with these ids and contents,
from a dedupe window before the first of the requests on: what is there was sent again by its provider, or admitted by a
retry that was killed before its marker. While one command has claimed a partition, no other appends for it.

A sender that repeats a request within its timestamp's tolerance has sent one event: it is admitted once.
"""

import asyncio
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

from gateway.engine.jobs.log_reader import records_of
from gateway.log.audit_records import ActOutcome, AuditRecord
from gateway.log.base import Log, Partition, Record
from gateway.log.records import decode_event, encode_event, event_key, fingerprint
from gateway.log.topics import Topics
from gateway.model import (
    SUCCESSOR_HEADROOM,
    Event,
    LogUnavailableError,
    RecordTooLargeError,
    RefusedError,
    UnreadableRecordError,
)
from gateway.ops.audit import Actor, Auditor
from gateway.ops.command_texts import rejected_words
from gateway.ops.rejected import Rejected, RejectedFilter, read_rejected
from gateway.ops.rejected_claims import Claim, ClaimLostError
from gateway.ops.rejected_verification import RepeatedVerification
from gateway.quarantine.records import MAX_STORE_DELAY, Marker, Missing, RequestOutcome, decode
from gateway.rules.rules import Source
from gateway.verify.remote_keys import (
    Fetch,
)

BATCH_RECORDS = 100
BATCH_BYTES = 200 << 10
"""Bytes of bodies appended concurrently. They keep their order, as they never fill a batch of Kafka's producer."""
DROP_BATCH = 1000
EventKey = tuple[str, bytes]
"""An event's id, and the digest of its content."""


@dataclass(slots=True)
class Report:
    """What became of the requests that a command was about. Each is counted once.

    `events` is how many the admitted ones had that weren't in the log; `refused` are by reason. `elsewhere`: another
    command has resolved them meanwhile. `left`: the command has ended before them, for this `problem`.
    """

    outcomes: Counter[RequestOutcome] = field(default_factory=Counter)
    events: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    missing: Counter[Missing] = field(default_factory=Counter)
    unreadable: int = 0
    elsewhere: int = 0
    left: int = 0
    problem: str = ""

    @property
    def admitted(self) -> int:
        return self.outcomes[RequestOutcome.ADMITTED]

    @property
    def present(self) -> int:
        return self.outcomes[RequestOutcome.PRESENT]

    @property
    def handshakes(self) -> int:
        return self.outcomes[RequestOutcome.HANDSHAKE]

    @property
    def is_complete(self) -> bool:
        return not self.problem and not self.left


class RejectedCommand:
    """One command about refused requests, `retry` or `drop`, by whoever runs it, or an `actor`.

    `sleep` waits for other commands.
    """

    def __init__(
        self,
        log: Log,
        topics: Topics,
        *,
        wait: float,
        why: str = "",
        actor: Actor | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._log = log
        self._topics = topics
        self._wait = wait
        self._clock = clock
        self._sleep = sleep
        self._name = f"{int(log.now() * 1000):x}-{secrets.token_hex(4)}"
        self.audit = Auditor(log, topics, actor or Actor.of_command(), why)
        self.report = Report()
        self._unread: dict[Partition, str] = {}
        self._refused_late = 0
        """Requests that passed at first, and then couldn't be admitted."""

    async def retry(
        self, source: Source, which: RejectedFilter, *, fetch: Fetch | None = None, dry_run: bool = False
    ) -> Report:
        """Verify a source's open requests again, and admit those that pass: all but those `left` have an outcome.

        Raises LogUnavailableError if the requests can't be read. What fails later is the report's `problem`.
        """
        report, verification = self.report, RepeatedVerification(source, today=self._clock(), fetch=fetch)
        present = _PresentEvents(self._log, source.topic or self._topics.events(source.name))
        starts = await self.ends()
        passing: dict[Partition, list[int]] = defaultdict(list)
        oldest = float("inf")
        async with aclosing(self._read(replace(which, source=source.name))) as history:
            async for found in history:
                events = await self._verified(verification, found)
                if events is not None:
                    present.wanted.update(map(_key_of, events))
                    passing[found.partition].append(found.record.offset)
                    oldest = min(oldest, found.record.appended_at)
        total = sum(map(len, passing.values()))
        if not total:
            return self._ended(0)
        await present.begin(oldest - MAX_STORE_DELAY - (source.dedupe or 0.0))
        if dry_run:
            await self._dry_run(verification, present, passing)
            return self._ended(report.outcomes.total() + self._refused_late)
        act = await self.audit.begin("rejected retry", rejected_words(replace(which, source=source.name)))
        for partition, offsets in sorted(passing.items()):
            await self._with_claim(
                partition, sorted(offsets), starts, lambda claim, some: self._admit(verification, present, claim, some)
            )
            if report.problem:
                break
        return await self._audited(act, self._ended(total))

    async def drop(self, which: RejectedFilter, ends: Mapping[int, int] | None = None) -> Report:
        """Dismiss open requests, whether they can be read or not. Raises and reports as `retry` does.

        With `ends`, somebody has reviewed what was there when the topic's partitions ended at these offsets: no other.
        """
        starts = await self.ends() if ends is None else ends
        chosen: dict[Partition, list[int]] = defaultdict(list)
        async with aclosing(self._read(which)) as history:
            async for found in history:
                if ends is None or found.record.offset < ends.get(found.partition.number, 0):
                    chosen[found.partition].append(found.record.offset)
        if not chosen:
            return self._ended(0)
        act = await self.audit.begin("rejected drop", rejected_words(which))
        for partition, offsets in sorted(chosen.items()):
            await self._with_claim(partition, sorted(offsets), starts, None)
            if self.report.problem:
                break
        return await self._audited(act, self._ended(sum(map(len, chosen.values()))))

    async def _audited(self, act: AuditRecord, report: Report) -> Report:
        """Write what came of the command, and return its report."""
        outcome = ActOutcome.FAILED if report.problem else ActOutcome.DONE
        await self.audit.record_outcome(act, outcome, text_of(report, is_dry=False))
        return report

    async def ends(self) -> Mapping[int, int]:
        """Return where the partitions end that can be read now."""
        bounds, _ = await self._log.readable(self._topics.rejected)
        return {number: end for number, (_, end) in bounds.items()}

    def _read(self, which: RejectedFilter) -> AsyncGenerator[Rejected, None]:
        return read_rejected(self._log, self._topics, which, unread=self._unread)

    def _ended(self, total: int) -> Report:
        """Return the report: of `total` requests, what has no outcome is left; and what couldn't be read."""
        report = self.report
        report.left = total - report.elsewhere - report.outcomes.total() - self._refused_late
        if self._unread and not report.problem:
            (topic, number), reason = min(self._unread.items())
            report.problem = f"{topic}/{number}: not read: {reason}"
        return report

    async def _verified(self, verification: RepeatedVerification, found: Rejected) -> list[Event] | None:
        """Return the events of an open request that may be admitted; count any other."""
        await asyncio.sleep(0)  # a process may deliver beside this
        if found.request is None:
            self.report.unreadable += 1
        elif found.missing:
            self.report.missing[found.missing] += 1
        else:
            try:
                return await verification.events(found, found.request, received_at=self._log.now()) or []
            except RefusedError as error:
                self.report.refused[error.reason] += 1
        return None

    async def _dry_run(
        self, verification: RepeatedVerification, present: "_PresentEvents", passing: Mapping[Partition, Sequence[int]]
    ) -> None:
        await present.look()
        for partition, offsets in sorted(passing.items()):
            async with aclosing(_these(self._log, partition, sorted(offsets))) as requests:
                async for found in requests:
                    judged = await self._judge(verification, present, found)
                    if judged is not None:
                        self.report.outcomes[judged.outcome] += 1
                        self.report.events += len(judged.fresh)

    async def _with_claim(
        self,
        partition: Partition,
        offsets: Sequence[int],
        starts: Mapping[int, int],
        admit: Callable[[Claim, Sequence[Rejected]], Awaitable[None]] | None,
    ) -> None:
        """Claim a partition, work on these requests, in batches, and end the claim."""
        start = starts.get(partition.number, 0)
        claim = Claim(self._log, partition, name=self._name, by=self.audit.actor.who, start=start, sleep=self._sleep)
        try:
            if holder := await claim.acquire(self._wait):
                self.report.problem = f"{partition.topic}/{partition.number}: {holder} is working on it"
                return
            open_ = [offset for offset in offsets if offset not in claim.outcomes]
            self.report.elsewhere += len(offsets) - len(open_)
            if admit is None:
                for first in range(0, len(open_), DROP_BATCH):
                    dropped = open_[first : first + DROP_BATCH]
                    await claim.store([(offset, RequestOutcome.DROPPED) for offset in dropped])
                    self.report.outcomes[RequestOutcome.DROPPED] += len(dropped)
            else:
                batch: list[Rejected] = []
                async with aclosing(_these(self._log, partition, open_)) as requests:
                    async for found in requests:
                        batch.append(found)
                        if len(batch) >= BATCH_RECORDS or sum(len(each.record.value) for each in batch) >= BATCH_BYTES:
                            await admit(claim, batch)
                            batch = []
                if batch:
                    await admit(claim, batch)
            await claim.end()
        except (LogUnavailableError, ClaimLostError) as error:
            self.report.problem = str(error)  # the claim ends by itself

    async def _admit(
        self, verification: RepeatedVerification, present: "_PresentEvents", claim: Claim, batch: Sequence[Rejected]
    ) -> None:
        """Append the events of some requests that aren't in the log yet, and store what became of the requests."""
        await claim.ensure()
        await present.look()
        judged = [each for found in batch if (each := await self._judge(verification, present, found)) is not None]
        await claim.ensure()
        claim.check()
        results = iter(
            await asyncio.gather(*[self._append(present.topic, event) for each in judged for event in each.fresh])
        )
        errors = [[error for error in [next(results) for _ in each.fresh] if error is not None] for each in judged]
        failure = next((each for each in chain(*errors) if isinstance(each, LogUnavailableError)), None)
        outcomes = self._outcomes(judged, errors, present, is_available=failure is None)
        self.report.outcomes.update([outcome for _, outcome in outcomes])
        if outcomes:
            await claim.store(outcomes)
        if failure is not None:
            raise failure

    def _outcomes(
        self,
        judged: Sequence["_Judged"],
        errors: Sequence[Sequence[LogUnavailableError | RecordTooLargeError]],
        present: "_PresentEvents",
        *,
        is_available: bool,
    ) -> list[tuple[int, RequestOutcome]]:
        """Return what became of requests, by their offsets; count those with an event that the log finds too large."""
        outcomes: list[tuple[int, RequestOutcome]] = []
        for each, failed in zip(judged, errors, strict=True):
            if any(isinstance(error, RecordTooLargeError) for error in failed):
                self._refuse("body_too_large")
                present.found.difference_update(map(_key_of, each.fresh))
            elif each.outcome is RequestOutcome.ADMITTED and not failed:
                outcomes.append((each.offset, each.outcome))
                self.report.events += len(each.fresh)
        # `present.found` has what was to be appended, too: if that failed, a copy of it isn't stored either.
        for each in judged:
            if each.outcome is not RequestOutcome.ADMITTED and is_available:
                if present.found.issuperset(map(_key_of, each.events)):
                    outcomes.append((each.offset, each.outcome))
                else:
                    self._refuse("body_too_large")
        return outcomes

    def _refuse(self, reason: str) -> None:
        """Count a request that passed at first, and can't be admitted all the same."""
        self.report.refused[reason] += 1
        self._refused_late += 1

    async def _judge(
        self, verification: RepeatedVerification, present: "_PresentEvents", found: Rejected
    ) -> "_Judged | None":
        """Return what becomes of a request, unless an event fails; None if it is refused after all."""
        if found.request is None:
            return None
        try:
            events = await verification.events(found, found.request, received_at=self._log.now())
        except RefusedError as error:
            self._refuse(error.reason)
            return None
        if events is None:
            return _Judged(found.record.offset, RequestOutcome.HANDSHAKE, [], [])
        # As at the ingress, none of a batch is stored if one is too large.
        if max(map(_size_of, events), default=0) > self._log.max_record_bytes - SUCCESSOR_HEADROOM:
            self._refuse("body_too_large")
            return None
        fresh = []
        for event in events:
            if (key := _key_of(event)) not in present.found:
                present.found.add(key)
                fresh.append(event)
        outcome = RequestOutcome.ADMITTED if fresh or not events else RequestOutcome.PRESENT
        return _Judged(found.record.offset, outcome, events, fresh)

    async def _append(self, topic: str, event: Event) -> LogUnavailableError | RecordTooLargeError | None:
        try:
            await self._log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))
        except (LogUnavailableError, RecordTooLargeError) as error:
            return error
        return None


class _Judged(NamedTuple):
    """What becomes of a request, its events, and those that aren't in the log."""

    offset: int
    outcome: RequestOutcome
    events: Sequence[Event]
    fresh: Sequence[Event]


class _PresentEvents:
    """Which of the `wanted` events are in a topic: those `found`, as of the last `look`."""

    def __init__(self, log: Log, topic: str) -> None:
        self._log = log
        self.topic = topic
        self.wanted: set[EventKey] = set()
        self.found: set[EventKey] = set()
        self._next: dict[int, int] = {}
        self._ids: frozenset[bytes] = frozenset()

    async def begin(self, at: float) -> None:
        """Look from a time (Unix seconds, of the appends) on."""
        self._next = dict(await self._log.offsets_at(self.topic, max(0.0, at)))
        self._ids = frozenset([id_.encode() for id_, _ in self.wanted])

    async def look(self) -> None:
        """Look at what has been appended since the last look. Raises LogUnavailableError."""
        for number, (start, end) in (await self._log.bounds(self.topic)).items():
            begin = max(start, self._next.get(number, start))
            async with aclosing(records_of(self._log, Partition(self.topic, number), begin, end)) as records:
                async for record in records:
                    self._add(record)
            self._next[number] = max(begin, end)

    def _add(self, record: Record) -> None:
        if dict(record.headers).get("ce_id") not in self._ids:
            return
        try:
            key = _key_of(decode_event(record))
        except UnreadableRecordError:
            return  # the router sets it aside
        if key in self.wanted:
            self.found.add(key)


def _size_of(event: Event) -> int:
    return len(event.body) + len(event.query) + sum([len(name) + len(value) for name, value in event.headers])


def _key_of(event: Event) -> EventKey:
    return event.id, fingerprint(event)


async def _these(log: Log, partition: Partition, offsets: Sequence[int]) -> AsyncGenerator[Rejected, None]:
    """Yield the refused requests at ascending offsets of a partition, as far as the log still has them."""
    if not offsets:
        return
    wanted = frozenset(offsets)
    async with aclosing(records_of(log, partition, offsets[0], offsets[-1] + 1)) as records:
        async for record in records:
            if record.offset in wanted:
                decoded = decode(record)
                if not isinstance(decoded, Marker):
                    yield Rejected(partition=partition, record=record, request=decoded, problem="", outcome=None)


def text_of(report: Report, *, is_dry: bool = False) -> str:
    """Return a report for people: "12 admitted, 3 still refused (bad_signature), 1 too large to keep whole"."""
    refused_ = [f"{number:,} still refused ({reason})" for reason, number in report.refused.most_common()]
    parts: Iterable[tuple[int, str]] = (
        (report.outcomes[RequestOutcome.ADMITTED], "would be admitted" if is_dry else "admitted"),
        (report.outcomes[RequestOutcome.PRESENT], "already in the log"),
        (report.outcomes[RequestOutcome.HANDSHAKE], "no longer awaited (handshake)"),
        (report.outcomes[RequestOutcome.DROPPED], "dropped"),
        (report.elsewhere, "resolved by another command meanwhile"),
        (report.missing[Missing.BODY], "too large to keep whole"),
        (report.missing[Missing.CREDENTIAL], "with a credential too short to keep"),
        (report.unreadable, "unreadable"),
        (report.left, "not processed"),
    )
    shown = [f"{number:,} {what}" for number, what in parts if number]
    shown[1:1] = refused_ if report.outcomes[RequestOutcome.ADMITTED] else []
    return (
        ", ".join(shown if report.outcomes[RequestOutcome.ADMITTED] else [*refused_, *shown])
        or "no open refused requests"
    )
