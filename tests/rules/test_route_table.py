"""Which routes match an event: the meaning of conditions, what is refused, the index against the plain meaning."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from gateway.model import ExpressionError
from gateway.rules.conditions import ConditionError, UndecidedMatchError, parse_condition
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Route
from tests.builders import a_route, an_event
from tests.machine_speed import as_usual
from tests.run_seeds import drawn

BODY = {
    "ref": "refs/heads/main",
    "number": 1,
    "ratio": 1.5,
    "zero": 0,
    "draft": True,
    "nothing": None,
    "empty": "",
    "star": "a*b",
    "labels": ["bug", {"name": "urgent"}],
    "user": {"name": "ann", "a.b": {"c": 1}, "0": "zero", "x[0]": 2},
}


def a_view(body: object = BODY, *, event_type: str = "charge.failed", source: str = "github") -> EventView:
    return EventView.of(
        an_event(source=source, type=event_type, body=body, headers={"X-Event": "Push"}, query="env=prod&q.r=")
    )


def names(table: RouteTable[Route], view: EventView) -> list[str]:
    return [route.name for route, _ in table.match(view)]


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"type": "charge.failed"}, True),
        ({"type": "charge"}, False),
        ({"type": "Charge.failed"}, False),
        ({"type": "charge.*"}, True),
        ({"type": "*.failed"}, True),
        ({"type": "*"}, True),
        ({"type": "c*.f*d"}, True),
        ({"type": "*charge.failed*"}, True),
        ({"type": "c*failed*failed"}, False),
        ({"type": "charge.failed.*"}, False),
        ({"type": "c*ed*ed*"}, False),
        ({"type": "charge.f*failed"}, False),
        ({"type": "charge?failed"}, False),
        ({"type": ["refund", "charge.*"]}, True),
        ({"type": ["refund", "invoice.*"]}, False),
        ({"source": "github"}, True),
        ({"headers.x-event": "Push"}, True),
        ({"headers.X-Event": "Push"}, True),
        ({"headers.x-event": "push"}, False),
        ({"query.env": "prod"}, True),
        ({"query.q.r": ""}, True),
        ({'query."q.r"': ""}, True),
        ({"body.ref": "refs/heads/main"}, True),
        ({"body.number": 1}, True),
        ({"body.number": 1.0}, True),
        ({"body.number": True}, False),
        ({"body.number": "1"}, False),
        ({"body.draft": True}, True),
        ({"body.draft": 1}, False),
        ({"body.draft": [1, False]}, False),
        ({"body.zero": False}, False),
        ({"body.nothing": None}, True),
        ({"body.zz": None}, False),
        ({"body.empty": ""}, True),
        ({"body.empty": "*"}, True),
        ({"body.number": "*"}, False),
        ({"body.labels.0": "bug"}, True),
        ({"body.labels.1.name": "urgent"}, True),
        ({"body.labels.2": "bug"}, False),
        ({"body.labels": "bug"}, False),
        ({"body.user.0": "zero"}, True),
        ({'body.user."a.b".c': 1}, True),
        ({'body.user."x[0]"': 2}, True),
        ({"body.user.a.b.c": 1}, False),
        ({"body.user": {"exists": True}}, True),
        ({"body": {"exists": True}}, True),
        ({"body.nothing": {"exists": True}}, True),
        ({"body.nothing.x": {"exists": False}}, True),
        ({"body.zz": {"exists": True}}, False),
        ({"body.zz": {"exists": False}}, True),
        ({"body.star": {"is": "a*b"}}, True),
        ({"body.ref": {"is": "refs/*"}}, False),
        ({"body.number": {"is": 1}}, True),
        ({"body.number": {"gt": 0, "lte": 1}}, True),
        ({"body.number": {"gt": 1}}, False),
        ({"body.number": {"gte": 1}}, True),
        ({"body.ratio": {"lt": 1.5}}, False),
        ({"body.draft": {"gt": 0}}, False),
        ({"body.ref": {"gt": 0}}, False),
        ({"body.nothing": {"lt": 1}}, False),
        ({"body.zz": {"lt": 1}}, False),
        ({"body.number": {"not": 1}}, False),
        ({"body.number": {"not": [2, 3]}}, True),
        ({"body.number": {"not": {"gt": 1}}}, True),
        ({"body.ref": {"not": "refs/*"}}, False),
        ({"body.zz": {"not": 1}}, True),
        ({"body.zz": {"not": {"exists": False}}}, False),
        ({"body.zz": {"not": 1, "gt": 0}}, False),
        ({"body.number": 1, "body.ref": "x"}, False),
        ({"any_of": [{"body.number": 2}, {"body.ref": "refs/*"}]}, True),
        ({"any_of": [{"body.number": 2}, {"body.ref": "x"}]}, False),
        ({"all_of": [{"body.number": 1}, {"body.ref": "refs/*"}]}, True),
        ({"all_of": [{"body.number": 1}, {"body.ref": "x"}]}, False),
        ({"not": {"body.number": 1, "body.ref": "x"}}, True),
        ({"not": {"body.zz": 1}}, True),
        ({"not": {"not": {"body.zz": 1}}}, False),
        ({"type": "charge.*", "any_of": [{"not": {"body.number": 1}}, {"body.draft": True}]}, True),
    ],
)
def test_a_condition_compares_as_json_does(match: Mapping[str, object], expected: bool) -> None:  # noqa: FBT001 - the table's column
    view = a_view()
    assert parse_condition(match).holds(view) is expected
    table = RouteTable([a_route("r", match=match)])
    assert names(table, view) == (["r"] if expected else [])
    assert [explanation.matched for explanation in table.explain(view, table.match(a_view()))] == [expected]


def test_a_glob_with_many_stars_takes_no_time() -> None:
    condition = parse_condition({"body.s": "*a" * 50 + "*b"})
    assert not condition.holds(a_view({"s": "a" * 100_000}))


def test_the_globs_of_many_routes_share_a_budget_and_a_limit_is_no_mismatch() -> None:
    """The figure of the threat model, with texts in which each glob is almost there almost everywhere."""
    table = RouteTable([a_route(f"r{n}", match={"body.s": [f"*{n}*", f"*aaaa{n}*"]}) for n in range(500)])
    content = {"s": "a" * 1_000_000}

    def seconds() -> float:
        view = a_view(content)
        assert view.has_body
        began = time.process_time()
        matched = table.match(view)
        took = time.process_time() - began
        assert matched[-1][0].name == "r499"
        assert 400 < len(matched) < 500
        assert all(isinstance(error, UndecidedMatchError) for _, error in matched)
        found = table.explain(a_view(content), matched)[-1]
        assert found.reason == "match: too much to compute: '*499*' in 1,000,000 characters"
        return took

    assert as_usual(seconds, tries=3) < 0.25
    # What is short, or only has a certain beginning or end, isn't charged.
    globs = RouteTable([a_route(f"r{n}", match={"body.s": [f"{n}*", f"*{n}"], "body.t": f"*{n}*"}) for n in range(500)])
    assert names(globs, a_view({"s": "7" + "a" * 1_000_000, "t": "7" * 1_000})) == ["r7"]


HOW_TO_WRITE = """; a list's items are body.a.0, other keys are quoted: body."a[b].c\""""
EXPECTED_TESTS = ", expected one of is, gt, gte, lt, lte, exists, not; a field in it is one key with it, as body.a.b"


def check_refused(match: Any, *problems: str) -> None:
    with pytest.raises(ConditionError) as caught:
        parse_condition(match)
    assert str(caught.value).splitlines() == list(problems)


def test_every_problem_of_a_condition_is_reported_in_one_go() -> None:
    check_refused(
        {"tpye": "push", "body.n": {"gte": "1", "gtt": 2}, "any_of": [{"body..x": 1}, {"not": 3}], "type": []},
        "match.tpye: unknown path 'tpye', did you mean 'type'?",
        "match.body.n.gte: expected a number, got '1'",
        "match.body.n.gtt: unknown test 'gtt', did you mean 'gt'?",
        f"match.any_of[0].body..x: expected body.a.b, got 'body..x'{HOW_TO_WRITE}",
        "match.any_of[1].not: expected a mapping of paths to values, got 3",
        "match.type: expected at least one value, got []",
    )


@pytest.mark.parametrize(
    ("match", "problem"),
    [
        ({}, "match: expected a mapping of paths to values, got {}"),
        ([], "match: expected a mapping of paths to values, got []"),
        ({"anyof": []}, "match.anyof: unknown path 'anyof', did you mean 'any_of'?"),
        ({"any_of": []}, "match.any_of: expected a list of mappings, got []"),
        ({"all_of": {"type": "x"}}, "match.all_of: expected a list of mappings, got a mapping"),
        ({"any_of": [{}]}, "match.any_of[0]: expected a mapping of paths to values, got {}"),
        (
            {"xyz": 1},
            "match.xyz: unknown path 'xyz', expected type, source, headers.…, query.…, body.…, any_of, all_of or not",
        ),
        ({"bdy.a": 1}, "match.bdy.a: unknown path 'bdy.a', did you mean 'body'?"),
        ({"type.a": 1}, "match.type.a: expected type, got 'type.a'"),
        ({"headers": 1}, "match.headers: expected headers.<name>, got 'headers'"),
        ({"query.": 1}, "match.query.: expected query.<name>, got 'query.'"),
        ({"type": {}}, "match.type: expected a value, a list or tests (is, gt, gte, lt, lte, exists, not), got {}"),
        ({"type": [["a"]]}, "match.type[0]: expected a string, a number, true, false or null, got a list"),
        ({"type": float("inf")}, "match.type: expected a string, a number, true, false or null, got inf"),
        ({"type": {"exists": "yes"}}, "match.type.exists: expected true or false, got 'yes'"),
        ({"type": {"gt": True}}, "match.type.gt: expected a number, got true"),
        ({"type": {"is": ["a"]}}, "match.type.is: expected a string, a number, true, false or null, got a list"),
        (
            {"body.a": {"b": 1}},
            f"match.body.a.b: unknown test 'b'{EXPECTED_TESTS}",
        ),
        (
            {"body.a[0]": 1},
            f"match.body.a[0]: expected body.a.b, got 'body.a[0]'{HOW_TO_WRITE}",
        ),
    ],
)
def test_an_invalid_condition_is_refused(match: object, problem: str) -> None:
    check_refused(match, problem)


def test_a_problem_has_the_path_that_leads_to_it() -> None:
    with pytest.raises(ConditionError) as caught:
        parse_condition({"any_of": [{"type": "a"}, {"body.x": {"not": ["a", []]}}]})
    assert [path for path, _ in caught.value.problems] == [("any_of", 1, "body.x", "not", 1)]


# The table


def test_routes_match_in_file_order_and_only_from_their_sources() -> None:
    table = RouteTable(
        [
            a_route("glob", match={"type": "*"}),
            a_route("other", sources=("billing",)),
            a_route("exact", match={"type": "charge.failed"}),
            a_route("prefix", sources=("billing", "github"), match={"type": "charge.*"}),
            a_route("all"),
        ]
    )
    assert names(table, a_view()) == ["glob", "exact", "prefix", "all"]
    assert names(table, a_view(source="billing")) == ["other", "prefix"]
    assert names(table, a_view(source="unknown")) == []


def test_a_failed_condition_is_returned_with_its_error_but_a_missing_field_is_no_match() -> None:
    table = RouteTable(
        [
            a_route("fails", when="body.ref + 1 > 2"),
            a_route("missing", when="body.zz > 2"),
            a_route("false", when="body.number > 2"),
            a_route("true", when="body.number == 1"),
            a_route("elsewhere", match={"body.number": 2}, when="body.ref + 1 > 2"),
        ]
    )
    matched = table.match(a_view())
    assert [(route.name, type(error)) for route, error in matched] == [("fails", ExpressionError), ("true", type(None))]


def test_a_route_found_by_several_values_is_returned_once() -> None:
    match = {"any_of": [{"type": ["charge.failed", "charge.*", "ch*"]}, {"body.number": 1}]}
    assert names(RouteTable([a_route("r", match=match)]), a_view()) == ["r"]


@pytest.mark.parametrize(
    "match_of",
    [
        lambda n: {"body.id": n},
        lambda n: {"type": "push", "body.id": n},
        lambda n: {"type": ["push", "tag"], "body.digit": n % 30, "body.rest": n // 30},
        lambda n: {"type": "push", "body.name": f"acme/{n:03}*"},
        lambda n: {"type": "*h", "body.name": f"*/{n}", "body.id": [n, n + 5000]},
        lambda n: {"any_of": [{"type": f"t{n}"}, {"type": "push", "body.id": n}]},
        lambda n: {"all_of": [{"type": "push"}, {"any_of": [{"body.rest": f"{n}"}, {"body.id": n}]}]},
        lambda n: {"type": "push", "all_of": [{"body.flag": True}, {"body.id": n}]},
    ],
)
def test_an_event_meets_few_candidates_however_many_routes_there_are(match_of: Any) -> None:
    table = RouteTable([a_route(f"r{n}", match=match_of(n)) for n in range(900)])
    view = a_view({"id": 899, "name": "acme/899", "digit": 29, "rest": 29, "flag": True}, event_type="push")
    assert names(table, view) == ["r899"]
    assert len(table._indexes["github"].candidates(view)) <= 5


def test_an_any_of_with_a_branch_that_has_no_index_is_found_by_that_branch_too() -> None:
    match = {"any_of": [{"type": "push"}, {"body.number": {"gt": 0}}]}
    assert names(RouteTable([a_route("r", match=match)]), a_view()) == ["r"]


def test_every_route_is_explained() -> None:
    table = RouteTable(
        [
            a_route("1", sources=("billing", "crm")),
            a_route("2", match={"type": ["push", "tag*"]}),
            a_route("3", match={"body.number": 1, "body.zz": 2, "body.ref": "x"}),
            a_route("4", match={"body.number": {"gt": 1, "not": 3}}),
            a_route("5", match={"body.user": "ann"}),
            a_route("6", match={"any_of": [{"body.zz": 1}, {"body.number": 2}]}),
            a_route("7", match={"not": {"type": "charge.*", "body.number": {"lte": 1}}}),
            a_route("8", match={"body.ref": {"exists": False}}),
            a_route("9", when="!body.draft"),
            a_route("10", when="body.zz == 1"),
            a_route("11", when="body.ref + 1 == 2"),
            a_route("12", match={"type": list("abcdefg")}),
            a_route("13", match={"body.number": 1}, when="body.draft"),
        ]
    )
    explanations = table.explain(a_view(), table.match(a_view()))
    assert {explanation.name: explanation.reason for explanation in explanations} == {
        "1": "from: expected billing or crm, got github",
        "2": "type: expected push or tag*, got charge.failed",
        "3": "body.zz: not there",
        "4": "body.number: expected more than 1 and not (3), got 1",
        "5": "body.user: expected ann, got a mapping",
        "6": "any_of: body.zz: not there; body.number: expected 2, got 1",
        "7": "not: type: charge.* and body.number: at most 1",
        "8": "body.ref: expected no such field, got refs/heads/main",
        "9": "when: false: !body.draft",
        "10": "when: body.zz isn't there",
        "11": "when: failed: body.ref + 1 == 2: unsupported operation: string + int",
        "12": "type: expected a or b or c or d or e or 2 more, got charge.failed",
        "13": "matched",
    }
    assert [explanation.name for explanation in explanations if explanation.matched] == ["11", "13"]


MANY = {"items": [{"x": number} for number in range(1500)], "s": "a" * 10_000}
"""An event over which the budget suffices for 40 conditions such as `costly`, not for 80."""


def costly(number: int) -> str:
    """Return a condition that is false."""
    return f"body.items.exists(i, i.x == {number + 1_000_000})"


def reasons(routes: Sequence[Route], view: EventView) -> dict[str, str]:
    table = RouteTable(routes)
    return {found.name: found.reason for found in table.explain(view, table.match(a_view(MANY)))}


def test_a_false_condition_is_evaluated_once_to_explain_it() -> None:
    found = reasons([a_route("all"), *[a_route(f"r{n}", when=costly(n)) for n in range(40)]], a_view(MANY))
    assert found == {"all": "matched"} | {f"r{n}": f"when: false: {costly(n)}" for n in range(40)}


def spent() -> EventView:
    """Return a view without budget."""
    view = a_view(MANY)
    view.spend(view.left)
    return view


def test_where_nothing_can_be_computed_what_the_router_decided_is_told() -> None:
    """It asked for the conditions of these routes, whichever route takes the event: none of them is stopped."""
    routes = [
        a_route("above", when=costly(1)),
        a_route("all"),
        a_route("below", when=costly(2)),
        a_route("glob", match={"body.s": "*b*"}),
        a_route("both", match={"body.s": "*b*"}, when=costly(3)),
    ]
    when = {"above": f"when: false: {costly(1)}", "below": f"when: false: {costly(2)}"}
    both = {
        "glob": "match: false, and too much to compute to say which of its conditions",
        "both": "match or when: false, and too much to compute to say which of its conditions",
    }
    assert reasons(routes, spent()) == {"all": "matched"} | when | both
    routes[1] = replace(routes[1], stop=True)
    stopped = "stop: all, above it, takes it"
    assert reasons(routes, spent()) == {"all": "matched"} | when | dict.fromkeys(("below", "glob", "both"), stopped)
    routes[1] = replace(routes[1], catch_all=True)
    assert reasons(routes, spent()) == {"all": "matched"} | when | both, "those with catch_all are asked last"
    routes.append(a_route("last"))
    assert reasons(routes, spent())["all"] == "catch_all: last takes it"


def test_the_routes_of_another_event_explain_nothing() -> None:
    with pytest.raises(ValueError, match="all: expected to take the event, as all its conditions hold"):
        RouteTable([a_route("all")]).explain(a_view(), [])


# The index against the plain meaning


def naively_holds(match: Mapping[str, Any], event: Mapping[str, Any]) -> bool:
    """Evaluate a condition by the words of the documentation, with no regard to speed."""
    return all(_entry(key, value, event) for key, value in match.items())


def _entry(key: str, value: Any, event: Mapping[str, Any]) -> bool:
    if key == "any_of":
        return any(naively_holds(item, event) for item in value)
    if key == "all_of":
        return all(naively_holds(item, event) for item in value)
    if key == "not":
        return not naively_holds(value, event)
    found: Any = event
    for step in key.split("."):
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            return _passes(value, (), exact=False)
    return _passes(value, (found,), exact=False)


def _passes(test: Any, found: tuple[Any, ...], *, exact: bool) -> bool:
    """Test a field's value, which is an empty tuple where the field isn't there."""
    if isinstance(test, dict):
        return all(_passes_named(name, operand, found) for name, operand in test.items())
    if isinstance(test, list):
        return any(_passes(item, found, exact=exact) for item in test)
    if not found:
        return False
    if isinstance(test, str) and isinstance(found[0], str) and not exact:
        return re.fullmatch(".*".join(map(re.escape, test.split("*"))), found[0], re.DOTALL) is not None
    return isinstance(test, bool) is isinstance(found[0], bool) and bool(test == found[0])


def _passes_named(name: str, operand: Any, found: tuple[Any, ...]) -> bool:
    if name == "exists":
        return bool(found) is operand
    if name == "not":
        return not _passes(operand, found, exact=False)
    if name == "is":
        return _passes(operand, found, exact=True)
    is_number = bool(found) and isinstance(found[0], int | float) and not isinstance(found[0], bool)
    compared = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}[name]
    return is_number and bool(getattr(float(found[0]), compared)(float(operand)))


values = st.sampled_from(["a", "ab", "b", "a*", "*", "*b", "", "1", 0, 1, 1.0, 1.5, -1, True, False, None])
numbers = st.sampled_from([0, 1, 1.5, -1])
tests: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        values
        | st.lists(values, min_size=1, max_size=3)
        | st.fixed_dictionaries(
            {}, optional={"is": values, "gt": numbers, "lte": numbers, "exists": st.booleans(), "not": tests}
        ).filter(bool)
    )
)
fields = st.sampled_from(["type", "headers.h", "query.q", "body.a", "body.b", "body.a.b", "body.a.0", "body.b.1.a"])
matches: st.SearchStrategy[dict[str, Any]] = st.deferred(
    lambda: (
        st.dictionaries(fields, tests, min_size=1, max_size=3)
        | st.fixed_dictionaries(
            {},
            optional={
                "type": values,
                "body.a": values,
                "any_of": st.lists(matches, min_size=1, max_size=3),
                "all_of": st.lists(matches, min_size=1, max_size=3),
                "not": matches,
            },
        ).filter(bool)
    )
)
bodies = st.recursive(
    st.sampled_from(["a", "ab", "b", "", "a*", 0, 1, 1.0, 1.5, True, False, None]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "0"]), inner, max_size=3),
    max_leaves=8,
)
texts = st.sampled_from(["a", "ab", "b", "", "1"])


RULES_AND_EVENTS = given(
    rules=st.lists(matches, min_size=1, max_size=6),
    copies=st.sampled_from([1, 5]),
    type_=texts,
    header=texts,
    query=texts,
    body=bodies,
)


@seed(drawn())
@settings(max_examples=150)
@RULES_AND_EVENTS
def test_the_index_finds_exactly_the_routes_whose_conditions_hold(**drawn_values: Any) -> None:  # of hypothesis
    assert compared(**drawn_values)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_index_finds_them_for_fifty_thousand_pairs_of_a_rule_and_an_event() -> None:
    count = 0

    @seed(drawn())
    @settings(max_examples=12_000)
    @RULES_AND_EVENTS
    def compare(**drawn_values: Any) -> None:  # of hypothesis
        nonlocal count
        count += compared(**drawn_values)

    compare()
    assert count >= 50_000


def compared(*, rules: list[dict[str, Any]], copies: int, type_: str, header: str, query: str, body: object) -> int:
    """Compare the index and `explain` with the plain meaning of rules; return of how many."""
    # Several copies of each, since where values are rare no key of several paths is made.
    rules = rules * copies
    table = RouteTable([a_route(f"r{n}", match=match) for n, match in enumerate(rules)])
    view = EventView.of(an_event(type=type_, headers={"H": header}, query=f"q={query}", body=body))
    event = {"type": type_, "headers": {"h": header}, "query": {"q": query}, "body": body}
    expected = [f"r{n}" for n, match in enumerate(rules) if naively_holds(match, event)]
    assert names(table, view) == expected
    assert [explained.name for explained in table.explain(view, table.match(view)) if explained.matched] == expected
    return len(rules)
