"""Check whether a source's identities distinguish its events, with the recent events in the log.

Identities are derived again by the local rules, so rules with another `id` can be tried before they are active.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from gateway.engine.dedupe.index import ENTRIES_KEPT
from gateway.log.base import Log
from gateway.log.records import decode_event, fingerprint
from gateway.model import Event, RefusedError, UnreadableRecordError, identity_of
from gateway.ops.log_search import newest_first
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import Source
from gateway.verify.request import Request

MAX_EVENTS_READ = 200_000
"""Maximum number of events read, the newest first."""
MIN_EVENTS = 10
"""Number of a source's events below which nothing is reported about its duplicates."""
SHARE = 0.1
"""Share of a source's events that are duplicates, above which there is a warning."""
_DIGEST = 16
"""Bytes of an identity, at the beginning of a key of identity and content."""


class Pair(NamedTuple):
    """Positions of two different events with the same identity, and thus perhaps the same id."""

    one: str
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Counts of the events of one source and type, as people may see it. `copies` are duplicates of earlier events.

    They count whether or not dedupe suppresses them: it remembers only `ENTRIES_KEPT` contents of an identity.
    `conflicts` are the other events whose identity an earlier one has, as the metric counts them: three contents of one
    identity are two conflicts. Events `without_identity` lack the source's `id` or, without an `id`, any identity.
    """

    type: str
    events: int
    copies: int
    conflicts: int
    without_identity: int


class Seen:
    """The identities seen in the events of one source."""

    def __init__(self, source: Source) -> None:
        self.count = 0
        self.identified = 0
        self.example: Pair | None = None
        self._without: Counter[str] = Counter()
        self._absence = ""  # why one of them lacks the `id`
        self._identifier = EventBuilder(source)
        self._source = source
        self._events: Counter[str] = Counter()
        self._copies: Counter[str] = Counter()
        self._types: dict[bytes, str] = {}  # identity and content → type
        self._newest: dict[bytes, tuple[bytes, str]] = {}  # identity → a content, and its position
        self._oldest: dict[bytes, bytes] = {}  # identity → its first content, which is no conflict
        self._shared: dict[bytes, int] = {}  # identity → how many contents, if these are several

    def add(self, event: Event, position: str) -> None:
        """Add an event; call it for the newest first."""
        self.count += 1
        redaction = self._source.redaction
        kind = event.type if redaction is None else redaction.event(event).type
        self._events[kind] += 1
        identity = self._identity_of(event, position, kind)
        if identity is None:
            return
        self.identified += 1
        content = fingerprint(event)
        self._oldest[identity] = content
        if identity + content in self._types:
            self._copies[kind] += 1
            return
        self._types[identity + content] = kind
        newest, its_position = self._newest.setdefault(identity, (content, position))
        if newest != content:
            self._shared[identity] = self._shared.get(identity, 1) + 1
            self.example = self.example or Pair(its_position, position)

    @property
    def copies(self) -> int:
        return self._copies.total()

    @property
    def conflicts(self) -> int:
        return self._conflicts().total()

    def by_type(self) -> list[Counted]:
        """Return the counts of each type, the most frequent first."""
        conflicts = self._conflicts()
        return [
            Counted(
                type=name,
                events=events,
                copies=self._copies[name],
                conflicts=conflicts[name],
                without_identity=self._without[name],
            )
            for name, events in self._events.most_common()
        ]

    def conflict(self) -> str:
        """Return which distinct events share an identity, as text; "" if none."""
        if self.example is None:
            return ""
        number, identities = sum(self._shared.values()), len(self._shared)
        shared = "one identity" if identities == 1 else f"{identities:,} identities"
        one, other = self.example
        different = f"{number:,} different events, such as {one} and {other}"
        expected = f"expected an identity for each event, got {shared} for {different}"
        return f"{expected} (`gateway events show` shows either){self._beyond()}"

    def _beyond(self) -> str:
        """Return which duplicates dedupe may not suppress, as text; "" if none."""
        if self._source.dedupe is None or max(self._shared.values(), default=0) <= ENTRIES_KEPT:
            return ""
        return f"; dedupe remembers {ENTRIES_KEPT} contents of an identity, and delivers duplicates of others"

    @property
    def is_unidentified(self) -> bool:
        """Return whether the source names an `id` that is in none of its events."""
        return self._source.id is not None and self._without.total() == self.count

    def absence(self) -> str:
        """Return how many events lack the source's own `id`, and why, as text; "" if none."""
        if self._source.id is None or not self._without:
            return ""
        number = f"{self._without.total():,} of {self.count:,}"
        return f"expected an identity in each event, got none in {number}, such as {self._absence}"

    def problem(self) -> str:
        """Return what else seems to be wrong, as text; "" if nothing."""
        if self.count < MIN_EVENTS or not self.identified:
            return ""
        if len(self._oldest) == 1:
            return f"expected an identity that differs from event to event, got one for {self.identified:,} events"
        if self._source.dedupe is not None and self.copies > SHARE * self.count:
            copies, most = self.copies, "at most " if self._beyond() else ""
            are = "is taken for a duplicate" if copies == 1 else "are taken for duplicates"
            return f"expected events that differ, got {most}{copies:,} of {self.count:,} that {are}"
        return ""

    def _identity_of(self, event: Event, position: str, kind: str) -> bytes | None:
        request = Request(
            method="POST", path=self._source.path, query=event.query, headers=event.headers, body=event.body
        )
        own = self._source.id
        try:
            found = self._identifier.identified_by(request)
            why = "" if own is None else f"`id: {' '.join(own.text.split())}` gives nothing"
        except RefusedError as error:
            found, why = "", f"the ingress would refuse it, {error.status}: {error.detail}"
        if not found or (own is not None and found != own.text):
            self._without[kind] += 1
            self._absence = self._absence or f"{position}: {why}"
        try:
            return identity_of(self._identifier.event(request, received_at=event.received_at).id)
        except RefusedError:
            return None

    def _conflicts(self) -> Counter[str]:
        kept = {identity + self._oldest[identity] for identity in self._shared}
        return Counter([name for key, name in self._types.items() if key[:_DIGEST] in self._shared and key not in kept])


async def identities_of(
    log: Log, topics: Iterable[str], since: float, sources: Mapping[str, Source], also: Callable[[Event], None]
) -> dict[str, Seen]:
    """Read the events appended since then, at most the newest `MAX_EVENTS_READ`; return what each source sent.

    `also` is called with each of them, the newest first.
    """
    found: dict[str, Seen] = {}
    looked = 0
    async with aclosing(newest_first(log, sorted(topics), since=since)) as history:
        async for each in history:
            looked += 1
            if looked > MAX_EVENTS_READ:
                break
            try:
                event = decode_event(each.record)
            except UnreadableRecordError:
                continue
            if event.source not in sources:
                continue
            if event.source not in found:
                found[event.source] = Seen(sources[event.source])
            found[event.source].add(event, each.position)
            also(event)
    return found
