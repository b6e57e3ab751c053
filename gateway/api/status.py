"""What `gateway status` tells, by the API: of the log, and of the process that answers, for who may see that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.findings import Finding, told_fields
from gateway.api.json_shapes import Time
from gateway.api.overview import Overview
from gateway.api.problems import not_found
from gateway.api.shares import whose_turn
from gateway.api.visibility import seen_finding, sees_delivery, sees_named
from gateway.log.base import Partition
from gateway.model import UsageError
from gateway.ops import findings as ops
from gateway.ops.output import rfc3339
from gateway.ops.process_status import not_asked_finding
from gateway.ops.status_report import Scope, Statuses, StatusReport
from gateway.ops.waiting_deliveries import AttemptInfo
from gateway.required_topics import missing_of_rules
from gateway.rules.rules import Rules
from gateway.turns import give_way

MOST = 2_000
"""Findings that are told, the worst first."""
SECONDS = 20.0
"""For which all that is told is looked at: a client of the API waits for thirty."""
WAITING_SECONDS = 5.0
"""For which deliveries that wait are read, of these."""
NOT_TOLD = (
    "what is everybody's (the log, its partitions, the rules, spools, the index) is hidden from limited principals"
)
OF_ONE = "of several processes of one command, the first shows its own state: `gateway status --admin` asks all"
THIS = "this process"
"""By whom a finding is that the process has from its own memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusFinding(Finding):
    """Something that keeps deliveries from going out, or that an operator should look at: see `Finding`.

    `by` is who has paused it. `is_own`: the process that answers has it from its own memory, and others may have
    another. `count` may be of keys, too.
    """

    by: str | None
    is_own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusAttempt:
    """An attempt at a destination, of a delivery that waits or is a dead letter."""

    at: Time
    event_id: str
    delivery_id: str
    source: str
    route: str
    number: int
    seconds: float
    result: str
    status: int | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What keeps deliveries from going out, the worst first; `left_out` is how many more there are.

    `attempts` are the last ones at the destination that is asked for, newest first. `notes` are what wasn't looked at.
    `is_all_seen` is false if the process that answers isn't one that receives and delivers, so that nobody was asked
    for what is in the memory of those.
    """

    items: tuple[StatusFinding, ...]
    left_out: int
    attempts: tuple[StatusAttempt, ...]
    is_all_seen: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found, as far as the caller may see it."""

    found: Sequence[ops.Finding]
    attempts: Sequence[AttemptInfo]
    is_all_seen: bool
    notes: Sequence[str]


async def get_status(backend: Backend, principal: Principal, *, destination: str | None = None) -> Status:
    """Return what keeps deliveries from going out, as `gateway status` does: all, or what is about a destination."""
    rules = backend.rules()
    overview = await backend.overview(rules)
    is_known = destination in rules.destinations
    if destination is not None and principal.is_limited:
        sources = overview.sources_of.get(destination, ())
        if not is_known or not sees_named(principal, rules, "destination", destination, sources):
            raise not_found("a destination")
    try:
        found = await backend.shared.get(
            ("status", rules.version, destination), partial(_read, backend, rules, destination or "")
        )
    except UsageError as error:
        raise not_found("a destination") from error
    return await backend.aside(
        whose_turn(principal), partial(_shown, principal, rules, overview, destination or "", found)
    )


async def _read(backend: Backend, rules: Rules, destination: str) -> _Found:
    async def missing() -> Mapping[Partition, str]:
        return await missing_of_rules(backend.log, backend.topics, rules) if backend.may_lack_topics else {}

    async def known() -> Statuses:
        return statuses

    report = StatusReport(rules, destination)
    async with backend.turn(""), must_be_available(SECONDS):
        text = orjson.dumps(backend.status())
        statuses = await backend.aside("", lambda: [(_status(text), THIS)])
        scope = Scope(log=backend.log, topics=backend.topics, missing=missing, seconds=WAITING_SECONDS)
        await report.read(scope, known)
        if statuses[0][0].get("process") is not None:
            report.notes.append(OF_ONE)

    def finished() -> _Found:
        not_asked = not_asked_finding([status for status, _ in statuses])
        found = [*report.finished(statuses), *([] if not_asked is None else [not_asked])]
        return _Found(
            [ops.with_subject(each) for each in ops.ranked(found)], report.attempts(), not_asked is None, report.notes
        )

    return await backend.aside("", finished)


def _status(text: bytes) -> Mapping[str, Any]:
    """Return a process's status as it is read from elsewhere."""
    found: Mapping[str, Any] = orjson.loads(text)
    return found


def _shown(principal: Principal, rules: Rules, overview: Overview, destination: str, found: _Found) -> Status:
    items, left_out = list[StatusFinding](), 0
    for each in found.found:
        give_way()
        if (seen := seen_finding(principal, rules, overview, each)) is not None:
            if len(items) < MOST:
                items.append(_finding(seen))
            else:
                left_out += 1
    notes = list(found.notes)
    if principal.is_limited:
        notes.append(NOT_TOLD)
    return Status(
        items=tuple(items),
        left_out=left_out,
        attempts=tuple(
            [
                _attempt(each)
                for each in found.attempts
                if sees_delivery(principal, rules, each.source, each.route, destination)
            ]
        ),
        is_all_seen=found.is_all_seen,
        notes=tuple(notes),
    )


def _finding(finding: ops.Finding) -> StatusFinding:
    is_own = finding.by == THIS
    return StatusFinding(**told_fields(finding), by=None if is_own else finding.by or None, is_own=is_own)


def _attempt(tried: AttemptInfo) -> StatusAttempt:
    attempt = tried.attempt
    return StatusAttempt(
        at=rfc3339(attempt.at),
        event_id=tried.event_id,
        delivery_id=tried.delivery_id,
        source=tried.source,
        route=tried.route,
        number=attempt.number,
        seconds=attempt.seconds,
        result=attempt.result,
        status=attempt.status,
        detail=attempt.detail or None,
    )
