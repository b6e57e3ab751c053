"""`gateway status`: what keeps deliveries from going out, the worst first.

The log knows what is paused and by whom, and what waits, for which reason and until when. What a process has in memory
(breakers, silence that was asked for, keys that halt, rules that it refuses) it answers at `/status` of its admin
address.
"""

import heapq
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from shlex import quote
from typing import Any

from typing_extensions import override

from gateway.engine.breaker import FAILURES
from gateway.engine.control import Control
from gateway.engine.orders import DeadFilter, Order, place_of
from gateway.engine.retry import Retry, decide
from gateway.engine.successors import WHY
from gateway.engine.unread import name_of
from gateway.log.base import Commit, Log, Partition
from gateway.log.records import StoredDelivery, decode_delivery
from gateway.log.topics import DAY, ROUTER_GROUP, TIERS, Topics
from gateway.model import Attempt, DeadLettered, DeadReason, Delivery, SpillReason, UnreadableRecordError, answer_of
from gateway.ops.history import bounds_of
from gateway.ops.letters import Group, Groups, read_letters, result_of
from gateway.ops.output import rfc3339, when
from gateway.rules.rules import Rules

FEW = 3
"""Tries that a delivery has left, of which it is told."""
LATE = 30.0
"""Seconds from an event's receipt after which its delivery is late, and something is wrong."""
MOST_ATTEMPTS = 20
MOST_REASONS = 100
"""Of a backlog that are told apart: an answer may name an id."""
MOST_GROUPS = 5
LET_GO = "copies that dedupe let go"
CONFLICTS = "conflicts: different events of one identity, all delivered"
SHARE = 0.1
"""Of a source's events, that are copies, unrouted or refused: what is more is told."""
MOMENT = 0.001
"""Seconds to which a replay step tells its time."""
NOT_READ, REFUSED, PAUSED, HELD, HALTED, WAITING, DEAD, SOURCE = range(8)
"""Ranks, the worst first."""
_WHY: Mapping[str, str] = {
    SpillReason.BREAKER_OPEN: "breaker open",
    SpillReason.THROTTLED: "Retry-After",
    SpillReason.LANE_FULL: "its queue is full",
    SpillReason.OVERDUE: "its queue is slow",
    SpillReason.WINDOW_FULL: "it held a partition back",
    SpillReason.PAUSED: "paused",
    SpillReason.UNKNOWN_NAME: "not in the rules",
}
_HOLDS: Mapping[str, str] = {"retry_after": "it has asked for silence (Retry-After)", "breaker_open": "breaker open"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that keeps deliveries from going out, or that waits. Times are Unix seconds.

    `next` is what to do about it, a command a line; a line that isn't one begins with `#`.
    """

    rank: int
    what: str
    why: str
    is_wrong: bool = True
    since: float | None = None
    until: float | None = None
    who: str = ""
    next: tuple[str, ...] = ()
    count: int | None = None


@dataclass(slots=True, kw_only=True)
class Backlog:
    """What waits of one route for one destination; of a source, where the rules had none of its name."""

    route: str
    destination: str
    source: str = ""
    count: int = 0
    oldest: float = float("inf")
    due: float = float("inf")
    reasons: Counter[str] = field(default_factory=Counter)
    last: Attempt | None = None
    """The newest attempt that the log knows."""
    tried: Delivery | None = None
    """The delivery that was tried most often, without its body."""

    def add(self, filed: StoredDelivery) -> None:
        delivery = filed.delivery
        self.count += 1
        self.oldest = min(self.oldest, delivery.since or delivery.event.received_at)
        self.due = min(self.due, delivery.due)
        attempt = delivery.attempts[-1] if delivery.attempts else None
        if attempt is not None and (self.tried is None or attempt.number > self.tried.attempts[-1].number):
            self.tried = replace(delivery, event=replace(delivery.event, body=b""))
        if attempt is not None and (self.last is None or attempt.at > self.last.at):
            self.last = attempt
        reason = reason_of_waiting(filed)
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MOST_REASONS else "others"] += 1


def reason_of_waiting(filed: StoredDelivery) -> str:
    """Tell why a delivery waits: by what its record notes, else by its last attempt."""
    why = filed.note.get(WHY)
    if why is not None:
        return _WHY.get(why, why)
    attempts = filed.delivery.attempts
    return result_of(attempts[-1]) if attempts else "not tried yet"


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Return the worst first: what is wrong before what isn't, then by rank, then the longest."""
    return sorted(findings, key=lambda each: (not each.is_wrong, each.rank, each.since or float("inf"), each.what))


def paused_in(control: Control) -> list[Finding]:
    """Return what operators, or answers, have paused."""
    found = []
    for order in control.orders.values():
        if order.kind != "pause" or order.state not in ("paused", "resuming"):
            continue
        kind, _, name = order.name.partition("/")
        is_paused = order.state == "paused"
        found.append(
            Finding(
                rank=PAUSED,
                what=f"{kind} {name}",
                why="paused" if is_paused else "being resumed",
                is_wrong=is_paused,
                since=order.at,
                who=order.by,
                next=(f"gateway {kind} resume {name}",) if is_paused else (),
            )
        )
    return found


def findings_of(backlogs: Iterable[Backlog], now: float, rules: Rules | None = None) -> list[Finding]:
    """Return what waits, by route and destination; by the rules, where they are at hand, also what soon won't."""
    found = []
    for each in backlogs:
        if not each.route:
            found.append(_of_no_source(each, now))
            continue
        is_open = _WHY[SpillReason.BREAKER_OPEN] in each.reasons
        is_held = is_open or _WHY[SpillReason.THROTTLED] in each.reasons
        after = answer_of(each.last) if is_open and each.last is not None and each.last.result in FAILURES else ""
        is_parked = set(each.reasons) == {_WHY[SpillReason.PAUSED]}
        is_wrong = is_held or now - each.oldest > LATE
        opened = {_WHY[SpillReason.BREAKER_OPEN]: f" after {after}"} if after else {}
        told = ", ".join(
            [f"{number:,} {reason}{opened.get(reason, '')}" for reason, number in each.reasons.most_common(3)]
        )
        following = [*_owners_first(each.destination, after), f"gateway destination kick {each.destination}"]
        if any(reason.startswith(("401", "403")) for reason in each.reasons):
            following.insert(0, f"# replace our credential of {each.destination} first")
        found.append(
            Finding(
                rank=HELD if is_held else WAITING,
                what=f"{each.route} → {each.destination}",
                why=told + ("" if is_parked or rules is None else _ends_soon(each, rules, now)),
                is_wrong=is_wrong,
                since=each.oldest,
                until=None if is_parked else max(each.due, now),
                next=tuple(following) if is_wrong and not is_parked else (),
                count=each.count,
            )
        )
    return found


def _of_no_source(backlog: Backlog, now: float) -> Finding:
    name, is_wrong = backlog.source, now - backlog.oldest > LATE
    following = (
        "# do all processes have these rules? (rules_reloaded, rules_refused)",
        "# events wait for them for an hour, and are dead letters (route_removed) then",
        f"# if source {name} was removed too early, put it back until its events are out",
    )
    return Finding(
        rank=WAITING,
        what=f"source {name}",
        why="events of a source that no rules name",
        is_wrong=is_wrong,
        since=backlog.oldest,
        until=max(backlog.due, now),
        next=following if is_wrong else (),
        count=backlog.count,
    )


def _ends_soon(backlog: Backlog, rules: Rules, now: float) -> str:
    """Say after how many more tries there are dead letters, if these are few, and get what the last one got."""
    route, delivery = rules.routes.get(backlog.route), backlog.tried
    if route is None or delivery is None:
        return ""
    at = max(delivery.due, now)
    for left in range(1, FEW + 1):
        last = delivery.attempts[-1]
        attempt = replace(last, number=last.number + 1, at=at)
        verdict = decide(delivery, attempt, route.retry, now=at)
        if isinstance(verdict, DeadLettered):
            after = "the next try" if left == 1 else f"{left} more tries"
            return f"; after {after} like the last the first is a dead letter ({verdict.reason})"
        if not isinstance(verdict, Retry):
            return ""
        at, delivery = verdict.due, replace(delivery, attempts=(*delivery.attempts, attempt))
    return ""


def _owners_first(destination: str, after: str) -> list[str]:
    """Say what is wrong with a destination whose breaker is open, by what the last attempt got that failed."""
    if not after:
        return []
    does = {"timeout": "doesn't answer", "auth": "can't be asked, as its token endpoint gives no token"}
    told = does.get(after, f"answers {after}" if after.isdecimal() else f"can't be reached ({after})")
    return [f"# {destination} {told}: its owners first"]


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
                *_owners_first(hold["destination"], hold["after"]),
                f"gateway destination kick {hold['destination']}",
            ),
        )
        for hold in answer.get("holds", ())
    ]
    found += [
        Finding(
            rank=NOT_READ,
            what=f"{each['topic']}/{each['partition']}",
            why=f"not read: {each['reason']}",
            since=each["since"],
            who=where,
            next=("# see the brokers: it is read again by itself",),
        )
        for each in answer.get("unread", ())
    ]
    rules = answer.get("rules", {})
    found += _of_rules(rules, where, control)
    for each in answer.get("ordered", ()):
        name = f"{each['route']} → {each['destination']}"
        for word, following in (("halted", (f"gateway route kick {each['route']}",)), ("blocked", ())):
            if each[word]:
                why = f"keys {word}"
                found.append(Finding(rank=HALTED, what=name, why=why, who=where, next=following, count=int(each[word])))
    for source in answer.get("sources", ()):
        found += _of_source(source, where)
        found += _of_missed(source, where, control)
        found += _of_refused(source, where)
    return found


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
        following = ["# how it is verified, and where its secrets are from:", f"gateway explain {name}"]
        if reason in ("bad_signature", "bad_credentials"):
            following += [
                f"# after a rotation: put the new secret beside the old one in `secrets` of source {name}",
                "# what was refused the sender sends again by itself, or from its list of deliveries",
            ]
        yield Finding(
            rank=SOURCE,
            what=f"source {name}",
            why=f"refused: {reason}, of {int(run['of']):,}; the last at {when(run['last'])}",
            since=run["since"],
            who=where,
            next=tuple(following),
            count=int(run["count"]),
        )


async def waiting(
    log: Log, topics: Topics, control: Control, unread: dict[Partition, str]
) -> AsyncIterator[StoredDelivery]:
    """Yield each delivery that waits in the retry topics, or is parked; what can't be read, and why, goes to `unread`.

    Raises LogUnavailableError.
    """
    for tier in TIERS:
        topic = topics.retry(tier)
        async for partition, offset, filed in _of_topic(log, topics, topic, unread):
            if not control.is_kicked(filed.delivery.route, filed.delivery.destination, partition, offset):
                yield filed
    async for filed in _parked(log, topics, control, unread):
        yield filed


async def _parked(
    log: Log, topics: Topics, control: Control, unread: dict[Partition, str]
) -> AsyncIterator[StoredDelivery]:
    async for partition, offset, filed in _of_topic(log, topics, topics.parked, unread):
        was_resumed = control.marker(f"pause/{filed.note.get('by', '')}").get(place_of(partition), 0) > offset
        if not was_resumed:
            yield filed


async def parked_of(
    log: Log, topics: Topics, control: Control, name: str, unread: dict[Partition, str]
) -> Mapping[str, int]:
    """Return what is parked of a "route/…" or "destination/…": name that is paused → deliveries.

    `unread` is as in `waiting`. Raises LogUnavailableError.
    """
    kind, _, called = name.partition("/")
    found = Counter[str]()
    paused = {order.name for order in control.orders.values() if order.kind == "pause" and order.state == "paused"}
    if paused:
        async for filed in _parked(log, topics, control, unread):
            by, delivery = filed.note.get("by", ""), filed.delivery
            if by in paused and called == (delivery.route if kind == "route" else delivery.destination):
                found[by] += 1
    return found


async def _of_topic(
    log: Log, topics: Topics, topic: str, unread: dict[Partition, str]
) -> AsyncIterator[tuple[Partition, int, StoredDelivery]]:
    """Yield each delivery of a topic that the router hasn't done, with its place."""
    commits = await log.committed(topics.group(ROUTER_GROUP), topic)
    for number, (start, end) in (await bounds_of(log, topic, unread)).items():
        partition = Partition(topic, number)
        commit = commits.get(number, Commit(start))
        async with aclosing(_records(log, partition, max(start, commit.base), end, commit)) as found:
            async for offset, filed in found:
                yield partition, offset, filed


async def _records(
    log: Log, partition: Partition, start: int, end: int, commit: Commit
) -> AsyncGenerator[tuple[int, StoredDelivery], None]:
    async for records in log.scan(partition, start, end):
        for record in records:
            if commit.covers(record.offset):
                continue
            try:
                yield record.offset, decode_delivery(record)
            except UnreadableRecordError:
                continue  # the gateway tells of it


def unread_in(unread: Mapping[Partition, str]) -> list[Finding]:
    """Return what of the log couldn't be read just now."""
    return [
        Finding(
            rank=NOT_READ,
            what=f"{partition.topic}/{name_of(partition)}",
            why=f"not read: {reason}; what it holds isn't counted here",
            next=("# see the brokers: it is read again by itself",),
        )
        for partition, reason in sorted(unread.items())
    ]


def without_log(error: Exception) -> Finding:
    """Return that the log couldn't be read at all."""
    return Finding(
        rank=NOT_READ,
        what="the log",
        why=f"not read: {error}; what is paused, waits or is a dead letter isn't known here",
        next=("# see the log, and what --log or GATEWAY_LOG says of it; the rest is what --admin told",),
    )


def of_destination(found: Iterable[Finding], name: str, routes: Collection[str]) -> list[Finding]:
    """Return what concerns a destination, to which these routes deliver, and what may hide more of it."""
    what = {f"destination {name}", *[f"route {route}" for route in routes]}
    return [
        each
        for each in found
        if each.what in what or each.what.endswith(f" → {name}") or each.rank in (NOT_READ, REFUSED)
    ]


async def unrouted_in(log: Log, topics: Topics, unread: dict[Partition, str]) -> list[Finding]:
    """Return what of events, and of ordered routes, wasn't done yet. Raises LogUnavailableError."""
    found = []
    for topic in sorted(await log.topics()):
        place = topics.ordered_place(topic)
        if place is None and not topic.startswith(topics.events("")):
            continue
        group = topics.group(ROUTER_GROUP) if place is None else topics.ordered_group(*place)
        commits = await log.committed(group, topic)
        count, oldest = 0, log.now()
        for number, (start, end) in (await bounds_of(log, topic, unread)).items():
            commit = commits.get(number, Commit(start))
            first = max(start, commit.base)
            count += max(0, end - first - int.from_bytes(commit.done, "little").bit_count())
            async with aclosing(_appended(log, Partition(topic, number), first, min(end, first + 1))) as times:
                async for at in times:
                    oldest = min(oldest, at)
        # Of events, what is in flight is no news.
        if count and (place is not None or log.now() - oldest > LATE):
            what = f"source {topic.removeprefix(topics.events(''))}" if place is None else " → ".join(place)
            why = "events that aren't routed and sent out" if place is None else "waits in its order"
            is_late = log.now() - oldest > LATE
            found.append(Finding(rank=WAITING, what=what, why=why, is_wrong=is_late, since=oldest, count=count))
    return found


async def _appended(log: Log, partition: Partition, start: int, end: int) -> AsyncGenerator[float, None]:
    async for records in log.scan(partition, start, end):
        for record in records:
            yield record.appended_at


async def dead_in(
    log: Log, topics: Topics, control: Control, answers: Sequence[Mapping[str, Any]], unread: dict[Partition, str]
) -> list[Finding]:
    """Return the open dead letters of a day: the largest groups of them. Raises LogUnavailableError.

    `answers` are those of processes at `/status`, which know what of the rules was changed last.
    """
    groups = Groups()
    which = DeadFilter(since=log.now() - DAY)
    async with aclosing(read_letters(log, topics, control, which, is_all=False, unread=unread)) as letters:
        async for letter in letters:
            groups.add(letter)
    return [_of_group(group, answers) for group in groups.largest_first()[:MOST_GROUPS]]


def _of_group(group: Group, answers: Sequence[Mapping[str, Any]]) -> Finding:
    which = f"--reason {group.reason}"
    if group.route:  # or it is a record that can't be read
        which = f"--route {group.route} --destination {group.destination} {which}"
    following = [f"gateway dead list {which}"]
    if group.reason == DeadReason.EXPRESSION_ERROR and group.event:
        following = _of_expression(group, which, answers)
    elif group.route:
        following += ["# once that has been fixed:", f"gateway dead replay {which}"]
    return Finding(
        rank=DEAD,
        what=f"{group.route} → {group.destination}" if group.route else _NOWHERE[bool(group.event)],
        why=f"dead letters: {group.reason}" + (f", {group.answer}" if group.answer else ""),
        since=group.oldest,
        next=tuple(following),
        count=group.count,
    )


_NOWHERE = {False: "records that can't be read", True: "events of a source that no rules name"}
"""What has no route: by whether it can be read."""


def _of_expression(group: Group, which: str, answers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what to do about letters that an expression failed for: that of a request, or a condition.

    A letter is replayed to where it was to go, by the request as the rules have it then. Which events the condition
    takes once it is fixed, only a replay of the events tells.
    """
    following = [
        f"# the rules of {when(rules['changed_at'])} changed {change}"
        for rules in [answer.get("rules", {}) for answer in answers]
        if rules.get("changed_at", group.newest) < group.newest  # an older version doesn't tell
        for change in rules["changed"]
        if change.startswith(f"route {group.route}: ")
    ]
    following = [*dict.fromkeys(following), f"gateway explain {group.event}"]
    if group.answer.startswith(("request.", "destinations.")):
        return [
            *following,
            "# once the rule is fixed (a field that isn't always there: has(body.a) ? body.a : …):",
            f"gateway dead replay {which}",
        ]
    return [
        *following,
        "# once the condition is fixed; events are matched anew, and the letters of those that it takes settled:",
        f"gateway replay --route {group.route} --from {rfc3339(int(group.received))} --undelivered",
    ]


class Backlogs:
    """What waits, by route and destination, counted as it is read."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], Backlog] = {}

    def add(self, filed: StoredDelivery) -> None:
        delivery = filed.delivery
        key = delivery.route, delivery.destination, "" if delivery.route else delivery.event.source
        if key not in self._found:
            self._found[key] = Backlog(route=key[0], destination=key[1], source=key[2])
        self._found[key].add(filed)

    def __iter__(self) -> Iterator[Backlog]:
        return iter(self._found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """An attempt of a delivery that waits, or was given up."""

    delivery_id: str
    event_id: str
    route: str
    attempt: Attempt


class LastAttempts:
    """The last attempts at a destination that the log has: of what waits, and what is dead."""

    def __init__(self, destination: str) -> None:
        self.destination = destination
        self._heap: list[tuple[float, str, int, Tried]] = []  # the oldest first
        self._kept: set[tuple[str, int]] = set()

    def add(self, filed: StoredDelivery) -> None:
        delivery = filed.delivery
        if delivery.destination != self.destination:
            return
        for attempt in delivery.attempts:
            key = delivery.id, attempt.number
            if key in self._kept:
                continue  # two records may tell of one attempt
            tried = Tried(delivery_id=delivery.id, event_id=delivery.event.id, route=delivery.route, attempt=attempt)
            self._kept.add(key)
            heapq.heappush(self._heap, (attempt.at, *key, tried))
            if len(self._heap) > MOST_ATTEMPTS:
                _, delivery_id, number, _ = heapq.heappop(self._heap)
                self._kept.discard((delivery_id, number))

    def newest_first(self) -> Sequence[Tried]:
        return [tried for *_, tried in sorted(self._heap, key=lambda each: -each[0])]


async def add_dead(
    log: Log, topics: Topics, control: Control, attempts: LastAttempts, unread: dict[Partition, str]
) -> None:
    """Add the newest dead letters of their destination, settled ones included. Raises LogUnavailableError."""
    number = 0
    which = DeadFilter(destination=attempts.destination)
    async with aclosing(read_letters(log, topics, control, which, is_all=True, unread=unread)) as letters:
        async for letter in letters:
            if letter.filed is not None:
                attempts.add(letter.filed)
                number += 1
            if number >= MOST_ATTEMPTS:
                break
