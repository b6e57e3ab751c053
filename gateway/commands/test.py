"""`gateway test`: whether the rules do with events what their tests say."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gateway.commands.base import LOG_SETTINGS, Invocation, command, opened_log, rule_file, rule_file_argument
from gateway.commands.check import print_problems
from gateway.commands.values import Parser
from gateway.log.records import decode_event
from gateway.model import Event, UsageError
from gateway.ops.log_search import find_event
from gateway.ops.output import Output, count
from gateway.ops.rule_documents import rule_documents
from gateway.ops.rule_tests import (
    TestResult,
    check_snapshot_files,
    junit,
    read_snapshots,
    run_test,
    untested_routes,
    write_snapshots,
)
from gateway.required_topics import event_topics
from gateway.rules.load import load_rules
from gateway.rules.rule_tests import GivenEvent, RuleTest, read_tests
from gateway.rules.rules import Rules
from gateway.rules.yaml_document import Problem, reason_of

MAX_UNTESTED = 20  # routes that are named


def test_arguments(parser: Parser) -> None:
    rule_file_argument(parser)
    parser.add_argument(
        "--tests",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a file of tests; repeatable. Without it, tests/*.yaml and tests/*.yml beside the rules",
    )
    parser.add_argument("--only", metavar="TEXT", help="run only the tests whose name contains TEXT")
    parser.add_argument("--update", action="store_true", help="write the snapshots instead of comparing them")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write the results to FILE, for a CI system")


@command(
    "test",
    about="run the rule tests: which events go where, and as which requests",
    example="gateway test routes.yaml --junit results.xml",
    add_arguments=test_arguments,
    settings=LOG_SETTINGS,
)
def _test(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    path = rule_file(call)
    # Without what this machine has: a test that passes here passes elsewhere, and no message shows a secret.
    rules = load_rules(path, environ={}, resolve=False, reads_secrets=False)
    tests, is_readable = _read(call, path, rules)
    if not is_readable:
        return 2
    if any(test.event.stored for test in tests):
        tests, problems = asyncio.run(_with_stored_events(call, rules, tests))
        if problems:
            print_problems(call.output, problems)
            return 2
    results = _run(call, rules, tests)
    if arguments.update:
        results = _update(output, results)
    _print_results(output, results)
    untested = [] if arguments.only is not None else untested_routes(rules, results)
    if untested:
        named = ", ".join(untested[:MAX_UNTESTED]) + (" …" if len(untested) > MAX_UNTESTED else "")
        output.print(f"{len(untested)} of {count(len(rules.routes), 'route')} without a test: {named}")
    failures = sum(bool(result.differences) for result in results)
    verdict = (f"{failures} failed", "bold red") if failures else ("ok", "bold green")
    output.print(f"{path}: {count(len(results), 'test')}: ", verdict)
    if arguments.junit is not None:
        try:
            arguments.junit.write_bytes(junit(results))
        except OSError as error:
            raise UsageError(f"--junit: expected a file to write, {arguments.junit}, got {reason_of(error)}") from error
    return 1 if failures else 0


def _read(call: Invocation, path: Path, rules: Rules) -> tuple[list[RuleTest], bool]:
    """Return the tests that were asked for, and whether all could be read; print what is wrong."""
    arguments = call.arguments
    if arguments.update and arguments.only is not None:
        raise UsageError("--update: expected all tests, as it writes all snapshots of a file, got --only")
    folder = path.parent / "tests"
    files = arguments.tests or sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    tests, problems = read_tests([file for file, _ in rule_documents(rules.files)], files)
    print_problems(call.output, problems)
    if not problems:
        check_snapshot_files(tests)
    chosen = [test for test in tests if arguments.only is None or arguments.only in test.name]
    if not chosen and not problems:
        named = f" with {arguments.only!r} in their name" if arguments.only is not None else ""
        raise UsageError(f"{path}: expected tests{named} in the rules or in {folder}/*.yaml, got none")
    return chosen, not problems


async def _with_stored_events(
    call: Invocation, rules: Rules, tests: Sequence[RuleTest]
) -> tuple[list[RuleTest], list[Problem]]:
    """Return the tests with what the log has of their events, and what it hasn't. Raises LogUnavailableError."""
    if call.arguments.log is None and not os.environ.get("GATEWAY_LOG"):
        reason = "no such file, and no log to look for an event with this id: --log or GATEWAY_LOG names one"
        return [], [_without_event(test, reason) for test in tests if test.event.stored]
    found: dict[str, Event] = {}
    topics = event_topics(rules, call.topics)
    async with opened_log(call) as log:
        for name in sorted({test.event.stored for test in tests if test.event.stored}):
            with call.output.waiting(f"looking for {name}"):
                event = await find_event(log, topics, name)
            if event is not None:
                found[name] = decode_event(event.record)
    missing = [
        _without_event(test, "no such file, and no event with this id in the log")
        for test in tests
        if test.event.stored and test.event.stored not in found
    ]
    return [replace(test, event=_stored_event(test.event, found)) for test in tests], missing


def _stored_event(given: GivenEvent, found: Mapping[str, Event]) -> GivenEvent:
    event = found.get(given.stored)
    if event is None:
        return given
    return replace(
        given, source=given.source or event.source, headers=event.headers, query=event.query, body=event.body
    )


def _without_event(test: RuleTest, reason: str) -> Problem:
    file, line, column = test.where.rsplit(":", 2)
    name = test.event.stored
    message = f"expected a file at {test.file.parent / name}, got {reason}"
    path = f"tests.{test.name}.event.captured"
    return Problem(file=file, line=int(line), column=int(column), path=path, message=message, code="value")


def _print_results(output: Output, results: list[TestResult]) -> None:
    for result in results:
        if output.json:
            output.line({"name": result.test.name, "where": result.test.where, "differences": result.differences})
        if result.differences:
            output.print(("failed: ", "bold red"), f"{result.test.where}: {result.test.name}")
            output.block("\n".join(f"  {line}" for line in result.differences))


def _run(call: Invocation, rules: Rules, tests: list[RuleTest]) -> list[TestResult]:
    snapshots = {file: read_snapshots(file) for file in {test.file for test in tests if test.has_snapshot}}
    results: list[TestResult] = []
    with call.output.progress("tests", len(tests)) as advance:
        for test in tests:
            results.append(run_test(rules, test, snapshots.get(test.file, {}), now=time.time()))
            advance()
    return results


def _update(output: Output, results: list[TestResult]) -> list[TestResult]:
    """Write the snapshots, and return the results without differences of these."""
    for file in sorted({result.test.file for result in results}):
        of_file = [result for result in results if result.test.file == file]
        try:
            written = write_snapshots(file, of_file)
        except OSError as error:
            raise UsageError(f"{file}: expected to write its snapshots, got {reason_of(error)}") from error
        if written:
            dead = sum(result.dead_letters for result in of_file if result.snapshot is not None)
            output.note(f"{file}: {count(written, 'snapshot')} written{_dead_text(dead)}")
    return [
        replace(result, differences=tuple([each for each in result.differences if not each.startswith("snapshot")]))
        for result in results
    ]


def _dead_text(number: int) -> str:
    """Say how many requests of snapshots can't be made: nobody may have meant that."""
    if not number:
        return ""
    return f"; {count(number, 'request', 'is')} {'a dead letter' if number == 1 else 'dead letters'}"
