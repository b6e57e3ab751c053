"""Fields that rules read and no recent event had."""

from dataclasses import replace

import pytest

from gateway.ops.unseen_fields import MAX_EVENTS, MIN_EVENTS, Unseen, UnseenFields
from gateway.rules.eligibility import Eligibility
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


def test_a_route_that_takes_no_event_misses_no_field() -> None:
    unseen = unseen_of(replace(a_route(match={"body.x": 1}), eligibility=Eligibility(enabled=False)))
    for _ in range(MIN_EVENTS):
        unseen.add(an_event(body={}))
    assert list(unseen.found()) == []


def test_only_the_newest_events_and_routes_of_the_source_are_looked_at() -> None:
    unseen = unseen_of(a_route(match={"body.x": 1}), replace(a_route("other", sources=("crm",)), match=None))
    for _ in range(MAX_EVENTS):
        unseen.add(an_event(body={}))
    unseen.add(an_event(body={"x": 1}))
    (only,) = unseen.found()
    assert only.lacking == MAX_EVENTS
