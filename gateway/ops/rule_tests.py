"""`gateway test`: whether the rules do with events what their tests say, by the code that delivers them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl
from xml.etree.ElementTree import Element, SubElement, tostring

import orjson

from gateway.client.request import USER_AGENT, Outbound
from gateway.model import Headers, RefusedError, UsageError
from gateway.ops.explain import BatchError, Explained, ExplainedRoute, Extent, Planned, explain
from gateway.ops.output import body_text, header_text
from gateway.rules.rule_tests import ExpectedRequest, GivenEvent, RuleTest
from gateway.rules.rules import SIGNATURE_HEADER_PREFIX, Rules
from gateway.text import MASK, did_you_mean

MAX_SHOWN = 200  # characters of a value in a difference
SHOWN_BEFORE = 40  # characters before the first one that differs, of those
_FORM = "application/x-www-form-urlencoded"
CHANGING_HEADERS = ("gateway-delivery-id", "gateway-event-id")
"""Headers that a snapshot doesn't have, beside our own user agent: they are of one event."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NO_ITEMS = "its list has no items"
"""Why a route that splits its events takes one and makes no request."""

Snapshots = dict[str, object]
"""Of one file: the name of a test → all that happens with its event."""
NONE = object()
"""Stands for a field or an item that one of two values hasn't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestResult:
    """What came of a test: the differences, none if it passed; the routes that matched; a snapshot, if it takes one.

    `dead_letters` counts the requests of the event that can't be made.
    """

    test: RuleTest
    differences: tuple[str, ...]
    matched: tuple[str, ...]
    snapshot: object = None
    dead_letters: int = 0


def run_test(
    rules: Rules, test: RuleTest, snapshots: Snapshots, *, now: float, extent: Extent | None = None
) -> TestResult:
    """Return what the rules do with a test's event, against what it expects. `now` is in Unix seconds.

    With an `extent`, no more is made than that, and expected requests beyond it are missed.
    """
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
            identity=stable_identity(event),
            is_event=event.is_captured,
            extent=extent,
        )
    except BatchError as error:
        return TestResult(test=test, differences=(f"event: {error}",), matched=())
    except UsageError:
        near = did_you_mean(event.source, rules.sources)
        return TestResult(test=test, differences=(f"event.source: unknown source {event.source!r}{near}",), matched=())
    except RefusedError as error:
        return TestResult(test=test, differences=(f"event: {refusal(error)}",), matched=())
    found = [*_of_routes(test, explained, rules)]
    for number, expected in enumerate(test.requests):
        found += _of_request(f"requests[{number}]", expected, explained, rules)
    snapshot = None
    if test.has_snapshot:
        snapshot = _snapshot(explained, rules)
        if test.name not in snapshots:
            found.append("snapshot: expected one, got none: `gateway test --update` writes it")
        else:
            found += differences("snapshot", snapshots[test.name], snapshot)
    matched = tuple([route.name for route in explained.routes if route.is_matched])
    dead = sum(planned.request is None for route in explained.routes for planned in route.requests)
    return TestResult(test=test, differences=tuple(found), matched=matched, snapshot=snapshot, dead_letters=dead)


def refusal(error: RefusedError) -> str:
    """Return what the sender of an event that the ingress refuses would get."""
    return f"the ingress would answer {error.status} ({error.reason}): {error.detail}"


def stable_identity(event: GivenEvent) -> str:
    """Return an identity for an event that has none, so that each run of a test has the same id."""
    digest = blake2b(digest_size=16)
    query = event.query.encode("utf-8", "surrogatepass")
    for part in (query, event.body, *[part for pair in event.headers for part in pair]):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


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
        raise UsageError(f"{file}: expected what `gateway test --update` has written")
    return found


def write_snapshots(path: Path, results: Sequence[TestResult]) -> int:
    """Write the snapshots of a file's tests, and return their number; without any, none is left.

    A test that took none, since its event is refused, keeps the one that there is. Raises UsageError and OSError.
    """
    taken = {result.test.name: result.snapshot for result in results if result.snapshot is not None}
    missed = [result.test.name for result in results if result.test.has_snapshot and result.snapshot is None]
    before = read_snapshots(path) if missed else {}
    content = taken | {name: before[name] for name in missed if name in before}
    file = snapshot_file(path)
    if content:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    else:
        file.unlink(missing_ok=True)
    return len(taken)


def check_snapshot_files(tests: Iterable[RuleTest]) -> None:
    """Raise UsageError if several files of tests, one of them with snapshots, would have these in the same file."""
    files: dict[Path, dict[Path, bool]] = {}
    for test in tests:
        of_file = files.setdefault(snapshot_file(test.file), {})
        of_file[test.file] = of_file.get(test.file, False) or test.has_snapshot
    for file, found in files.items():
        if len(found) > 1 and any(found.values()):
            names = " and ".join(map(str, sorted(found)))
            raise UsageError(f"{names}: expected names that differ before the dot, got one file of snapshots: {file}")


def junit(results: Sequence[TestResult]) -> bytes:
    """Return the results in the form that CI systems read (https://github.com/testmoapp/junitxml)."""
    failures = sum(bool(result.differences) for result in results)
    counted = {"tests": str(len(results)), "failures": str(failures)}
    suites = Element("testsuites", {"name": "gateway test", **counted})
    suite = SubElement(suites, "testsuite", {"name": "rules", **counted})
    for result in results:
        place, line, _ = result.test.where.rsplit(":", 2)
        file = _xml(place)
        case = SubElement(suite, "testcase", name=_xml(result.test.name), classname=file, file=file, line=line)
        if result.differences:
            failure = SubElement(case, "failure", message=_xml(result.differences[0]))
            failure.text = _xml("\n".join(result.differences))
    content: bytes = tostring(suites, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _xml(text: str) -> str:
    """Replace what XML 1.0 can't have (https://www.w3.org/TR/xml/#charsets)."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _of_routes(test: RuleTest, explained: Explained, rules: Rules) -> Iterator[str]:
    if test.routes is None:
        return
    reasons = {route.name: route for route in explained.routes}
    for name in test.routes:
        if name not in reasons:
            yield f"routes: unknown route {name!r}{did_you_mean(name, rules.routes)}"
        elif not reasons[name].is_matched:
            yield f"routes: expected {name} to match, got: {reasons[name].reason}"
        else:
            yield from _of_dead_letters(reasons[name], test.requests, rules)
    for route in explained.routes:
        if route.is_matched and route.name not in test.routes:
            yield f"routes: expected no match of {route.name}, got: {route.reason}"


def _of_dead_letters(route: ExplainedRoute, expected: Sequence[ExpectedRequest], rules: Rules) -> Iterator[str]:
    """Yield which requests of a route can't be made although nothing in `requests` is about them."""
    told: set[tuple[str, str]] = set()
    for planned in route.requests:
        which = planned.destination, planned.problem
        if planned.request is not None or which in told or any(_is_about(each, route, planned) for each in expected):
            continue
        told.add(which)
        is_one_of_several = planned.destination and len(rules.routes[route.name].destinations) > 1
        to = f", to: {planned.destination}" if is_one_of_several else ""
        yield (
            f"routes: expected {route.name} to make a request, got {_end(route, planned)}: {planned.problem} "
            f"(`requests: [{{route: {route.name}{to}, error: …}}]` expects it)"
        )


def _is_about(expected: ExpectedRequest, route: ExplainedRoute, planned: Planned) -> bool:
    """Return whether a test expects something of a request: of another item, too, if that fails as this one does."""
    error = expected.fields.get("error")
    is_alike = planned.part in (None, expected.item) or (error is not None and error in planned.problem)
    return expected.route == route.name and expected.to in (None, planned.destination) and is_alike


def _end(route: ExplainedRoute, planned: Planned) -> str:
    return f"{'a halted key' if route.halts else 'a dead letter'} ({planned.reason})"


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
    error = expected.fields.get("error")
    if planned is None:
        yield f"{where}: expected {'a request' if error is None else 'an error'}, got none: {NO_ITEMS}"
    elif error is not None:
        if planned.request is not None or error not in planned.problem:
            got = planned.problem if planned.request is None else "a request"
            yield f"{where}.error: expected {_shown(error)}, got {_shown(got)}"
    elif planned.request is None:
        yield f"{where}: expected a request, got {_end(route, planned)}: {planned.problem}"
    else:
        yield from request_differences(where, expected, planned.request)


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
            wanted, got = _shown_pair(_text(value), _text(found))
            yield f"{where}.{name}: expected {wanted}, got {got}"


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


def lasting_headers(headers: Headers, *, is_signed: bool) -> list[tuple[str, str]]:
    """Return the headers of a request without those of one event; those of our own signature have masked values."""
    pairs = [(header_text(name), header_text(value)) for name, value in headers]
    return [
        (name, MASK if is_signed and name.lower().startswith(SIGNATURE_HEADER_PREFIX) else value)
        for name, value in pairs
        if name.lower() not in CHANGING_HEADERS
    ]


def _snapshot(explained: Explained, rules: Rules) -> object:
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
            others = tuple([pair for pair in request.headers if pair != USER_AGENT])
            headers = lasting_headers(others, is_signed=bool(rules.destinations[planned.destination].sign))
            requests.append(
                sent
                | {
                    "method": str(request.method),
                    "url": request.address,
                    "headers": [f"{name}: {value}" for name, value in headers],
                    "body": body_of(request),
                }
            )
    waits = {route.name: route.wait for route in explained.routes if route.wait}
    routes = [route.name for route in explained.routes if route.is_matched]
    return {"routes": routes, **({"waits": waits} if waits else {}), "requests": requests}


class Difference(NamedTuple):
    """Two JSON values that differ; NONE for one that isn't there. `steps` lead to them from the root."""

    steps: tuple[str | int, ...]
    one: object
    other: object

    def text(self, where: str, words: tuple[str, str], seen: Callable[[str], str] = str) -> str:
        """Return where they are, below `where`, and what they are; `words` are what the two are called.

        `seen` returns a text as people may see it; it gets whole texts, as it may not recognise the piece of one.
        """
        place = "".join([f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.steps])
        one, other = [_text(each) if each is NONE else seen(_text(each)) for each in (self.one, self.other)]
        shown = _shown_pair(one, other)
        return f"{where}{seen(place)}: {words[0]} {shown[0]}, {words[1]} {shown[1]}"


def differences(where: str, expected: object, got: object, *, is_part: bool = False) -> Iterator[str]:
    """Yield the texts of where two JSON values differ; with `is_part`, mappings of the second may have more fields."""
    for found in differing(expected, got, is_part=is_part):
        yield found.text(where, ("expected", "got"))


def differing(expected: object, got: object, *, is_part: bool = False) -> Iterator[Difference]:
    """Yield where two JSON values differ, however deeply; `is_part` is as in `differences`."""
    left: list[Difference] = [Difference((), expected, got)]
    while left:  # no recursion: an event may be nested more deeply than Python's calls
        steps, one, other = found = left.pop()
        if isinstance(one, dict) and isinstance(other, dict):
            keys = one if is_part else dict.fromkeys([*one, *other])
            left += reversed([Difference((*steps, str(key)), one.get(key, NONE), other.get(key, NONE)) for key in keys])
        elif isinstance(one, list) and isinstance(other, list):
            pairs = enumerate(zip_longest(one, other, fillvalue=NONE))
            left += reversed([Difference((*steps, index), *pair) for index, pair in pairs])
        elif not _is_equal(one, other):
            yield found


def _is_equal(expected: object, got: object) -> bool:
    """Compare as JSON does: 1 equals 1.0, and true isn't 1."""
    return isinstance(expected, bool) is isinstance(got, bool) and expected == got


def _shown_pair(one: str, other: str) -> tuple[str, str]:
    """Return two texts that differ, each from shortly before there if it is long."""
    texts = one, other
    same = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = 0 if same < MAX_SHOWN - SHOWN_BEFORE else same - SHOWN_BEFORE
    return _cut(texts[0], start), _cut(texts[1], start)


def _shown(value: object) -> str:
    return _cut(_text(value), 0)


def _text(value: object) -> str:
    if value is NONE:
        return "none"
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a list that is nested too deeply" if isinstance(value, list) else "a mapping that is nested too deeply"


def _cut(text: str, start: int) -> str:
    end = start + MAX_SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if len(text) > end else ''}"
