"""Fields that rules read and no recent event had."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.ops.path_scan import read_paths
from gateway.ops.unseen_fields import MAX_EVENTS, MIN_EVENTS, Unseen, UnseenFields, located
from gateway.rules.eligibility import Eligibility
from gateway.rules.load import load_rules
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Egress, Route, Rules
from gateway.rules.templates import Template
from tests.builders import a_route, an_event


def unseen_of(*routes: Route) -> UnseenFields:
    by_name = {route.name: route for route in routes}
    rules = Rules(sources={}, destinations={}, routes=by_name, egress=Egress(), table=RouteTable(routes), files=())
    return UnseenFields(rules)


def found(*bodies: object, count: int = MIN_EVENTS, **route: object) -> list[Unseen]:
    unseen = unseen_of(a_route(**route))  # type: ignore[arg-type] # of a table
    for _ in range(count):
        for body in bodies:
            unseen.add(an_event(body=body))
    return list(unseen.found())


def test_a_mistyped_field_of_a_match() -> None:
    assert found({"ref": "main"}, match={"type": "push", "body.reff": "main"}) == [
        Unseen(route="build", where="match", path="body.reff", lacking=MIN_EVENTS)
    ]


@pytest.mark.parametrize(
    ("match", "bodies"),
    [
        ({"body.ref": "main"}, [{"ref": "other"}]),
        ({"body.ref": "main"}, [{}, {"ref": 1}]),  # one of many has it
        ({"type": "create", "body.reff": "main"}, [{"ref": "main"}]),  # of that type there was none
        ({"body.reff": {"exists": False}}, [{}]),
        ({"body.reff": {"not": 1}}, [{}]),
        ({"any_of": [{"body.reff": 1}, {"body.ref": "main"}]}, [{"ref": "main"}]),
        ({"body.a": 1, "body.b": 2}, [{}]),  # which of them is wrong isn't plain
    ],
)
def test_a_field_that_may_be_right(match: dict[str, object], bodies: list[object]) -> None:
    assert found(*bodies, match=match) == []


def test_few_events_say_nothing() -> None:
    assert found({}, match={"body.x": 1}, count=MIN_EVENTS - 1) == []


def test_a_mistyped_field_of_a_condition_and_of_a_request() -> None:
    assert found({"a": 1}, when="body.b > 1") == [
        Unseen(route="build", where="when", path="body.b", lacking=MIN_EVENTS)
    ]
    assert found({"a": 1}, when="has(body.b) && body.b > 1") == []
    assert found({"a": 1}, when="type == 'create' && body.b > 1") == []
    assert found({"a": 1}, match={"type": "create"}, when="body.b > 1") == []
    template = RequestTemplate(body=Template({"x": "${{ body.a }}", "y": "${{ body.c }} ${{ default(body.d, 1) }}"}))
    assert found({"a": 1}, request=template) == [
        Unseen(route="build", where="request", path="body.c", lacking=MIN_EVENTS)
    ]
    assert found({"a": 1}, request=template, when="body.a == 2") == []


@pytest.mark.parametrize(
    ("when", "path"),
    [
        ("size(body.tenannt) > 0", "body.tenannt"),
        ("body.itmes.size() > 0", "body.itmes"),
        ("body.itmes.exists(i, i.a == 1)", "body.itmes"),
        ("body.tenannt.startsWith('x') && body.tenant == 'q'", "body.tenannt"),
        ("body.tenant == 'q' && body.tenannt.startsWith('x')", "body.tenannt"),
        ("body.tenant == 'q' && (body.tenannt == 'size' || body.tenant == 'z')", "body.tenannt"),
        ("body.tenannt in ['a', 'has']", "body.tenannt"),
        ("body.note == 'a ? b && c'", "body.note"),
        ("body.tenant == 'q' ? body.tenannt == 'x' : false", "body.tenannt"),
        ("has(body.a.b) || body.c.b == 1", "body.c.b"),
        ("default(body.x, body.y) == 1", "body.y"),
        ("'k' in body.labels", "body.labels"),
        ("headers['x-kind'] == 'a'", "headers['x-kind']"),
    ],
)
def test_a_field_is_missed_without_which_an_expression_has_no_value(when: str, path: str) -> None:
    assert found({"tenant": "q", "c": {}, "a": {}}, when=when) == [
        Unseen(route="build", where="when", path=path, lacking=MIN_EVENTS)
    ]


@pytest.mark.parametrize(
    "when",
    [
        "has(body.x) && body.x == 1",
        "has(body.x) ? body.x == 1 : true",
        "default(body.x, 1) == 1",
        "body.x == 1 || body.tenant == 'q'",
        "body.tenant == 'q' || body.x == 1",
        "body.tenant == 'z' && body.x == 1",
        "body.tenant == 'z' ? body.x == 1 : true",
        "'x' in body && body.x == 1",
        "size(body.tenant) > 0 && body.tenant.contains('body.x')",
        "body.x == 1 && body.y == 2",  # which of them is wrong isn't plain
    ],
)
def test_a_field_that_an_expression_may_do_without_is_not_missed(when: str) -> None:
    assert found({"tenant": "q"}, when=when) == []


def test_all_parts_of_a_path_scan_are_told_apart() -> None:
    reads = read_paths("has(body.a) && (body.b['c'][0].d || default(body.e, type)) && f_(headers['x'])")
    assert [(each.path.text, each.is_optional, each.part) for each in reads] == [
        ("body.a", True, 0),
        ("body.b.c[0].d", False, 1),
        ("body.e", True, 1),
        ("type", False, 1),
        ("headers.x", False, 2),
    ]
    assert {each.part for each in read_paths("body.a && body.b || body.c && body.d")} == {0}


def test_a_route_that_takes_no_event_misses_no_field() -> None:
    unseen = unseen_of(replace(a_route(match={"body.x": 1}), eligibility=Eligibility(enabled=False)))
    for _ in range(MIN_EVENTS):
        unseen.add(an_event(body={}))
    assert list(unseen.found()) == []


@pytest.mark.parametrize("route", [{"match": {"body.x": 1}}, {"match": {"type": "push"}, "when": "size(body.x) > 0"}])
def test_a_field_that_one_event_had_is_not_missed_however_old_it_is(route: dict[str, Any]) -> None:
    unseen = unseen_of(a_route(**route), replace(a_route("other", sources=("crm",)), match=None))
    for _ in range(MAX_EVENTS + 1):
        unseen.add(an_event(body={}))
    (only,) = unseen.found()
    assert only.lacking == MAX_EVENTS
    if "when" in route:
        unseen.add(an_event(type="create", body={"x": "1"}))  # which the route doesn't take
        assert list(unseen.found()) == [only]
    unseen.add(an_event(body={"x": "1"}))
    assert list(unseen.found()) == []


def test_a_field_is_located_where_the_route_reads_it(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        """routes:
  - {name: "r-${{ each }}", foreach: [a, b], from: crm, to: [x], when: "size(body.z) > 0"}
  - name: last
    from: crm
    to: x
    match:
      type: order
      body.yy: 1
"""
    )
    (tmp_path / "routes.yaml").write_text(
        """version: 1
sources: {crm: {verify: {scheme: none}}}
destinations: {x: {url: "https://x.example/", rate: 1/s}}
include: [more.yaml]
"""
    )
    rules = load_rules(tmp_path / "routes.yaml", environ={})
    unseen = [("r-b", "when", "body.z"), ("last", "match", "body.yy"), ("last", "to", "body.q"), ("gone", "when", "x")]
    told = [(Unseen(route=route, where=where, path=path, lacking=10), "m") for route, where, path in unseen]
    places = [(Path(each.file).name, each.line, each.path) for each in located(rules, told)]
    assert places == [
        ("more.yaml", 2, "routes[0].when"),
        ("more.yaml", 8, "routes[1].match.body.yy"),
        ("more.yaml", 5, "routes[1].to"),
        ("", 0, "routes.gone.when"),
    ]
