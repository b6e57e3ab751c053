"""`to:` with a template, `otherwise`, `stop` and `catch_all`: which routes take an event, and where it goes."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.model import DeadReason
from gateway.rules.event_view import EventView
from gateway.rules.load import check_rules, load_rules
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import is_decided_by_others, past_route, routing_revision
from gateway.rules.rules import Rules
from gateway.rules.watch import changes
from tests import run_seeds
from tests.builders import a_route, an_event

RULES = """
version: 1
sources: {shop: {verify: {scheme: none}, type: body.kind}}
destinations:
  audit: {url: "http://127.0.0.1:1/audit"}
  tenant-b: {url: "http://127.0.0.1:1/b"}
  tenant-a: {url: "http://127.0.0.1:1/a"}
  rest: {url: "http://127.0.0.1:1/rest"}
routes:
"""


def rules_of(folder: Path, *routes: str) -> Rules:
    (file := folder / "routes.yaml").write_text(RULES + "".join(f"  - {{{route}}}\n" for route in routes))
    return load_rules(file)


def errors(folder: Path, *routes: str) -> list[str]:
    (file := folder / "routes.yaml").write_text(RULES + "".join(f"  - {{{route}}}\n" for route in routes))
    _, problems = check_rules(file)
    return [problem.message for problem in problems if problem.severity == "error"]


def a_view(body: object, event_type: str = "order") -> EventView:
    return EventView.of(an_event(source="shop", type=event_type, body=body))


def targets(rules: Rules, body: object, route: str = "r") -> list[tuple[str, str, str]]:
    found = rules.routes[route].targets(a_view(body), None)
    return [(name, "", "") if end is None else (name, end.reason, end.detail) for name, end in found]


TEMPLATE = 'name: r, from: shop, to: "tenant-${{ body.tenant }}"'


def test_a_template_may_give_the_name_of_each_declared_destination_that_it_fits(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, TEMPLATE)
    assert rules.routes["r"].destinations == ("tenant-a", "tenant-b")
    assert targets(rules, {"tenant": "a"}) == [("tenant-a", "", "")]
    assert targets(rules, {"tenant": "b"}) == [("tenant-b", "", "")]


@pytest.mark.parametrize(
    ("body", "reason", "detail"),
    [
        ({"tenant": "c"}, "unknown_destination", "to: expected the name of a declared destination, got another"),
        ({"tenant": "a\n"}, "unknown_destination", "to: expected the name of a declared destination, got another"),
        (
            {"tenant": "a/../rest"},
            "unknown_destination",
            "to: expected the name of a declared destination, got another",
        ),
        ({"tenant": ["a"]}, "unknown_destination", "to: expected the name of a declared destination, got another"),
        (
            {"tenant": "x" * 100_000},
            "unknown_destination",
            "to: expected the name of a declared destination, got another",
        ),
        ({}, "unknown_destination", "to: body.tenant isn't there"),
        ([], "unknown_destination", "to: body.tenant isn't there"),
    ],
)
def test_an_event_that_names_no_declared_destination(body: object, reason: str, detail: str, tmp_path: Path) -> None:
    rules = rules_of(tmp_path, TEMPLATE)
    assert targets(rules, body) == [("", reason, detail)]
    rules = rules_of(tmp_path, TEMPLATE + ", otherwise: rest")
    assert rules.routes["r"].destinations == ("tenant-a", "tenant-b", "rest")
    assert targets(rules, body) == [("rest", "", "")]


def test_only_names_that_fit_the_template_may_be_given(tmp_path: Path) -> None:
    """The sender decides what the expression gives: not that an event goes where nobody has meant it to."""
    rules = rules_of(tmp_path, 'name: r, from: shop, to: "${{ body.tenant }}-a"')
    assert targets(rules, {"tenant": "tenant"}) == [("tenant-a", "", "")]
    assert [name for name, _, _ in targets(rules, {"tenant": "tenant-b"})] == [""]


def test_an_expression_that_fails_is_no_unknown_name(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, 'name: r, from: shop, to: "tenant-${{ body.tenant + 1 }}", otherwise: rest')
    ((name, reason, detail),) = targets(rules, {"tenant": "a"})
    assert (name, reason) == ("", "expression_error")
    assert detail.startswith("to: body.tenant + 1: ")


def test_names_beside_a_template_get_every_event_once(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, 'name: r, from: shop, to: [tenant-b, audit, "tenant-${{ body.tenant }}"]')
    assert rules.routes["r"].destinations == ("tenant-b", "audit", "tenant-a")
    assert [name for name, _, _ in targets(rules, {"tenant": "a"})] == ["tenant-b", "audit", "tenant-a"]
    assert [name for name, _, _ in targets(rules, {"tenant": "b"})] == ["tenant-b", "audit"]
    assert targets(rules, {})[:2] == [("tenant-b", "", ""), ("audit", "", "")]
    route = rules.routes["r"]
    assert [name for name, _ in route.chosen(a_view({"tenant": "a"}))] == ["tenant-a"]
    assert [name for name, _ in route.chosen(a_view({"tenant": "b"}))] == ["tenant-b"], "the rest is never nothing"


def test_a_template_may_use_names_of_let(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, 'name: r, from: shop, let: {t: "body.tenant.lower()"}, to: "tenant-${{ t }}"')
    assert [name for name, _, _ in targets(rules, {"tenant": "B"})] == ["tenant-b"]


def test_a_failed_condition_ends_each_of_its_deliveries(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, TEMPLATE + ', when: "body.tenant + 1 == 2"')
    view = a_view({"tenant": "a"})
    ((route, error),) = rules.table.match(view)
    ((name, end),) = route.targets(view, error)
    assert name == "tenant-a"
    assert end is not None
    assert end.reason is DeadReason.EXPRESSION_ERROR


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (
            'name: r, from: shop, to: "team-${{ body.t }}"',
            "expected a template of declared destinations' names, got one ",
        ),
        (
            'name: r, from: shop, to: ["tenant-${{ body.t }}", "${{ body.x }}"]',
            "expected one template in `to`, got another",
        ),
        ("name: r, from: shop, to: rest, otherwise: audit", "`otherwise` needs a template in `to`, got none"),
        (TEMPLATE + ", otherwise: rust", "unknown destination 'rust', did you mean 'rest'?"),
        ('name: r, from: shop, to: "tenant-${{ body. }}"', "expected CEL in ${{ … }}, got '${{ body. }}': "),
        ('name: r, from: shop, to: "tenant-${{ body.t"', "expected CEL in ${{ … }}, got "),
        ('name: r, from: shop, to: "tenant-{{ body.t }}"', "expected a name with ${{ … }} in it, got "),
        ("name: r, from: shop, to: rest, stop: 1", "expected true or false, got 1"),
    ],
)
def test_mistakes(route: str, message: str, tmp_path: Path) -> None:
    (told,) = errors(tmp_path, route)
    assert told.startswith(message)


def test_an_order_needs_names(tmp_path: Path) -> None:
    told = errors(tmp_path, TEMPLATE + ", order: key")
    assert "expected names of destinations with `order: key`, got a template" in told


def test_no_destination_that_a_template_fits_is_unused(tmp_path: Path) -> None:
    assert not [each for each in rules_of(tmp_path, TEMPLATE).warnings if "delivers to 'tenant" in each]


# Which routes take an event.


def taken(rules: Rules, event_type: str) -> list[str]:
    view = a_view({"kind": event_type}, event_type)
    return [route.name for route, _ in rules.table.match(view)]


def test_a_route_with_stop_leaves_nothing_to_those_below_it(tmp_path: Path) -> None:
    rules = rules_of(
        tmp_path,
        "name: every, from: shop, to: audit",
        "name: orders, from: shop, to: rest, match: {type: order.*}, stop: true",
        "name: below, from: shop, to: rest",
    )
    assert taken(rules, "order.paid") == ["every", "orders"]
    assert taken(rules, "user") == ["every", "below"]


def test_a_condition_that_failed_stops_as_one_that_holds(tmp_path: Path) -> None:
    """Whether the route takes the event isn't known; it is a dead letter, and nobody else's by mistake."""
    rules = rules_of(
        tmp_path,
        'name: first, from: shop, to: rest, when: "body.kind + 1 == 2", stop: true',
        "name: below, from: shop, to: rest",
    )
    assert taken(rules, "order") == ["first"]


def test_a_catch_all_takes_what_no_other_route_takes(tmp_path: Path) -> None:
    rules = rules_of(
        tmp_path,
        "name: left, from: shop, to: rest, catch_all: true, stop: true",
        "name: too, from: shop, to: rest, catch_all: true",
        "name: orders, from: shop, to: audit, match: {type: order.*}",
        "name: sampled, from: shop, to: audit, enabled: false",
    )
    assert taken(rules, "order.paid") == ["orders"]
    assert taken(rules, "user") == ["left"]


def test_why_others_take_an_event(tmp_path: Path) -> None:
    rules = rules_of(
        tmp_path,
        "name: orders, from: shop, to: audit, match: {type: order.*}, stop: true",
        'name: below, from: shop, to: rest, when: "body.kind + 1 == 2"',
        "name: left, from: shop, to: rest, catch_all: true, stop: true",
        "name: too, from: shop, to: rest, catch_all: true",
    )
    view = a_view({"kind": "order.paid"}, "order.paid")
    explained = rules.table.explain(view, rules.table.match(a_view({}, "order.paid")))
    assert [(each.name, each.matched, each.reason) for each in explained] == [
        ("orders", True, "matched"),
        ("below", False, "stop: orders, above it, takes it"),
        ("left", False, "catch_all: orders takes it"),
        ("too", False, "catch_all: orders takes it"),
    ]
    rules = rules_of(
        tmp_path,
        *[
            "name: left, from: shop, to: rest, catch_all: true, stop: true",
            "name: too, from: shop, to: rest, catch_all: true",
        ],
    )
    explained = rules.table.explain(a_view({}), rules.table.match(a_view({})))
    assert [each.reason for each in explained] == ["matched", "stop: left, above it, takes it"]


def test_any_list_of_routes_against_its_plain_meaning() -> None:
    drawn = random.Random(run_seeds.drawn())
    for _ in range(500):
        routes = [
            replace(
                a_route(f"r{number}", match={"type": drawn.sample("abcdef", drawn.randint(1, 4))}, sources=("github",)),
                stop=drawn.random() < 0.4,
                catch_all=drawn.random() < 0.3,
            )
            for number in range(drawn.randint(1, 8))
        ]
        table = RouteTable(routes)
        for event_type in "abcdefg":
            view = EventView.of(an_event(type=event_type))
            expected: list[str] = []
            for is_catch_all in (False, True):
                for route in routes if not expected else []:
                    if route.catch_all is is_catch_all and route.match is not None and route.match.holds(view):
                        expected.append(route.name)
                        if route.stop:
                            break
            matched = table.match(view)
            assert [route.name for route, _ in matched] == expected, (routes, event_type)
            assert [each.name for each in table.explain(view, matched) if each.matched] == expected


# What others know of it.


def test_a_routing_revision_knows_where_an_event_went(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, TEMPLATE + ", otherwise: rest")
    then = past_route("r", routing_revision(rules).routes["r"])
    assert then is not None
    assert then.route is not None
    for body in ({"tenant": "a"}, {"tenant": "c"}, {}, {"tenant": "rest"}):
        assert then.route.targets(a_view(body), None) == rules.routes["r"].targets(a_view(body), None)


def test_a_routing_revision_tells_the_names_of_let_apart_from_fields(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, 'name: r, from: shop, let: {t: "body.tenant.lower()"}, to: "tenant-${{ t }}"')
    then = past_route("r", routing_revision(rules).routes["r"])
    assert then is not None
    assert then.route is not None
    assert [name for name, _ in then.route.targets(a_view({"tenant": "B"}), None)] == ["tenant-b"]


STOPPING: dict[str, Any] = {"match": {"type": "order"}, "sources": ("shop",)}


def text_of(tmp_path: Path, name: str, *routes: str) -> str:
    return routing_revision(rules_of(tmp_path, *routes)).routes[name]


def test_a_routing_revision_tells_whether_others_decide(tmp_path: Path) -> None:
    first = "name: first, from: shop, to: rest, match: {type: %s}, stop: true"
    below = "name: below, from: shop, to: rest"
    left = "name: left, from: shop, to: rest, catch_all: true"
    assert not is_decided_by_others(text_of(tmp_path, "below", below, first % "order"))
    told = {text_of(tmp_path, "below", first % each, below) for each in ("order", "user", "order")}
    assert len(told) == 2
    assert all(map(is_decided_by_others, told))
    told = {text_of(tmp_path, "left", left, first % each, below) for each in ("order", "user", "order")}
    assert len(told) == 2
    assert all(map(is_decided_by_others, told))


def test_nothing_of_a_hidden_condition_is_in_the_log(tmp_path: Path) -> None:
    """Not a digest either, by which a short secret could be guessed."""
    texts = []
    for secret in ("hush-1", "hush-2"):
        routes = (
            f"name: first, from: shop, to: rest, match: {{body.token: '${{file:{tmp_path}/secret}}'}}, stop: true",
            "name: below, from: shop, to: rest",
        )
        (tmp_path / "secret").write_text(secret)
        texts.append(text_of(tmp_path, "below", *routes))
    assert texts[0] == texts[1]
    then = past_route("below", texts[0])
    assert then is not None
    assert then.route is None, "what it took isn't known"


def test_a_reload_tells_what_changed(tmp_path: Path) -> None:
    before = rules_of(tmp_path, "name: r, from: shop, to: tenant-a", "name: below, from: shop, to: rest")
    after = rules_of(tmp_path, TEMPLATE + ", stop: true", "name: below, from: shop, to: rest")
    told = changes(before, after)
    assert told.changed == ("route r: to, stop", "route below: what others take before it")
    assert told.conditions == {"r", "below"}
