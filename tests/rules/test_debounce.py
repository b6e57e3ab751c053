"""`debounce:` of a route: what its key is, what explains it, and what it can't be with."""

from pathlib import Path

import pytest

from gateway.engine.deliveries_of_event import plan
from gateway.model import RulesError
from gateway.ops.explain import explain
from gateway.rules.event_view import EventView
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from tests.builders import an_event

RULES = """
version: 1
sources: {{cms: {{verify: {{scheme: none}}}}}}
destinations: {{ci: {{url: "http://127.0.0.1:1/"}}}}
routes:
  - {{name: build, from: cms, to: ci, {keys}}}
"""
DEBOUNCED = "debounce: {key: body.site, quiet: 30s}"


def rules_of(folder: Path, keys: str = DEBOUNCED) -> Rules:
    (file := folder / "routes.yaml").write_text(RULES.format(keys=keys))
    return load_rules(file)


def problems(folder: Path, keys: str) -> str:
    (file := folder / "routes.yaml").write_text(RULES.format(keys=keys))
    with pytest.raises(RulesError) as raised:
        load_rules(file)
    return str(raised.value)


def test_a_debounced_route_keeps_the_order_of_its_key(tmp_path: Path) -> None:
    rules = rules_of(tmp_path)
    route = rules.routes["build"]
    assert route.debounce is not None
    assert (route.debounce.quiet, route.order, route.retry.max_age) == (30.0, "key", 3600.0)
    assert rules.ordered == {("build", "ci")}


@pytest.mark.parametrize(
    ("key", "body", "expected"),
    [
        ("body.site", {"site": "a"}, "a"),
        ("body.site", {"site": 7}, "7"),
        ("body.site + '/' + body.page", {"site": "a", "page": "b"}, "a/b"),
        ("body.site", {"site": ""}, ""),
        ("body.site", {"site": ["a"]}, ""),
        ("body.site", {}, ""),
        ("body.site.name", {"site": "a"}, ""),
        ("body.site + 1", {"site": "a"}, ""),
        ("body.site", {"site": "x" * 1024}, "x" * 1024),
        ("'all'", {}, "all"),
        ("key", {}, "own"),
    ],
)
def test_the_key_of_an_event(tmp_path: Path, key: str, body: object, expected: str) -> None:
    rules = rules_of(tmp_path, f'debounce: {{key: "{key}", quiet: 1s}}')
    event = an_event(source="cms", key="own", body=body)
    view = EventView.of(event)
    [planned] = plan(event, view, rules.table.match(view))
    assert planned.delivery.burst == expected
    assert planned.end is None, "without a key it is delivered all the same"
    assert planned.is_ordered
    assert planned.delivery.event == event


def test_a_long_key_is_replaced_by_its_digest(tmp_path: Path) -> None:
    """A record has it twice: one that is as large as a record is could be stored nowhere, not even as a dead letter."""
    debounce = rules_of(tmp_path).routes["build"].debounce
    assert debounce is not None
    one, other = [debounce.key_of(EventView.of(an_event(body={"site": "x" * 2_000_000 + end}))) for end in "ab"]
    assert one.startswith("blake2b:")
    assert (len(one), len(other)) == (72, 72)
    assert one != other


def test_all_destinations_have_the_same_key(tmp_path: Path) -> None:
    """Though a view lets the expressions over a large event take only so much time."""
    destinations = ", ".join([f'd{number}: {{url: "http://127.0.0.1:1/"}}' for number in range(20)])
    text = RULES.format(keys='debounce: {key: "body.items.map(i, string(i.n))[0] + body.site", quiet: 1s}')
    text = text.replace('ci: {url: "http://127.0.0.1:1/"}', destinations)
    (file := tmp_path / "routes.yaml").write_text(
        text.replace("to: ci", f"to: [{', '.join([f'd{n}' for n in range(20)])}]")
    )
    rules = load_rules(file)
    event = an_event(source="cms", body={"site": "a", "items": [{"n": number} for number in range(300)]})
    view = EventView.of(event)
    assert {each.delivery.burst for each in plan(event, view, rules.table.match(view))} == {"0a"}
    headers = ((b"content-type", b"application/json"),)
    [route] = explain(rules, source="cms", headers=headers, query="", body=event.body, now=0.0).routes
    assert "'0a'" in route.wait


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("debounce: {key: body.site}", ".debounce: expected the key 'quiet'"),
        ("debounce: {quiet: 30s}", ".debounce: expected the key 'key'"),
        ("debounce: {key: body.site, quiet: 11m}", ".quiet: expected a duration from 1s to 10m"),
        ("debounce: {key: body.site, quiet: 500ms}", ".quiet: expected a duration from 1s to 10m"),
        ("debounce: {key: 'body.', quiet: 30s}", ".key: "),
        ("debounce: {key: item.site, quiet: 30s}", "item"),
        (f"{DEBOUNCED}, order: key", "expected no `order` with `debounce`, got one: it keeps an order"),
        (f"{DEBOUNCED}, delay: 5m", "expected no `delay` with `debounce`, got one: it delays"),
        (f"{DEBOUNCED}, split: body.pages", "expected no `split` with `debounce`, got one"),
        (f"{DEBOUNCED}, on_exhausted: halt", "`on_exhausted` needs `order: key`"),
    ],
)
def test_what_is_refused(tmp_path: Path, keys: str, expected: str) -> None:
    assert expected in problems(tmp_path, keys)


def test_no_template_names_the_destination_of_a_debounced_route(tmp_path: Path) -> None:
    text = RULES.format(keys=DEBOUNCED).replace("to: ci", "to: '${{ body.to }}'")
    (file := tmp_path / "routes.yaml").write_text(text)
    with pytest.raises(RulesError, match="expected names of destinations with `debounce`, got a template"):
        load_rules(file)


def test_no_sender_waits_for_a_destination_that_gets_the_last_event_alone(tmp_path: Path) -> None:
    text = RULES.format(keys=DEBOUNCED).replace(
        "scheme: none}", "scheme: none}, respond: {after_delivery: {destination: ci}}"
    )
    (file := tmp_path / "routes.yaml").write_text(text)
    with pytest.raises(RulesError, match="without `delay`, `debounce` and `split`, got one whose response comes late"):
        load_rules(file)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"site": "a"}', "delivered once 'a' was quiet for 30s, or superseded by its next event until then"),
        (b"{}", "delivered after 30s: it has no key by which another could supersede it"),
    ],
)
def test_explain_tells_for_what_an_event_waits(tmp_path: Path, body: bytes, expected: str) -> None:
    headers = ((b"content-type", b"application/json"),)
    [route] = explain(rules_of(tmp_path), source="cms", headers=headers, query="", body=body, now=0.0).routes
    assert route.wait == expected
    assert len(route.requests) == 1


def test_its_key_may_use_what_the_route_names(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, "let: {site: body.site.lower()}, debounce: {key: site + '!', quiet: 30s}")
    debounce = rules.routes["build"].debounce
    assert debounce is not None
    assert debounce.key_of(EventView.of(an_event(body={"site": "ACME"}))) == "acme!"
