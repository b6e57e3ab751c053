"""`gateway status`: what keeps deliveries from going out."""

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway.commands.base import LOG, Call, command, opened_log
from gateway.commands.values import Parser
from gateway.engine.control.state import Control
from gateway.model import LogUnavailableError, UsageError
from gateway.ops.control_client import ControlClient
from gateway.ops.findings import NOT_READ, REFUSED, Finding, ranked
from gateway.ops.presentation import print_status
from gateway.ops.process_status import findings_in
from gateway.ops.send import admin_url, ask_status
from gateway.ops.silent_sources import silent_in
from gateway.ops.status import (
    add_dead,
    dead_in,
    findings_of,
    of_destination,
    paused_in,
    unread_in,
    unrouted_in,
    waiting,
    without_log,
    without_process,
)
from gateway.ops.waiting_deliveries import Backlog, Backlogs, LastAttempts
from gateway.rules.load import check_rules
from gateway.rules.rules import Rules
from gateway.text import did_you_mean

if TYPE_CHECKING:
    from gateway.log.base import Log, Partition


def status_arguments(parser: Parser) -> None:
    parser.add_argument(
        "destination", nargs="?", metavar="DESTINATION", help="only this destination, with its last attempts"
    )
    about = "HOST:PORT of a process, to ask it what it holds in memory; repeatable (the one that GATEWAY_ADMIN names)"
    parser.add_argument("--admin", dest="asked", action="append", default=[], metavar="HOST:PORT", help=about)


@command(
    "status",
    about="show what keeps deliveries from going out, the worst first",
    example="gateway status --admin http://127.0.0.1:9090",
    takes=status_arguments,
    settings=("rules", *LOG),
)
async def _status(call: Call) -> int:
    arguments, output = call.arguments, call.output
    attempts = LastAttempts(arguments.destination or "")
    backlogs = Backlogs()
    rules, _ = await asyncio.to_thread(check_rules, call.settings.rules, resolve=False)
    asked = arguments.asked or [address for address in (os.environ.get("GATEWAY_ADMIN"),) if address]
    answers, found = await _ask(asked)
    control = Control()
    try:
        async with opened_log(call) as log:
            with output.waiting("reading what waits"):
                control = await ControlClient(log, call.topics).control()
                unread: dict[Partition, str] = {}
                async for stored in waiting(log, call.topics, control, unread):
                    backlogs.add(stored)
                    attempts.add(stored)
                found += paused_in(control) + findings_of(backlogs, log.now(), rules)
                found += await unrouted_in(log, call.topics, unread)
                found += await dead_in(
                    log, call.topics, control, [answer for answer, _ in answers], unread, rules=rules
                )
                if arguments.destination:
                    await add_dead(log, call.topics, control, attempts, unread)
                else:
                    found += await _silent(call, log, rules)
                found += unread_in(unread)
    except (UsageError, LogUnavailableError) as error:
        if not asked:
            raise
        found.append(without_log(error, is_rest_told=bool(answers)))
    for answer, address in answers:
        found += findings_in(answer, address, control)
    if arguments.destination:
        found = _of_one(found, rules, backlogs, attempts)
    print_status(output, ranked(found), attempts.newest_first())
    if not asked:
        output.note("no process was asked (--admin) for its breakers, halted keys, refused rules and unrouted events")
    return 1 if any(each.is_wrong for each in found) else 0


async def _ask(addresses: Sequence[str]) -> tuple[list[tuple[Mapping[str, Any], str]], list[Finding]]:
    """Return what processes answer, each with its address, and which don't. Raises UsageError for no address."""
    for address in addresses:
        admin_url(address)  # or none is asked
    told = await asyncio.gather(*map(ask_status, addresses), return_exceptions=True)
    answers: list[tuple[Mapping[str, Any], str]] = []
    found: list[Finding] = []
    for address, answer in zip(addresses, told, strict=True):
        if isinstance(answer, ConnectionError):
            found.append(without_process(address, answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            answers.append((answer, address))
    return answers, found


async def _silent(call: Call, log: "Log", rules: Rules | None) -> Sequence[Finding]:
    if rules is None:
        return ()
    looked = await silent_in(log, call.topics, rules)
    if looked.left_out:
        call.output.note(looked.left_out)
    return looked.found


def _of_one(
    found: Iterable[Finding], rules: Rules | None, backlogs: Iterable[Backlog], attempts: LastAttempts
) -> list[Finding]:
    """Return what concerns one destination. Raises UsageError where neither the rules nor anything found names it."""
    name = attempts.destination
    routes = {each.route for each in backlogs if each.destination == name}
    if rules is not None:
        routes |= {route.name for route in rules.routes.values() if name in route.destinations}
    chosen = of_destination(found, name, routes)
    is_found = attempts.newest_first() or any(each.rank not in (NOT_READ, REFUSED) for each in chosen)
    if rules is not None and name not in rules.destinations and not is_found:
        known = sorted(rules.destinations)
        more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
        near = did_you_mean(name, known)
        raise UsageError(f"unknown destination {name!r}{near}; the rules name {', '.join(known[:MOST_NAMES])}{more}")
    return chosen


MOST_NAMES = 20
"""Of destinations that an error names."""
