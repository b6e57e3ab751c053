"""`gateway status`: what keeps deliveries from going out, the worst first.

The log knows what is paused and by whom, and what waits, for which reason and until when. What a process has in memory
(breakers, silence that was asked for, keys that halt, rules that it refuses) it answers at `/status` of its admin
address.
"""

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from gateway.engine.control.records import DeadFilter, partition_key
from gateway.engine.control.state import Control
from gateway.engine.delivery.breaker import FAILURES
from gateway.engine.delivery.outcomes import LATE
from gateway.engine.delivery.retry_decision import Retry, decide
from gateway.engine.unavailable_partitions import name_of
from gateway.log.base import Commit, Log, Partition
from gateway.log.records import StoredDelivery, decode_delivery
from gateway.log.topics import DAY, ROUTER_GROUP, TIERS, Topics
from gateway.model import DeadLettered, DeadReason, SpillReason, UnreadableRecordError, result_label
from gateway.ops.dead_letters import Group, Groups, read_letters
from gateway.ops.findings import DEAD, HELD, NOT_READ, PAUSED, REFUSED, WAITING, Finding, owners_first
from gateway.ops.log_search import bounds_of
from gateway.ops.output import rfc3339, when
from gateway.ops.process_status import changes_told
from gateway.ops.waiting_deliveries import _WHY, MAX_ATTEMPTS_SHOWN, Backlog, LastAttempts
from gateway.rules.rules import Rules

FEW_ATTEMPTS_LEFT = 3
"""Tries that a delivery has left, of which it is told."""


MAX_GROUPS_SHOWN = 5


MAX_TOLD_APART = 500_000
"""Deliveries that wait of which it is known whether they were counted: some 40 MB."""


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
        after = result_label(each.last) if is_open and each.last is not None and each.last.result in FAILURES else ""
        is_parked = set(each.reasons) == {_WHY[SpillReason.PAUSED]}
        is_wrong = is_held or now - each.oldest > LATE
        opened = {_WHY[SpillReason.BREAKER_OPEN]: f" after {after}"} if after else {}
        told = ", ".join(
            [f"{number:,} {reason}{opened.get(reason, '')}" for reason, number in each.reasons.most_common(3)]
        )
        following = [*owners_first(each.destination, after), f"gateway destination kick {each.destination}"]
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
    """Say after how many more attempts there are dead letters, if these are few, and get what the last one got."""
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


async def waiting(
    log: Log, topics: Topics, control: Control, unread: dict[Partition, str]
) -> AsyncIterator[StoredDelivery]:
    """Yield each delivery that waits in the retry topics, or is parked; what can't be read, and why, goes to `unread`.

    Each comes once, though it moves from topic to topic meanwhile; of more than `MAX_TOLD_APART`, twice at most.
    Raises LogUnavailableError.
    """
    names = [*[topics.retry(tier) for tier in TIERS], topics.parked]
    # All commits before all ends: what moves in between is in the topic that it has left, or in both.
    commits = {topic: await _commits(log, topics, topic) for topic in names}
    bounds = {topic: await bounds_of(log, topic, unread) for topic in names}
    seen: set[int] = set()
    for topic in names:
        async for partition, offset, stored in _of_topic(log, bounds[topic], commits[topic], topic):
            delivery = stored.delivery
            is_over = (
                _was_resumed(control, stored, partition, offset)
                if topic == topics.parked
                else control.is_kicked(delivery.route, delivery.destination, partition, offset)
            )
            life = hash(delivery.life)
            if not is_over and life not in seen:
                if len(seen) < MAX_TOLD_APART:
                    seen.add(life)
                yield stored


async def _parked(
    log: Log, topics: Topics, control: Control, unread: dict[Partition, str]
) -> AsyncIterator[StoredDelivery]:
    commits, topic = await _commits(log, topics, topics.parked), topics.parked
    async for partition, offset, stored in _of_topic(log, await bounds_of(log, topic, unread), commits, topic):
        if not _was_resumed(control, stored, partition, offset):
            yield stored


def _was_resumed(control: Control, stored: StoredDelivery, partition: Partition, offset: int) -> bool:
    return control.marker(f"pause/{stored.note.by}").get(partition_key(partition), 0) > offset


async def _commits(log: Log, topics: Topics, topic: str) -> Mapping[int, Commit]:
    return await log.committed(topics.group(ROUTER_GROUP), topic)


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
        async for stored in _parked(log, topics, control, unread):
            by, delivery = stored.note.by, stored.delivery
            if by in paused and called == (delivery.route if kind == "route" else delivery.destination):
                found[by] += 1
    return found


async def _of_topic(
    log: Log, bounds: Mapping[int, tuple[int, int]], commits: Mapping[int, Commit], topic: str
) -> AsyncIterator[tuple[Partition, int, StoredDelivery]]:
    """Yield each delivery of a topic that the router hasn't done, with its position."""
    for number, (start, end) in bounds.items():
        partition = Partition(topic, number)
        commit = commits.get(number, Commit(start))
        async with aclosing(_records(log, partition, max(start, commit.base), end, commit)) as found:
            async for offset, stored in found:
                yield partition, offset, stored


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


def without_process(address: str, error: Exception) -> Finding:
    """Return that a process that was asked doesn't answer."""
    return Finding(
        rank=NOT_READ,
        what=address,
        why=f"doesn't answer: {error}; what it holds in memory isn't known here",
        next=("# look whether it runs, and whether its --admin or GATEWAY_ADMIN is this address",),
    )


def without_log(error: Exception, *, is_rest_told: bool) -> Finding:
    """Return that the log couldn't be read at all."""
    rest = "; the rest is what --admin told" if is_rest_told else ""
    return Finding(
        rank=NOT_READ,
        what="the log",
        why=f"not read: {error}; what is paused, waits or is a dead letter isn't known here",
        next=(f"# see the log, and what --log or GATEWAY_LOG says of it{rest}",),
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
        target = topics.ordered_target(topic)
        if target is None and not topic.startswith(topics.events("")):
            continue
        group = topics.group(ROUTER_GROUP) if target is None else topics.ordered_group(*target)
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
        if count and (target is not None or log.now() - oldest > LATE):
            what = f"source {topic.removeprefix(topics.events(''))}" if target is None else " → ".join(target)
            why = "events that aren't routed and sent out" if target is None else "waits in its order"
            is_late = log.now() - oldest > LATE
            found.append(Finding(rank=WAITING, what=what, why=why, is_wrong=is_late, since=oldest, count=count))
    return found


async def _appended(log: Log, partition: Partition, start: int, end: int) -> AsyncGenerator[float, None]:
    async for records in log.scan(partition, start, end):
        for record in records:
            yield record.appended_at


async def dead_in(
    log: Log,
    topics: Topics,
    control: Control,
    answers: Sequence[Mapping[str, Any]],
    unread: dict[Partition, str],
    *,
    rules: Rules | None = None,
) -> list[Finding]:
    """Return the open dead letters of a day: the largest groups of them. Raises LogUnavailableError.

    `answers` are those of processes at `/status`, which know what of the rules was changed last; the rules at hand say
    what of them there is no more.
    """
    groups = Groups()
    which = DeadFilter(since=log.now() - DAY)
    async with aclosing(read_letters(log, topics, control, which, is_all=False, unread=unread)) as letters:
        async for letter in letters:
            groups.add(letter)
    return [_of_group(group, answers, rules) for group in groups.largest_first()[:MAX_GROUPS_SHOWN]]


def _of_group(group: Group, answers: Sequence[Mapping[str, Any]], rules: Rules | None) -> Finding:
    which = f"--reason {group.reason}"
    if group.route:  # or it is a record that can't be read
        which = f"--route {group.route} --destination {group.destination} {which}"
    following = [f"gateway dead list {which}"]
    gone = _gone(group, rules)
    if group.reason == DeadReason.EXPRESSION_ERROR and group.event:
        following = [f"# {gone}: put it back first"] if gone else []
        following += _of_expression(group, which, answers)
    elif gone:
        following += [
            f"# {gone}: put it back first, or they end as route_removed again:",
            f"gateway dead replay {which}",
            "# or have another route deliver their events, and then drop them:",
            f"gateway replay --route OTHER --from {rfc3339(int(group.received))} --undelivered",
            f"gateway dead drop {which}",
        ]
    elif group.route:
        is_removed = rules is None and group.reason == DeadReason.ROUTE_REMOVED
        once = "# once the rules have its route and destination again:" if is_removed else "# once that has been fixed:"
        following += [once, f"gateway dead replay {which}"]
    return Finding(
        rank=DEAD,
        what=f"{group.route} → {group.destination}" if group.route else _NOWHERE[bool(group.event)],
        why=f"dead letters: {group.reason}" + (f", {group.answer}" if group.answer else ""),
        since=group.oldest,
        next=tuple(following),
        count=group.count,
    )


def _gone(group: Group, rules: Rules | None) -> str:
    """Say what the rules at hand have no more of where letters were to go; "" where they have all, or aren't there."""
    if rules is None or not group.route:
        return ""
    if group.route not in rules.routes:
        return f"the rules at hand have no route {group.route}"
    is_there = group.destination in rules.destinations
    return "" if is_there else f"the rules at hand have no destination {group.destination}"


_NOWHERE = {False: "records that can't be read", True: "events of a source that no rules name"}
"""What has no route: by whether it can be read."""


def _of_expression(group: Group, which: str, answers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what to do about letters that an expression failed for: that of a request, or a condition.

    A letter is replayed to where it was to go, by the request as the rules have it then. Which events the condition
    takes once it is fixed, only a replay of the events tells.
    """
    following = [
        f"# the rules of {when(told[0])} changed {change}"
        for told in [changes_told(answer, before=group.newest) for answer in answers]
        if told is not None
        for change in told[1]
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


async def add_dead(
    log: Log, topics: Topics, control: Control, attempts: LastAttempts, unread: dict[Partition, str]
) -> None:
    """Add the newest dead letters of their destination, settled ones included. Raises LogUnavailableError."""
    number = 0
    which = DeadFilter(destination=attempts.destination)
    async with aclosing(read_letters(log, topics, control, which, is_all=True, unread=unread)) as letters:
        async for letter in letters:
            if letter.stored is not None:
                attempts.add(letter.stored)
                number += 1
            if number >= MAX_ATTEMPTS_SHOWN:
                break
