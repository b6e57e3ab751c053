"""`foreach:`: one written route for many."""

import time
from pathlib import Path

import pytest

from gateway.rules.event_view import EventView
from gateway.rules.foreach import expand, growth
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Rules
from gateway.rules.yaml_document import Node, parse_document
from tests.builders import an_event

RULES = """
version: 1
sources: {shop: {verify: {scheme: none}}}
destinations: {tenant-acme: {url: "http://127.0.0.1:1/"}, tenant-beta: {url: "http://127.0.0.1:1/"}}
routes:
  - name: first
    from: shop
    to: tenant-acme
"""
MANY = """
  - foreach: [acme, beta]
    name: orders-${{ each }}
    from: shop
    match: {body.tenant: "${{ each }}"}
    to: tenant-${{each}}
"""
MAPPINGS = """
  - foreach:
      - {tenant: acme, least: 10, url: "${ACME_URL}", share: 10%}
      - {tenant: beta, least: 2.5, url: "http://127.0.0.1:3/", share: 100%}
    name: orders-${{ each.tenant }}
    from: shop
    sample: ${{ each.share }}
    match: {body.amount: {gte: "${{ each.least }}"}}
    when: body.tenant == '${{ each.tenant }}' && body.n > ${{ each.least }}
    to: {name: "own-${{ each.tenant }}", url: "${{ each.url }}"}
    request: {body: {text: "${{ each.tenant }}: ${{ body.text }}", least: "${{ each.least }}"}}
"""


def load(folder: Path, routes: str) -> Rules:
    (file := folder / "routes.yaml").write_text(RULES + routes)
    return load_rules(file, environ={"ACME_URL": "http://127.0.0.1:2/secret"})


def problems(folder: Path, routes: str) -> list[str]:
    (file := folder / "routes.yaml").write_text(RULES + routes)
    rules, found = check_rules(file, environ={})
    assert rules is None
    return [str(each).partition("routes.yaml:")[2] for each in found if each.severity == "error"]


def test_a_list_of_values(tmp_path: Path) -> None:
    rules = load(tmp_path, MANY)
    assert list(rules.routes) == ["first", "orders-acme", "orders-beta"]
    assert rules.routes["orders-beta"].destinations == ("tenant-beta",)
    view = EventView.of(an_event(source="shop", body={"tenant": "beta"}))
    assert [route.name for route, _ in rules.table.match(view)] == ["first", "orders-beta"]


def test_a_field_of_a_request_that_is_called_so_is_one_like_others(tmp_path: Path) -> None:
    rules = load(tmp_path, MANY.rstrip() + '\n    request: {body: {foreach: ["${{ each }}"]}}\n')
    found = [rules.routes[f"orders-{tenant}"].request for tenant in ("acme", "beta")]
    view = EventView.of(an_event(source="shop", body={}))
    assert [each and each.body and each.body.render(view) for each in found] == [
        {"foreach": ["acme"]},
        {"foreach": ["beta"]},
    ]


def test_a_list_of_mappings_in_every_key(tmp_path: Path) -> None:
    rules = load(tmp_path, MAPPINGS)
    acme, beta = rules.routes["orders-acme"], rules.routes["orders-beta"]
    assert rules.destinations["own-acme"].url == "http://127.0.0.1:2/secret"
    assert rules.destinations["own-beta"].url == "http://127.0.0.1:3/"
    assert acme.eligibility is not None
    assert acme.eligibility.sample == 0.1
    assert beta.eligibility is None
    view = EventView.of(an_event(source="shop", body={"tenant": "beta", "amount": 3, "n": 2.6, "text": "hi"}))
    assert beta.match is not None
    assert beta.match.holds(view)
    assert beta.when is not None
    assert beta.when.is_true(view)
    assert beta.request is not None
    assert beta.request.body is not None
    assert beta.request.body.render(view) == {"text": "beta: hi", "least": 2.5}


@pytest.mark.parametrize(
    ("routes", "messages"),
    [
        (
            MANY.replace("orders-${{ each }}", "orders"),
            ["11:11: routes[1].name: expected a name with ${{ each }} in it, got the same one for each route"],
        ),
        (
            MANY.replace("tenant-${{each}}", "tenant-${{each.name}}"),
            ["14:9: routes[1].to: unknown name 'each.name', did you mean 'each'?"],
        ),
        (
            MAPPINGS.replace("${{ each.share }}", "${{ each.part }}"),
            [
                "15:13: routes[1].sample: unknown name 'each.part', did you mean 'each.share'?",
            ],
        ),
        (
            MANY.replace("[acme, beta]", "[]"),
            ["10:14: routes[1].foreach: expected a list of values, or of mappings with values, with at least one item"],
        ),
        (
            MANY.replace("[acme, beta]", "acme"),
            ["10:14: routes[1].foreach: expected a list of values, or of mappings with values, with at least one item"],
        ),
        (
            MANY.replace("beta]", "[beta]]"),
            ["10:21: routes[1].foreach[1]: expected a string, a number, true or false"],
        ),
        (
            MANY.replace("beta]", '"be\'ta"]'),
            [
                "10:21: routes[1].foreach[1]: expected a string without quotes, backslashes and control characters",
            ],
        ),
        (
            MANY.replace("beta]", "gamma]"),
            ["14:9: routes[1].to: unknown destination 'tenant-gamma', did you mean 'tenant-acme'?"],
        ),
        (
            MANY.replace("[acme, beta]", "[acme, acme]"),
            ["11:11: routes[1].name: duplicate route 'orders-acme', first defined at FILE:11:11"],
        ),
    ],
)
def test_mistakes(routes: str, messages: list[str], tmp_path: Path) -> None:
    found = [each.replace(str(tmp_path / "routes.yaml"), "FILE") for each in problems(tmp_path, routes)]
    assert found[: len(messages)] == messages


def test_it_makes_no_more_text_than_there_is_room_for(tmp_path: Path) -> None:
    """A hundred kilobytes of rules made gigabytes of text."""
    text = "${{ each }}" * 3_000
    route = f"{{foreach: ['{'v' * 60_000}'], name: r, from: shop, to: tenant-acme, request: {{body: '{text}'}}}}"
    (found,) = problems(tmp_path, f"  - {route}")
    assert found.endswith("routes[1].foreach: expected at most 33,554,432 characters with items, got more")


def nodes_of(node: Node) -> list[Node]:
    below = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    return [node, *[each for child in below for each in nodes_of(child)]]


@pytest.mark.parametrize("routes", [MANY, MAPPINGS, MANY + MAPPINGS, MANY.replace("beta]", "beta, 10]"), ""])
def test_what_it_would_make_is_told_before_it_is_made(routes: str) -> None:
    root = parse_document("routes.yaml", RULES + routes, [])
    assert root is not None
    told, before = growth(root), nodes_of(root)
    expand(root, [])
    assert told.values == len([node for node in nodes_of(root) if node not in before])


def test_the_characters_that_it_would_insert_are_told() -> None:
    root = parse_document("routes.yaml", RULES + MANY, [])
    assert root is not None
    texts = ("orders-${{ each }}", "${{ each }}", "tenant-${{each}}")
    assert growth(root).characters == sum([len(text) + len(item) for text in texts for item in ("acme", "beta")])


def test_what_is_too_much_is_refused_before_any_of_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Node:
        raise AssertionError("no copy is made")

    monkeypatch.setattr("gateway.rules.foreach._Expansion._copy", fail)
    monkeypatch.setattr("gateway.rules.foreach.MAX_VALUES", 9)
    (found,) = problems(tmp_path, MANY)
    assert found.endswith("foreach: expected at most 9 values in all routes together, got more")


def test_it_makes_no_more_values_than_a_file_may_have(tmp_path: Path) -> None:
    items = ", ".join(f"t{number}" for number in range(2000))
    body = ", ".join(f"k{number}: 1" for number in range(600))
    name = "a-${{ each }}"
    (found,) = problems(
        tmp_path,
        f"  - {{foreach: [{items}], name: '{name}', from: shop, to: tenant-acme, request: {{body: {{{body}}}}}}}",
    )
    assert "values in all routes together, got more" in found


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (
            MANY.replace("{body.tenant:", '{"body.${{ each }}":'),
            "expected a key without ${{ each }}, which is replaced",
        ),
        (MANY.replace("beta]", "null]"), "expected a string, a number, true or false"),
    ],
)
def test_what_cannot_be_replaced_is_told_once(routes: str, message: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, routes)
    assert message in found


def test_what_else_is_wrong_in_a_route_is_told_too(tmp_path: Path) -> None:
    routes = MANY.replace("from: shop", "from: shpo").replace('"${{ each }}"', '"${{ each.x }}"') + "    when: nope\n"
    told = problems(tmp_path, routes)
    assert [each.partition(": ")[0] for each in told] == ["12:11", "13:26", "15:11"]
    assert "unknown name 'each.x'" in told[1]


def test_many_mistyped_names_take_no_time(tmp_path: Path) -> None:
    items = ", ".join(f"t{number}" for number in range(400))
    body = ", ".join(f'k{number}: "${{{{ each.nope }}}}"' for number in range(400))
    began = time.perf_counter()
    found = problems(
        tmp_path,
        f"  - {{foreach: [{items}], name: 'a-${{{{ each }}}}', from: shop, to: tenant-acme, request: {{body: {{{body}}}}}}}",  # noqa: E501 - one line of YAML
    )
    assert len(found) == 400
    assert time.perf_counter() - began < 5


def test_an_escape_is_left_alone(tmp_path: Path) -> None:
    rules = load(tmp_path, MANY.replace("    to:", "    request: {body: '$${{ each }} ${{ each }}'}\n    to:"))
    request = rules.routes["orders-acme"].request
    assert request is not None
    assert request.body is not None
    assert request.body.render(EventView.of(an_event(source="shop"))) == "${{ each }} acme"
