"""`gateway status`: what keeps deliveries from going out."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from gateway.commands.base import LOG_SETTINGS, Invocation, api_arguments, api_of, command, opened_log
from gateway.commands.values import Parser
from gateway.model import LogUnavailableError, UsageError
from gateway.ops.findings import Finding, ranked
from gateway.ops.output import Output, count
from gateway.ops.presentation import print_status
from gateway.ops.process_status import each_process, not_asked_finding
from gateway.ops.status import log_unreachable_finding, process_unreachable_finding
from gateway.ops.status_report import Scope, Statuses, StatusReport
from gateway.ops.waiting_deliveries import AttemptInfo
from gateway.required_topics import missing_of_rules
from gateway.rules.load import check_rules
from gateway.rules.rules import Rules
from gateway.settings import ADMIN, KafkaTarget, Settings

if TYPE_CHECKING:
    from gateway.log.base import Log, Partition


def status_arguments(parser: Parser) -> None:
    parser.add_argument(
        "destination",
        nargs="?",
        metavar="DESTINATION",
        help="show only this destination, with the last recorded attempts there",
    )
    about = (
        "also query a process at HOST:PORT for its state in memory; repeatable "
        f"[env: GATEWAY_ADMIN, default: {ADMIN}, if a process with this log responds there]"
    )
    parser.add_argument("--admin", dest="asked", action="append", default=[], metavar="HOST:PORT", help=about)
    api_arguments(parser)


@command(
    "status",
    about="show what blocks deliveries, worst first",
    example="gateway status --admin 127.0.0.1:9090",
    add_arguments=status_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _status(call: Invocation) -> int:
    if api_of(call) is not None:
        return await _status_by_api(call)
    arguments, output = call.arguments, call.output
    rules, _ = await asyncio.to_thread(check_rules, call.settings.rules, resolve=False)
    asked = arguments.asked or [address for address in (os.environ.get("GATEWAY_ADMIN"),) if address]
    statuses, unreachable = await _ask(asked)
    unasked = ""
    asking = None if asked else asyncio.create_task(_ask_default(call.settings))  # while the log is read
    report = StatusReport(rules, arguments.destination or "")
    report.found += unreachable

    async def known() -> Statuses:
        nonlocal statuses, unasked
        if asking is not None:
            statuses, unasked = await asking
        return statuses

    try:
        async with opened_log(call) as log:
            with output.waiting("reading the log"):
                missing = partial(_missing, call, log, rules)
                await report.read(Scope(log=log, topics=call.topics, missing=missing), known)
    except (UsageError, LogUnavailableError) as error:
        await known()
        if not (asked or statuses):
            raise
        report.found.append(log_unreachable_finding(error, has_statuses=bool(statuses)))
    found = report.finished(statuses)
    for note in report.notes:
        output.note(note)
    # A process that doesn't respond is a finding by itself.
    not_asked = not_asked_finding([status for status, _ in statuses], unasked) if len(statuses) >= len(asked) else None
    found = ranked([*found, *([] if not_asked is None else [not_asked])])
    return _shown(output, found, report.attempts(), is_all_seen=not_asked is None)


def _shown(output: Output, found: Sequence[Finding], attempts: Sequence[AttemptInfo], *, is_all_seen: bool) -> int:
    """Print what was found, and return the exit code; with `is_all_seen`, nobody was left out who knows more."""
    print_status(output, found, attempts)
    if any(each.needs_attention for each in found):
        return 1
    return 0 if is_all_seen else NOT_ALL_SEEN


async def _status_by_api(call: Invocation) -> int:
    """Show what the process tells that is asked."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_status import told_status  # noqa: PLC0415 - a tenth of a second

    output = call.output
    if call.arguments.asked:
        raise UsageError("--admin: expected none with --api: the process that is asked shows its own state")
    async with client_of(call) as client:
        with output.waiting("asking"):
            told = await told_status(client, call.arguments.destination)
    for note in told.notes:
        output.note(note)
    code = _shown(output, told.found, told.attempts, is_all_seen=told.is_all_seen)
    if told.left_out:
        output.note(f"and {count(told.left_out, 'other')}, which the API doesn't tell")
    return code


async def _missing(call: Invocation, log: "Log", rules: Rules | None) -> "Mapping[Partition, str]":
    """Return which topics are missing; a file has them by itself."""
    if not isinstance(call.settings.log, KafkaTarget):
        return {}
    return await missing_of_rules(log, call.topics, rules)


async def _ask_default(settings: Settings) -> tuple[list[tuple[Mapping[str, Any], str]], str]:
    """Return the response of the process at the default address, if it has this log, or else why there is none."""
    from gateway.ops.send import ask_status  # noqa: PLC0415 - a tenth of a second

    try:
        status = await ask_status(str(ADMIN), timeout=DEFAULT_TIMEOUT)
    except ConnectionError as error:
        return [], f"--admin isn't given, and no gateway responds at {ADMIN}: {error}"
    names = status.get("log_names")
    if isinstance(names, list) and set(settings.log_names) & set(map(str, names)):
        return each_process(status, str(ADMIN)), ""
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
            statuses += each_process(status, address)
    return statuses, found


NOT_ALL_SEEN = 3
"""Exit code if nothing wrong was found, but not all was looked at, as no process was asked for what it alone knows."""
DEFAULT_TIMEOUT = 2.0
"""Seconds to wait for the process at the default address, which may be something else."""
