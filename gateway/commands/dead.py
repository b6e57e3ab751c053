"""`gateway dead`: dead letters."""

import argparse
from collections import Counter
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    command,
    opened_log,
    readable_rules,
    wait_arguments,
    why_argument,
)
from gateway.commands.control import not_included_text, ordering, print_outcome, wait_for_outcome
from gateway.commands.replay import DUE
from gateway.commands.values import Parser, duration, positive
from gateway.engine.control.records import DeadFilter
from gateway.model import DeadReason, UsageError
from gateway.ops.control_client import ControlClient
from gateway.ops.dead_letter_presentation import group_row, letter_content, letter_fields, letter_row, print_letter
from gateway.ops.dead_letters import Groups, deliveries_of, find_dead_letters, read_dead_letters
from gateway.ops.output import Output, count
from gateway.ops.presentation import Row, print_rows
from gateway.ops.redaction import Redactions


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


@command(
    "dead list",
    about="list open dead letters: by group, then one by one, newest first",
    example="gateway dead list --destination ci --since 1d",
    add_arguments=dead_list_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _dead_list(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    groups = Groups()
    count_all = 0
    rows: list[Row] = []
    hidden = Redactions(readable_rules(call))
    async with opened_log(call) as log:
        control = await ControlClient(log, call.topics).control()
        which = _filter(arguments, now=log.now())
        with output.waiting("reading the dead letters"):
            async with aclosing(
                read_dead_letters(log, call.topics, control, which, include_resolved=arguments.all)
            ) as letters:
                async for found in letters:
                    letter = hidden.letter(found)
                    count_all += 1
                    if output.json:
                        if count_all > arguments.limit:
                            break
                        output.line(letter_fields(letter))
                        continue
                    groups.add(letter)
                    if count_all <= arguments.limit:
                        rows.append(letter_row(letter, with_status=arguments.all))
    if count_all > arguments.limit:
        output.note(
            f"there are more than {arguments.limit}; --limit shows more"
            if output.json
            else f"the newest {arguments.limit:,} of {count_all:,}; --limit shows more"
        )
    if rows:
        print_rows(output, [group_row(group) for group in groups.largest_first()])
        output.print()
        print_rows(output, rows)
    else:
        output.print("no dead letters" if arguments.all else "no open dead letters")
    return 0


def dead_show_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="a delivery id, an event id, or PARTITION@OFFSET")


@command(
    "dead show",
    about="show a dead letter with its attempts and its event",
    example="gateway dead show dlv_51aa…",
    add_arguments=dead_show_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _dead_show(call: Invocation) -> int:
    output = call.output
    hidden = Redactions(readable_rules(call))
    async with opened_log(call) as log:
        control = await ControlClient(log, call.topics).control()
        with output.waiting(f"looking for {call.arguments.id}"):
            found = await find_dead_letters(log, call.topics, control, call.arguments.id)
    letters = [hidden.letter(letter) for letter in found]
    for number, letter in enumerate(letters):
        if output.json:
            output.line(letter_fields(letter) | letter_content(letter))
        else:
            if number:
                output.print()
            print_letter(output, letter)
    if not letters:
        output.fail(f"{call.arguments.id}: no dead letter has this delivery id, event id or position")
    return 0 if letters else 1


def resolve_arguments(parser: Parser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="a delivery id or an event id")
    filter_arguments(parser)
    parser.add_argument("--all", action="store_true", help="every open dead letter")
    parser.add_argument("--dry-run", action="store_true", help="only show how many match")
    parser.set_defaults(yes=False)
    why_argument(parser)
    wait_arguments(parser)


@command(
    "dead replay",
    about="deliver dead letters again, with a fresh retry schedule",
    example="gateway dead replay --route announce-failed-payments --since 2h",
    add_arguments=resolve_arguments,
    settings=LOG_SETTINGS,
)
def _dead_replay(call: Invocation) -> Coroutine[Any, Any, int]:
    return _resolve(call, "replay")


def drop_arguments(parser: Parser) -> None:
    resolve_arguments(parser)
    parser.add_argument("--yes", action="store_true", help="don't ask for confirmation")


@command(
    "dead drop",
    about="discard dead letters",
    example="gateway dead drop --reason route_removed --yes",
    add_arguments=drop_arguments,
    settings=LOG_SETTINGS,
)
def _dead_drop(call: Invocation) -> Coroutine[Any, Any, int]:
    return _resolve(call, "drop")


async def _resolve(call: Invocation, action: Literal["replay", "drop"]) -> int:
    arguments, output = call.arguments, call.output
    which = _filter(arguments, now=0.0)
    if not arguments.ids and not arguments.all and which == DeadFilter():
        raise UsageError(f"dead {action}: expected ids, --route, --destination, --reason, --since, --until or --all")
    async with opened_log(call) as log:
        client = ordering(call, log)
        which = _filter(arguments, now=log.now())
        with output.waiting("reading the dead letters"):
            control = await client.control()
            if arguments.ids:
                which = replace(which, ids=await deliveries_of(log, call.topics, control, arguments.ids))
            is_asked = action == "drop" and output.is_interactive and not arguments.yes and not output.json
            counts: Counter[tuple[str, str, str]] = Counter()
            if arguments.dry_run or is_asked:
                async for letter in read_dead_letters(log, call.topics, control, which, include_resolved=False):
                    counts[letter.properties.route, letter.properties.destination, letter.properties.reason] += 1
        if arguments.dry_run:
            _print_dry_run(output, action, counts)
            return 0
        if is_asked and not output.confirm(f"drop {count(counts.total(), 'dead letter')}?"):
            output.print("nothing was dropped")
            return 1
        placed = await client.resolve(action, which)
        done = {"replay": f"queued {{}}: {DUE}", "drop": "dropped {}"}[action]
        ended = await wait_for_outcome(call, client, placed)
        return print_outcome(
            call,
            placed,
            ended,
            lambda command: done.format(count(command.count, "dead letter")) + not_included_text(command),
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
