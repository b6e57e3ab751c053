"""`gateway replay`: replay past events."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

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
from gateway.commands.control import control_client
from gateway.commands.counting_replays import print_count, print_counts, print_event_count, suggest_end
from gateway.commands.events import find
from gateway.commands.replaying import (
    check_asked,
    check_number,
    check_options,
    follow_replay,
    no_such_replay,
    not_matched,
    not_to_cancel,
    print_cancelled,
    print_nothing,
    print_stored,
    replay_forgotten,
)
from gateway.commands.stored_commands import StoredCommands, naming_stored, to_its_end
from gateway.commands.values import Parser, duration, moment, rate
from gateway.engine.control.records import Selection
from gateway.engine.control.state import Control
from gateway.log.base import Log
from gateway.log.records import decode_event
from gateway.model import Event, UsageError
from gateway.ops.control_client import CANCEL_GRACE, ControlClient, StoredCommand
from gateway.ops.kick_report import unread_text
from gateway.ops.output import Output, count, rfc3339
from gateway.ops.replay_counts import ReplayCount, changed_before, count_replay, routes_of
from gateway.ops.replays import ReplayStatus, Window, follow, until_elected, window_of
from gateway.required_topics import event_topics
from gateway.rules.event_view import EventView
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
    check_options(arguments)
    if api_of(call) is not None:
        from gateway.commands.replay_by_api import replay_by_api  # noqa: PLC0415 - a tenth of a second

        return await replay_by_api(call)
    if arguments.event is not None:
        return await _replay_event(call)
    if arguments.follow is None and arguments.cancel is None:
        return await _start_replay(call)
    async with opened_log(call) as log:
        if arguments.cancel is not None:
            return await _cancel_replay(call, control_client(call, log), arguments.cancel)
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
                changed_at = changed_before(control, rules, selection, window)
                suggest_end(output, route.name, selection.since, selection.until, changed_at)
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
        client = control_client(call, log)
        with naming_stored(output) as stored:
            placed: list[tuple[StoredCommand, int]] = []
            for selection, window in begun:
                placing = client.replay(selection, window.ends, unread=len(window.unread))
                given = await to_its_end(output, placing)
                stored.add_replay(given.command.name)
                placed.append((given, window.total))
            return max([await _await_replay(call, log, given, total, stored) for given, total in placed])


def _nothing_to_replay(output: Output, unread: Mapping[str, str]) -> int:
    if unread:
        output.fail(f"expected events of that time, got none, but {_unread_detail(unread)}")
        return 1
    print_nothing(output)
    return 0


def _unread_detail(unread: Mapping[str, str]) -> str:
    partition_name, reason = next(iter(unread.items()))
    return f"{unread_text(len(unread))} ({partition_name}: {reason})"


async def _await_replay(call: Invocation, log: Log, placed: StoredCommand, total: int, stored: StoredCommands) -> int:
    """Follow a replay that was just stored, unless `--no-wait`."""
    name = placed.command.name
    if call.arguments.wait:
        code = await follow_replay(call, name, follow(log, call.topics, name, timeout=call.arguments.timeout), stored)
        return replay_forgotten(call.output, name) if code is None else code
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


async def _count_replays(
    call: Invocation, log: Log, rules: Rules, control: Control, selected: Sequence[tuple[Selection, Window]]
) -> None:
    """Print what replays would do, and the command for exactly that."""
    counts: list[ReplayCount] = []
    for selection, window in selected:
        with call.output.gauge("reading", window.total) as show:

            def shown(found: ReplayCount, show: Callable[[int, str], None] = show) -> None:
                show(found.looked, count(found.in_all.count, "event") if found.by else "")

            counts.append(
                await count_replay(log, call.topics, selection, window, control=control, rules=rules, show=shown)
            )
        print_count(call.output, counts[-1])
    print_counts(call, counts)


def _to_the_millisecond(at: float) -> float:
    """Return a time with the precision that commands print, so a copied command means the same."""
    return math.floor(at * 1000) / 1000


async def _replay_event(call: Invocation) -> int:
    """Deliver one event in the log again."""
    arguments, output = call.arguments, call.output
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
                print_event_count(output, event.id, route.name, to)
        if arguments.dry_run:
            return 0
        partition_name = f"{found.partition.topic}/{found.partition.number}"
        starts, ends = {partition_name: found.record.offset}, {partition_name: found.record.offset + 1}
        with naming_stored(output) as stored:
            placed: list[StoredCommand] = []
            for route in routes:
                selection = Selection(route=route.name, destination=arguments.destination, since=0.0, starts=starts)
                placed.append(await to_its_end(output, control_client(call, log).replay(selection, ends)))
                stored.add_replay(placed[-1].command.name)
            return max([await _await_replay(call, log, given, 1, stored) for given in placed])


def _routes_of(arguments: argparse.Namespace, rules: Rules, event: Event) -> Sequence[Route]:
    """Return the routes by which to deliver an event again. Raises UsageError without any."""
    if arguments.route is not None:
        _replayed_route(arguments, rules)
    matched, routes = routes_of(rules, event, route=arguments.route, destination=arguments.destination)
    if not routes:
        raise not_matched(arguments, event.id, [route.name for route in matched])
    return routes


async def _follow_replay(call: Invocation, log: Log, name: str) -> int:
    with naming_stored(call.output) as stored:
        code = await follow_replay(call, name, follow(log, call.topics, name, timeout=call.arguments.timeout), stored)
    if code is None:
        commands = (await ControlClient(log, call.topics).control()).pending("replay")
        raise no_such_replay(name, [command.name for command in commands])
    return code


async def _cancel_replay(call: Invocation, client: ControlClient, name: str) -> int:
    placed = await to_its_end(call.output, client.cancel(name))
    if placed is None:
        raise not_to_cancel(name)
    done = None
    if call.arguments.wait:
        with naming_stored(call.output) as stored, call.output.waiting("waiting for the replay to stop"):
            stored.add_cancellation(f"replay {name}")
            done = await client.finished(placed, timeout=min(call.arguments.timeout, CANCEL_GRACE))
    print_cancelled(call.output, done or placed.command, is_final=done is not None)
    return 0
