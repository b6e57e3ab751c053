"""What `gateway replay` is asked and says, whether it asks the log or the API."""

import argparse
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from gateway.commands.base import Invocation
from gateway.commands.control import not_included_text
from gateway.commands.stored_commands import StoredCommands
from gateway.engine.control.records import ControlRecord
from gateway.model import UsageError
from gateway.ops.kick_report import unread_text
from gateway.ops.output import Output, count
from gateway.ops.presentation import replay_fields
from gateway.ops.replays import ReplayStatus

MAX_ROUTES = 100
"""Maximum number of routes per command: for each, all events of the period are read."""
DUE = "due within 5 seconds, then at their destinations' own pace; what is paused waits until it is resumed"
"""When queued deliveries are made."""
WAITS = "`gateway status` shows what waits"
"""Where the deliveries are shown that wait for a retry or are parked: a replay doesn't read their topics."""


async def follow_replay(
    call: Invocation, name: str, followed: AsyncGenerator[ReplayStatus, None], stored: StoredCommands
) -> int | None:
    """Show the progress of a replay until its end; return the exit code, None if there is no such replay."""
    output = call.output
    async with aclosing(followed) as steps:
        first = await anext(steps, None)
        if first is None:
            return None
        stored.add_replay(name)
        began, last = time.monotonic(), first
        with output.gauge(f"replay {name}", first.total, begun=first.scanned) as show:

            def show_progress(progress: ReplayStatus) -> None:
                if output.json:
                    output.line(replay_fields(progress))
                rate = (progress.injected - first.injected) / max(1.0, time.monotonic() - began)
                waits = f", {unread_text(progress.unread)}" if progress.unread else ""
                show(progress.scanned, f"{count(progress.injected, 'delivery')} queued, {rate:,.0f}/s{waits}")

            show_progress(first)
            async for last in steps:
                show_progress(last)
    return _replay_ended(output, last)


def replay_forgotten(output: Output, name: str) -> int:
    """Say that the log doesn't know a replay any more that was just stored; return the exit code."""
    output.fail(f"replay {name} was stored, and isn't in the log any more: was its control topic deleted?")
    return 1


def print_stored(call: Invocation, progress: ReplayStatus) -> None:
    """Say that a replay is stored, if nobody waits for its end."""
    command = progress.command
    by = f" of route {command.selection.route}" if command.selection is not None else ""
    call.output.print(f"replay {command.name}{by} is stored; a running gateway will carry it out")
    if call.output.json:
        call.output.line(replay_fields(progress))


def print_nothing(output: Output) -> None:
    """Say that there is nothing to replay."""
    output.print("no events were stored in that time: there is nothing to do")
    if output.json:
        output.line({"replay": None, "state": "done", "scanned": 0, "total": 0, "injected": 0})


def print_cancelled(output: Output, command: ControlRecord, *, is_final: bool) -> None:
    """Say how far a cancelled replay had come, as far as a gateway has said that."""
    name, injected = command.name, count(command.count, "delivery")
    output.print(
        f"replay {name} is cancelled after {injected}"
        if is_final
        else f"replay {name} is cancelled after {injected} or more: no gateway reported where it stopped"
    )
    if output.json:
        output.line({"replay": name, "state": command.state, "injected": command.count, "final": is_final})


def _replay_ended(output: Output, last: ReplayStatus) -> int:
    by = f" by {last.command.selection.route}" if last.command.selection is not None else ""
    queued = f"{count(last.injected, 'delivery')}{by}, from {count(last.scanned, 'record')} of events"
    match last.command.state:
        case "done":
            when = f": {DUE}" if last.injected else ""
            output.print(f"queued {queued}{when}{_left_out(last.command)}{not_included_text(last.command)}")
            return 0
        case "cancelled":
            because = f": {last.command.detail}" if last.command.detail else ""
            output.fail(f"replay {last.command.name} was cancelled after {queued}{because}")
        case _ if last.unread:
            name, them = last.command.name, "it" if last.unread == 1 else "them"
            output.fail(
                f"queued {queued} by now; {unread_text(last.unread)}: replay {name} isn't complete, and continues "
                f"with {them} by itself; `gateway replay --follow {name}` shows its progress, --cancel {name} ends it"
            )
        case _:
            name = last.command.name
            output.fail(
                f"replay {name} made no progress: is a gateway running? The replay is stored, and continues once one is"
            )
    return 1


def _left_out(command: ControlRecord) -> str:
    """Return what a replay of the undelivered has left out, as the end of a line; "" for others."""
    if command.selection is None or not command.selection.undelivered:
        return ""
    return f"; left out is what was delivered or dropped, is on its way ({WAITS}) or unknown"


def check_asked(arguments: argparse.Namespace) -> None:
    """Raise UsageError unless the arguments say which events are replayed."""
    if arguments.since is None or (arguments.route is None and not arguments.undelivered):
        raise UsageError(
            "replay: expected --route and --from, --from and --undelivered for every route, "
            "or --event, --follow or --cancel with an ID"
        )


_GO_WITH = {
    "--event": ("--route", "--destination", "--dry-run", "--no-wait", "--timeout", "--why"),
    "--follow": ("--timeout",),
    "--cancel": ("--no-wait", "--timeout", "--why"),
}
"""Which options have a sense with one that says what is done instead of a replay of a time."""


def check_options(arguments: argparse.Namespace) -> None:
    """Raise UsageError for options that don't go together."""
    chosen = next((each for each in _GO_WITH if getattr(arguments, each.removeprefix("--")) is not None), None)
    if chosen is None:
        return
    given = {
        "--route": arguments.route is not None,
        "--from": arguments.since is not None,
        "--to": arguments.until is not None,
        "--destination": arguments.destination is not None,
        "--source": arguments.source is not None,
        "--undelivered": arguments.undelivered,
        "--rate": arguments.rate is not None,
        "--dry-run": arguments.dry_run,
        "--no-wait": not arguments.wait,
        "--why": bool(arguments.why),
    }
    fitting = _GO_WITH[chosen]
    if wrong := [flag for flag, is_given in given.items() if is_given and flag not in fitting]:
        expected = " and ".join([*filter(None, [", ".join(fitting[:-1])]), fitting[-1]])
        raise UsageError(f"replay {chosen}: expected only {expected} with it, got {', '.join(wrong)}; nothing was done")


def not_matched(arguments: argparse.Namespace, event: str, matched: Sequence[str]) -> UsageError:
    """Return the error for an event that no route takes that is asked for; `matched` are those that do."""
    wanted = arguments.route or (f"a route to {arguments.destination}" if arguments.destination else "a route")
    got = ", ".join(matched) or "none"
    return UsageError(f"{event}: expected {wanted} to match it, got {got}; `gateway explain {event}` says why")


def check_number(routes: Sequence[object]) -> None:
    """Raise UsageError unless there are routes, and not too many."""
    if not 0 < len(routes) <= MAX_ROUTES:
        raise UsageError(f"replay: expected 1 to {MAX_ROUTES} routes, got {len(routes):,}; --route names one")


def no_such_replay(name: str, under_way: Sequence[str]) -> UsageError:
    """Return the error for a name that no replay has."""
    known = f"; under way: {', '.join(under_way)}" if under_way else ""
    return UsageError(f"--follow: expected the ID of a replay, got {name!r}{known}")


def not_to_cancel(name: str) -> UsageError:
    """Return the error for a name of no replay that can be cancelled."""
    return UsageError(f"--cancel: expected the ID of a replay that hasn't ended, got {name!r}")
