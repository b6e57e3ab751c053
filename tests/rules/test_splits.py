"""`split:` of a route: what its items are, what names them, and what is refused."""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from gateway.bodies.content import read
from gateway.client.request import compose
from gateway.engine.deliveries_of_event import Planned, plan, plan_rest
from gateway.model import Delivery, Event, EventId, delivery_id
from gateway.ops.explain import explain
from gateway.rules import splits
from gateway.rules.event_view import MAX_COST, EventView
from gateway.rules.expressions import Expression
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Route, Rules
from gateway.rules.splits import MAX_HELD, MAX_ITEMS, SplitEvent
from tests.builders import an_event

RULES = """
version: 1
sources: {{github: {{verify: {{scheme: none}}}}}}
destinations: {{ci: {{url: "http://127.0.0.1:1/"}}, log: {{url: "http://127.0.0.1:1/log"}}}}
routes:
  - {{name: r, from: github, to: ci, {keys}}}
"""
COMMITS = {"repo": "a/b", "commits": [{"id": "1", "by": "ann"}, {"id": "2"}, "x", None]}


def rules_of(folder: Path, keys: str) -> Rules:
    (file := folder / "routes.yaml").write_text(RULES.format(keys=keys))
    return load_rules(file)


def deliveries(rules: Rules, body: object) -> list[tuple[Delivery, str]]:
    event = an_event(body=body)
    view = EventView.of(event)
    planned = plan(event, view, rules.table.match(view))
    return [(each.delivery, "" if each.end is None else f"{each.end.reason}: {each.end.detail}") for each in planned]


def sent(rules: Rules, body: object) -> list[tuple[str, str]]:
    """Return the bodies that would be sent, and why others wouldn't."""
    event = an_event(body=body)
    explained = explain(rules, source="github", headers=event.headers, query="", body=event.body, now=0.0)
    return [
        ("" if each.request is None else each.request.body.decode(), each.problem)
        for route in explained.routes
        for each in route.requests
    ]


def test_each_item_is_a_delivery_with_an_id_of_its_own(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, "split: body.commits")
    made = [delivery for delivery, _ in deliveries(rules, {"commits": ["a", "b", "a", {"x": 1, "y": 2}]})]
    assert [delivery.part and delivery.part.number for delivery in made] == [0, 1, 2, 3]
    whole = delivery_id(made[0].event.id, "r", "ci")
    assert len({whole, *[delivery.id for delivery in made]}) == 5
    others = [delivery for delivery, _ in deliveries(rules, {"commits": ["b", {"y": 2, "x": 1}, "a"]})]
    assert [delivery.id for delivery in others] == [made[1].id, made[3].id, made[0].id], "wherever it is in the list"


def test_an_item_is_the_body_unless_the_request_has_another(tmp_path: Path) -> None:
    assert sent(rules_of(tmp_path, "split: body.commits"), COMMITS) == [
        ('{"id":"1","by":"ann"}', ""),
        ('{"id":"2"}', ""),
        ('"x"', ""),
        ("null", ""),
    ]
    keys = "split: body.commits, request: {body: \"${{ body.repo }}/${{ item.id }} ${{ default(item.by, '-') }}\"}"
    assert sent(rules_of(tmp_path, keys), {**COMMITS, "commits": COMMITS["commits"][:2]}) == [
        ("a/b/1 ann", ""),
        ("a/b/2 -", ""),
    ]


def test_an_item_has_the_content_type_of_json_and_nothing_of_the_senders(tmp_path: Path) -> None:
    event = an_event(body=COMMITS, headers={"Content-Type": "application/json", "X-Of-Sender": "1"})
    rules = rules_of(
        tmp_path, "split: body.commits, request: {headers: {X-Id: '${{ item.id }}'}, path: '/c/${{ item.id }}'}"
    )
    explained = explain(rules, source="github", headers=event.headers, query="", body=event.body, now=0.0)
    first, *_, last = explained.routes[0].requests
    assert first.request is not None
    headers = dict(first.request.headers)
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"X-Id"] == b"1"
    assert b"X-Of-Sender" not in headers
    assert first.request.path == "/c/1"
    assert last.request is None, "null has no id"
    assert [each.part for each in explained.routes[0].requests] == [0, 1, 2, 3]


def test_a_list_may_be_computed(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, 'split: "body.commits.filter(c, type(c) == map && has(c.by))"')
    ((body, _),) = sent(rules, COMMITS)
    assert json.loads(body) == COMMITS["commits"][0]
    rules = rules_of(tmp_path, 'let: {every: body.commits}, split: every, request: {body: {it: "${{ item }}"}}')
    assert sent(rules, {"commits": [1, 2]}) == [('{"it":1}', ""), ('{"it":2}', "")]


def test_names_of_loops_and_macros_are_as_ever(tmp_path: Path) -> None:
    keys = (
        "split: body.rows, request: {body: {a: {for: item.tags, as: item, do: '${{ item }}'}, "
        "b: \"${{ item.tags.map(item, item + '!') }}\"}}"
    )
    assert sent(rules_of(tmp_path, keys), {"rows": [{"tags": ["x", "y"]}]}) == [('{"a":["x","y"],"b":["x!","y!"]}', "")]


def test_without_items_there_is_no_delivery(tmp_path: Path) -> None:
    assert deliveries(rules_of(tmp_path, "split: body.commits"), {"commits": []}) == []


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "split: body.commits isn't there"),
        ({"commits": {"a": 1}}, "split: expected a list, got a mapping"),
        ({"commits": None}, "split: expected a list, got null"),
        ({"commits": [0] * (MAX_ITEMS + 1)}, "split: expected at most 1,000 items, got 1,001"),
    ],
)
def test_what_is_no_list_is_one_dead_letter(body: object, detail: str, tmp_path: Path) -> None:
    ((delivery, told),) = deliveries(rules_of(tmp_path, "split: body.commits"), body)
    assert told == f"expression_error: {detail}"
    assert delivery.part is None


def test_an_item_that_is_nested_too_deeply_is_a_dead_letter(tmp_path: Path) -> None:
    """It would end each process that reads it."""
    body = b'{"commits": [' + b"[" * 600 + b"]" * 600 + b"]}"
    ((_, told),) = deliveries(rules_of(tmp_path, "split: body.commits"), body)
    assert told.startswith("expression_error: split: expected items of JSON values: ")


def test_many_items_take_a_bounded_time_and_memory(tmp_path: Path) -> None:
    """The record of each item's retry has the whole event."""
    rules = rules_of(tmp_path, "split: body.commits")
    assert len(deliveries(rules, {"commits": [{"id": "x" * 40}] * MAX_ITEMS})) == MAX_ITEMS
    ((_, told),) = deliveries(rules, {"commits": [{"id": "x" * 900}] * 500})
    assert told.startswith("expression_error: split: expected at most 64 MiB of bodies for all items together, got 500")


def test_a_list_is_computed_once_for_all_deliveries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destinations = ", ".join([f"{{name: d{number}, url: 'http://127.0.0.1:1/'}}" for number in range(8)])
    keys = f"split: \"body.commits.filter(c, c.message.startsWith('FIX-'))\", to: [{destinations}]"
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys=keys).replace("to: ci, ", ""))
    rules = load_rules(file)
    computed: list[str] = []
    evaluate = Expression.evaluate

    def counted(expression: Expression, view: EventView) -> object:
        computed.append(expression.text)
        return evaluate(expression, view)

    monkeypatch.setattr(Expression, "evaluate", counted)
    made = deliveries(rules, {"commits": [{"message": f"FIX-{number}: {'x' * 100}"} for number in range(150)]})
    assert len(made) == 8 * 150
    assert not any(end for _, end in made)
    route = rules.routes["r"]
    for delivery, _ in made[:20]:
        compose(delivery, rules.destinations["d0"], route.request, now=0.0, split=route.split)
    assert len(computed) == 1


def many_routes(folder: Path, splits: Sequence[str]) -> Rules:
    routes = [f"  - {{name: r{number}, from: github, to: ci, split: {each}}}" for number, each in enumerate(splits)]
    (file := folder / "routes.yaml").write_text(RULES.partition("  - ")[0].format() + "\n".join(routes))
    return load_rules(file)


def test_an_event_is_parsed_once_for_all_routes_that_split_it_and_for_their_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []

    def counted(content: bytes, coding: str, content_type: str) -> object:
        parsed.append(len(content))
        return read(content, coding, content_type)

    monkeypatch.setattr("gateway.rules.event_view.read", counted)
    rules = many_routes(tmp_path, ["body.commits", "body.others", '"body.commits.filter(c, c != 1)"'] * 6)
    body = {"commits": [{"price": 1.10, "n": number} for number in range(20)], "others": ["x", "y"]}
    made = [delivery for delivery, _ in deliveries(rules, body)]
    assert len(made) == (20 + 2 + 20) * 6
    again = an_event(body=body)  # as the record of a retry has it
    for delivery in [*made, *[replace(each, event=again) for each in made]]:
        route = rules.routes[delivery.route]
        compose(delivery, rules.destinations["ci"], route.request, now=0.0, split=route.split)
    assert parsed == [len(again.body)]


def planned_of(rules: Rules, event: Event) -> list[Planned]:
    view = EventView.of(event)
    return plan(event, view, rules.table.match(view))


def attempted(rules: Rules, delivery: Delivery) -> None:
    route = rules.routes[delivery.route]
    compose(delivery, rules.destinations[delivery.destination], route.request, now=0.0, split=route.split)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were parsed each time."""
    sizes: list[int] = []

    def counted(content: bytes, coding: str, content_type: str) -> object:
        sizes.append(len(content))
        return read(content, coding, content_type)

    monkeypatch.setattr("gateway.rules.event_view.read", counted)
    return sizes


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The expressions that were evaluated."""
    texts: list[str] = []
    evaluate = Expression.evaluate

    def counted(expression: Expression, view: EventView) -> object:
        texts.append(expression.text)
        return evaluate(expression, view)

    monkeypatch.setattr(Expression, "evaluate", counted)
    return texts


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cost units that were spent."""
    units: list[int] = []
    spend = EventView.spend

    def counted(view: EventView, cost_units: int) -> bool:
        is_spent = spend(view, cost_units)
        units.append(cost_units if is_spent else 0)
        return is_spent

    monkeypatch.setattr(EventView, "spend", counted)
    return units


def test_the_lists_of_all_routes_share_the_budget_of_an_event(tmp_path: Path, spent: list[int]) -> None:
    """Otherwise an event that many routes split would keep all others waiting for seconds."""
    item = [{"id": number} for number in range(50)]
    rules = many_routes(tmp_path, [f'"body.items.filter(i, i != {number})"' for number in range(30)])
    event = an_event(body={"items": [item] * 60})
    view = EventView.of(event)
    planned = plan(event, view, rules.table.match(view))
    assert not any(each.end for each in planned)
    whole = [each.delivery for each in planned if each.delivery.part is None]
    assert 10 < len(whole) < 30
    assert len(planned) == len(whole) + 60 * (30 - len(whole))
    assert sum(spent) <= MAX_COST
    spent.clear()
    for delivery in whole:  # each in a turn of its own
        spent.append(0)
        assert len(plan_rest(event, rules.routes[delivery.route], delivery)) == 60
        assert 0 < sum(spent) <= MAX_COST
        spent.clear()
    kept = [each.delivery for each in planned if each.delivery.part is not None][-1]
    for each in (kept, replace(kept, event=an_event(id="evt_2", body={"items": [item] * 60}))):
        attempted(rules, each)


def test_no_route_takes_what_another_needs_for_a_list(tmp_path: Path) -> None:
    """Whose routes are there already, and what they compute, doesn't make dead letters of other teams' deliveries."""
    heavy = [f'"body.items.filter(i, i != {number})"' for number in range(20)]
    light = [f'"body.few.filter(i, i.site == {number})"' for number in range(50)]
    rules = many_routes(tmp_path, [*heavy, *light])
    item = [{"id": number} for number in range(50)]
    event = an_event(body={"items": [item] * 60, "few": [{"site": number} for number in range(200)]})
    planned = planned_of(rules, event)
    whole = [each.delivery for each in planned if each.delivery.part is None]
    assert len(whole) > 50
    rest = [each for delivery in whole for each in plan_rest(event, rules.routes[delivery.route], delivery)]
    made = [each for each in [*planned, *rest] if each.delivery.part is not None]
    assert Counter(each.delivery.route for each in made) == {f"r{n}": 60 if n < 20 else 1 for n in range(70)}
    assert not any(each.end for each in [*planned, *rest])


def test_a_list_that_is_too_much_by_itself_is_a_dead_letter(tmp_path: Path) -> None:
    """Also if others have left nothing of the budget: it is refused once it has all of it."""
    heavy = [f'"body.items.filter(i, i != {number})"' for number in range(30)]
    rules = many_routes(tmp_path, [*heavy, "\"body.items.filter(i, body.items.exists(j, j == i && i == 'x'))\""])
    event = an_event(body={"items": [[{"id": number} for number in range(50)]] * 60})
    whole = next(each for each in planned_of(rules, event) if each.delivery.route == "r30")
    assert whole.end is None
    assert whole.delivery.part is None
    (planned,) = plan_rest(event, rules.routes["r30"], whole.delivery)
    assert planned.end is not None
    assert planned.end.detail.startswith("split: ")
    assert "too much to compute" in planned.end.detail


@pytest.mark.parametrize(
    ("split", "body", "detail"),
    [
        ("body.items.filter(i, i.kind.name == 'x')", {"items": [{"kind": {"name": 1}}, {}]}, "split: kind isn't there"),
        ("body.items", {"items": [0] * 1001}, "split: expected at most 1,000 items, got 1,001"),
    ],
)
def test_a_list_that_fails_is_computed_once_for_all_destinations(
    tmp_path: Path, computed: list[str], split: str, body: object, detail: str
) -> None:
    destinations = ", ".join([f"{{name: d{number}, url: 'http://127.0.0.1:1/'}}" for number in range(100)])
    keys = f'split: "{split}", to: [{destinations}]'
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys=keys).replace("to: ci, ", ""))
    rules = load_rules(file)
    event = an_event(body=body)
    planned = planned_of(rules, event)
    assert [each.end.detail for each in planned if each.end is not None] == [detail] * 100
    assert computed == [split]
    route = rules.routes["r"]
    assert plan_rest(event, route, planned[0].delivery) == planned[:1]
    assert plan_rest(event, route, planned[1].delivery) == planned[1:2]
    assert computed == [split] * 2, "once more, as such an event isn't kept for attempts that never come"


def test_items_that_json_lacks_are_found_once_for_all_destinations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[object] = []
    digest = splits._digest

    def counted(item: object) -> str:
        digested.append(item)
        return digest(item)

    monkeypatch.setattr(splits, "_digest", counted)
    destinations = ", ".join([f"{{name: d{number}, url: 'http://127.0.0.1:1/'}}" for number in range(9)])
    keys = f"split: body.items, to: [{destinations}]"
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys=keys).replace("to: ci, ", ""))
    planned = planned_of(load_rules(file), an_event(body=b'{"items": [1,2,' + b"[" * 600 + b"]" * 600 + b"]}"))
    assert len([each for each in planned if each.end is not None]) == 9
    assert len(digested) == 3


def test_routes_at_different_events_take_nothing_from_each_other(
    tmp_path: Path, parsed: list[int], computed: list[str]
) -> None:
    """One slow destination is enough to spread them: each attempt would parse, and delay all others."""
    rules = many_routes(tmp_path, ["body.items", "body.others", "\"body.items.filter(i, i != 'y')\"", "body.items"])
    body = {"items": ["x" * 60_000] * 10, "others": [1, 2]}
    events = [an_event(id=f"evt_{number}", body=body) for number in range(4)]
    made = [each.delivery for event in events for each in planned_of(rules, event)]
    lanes = [
        [each for each in made if each.route == f"r{number}" and each.event is event]
        for number, event in enumerate(events)
    ]
    parsed.clear()
    computed.clear()
    for turn in range(10):
        for lane in lanes:
            attempted(rules, lane[turn % len(lane)])
    assert len(parsed) <= 4, "once for each event"
    assert len(computed) <= 4


def test_what_many_routes_hold_of_events_is_bounded(tmp_path: Path, parsed: list[int]) -> None:
    """One route for each tenant, and each takes other events; or all of them take one, which counts once."""
    rules = many_routes(tmp_path, [f'"body.items.filter(i, i != {number})"' for number in range(600)])
    routes = [rules.routes[f"r{number}"] for number in range(600)]
    body = {"items": ["x" * 30_000]}

    def attempt(route: Route, event: Event) -> None:
        assert route.split is not None
        [part] = route.split.parts(SplitEvent.of(event)) or ()
        route.split.view(event, part)

    def held() -> list[int]:
        lasts = [(number, route.split.last) for number, route in enumerate(routes) if route.split is not None]
        return [number for number, last in lasts if last is not None]

    for number, route in enumerate(routes):
        attempt(route, an_event(id=f"evt_{number}", body=body))
    alone = held()
    assert alone == list(range(600 - len(alone), 600)), "the last ones"
    assert MAX_HELD * 0.9 < len(alone) * 2 * 30_000 < MAX_HELD * 1.1, "each with its list"
    shared = an_event(id="evt_of_all", body=body)
    for route in routes:
        attempt(route, shared)
    assert held() == list(range(600))
    parsed.clear()
    for route in routes:
        attempt(route, shared)
    assert parsed == []
    attempt(routes[0], an_event(id="evt_large", body={"items": ["x" * 1_900_000]}))
    assert held() == list(range(600)), "there is room for both"


def test_destinations_at_different_events_take_nothing_from_each_other(
    tmp_path: Path, parsed: list[int], computed: list[str]
) -> None:
    """What a list cost, which is nearly the whole budget here, says little about the memory that it takes."""
    rules = many_routes(tmp_path, ["\"body.items.filter(i, i.shop == 'X' || i.name != 'y')\""])
    body = {"items": [{"shop": "X", "name": "n"}] * 500}
    made = [planned_of(rules, an_event(id=f"evt_{number}", body=body))[0].delivery for number in range(3)]
    assert not any(each.part is None for each in made)
    parsed.clear()
    computed.clear()
    for _ in range(10):
        for each in made:
            attempted(rules, each)
    assert (parsed, computed) == ([], [])


def test_no_list_of_an_event_takes_the_place_of_anothers(tmp_path: Path, computed: list[str]) -> None:
    """The lanes of many routes take turns."""
    lists = [f"body.items.filter(i, i.shop == 'X' || i.n == {number})" for number in range(30)]
    rules = many_routes(tmp_path, [f'"{each}"' for each in lists])
    event = an_event(body={"items": [{"shop": "X", "name": "n" * 1000, "n": 1}] * 200})
    made = planned_of(rules, event)
    for each in [each for each in made if each.delivery.part is None]:
        made += plan_rest(event, rules.routes[each.delivery.route], each.delivery)
    firsts = {each.delivery.route: each.delivery for each in made if each.delivery.part is not None}
    assert len(firsts) == 30
    computed.clear()
    for _ in range(5):
        for delivery in firsts.values():
            attempted(rules, delivery)
    assert len(computed) <= 30, "once for each"


def test_an_event_counts_with_its_body_though_no_list_reads_it(tmp_path: Path) -> None:
    rules = many_routes(tmp_path, ['"[1, 2]"'])
    event = an_event(body={"items": ["x" * 100_000]})
    assert len(planned_of(rules, event)) == 2
    assert SplitEvent.of(event).weight > 100_000


def test_of_all_events_that_were_split_as_much_is_kept_as_one_may_have(tmp_path: Path) -> None:
    rules = many_routes(tmp_path, ["body.items", '"body.items.filter(i, i != 1)"'])
    compressed = gzip.compress(json.dumps({"items": ["x" * 40_000] * 40}).encode())
    kept = splits._kept._events
    kept.clear()
    for number in range(600):
        items = ["x" * 10_000] * 40 if number % 40 == 0 else ["x"]
        event = an_event(id=f"evt_{number}", body={"items": items})
        if number == 300:
            event = replace(event, headers=((b"Content-Encoding", b"gzip"),), body=compressed)
        view = EventView.of(event)
        made = plan(event, view, rules.table.match(view))
        assert sum([each.weight for each in kept.values()]) <= splits.MAX_KEPT or len(kept) == 1
        if all(each.end is None for each in made):
            assert event.id in kept
        assert not view.contexts or all(each._view is not view for each in kept.values())
        if number == 300:
            assert kept[EventId("evt_300")].weight > 40_000 * 40
    assert len(kept) <= 128


def test_lists_that_attempts_compute_over_one_event_are_kept_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt has a budget of its own: of a hundred routes, a list each would be kept."""
    monkeypatch.setattr(splits, "MAX_ADDED", 100_000)
    rules = many_routes(tmp_path, [f'"body.items.filter(i, i != {number})"' for number in range(20)])
    event, weights = an_event(body={"items": [[[number] * 10] * 10 for number in range(20)]}), []
    one = SplitEvent.of(event)
    for number in range(20):
        split, one = rules.routes[f"r{number}"].split, SplitEvent.of(event)
        assert split is not None
        assert len(split.parts(one) or ()) == 20
        assert one is SplitEvent.of(event)
        weights.append(one.weight)
    assert 80_000 < max(weights) <= 100_000 + splits.MIN_KEPT
    assert len(one._lists) < 10


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "request: {body: '${{ item.id }}'}",
            "expected CEL in ${{ … }}, got '${{ item.id }}': unknown name 'item' at ",
        ),
        (
            "request: {body: '${{ each.id }}'}",
            "expected CEL in ${{ … }}, got '${{ each.id }}': unknown name 'each' at ",
        ),
        ("split: off", "expected CEL of a list, got 'off': a route without `split` splits nothing"),
        ("debounce: 30s", "expected a mapping with `key` and `quiet`, got '30s'"),
        (
            "split: item.id",
            "expected CEL of a list, such as body.commits, got 'item.id': unknown name 'item' at character 1",
        ),
        ("split: body.c, when: item.id == 1", "expected a CEL expression, got 'item.id == 1': unknown name 'item'"),
        ("split: body.c, let: {a: item.b}, when: a == 1", "expected an expression over the event, got one over `item`"),
        ("split: body.c, order: key", "expected no `split` with `order: key`, got one: the log tells "),
        ("split: [body.c]", "expected CEL of a list, such as body.commits, got a list"),
        ("let: {item: body.a}, split: body.c", "expected another name, got 'item', the item of `split`"),
        ("split: body.", "expected CEL of a list, such as body.commits, got 'body.': "),
    ],
)
def test_mistakes(keys: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(keys=keys))
    rules, problems = check_rules(file)
    assert rules is None
    told = [problem.message for problem in problems if problem.severity == "error"]
    assert any(each.startswith(message) for each in told), told


@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.parametrize(
    "item",
    [
        b'{"wei": 18446744073709551617, "price": 1.10}',
        b'[1.0, {"x": [1e2, "\\ud83d"]}]',
        b"-0.0",
        b"123456789012345678901234567890",
    ],
)
def test_the_numbers_of_an_item_are_sent_as_they_came(tmp_path: Path, item: bytes, coding: str) -> None:
    body = b'{"commits": [{"id":"1"} , ' + item + b" ,2]}"
    headers = {"Content-Type": "application/json", **({"Content-Encoding": coding} if coding else {})}
    event = an_event(body=gzip.compress(body) if coding else body, headers=headers)
    for where in ("body.commits", "body.commits.filter(x, true)"):
        rules = rules_of(tmp_path, f"split: {json.dumps(where)}")
        view = EventView.of(event)
        made = [each.delivery for each in plan(event, view, rules.table.match(view))]
        route, to = rules.routes["r"], rules.destinations["ci"]
        found = [compose(each, to, route.request, now=0.0, split=route.split).body for each in made]
        if where == "body.commits":
            assert found == [b'{"id":"1"}', item, b"2"]
        else:  # what is computed is no text of the body
            assert [json.loads(each) for each in found] == [{"id": "1"}, orjson.loads(item.replace(b"\\", b"\\\\")), 2]
