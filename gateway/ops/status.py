"""`gateway status`: what keeps deliveries from going out, as far as the event log shows.

It shows what is paused and by whom, and what waits, why and until when. The state that a process has in memory (open
breakers, `Retry-After`, halted keys, refused rules) comes from `/status` of its admin address: `process_status.py`.
"""

import asyncio
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from gateway.engine.control.records import ControlRecord, DeadFilter
from gateway.engine.control.state import Control
from gateway.engine.delivery.breaker import FAILURES
from gateway.engine.delivery.dispatcher import UNKNOWN_MAX_AGE
from gateway.engine.delivery.outcomes import LATE
from gateway.engine.delivery.retry_decision import Retry, decide
from gateway.log.attempt_records import AttemptRecord, decode_attempt_record
from gateway.log.base import Log, Partition
from gateway.log.topics import DAY, Topics
from gateway.model import Attempt, DeadLettered, DeadReason, SpillReason, UnreadableRecordError, result_label
from gateway.ops.dead_letters import DeadLetter, Group, Groups, read_dead_letters
from gateway.ops.findings import (
    DEAD,
    DEAD_BY_THEN,
    HELD,
    LOCAL_RULES,
    NOT_READ,
    PAUSED,
    REFUSALS,
    REFUSED,
    WAITING,
    Finding,
    ask_owners_step,
    credential_step,
    pause_steps,
    resume_steps,
    unknown_name_steps,
    unread_finding,
)
from gateway.ops.log_search import newest_first
from gateway.ops.output import count, rfc3339, when
from gateway.ops.process_status import last_rule_changes
from gateway.ops.recovery import covers
from gateway.ops.waiting_deliveries import (
    GOT,
    MAX_ATTEMPTS_SHOWN,
    WAIT_REASONS,
    AttemptInfo,
    Backlog,
    LastAttempts,
    Parked,
    counted_reason,
)
from gateway.rules.rules import Rules

FEW_ATTEMPTS_LEFT = 3
"""Remaining attempts at or below which a warning is shown."""
MAX_GROUPS_SHOWN = 5
OF_A_DAY = "--since 1d"
"""Arguments that limit a step to the last day, as its finding is: the topic keeps dead letters for 30 days."""

_GOT_REFUSALS = tuple([f"{GOT}{status}" for status in REFUSALS])


def paused_findings(control: Control, rules: Rules | None = None) -> list[Finding]:
    """Return what operators, or 410 responses, have paused. The local rules only change the next steps."""
    findings = []
    for command in control.commands.values():
        if command.kind != "pause" or command.state not in ("paused", "resuming"):
            continue
        kind, _, name = command.name.partition("/")
        is_paused = command.state == "paused"
        findings.append(
            Finding(
                rank=PAUSED,
                what=f"{kind} {name}",
                why="paused" if is_paused else "being resumed",
                needs_attention=is_paused,
                since=command.at,
                by=command.by,
                next=resume_steps(kind, name, rules) if is_paused else (),
            )
        )
    return findings


def unpaused_findings(
    parked: Mapping[str, Parked], control: Control, read_at: float, rules: Rules | None = None
) -> list[Finding]:
    """Return parked deliveries whose pause is no longer recorded, because the control topic was recreated.

    Processes that were running at the time keep the pauses they knew until they restart. `read_at` is when the control
    records were read. Deliveries that a resume missed are swept up automatically.
    """
    findings = []
    for by, each in parked.items():
        if f"pause/{by}" in control.commands or each.first > read_at - LATE:  # paused since it was read
            continue
        kind, _, name = by.partition("/")
        findings.append(
            Finding(
                rank=PAUSED,
                what=f"{kind} {name}",
                why=NO_PAUSE,
                since=each.first,
                next=resume_steps(kind, name, rules),
                count=each.count,
                route=name if kind == "route" else "",
                destination=name if kind == "destination" else "",
            )
        )
    return findings


NO_PAUSE = (
    "no pause is recorded any more: processes still running may keep the old one until they restart; if these "
    "deliveries were resumed before, another resume repeats them"
)


def waiting_findings(
    backlogs: Iterable[Backlog], now: float, rules: Rules | None = None, control: Control | None = None
) -> list[Finding]:
    """Return what waits, by route and destination.

    With `rules`, a finding also says what will soon be dead-lettered, and a destination's rate, if that is why. With
    `control`, what a pause holds has no next attempt, and its steps resume it before they kick it.
    """
    findings = []
    for each in backlogs:
        if not each.route:
            findings.append(_unknown_source_finding(each, now))
            continue
        is_open = WAIT_REASONS[SpillReason.BREAKER_OPEN] in each.reasons
        is_held = is_open or WAIT_REASONS[SpillReason.THROTTLED] in each.reasons
        last_result = (
            result_label(each.last) if is_open and each.last is not None and each.last.result in FAILURES else ""
        )
        is_parked = set(each.reasons) == {WAIT_REASONS[SpillReason.PAUSED]}
        is_refused = any(reason.startswith(_GOT_REFUSALS) for reason in each.reasons)
        needs_attention = is_held or is_refused or now - each.oldest > LATE
        suffixes = {WAIT_REASONS[SpillReason.BREAKER_OPEN]: f" after {last_result}"} if last_result else {}
        if (rate := None if rules is None else _rate(rules, each.destination)) is not None:
            suffixes |= dict.fromkeys(_FULL, f": its rate is {rate:g}/s")
        reasons = ", ".join(
            [counted_reason(number, reason, suffixes.get(reason, "")) for reason, number in each.reasons.most_common(3)]
        )
        steps = () if control is None else pause_steps(control, each.route, each.destination, rules)
        until = None if is_parked or steps else each.due
        if {*each.reasons} == {WAIT_REASONS[SpillReason.UNKNOWN_NAME]} and each.unknown_since < math.inf:
            until = each.unknown_since + UNKNOWN_MAX_AGE
            reasons += DEAD_BY_THEN
            steps = unknown_name_steps(each.route, each.destination, rules)
        elif not is_parked:
            steps = (
                *((credential_step(each.destination),) if is_refused else ()),
                *ask_owners_step(each.destination, last_result),
                *steps,
                *([f"gateway destination kick {each.destination}"] if each.destination else ()),
            )
        findings.append(
            Finding(
                rank=HELD if is_held else WAITING,
                what=f"{each.route} → {each.destination or 'no destination'}",
                why=reasons + ("" if is_parked or rules is None else _dead_letter_warning(each, rules, now)),
                needs_attention=needs_attention,
                since=min(each.oldest, now),  # the age of a delayed delivery starts in the future
                until=until,
                is_due=until is not None and until <= now,
                next=steps if needs_attention else (),
                count=each.count,
                route=each.route,
                destination=each.destination,
            )
        )
    return findings


_FULL = (WAIT_REASONS[SpillReason.OVERDUE], WAIT_REASONS[SpillReason.LANE_FULL])
"""Reasons that a destination's rate may explain."""


def _rate(rules: Rules, destination: str) -> float | None:
    found = rules.destinations.get(destination)
    return None if found is None else found.rate


def _unknown_source_finding(backlog: Backlog, now: float) -> Finding:
    name, needs_attention = backlog.source, now - backlog.oldest > LATE
    steps = (
        "# do all processes have these rules? (rules_reloaded, rules_refused)",
        "# events wait for them for an hour, then become dead letters (route_removed)",
        f"# if source {name} was removed too early, restore it until its events are delivered",
    )
    return Finding(
        rank=WAITING,
        what=f"source {name}",
        why="events of a source that isn't in the rules",
        needs_attention=needs_attention,
        since=backlog.oldest,
        until=backlog.due,
        is_due=backlog.due <= now,
        next=steps if needs_attention else (),
        count=backlog.count,
        source=name,
    )


def _dead_letter_warning(backlog: Backlog, rules: Rules, now: float) -> str:
    """Return a warning if the first delivery becomes a dead letter after at most FEW_ATTEMPTS_LEFT more failures."""
    route, delivery = rules.routes.get(backlog.route), backlog.tried
    if route is None or delivery is None:
        return ""
    at = max(delivery.due, now)
    for left in range(1, FEW_ATTEMPTS_LEFT + 1):
        last = delivery.attempts[-1]
        attempt = replace(last, number=last.number + 1, at=at)
        verdict = decide(delivery, attempt, route.retry, now=at)
        if isinstance(verdict, DeadLettered):
            more = "one more failed attempt" if left == 1 else f"{left} more failed attempts"
            return f"; the first becomes a dead letter ({verdict.reason}) after {more}"
        if not isinstance(verdict, Retry):
            return ""
        at, delivery = verdict.due, replace(delivery, attempts=(*delivery.attempts, attempt))
    return ""


def unread_findings(unread: Mapping[Partition, str]) -> list[Finding]:
    """Return the partitions that couldn't be read."""
    return [
        unread_finding(partition, f"not read: {reason}; its records aren't counted here", reason)
        for partition, reason in sorted(unread.items())
    ]


def process_unreachable_finding(address: str, error: Exception) -> Finding:
    """Return the finding for a process that doesn't respond."""
    return Finding(
        rank=NOT_READ,
        what=address,
        why=f"no gateway responds: {error}; its state in memory isn't shown",
        next=("# check that it is running, and that its --admin or GATEWAY_ADMIN is this address",),
    )


def log_unreachable_finding(error: Exception, *, has_statuses: bool) -> Finding:
    """Return the finding for a log that can't be read at all."""
    rest = "; everything else here comes from --admin" if has_statuses else ""
    return Finding(
        rank=NOT_READ,
        what="the log",
        why=f"not read: {error}; pauses, waiting deliveries and dead letters aren't shown",
        next=(f"# check the event log, and that --log or GATEWAY_LOG points to it{rest}",),
    )


def filter_by_destination(found: Iterable[Finding], name: str, routes: Collection[str]) -> list[Finding]:
    """Return what concerns a destination and the routes to it, and what couldn't be read, which may concern it."""
    what = {f"destination {name}", *[f"route {route}" for route in routes]}
    return [
        each
        for each in found
        if each.what in what or each.what.endswith(f" → {name}") or each.rank in (NOT_READ, REFUSED)
    ]


async def dead_letter_findings(
    log: Log,
    topics: Topics,
    control: Control,
    statuses: Sequence[Mapping[str, Any]],
    unread: dict[Partition, str],
    *,
    rules: Rules | None = None,
    seen: Callable[[DeadLetter], DeadLetter] = lambda letter: letter,
) -> list[Finding]:
    """Return the largest groups of the last day's open dead letters. Raises LogUnavailableError.

    `statuses` are processes' /status responses, with the last rule changes; `rules` are the local ones, which show what
    was removed since. `seen` returns a letter without what the caller may not see.
    """
    groups = Groups()
    filter_ = DeadFilter(since=log.now() - DAY)
    found = read_dead_letters(log, topics, control, filter_, include_resolved=False, unread=unread)
    async with aclosing(found) as letters:
        number = 0
        async for letter in letters:
            groups.add(seen(letter))
            number += 1
            if number % LETTERS_PER_STEP == 0:
                await asyncio.sleep(0)
    largest = groups.largest_first()[:MAX_GROUPS_SHOWN]
    return [_finding_for_group(each, groups.beside(each), statuses, rules, control) for each in largest]


def _resolve_steps(action: str, group: Group, which: str, others: int) -> list[str]:
    """Return the steps that replay or drop the dead letters of a group.

    The arguments `which` also match `others`, a number of dead letters of other groups. Unless it is 0, the step names
    the group's deliveries by their ids if they are few. If they are many, the replay says how many others it includes,
    and no drop is proposed.
    """
    if not others:
        return [f"gateway dead {action} {which}"]
    if group.ids:
        return [f"gateway dead {action} {' '.join(group.ids)}"]
    if action == "replay":
        return [f"# includes {count(others, 'other')}, with other results:", f"gateway dead replay {which}"]
    hint = f"# {count(others, 'other')} with other results would be included, so drop these by their ids:"
    return [hint, f"gateway dead list {which}"]


def _finding_for_group(
    group: Group, others: int, statuses: Sequence[Mapping[str, Any]], rules: Rules | None, control: Control
) -> Finding:
    which = f"--reason {group.reason} {OF_A_DAY}"
    if group.route:  # otherwise see `_WITHOUT_ROUTE`
        to = f"--destination {group.destination} " if group.destination else ""
        which = f"--route {group.route} {to}{which}"
    replay, drop = [_resolve_steps(action, group, which, others) for action in ("replay", "drop")]
    steps = [f"gateway dead list {which}"]
    gone = _missing_name(group, rules)
    if group.reason == DeadReason.EXPRESSION_ERROR and group.event:
        steps = [f"# {gone}: restore it first"] if gone else []
        steps += _expression_steps(group, statuses, control, replay, drop)
    elif group.reason == DeadReason.UNKNOWN_DESTINATION and not gone:
        steps += [
            *([f"gateway explain {group.event}"] if group.event else []),
            f"# once the rules have that destination, or an `otherwise` for route {group.route}:",
            *replay,
        ]
    elif gone:
        steps += [
            f"# {gone}: restore it first, or they end as route_removed again:",
            *replay,
            "# or have another route deliver their events, and then drop them:",
            f"gateway replay --route OTHER --from {rfc3339(int(group.received))} --undelivered",
            *drop,
        ]
    elif group.route:
        is_removed = rules is None and group.reason == DeadReason.ROUTE_REMOVED
        once = "# once the rules have its route and destination again:" if is_removed else "# once that has been fixed:"
        steps += [once, *replay]
    return Finding(
        rank=DEAD,
        what=f"{group.route} → {group.destination or 'no destination'}"
        if group.route
        else _WITHOUT_ROUTE[bool(group.event)],
        why=f"dead letters: {group.reason}" + (f", {group.last_result}" if group.last_result else ""),
        since=group.oldest,
        next=tuple(steps),
        count=group.count,
    )


def _missing_name(group: Group, rules: Rules | None) -> str:
    """Return which route or destination of these dead letters the local rules lack; "" if none, or without rules."""
    if rules is None or not group.route:
        return ""
    if group.route not in rules.routes:
        return f"{LOCAL_RULES} have no route {group.route}"
    is_there = not group.destination or group.destination in rules.destinations
    return "" if is_there else f"{LOCAL_RULES} have no destination {group.destination}"


_WITHOUT_ROUTE = {False: "records that can't be read", True: "events of a source that isn't in the rules"}
"""How records without a route are named, by whether they can be read."""


def _expression_steps(
    group: Group, statuses: Iterable[Mapping[str, Any]], control: Control, replay: list[str], drop: list[str]
) -> list[str]:
    """Return the steps for letters whose expression failed, of a request or a condition.

    `replay` and `drop` are the steps that replay or drop them. Replaying a letter renders its request by the current
    rules, and evaluates no condition: only a replay of the events shows which ones a fixed condition matches.
    """
    steps = [
        f"# the rules loaded at {when(changes[0])} changed {change}"
        for changes in [last_rule_changes(status, before=group.newest) for status in statuses]
        if changes is not None
        for change in changes[1]
        if change.startswith(f"route {group.route}: ")
    ]
    steps = [*dict.fromkeys(steps), f"gateway explain {group.event}"]
    if group.last_result.startswith(("request.", "request: ", "destinations.", "to: ")):
        return [
            *steps,
            "# once the rule is fixed (a field that isn't always there: has(body.a) ? body.a : …):",
            *replay,
        ]
    again = f"gateway replay --route {group.route} --from {rfc3339(int(group.received))} --undelivered"
    matched_at = max(
        [command.at for command in control.commands.values() if _was_replayed_in_vain(command, group)], default=None
    )
    if matched_at is not None:
        return [
            *steps,
            f"# the condition didn't match them in the replay of {when(matched_at)}; if that is correct:",
            *drop,
            "# or once it is fixed:",
            again,
        ]
    return [
        *steps,
        "# once the condition is fixed (matches the events again, and resolves the dead letters of matching ones):",
        again,
    ]


def _was_replayed_in_vain(command: ControlRecord, group: Group) -> bool:
    """Return whether a replay has matched these events again: the letters are open, so without a match, or in error."""
    which = command.selection  # one that isn't of what is undelivered matches, and resolves no letter
    has_resolved = command.state == "done" and which is not None and which.undelivered
    return has_resolved and covers(command, group.route, source=None, since=group.received, until=group.newest)


MAX_RECORDS, RECORDS_PER_STEP = 2_000, 100
"""Maximum of recorded attempts that are searched for those at one destination, and how many in a step: a few ms."""
LETTERS_PER_STEP = 16
"""Dead letters that are counted before other tasks run: less than a millisecond."""


async def add_dead_letters(
    log: Log,
    topics: Topics,
    control: Control,
    attempts: LastAttempts,
    unread: dict[Partition, str],
    *,
    seen: Callable[[DeadLetter], DeadLetter] = lambda letter: letter,
) -> None:
    """Add the newest dead letters of the destination, resolved ones included. Raises LogUnavailableError.

    `seen` is as in `dead_letter_findings`.
    """
    number = 0
    filter_ = DeadFilter(destination=attempts.destination)
    found = read_dead_letters(log, topics, control, filter_, include_resolved=True, unread=unread)
    async with aclosing(found) as letters:
        async for letter in letters:
            if (decoded := seen(letter).decoded) is not None:
                attempts.add(decoded)
                number += 1
            if number >= MAX_ATTEMPTS_SHOWN:
                break


async def add_recorded_attempts(log: Log, topics: Topics, attempts: LastAttempts, hides: Callable[[str], bool]) -> str:
    """Add the newest recorded attempts at the destination, including those of deliveries that have succeeded since.

    Details are left out for sources that `hides`. Returns a note on those that weren't searched, or "".
    Raises LogUnavailableError.
    """
    unread: dict[Partition, str] = {}
    number = looked_at = 0
    async with aclosing(newest_first(log, [topics.attempts], unread=unread)) as records:
        async for found in records:
            with suppress(UnreadableRecordError):
                record = decode_attempt_record(found.record)
                if record.destination == attempts.destination:
                    attempts.add_attempt(_attempt_of(record, is_hidden=hides(record.source)))
                    number += 1
            looked_at += 1
            if number >= MAX_ATTEMPTS_SHOWN:
                break
            if looked_at >= MAX_RECORDS:
                return f"of recorded attempts, the newest {MAX_RECORDS:,} of all destinations were looked through"
            if looked_at % RECORDS_PER_STEP == 0:
                await asyncio.sleep(0)
    return f"some recorded attempts can't be read: {', '.join(sorted(set(unread.values())))}" if unread else ""


def _attempt_of(record: AttemptRecord, *, is_hidden: bool) -> AttemptInfo:
    attempt = Attempt(
        number=record.number,
        at=record.at,
        seconds=record.seconds,
        result=record.result,
        status=record.status,
        detail="" if is_hidden else record.detail,
        retry_after=record.retry_after,
    )
    return AttemptInfo(
        delivery_id=record.delivery_id,
        event_id=record.event_id,
        source=record.source,
        route=record.route,
        attempt=attempt,
    )
