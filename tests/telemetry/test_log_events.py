"""The log as an interface: `docs/logs.md` against the calls in the code, and against its own examples."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "true": bool,
    "strings": list,
    "list": list,
    "object": dict,
}
EVERYWHERE = {"timestamp", "level", "event", "logger"}


class Documented(NamedTuple):
    """A row of the page: field → its type as the page calls it, and which fields aren't always there."""

    levels: list[str]
    fields: dict[str, str]
    optional: frozenset[str]


class Call(NamedTuple):
    """A line of the code that logs. `is_open` if it also hands on fields that can't be seen there."""

    where: str
    event: str
    level: str
    fields: frozenset[str]
    is_open: bool


def documented() -> dict[str, Documented]:
    found = {}
    level = "(?:debug|info|warning|error)"
    for row in re.finditer(rf"^\| `([a-z_]+)` \| ({level}(?:, {level})*) \|(.*?)\| ", PAGE, re.MULTILINE):
        event, levels, text = row.groups()
        fields = dict(re.findall(r"`([a-z_]+)` ([a-z]+)", text))
        optional = frozenset(re.findall(r"`([a-z_]+)` [a-z ]+\?", text))
        assert event not in found, f"{event} is there twice"
        found[event] = Documented(levels.split(", "), fields, optional)
    return found


def calls(source: str, name: str) -> Iterator[Call]:
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
            continue
        logger = ast.unparse(node.func.value)
        if not logger.rpartition(".")[2].endswith(("log", "logger")):
            continue
        assert node.args, f"{name}:{node.lineno}: expected the event's name"
        event = node.args[0]
        assert isinstance(event, ast.Constant), f"{name}:{node.lineno}: expected a name that can be found"
        fields = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
        if "exc_info" in fields or node.func.attr == "exception":
            fields = fields - {"exc_info"} | {"exception"}
        is_open = any(keyword.arg is None for keyword in node.keywords)
        yield Call(f"{name}:{node.lineno}", str(event.value), LEVELS[node.func.attr], frozenset(fields), is_open)


@pytest.fixture(scope="module")
def code() -> dict[str, list[Call]]:
    found = defaultdict(list)
    for path in sorted({*(ROOT / "gateway").rglob("*.py")} - {ROOT / "gateway" / "telemetry" / "logs.py"}):
        for call in calls(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()):
            found[call.event].append(call)
    found["log_lines_dropped"] = [Call("logs.py", "log_lines_dropped", "warning", frozenset(["count"]), is_open=False)]
    return found


def test_every_event_of_the_code_is_documented_and_no_other(code: dict[str, list[Call]]) -> None:
    assert len(code) > 40
    assert documented().keys() == code.keys()


def test_its_level_and_fields_are_those_of_the_code(code: dict[str, list[Call]]) -> None:
    problems = []
    for event, row in documented().items():
        needed = row.fields.keys() - row.optional
        for call in code[event]:
            if call.level not in row.levels:
                problems.append(f"{call.where}: {event}: expected {row.levels}, got {call.level}")
            if unknown := call.fields - row.fields.keys():
                problems.append(f"{call.where}: {event}: not documented: {sorted(unknown)}")
            if not call.is_open and (missing := needed - call.fields):
                problems.append(f"{call.where}: {event}: expected {sorted(missing)}")
        if not any(call.is_open for call in code[event]):
            seen = {field for call in code[event] for field in call.fields}
            if row.fields.keys() - seen:
                problems.append(f"{event}: never there: {sorted(row.fields.keys() - seen)}")
    assert not problems, "\n".join(problems)


def test_a_call_is_found_wherever_it_is() -> None:
    source = (
        "class A:\n def f(self):\n  self._around.logger.warning('gone', a=1, **b)\n  log.exception('broken', path=2)\n"
    )
    assert list(calls(source, "x.py")) == [
        Call("x.py:3", "gone", "warning", frozenset(["a"]), is_open=True),
        Call("x.py:4", "broken", "error", frozenset(["path", "exception"]), is_open=False),
    ]


def examples(page: str) -> list[dict[str, Any]]:
    """Return a page's lines of the log, each of which is as docs/logs.md says."""
    rows = documented()
    lines = [orjson.loads(line) for line in page.splitlines() if line.startswith('{"timestamp"')]
    for line in lines:
        row = rows[line["event"]]
        assert line["level"] in row.levels, line
        fields = line.keys() - EVERYWHERE
        assert row.fields.keys() - row.optional <= fields <= row.fields.keys(), line
        for field in fields:
            if line[field] is not None:
                assert isinstance(line[field], TYPES[row.fields[field]]), (line["event"], field)
    return lines


def test_each_event_that_is_written_has_an_example_that_is_as_the_page_says() -> None:
    rows = documented()
    written = {event for event, row in rows.items() if row.levels != ["debug"]}
    assert {line["event"] for line in examples(PAGE)} == written


def test_the_lines_that_other_pages_show_are_as_the_page_says() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    shown = {name: len(examples(page)) for name, page in pages.items() if name != "logs.md"}
    assert shown["metrics.md"] >= 5
