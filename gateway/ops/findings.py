"""A finding of `gateway status`: something an operator should know; and how findings are ranked."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from gateway.engine.control.state import Control
from gateway.engine.unavailable_partitions import name_of
from gateway.log.base import NO_TOPIC, Partition
from gateway.model import DeadReason
from gateway.rules.rules import Rules

NOT_READ, REFUSED, PAUSED, HELD, HALTED, WAITING, DEAD, SOURCE, SILENT, INDEX = range(10)
"""Ranks, the worst first."""
Kind = Literal["not_read", "refused", "paused", "held", "halted", "waiting", "dead", "source", "silent", "index"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What each rank is called."""
LOCAL_RULES = "the local rules"
"""What a command calls the rules that it reads; by the API, these are others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that keeps deliveries from going out, or that an operator should look at. Times are Unix seconds.

    `next` are the steps to take, one command a line; comments begin with `#`. `until` is when it ends, or the next
    attempt; if that `is_due`, when it became due. `by` is who has paused it, or the address of the process that
    reports it. `source`, `route` and `destination` are what it is about, "" if it is about none, or nobody asks.
    """

    rank: int
    what: str
    why: str
    needs_attention: bool = True
    since: float | None = None
    until: float | None = None
    is_due: bool = False
    by: str = ""
    next: tuple[str, ...] = ()
    count: int | None = None
    source: str = ""
    route: str = ""
    destination: str = ""


def with_subject(finding: Finding) -> Finding:
    """Return a finding with the source, route or destination that it is about, if its name says that it's about one."""
    if finding.source or finding.route or finding.destination:
        return finding
    kind, _, name = finding.what.partition(" ")
    route, arrow, destination = finding.what.partition(" → ")
    if arrow:
        return replace(finding, route=route, destination="" if " " in destination else destination)
    match kind:
        case "source":
            return replace(finding, source=name)
        case "route":
            return replace(finding, route=name)
        case "destination":
            return replace(finding, destination=name)
        case _:
            return finding


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Return the worst first: what is wrong before what isn't, then by rank, then the oldest."""
    return sorted(findings, key=rank_of)


def rank_of(finding: Finding) -> tuple[bool, bool, int, float, str]:
    """Return what findings are in order by, the worst first.

    Rules that aren't refused any more come last: they are over, and what waits isn't.
    """
    is_over = finding.rank == REFUSED and not finding.needs_attention
    return not finding.needs_attention, is_over, finding.rank, finding.since or float("inf"), finding.what


def unread_finding(partition: Partition, why: str, reason: str, *, since: float | None = None, by: str = "") -> Finding:
    """Return that a partition is of no use for a reason, as `why` has it; or that its topic is missing."""
    is_missing = reason == NO_TOPIC
    missing = f"{NO_TOPIC}; what belongs there waits, is rejected, or (attempts) isn't recorded, until it exists"
    return Finding(
        rank=NOT_READ,
        what=partition.topic if is_missing else f"{partition.topic}/{name_of(partition)}",
        why=missing if is_missing else why,
        since=since,
        by=by,
        next=("gateway topics create" if is_missing else "# check the brokers; reading resumes by itself",),
    )


def resume_steps(kind: str, name: str, rules: Rules | None = None) -> tuple[str, ...]:
    """Return how a route or destination is resumed, also one that the local rules no longer name."""
    if rules is None or name in (rules.routes if kind == "route" else rules.destinations):
        return (f"gateway {kind} resume {name}",)
    return (
        f"# {LOCAL_RULES} have no {kind} {name}: restore it first, or its paused deliveries end as route_removed:",
        f"gateway {kind} resume {name} --force",
    )


def pause_steps(control: Control, route: str, destination: str, rules: Rules | None = None) -> tuple[str, ...]:
    """Return how the pauses are lifted that hold a route's deliveries to a destination; nothing without one.

    A kick retries nothing of them before that. Without a route, only a pause of the destination counts.
    """
    steps: list[str] = []
    for kind, name in (("route", route), ("destination", destination)):
        command = control.commands.get(f"pause/{kind}/{name}")
        if command is not None and command.state == "paused":
            steps += resume_steps(kind, name, rules)
    return tuple(steps)


DEAD_BY_THEN = "; if it still isn't by then, they become dead letters (route_removed)"
"""Follows that something isn't in the rules, beside the time until which deliveries wait for that."""


def unknown_name_steps(route: str, destination: str, rules: Rules | None) -> tuple[str, ...]:
    """Return what to do about deliveries of a route or destination that the rules of processes lack."""
    missing = [
        f"{kind} {name}"
        for kind, name, names in (
            ("route", route, () if rules is None else rules.routes),
            ("destination", destination, () if rules is None else rules.destinations),
        )
        if rules is not None and name and name not in names
    ]
    to = f" --destination {destination}" if destination else ""
    return (
        f"# put {' and '.join(missing)} back into the rules, and they are delivered"
        if missing
        else "# do all processes have these rules? (rules_reloaded, rules_refused)",
        "# what has become a dead letter:",
        f"gateway dead list --route {route}{to} --reason {DeadReason.ROUTE_REMOVED}",
    )


REFUSALS = ("401", "403")
"""Responses that refuse our credential."""


def credential_step(destination: str) -> str:
    """Return the advice for a destination that refuses our credential."""
    return f"# replace our credential for {destination} first"


def ask_owners_step(destination: str, after: str) -> list[str]:
    """Return the advice to ask a destination's owners, with its last failure; nothing without one."""
    if not after:
        return []
    problems = {"timeout": "doesn't respond", "auth": "gets no requests, as its token endpoint issues no token"}
    problem = problems.get(after, f"responds with {after}" if after.isdecimal() else f"can't be reached ({after})")
    return [f"# {destination} {problem}: ask its owners first"]
