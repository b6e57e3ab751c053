"""What processes tell of themselves at `/status`, as findings: holds, refused rules, halted keys, a source's events."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from shlex import quote
from typing import Any

from typing_extensions import override

from gateway.engine.control import Control
from gateway.engine.ordered import Blocked
from gateway.engine.orders import Order
from gateway.log.base import NO_APPENDS
from gateway.model import answer_of
from gateway.ops.findings import HALTED, HELD, NOT_READ, REFUSED, SOURCE, WAITING, Finding, owners_first
from gateway.ops.output import rfc3339, when

LET_GO = "copies that dedupe let go"
CONFLICTS = "conflicts: their identity had come before with other content; delivered"
SHARE = 0.1
"""Of a source's events, that are copies, unrouted or refused: what is more is told."""
MOMENT = 0.001
"""Seconds to which a replay step tells its time."""
_HOLDS: Mapping[str, str] = {"retry_after": "it has asked for silence (Retry-After)", "breaker_open": "breaker open"}


def findings_in(answer: Mapping[str, Any], where: str, control: Control) -> list[Finding]:
    """Return what a process says at `/status` of its admin address, as far as no replay has brought it back."""
    found = [
        Finding(
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
        for hold in answer.get("holds", ())
    ]
    found += [
        Finding(
            rank=NOT_READ,
            what=f"{each['topic']}/{each['partition']}",
            why=each["reason"] if each["reason"].startswith(NO_APPENDS) else f"not read: {each['reason']}",
            since=each["since"],
            who=where,
            next=("# see the brokers: it goes on by itself",),
        )
        for each in answer.get("unread", ())
    ]
    if trouble := answer.get("log"):
        found.append(
            Finding(
                rank=NOT_READ,
                what="the log",
                why=f"doesn't answer, or refuses events: {trouble['reason']}",
                since=trouble["since"],
                who=where,
                next=("# make room on its disk, or see the brokers: it goes on by itself",),
            )
        )
    rules = answer.get("rules", {})
    found += _of_rules(rules, where, control)
    found += _of_loss(rules, where)
    found += [finding for each in answer.get("ordered", ()) for finding in _of_keys(each, where)]
    for source in answer.get("sources", ()):
        found += _of_source(source, where)
        found += _of_missed(source, where, control)
        found += _of_refused(source, where)
    return found


def _of_keys(told: Mapping[str, Any], where: str) -> Iterable[Finding]:
    """Tell of the keys of an ordered route that wait for a delivery which has failed: for a kick, or for its retry."""
    for state in ("halted", "blocked"):
        keys = told[state]
        if not keys["count"]:
            continue
        after = f" after {keys['after']}" if keys["after"] else ""
        why = f"keys {state}: {keys['reason']}{after}" if keys["reason"] else f"keys {state}{after}"
        steps = [f"gateway explain {keys['event_id']}"]
        yield Finding(
            rank=HALTED if state == "halted" else WAITING,
            what=f"{told['route']} → {told['destination']}",
            why=why,
            since=keys["since"],
            until=keys["until"],
            who=where,
            next=(*steps, f"gateway route kick {told['route']}") if state == "halted" else tuple(steps),
            count=keys["count"],
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


def _of_loss(rules: Mapping[str, Any], where: str) -> Iterable[Finding]:
    """Yield which routes of a process went at once a while ago."""
    loss = rules.get("loss")  # an older version doesn't tell
    if loss is None:
        return
    more = loss["count"] - len(loss["routes"])
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
        why=f"{loss['count']:,} of {loss['of']:,} routes went at once: {names}{back}",
        is_wrong=missing > 0,
        since=loss["since"],
        who=where,
        next=(put_back, *following) if missing else following,
    )


def _of_missed(source: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield what was left out of a source's events before the rules for it were changed, where that was much."""
    name = source["source"]
    for missed, how, let_go in ((source["missed"], "unrouted", False), (source["identity"]["missed"], LET_GO, True)):
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


def _of_source(source: Mapping[str, Any], where: str) -> Iterable[Finding]:
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
        (identity, "duplicates", f"{LET_GO}{_types(identity['types'])}", steps),
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


def _of_refused(source: Mapping[str, Any], where: str) -> Iterable[Finding]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What requests that are refused for such a reason say, and what to do about them.

    They say that something is wrong where they are more than `share` of a source's requests, and more than `few`; with
    None never, as anybody on the internet can cause them. So `few` is above 0 where no signature has been verified yet.
    """

    steps: tuple[str, ...]
    share: float | None = None
    few: int = 0

    def is_wrong(self, count: float, of_all: float) -> bool:
        return self.share is not None and count > self.few and count > self.share * of_all


FEW = 10
"""Refusals in a row, without a pause, that a stranger may have caused: the alert on signatures begins above it, too."""
HALF = 0.5
_EXPLAIN = "gateway explain {name}"
_AGAIN = "# what was refused the sender sends again by itself, or from its list of deliveries"


_OTHER = Refusal(steps=("# what is told of each: the lines request_finished of source {name}",))


_REFUSALS: Mapping[tuple[str, ...], Refusal] = {
    ("log_unavailable",): Refusal(
        share=SHARE,
        steps=("# the log took no events: why is in the lines log_unavailable, that it does in log_available", _AGAIN),
    ),
    ("overloaded",): Refusal(
        share=SHARE,
        few=FEW,
        steps=("# more came than the log stored: is it slow, or does it take more ingress processes?", _AGAIN),
    ),
    ("draining",): Refusal(steps=("# by a process that was ending, whose place another takes", _AGAIN)),
    ("bad_signature", "bad_credentials"): Refusal(
        share=SHARE,
        few=FEW,
        steps=(
            "# how it is verified, and where its secrets are from:",
            _EXPLAIN,
            "# after a rotation: put the new secret beside the old one in `secrets` of source {name}",
            _AGAIN,
        ),
    ),
    ("stale_timestamp",): Refusal(
        share=SHARE,
        few=FEW,
        steps=(
            "# how old a request may be (the answer to the sender says how old it was):",
            _EXPLAIN,
            "# our clock or the sender's is wrong, or something on the way holds requests back",
        ),
    ),
    (
        "missing_signature",
        "missing_credentials",
        "missing_timestamp",
        "missing_header",
        "malformed_signature",
        "malformed_timestamp",
        "repeated_header",
    ): Refusal(
        share=HALF,
        few=FEW,
        steps=(
            "# which headers are expected, and in which form:",
            _EXPLAIN,
            "# its sender signs otherwise or not at all, something on the way takes headers off, or it is a stranger",
        ),
    ),
    ("body_not_json", "expression_error"): Refusal(
        share=SHARE,
        steps=(
            "# what its `id`, `type` or `key` is read from isn't in these events, which are its own:",
            _EXPLAIN,
            _AGAIN,
        ),
    ),
    ("body_too_large",): Refusal(
        share=HALF,
        few=FEW,
        steps=("# larger than the log takes: can its sender be told to send less, such as a link?",),
    ),
    ("disconnected", "body_slow", "crowded_out"): Refusal(
        steps=("# who sent them broke off, or was too slow; anybody can do that, and a sender of ours sends again",)
    ),
    (
        "transfer_coding",
        "method_not_allowed",
        "malformed_body",
        "malformed_request",
        "head_slow",
        "head_too_large",
        "unknown_source",
    ): Refusal(
        steps=("# no webhook looks so: a stranger, or something on the way that rewrites requests of a sender of ours",)
    ),
}


def refusal_of(reason: str) -> Refusal:
    """Return what a reason says; a newer version may have others."""
    return next((kind for reasons, kind in _REFUSALS.items() if reason in reasons), _OTHER)


def told_of_keys(keys: Sequence[Blocked]) -> Mapping[str, Any]:
    """Tell how many keys of an ordered route have halted, or wait for a retry, and of the one that does so longest."""
    halted = [key for key in keys if key.halted is not None]
    blocked = [key for key in keys if key.halted is None]
    return {"halted": _longest(halted), "blocked": _longest(blocked)}


def _longest(keys: Sequence[Blocked]) -> Mapping[str, Any]:
    if not keys:
        return {"count": 0}
    key = min(keys, key=lambda each: each.since)
    attempts = key.delivery.attempts
    return {
        "count": len(keys),
        "since": key.since,
        "until": key.delivery.due or None if key.halted is None else None,
        "event_id": key.delivery.event.id,
        "reason": "" if key.halted is None else key.halted.reason,
        "after": answer_of(attempts[-1]) if attempts else "",
    }
