"""What processes tell of themselves at `/status`, as findings: holds, refused rules, halted keys, a source's events."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from shlex import quote
from typing import Any

from typing_extensions import override

from gateway.engine.control.records import Order
from gateway.engine.control.state import Control
from gateway.engine.ordered.route import Blocked
from gateway.log.base import NO_APPENDS
from gateway.log.json_fields import LATEST
from gateway.model import result_label
from gateway.ops.findings import HALTED, HELD, NOT_READ, REFUSED, SOURCE, WAITING, Finding, owners_first
from gateway.ops.output import rfc3339, when
from gateway.ops.refusal_advice import SHARE, refusal_of

SUPPRESSED = "duplicates that dedupe suppressed"
CONFLICTS = "conflicts: their identity had come before with other content; delivered"
MOMENT = 0.001
"""Seconds to which a replay step tells its time."""
_HOLDS: Mapping[str, str] = {"retry_after": "it has asked for silence (Retry-After)", "breaker_open": "breaker open"}


def findings_in(answer: Mapping[str, Any], where: str, control: Control) -> list[Finding]:
    """Return what a process says at `/status` of its admin address, as far as no replay has brought it back.

    It may be of another version: what can't be read of its answer is told as such, and the rest is told all the same.
    """
    found: list[Finding] = []
    unread: dict[str, None] = {}
    for name, read in _PARTS:
        told = answer.get(name)
        for each in told if isinstance(told, list) else [told]:
            if each is None:
                continue
            try:
                found += [_checked(finding) for finding in read(each, where, control)]
            except UNREADABLE:
                unread[name] = None
    if unread:
        found.append(_of_unread(tuple(unread), answer.get("version"), where))
    return found


UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
"""What reading an answer raises that isn't as this version expects it: OSError is of times that no calendar has."""


def _checked(finding: Finding) -> Finding:
    """Return a finding that can be shown. Raises ValueError for one with a time or a number that is none."""
    times: Sequence[object] = (finding.since, finding.until)
    number: object = finding.count
    if not all(at is None or (isinstance(at, int | float) and 0 <= at < LATEST) for at in times):
        raise ValueError(times)
    if not (number is None or isinstance(number, int)):
        raise ValueError(number)
    return finding


def _of_unread(names: Sequence[str], version: object, where: str) -> Finding:
    of = f", of version {version}," if version else ""
    return Finding(
        rank=NOT_READ,
        what=where,
        why=f"what this process{of} tells of {' and '.join(names)} can't be read here",
        who=where,
        next=("# is it of another version? `gateway status` of that one reads it",),
    )


def _of_hold(hold: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    yield Finding(
        rank=HELD,
        what=f"destination {hold['destination']}",
        why=_HOLDS.get(hold["why"], hold["why"]) + (f" after {hold['after']}" if hold["after"] else ""),
        since=hold["since"],
        until=hold["until"],
        who=where,
        next=(
            *owners_first(hold["destination"], hold["after"]),
            f"gateway destination kick {hold['destination']}",
        ),
    )


def _of_partition(unread: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    reason = unread["reason"]
    yield Finding(
        rank=NOT_READ,
        what=f"{unread['topic']}/{unread['partition']}",
        why=reason if reason.startswith(NO_APPENDS) else f"not read: {reason}",
        since=unread["since"],
        who=where,
        next=("# see the brokers: it goes on by itself",),
    )


def _of_log(trouble: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    yield Finding(
        rank=NOT_READ,
        what="the log",
        why=f"doesn't answer, or refuses events: {trouble['reason']}",
        since=trouble["since"],
        who=where,
        next=("# make room on its disk, or see the brokers: it goes on by itself",),
    )


def _of_keys(told: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Tell of the keys of an ordered route that wait for a delivery which has failed: for a kick, or for its retry."""
    for state, rank in (("halted", HALTED), ("blocked", WAITING)):
        if not told[state]:
            continue
        longest = told.get(f"longest_{state}") or {}  # an older version tells how many there are, and no more
        event, after, reason = longest.get("event_id"), longest.get("after"), longest.get("reason")
        explain = (f"gateway explain {event}",) if event else ()
        kick = (f"gateway route kick {told['route']}",) if rank == HALTED else ()
        yield Finding(
            rank=rank,
            what=f"{told['route']} → {told['destination']}",
            why=f"keys {state}" + (f": {reason}" if reason else "") + (f" after {after}" if after else ""),
            since=longest.get("since"),
            until=longest.get("until"),
            who=where,
            next=(*explain, *kick),
            count=int(told[state]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What replays have queued that cover what was missed; `is_done` once all of them have ended."""

    queued: int
    is_done: bool

    @override
    def __str__(self) -> str:
        return f"replayed since: {self.queued:,} queued" if self.is_done else f"being replayed: {self.queued:,} queued"


def replayed(control: Control, routes: Mapping[str, Iterable[str]], *, since: float, until: float) -> Replayed | None:
    """Return what the replays have queued that bring back what these routes (by source) missed in a time.

    None where they don't for each: a replay counts that was given after `until`, when the rules had come into force,
    and leaves out no destination, partition or moment.
    """
    orders: dict[str, Order] = {}
    for source, names in routes.items():
        for name in names:
            found = [order for order in control.orders.values() if _covers(order, source, name, since, until)]
            if not found:
                return None
            orders |= {order.key: order for order in found}
    queued = [order.count if order.state == "done" else control.injected(order.key) for order in orders.values()]
    return (
        Replayed(queued=sum(queued), is_done=all(order.state == "done" for order in orders.values()))
        if orders
        else None
    )


def _covers(order: Order, source: str, route: str, since: float, until: float) -> bool:
    which = order.selection
    return (
        which is not None
        and order.state in ("asked", "done")
        and not order.unread
        and order.at >= until
        and which.route == route
        and which.source in (None, source)
        and which.destination is None
        and which.since <= since + MOMENT
        and (which.until is None or which.until >= until)
    )


def _of_rules(rules: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield which rules a process has refused, and how to bring back what was missed meanwhile."""
    refusal = rules.get("refusal")
    if refusal is None:
        return
    since, until, file = refusal["since"], refusal["until"], refusal["file"]
    following = [
        "# what was missed meanwhile, once the new rules are in force; --dry-run tells how many that is:",
        f"gateway replay --from {rfc3339(since)} --undelivered",
    ]
    if until is None:
        written = "" if refusal["changed_at"] is None else f" of {when(refusal['changed_at'])}"
        more = f" (and {refusal['count'] - 1} more)" if refusal["count"] > 1 else ""
        problem = refusal["problems"][0] if refusal["problems"] else "see the line rules_refused"
        why = (
            f"{PurePath(file).name}{written} is refused: {problem}{more}; "
            f"those of {when(rules['loaded_at'])} are in force"
        )
        following.insert(0, f"gateway check {quote(rules['file'])}")
    else:
        why = "new rules were refused; they are in force now"
        if (done := replayed(control, refusal["routes"], since=since, until=until)) is not None:
            why, following = f"{why}; {done}", []
    yield Finding(
        rank=REFUSED,
        what="rules",
        why=why,
        is_wrong=until is None,
        since=since,
        until=until,
        who=where,
        next=tuple(following),
    )


def _of_loss(rules: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield which routes of a process went a while ago, most of them at once."""
    loss = rules.get("loss")  # an older version doesn't tell
    if loss is None:
        return
    more = loss["count"] - len(loss["routes"])
    reloads = loss.get("reloads", 1)
    how = "at once" if reloads == 1 else f"in {reloads:,} reloads"
    names = ", ".join([*loss["routes"], *([f"and {more:,} more"] if more else [])])
    missing = loss["missing"]
    back = "; they are back" if not missing else "" if missing == loss["count"] else f"; still missing: {missing:,}"
    following = (
        "# what they missed meanwhile, once they are back; --dry-run tells how many that is:",
        f"gateway replay --from {rfc3339(loss['since'])} --undelivered",
    )
    put_back = "# put them back, if this wasn't meant: what waits for their retries waits for an hour, and is dead then"
    yield Finding(
        rank=REFUSED,
        what="rules",
        why=f"{loss['count']:,} of {loss['of']:,} routes went {how}: {names}{back}",
        is_wrong=missing > 0,
        since=loss["since"],
        who=where,
        next=(put_back, *following) if missing else following,
    )


def _of_missed(source: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield what was left out of a source's events before the rules for it were changed, where that was much."""
    name = source["source"]
    for missed, how, let_go in (
        (source["missed"], "unrouted", False),
        (source["identity"]["missed"], SUPPRESSED, True),
    ):
        if missed is None or missed["count"] <= missed["events"] * SHARE:
            continue
        since, until = missed["since"], missed["until"]
        verb = "" if let_go else f"{_were(missed['count'])} "
        why = f"{verb}{how}{_types(missed['types'])} by the rules until {when(until)}"
        done = replayed(control, {name: missed["routes"] or ()}, since=since, until=until)
        ready = (
            "# if the identity that is in force now is as it should be; --dry-run tells how many are no copies by it:"
            if let_go
            else "# if the rules that are in force now are as they should be; --dry-run tells how many that is:"
        )
        yield Finding(
            rank=SOURCE,
            what=f"source {name}",
            why=why if done is None else f"{why}; {done}",
            is_wrong=done is None,
            since=since,
            until=until,
            who=where,
            next=(ready, _replay(name, since)) if done is None else (),
            count=missed["count"],
        )


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _types(types: Sequence[tuple[str, int]]) -> str:
    """Tell the most frequent types of a source's events: " (12 push, 3 ping)"."""
    return f" ({', '.join([f'{number:,} {name}' for name, number in types])})" if types else ""


def _replay(source: str, since: float) -> str:
    return f"gateway replay --source {source} --from {rfc3339(since)} --undelivered"


def _of_source(source: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield what a process has counted of a source since the rules for it are in force, where it is much."""
    name, identity = source["source"], source["identity"]
    steps = [
        "# by type, and whether the identity makes distinct events equal:",
        "gateway check --since 1h",
        "# fix the source's id; try it in a copy of the rules:",
        "gateway check NEW.yaml --since 1h",
        *(_missed(name, identity) if identity["duplicates"] else ()),
    ]
    unrouted = [
        f"gateway events list --source {name}",
        "# and why one of them matches no route:",
        f"gateway explain {source['newest'] or 'evt_…'}",
        *_missed(name, source),
    ]
    told = [
        (source, "unrouted", f"unrouted{_types(source['types'])}", unrouted),
        (identity, "duplicates", f"{SUPPRESSED}{_types(identity['types'])}", steps),
        (identity, "conflicts", CONFLICTS, steps),
    ]
    for counted, key, what, following in told:
        number, of_all, since = counted[key], counted["events"], counted["since"]
        if number <= of_all * SHARE:
            continue
        ever = "since the process began" if since is None else "since these rules are in force"
        # The events are counted by an ingress, and what becomes of them by a router, which may be another process.
        share = f", of {int(of_all):,}" if of_all >= number else ""
        yield Finding(
            rank=SOURCE,
            what=f"source {name}",
            why=f"{what}{share} {ever}",
            since=since,
            who=where,
            next=(*_changed(counted), *following),
            count=int(number),
        )


def _changed(counted: Mapping[str, Any]) -> list[str]:
    if counted["since"] is None:
        return []
    return [f"# the rules of {when(counted['loaded_at'])} changed {'; '.join(counted['changed'])}"]


def _missed(source: str, counted: Mapping[str, Any]) -> list[str]:
    since = counted["missed_since"]
    if since is None:
        return []
    return ["# what was missed since then, once they are as they should be:", _replay(source, since)]


def _of_refused(source: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield which requests a source has refused lately, where that is much."""
    name = source["source"]
    for reason, run in source["refused"].items():
        if run["count"] <= run["of"] * SHARE:
            continue
        kind = refusal_of(reason)
        yield Finding(
            rank=SOURCE,
            what=f"source {name}",
            why=f"refused: {reason}, of {int(run['of']):,}; the last at {when(run['last'])}",
            is_wrong=kind.is_wrong(run["count"], run["of"]),
            since=run["since"],
            who=where,
            next=tuple(step.format(name=name) for step in kind.steps),
            count=int(run["count"]),
        )


_PARTS: Sequence[tuple[str, Callable[[Mapping[str, Any], str, Control], Iterable[Finding]]]] = (
    ("holds", _of_hold),
    ("unread", _of_partition),
    ("log", _of_log),
    ("rules", _of_rules),
    ("rules", _of_loss),
    ("ordered", _of_keys),
    ("sources", _of_source),
    ("sources", _of_missed),
    ("sources", _of_refused),
)
"""What of an answer is read by what: a list of them, or one."""


def changes_told(answer: Mapping[str, Any], *, before: float) -> tuple[float, Sequence[str]] | None:
    """Return when a process's rules were changed last, and what of them; None if not before a time, or not told."""
    try:
        rules = answer["rules"]
        at, changed = float(rules["changed_at"]), [str(each) for each in rules["changed"]]
    except UNREADABLE:
        return None
    return (at, changed) if 0 <= at < before else None


def describe_keys(keys: Sequence[Blocked]) -> Mapping[str, Any]:
    """Tell how many keys of an ordered route have halted, or wait for a retry, and of the one that does so longest.

    The numbers are under names of their own, as a command of another version reads them.
    """
    halted = [key for key in keys if key.halted is not None]
    blocked = [key for key in keys if key.halted is None]
    return {
        "halted": len(halted),
        "blocked": len(blocked),
        "longest_halted": _longest(halted),
        "longest_blocked": _longest(blocked),
    }


def _longest(keys: Sequence[Blocked]) -> Mapping[str, Any] | None:
    if not keys:
        return None
    key = min(keys, key=lambda each: each.since)
    attempts = key.delivery.attempts
    return {
        "since": key.since,
        "until": key.delivery.due or None if key.halted is None else None,
        "event_id": key.delivery.event.id,
        "reason": "" if key.halted is None else key.halted.reason,
        "after": result_label(attempts[-1]) if attempts else "",
    }
