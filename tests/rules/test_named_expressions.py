"""`let`: expressions that others of a route use by their names."""

from pathlib import Path

import pytest

from gateway.rules.event_view import EventView
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Route
from tests.rules.test_load import lines

RULES = """
version: 1
sources: {{shop: {{verify: {{scheme: none}}}}}}
destinations: {{chat: {{url: "https://chat.example/in"}}}}
routes:
  - name: told
    from: shop
    to: chat
    {rest}
  - {{name: other, from: shop, to: chat, when: {other}}}
"""
BODY = b'{"data": {"object": {"n": 1999, "cur": "eur", "l": [{"who": "jo"}]}}, "who": "ann"}'


def a_route(folder: Path, rest: str) -> Route:
    path = folder / "routes.yaml"
    path.write_text(RULES.format(rest=rest, other="body.who == 'ann'"))
    return load_rules(path).routes["told"]


def problems(folder: Path, rest: str, other: str = "'true'") -> list[str]:
    path = folder / "routes.yaml"
    path.write_text(RULES.format(rest=rest, other=other))
    return [
        line.partition("routes.yaml:")[2] for line in lines(folder, check_rules(path)[1]) if "unverified" not in line
    ]


def a_view() -> EventView:
    return EventView(source="shop", headers=(), query="", body=BODY)


@pytest.mark.parametrize(
    ("let", "text", "expanded", "value"),
    [
        ("{o: body.data.object}", "o.n", "body.data.object.n", 1999),
        ("{o: body.data.object}", "o['n'] + 1", "body.data.object['n'] + 1", 2000),
        (
            "{o: body.data.object, t: 'money(o.n, o.cur)'}",
            "t",
            "(money(body.data.object.n, body.data.object.cur))",
            "19.99 EUR",
        ),
        ("{a: 1 + 2}", "a * 2", "(1 + 2) * 2", 6),
        ("{a: '1 + 2 // three'}", "a * 2", "(1 + 2  ) * 2", 6),
        ("{w: 'body.who // the sender'}", "w + w", "body.who   + body.who  ", "annann"),
        ("{o: body.data.object}", "default(o.none, 'no') + default(o.cur, '')", None, "noeur"),
        ("{l: body.data.object.l}", "l.map(who, who.who)", "body.data.object.l.map(who, who.who)", ["jo"]),
        ("{who: body.who}", "body.data.object.l.map(who, who.who)[0] + who", None, "joann"),
        ("{who: body.who}", "body.who + 'who' + {'who': who}.who", None, "annwhoann"),
    ],
)
def test_a_name_stands_for_its_expression(
    tmp_path: Path, let: str, text: str, expanded: str | None, value: object
) -> None:
    route = a_route(tmp_path, f'let: {let}\n    request: {{body: {{v: "${{{{ {text} }}}}"}}}}')
    assert route.request is not None
    assert route.request.body is not None
    if value is not None:
        assert route.request.body.render(a_view()) == {"v": value}
    if expanded is not None:
        route = a_route(tmp_path, f'let: {let}\n    when: "{text} != null"')
        assert route.when is not None
        assert route.when.text == f"{expanded} != null"


def test_everything_of_a_route_may_use_the_names_wherever_they_are_written(tmp_path: Path) -> None:
    route = a_route(
        tmp_path,
        "request: {path: '/${{ w }}', query: {a: '${{ w }}'}, headers: {X-W: '${{ w }}'}, form: {f: '${{ w }}'}}\n"
        "    when: w == 'ann'\n    let: {w: body.who}",
    )
    request = route.request
    assert request is not None
    assert route.when is not None
    assert request.path is not None
    assert request.form is not None
    view = a_view()
    assert route.when.is_true(view)
    assert (request.path.render(view), request.form.render(view, 100)) == ("/ann", "f=ann")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("let: {w: body.}", "9:14: routes[0].let.w: expected a CEL expression, got 'body.': syntax error"),
        ("let: {w: x}", "9:14: routes[0].let.w: expected a CEL expression, got 'x': unknown name 'x' at character 1"),
        ("let: {a: b, b: body.who}", "9:14: routes[0].let.a: expected a CEL expression, got 'b': unknown name 'b'"),
        (
            "let: {body: 1}",
            "9:11: routes[0].let.body: expected a name of letters, digits and _, which isn't one of CEL's",
        ),
        ("let: {package: '1'}", "9:11: routes[0].let.package: expected a name of letters"),
        (
            "let: {t: 'body.n + 1'}\n    when: default(t, 1) == 1",
            "10:11: routes[0].when: expected a CEL expression, got",
        ),
        ("let: {size: '1'}", "9:11: routes[0].let.size: expected a name of letters"),
        ("let: {a-b: '1'}", "9:11: routes[0].let.a-b: expected a name of letters"),
        ("let: {lower__: '1'}", "9:11: routes[0].let.lower__: expected a name of letters"),
        ("let: [a]", "9:10: routes[0].let: expected a mapping of CEL expressions, got a list"),
        (
            "let: {who: body.who}\n    when: wo == 'a'",
            (
                "10:11: routes[0].when: expected a CEL expression, got \"wo == 'a'\": "
                "unknown name 'wo' at character 1, did you mean 'who'?"
            ),
        ),
        (
            "let: {who: body.who}\n    when: who ==",
            "10:11: routes[0].when: expected a CEL expression, got 'who ==': syntax error at character 7",
        ),
    ],
)
def test_a_mistake_is_told_where_it_is_written(tmp_path: Path, rest: str, message: str) -> None:
    assert any(line.startswith(message) for line in problems(tmp_path, rest)), problems(tmp_path, rest)


def test_a_name_that_has_a_problem_is_no_other_problem(tmp_path: Path) -> None:
    found = problems(tmp_path, "let: {w: body.}\n    when: w == 'a'")
    assert [line for line in found if "routes[0]" in line] == [line for line in found if ".let.w" in line]


def test_names_are_those_of_their_route(tmp_path: Path) -> None:
    found = problems(tmp_path, "let: {w: body.who}", "w == 'a'")
    assert any("routes[1].when" in line and "unknown name 'w'" in line for line in found)
