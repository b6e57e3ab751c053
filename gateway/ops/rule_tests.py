"""`gateway test`: whether the rules do with events what their tests say, by the code that delivers them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl
from xml.etree.ElementTree import Element, SubElement, tostring

import orjson

from gateway.client.request import USER_AGENT, Outbound
from gateway.model import DeadReason, RefusedError, UsageError
from gateway.ops.explain import Explained, ExplainedRoute, Planned, explain
from gateway.ops.output import body_text, header_text
from gateway.rules.rule_tests import ExpectedRequest, RuleTest
from gateway.rules.rules import Rules
from gateway.text import did_you_mean

MAX_SHOWN = 200  # characters of a value in a difference
_FORM = "application/x-www-form-urlencoded"
CHANGING_HEADERS = ("gateway-delivery-id", "gateway-event-id", "webhook-id", "webhook-signature", "webhook-timestamp")
"""Headers that a snapshot doesn't have, beside our own user agent: they are of one event, or one moment."""

Snapshots = dict[str, object]
"""Of one file: the name of a test → all that happens with its event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestResult:
    """What came of a test: the differences, none if it passed; the routes that matched; a snapshot, if it takes one."""

    test: RuleTest
    differences: tuple[str, ...]
    matched: tuple[str, ...]
    snapshot: object = None


def run_test(rules: Rules, test: RuleTest, snapshots: Snapshots, *, now: float) -> TestResult:
    """Return what the rules do with a test's event, against what it expects. `now` is in Unix seconds."""
    event = test.event
    try:
        explained = explain(
            rules,
            source=event.source,
            headers=event.headers,
            query=event.query,
            body=event.body,
            now=now,
            is_secret_shown=True,
        )
    except UsageError:
        near = did_you_mean(event.source, rules.sources)
        return TestResult(test=test, differences=(f"event.source: unknown source {event.source!r}{near}",), matched=())
    except RefusedError as error:
        refused = f"event: the ingress would answer {error.status} ({error.reason}): {error.detail}"
        return TestResult(test=test, differences=(refused,), matched=())
    found = [*_of_routes(test.routes, explained, rules)]
    for number, expected in enumerate(test.requests):
        found += _of_request(f"requests[{number}]", expected, explained, rules)
    snapshot = None
    if test.has_snapshot:
        snapshot = _snapshot(explained)
        if test.name not in snapshots:
            found.append("snapshot: expected one, got none: `gateway test --update` writes it")
        else:
            found += differences("snapshot", snapshots[test.name], snapshot)
    matched = tuple([route.name for route in explained.routes if route.is_matched])
    return TestResult(test=test, differences=tuple(found), matched=matched, snapshot=snapshot)


def untested_routes(rules: Rules, results: Sequence[TestResult]) -> list[str]:
    """Return the routes that no test's event matches, in file order."""
    matched = {name for result in results for name in result.matched}
    return [name for name in rules.routes if name not in matched]


def snapshot_file(path: Path) -> Path:
    """Return where the snapshots of a file's tests are."""
    return path.with_name(f"{path.stem}.snapshots.json")


def read_snapshots(path: Path) -> Snapshots:
    """Return the snapshots beside a file of tests, if there are any. Raises UsageError."""
    file = snapshot_file(path)
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: expected what `gateway test --update` has written, got: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file}: expected what `gateway test --update` has written, got something else")
    return found


def write_snapshots(path: Path, results: Sequence[TestResult]) -> int:
    """Write the snapshots of a file's tests, and return their number; without any, none is left."""
    taken = {result.test.name: result.snapshot for result in results if result.snapshot is not None}
    file = snapshot_file(path)
    if taken:
        file.write_text(json.dumps(taken, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    else:
        file.unlink(missing_ok=True)
    return len(taken)


def junit(results: Sequence[TestResult]) -> bytes:
    """Return the results in the form that CI systems read (https://github.com/testmoapp/junitxml)."""
    failures = sum(bool(result.differences) for result in results)
    counted = {"tests": str(len(results)), "failures": str(failures)}
    suites = Element("testsuites", {"name": "gateway test", **counted})
    suite = SubElement(suites, "testsuite", {"name": "rules", **counted})
    for result in results:
        file, line, _ = result.test.where.rsplit(":", 2)
        case = SubElement(suite, "testcase", name=result.test.name, classname=file, file=file, line=line)
        if result.differences:
            failure = SubElement(case, "failure", message=_xml(result.differences[0]))
            failure.text = _xml("\n".join(result.differences))
    content: bytes = tostring(suites, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _xml(text: str) -> str:
    """Replace what XML 1.0 can't have."""
    return "".join([each if each in "\t\n" or each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text])


def _of_routes(expected: Sequence[str] | None, explained: Explained, rules: Rules) -> Iterator[str]:
    if expected is None:
        return
    reasons = {route.name: route for route in explained.routes}
    for name in expected:
        if name not in reasons:
            yield f"routes: unknown route {name!r}{did_you_mean(name, rules.routes)}"
        elif not reasons[name].is_matched:
            yield f"routes: expected {name} to match, got: {reasons[name].reason}"
    for route in explained.routes:
        if route.is_matched and route.name not in expected:
            yield f"routes: expected no match of {route.name}, got: {route.reason}"


def _of_request(where: str, expected: ExpectedRequest, explained: Explained, rules: Rules) -> Iterator[str]:
    route = next((each for each in explained.routes if each.name == expected.route), None)
    if route is None:
        yield f"{where}.route: unknown route {expected.route!r}{did_you_mean(expected.route, rules.routes)}"
        return
    destinations = rules.routes[route.name].destinations
    chosen = list(dict.fromkeys([each.destination for each in route.requests])) or [*destinations]
    if expected.to is None and len(chosen) > 1:
        yield f"{where}: expected `to`, one of {', '.join(chosen)}, got none"
        return
    to = expected.to or next(iter(chosen), "")
    if expected.to is not None and to not in destinations:
        yield f"{where}.to: expected a destination of {route.name} ({', '.join(destinations)}), got {to!r}"
        return
    if not route.is_matched:
        yield f"{where}: expected a request of {route.name}, got none: {route.reason}"
        return
    its = [each for each in route.requests if each.destination == to]
    planned = next((each for each in its if each.part is None or each.part == expected.item), None)
    if its and planned is None:
        yield f"{where}.item: expected item {expected.item}, got {len(its)} of them"
        return
    if planned is None and route.requests:
        ends = [each.problem for each in route.requests if not each.destination]
        yield f"{where}.to: expected {to}, got {', '.join(ends or chosen)}"
        return
    yield from _of_planned(where, expected, planned, route)


def _of_planned(where: str, expected: ExpectedRequest, planned: Planned | None, route: ExplainedRoute) -> Iterator[str]:
    problem = route.reason if planned is None else planned.problem
    request = None if planned is None else planned.request
    error = expected.fields.get("error")
    if error is not None:
        got = problem if request is None else "a request"
        if request is not None or error not in problem:
            yield f"{where}.error: expected {_shown(error)}, got {_shown(got)}"
    elif request is None:
        reason = DeadReason.EXPRESSION_ERROR if planned is None else planned.reason
        yield f"{where}: expected a request, got a dead letter ({reason}): {problem}"
    else:
        yield from request_differences(where, expected, request)


def request_differences(where: str, expected: ExpectedRequest, request: Outbound) -> Iterator[str]:
    """Yield how a request differs from what is expected of it, each difference with its place below `where`."""
    for key, value in expected.fields.items():
        match key:
            case "method" | "url":
                yield from differences(f"{where}.{key}", value, request.method if key == "method" else request.address)
            case "headers":
                yield from _of_headers(f"{where}.headers", value, request)
            case "body":
                yield from differences(f"{where}.body", value, body_of(request, value))
            case "body_has":
                yield from differences(f"{where}.body_has", value, body_of(request, value), is_part=True)
            case _:
                pass


def _of_headers(where: str, expected: Mapping[str, str | None], request: Outbound) -> Iterator[str]:
    sent = {name.lower().decode("latin-1"): header_text(value) for name, value in request.headers}
    for name, value in expected.items():
        found = sent.get(name.lower())
        if value is None and found is not None:
            yield f"{where}.{name}: expected none, got {_shown(found)}"
        elif value is not None and found is None:
            yield f"{where}.{name}: expected {_shown(value)}, got none"
        elif value != found:
            yield f"{where}.{name}: expected {_shown(value)}, got {_shown(found)}"


def body_of(request: Outbound, expected: object = None) -> object:
    """Return a body to compare: as text where text is expected, else a form's fields or JSON, if it is one of these."""
    if isinstance(expected, str):
        return body_text(request.body)
    types = [value.decode("latin-1") for name, value in request.headers if name.lower() == b"content-type"]
    if types and types[0].partition(";")[0].strip().lower() == _FORM:
        fields: dict[str, object] = {}
        for name, value in parse_qsl(request.body.decode("utf-8", "replace"), keep_blank_values=True):
            before = fields.get(name)
            fields[name] = value if before is None else [*(before if isinstance(before, list) else [before]), value]
        return fields
    try:
        return orjson.loads(request.body)
    except orjson.JSONDecodeError:
        return body_text(request.body)


def _snapshot(explained: Explained) -> object:
    """Return all that happens with an event, without what changes by itself."""
    requests = []
    for route in explained.routes:
        for planned in route.requests:
            sent: dict[str, object] = {"route": route.name, "to": planned.destination}
            sent |= {} if planned.part is None else {"item": planned.part}
            request = planned.request
            if request is None:
                requests.append(sent | {"error": planned.problem})
                continue
            sent_headers = [pair for pair in request.headers if pair != USER_AGENT]
            headers = [(header_text(name), header_text(value)) for name, value in sent_headers]
            requests.append(
                sent
                | {
                    "method": str(request.method),
                    "url": request.address,
                    "headers": [f"{name}: {value}" for name, value in headers if name.lower() not in CHANGING_HEADERS],
                    "body": body_of(request),
                }
            )
    return {"routes": [route.name for route in explained.routes if route.is_matched], "requests": requests}


def differences(
    where: str, expected: object, got: object, *, is_part: bool = False, words: tuple[str, str] = ("expected", "got")
) -> Iterator[str]:
    """Yield where two JSON values differ; with `is_part`, mappings of the second may have more fields."""
    first, second = words
    if isinstance(expected, dict) and isinstance(got, dict):
        for key, value in expected.items():
            if key in got:
                yield from differences(f"{where}.{key}", value, got[key], is_part=is_part, words=words)
            else:
                yield f"{where}.{key}: {first} {_shown(value)}, {second} none"
        for key in () if is_part else got.keys() - expected.keys():
            yield f"{where}.{key}: {first} none, {second} {_shown(got[key])}"
    elif isinstance(expected, list) and isinstance(got, list):
        for index, (value, found) in enumerate(zip(expected, got, strict=False)):
            yield from differences(f"{where}[{index}]", value, found, is_part=is_part, words=words)
        for index in range(len(got), len(expected)):
            yield f"{where}[{index}]: {first} {_shown(expected[index])}, {second} none"
        for index in range(len(expected), len(got)):
            yield f"{where}[{index}]: {first} none, {second} {_shown(got[index])}"
    elif not _is_equal(expected, got):
        yield f"{where}: {first} {_shown(expected)}, {second} {_shown(got)}"


def _is_equal(expected: object, got: object) -> bool:
    """Compare as JSON does: 1 equals 1.0, and true isn't 1."""
    return isinstance(expected, bool) is isinstance(got, bool) and expected == got


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
