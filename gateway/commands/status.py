"""`gateway status`: what keeps deliveries from going out."""

import asyncio
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway.commands.base import LOG_SETTINGS, Invocation, command, no_api_argument, opened_log
from gateway.commands.values import Parser
from gateway.engine.control.state import Control
from gateway.log.base import NO_TOPIC
from gateway.model import LogUnavailableError, RulesError, UsageError
from gateway.ops.control_client import ControlClient
from gateway.ops.findings import NOT_READ, REFUSED, Finding, ranked
from gateway.ops.presentation import print_status
from gateway.ops.process_status import not_asked_finding, process_findings
from gateway.ops.quiet_routes import quiet_route_findings
from gateway.ops.rejected import rejected_findings
from gateway.ops.silent_sources import silent_sources_in
from gateway.ops.status import (
    add_dead_letters,
    dead_letter_findings,
    filter_by_destination,
    log_unreachable_finding,
    paused_findings,
    process_unreachable_finding,
    unpaused_findings,
    unread_findings,
    waiting_findings,
)
from gateway.ops.unfinished import unfinished_findings
from gateway.ops.waiting_deliveries import Backlog, Backlogs, LastAttempts
from gateway.ops.waiting_records import waiting_deliveries
from gateway.required_topics import missing_topics, specs_of
from gateway.rules.load import check_rules
from gateway.rules.rules import Rules
from gateway.settings import ADMIN, KafkaTarget, Settings
from gateway.text import did_you_mean

if TYPE_CHECKING:
    from gateway.log.base import Log, Partition


def status_arguments(parser: Parser) -> None:
    no_api_argument(
        parser, "`gateway deliveries list --waiting` and `gateway dead list` show what waits, and what has failed"
    )
    parser.add_argument(
        "destination", nargs="?", metavar="DESTINATION", help="show only this destination, with its last attempts"
    )
    about = (
        "also query a process at HOST:PORT for its state in memory; repeatable "
        f"[env: GATEWAY_ADMIN, default: {ADMIN}, if a process with this log responds there]"
    )
    parser.add_argument("--admin", dest="asked", action="append", default=[], metavar="HOST:PORT", help=about)


@command(
    "status",
    about="show what blocks deliveries, worst first",
    example="gateway status --admin 127.0.0.1:9090",
    add_arguments=status_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _status(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    attempts = LastAttempts(arguments.destination or "")
    backlogs = Backlogs()
    rules, _ = await asyncio.to_thread(check_rules, call.settings.rules, resolve=False)
    asked = arguments.asked or [address for address in (os.environ.get("GATEWAY_ADMIN"),) if address]
    statuses, found = await _ask(asked)
    unasked = ""
    asking = None if asked else asyncio.create_task(_ask_default(call.settings))  # while the log is read
    control = Control()
    unread: dict[Partition, str] = {}
    try:
        async with opened_log(call) as log:
            with output.waiting("reading the log"):
                read_at = log.now()
                control = await ControlClient(log, call.topics).control()
                async for stored in waiting_deliveries(log, call.topics, control, unread):
                    backlogs.add(stored)
                    attempts.add(stored)
                found += paused_findings(control, rules) + waiting_findings(backlogs, log.now(), rules, control)
                found += unpaused_findings(backlogs.parked, control, read_at, rules)
                if asking is not None:
                    statuses, unasked = await asking
                found += await unfinished_findings(log, call.topics, unread, statuses=statuses, rules=rules)
                found += await dead_letter_findings(
                    log, call.topics, control, [status for status, _ in statuses], unread, rules=rules
                )
                if arguments.destination:
                    await add_dead_letters(log, call.topics, control, attempts, unread)
                else:
                    found += await _silent_findings(call, log, rules)
                    found += await rejected_findings(log, call.topics, unread)
                unread |= await _missing(call, log, rules)
    except (UsageError, LogUnavailableError) as error:
        if asking is not None:
            statuses, unasked = await asking
        if not (asked or statuses):
            raise
        found.append(log_unreachable_finding(error, has_statuses=bool(statuses)))
    for status, address in statuses:
        found += process_findings(status, address, control)
    named = {each.what for each in found}  # by processes, which know since when
    found += unread_findings(
        {where: reason for where, reason in unread.items() if reason != NO_TOPIC or where.topic not in named}
    )
    routes: set[str] | None = None
    if arguments.destination:
        routes = _routes_to(arguments.destination, rules, backlogs)
        found = _for_destination(found, rules, routes, attempts)
    found += quiet_route_findings(statuses, control, routes=routes)
    # A process that doesn't respond is a finding by itself.
    not_asked = not_asked_finding([status for status, _ in statuses], unasked) if len(statuses) >= len(asked) else None
    found += [] if not_asked is None else [not_asked]
    print_status(output, ranked(found), attempts.newest_first())
    if any(each.needs_attention for each in found):
        return 1
    return 0 if not_asked is None else NOT_ALL_SEEN


async def _missing(call: Invocation, log: "Log", rules: Rules | None) -> "Mapping[Partition, str]":
    """Return which topics are missing; a file has them by itself."""
    if not isinstance(call.settings.log, KafkaTarget):
        return {}
    try:
        specs = call.topics.specs(()) if rules is None else specs_of(rules, call.topics)
    except RulesError:  # `gateway check` says which
        specs = call.topics.specs(())
    return await missing_topics(log, specs)


async def _ask_default(settings: Settings) -> tuple[list[tuple[Mapping[str, Any], str]], str]:
    """Return the response of the process at the default address, if it has this log, or else why there is none."""
    from gateway.ops.send import ask_status  # noqa: PLC0415 - a tenth of a second

    try:
        status = await ask_status(str(ADMIN), timeout=DEFAULT_TIMEOUT)
    except ConnectionError as error:
        return [], f"--admin isn't given, and no gateway responds at {ADMIN}: {error}"
    names = status.get("log_names")
    if isinstance(names, list) and set(settings.log_names) & set(map(str, names)):
        return [(status, str(ADMIN))], ""
    return [], f"--admin isn't given, and the process at {ADMIN} may have another log"


async def _ask(addresses: Sequence[str]) -> tuple[list[tuple[Mapping[str, Any], str]], list[Finding]]:
    """Return responses, with their addresses, and findings for the rest. Raises UsageError for an invalid address."""
    if not addresses:
        return [], []
    from gateway.ops.send import admin_url, ask_status  # noqa: PLC0415 - a tenth of a second

    for address in addresses:
        admin_url(address)  # raises before any is queried
    responses = await asyncio.gather(*map(ask_status, addresses), return_exceptions=True)
    statuses: list[tuple[Mapping[str, Any], str]] = []
    found: list[Finding] = []
    for address, status in zip(addresses, responses, strict=True):
        if isinstance(status, ConnectionError):
            found.append(process_unreachable_finding(address, status))
        elif isinstance(status, BaseException):
            raise status
        else:
            statuses.append((status, address))
    return statuses, found


async def _silent_findings(call: Invocation, log: "Log", rules: Rules | None) -> Sequence[Finding]:
    if rules is None:
        return ()
    looked = await silent_sources_in(log, call.topics, rules)
    if looked.incomplete:
        call.output.note(looked.incomplete)
    return looked.found


def _routes_to(destination: str, rules: Rules | None, backlogs: Iterable[Backlog]) -> set[str]:
    routes = {each.route for each in backlogs if each.destination == destination}
    if rules is not None:
        routes |= {route.name for route in rules.routes.values() if destination in route.destinations}
    return routes


def _for_destination(
    found: Iterable[Finding], rules: Rules | None, routes: Collection[str], attempts: LastAttempts
) -> list[Finding]:
    """Return what concerns one destination. Raises UsageError if it is neither in the rules nor in a finding."""
    name = attempts.destination
    chosen = filter_by_destination(found, name, routes)
    is_found = attempts.newest_first() or any(each.rank not in (NOT_READ, REFUSED) for each in chosen)
    if rules is not None and name not in rules.destinations and not is_found:
        known = sorted(rules.destinations)
        more = f" and {len(known) - MAX_NAMES} more" if len(known) > MAX_NAMES else ""
        near = did_you_mean(name, known)
        raise UsageError(f"unknown destination {name!r}{near}; the rules name {', '.join(known[:MAX_NAMES])}{more}")
    return chosen


NOT_ALL_SEEN = 3
"""Exit code if nothing wrong was found, but not all was looked at, as no process was asked for what it alone knows."""
DEFAULT_TIMEOUT = 2.0
"""Seconds to wait for the process at the default address, which may be something else."""
MAX_NAMES = 20
"""Maximum number of destinations that an error lists."""
