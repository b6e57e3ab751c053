"""What is wrong in all processes, as far as the log shows it: for who may see that."""

import asyncio
from dataclasses import dataclass
from heapq import merge
from typing import Any

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.json_shapes import Time
from gateway.api.log_findings import Scene
from gateway.api.visibility import seen_finding
from gateway.ops import findings as ops
from gateway.ops.output import rfc3339
from gateway.ops.rejected import group_findings

MOST = 200
"""Findings that are told, the worst first."""
FINDINGS_PER_STEP = 200
"""Findings that are looked at before other tasks run: less than a millisecond."""
RULES = "the rules of the process that answers"
"""What is told instead of `ops.LOCAL_RULES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that keeps deliveries from going out, or that an operator should look at.

    `until` is when it ends, or the next attempt; `is_due`: that was due then. `count` is of how many deliveries, or
    events; null, as `since`, for who sees only some of these: `why` says so. `steps` are what to do, a command each;
    comments begin with `#`. `source`, `route` and `destination` are what it is about, as far as it is about one.
    """

    kind: ops.Kind
    what: str
    why: str
    needs_attention: bool
    since: Time | None
    until: Time | None
    is_due: bool
    count: int | None
    steps: tuple[str, ...]
    source: str | None
    route: str | None
    destination: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the log shows, the worst first, as of a time; `left_out` is how many more there are.

    `notes` are what couldn't be looked at. What each process has in memory (open breakers, halted keys), the log
    doesn't have: only what has come of it.
    """

    items: tuple[Finding, ...]
    left_out: int
    as_of: Time
    notes: tuple[str, ...]


async def list_findings(backend: Backend, principal: Principal) -> Findings:
    """List what is wrong in all processes, as far as log and rules show it: what waits, isn't read, or is silent."""
    rules = backend.rules()
    overview = await backend.overview(rules)
    async with must_be_available():
        scene = Scene(backend.log, backend.topics, rules, await backend.control(), backend.sees_members)
        of_deliveries, of_sources, kept = await asyncio.gather(
            backend.log_reader.of_deliveries(scene),
            backend.log_reader.of_sources(scene),
            backend.log_reader.of_quarantine(scene),
        )
    refused = ops.ranked(group_findings(kept.groups, is_all=kept.is_whole, most=MOST))
    found = (*of_deliveries.found, *of_sources.found, refused)
    items, left_out = list[Finding](), 0
    for number, each in enumerate(merge(*found, key=ops.rank_of)):
        if number % FINDINGS_PER_STEP == 0:
            await asyncio.sleep(0)
        seen = seen_finding(principal, rules, overview, each)
        if seen is None:
            continue
        if len(items) < MOST:
            items.append(Finding(**told_fields(seen)))
        elif principal.is_limited:
            left_out += 1
        else:
            left_out = sum(map(len, found)) - MOST
            break
    return Findings(
        items=tuple(items),
        left_out=left_out,
        as_of=rfc3339(of_deliveries.at),
        notes=(*of_deliveries.notes, *of_sources.notes),
    )


def told_fields(finding: ops.Finding) -> dict[str, Any]:
    """Return the fields of a finding as it is told."""
    return {
        "kind": ops.KINDS[finding.rank],
        "what": finding.what,
        "why": _of_process(finding.why),
        "needs_attention": finding.needs_attention,
        "since": None if finding.since is None else rfc3339(finding.since),
        "until": None if finding.until is None else rfc3339(finding.until),
        "is_due": finding.is_due,
        "count": finding.count,
        "steps": tuple([_of_process(step) for step in finding.next]),
        "source": finding.source or None,
        "route": finding.route or None,
        "destination": finding.destination or None,
    }


def _of_process(text: str) -> str:
    return text.replace(ops.LOCAL_RULES, RULES)
