"""What keeps deliveries from going out, as `gateway status` tells it: of the log, and of what processes say."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.engine.control.state import Control
from gateway.log.base import NO_TOPIC, Log, Partition
from gateway.log.records import StoredDelivery
from gateway.log.topics import Topics
from gateway.model import UsageError
from gateway.ops.control_client import ControlClient
from gateway.ops.dead_letters import DeadLetter
from gateway.ops.findings import NOT_READ, REFUSED, Finding, ranked
from gateway.ops.process_status import process_findings
from gateway.ops.quiet_routes import quiet_route_findings
from gateway.ops.redaction import Redactions
from gateway.ops.rejected import rejected_findings
from gateway.ops.silent_sources import silent_sources_in
from gateway.ops.status import (
    add_dead_letters,
    add_recorded_attempts,
    dead_letter_findings,
    filter_by_destination,
    paused_findings,
    unpaused_findings,
    unread_findings,
    waiting_findings,
)
from gateway.ops.unfinished import unfinished_findings
from gateway.ops.waiting_deliveries import AttemptInfo, Backlogs, LastAttempts
from gateway.ops.waiting_records import waiting_deliveries
from gateway.rules.rules import Rules
from gateway.text import did_you_mean
from gateway.turns import give_way

MAX_NAMES = 20
"""Maximum number of destinations that an error lists."""
Statuses = Sequence[tuple[Mapping[str, Any], str]]
"""What processes return at `/status`, with their addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What to read. `missing` returns the topics that the log lacks, and why they count as unread.

    `seconds` limits the scan of waiting deliveries, after which the result is partial; None for no limit.
    """

    log: Log
    topics: Topics
    missing: Callable[[], Awaitable[Mapping[Partition, str]]]
    seconds: float | None = None


class StatusReport:
    """What was found by now, also if the log goes away in the middle; `notes` are what wasn't looked at.

    With a destination, it is about that alone, and has the last attempts there.
    """

    def __init__(self, rules: Rules | None, destination: str = "") -> None:
        self.found: list[Finding] = []
        self.notes: list[str] = []
        self._rules = rules
        self._hidden = Redactions(rules)
        self._destination = destination
        self._control = Control()
        self._unread: dict[Partition, str] = {}
        self._backlogs = Backlogs()
        self._attempts = LastAttempts(destination)

    async def read(self, scope: Scope, statuses: Callable[[], Awaitable[Statuses]]) -> None:
        """Read the log. Raises LogUnavailableError."""
        log, topics, rules, unread = scope.log, scope.topics, self._rules, self._unread
        read_at = log.now()
        control = self._control = await ControlClient(log, topics).control()
        await self._read_waiting(scope)
        self.found += paused_findings(control, rules)
        for each in self._backlogs:
            self.found += waiting_findings([each], log.now(), rules, control)
            await asyncio.sleep(0)
        self.found += unpaused_findings(self._backlogs.parked, control, read_at, rules)
        asked = await statuses()
        self.found += await unfinished_findings(log, topics, unread, statuses=asked, rules=rules)
        told = [status for status, _ in asked]
        seen = self._seen
        self.found += await dead_letter_findings(log, topics, control, told, unread, rules=rules, seen=seen)
        if self._destination:
            await add_dead_letters(log, topics, control, self._attempts, unread, seen=seen)
            if note := await add_recorded_attempts(log, topics, self._attempts, self._hides_of):
                self.notes.append(note)
        else:
            await self._read_silent(scope)
            self.found += await rejected_findings(log, topics, unread)
        unread |= await scope.missing()

    async def _read_silent(self, scope: Scope) -> None:
        if self._rules is not None:
            silent = await silent_sources_in(scope.log, scope.topics, self._rules)
            self.found += silent.found
            self.notes += [silent.incomplete] if silent.incomplete else []

    async def _read_waiting(self, scope: Scope) -> None:
        try:
            async with asyncio.timeout(scope.seconds):
                async for stored in waiting_deliveries(scope.log, scope.topics, self._control, self._unread):
                    seen = without_detail(stored) if self._hides(stored) else stored
                    self._backlogs.add(seen)
                    self._attempts.add(seen)
        except TimeoutError:
            self.notes.append(
                f"more waits than could be read in {scope.seconds:g} s: its numbers are the least that there are"
            )

    def _hides(self, stored: StoredDelivery) -> bool:
        return self._hides_of(stored.delivery.event.source)

    def _hides_of(self, source: str) -> bool:
        return self._hidden.of(source) is not None

    def _seen(self, letter: DeadLetter) -> DeadLetter:
        if letter.decoded is None or not self._hides(letter.decoded):
            return letter
        return replace(letter, decoded=without_detail(letter.decoded))

    def finished(self, statuses: Statuses) -> list[Finding]:
        """Return all that was found, with what processes say, the worst first.

        Raises UsageError for a destination that is neither in the rules nor in what was found.
        """
        found, unread = [*self.found], self._unread
        for status, address in statuses:
            give_way()
            found += process_findings(status, address, self._control)
        named = {each.what for each in found}  # by processes, which know since when
        found += unread_findings(
            {where: reason for where, reason in unread.items() if reason != NO_TOPIC or where.topic not in named}
        )
        routes: set[str] | None = None
        if self._destination:
            routes = self._routes()
            found = self._of_destination(found, routes)
        found += quiet_route_findings(statuses, self._control, routes=routes)
        return ranked(found)

    def attempts(self) -> Sequence[AttemptInfo]:
        """Return the last attempts at the destination, newest first."""
        return self._attempts.newest_first()

    def _routes(self) -> set[str]:
        name = self._destination
        routes = {each.route for each in self._backlogs if each.destination == name}
        known = () if self._rules is None else self._rules.routes.values()
        return routes | {route.name for route in known if name in route.destinations}

    def _of_destination(self, found: Sequence[Finding], routes: set[str]) -> list[Finding]:
        name = self._destination
        chosen = filter_by_destination(found, name, routes)
        is_found = self.attempts() or any(each.rank not in (NOT_READ, REFUSED) for each in chosen)
        if self._rules is not None and name not in self._rules.destinations and not is_found:
            known = sorted(self._rules.destinations)
            more = f" and {len(known) - MAX_NAMES} more" if len(known) > MAX_NAMES else ""
            near = did_you_mean(name, known)
            raise UsageError(f"unknown destination {name!r}{near}; the rules name {', '.join(known[:MAX_NAMES])}{more}")
        return chosen


def without_detail(stored: StoredDelivery) -> StoredDelivery:
    """Return a delivery without what was answered to it, or why it ended, which may repeat what its source hides.

    Of a reason, the place in the rules where it arose is left.
    """
    delivery, metadata = stored.delivery, stored.metadata
    attempts = tuple([replace(each, detail="") for each in delivery.attempts])
    place, colon, _ = metadata.detail.partition(": ")
    metadata = replace(metadata, detail=f"{place}{colon}…" if colon else "")
    return replace(stored, delivery=replace(delivery, attempts=attempts), metadata=metadata)
