"""`gateway replay`: replay past events."""

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, astuple, dataclass, replace

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    api_arguments,
    api_of,
    command,
    opened_log,
    rules_without_secrets,
    why_argument,
)
from gateway.commands.control import ordering
from gateway.commands.events import find
from gateway.commands.replaying import (
    WAITS,
    check_asked,
    check_number,
    follow_replay,
    no_such_replay,
    not_to_cancel,
    print_cancelled,
    print_nothing,
    print_stored,
)
from gateway.commands.values import Parser, duration, moment, rate
from gateway.engine.control.records import Selection
from gateway.engine.control.state import Control
from gateway.engine.jobs.let_through import read_let_through
from gateway.engine.jobs.replay_matcher import Matched
from gateway.engine.jobs.undelivered import Fate, Undelivered, open_dead_letters
from gateway.log.base import Log
from gateway.log.records import decode_event
from gateway.model import Event, UsageError
from gateway.ops.control_client import CANCEL_GRACE, ControlClient, StoredCommand
from gateway.ops.kick_report import unread_text
from gateway.ops.order_texts import replay_words
from gateway.ops.output import Output, count, rfc3339
from gateway.ops.replays import ReplayStatus, Window, follow, until_elected, window_of, would_replay
from gateway.required_topics import event_topics
from gateway.rules.event_view import EventView
from gateway.rules.routing_revision import routing_revision
from gateway.rules.rules import Route, Rules
from gateway.text import did_you_mean


def replay_arguments(parser: Parser) -> None:
    about = "replay events stored since then: a duration (2h) or a timestamp (2026-11-25T08:00:00Z)"
    parser.add_argument(
        "--route", metavar="NAME", help="the route whose events to replay; with --undelivered, every route by default"
    )
    parser.add_argument("--from", dest="since", type=moment, metavar="WHEN", help=about)
    parser.add_argument(
        "--to",
        dest="until",
        type=moment,
        metavar="WHEN",
        help="only events stored before then (default: now)",
    )
    parser.add_argument("--destination", metavar="NAME", help="deliver to this destination only")
    parser.add_argument("--source", metavar="NAME", help="events of this source only")
    parser.add_argument(
        "--undelivered",
        action="store_true",
        help="only what the route has missed, and its open dead letters, as far as the log shows",
    )
    parser.add_argument(
        "--rate",
        type=rate,
        metavar="RATE",
        help="limit for all processes together, such as 100/s or 10/m (default: as fast as possible)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only show how many it would deliver, under the local rules"
    )
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wait until the running gateway has carried it out",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        default=30.0,
        metavar="DURATION",
        help="how long to wait without progress (default: 30s)",
    )
    why_argument(parser)
    other = parser.add_mutually_exclusive_group()
    about = "replay one event, by id (the newest) or TOPIC/PARTITION@OFFSET, on --route or every route that matches it"
    other.add_argument("--event", metavar="ID", help=f"{about}; `gateway events redeliver` doesn't wait for replays")
    other.add_argument("--follow", metavar="REPLAY", help="show the progress of this replay, until it ends")
    other.add_argument("--cancel", metavar="REPLAY", help="cancel this replay")
    api_arguments(parser)


@command(
    "replay",
    about="deliver a period's events again, under the current rules; for one event use `gateway events redeliver`",
    example="gateway replay --route build-on-push --from 2h --to 30m --rate 100/s",
    add_arguments=replay_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _replay(call: Invocation) -> int:
    arguments = call.arguments
    if api_of(call) is not None:
        from gateway.commands.replay_by_api import replay_by_api  # noqa: PLC0415 - a tenth of a second

        return await replay_by_api(call)
    if arguments.event is not None:
        return await _replay_event(call)
    if arguments.follow is None and arguments.cancel is None:
        return await _start_replay(call)
    async with opened_log(call) as log:
        if arguments.cancel is not None:
            return await _cancel_replay(call, ordering(call, log), arguments.cancel)
        return await _follow_replay(call, log, arguments.follow)


async def _start_replay(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    check_asked(arguments)
    rules = rules_without_secrets(call.settings.rules)
    routes = _replayed_routes(arguments, rules)
    async with opened_log(call) as log:
        now = _to_the_millisecond(log.now())
        until = None if arguments.until is None else arguments.until.on(now)
        asked = Selection(
            route="",
            destination=arguments.destination,
            source=arguments.source,
            since=arguments.since.on(now),
            until=now if until is None and arguments.dry_run else until,
            rate=arguments.rate,
            undelivered=arguments.undelivered,
        )
        if asked.since >= (log.now() if asked.until is None else asked.until):
            end = "--to" if asked.until is not None else "now"
            raise UsageError(f"--from: expected a time before {end}, got {rfc3339(asked.since)}")
        control = await ControlClient(log, call.topics).control()
        selected: list[tuple[Selection, Window]] = []
        await until_elected(log, event_topics(rules, call.topics))
        for route in routes:
            sources = route.sources if arguments.source is None else (arguments.source,)
            of_route = replace(rules, sources={name: rules.sources[name] for name in sources})
            window = await window_of(log, event_topics(of_route, call.topics), asked.since, asked.until)
            selection = replace(asked, route=route.name, starts=window.starts)
            if not arguments.undelivered:
                _suggest_end(output, control, rules, selection, window)
            selected.append((selection, window))
        if arguments.dry_run:
            await _count_replays(call, log, rules, control, selected)
            return 0
        unread = {partition_name: reason for _, window in selected for partition_name, reason in window.unread.items()}
        begun = [(selection, window) for selection, window in selected if window.total]
        if not begun:
            return _nothing_to_replay(output, unread)
        ordered = [selection.route for selection, _ in begun if rules.routes[selection.route].order is not None]
        for name in ordered:
            output.note(f"route {name} is ordered, but a replay isn't")
        if unread:
            output.note(f"{_unread_detail(unread)}: not included")
        client = ordering(call, log)
        placed = [
            (await client.replay(selection, window.ends, unread=len(window.unread)), window.total)
            for selection, window in begun
        ]
        return max([await _await_replay(call, log, command, total) for command, total in placed])


def _nothing_to_replay(output: Output, unread: Mapping[str, str]) -> int:
    if unread:
        output.fail(f"expected events of that time, got none, but {_unread_detail(unread)}")
        return 1
    print_nothing(output)
    return 0


def _unread_detail(unread: Mapping[str, str]) -> str:
    partition_name, reason = next(iter(unread.items()))
    return f"{unread_text(len(unread))} ({partition_name}: {reason})"


async def _await_replay(call: Invocation, log: Log, placed: StoredCommand, total: int) -> int:
    """Follow a replay that was just stored, unless `--no-wait`."""
    if call.arguments.wait:
        return await _follow_replay(call, log, placed.command.name)
    print_stored(call, ReplayStatus(placed.command, 0, total, 0))
    return 0


def _replayed_routes(arguments: argparse.Namespace, rules: Rules) -> Sequence[Route]:
    """Return the routes to replay: the named one, or all. Raises UsageError for an unknown name."""
    if arguments.route is not None:
        return [_replayed_route(arguments, rules)]
    if arguments.rate is not None:
        raise UsageError("--rate needs --route: it limits the replay of a single route")
    for flag, name, known in (
        ("--destination", arguments.destination, rules.destinations),
        ("--source", arguments.source, rules.sources),
    ):
        if name is not None and name not in known:
            raise UsageError(f"{flag}: unknown {flag[2:]} {name!r}{did_you_mean(name, known)}")
    routes = [
        route
        for route in rules.routes.values()
        if arguments.source in (None, *route.sources) and arguments.destination in (None, *route.destinations)
    ]
    check_number(routes)
    return routes


def _replayed_route(arguments: argparse.Namespace, rules: Rules) -> Route:
    """Return the named route. Raises UsageError for an unknown name."""
    route = rules.routes.get(arguments.route)
    if route is None:
        raise UsageError(f"--route: unknown route {arguments.route!r}{did_you_mean(arguments.route, rules.routes)}")
    for flag, name, known in (
        ("--destination", arguments.destination, route.destinations),
        ("--source", arguments.source, route.sources),
    ):
        if name is not None and name not in known:
            near = did_you_mean(name, known)
            raise UsageError(f"{flag}: expected one of route {route.name} ({', '.join(known)}), got {name!r}{near}")
    return route


def _suggest_end(output: Output, control: Control, rules: Rules, selection: Selection, window: Window) -> None:
    """Print since when the route has delivered events itself, if the replay includes later ones."""
    text = routing_revision(rules).routes[selection.route]
    since = control.history.since(selection.route, text, window.ends)
    if since is None or since <= selection.since:
        return
    told = rfc3339(since)
    if selection.until is None or told < rfc3339(selection.until):  # in milliseconds, as they are told: `--to` has them
        output.note(
            f"route {selection.route}, or the `dedupe` of its sources, last changed at {told}; events after that were "
            f"already routed by the current rules: use --to {told} or --undelivered to leave them out"
        )


async def _count_replays(
    call: Invocation, log: Log, rules: Rules, control: Control, selected: Sequence[tuple[Selection, Window]]
) -> None:
    """Print what replays would do, and the command for exactly that."""
    output, queued = call.output, 0
    for selection, window in selected:
        for other in control.commands.values():
            if other.selection is not None and other.selection.route == selection.route and other.state == "requested":
                output.note(
                    f"replay {other.name} of route {selection.route} hasn't ended: what it queues may be counted here, "
                    "too; count again once it has"
                )
        dead = await open_dead_letters(log, call.topics, control, selection, readable=log.readable)
        let_through = await read_let_through(log, call.topics, selection, window.ends, readable=log.readable)
        if missed := [*window.unread, *dead.unreadable, *let_through.unreadable]:
            output.note(f"{unread_text(len(missed))}: not counted")
        if dead.items:
            left = count(dead.items, "dead letter")
            output.note(f"{left} of items: not counted; `gateway dead replay --route {selection.route}` delivers them")
        known = Undelivered(control, selection.route, dead, let_through=let_through, rules=lambda: rules)
        queued += await _count_replay(output, log, rules, selection, window, known=known)
    if len(selected) > 1:
        output.print(f"in all, would queue {count(queued, 'delivery')} by {count(len(selected), 'route')}")
    first, _ = selected[0]
    exactly = replay_words(first if call.arguments.route else replace(first, route=""))
    output.print(f"to replay exactly these: gateway replay {exactly}")


async def _count_replay(
    output: Output, log: Log, rules: Rules, selection: Selection, window: Window, *, known: Undelivered
) -> int:
    """Print a replay's events, and deliveries by what is known of them. Return how many it would queue."""
    counts: defaultdict[tuple[str, str], _Counted] = defaultdict(_Counted)
    route = rules.routes[selection.route]
    destinations = Counter(dict.fromkeys(route.destinations, 0))  # in their order
    failing = 0
    with output.gauge("reading", window.total) as show:
        async with aclosing(would_replay(log, rules, selection, window, known)) as looked:
            async for number, matched in looked:
                show(number, count(sum([each.count for each in counts.values()]), "event"))
                failing += matched is not None and any(target.end for target in matched.targets)
                if matched is not None and (attempted := matched.attempted()).targets:
                    to = (attempted.undelivered() if selection.undelivered else attempted).destinations
                    counts[matched.event.source, matched.event.type].add(attempted, to)
                    destinations.update(to)
    total = _Counted(*[sum(numbers) for numbers in zip(*[astuple(each) for each in counts.values()], strict=True)])
    if output.json:
        for (source, type_), each in sorted(counts.items()):
            output.line({"route": route.name, "source": source, "type": type_, **asdict(each)})
        return total.deliveries
    output.print(("route ", "bold"), route.name)
    rows = [(*which, f"{each.count:,}") for which, each in sorted(counts.items()) if each.count]
    if rows:
        output.table(["source", "type", "events"], rows, right=("events",))
    if failing:
        what = "the route's condition" if route.choice is None else "the route's condition, or `to`,"
        output.note(f"for {count(failing, 'event')} {what} fails: each would become another dead letter")
    output.print(_fates_text(total))
    output.print(f"would queue {_queued_text(total.count, destinations)}; nothing was done")
    return total.deliveries


def _fates_text(total: "_Counted") -> str:
    """Return what is known of the matching deliveries, as text; no success is recorded."""
    others = total.matching - total.undelivered - total.unknown
    way = "its way" if others == 1 else "their way"
    under_way = f"; {others:,} delivered, dropped or on {way} ({WAITS})" if others else ""
    unknown = f"; {total.unknown:,} unknown" if total.unknown else ""
    return (
        f"{count(total.matching, 'delivery')} {'matches' if total.matching == 1 else 'match'}; "
        f"as far as the log shows, {total.undelivered:,} missed or dead-lettered{under_way}{unknown}"
    )


def _queued_text(events: int, destinations: Mapping[str, int]) -> str:
    """Return how many deliveries of that many events go to which destinations, as text."""
    deliveries, of = count(sum(destinations.values()), "delivery"), count(events, "event")
    to = {name: number for name, number in destinations.items() if number}
    if not to:
        return deliveries
    if set(to.values()) == {events}:
        return f"{deliveries}: {of} to {', '.join(to)}"
    return f"{deliveries} of {of}: {', '.join([f'{number:,} to {name}' for name, number in to.items()])}"


@dataclass(slots=True)
class _Counted:
    """Counts of a replay: events and deliveries that it would queue; and of all that match, those not delivered."""

    count: int = 0
    deliveries: int = 0
    matching: int = 0
    undelivered: int = 0
    unknown: int = 0

    def add(self, matched: Matched, chosen: Collection[str]) -> None:
        """Count an event, which would be delivered to the chosen destinations."""
        self.count += bool(chosen)
        self.deliveries += len(chosen)
        self.matching += len(matched.fates)
        self.undelivered += matched.fates.count(Fate.UNDELIVERED)
        self.unknown += matched.fates.count(Fate.UNKNOWN)


def _to_the_millisecond(at: float) -> float:
    """Return a time with the precision that commands print, so a copied command means the same."""
    return math.floor(at * 1000) / 1000


async def _replay_event(call: Invocation) -> int:
    """Deliver one event in the log again."""
    arguments, output = call.arguments, call.output
    if arguments.since or arguments.until or arguments.source or arguments.undelivered:
        raise UsageError("replay: expected only --route and --destination with --event, got others")
    rules = rules_without_secrets(call.settings.rules)
    async with opened_log(call) as log:
        found = await find(call, log, event_topics(rules, call.topics), arguments.event)
        if found is None:
            return 1
        event = decode_event(found.record)
        routes = _routes_of(arguments, rules, event)
        for route in routes:
            targets = route.targets(EventView.of(event), None)
            to = [name for name, end in targets if end is None and arguments.destination in (None, name)]
            if arguments.dry_run:
                what = f"{count(len(to), 'delivery')}: {event.id} by {route.name} to {', '.join(to) or 'nowhere'}"
                output.print(f"would queue {what}; nothing was done")
                if output.json:
                    output.line({"event": event.id, "route": route.name, "destinations": list(to)})
        if arguments.dry_run:
            return 0
        partition_name, result = f"{found.partition.topic}/{found.partition.number}", 0
        for route in routes:
            starts, ends = {partition_name: found.record.offset}, {partition_name: found.record.offset + 1}
            selection = Selection(route=route.name, destination=arguments.destination, since=0.0, starts=starts)
            placed = await ordering(call, log).replay(selection, ends)
            result |= await _await_replay(call, log, placed, 1)
        return result


def _routes_of(arguments: argparse.Namespace, rules: Rules, event: Event) -> list[Route]:
    """Return the routes by which to deliver an event again. Raises UsageError without any."""
    if arguments.route is not None:
        _replayed_route(arguments, rules)
    view = EventView.of(event)
    matched = [route for route, _ in rules.table.match(view)]
    routes = [
        route
        for route in matched
        if arguments.route in (None, route.name)
        and arguments.destination in (None, *[name for name, _ in route.targets(view, None)])
    ]
    if not routes:
        wanted = arguments.route or (f"a route to {arguments.destination}" if arguments.destination else "a route")
        got = ", ".join(route.name for route in matched) or "none"
        raise UsageError(f"{event.id}: expected {wanted} to match it, got {got}; `gateway explain {event.id}` says why")
    return routes


async def _follow_replay(call: Invocation, log: Log, name: str) -> int:
    code = await follow_replay(call, name, follow(log, call.topics, name, timeout=call.arguments.timeout))
    if code is None:
        commands = (await ControlClient(log, call.topics).control()).pending("replay")
        raise no_such_replay(name, [command.name for command in commands])
    return code


async def _cancel_replay(call: Invocation, client: ControlClient, name: str) -> int:
    placed = await client.cancel(name)
    if placed is None:
        raise not_to_cancel(name)
    done = None
    if call.arguments.wait:
        with call.output.waiting("waiting for the replay to stop"):
            done = await client.finished(placed, timeout=min(call.arguments.timeout, CANCEL_GRACE))
    print_cancelled(call.output, done or placed.command, is_final=done is not None)
    return 0
