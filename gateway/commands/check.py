"""`gateway check` and `schema`: problems in the rules, and what is allowed."""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace

from gateway.commands.base import LOG_SETTINGS, Invocation, command, opened_log, rule_file, rule_file_argument
from gateway.commands.values import Parser, duration
from gateway.ops.certificates import certificate_problems, undemanded_certificates
from gateway.ops.identities import Seen, identities_of
from gateway.ops.output import Output, count
from gateway.ops.refused_addresses import refused_addresses
from gateway.required_topics import event_topics, specs_of
from gateway.rules.load import check_rules
from gateway.rules.rules import Rules
from gateway.rules.schema import json_schema


def check_arguments(parser: Parser) -> None:
    rule_file_argument(parser)
    about = (
        "also check that these rules give distinct identities to the events stored in the last DURATION (such as 1h)"
    )
    parser.add_argument("--since", type=duration, metavar="DURATION", help=about)


@command(
    "check",
    about="report every problem of the rules, with its location",
    example="gateway check routes.yaml",
    add_arguments=check_arguments,
    settings=(*LOG_SETTINGS, "tls_certificate", "tls_key"),
)
async def _check(call: Invocation) -> int:
    path = rule_file(call)
    rules, found = check_rules(path, resolve=False)
    problems = [replace(each, severity="error") if each.code == "expired" else each for each in found]
    errors = [problem for problem in problems if problem.severity == "error"]
    for problem in problems:
        fields = asdict(problem)
        if call.output.json:
            call.output.line({key: fields[key] for key in CHECKED})
        style = "bold red" if problem.severity == "error" else "yellow"
        call.output.print((f"{problem.severity}: ", style), str(problem))
    warnings = len(problems) - len(errors)
    refused, soon = await asyncio.to_thread(certificate_problems, call.settings.connections.certificates, time.time())
    for message in refused:
        _print(call.output, "error", "certificate", *message.split(": ", 1))
    if rules is not None:
        warnings += _warn_of_refused_addresses(call.output, rules)
        soon = [*soon, *undemanded_certificates(rules, has_tls=bool(call.settings.connections.certificates))]
    for message in soon:
        _print(call.output, "warning", "certificate", *message.split(": ", 1))
    warnings += len(soon)
    failures: Sequence[str] = ()
    if rules is not None and not errors and call.arguments.since is not None:
        warned, failures = await _check_identities(call, rules)
        warnings += warned
    if errors or refused:
        call.output.print((f"{path}: {count(len(errors) + len(refused), 'error')}", "bold red"))
        return 2
    with_warnings = f", with {count(warnings, 'warning')}" if warnings else ""
    if rules is None:
        call.output.print(f"{path}: no error{with_warnings}; what depends on unresolved references wasn't checked")
        return 0
    specs_of(rules, call.topics)  # raises if a source uses one of the gateway's own topics
    sizes = {"source": rules.sources, "destination": rules.destinations, "route": rules.routes}
    counted = ", ".join(count(len(found), what) for what, found in sizes.items())
    if failures:
        call.output.print((f"{path}: {counted}: {' and '.join(failures)}", "bold red"), with_warnings)
        return 1
    call.output.print(f"{path}: {counted}: ", ("ok", "bold green"), with_warnings)
    return 0


def _warn_of_refused_addresses(output: Output, rules: Rules) -> int:
    """Print which destinations have a literal address that no delivery may reach; return their number."""
    refused = list(refused_addresses(rules))
    for name, reason in refused:
        message = f"expected an address that deliveries may reach; {reason}, so no request is made (egress_refused)"
        _print(output, "warning", "egress", f"destinations.{name}.url", message)
    return len(refused)


def _print(output: Output, severity: str, code: str, where: str, message: str) -> None:
    """Print a problem that isn't of the rule files alone."""
    if output.json:
        line = {"path": where, "code": code, "severity": severity, "message": message}
        output.line(dict.fromkeys(CHECKED) | line)
    output.print((f"{severity}: ", "bold red" if severity == "error" else "yellow"), f"{where}: {message}")


async def _check_identities(call: Invocation, rules: Rules) -> tuple[int, Sequence[str]]:
    """Print whether the sources' identities distinguish the events in the log.

    Return the number of warnings, and the failures, each with its number of sources.
    """
    output = call.output
    async with opened_log(call) as log:
        since = log.now() - call.arguments.since
        with call.output.waiting("reading the log"):
            found = await identities_of(log, event_topics(rules, call.topics), since, rules.sources)
    _print_identities(output, found)
    warned = conflicts = unidentified = 0
    for name, seen in sorted(found.items()):
        conflict, absence, problem = seen.conflict(), seen.absence(), seen.problem()
        conflicts += bool(conflict)
        unidentified += seen.is_unidentified
        messages = [(conflict, True), (absence, seen.is_unidentified), (problem, False)]
        for what, is_error in messages:
            if not what:
                continue
            warned += not is_error
            severity = "error" if is_error else "warning"
            message = f"{what}; `gateway explain {name}` shows what identifies its events"
            _print(output, severity, "identity", f"sources.{name}.id", message)
    failures = []
    if conflicts:
        failures.append(f"the identities of {count(conflicts, 'source')} are the same for different events")
    if unidentified:
        failures.append(f"the `id` of {count(unidentified, 'source')} is in none of the events")
    return warned, failures


def _print_identities(output: Output, found: Mapping[str, Seen]) -> None:
    rows: list[tuple[str, ...]] = []
    for name, seen in sorted(found.items()):
        types = seen.by_type()
        for each in types:
            if output.json:
                output.line({"source": name, **asdict(each)})
        rows += [(name, each.type, *[f"{number:,}" for number in astuple(each)[1:]]) for each in types[:MAX_TYPES]]
        if rest := types[MAX_TYPES:]:
            numbers = [sum(column) for column in zip(*[astuple(each)[1:] for each in rest], strict=True)]
            rows.append((name, f"({count(len(rest), 'other type')})", *[f"{number:,}" for number in numbers]))
    if rows:
        output.table(["source", "type", *COUNTED], rows, right=COUNTED)
        output.print()
    else:
        output.print("no events were stored in that time")


COUNTED = ("events", "duplicates", "conflicts", "without identity")
MAX_TYPES = 20
"""Maximum event types listed per source; a sender can invent any number."""


CHECKED = ("file", "line", "column", "path", "code", "severity", "message")


@command(
    "schema",
    about="print the JSON Schema of routes.yaml, for editors",
    example="gateway schema > routes.schema.json",
)
def _schema(call: Invocation) -> int:
    indent = None if call.output.json else 2
    sys.stdout.write(json.dumps(json_schema(), indent=indent, ensure_ascii=False) + "\n")
    return 0
