"""`gateway test`: whether the rules do with events what their tests say."""

import time
from dataclasses import replace
from pathlib import Path

from gateway.commands.base import Invocation, command, rule_file, rule_file_argument
from gateway.commands.check import print_problems
from gateway.commands.values import Parser
from gateway.model import UsageError
from gateway.ops.output import Output, count
from gateway.ops.rule_tests import (
    TestResult,
    check_snapshot_files,
    junit,
    read_snapshots,
    run_test,
    untested_routes,
    write_snapshots,
)
from gateway.rules.load import load_rules
from gateway.rules.rule_tests import RuleTest, read_tests
from gateway.rules.rules import Rules
from gateway.rules.yaml_document import reason_of

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
    parser.add_argument("--only", metavar="TEXT", help="only the tests with this in their name")
    parser.add_argument("--update", action="store_true", help="write the snapshots instead of comparing them")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write the results there, for a CI system")


@command(
    "test",
    about="try the tests of the rules: which events go where, and as which requests",
    example="gateway test routes.yaml --junit results.xml",
    add_arguments=test_arguments,
)
def _test(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    path = rule_file(call)
    # Without what this machine has: a test that passes here passes elsewhere, and no message shows a secret.
    rules = load_rules(path, environ={}, resolve=False, reads_secrets=False)
    tests, is_readable = _read(call, path, rules)
    if not is_readable:
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
    tests, problems = read_tests([file for file in rules.files if file.suffix in (".yaml", ".yml")], files)
    print_problems(call.output, problems)
    if not problems:
        check_snapshot_files(tests)
    chosen = [test for test in tests if arguments.only is None or arguments.only in test.name]
    if not chosen and not problems:
        named = f" with {arguments.only!r} in their name" if arguments.only is not None else ""
        raise UsageError(f"{path}: expected tests{named} in the rules or in {folder}/*.yaml, got none")
    return chosen, not problems


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
