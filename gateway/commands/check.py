"""`gateway check` and `schema`: problems in the rules, and what is allowed."""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, replace

from gateway.commands.base import LOG_SETTINGS, Invocation, command, opened_log, rule_file, rule_file_argument
from gateway.commands.values import Parser, duration
from gateway.model import Event
from gateway.ops.certificates import certificate_problems, undemanded_certificates
from gateway.ops.check_reports import FORMATS, without_allowed
from gateway.ops.identities import Seen, identities_of
from gateway.ops.output import Output, count
from gateway.ops.refused_addresses import refused_addresses
from gateway.ops.unseen_fields import UnseenFields, located
from gateway.required_topics import event_topics, specs_of
from gateway.rules.load import check_rules
from gateway.rules.rules import Rules
from gateway.rules.schema import json_schema
from gateway.rules.yaml_document import Code, Problem, Severity


def check_arguments(parser: Parser) -> None:
    rule_file_argument(parser)
    about = (
        "also check that these rules give distinct identities to the events stored in the last DURATION (such as 1h)"
    )
    parser.add_argument("--since", type=duration, metavar="DURATION", help=about)
    parser.add_argument(
        "--strict", action="store_true", help="run more checks, and fail on warnings, too, unless a comment allows them"
    )
    parser.add_argument(
        "--format",
        choices=("text", *FORMATS),
        default="text",
        help="output format; github and sarif are for CI systems (default: text)",
    )


@command(
    "check",
    about="report every problem of the rules, with its location",
    example="gateway check routes.yaml",
    add_arguments=check_arguments,
    settings=(*LOG_SETTINGS, "tls_certificate", "tls_key"),
)
async def _check(call: Invocation) -> int:
    path, output = rule_file(call), call.output
    rules, found = check_rules(path, resolve=False, lints=call.arguments.strict)
    problems = [replace(each, severity="error") if each.code == "expired" else each for each in found]
    problems += await asyncio.to_thread(_certificates, call, rules)
    problems += [] if rules is None else _refused_addresses(rules)
    seen: Mapping[str, Seen] = {}
    unseen = None if rules is None else UnseenFields(rules)
    if unseen is not None and call.arguments.since is not None and not _errors(problems):
        seen = await _identities(call, unseen.rules, unseen.add if call.arguments.strict else lambda _: None)
    if unseen is not None and call.arguments.strict:
        problems += await asyncio.to_thread(_of_unseen, unseen)
    problems, allowed = without_allowed(problems)
    identities = [*_of_identities(seen)]
    shown = [*problems, *identities]
    if call.arguments.format == "text":
        print_problems(output, problems)
        if seen:
            _print_identities(output, seen)
            print_problems(output, identities)
    else:
        sys.stdout.write(FORMATS[call.arguments.format]([*shown, *_unchecked(call, rules, shown)]))
        output = Output(json=True)  # which leaves out what people read
    if errors := len(_errors(problems)):
        output.print((f"{path}: {count(errors, 'error')}", "bold red"))
        return 2
    return _conclude(call, output, rules, seen, (shown, allowed))


_UNCHECKED = "what depends on unresolved references wasn't checked"


def _unchecked(call: Invocation, rules: Rules | None, problems: Sequence[Problem]) -> Sequence[Problem]:
    """Return that not all could be checked, though nothing is wrong: for a CI system, which gets no conclusion."""
    if rules is not None or _errors(problems):
        return ()
    return [replace(_elsewhere("unresolved", "", _UNCHECKED, "warning"), file=str(rule_file(call)))]


def _conclude(
    call: Invocation,
    output: Output,
    rules: Rules | None,
    seen: Mapping[str, Seen],
    found: tuple[Sequence[Problem], int],
) -> int:
    """Print what it amounts to without an error in the rules, and return the exit code."""
    path = rule_file(call)
    problems, allowed = found
    warnings = sum(problem.severity == "warning" for problem in problems)
    more = f", with {count(warnings, 'warning')}" if warnings else ""
    more += f", {count(allowed, 'warning')} allowed" if allowed else ""
    if rules is None:
        output.print(f"{path}: no error{more}; {_UNCHECKED}")
        return 1 if warnings and call.arguments.strict else 0
    specs_of(rules, call.topics)  # raises if a source uses one of the gateway's own topics
    sizes = {"source": rules.sources, "destination": rules.destinations, "route": rules.routes}
    counted = ", ".join(count(len(found), what) for what, found in sizes.items())
    if _errors(problems):
        output.print((f"{path}: {counted}: {_what_failed(seen)}", "bold red"), more)
    elif warnings and call.arguments.strict:
        output.print(f"{path}: {counted}: ", (f"{count(warnings, 'warning')}, which --strict refuses", "bold red"))
    else:
        output.print(f"{path}: {counted}: ", ("ok", "bold green"), more)
        return 0
    return 1


def _what_failed(seen: Mapping[str, Seen]) -> str:
    failures = []
    if conflicts := sum(bool(each.conflict()) for each in seen.values()):
        failures.append(f"the identities of {count(conflicts, 'source')} are the same for different events")
    if unidentified := sum(each.is_unidentified for each in seen.values()):
        failures.append(f"the `id` of {count(unidentified, 'source')} is in none of the events")
    return " and ".join(failures)


def _errors(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.severity == "error"]


def print_problems(output: Output, problems: Sequence[Problem]) -> None:
    """Print what is wrong, one a line; of what isn't in a file, JSON has no place."""
    for problem in problems:
        if output.json:
            fields = asdict(problem)
            place = dict.fromkeys(CHECKED) if not problem.file else {}
            output.line({key: fields[key] or place.get(key, fields[key]) for key in CHECKED})
        style = "bold red" if problem.severity == "error" else "yellow"
        is_allowable = problem.severity == "warning" and problem.line
        code = f" [{problem.code}]" if is_allowable else ""
        output.print((f"{problem.severity}: ", style), f"{problem}{code}")


def _elsewhere(code: Code, where: str, message: str, severity: Severity = "warning") -> Problem:
    """Return a problem that isn't of the rule files alone."""
    return Problem(file="", line=0, column=0, path=where, message=message, code=code, severity=severity)


def _certificates(call: Invocation, rules: Rules | None) -> list[Problem]:
    """Return what is wrong with the ingress's certificates. Reads files."""
    certificates = call.settings.connections.certificates
    refused, soon = certificate_problems(certificates, time.time())
    if rules is not None:
        soon = [*soon, *undemanded_certificates(rules, has_tls=bool(certificates))]
    located: list[tuple[Severity, str]] = [("error", each) for each in refused]
    located += [("warning", each) for each in soon]
    found: list[Problem] = []
    for severity, text in located:
        where, _, message = text.partition(": ")
        found.append(_elsewhere("certificate", where, message, severity))
    return found


def _refused_addresses(rules: Rules) -> list[Problem]:
    """Return which destinations have a literal address that no delivery may reach."""
    expected = "expected an address that deliveries may reach"
    return [
        _elsewhere(
            "egress", f"destinations.{name}.url", f"{expected}; {reason}, so no request is made (egress_refused)"
        )
        for name, reason in refused_addresses(rules)
    ]


async def _identities(call: Invocation, rules: Rules, also: Callable[[Event], None]) -> Mapping[str, Seen]:
    """Return what identifies the events in the log, by source; `also` is called with each of them."""
    async with opened_log(call) as log:
        since = log.now() - call.arguments.since
        with call.output.waiting("reading the log"):
            return await identities_of(log, event_topics(rules, call.topics), since, rules.sources, also=also)


def _of_identities(seen: Mapping[str, Seen]) -> Iterator[Problem]:
    for name, each in sorted(seen.items()):
        messages: list[tuple[str, Severity]] = [
            (each.conflict(), "error"),
            (each.absence(), "error" if each.is_unidentified else "warning"),
            (each.problem(), "warning"),
        ]
        for what, severity in messages:
            if what:
                message = f"{what}; `gateway explain {name}` shows what identifies its events"
                yield _elsewhere("identity", f"sources.{name}.id", message, severity)


def _of_unseen(unseen: UnseenFields) -> list[Problem]:
    """Return the fields that no event had, as warnings. Reads files."""
    told = [
        (each, f"expected {each.path} in an event, got {each.lacking} events that fit otherwise, all without it")
        for each in unseen.found()
    ]
    return sorted(located(unseen.rules, told))


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
