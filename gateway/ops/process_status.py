"""Processes' own state, from `/status` of their admin addresses, as findings: holds, refused rules, halted keys."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from shlex import quote
from typing import Any

from gateway.engine.control.state import Control
from gateway.log.base import NO_APPENDS, Partition
from gateway.log.json_fields import LATEST
from gateway.model import DeadReason
from gateway.ops.certificates import certificate_findings
from gateway.ops.findings import (
    HALTED,
    HELD,
    NOT_READ,
    REFUSALS,
    REFUSED,
    SOURCE,
    WAITING,
    Finding,
    ask_owners_step,
    credential_step,
    pause_steps,
    unread_finding,
)
from gateway.ops.index_findings import index_findings
from gateway.ops.output import rfc3339, when
from gateway.ops.recovery import Replayed, covered, replayed
from gateway.ops.refusal_advice import FEW_REFUSALS, SHARE, refusal_of
from gateway.ops.secret_expiry import secret_findings
from gateway.ops.spool_findings import spool_findings
from gateway.settings import Role

SUPPRESSED = "duplicates that dedupe suppressed"
CONFLICTS = "conflicts: same identity as an earlier event, other content; delivered"
NEXT_IS_PROBE = "the next delivery is the probe"
_HOLDS: Mapping[str, str] = {"retry_after": "requested silence (Retry-After)", "breaker_open": "breaker open"}


def process_findings(status: Mapping[str, Any], where: str, control: Control) -> list[Finding]:
    """Return the findings in a process's `/status` response, without those that a replay has recovered.

    The process may be of another version: parts that can't be read are reported as such, the rest as usual.
    """
    found: list[Finding] = []
    unread: dict[str, None] = {}
    for name, read in _PARTS:
        part = status.get(name)
        for each in part if isinstance(part, list) else [part]:
            if each is None:
                continue
            try:
                found += [_checked(finding) for finding in read(each, where, control)]
            except UNREADABLE:
                unread[name] = None
    if unread:
        found.append(unreadable_finding(tuple(unread), status.get("version"), where))
    return found


def each_process(status: Mapping[str, Any], where: str) -> list[tuple[Mapping[str, Any], str]]:
    """Return the status of each process that an address has answered for, and where it is.

    Of one that didn't answer its parent, it is `{"problem": {"reason": …}}`.
    """
    several = status.get("processes")
    if not isinstance(several, list):
        return [(status, where)]
    return [(each, f"{where} process {each.get('process')}") for each in several if isinstance(each, dict)]


UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
"""What reading a response raises if it isn't as this version expects it: OSError for times that no calendar has."""


def _checked(finding: Finding) -> Finding:
    """Return the finding if it can be shown. Raises ValueError for one with an invalid time or number."""
    times: Sequence[object] = (finding.since, finding.until)
    number: object = finding.count
    if not all(at is None or (isinstance(at, int | float) and 0 <= at < LATEST) for at in times):
        raise ValueError(times)
    if not (number is None or isinstance(number, int)):
        raise ValueError(number)
    return finding


def unreadable_finding(names: Sequence[str], version: object, where: str) -> Finding:
    of = f" (version {version})" if version else ""
    return Finding(
        rank=NOT_READ,
        what=where,
        why=f"part of its status{of} can't be read here: {', '.join(names)}",
        by=where,
        next=("# is it of another version? use `gateway status` of that one",),
    )


def _unanswered_findings(problem: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    yield Finding(
        rank=NOT_READ,
        what=where,
        why=f"its parent has no answer from it: {problem['reason']}; its state in memory isn't shown",
        by=where,
        next=("# its lines `process_ended` have the exit code, and how long until it is started again",),
    )


def _hold_findings(hold: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    after = f" after {hold['after']}" if hold["after"] else ""
    untried_since = hold.get("untried_since")  # an older version doesn't report it
    if untried_since is not None:
        yield Finding(
            rank=HELD,
            what=f"destination {hold['destination']}",
            why=f"breaker opened{after}; not tried by this process since {when(untried_since)}; {NEXT_IS_PROBE}",
            needs_attention=False,
            since=hold["since"],
            by=where,
        )
        return
    yield Finding(
        rank=HELD,
        what=f"destination {hold['destination']}",
        why=_HOLDS.get(hold["why"], hold["why"]) + after,
        since=hold["since"],
        until=hold["until"],
        by=where,
        next=(
            *ask_owners_step(hold["destination"], hold["after"]),
            *pause_steps(control, "", hold["destination"]),
            f"gateway destination kick {hold['destination']}",
        ),
    )


def _partition_findings(unread: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    reason = unread["reason"]
    why = reason if reason.startswith(NO_APPENDS) else f"not read: {reason}"
    yield unread_finding(Partition(unread["topic"], unread["partition"]), why, reason, since=unread["since"], by=where)


def _log_findings(trouble: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    yield Finding(
        rank=NOT_READ,
        what="the log",
        why=f"doesn't respond, or rejects events: {trouble['reason']}",
        since=trouble["since"],
        by=where,
        next=("# free space on its disk, or check the brokers; it resumes by itself",),
    )


def _key_findings(keys: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield an ordered route's keys behind a failed delivery: halted until a kick, or blocked until its retry.

    Of one that the rules lack, `unfinished_findings` tells all.
    """
    if keys.get("unknown_since") is not None:  # an older version doesn't send it
        return
    paused = pause_steps(control, keys["route"], keys["destination"])
    if keys.get("quiet"):
        yield Finding(
            rank=WAITING,
            what=f"{keys['route']} → {keys['destination']}",
            why="debounced: the last event of each key waits until the key was quiet",
            needs_attention=False,
            until=keys.get("quiet_until"),
            by=where,
            count=int(keys["quiet"]),
        )
    for state, rank in (("halted", HALTED), ("blocked", WAITING)):
        if not keys[state]:
            continue
        longest = keys.get(f"longest_{state}") or {}  # an older version sends only how many there are
        event, after, reason = longest.get("event_id"), longest.get("after"), longest.get("reason")
        explain = (f"gateway explain {event}",) if event else ()
        is_refused = after in REFUSALS or bool(longest.get("refused"))
        credential = (credential_step(keys["destination"]),) if is_refused else ()
        kick = (f"gateway route kick {keys['route']}",) if rank == HALTED or is_refused else ()
        if reason == DeadReason.EXPRESSION_ERROR:
            kick = (f"# correct route {keys['route']} in the rules: its keys then continue by themselves",)
            reason = f"{reason}: {longest['detail']}" if longest.get("detail") else reason
        number = int(keys[state])
        failures = keys.get(f"failures_{state}") or ()  # an older version sends only the longest's
        why = (f": {reason}" if reason else "") + (f" after {after}" if after else "")
        yield Finding(
            rank=rank,
            what=f"{keys['route']} → {keys['destination']}",
            why=f"{'key' if number == 1 else 'keys'} {state}" + (_each(failures, number) if len(failures) > 1 else why),
            since=longest.get("since"),
            until=None if paused else longest.get("until"),
            by=where,
            next=(*credential, *explain, *paused, *kick),
            count=number,
        )


def _each(failures: Sequence[tuple[str, str, int]], number: int) -> str:
    """Return how keys failed differently, as the end of a reason: ": 2 exhausted after 503, 1 exhausted after 404"."""
    texts = [
        " ".join(filter(None, (f"{of:,}", reason, f"after {after}" if after else ""))) for reason, after, of in failures
    ]
    if (others := number - sum([of for _, _, of in failures])) > 0:
        texts.append(f"{others:,} otherwise")
    return f": {', '.join(texts)}"


def _refused_rules_findings(rules: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield which rules a process has refused, and how to recover the events missed meanwhile."""
    refusal = rules.get("refusal")
    if refusal is None:
        return
    since, until, file = refusal["since"], refusal["until"], refusal["file"]
    steps = [
        "# once the new rules are active, recover what was missed (count first with --dry-run):",
        f"gateway replay --from {rfc3339(since)} --undelivered",
    ]
    if until is None:
        written = "" if refusal["changed_at"] is None else f" of {when(refusal['changed_at'])}"
        more = f" (and {refusal['count'] - 1} more)" if refusal["count"] > 1 else ""
        problem = refusal["problems"][0] if refusal["problems"] else "see the log line rules_refused"
        why = (
            f"{PurePath(file).name}{written} is refused: {problem}{more}; "
            f"the rules loaded at {when(rules['loaded_at'])} are still active"
        )
        steps.insert(0, f"gateway check {quote(rules['file'])}")
    else:
        why = "new rules were refused; they are active now"
        if (done := covered(control, refusal["routes"], since=since, until=until)) is not None:
            why, steps = f"{why}; {done}", []
    yield Finding(
        rank=REFUSED,
        what="rules",
        why=why,
        needs_attention=until is None,
        since=since,
        until=until,
        by=where,
        next=tuple(steps),
    )


def _lost_routes_findings(rules: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield which routes a process lost, if most of them went at once."""
    loss = rules.get("loss")  # an older version doesn't send it
    if loss is None:
        return
    more = loss["count"] - len(loss["routes"])
    reloads = loss.get("reloads", 1)
    how = "at once" if reloads == 1 else f"in {reloads:,} reloads"
    names = ", ".join([*loss["routes"], *([f"and {more:,} more"] if more else [])])
    missing = loss["missing"]
    back = "; they are back" if not missing else "" if missing == loss["count"] else f"; still missing: {missing:,}"
    steps = (
        "# once they are back, recover what they missed (count first with --dry-run):",
        f"gateway replay --from {rfc3339(loss['since'])} --undelivered",
    )
    put_back = "# if this wasn't intended, put them back: their waiting deliveries become dead letters after an hour"
    yield Finding(
        rank=REFUSED,
        what="rules",
        why=f"{loss['count']:,} of {loss['of']:,} routes were removed {how}: {names}{back}",
        needs_attention=missing > 0,
        since=loss["since"],
        by=where,
        next=(put_back, *steps) if missing else steps,
    )


def _missed_events_findings(source: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield which of a source's events weren't delivered before its rules were changed, if they were many."""
    yield from _unrouted_before_findings(source, where, control)
    yield from _suppressed_before_findings(source, where, control)


def _unrouted_before_findings(source: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield the events that were unrouted before a change: wrong until replays have queued nearly all of them."""
    name, missed = source["source"], source["missed"]
    if missed is None or missed["count"] <= 0:
        return
    since, until, count = missed["since"], missed["until"], missed["count"]
    fan_out = missed.get("fan_out")  # an older version doesn't send it
    done = replayed(control, (name,), missed["routes"], since=since, until=until, fan_out=fan_out)
    left = count if done is None else max(0, count - done.events)
    under = f"under the rules active until {when(until)}"
    ready = "# if the current rules are correct, recover the missed events (count first with --dry-run):"
    steps = (ready, _replay(name, since)) if left else ()
    if done is not None and done.most > count:
        steps = (
            "# how many are still missed or dead-lettered, as far as the log shows:",
            f"{_replay(name, since)} --dry-run",
        )
    yield Finding(
        rank=SOURCE,
        what=f"source {name}",
        why=f"{_were(count)} unrouted{_types(missed['types'])} {under}{_progress(done, left, count)}",
        needs_attention=left > missed["events"] * SHARE,
        since=since,
        until=until,
        by=where,
        next=steps,
        count=count,
    )


def _suppressed_before_findings(source: Mapping[str, Any], where: str, control: Control) -> Iterable[Finding]:
    """Yield the duplicates suppressed before a change: wrong until a replay has checked all by the new identity.

    Those that it doesn't queue are duplicates by the new identity, too.
    """
    name, missed = source["source"], source["identity"]["missed"]
    if missed is None or missed["count"] <= missed["events"] * SHARE:
        return
    since, until = missed["since"], missed["until"]
    done = covered(control, {name: missed["routes"] or ()}, since=since, until=until)
    under = f"under the rules active until {when(until)}"
    ready = "# if the current identity is correct, recover those that are no duplicates (count first with --dry-run):"
    yield Finding(
        rank=SOURCE,
        what=f"source {name}",
        why=f"{SUPPRESSED}{_types(missed['types'])} {under}{_progress(done)}",
        needs_attention=done is None,
        since=since,
        until=until,
        by=where,
        next=(ready, _replay(name, since)) if done is None else (),
        count=missed["count"],
    )


def _progress(done: Replayed | None, left: int = 0, missed: int | None = None) -> str:
    """Return what replays have queued and how many events they haven't, as the end of a reason.

    Replays record neither which events they queued nor their times, so what is left may be more.
    """
    if done is None:
        return ""
    if missed is not None and done.most > missed:
        return f"; {done}, by one route more than were missed: others, too, so some of these may still be undelivered"
    return f"; {done}; still undelivered: at least {left:,}" if left else f"; {done}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _types(types: Sequence[tuple[str, int]]) -> str:
    """Return the most frequent types of a source's events as text: " (12 push, 3 ping)"."""
    return f" ({', '.join([f'{number:,} {name}' for name, number in types])})" if types else ""


def _replay(source: str, since: float) -> str:
    return f"gateway replay --source {source} --from {rfc3339(since)} --undelivered"


def _source_findings(source: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield which of a source's events weren't delivered under its current rules, or conflict.

    Unrouted ones are always told, and need attention if they are many; the others are told only then.
    """
    name, identity = source["source"], source["identity"]
    steps = [
        "# by type, and whether the identity makes distinct events equal:",
        "gateway check --since 1h",
        "# fix the source's id; try it in a copy of the rules:",
        "gateway check NEW.yaml --since 1h",
        *(_missed_steps(name, identity) if identity["duplicates"] else ()),
    ]
    unrouted = [
        f"gateway events list --source {name}",
        "# why one of them matches no route:",
        f"gateway explain {source['newest'] or 'evt_…'}",
        *_missed_steps(name, source),
    ]
    kinds = [
        (source, "unrouted", f"unrouted{_types(source['types'])}", "read", unrouted),
        (identity, "duplicates", f"{SUPPRESSED}{_types(identity['types'])}", "accepted", steps),
        (identity, "conflicts", CONFLICTS, "accepted", steps),
    ]
    for counted, key, what, done, steps in kinds:
        number, of_all, since = counted[key], counted["events"], counted["since"]
        needs_attention = number > of_all * SHARE
        if not number or not (needs_attention or key == "unrouted"):
            continue
        period = "since the process started" if since is None else "under the current rules"
        # Duplicates are found by a router, which may be another process than the ingress that counts the events.
        share = f", of {int(of_all):,} that this process {done}" if of_all >= number else ""
        yield Finding(
            rank=SOURCE,
            what=f"source {name}",
            why=f"{what}{share} {period}",
            needs_attention=needs_attention,
            since=since,
            by=where,
            next=(*_change_steps(counted), *steps),
            count=int(number),
        )


def _change_steps(counted: Mapping[str, Any]) -> list[str]:
    if counted["since"] is None:
        return []
    return [f"# the rules loaded at {when(counted['loaded_at'])} changed {'; '.join(counted['changed'])}"]


def _missed_steps(source: str, counted: Mapping[str, Any]) -> list[str]:
    since = counted["missed_since"]
    if since is None:
        return []
    return ["# once the rules are correct, recover what was missed since:", _replay(source, since)]


def _refused_requests_findings(source: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield which of a source's requests were refused lately, if they are many.

    A few are compared with all that came; more with those since the first of them, or a secret that is suddenly wrong
    would show only after days.
    """
    name = source["source"]
    for reason, run in source["refused"].items():
        few = run["count"] <= FEW_REFUSALS
        of = max(run["of"], source["identity"]["events"] + run["count"]) if few else run["of"]
        if run["count"] <= of * SHARE:
            continue
        kind = refusal_of(reason)
        yield Finding(
            rank=SOURCE,
            what=f"source {name}",
            why=f"refused: {reason}, of {int(run['of']):,} to this process since the first; "
            f"the last at {when(run['last'])}",
            needs_attention=kind.needs_attention(run["count"], run["of"]),
            since=run["since"],
            by=where,
            next=tuple(step.format(name=name) for step in kind.steps),
            count=int(run["count"]),
        )


_PARTS: Sequence[tuple[str, Callable[[Mapping[str, Any], str, Control], Iterable[Finding]]]] = (
    ("problem", _unanswered_findings),
    ("holds", _hold_findings),
    ("unread", _partition_findings),
    ("log", _log_findings),
    ("spool", spool_findings),
    ("certificates", certificate_findings),
    ("rules", _refused_rules_findings),
    ("rules", _lost_routes_findings),
    ("ordered", _key_findings),
    ("sources", _source_findings),
    ("sources", _missed_events_findings),
    ("sources", _refused_requests_findings),
    ("sources", secret_findings),
    ("index", index_findings),
)
"""Which part of a response is read by what: each of a list, or the part itself."""


def not_asked_finding(statuses: Sequence[Mapping[str, Any]], why: str = "") -> Finding | None:
    """Return what none of these processes could tell, as `why` none of its role was asked; None if nothing is missing.

    It isn't wrong, but it may hide what is.
    """
    roles = {str(status.get("role") or Role.ALL) for status in statuses}
    missing = [] if roles & {Role.ALL, Role.ROUTER} else [*_KNOWN_TO_ROUTERS]
    missing += [] if roles & {Role.ALL, Role.INGRESS} else [*_KNOWN_TO_INGRESSES]
    if not missing:
        return None
    missing += [] if roles else [*_KNOWN_TO_ALL]
    role = "process" if not roles else Role.ROUTER if Role.INGRESS in roles else Role.INGRESS
    role = "ingress or router" if roles == {Role.CONSOLE} else role
    return Finding(
        rank=NOT_READ,
        what="processes",
        why=f"no {role} was asked{f' ({why})' if why else ''}: not known are {', '.join(missing)}",
        needs_attention=False,
        next=("# with the admin address of each process (--admin is repeatable):", "gateway status --admin HOST:9090"),
    )


_KNOWN_TO_ROUTERS = ("holds (Retry-After, open breakers)", "halted and blocked keys", "unrouted and suppressed events")
_KNOWN_TO_INGRESSES = ("refused requests", "spools", "secrets and certificates that expire")
_KNOWN_TO_ALL = ("refused rules", "partitions that can't be read")
"""The kinds of findings that only processes know, by role."""


def last_rule_changes(status: Mapping[str, Any], *, before: float) -> tuple[float, Sequence[str]] | None:
    """Return when a process's rules last changed, and what; None if unknown, or not before that time."""
    try:
        rules = status["rules"]
        at, changed = float(rules["changed_at"]), [str(each) for each in rules["changed"]]
    except UNREADABLE:
        return None
    return (at, changed) if 0 <= at < before else None
