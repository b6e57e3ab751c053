"""`gateway dead`: dead letters."""

import argparse
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, Protocol

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    api_arguments,
    api_of,
    command,
    may_drop,
    note_unknown,
    note_unknown_of,
    opened_log,
    readable_rules,
    wait_arguments,
    why_argument,
    yes_argument,
)
from gateway.commands.control import CommandClient, control_client, not_included_text, print_outcome, wait_for_outcome
from gateway.commands.replaying import DUE
from gateway.commands.stored_commands import naming_stored, to_its_end
from gateway.commands.values import Parser, duration, positive
from gateway.engine.control.records import DeadFilter
from gateway.model import DeadReason, UsageError
from gateway.ops.control_client import ControlClient, StoredCommand
from gateway.ops.dead_letter_presentation import group_row, letter_content, letter_fields, letter_row, print_letter
from gateway.ops.dead_letters import (
    DeadLetter,
    Groups,
    LettersInLog,
    ListedLetter,
    find_dead_letters,
    just_after,
    listed,
)
from gateway.ops.output import Output, count
from gateway.ops.presentation import Row, print_rows
from gateway.ops.redaction import Redactions

MAX_COUNTED_BY_API = 10_000
"""Maximum of dead letters that are counted via the API, with a request for every 200."""


def filter_arguments(parser: Parser) -> None:
    parser.add_argument("--route", metavar="NAME", help="only those of this route")
    parser.add_argument("--destination", metavar="NAME", help="only those for this destination")
    parser.add_argument(
        "--reason",
        choices=list(map(str, DeadReason)),
        metavar="REASON",
        help=f"only those with this reason: {', '.join(DeadReason)}",
    )
    parser.add_argument(
        "--since", type=duration, metavar="DURATION", help="only those written in the last DURATION (such as 2h)"
    )
    parser.add_argument(
        "--until", type=duration, metavar="DURATION", help="only those written more than DURATION (such as 5m) ago"
    )


def dead_list_arguments(parser: Parser) -> None:
    filter_arguments(parser)
    parser.add_argument(
        "--limit", type=positive, default=50, metavar="N", help="show at most N, newest first (default: 50)"
    )
    parser.add_argument("--all", action="store_true", help="include replayed and dropped ones")
    api_arguments(parser)


@command(
    "dead list",
    about="list open dead letters: by group, then one by one, newest first",
    example="gateway dead list --destination ci --since 1d",
    add_arguments=dead_list_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _dead_list(call: Invocation) -> int:
    arguments = call.arguments
    if api_of(call) is not None:
        return await _list_by_api(call)
    rules = readable_rules(call)
    if rules is not None:
        note_unknown(call.output, rules, arguments.route, arguments.destination)
    hidden = Redactions(rules)
    async with opened_log(call) as log:
        letters = LettersInLog(log, call.topics, await ControlClient(log, call.topics).control())
        which = _filter(arguments, now=log.now())
        await _print_list(call, letters.read(which, include_resolved=arguments.all, hidden=hidden))
    return 0


async def _list_by_api(call: Invocation) -> int:
    """Do the same via the API of a process."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_dead_letters import ApiDeadLetters  # noqa: PLC0415 - a tenth of a second

    arguments = call.arguments
    async with client_of(call) as client:
        letters = ApiDeadLetters(client)
        which = _filter(arguments, now=await client.now())
        await _print_list(
            call, letters.read(which, include_resolved=arguments.all), most=max(MAX_COUNTED_BY_API, arguments.limit)
        )
    for name in sorted(letters.unread):
        call.output.note(f"{name}: not read", style="yellow")
    return 1 if letters.unread else 0


async def _print_list(call: Invocation, found: AsyncGenerator[ListedLetter, None], *, most: int | None = None) -> None:
    """Print dead letters; without JSON, all of them are counted, or up to `most`."""
    arguments, output = call.arguments, call.output
    groups = Groups()
    total = 0
    rows: list[Row] = []
    with output.waiting("reading the dead letters"):
        async with aclosing(found) as letters:
            async for letter in letters:
                total += 1
                if output.json:
                    if total > arguments.limit:
                        break
                    output.line(letter_fields(letter))
                    continue
                groups.add(letter)
                if total <= arguments.limit:
                    rows.append(letter_row(letter, with_status=arguments.all))
                if total == most:
                    output.note(f"only the newest {most:,} are counted; --json with --limit lists more")
                    break
    if total > arguments.limit:
        output.note(
            f"there are more than {arguments.limit}; --limit shows more"
            if output.json
            else f"the newest {arguments.limit:,} of {total:,}; --limit shows more"
        )
    if rows:
        print_rows(output, [group_row(group) for group in groups.largest_first()])
        output.print()
        print_rows(output, rows)
    else:
        output.print("no dead letters" if arguments.all else "no open dead letters")


def dead_show_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="a delivery id, an event id, or PARTITION@OFFSET")
    api_arguments(parser)


@command(
    "dead show",
    about="show a dead letter with its attempts and its event",
    example="gateway dead show dlv_51aa…",
    add_arguments=dead_show_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _dead_show(call: Invocation) -> int:
    output = call.output
    letters = await (_shown(call) if api_of(call) is None else _shown_by_api(call))
    for number, letter in enumerate(letters):
        if output.json:
            output.line(letter_fields(listed(letter)) | letter_content(letter))
        else:
            if number:
                output.print()
            print_letter(output, letter)
    if not letters:
        output.fail(f"{call.arguments.id}: no dead letter has this delivery id, event id or position")
    return 0 if letters else 1


async def _shown(call: Invocation) -> Sequence[DeadLetter]:
    """Return the dead letters for an ID, from the log, without what the local rules hide."""
    hidden, name = Redactions(readable_rules(call)), call.arguments.id
    async with opened_log(call) as log:
        control = await ControlClient(log, call.topics).control()
        with call.output.waiting(f"looking for {name}"):
            return [hidden.letter(each) for each in await find_dead_letters(log, call.topics, control, name)]


async def _shown_by_api(call: Invocation) -> Sequence[DeadLetter]:
    """Do the same via the API of a process, which shows as much as the caller may see."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_dead_letters import ApiDeadLetters  # noqa: PLC0415 - a tenth of a second

    async with client_of(call) as client:
        with call.output.waiting(f"looking for {call.arguments.id}"):
            return await ApiDeadLetters(client).show(call.arguments.id)


def resolve_arguments(parser: Parser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="a delivery id or an event id")
    filter_arguments(parser)
    parser.add_argument("--all", action="store_true", help="every open dead letter")
    parser.add_argument("--dry-run", action="store_true", help="only show how many match")
    parser.set_defaults(yes=False)
    why_argument(parser)
    wait_arguments(parser)
    api_arguments(parser)


@command(
    "dead replay",
    about="deliver dead letters again, with a fresh retry schedule",
    example="gateway dead replay --route announce-failed-payments --since 2h",
    add_arguments=resolve_arguments,
    settings=("rules", *LOG_SETTINGS),
)
def _dead_replay(call: Invocation) -> Coroutine[Any, Any, int]:
    return _resolve(call, "replay")


def drop_arguments(parser: Parser) -> None:
    resolve_arguments(parser)
    yes_argument(parser)


@command(
    "dead drop",
    about="discard dead letters",
    example="gateway dead drop --reason route_removed --yes",
    add_arguments=drop_arguments,
    settings=("rules", *LOG_SETTINGS),
)
def _dead_drop(call: Invocation) -> Coroutine[Any, Any, int]:
    return _resolve(call, "drop")


async def _resolve(call: Invocation, action: Literal["replay", "drop"]) -> int:
    arguments = call.arguments
    which = _filter(arguments, now=0.0)
    if not arguments.ids and not arguments.all and which == DeadFilter():
        raise UsageError(f"dead {action}: expected ids, --route, --destination, --reason, --since, --until or --all")
    if api_of(call) is not None:
        return await _resolve_by_api(call, action)
    async with opened_log(call) as log:
        client = control_client(call, log)
        # Dead letters that arrive during the prompt aren't in the number that it shows: they are left alone.
        ends = await client.dead_letter_ends() if _needs_confirmation(call, action) else None
        below = None if ends is None else ends.ends
        letters = LettersInLog(log, call.topics, await client.control(), below=below)

        def resolve(which: DeadFilter, _newest: float | None) -> Coroutine[Any, Any, StoredCommand]:
            return client.resolve(action, which, ends=ends)

        return await _resolve_with(call, action, _filter(arguments, now=log.now()), letters, client, resolve=resolve)


async def _resolve_by_api(call: Invocation, action: Literal["replay", "drop"]) -> int:
    """Do the same via the API of a process."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_commands import ApiControl  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_dead_letters import ApiDeadLetters  # noqa: PLC0415 - a tenth of a second

    async with client_of(call) as client:
        now = await client.now()
        control, letters = ApiControl(client, call.arguments.why), ApiDeadLetters(client)

        def resolve(which: DeadFilter, newest: float | None) -> Coroutine[Any, Any, StoredCommand]:
            if _needs_confirmation(call, action):  # as above
                counted_until = now if newest is None else just_after(newest)
                which = replace(which, until=counted_until if which.until is None else min(which.until, counted_until))
            return control.resolve(action, which)

        code = await _resolve_with(call, action, _filter(call.arguments, now=now), letters, control, resolve=resolve)
    for name in sorted(letters.unread):
        call.output.note(f"{name}: not read", style="yellow")
    return code


class _DeadLetters(Protocol):
    """Dead letters, in the log or by the API."""

    def read(self, which: DeadFilter) -> AsyncGenerator[ListedLetter, None]: ...

    async def deliveries_of(self, names: Sequence[str]) -> tuple[str, ...]: ...


_Resolve = Callable[[DeadFilter, float | None], Coroutine[Any, Any, StoredCommand]]
"""Stores the command. The time is when the newest of the counted dead letters was written; None if none was counted."""


def _needs_confirmation(call: Invocation, action: Literal["replay", "drop"]) -> bool:
    """Return whether the user is asked first, with the number of dead letters."""
    return action == "drop" and not call.arguments.yes


async def _resolve_with(
    call: Invocation,
    action: Literal["replay", "drop"],
    which: DeadFilter,
    letters: _DeadLetters,
    client: CommandClient,
    *,
    resolve: _Resolve,
) -> int:
    arguments, output = call.arguments, call.output
    with output.waiting("reading the dead letters"):
        if arguments.ids:
            which = replace(which, ids=await letters.deliveries_of(arguments.ids))
        is_asked = _needs_confirmation(call, action)
        counts: Counter[tuple[str, str, str]] = Counter()
        newest: float | None = None
        if arguments.dry_run or is_asked:
            async with aclosing(letters.read(which)) as found:
                async for letter in found:
                    counts[letter.route, letter.destination, letter.reason] += 1
                    newest = letter.at if newest is None else max(newest, letter.at)
    if (arguments.dry_run or is_asked) and not counts:
        note_unknown_of(call)
    if arguments.dry_run:
        _print_dry_run(output, action, counts)
        return 0
    if is_asked and not may_drop(call, count(counts.total(), "dead letter")):
        return 1
    placed = await to_its_end(output, resolve(which, newest))
    nothing = {"replay": "queued {}", "drop": "dropped {}"}[action]
    done = {"replay": f"queued {{}}: {DUE}", "drop": "dropped {}"}[action]
    with naming_stored(output) as stored:
        stored.add(f"the {action} of dead letters ({placed.command.key})", "`gateway dead list` shows what is left")
        ended = await wait_for_outcome(call, client, placed)
    if ended.done is not None and ended.done.state == "done" and not (ended.done.count or is_asked):
        note_unknown_of(call)
    return print_outcome(
        call,
        placed,
        ended,
        lambda command: (
            (done if command.count else nothing).format(count(command.count, "dead letter"))
            + not_included_text(command)
        ),
        see="gateway dead list",
    )


def _print_dry_run(output: Output, action: str, counts: "Counter[tuple[str, str, str]]") -> None:
    if output.json:
        for (route, destination, reason), number in sorted(counts.items()):
            output.line({"route": route, "destination": destination, "reason": reason, "count": number})
        return
    rows = [(*which, str(number)) for which, number in sorted(counts.items())]
    if rows:
        output.table(["route", "destination", "reason", "dead letters"], rows, right=("dead letters",))
    output.print(f"would {action} {count(counts.total(), 'dead letter')}; nothing was done")


def _filter(arguments: argparse.Namespace, *, now: float) -> DeadFilter:
    """Return the filter that the arguments describe; durations count back from `now`."""
    return DeadFilter(
        route=arguments.route,
        destination=arguments.destination,
        reason=arguments.reason,
        since=None if arguments.since is None else now - arguments.since,
        until=None if arguments.until is None else now - arguments.until,
    )
