"""`gateway events redeliver`: deliver one event again."""

from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    api_arguments,
    api_of,
    command,
    note_unknown,
    opened_log,
    rules_without_secrets,
    wait_arguments,
)
from gateway.commands.events import NEITHER
from gateway.commands.stored_commands import OutcomeUnknownError, naming_stored, to_its_end
from gateway.commands.values import Parser
from gateway.engine.control.redelivery_records import RedeliveryResult
from gateway.log.base import Log
from gateway.model import UnreadableRecordError, UsageError
from gateway.ops.control_client import ControlClient
from gateway.ops.output import Output, count, when
from gateway.ops.presentation import print_rows
from gateway.ops.redeliveries import (
    RedeliveryProgress,
    cancel_redelivery,
    find_to_redeliver,
    followed,
    progress_of,
    redeliver,
    redeliveries,
    redelivery_fields,
)
from gateway.required_topics import event_topics

LISTED = 50
"""Redeliveries that are listed for people; with --json it is all."""
DUE = "due within 5 seconds, then at their destinations' own pace"


def redeliver_arguments(parser: Parser) -> None:
    about = "the event's id (if several have it, the newest), or its position, TOPIC/PARTITION@OFFSET"
    parser.add_argument("id", metavar="ID", nargs="?", help=about)
    about = "by this route only (default: by every route that matches it in the running gateway's rules)"
    parser.add_argument("--route", metavar="NAME", help=about)
    parser.add_argument("--destination", metavar="NAME", help="to this destination only (default: to all)")
    parser.add_argument("--why", default="", metavar="TEXT", help="why, which --list and `gateway audit list` show")
    wait_arguments(parser)
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--list",
        action="store_true",
        help="list the redeliveries of the last 7 days, and older ones whose event is still stored; newest first",
    )
    other.add_argument("--follow", metavar="REDELIVERY", help="show the result of this redelivery; waits for its end")
    other.add_argument("--cancel", metavar="REDELIVERY", help="cancel this redelivery")
    api_arguments(parser)


class Redeliveries(Protocol):
    """Redeliveries of single events, in the log or by the API."""

    def ask(
        self, event: str, *, route: str | None, destination: str | None, why: str
    ) -> Coroutine[Any, Any, str | None]:
        """Have an event delivered again, and return the redelivery's id; None if there is no such event."""

    def followed(self, name: str, *, timeout: float) -> AsyncGenerator[RedeliveryProgress, None]:
        """Yield a redelivery's progress, now and at each change, until it is final; nothing if there is none."""

    def cancel(self, name: str, why: str) -> Coroutine[Any, Any, bool]:
        """Cancel a redelivery; return whether there is one of that name that hasn't ended."""

    async def known(self) -> Sequence[RedeliveryProgress]:
        """Return the redeliveries that are remembered, the last that was asked for first."""


class _InLog:
    """Redeliveries in the log."""

    def __init__(self, call: Invocation, log: Log) -> None:
        self._call = call
        self._log = log
        self._topics = call.topics

    async def ask(self, event: str, *, route: str | None, destination: str | None, why: str) -> str | None:
        rules = rules_without_secrets(self._call.settings.rules)
        note_unknown(self._call.output, rules, route, destination)
        index = self._call.settings.index.file
        with self._call.output.waiting(f"looking for {event}"):
            found = await find_to_redeliver(self._log, event_topics(rules, self._topics), event, index)
        if found is None:
            return None
        control = await ControlClient(self._log, self._topics).control()
        asked = await to_its_end(
            self._call.output,
            redeliver(self._log, self._topics, control, found, route=route, destination=destination, reason=why),
        )
        return asked.command.name

    def followed(self, name: str, *, timeout: float) -> AsyncGenerator[RedeliveryProgress, None]:
        return followed(self._log, self._topics, name, timeout=timeout)

    async def cancel(self, name: str, why: str) -> bool:
        control = await ControlClient(self._log, self._topics).control()
        return await cancel_redelivery(self._log, self._topics, control, name, reason=why) is not None

    async def known(self) -> Sequence[RedeliveryProgress]:
        control = await ControlClient(self._log, self._topics).control()
        names = [command.name for command in redeliveries(control)]
        return [each for name in names if (each := progress_of(control, name)) is not None]


@command(
    "events redeliver",
    about="deliver one event again, under the running gateway's rules; for many events use `gateway replay`",
    example="gateway events redeliver evt_9c1f… --destination ci --why 'it lost its disk'",
    add_arguments=redeliver_arguments,
    settings=("rules", "index", *LOG_SETTINGS),
)
async def _events_redeliver(call: Invocation) -> int:
    arguments = call.arguments
    others = (arguments.list, arguments.follow is not None, arguments.cancel is not None)
    if any(others) is (arguments.id is not None) or (any(others) and (arguments.route or arguments.destination)):
        raise UsageError("events redeliver: expected the ID of an event, or one of --list, --follow and --cancel alone")
    if api_of(call) is not None:
        from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
        from gateway.ops.api_commands import ApiRedeliveries  # noqa: PLC0415 - a tenth of a second

        async with client_of(call) as client:
            return await _run(call, ApiRedeliveries(client))
    async with opened_log(call) as log:
        return await _run(call, _InLog(call, log))


async def _run(call: Invocation, known: Redeliveries) -> int:
    arguments = call.arguments
    if arguments.list:
        return _list(call, await known.known())
    if arguments.follow is not None:
        return await _follow(call, known, arguments.follow)
    if arguments.cancel is not None:
        return await _cancel(call, known, arguments.cancel)
    return await _redeliver(call, known)


async def _redeliver(call: Invocation, known: Redeliveries) -> int:
    arguments, output = call.arguments, call.output
    event: str = arguments.id
    asking = known.ask(event, route=arguments.route, destination=arguments.destination, why=arguments.why)
    if api_of(call) is not None:  # there it is one request; in the log, only the last step stores anything
        asking = to_its_end(output, asking)
    with naming_stored(output) as stored:
        try:
            name = await asking
        except UnreadableRecordError as error:
            output.fail(f"{event}: expected an event there, got a record that can't be read: {error}")
            return 1
        if name is None:
            output.fail(NEITHER.format(event))
            return 1
        stored.add_redelivery(name)
        if arguments.wait:
            return await _follow(call, known, name)
        if output.json:
            output.line(redelivery_fields(await _now(known, name)))
    output.print(f"redelivery {name} is stored; a running gateway will carry it out")
    return 0


async def _now(known: Redeliveries, name: str) -> RedeliveryProgress:
    """Return how far a redelivery that was just stored is."""
    async with aclosing(known.followed(name, timeout=0.0)) as steps:
        async for step in steps:
            return step
    raise OutcomeUnknownError(f"expected redelivery {name}, got none of that id")


async def _follow(call: Invocation, known: Redeliveries, name: str) -> int:
    last = await _awaited(call, known, name)
    if last is None:
        raise UsageError(
            f"--follow: expected the ID of a redelivery, got {name!r}; --list shows those that are remembered"
        )
    return _print_end(call.output, last)


async def _awaited(call: Invocation, known: Redeliveries, name: str) -> RedeliveryProgress | None:
    """Return a redelivery once it has ended, or nothing more comes of it; None if there is none of that name."""
    with call.output.waiting(f"waiting for redelivery {name}"):
        async with aclosing(known.followed(name, timeout=call.arguments.timeout)) as steps:
            found = [step async for step in steps]
    return found[-1] if found else None


async def _cancel(call: Invocation, known: Redeliveries, name: str) -> int:
    if not await to_its_end(call.output, known.cancel(name, call.arguments.why)):
        raise UsageError(f"--cancel: expected the ID of a redelivery that hasn't ended, got {name!r}")
    if not call.arguments.wait:
        call.output.print(f"redelivery {name} is cancelled")
        return 0
    with naming_stored(call.output) as stored:
        stored.add_cancellation(f"redelivery {name}")
        last = await _awaited(call, known, name)
    assert last is not None, name
    queued = count(_queued(last.results), "delivery")
    reached = "" if last.is_final else " or more: no gateway reported where it stopped"
    call.output.print(f"redelivery {name} is cancelled after {queued}{reached}")
    if call.output.json:
        call.output.line(redelivery_fields(last))
    return 0


def _list(call: Invocation, known: Sequence[RedeliveryProgress]) -> int:
    output = call.output
    if output.json:
        for each in known:
            output.line(redelivery_fields(each))
        return 0
    if not known:
        output.print("no event was redelivered within 7 days")
    for each in known[:LISTED]:
        _print_listed(output, each)
    if len(known) > LISTED:
        output.note(f"and {count(len(known) - LISTED, 'other')}, which --json shows")
    return 0


def _print_listed(output: Output, progress: RedeliveryProgress) -> None:
    command, asked = progress.command, progress.command.redelivery
    assert asked is not None, command
    state = "waits" if command.is_pending else command.state
    told = f"{when(command.at)}  {state}, {count(_queued(progress.results), 'delivery')} queued, by {command.by}"
    output.print((command.name, "bold"), f"  {told}")
    output.print(f"  {asked.event}{f': {asked.reason}' if asked.reason else ''}")
    if command.detail:
        output.print((f"  {command.detail}", "dim"))


def _queued(results: Sequence[RedeliveryResult]) -> int:
    return sum([each.outcome == "queued" for each in results])


def _print_end(output: Output, last: RedeliveryProgress) -> int:
    command, asked = last.command, last.command.redelivery
    assert asked is not None, command
    if output.json:
        output.line(redelivery_fields(last))
    print_rows(
        output,
        [
            {"route": each.route, "destination": each.destination or "none", "result": _result(each)}
            for each in last.results
        ],
    )
    queued = f"{count(_queued(last.results), 'delivery')} of {asked.event}"
    if command.state == "done":
        output.print(f"queued {queued}{_when_due(last.results)}")
        return 0
    if command.state == "cancelled":
        because = f": {command.detail}" if command.detail else ""
        output.fail(f"redelivery {command.name} was cancelled after {queued}{because}")
        return 1
    output.fail(
        f"redelivery {command.name} hasn't ended, with {queued} queued by now: is a gateway of this version running, "
        f"and its log available? It is stored, and goes on by itself; --follow {command.name} shows what comes of it"
    )
    return 1


def _when_due(results: Sequence[RedeliveryResult]) -> str:
    """Return when the queued deliveries are made, as the end of a line; "" without any."""
    paused = sum(bool(each.paused_by) for each in results)
    queued = _queued(results)
    if paused == queued:
        return ", which will be stored until what is paused is resumed" if queued else ""
    return f": {DUE}{f'; {paused:,} paused' if paused else ''}"


def _result(each: RedeliveryResult) -> str:
    if each.outcome == "dead":
        return "a dead letter: its route can't be decided"
    if each.paused_by:
        kind, _, name = each.paused_by.partition("/")
        return f"queued; paused: it will be stored until `gateway {kind} resume {name}`"
    return "queued"
