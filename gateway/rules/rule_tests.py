"""Parses tests of rules: an event, and what the rules should do with it.

They are under `tests:` in the rule files, or in separate files. References such as `${NAME}` are left as they are.
`gateway/ops/rule_tests.py` runs them.
"""

import json
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from gateway.model import EVENT_ID, Headers
from gateway.rules.schema_reader import ABSENT, ParsedMapping, SchemaReader
from gateway.rules.value_kinds import TEXT, Key, MappingKind, Scalar, Several, Table, Tree, matching
from gateway.rules.yaml_document import Node, Problem, is_of_tests, read_document, reason_of
from gateway.verify.tokens import TOKEN


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenEvent:
    """A request to a source, whose signature isn't verified.

    With `is_captured`, it is an event that the ingress has already built; if the source has a `split`, it is a single
    event. `stored` is the id of an event in the log. Then nothing else is known here, except perhaps another source.
    """

    source: str
    headers: Headers
    query: str
    body: bytes
    is_captured: bool = False
    stored: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedRequest:
    """The expectations of one request. What isn't in `fields` isn't checked.

    `to` may be None if the route has one destination. `item` is the item's index if the route has a `split`. `fields`
    are `method`, `url`, `headers` (None: not there), `body`, `body_has` (a part of it) and `error` (a part of the
    reason why there is no request).
    """

    route: str
    to: str | None
    fields: Mapping[str, Any]
    item: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleTest:
    """A test. `routes` are all routes that should match; None to check none. `where` is its file and line."""

    name: str
    where: str
    file: Path
    event: GivenEvent
    routes: tuple[str, ...] | None
    requests: tuple[ExpectedRequest, ...]
    has_snapshot: bool


def _raw(expected: str, shape: type | tuple[type, ...] = object) -> Tree:
    return Tree(expected, shape, lambda value: value, {}, is_raw=True)


def _true(value: object) -> bool:
    if value is not True:
        raise ValueError
    return True


_STRING = Tree("a string", str, str, {"type": "string"}, is_raw=True)
_HEADER_NAME = Scalar("a header's name", matching(TOKEN), {"type": "string"})
_EVENT = MappingKind(
    name="test_event",
    about="A request to a source; its signature isn't checked.",
    keys=(
        Key(name="source", kind=TEXT, about="The source to which it is sent."),
        Key(
            name="headers",
            kind=Table("a mapping of headers", _HEADER_NAME, _STRING),
            about="Its headers; without Content-Type, a body that isn't a string has application/json.",
        ),
        Key(name="query", kind=_STRING, about="Its query: a=1&b=2."),
        Key(name="body", kind=_raw("any value"), about="Its body: a string as it is, anything else as JSON."),
        Key(name="file", kind=TEXT, about="A file with its body, relative to this one."),
        Key(
            name="captured",
            kind=TEXT,
            about="A file with what `gateway events show --json` has printed of one, or the id of one in the log.",
        ),
    ),
)
_ITEM = Tree("a number from 0", int, int, {"type": "integer", "minimum": 0})
_EXPECTED_REQUEST = MappingKind(
    name="test_request",
    about="A request that is expected; what isn't written may be anything.",
    keys=(
        Key(name="route", kind=TEXT, about="The route.", is_required=True),
        Key(name="to", kind=TEXT, about="The destination; may be left out if the route has one."),
        Key(name="item", kind=_ITEM, about="The item, from 0, of a route with `split`; the first by default."),
        Key(name="method", kind=TEXT, about="The method."),
        Key(name="url", kind=_STRING, about="The URL. A reference that has no default stays as it is written."),
        Key(
            name="headers",
            kind=Table("a mapping of headers", _HEADER_NAME, _raw("a string or null", (str, type(None)))),
            about="Headers that it has, or doesn't have (null); there may be others.",
        ),
        Key(name="body", kind=_raw("any value"), about="The body: JSON, a form's fields, or a string."),
        Key(name="body_has", kind=_raw("any value"), about="What the body has, perhaps among other fields."),
        Key(name="error", kind=_STRING, about="A part of why it can't be made, for a dead letter `expression_error`."),
    ),
)
_EXPECTATION = MappingKind(
    name="test_expectation",
    about="What the rules should do with it.",
    keys=(
        Key(
            name="routes",
            kind=Several("a list of routes", TEXT, may_be_one=True, may_be_empty=True),
            about="Exactly the routes that match; [] for none.",
        ),
        Key(name="requests", kind=Several("a list of requests", _EXPECTED_REQUEST), about="Requests that are made."),
        Key(
            name="snapshot",
            kind=Scalar("true", _true, {"const": True}),
            about="Compare all of it with what `gateway test --update` has written.",
        ),
    ),
)
_TEST = MappingKind(
    name="test",
    about="An event, and what the rules should do with it.",
    keys=(
        Key(name="name", kind=TEXT, about="What it shows.", is_required=True),
        Key(name="event", kind=_EVENT, about=_EVENT.about, is_required=True),
        Key(name="expect", kind=_EXPECTATION, about=_EXPECTATION.about, is_required=True),
    ),
)
TESTS = Several("a list of tests", _TEST, may_be_empty=True)
_FILE = MappingKind(
    name="test_file",
    about="A file of tests.",
    keys=(Key(name="tests", kind=TESTS, about="The tests.", is_required=True),),
)


def read_tests(rule_files: Sequence[Path], test_files: Sequence[Path]) -> tuple[list[RuleTest], list[Problem]]:
    """Read the tests in rule files and in separate files. Return them and their problems."""
    reader = SchemaReader({}, is_strict=False)
    tests: list[RuleTest] = []
    for path in rule_files:
        found: list[Problem] = []
        root = read_document(path, found)
        reader.problems += [problem for problem in found if is_of_tests(problem)]  # others are of the rules
        node = None if root is None else root.child("tests")
        if node is not None:
            tests += _tests(reader, path, reader.read(node, TESTS))
    for path in test_files:
        root = read_document(path, reader.problems)
        read = ABSENT if root is None else reader.read(root, _FILE)
        if read is not ABSENT:
            tests += _tests(reader, path, read.values.get("tests", ()))
    _refuse_repeated_names(reader, tests)
    return tests, sorted(reader.problems)


def _refuse_repeated_names(reader: SchemaReader, tests: Sequence[RuleTest]) -> None:
    seen: dict[tuple[Path, str], str] = {}
    for test in tests:
        first = seen.setdefault((test.file, test.name), test.where)
        if first != test.where:
            file, line, column = test.where.rsplit(":", 2)
            message = f"expected each test's name once in a file, got {test.name!r} again (first at {first})"
            reader.problems.append(
                Problem(file=file, line=int(line), column=int(column), path="tests", message=message, code="duplicate")
            )


def _tests(reader: SchemaReader, path: Path, reads: Any) -> list[RuleTest]:  # noqa: ANN401 # ABSENT, or a tuple
    if reads is ABSENT:
        return []
    return [test for read in reads if (test := _test(reader, path, read)) is not None]


def _test(reader: SchemaReader, path: Path, read: ParsedMapping) -> RuleTest | None:
    name, event, expect = (read.values.get(key) for key in ("name", "event", "expect"))
    if name is None or event is None or expect is None:
        return None
    if not expect.values:
        message = "expected what should happen (routes, requests or snapshot), got nothing"
        reader.report(expect.node, "value", message)
        return None
    sent = _event(reader, path, event)
    if sent is None:
        return None
    return RuleTest(
        name=name,
        where=f"{read.node.file}:{read.node.line}:{read.node.column}",
        file=path,
        event=sent,
        routes=expect.values.get("routes"),
        requests=tuple(
            [
                ExpectedRequest(
                    route=route, to=each.values.get("to"), item=each.values.get("item", 0), fields=_fields(each)
                )
                for each in expect.values.get("requests", ())
                if (route := each.values.get("route")) is not None
            ]
        ),
        has_snapshot="snapshot" in expect.values,
    )


def _fields(read: ParsedMapping) -> dict[str, Any]:
    return {key: value for key, value in read.values.items() if key not in ("route", "to", "item")}


def _event(reader: SchemaReader, path: Path, read: ParsedMapping) -> GivenEvent | None:
    values = read.values
    contents = [key for key in ("body", "file", "captured") if key in values]
    if len(contents) > 1:
        message = f"expected one of body, file and captured, got {' and '.join(contents)}"
        reader.report(read.node.value[contents[1]], "value", message, at_key=True)
        return None
    if "captured" in values:
        return _captured(reader, path, read)
    if "source" not in values:
        reader.report(read.node, "missing_key", "expected the key 'source', got none")
        return None
    headers: dict[str, str] = values.get("headers", {})
    body: object = values.get("body", "")
    if "file" in values:
        content = _content(reader, read.node.value["file"], path.parent / values["file"])
        if content is None:
            return None
    elif isinstance(body, str):
        content = body.encode()
    else:
        content = orjson.dumps(body)
        if not any(name.lower() == "content-type" for name in headers):
            headers = {"Content-Type": "application/json"} | headers
    pairs = tuple([(name.encode(), value.encode()) for name, value in headers.items()])
    return GivenEvent(source=values["source"], headers=pairs, query=values.get("query", ""), body=content)


def _captured(reader: SchemaReader, path: Path, read: ParsedMapping) -> GivenEvent | None:
    """Parse the output of `gateway events show --json`."""
    node, named = read.node.value["captured"], read.values["captured"]
    if EVENT_ID.fullmatch(named) and not (path.parent / named).exists():
        source = read.values.get("source", "")
        return GivenEvent(source=source, headers=(), query="", body=b"", is_captured=True, stored=named)
    content = _content(reader, node, path.parent / named)
    if content is None:
        return None
    try:
        found = captured_event(json.loads(content))
        return replace(found, source=read.values.get("source", found.source))
    except (ValueError, LookupError, TypeError, AttributeError):
        message = "expected what `gateway events show --json` prints of an event, got something else"
        reader.report(node, "value", message)
        return None


def captured_event(fields: Mapping[str, Any]) -> GivenEvent:
    """Build an event from the fields that `gateway events show --json` prints.

    Raises ValueError, LookupError, TypeError or AttributeError for anything else.
    """
    encoded = fields.get("body_base64")
    return GivenEvent(
        source=str(fields["source"]),
        headers=tuple([(name.encode("latin-1"), value.encode()) for name, value in fields["headers"]]),
        query=str(fields["query"]),
        body=b64decode(encoded) if encoded is not None else fields["body"].encode(),
        is_captured=True,
    )


def _content(reader: SchemaReader, node: Node, path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        reader.report(node, "value", f"expected a file at {path}, got {reason_of(error)}")
        return None
