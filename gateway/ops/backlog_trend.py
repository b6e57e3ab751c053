"""Whether what isn't finished of a topic grows, shrinks or stands still, by looks at it some time apart. Pure.

One look tells how much isn't finished. That nobody works on it, only a later one tells, or that its group has no
member: what each process has in memory (halted keys, open breakers), only the process knows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from gateway.ops.findings import NOT_READ, Finding
from gateway.ops.secret_expiry import shown_time
from gateway.ops.unfinished import Reading, Unfinished

APART = 30.0
"""Seconds that two looks are apart, at least, by which anything is told: a delivery may take as long by itself."""
ASK = "gateway status --admin HOST:PORT"


class Look(NamedTuple):
    """What wasn't finished of a topic at a time (Unix seconds)."""

    at: float
    unfinished: Unfinished


class Trend(NamedTuple):
    """How many more aren't finished than some seconds ago (negative: fewer), and for how many none was finished."""

    seconds: float
    more: int
    stuck: float


def trend_of(looks: Sequence[Look]) -> Trend | None:
    """Return what has changed between the first and the last of these looks; None if they are too close for that."""
    if not looks or looks[-1].at - looks[0].at < APART:
        return None
    first, last = looks[0], looks[-1]
    if last.unfinished.finished < first.unfinished.finished:
        return None  # the topic is another
    same = next(each.at for each in looks if each.unfinished.finished == last.unfinished.finished)
    return Trend(
        seconds=last.at - first.at,
        more=last.unfinished.number - first.unfinished.number,
        stuck=last.at - same,
    )


def with_trend(
    finding: Finding, reading: Reading, trend: Trend | None, *, is_idle: bool, pauses: Sequence[str] = ()
) -> Finding:
    """Return a finding of what isn't finished, with what has changed of it, and with the next step.

    `is_idle`: the topic's group has no member. `pauses` are how the pauses are lifted that hold its deliveries.
    """
    if is_idle:
        return replace(
            finding,
            rank=NOT_READ,
            why=f"{finding.why}: no process reads them, as the group {reading.group} has no member",
            next=("# start a process that delivers:", "gateway run --role router"),
        )
    if pauses:
        return replace(finding, next=tuple(pauses))
    if trend is None or not finding.needs_attention:
        return finding
    route = "" if reading.target is None else reading.target[0]
    if trend.stuck >= APART:
        perhaps = "; a key may be halted" if route else ""
        return replace(
            finding,
            why=f"{finding.why}; none was finished for {shown_time(trend.stuck)}{perhaps}",
            next=(
                "# why, the process says that has them, if one has: which keys are halted, what it can't read or write",
                ASK,
                *((f"gateway route kick {route}",) if route else ()),
            ),
        )
    change = f"{abs(trend.more):,} {'more' if trend.more > 0 else 'fewer'} than" if trend.more else "as many as"
    steps = ("# which destinations are slow or stopped, the processes say that deliver:", ASK) if trend.more > 0 else ()
    return replace(
        finding, why=f"{finding.why}; {change} {shown_time(trend.seconds)} ago", next=(*finding.next, *steps)
    )
