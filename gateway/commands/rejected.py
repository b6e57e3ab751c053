"""`gateway rejected`: requests that verification refused, and that were kept."""

import argparse
import os
from contextlib import aclosing
from typing import TYPE_CHECKING

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    command,
    may_drop,
    no_api_argument,
    opened_log,
    readable_rules,
    why_argument,
    yes_argument,
)
from gateway.commands.values import Parser, duration, position, positive, refusal
from gateway.model import UsageError
from gateway.ops.output import count
from gateway.ops.presentation import Row, print_rows
from gateway.ops.redaction import Redactions
from gateway.ops.rejected import Rejected, RejectedFilter, RejectedGroups, find_rejected, read_rejected
from gateway.ops.rejected_presentation import (
    print_rejected,
    rejected_content,
    rejected_fields,
    rejected_group_fields,
    rejected_group_row,
    rejected_row,
    report_fields,
)
from gateway.ops.rejected_retry import RejectedCommand, Report, text_of
from gateway.ops.verification import defaults_used, resolved_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.log.base import Log, Partition
    from gateway.rules.rules import Rules, Source

WAIT = 90.0
"""Seconds to wait for another command: longer than the claim of a killed one lasts."""
BESIDE = "refused requests are read and retried where the log and the rules with their secrets are"


def filter_arguments(parser: Parser) -> None:
    about = "only those refused for this reason, such as bad_signature"
    parser.add_argument("--reason", type=refusal, metavar="REASON", help=about)
    parser.add_argument(
        "--since", type=duration, metavar="DURATION", help="only those received in the last DURATION (such as 2h)"
    )
    parser.add_argument(
        "--until", type=duration, metavar="DURATION", help="only those received more than DURATION (such as 5m) ago"
    )
    no_api_argument(parser, BESIDE)


def list_arguments(parser: Parser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="only those of this source")
    filter_arguments(parser)
    parser.add_argument(
        "--limit", type=positive, default=20, metavar="N", help="list at most N singly, newest first (default: 20)"
    )
    parser.add_argument("--all", action="store_true", help="include admitted and dropped ones")


@command(
    "rejected list",
    about="list refused requests that were kept: by source and reason, then one by one, newest first",
    example="gateway rejected list github --since 2h",
    add_arguments=list_arguments,
    settings=LOG_SETTINGS,
)
async def _rejected_list(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    groups, rows, lines, total = RejectedGroups(), list[Row](), list[dict[str, object]](), 0
    unread: dict[Partition, str] = {}
    async with opened_log(call) as log:
        which = _filter(arguments, now=log.now())
        with output.waiting("reading the refused requests"):
            async with aclosing(
                read_rejected(log, call.topics, which, include_resolved=arguments.all, unread=unread)
            ) as found:
                async for rejected in found:
                    groups.add(rejected)
                    total += 1
                    if total <= arguments.limit:
                        rows.append(rejected_row(rejected, with_status=arguments.all))
                        lines.append(rejected_fields(rejected))
    for partition, reason in sorted(unread.items()):
        output.note(f"{partition.topic}/{partition.number}: not read: {reason}", style="yellow")
    if output.json:
        for fields in [*map(rejected_group_fields, groups.largest_first()), *lines]:
            output.line(fields)
    if total > arguments.limit and not output.json:
        output.note(f"the newest {arguments.limit:,} of {total:,}; --limit shows more")
    if rows:
        print_rows(output, [rejected_group_row(group) for group in groups.largest_first()])
        output.print()
        print_rows(output, rows)
    else:
        output.print("no refused requests" if arguments.all else "no open refused requests")
    return 1 if unread else 0


def show_arguments(parser: Parser) -> None:
    parser.add_argument("position", type=position, metavar="PARTITION@OFFSET", help="where it is, as listed")
    no_api_argument(parser, BESIDE)


@command(
    "rejected show",
    about="show a refused request without its credentials",
    example="gateway rejected show 2@1041",
    add_arguments=show_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _rejected_show(call: Invocation) -> int:
    output, place = call.output, call.arguments.position
    hidden = Redactions(readable_rules(call))
    async with opened_log(call) as log:
        with output.waiting(f"looking for {place}"):
            found = await find_rejected(log, call.topics, place)
    rejected = None if found is None else hidden.rejected(found)
    if rejected is None:
        output.fail(f"{place}: expected the position of a refused request, as `gateway rejected list` has it")
        return 1
    if output.json:
        output.line(rejected_fields(rejected) | rejected_content(rejected))
    else:
        print_rejected(output, rejected)
    return 0


def retry_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the source, as named in routes.yaml")
    parser.add_argument("positions", nargs="*", type=position, metavar="PARTITION@OFFSET", help="only these, as listed")
    filter_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only show what would be admitted")
    why_argument(parser)


@command(
    "rejected retry",
    about="verify refused requests again with the secrets in the rules, and admit those that pass",
    example="gateway rejected retry github --since 2h",
    add_arguments=retry_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _rejected_retry(call: Invocation) -> int:
    arguments = call.arguments
    rules, source, missing = resolved_source(call.settings.rules, arguments.source)
    if missing := [*missing, *defaults_used(rules.files, source.name, os.environ)]:
        raise UsageError("\n".join(map(str, missing)))
    async with opened_log(call) as log:
        which = _filter(arguments, now=log.now())
        await _check_positions(call, log, which)
        with call.output.waiting("verifying the refused requests"):
            retry = RejectedCommand(log, call.topics, wait=WAIT, why=arguments.why)
            report = await _retried(retry, rules, source, which, dry_run=arguments.dry_run)
    return _print_report(call, report, is_dry=arguments.dry_run)


async def _retried(
    retry: RejectedCommand, rules: "Rules", source: "Source", which: RejectedFilter, *, dry_run: bool
) -> Report:
    if not source.verifier.fetches_keys:
        return await retry.retry(source, which, dry_run=dry_run)
    from gateway.ops.key_documents import opened_client  # noqa: PLC0415 - few sources need it

    async with opened_client(rules) as client:
        return await retry.retry(source, which, fetch=client.fetch, dry_run=dry_run)


def drop_arguments(parser: Parser) -> None:
    parser.add_argument("positions", nargs="*", type=position, metavar="PARTITION@OFFSET", help="only these, as listed")
    parser.add_argument("--source", metavar="SOURCE", help="only those of this source")
    filter_arguments(parser)
    parser.add_argument("--all", action="store_true", help="all open ones")
    yes_argument(parser)
    why_argument(parser)


@command(
    "rejected drop",
    about="dismiss refused requests",
    example="gateway rejected drop --source github --until 1d --yes",
    add_arguments=drop_arguments,
    settings=LOG_SETTINGS,
)
async def _rejected_drop(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    if not arguments.all and _filter(arguments, now=0.0) == RejectedFilter():
        raise UsageError("rejected drop: expected positions, --source, --reason, --since, --until or --all")
    async with opened_log(call) as log:
        which = _filter(arguments, now=log.now())
        await _check_positions(call, log, which)
        dropping = RejectedCommand(log, call.topics, wait=WAIT, why=arguments.why)
        ends: Mapping[int, int] | None = None
        if not arguments.yes:
            with output.waiting("reading the refused requests"):
                # What comes while somebody is asked was counted for nobody.
                number, ends = 0, await dropping.ends()
                async with aclosing(read_rejected(log, call.topics, which)) as found:
                    async for each in found:
                        number += each.record.offset < ends.get(each.partition.number, 0)
            if not may_drop(call, count(number, "refused request")):
                return 1
        with output.waiting("dropping the refused requests"):
            report = await dropping.drop(which, ends)
    return _print_report(call, report)


async def _check_positions(call: Invocation, log: "Log", which: RejectedFilter) -> None:
    """Say what became of requests that are named and aren't open. Raises UsageError for positions without any."""
    if not which.positions:
        return
    known: dict[str, Rejected] = {}
    unread: dict[Partition, str] = {}
    with call.output.waiting("looking for the refused requests"):
        async with aclosing(read_rejected(log, call.topics, which, include_resolved=True, unread=unread)) as found:
            async for rejected in found:
                known[rejected.position] = rejected
    not_read = {str(partition.number) for partition in unread}
    absent = [each for each in which.positions if each not in known and each.partition("@")[0] not in not_read]
    if absent:
        raise UsageError(
            f"{', '.join(absent)}: expected positions of refused requests that this is about, as `gateway rejected "
            "list` has them; nothing was done"
        )
    for rejected in known.values():
        if rejected.outcome is not None:
            call.output.note(f"{rejected.position}: {rejected.status} already")


def _print_report(call: Invocation, report: Report, *, is_dry: bool = False) -> int:
    if call.output.json:
        call.output.line(report_fields(report, is_dry=is_dry))
    else:
        call.output.print(text_of(report, is_dry=is_dry))
    if report.problem:
        call.output.fail(f"{report.problem}; run it again: what was admitted isn't admitted twice")
    return 0 if report.is_complete else 1


def _filter(arguments: argparse.Namespace, *, now: float) -> RejectedFilter:
    """Return the filter that the arguments describe; durations count back from `now`."""
    return RejectedFilter(
        source=arguments.source,
        reason=arguments.reason,
        since=None if arguments.since is None else now - arguments.since,
        until=None if arguments.until is None else now - arguments.until,
        positions=tuple(getattr(arguments, "positions", ())),
    )
