"""`hmac` in requests: by which secret, where it may be used, and that no value of a secret is told."""

import hashlib
import hmac
from pathlib import Path

import pytest

from gateway.client.request import compose
from gateway.model import ExpressionError
from gateway.ops.explain import explain
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Rules
from tests.builders import a_delivery, a_destination, an_event

PEPPER, CRM = "only-for-this-test-0123", "another-one-for-this-test"
RULES = """
version: 1
secrets: {{pepper: "${{PEPPER}}", crm: "${{CRM}}"}}
sources: {{s: {{verify: {{scheme: none}}, {source}}}}}
destinations: {{d: {{url: "https://d.example/"}}}}
routes:
  - {{name: r, from: s, to: d, {keys}}}
"""


def rules_file(folder: Path, *, keys: str, source: str = "dedupe: off") -> Path:
    (file := folder / "routes.yaml").write_text(RULES.format(keys=keys, source=source))
    return file


def rules_of(file: Path, pepper: str = PEPPER) -> Rules:
    return load_rules(file, environ={"PEPPER": pepper, "CRM": CRM})


def sent(rules: Rules, body: bytes = b'{"email": "Jo@Acme.example"}') -> str:
    [route] = explain(
        rules, source="s", headers=((b"content-type", b"application/json"),), query="", body=body, now=0.0
    ).routes
    [planned] = route.requests
    return planned.problem if planned.request is None else planned.request.body.decode()


def digest(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("hmac(body.email, 'pepper')", digest(PEPPER, "Jo@Acme.example")),
        ('hmac(body.email.lower(), "pepper")', digest(PEPPER, "jo@acme.example")),
        ("hmac('a, b(c' + body.email, 'crm')", digest(CRM, "a, b(cJo@Acme.example")),
        ("hmac(hmac(body.email, 'crm'), 'pepper')", digest(PEPPER, digest(CRM, "Jo@Acme.example"))),
        ("hmac(bytes(body.email), 'pepper')", digest(PEPPER, "Jo@Acme.example")),
        ("default(body.x, hmac(default(body.y, 'none'), 'crm'))", digest(CRM, "none")),
        ("[1, 2].map(n, hmac(string(n), 'crm')).join(' ')", f"{digest(CRM, '1')} {digest(CRM, '2')}"),
    ],
)
def test_a_digest_is_that_of_the_named_secret(tmp_path: Path, expression: str, expected: str) -> None:
    text = RULES.format(keys="KEYS", source="dedupe: off").replace(
        "{name: r, from: s, to: d, KEYS}",
        f"name: r\n    from: s\n    to: d\n    request:\n      body:\n        x: |-\n          ${{{{ {expression} }}}}",
    )
    (file := tmp_path / "routes.yaml").write_text(text)
    assert sent(rules_of(file)) == f'{{"x":"{expected}"}}'


def test_a_secret_that_changes_is_used_from_the_next_load_on(tmp_path: Path) -> None:
    file = rules_file(tmp_path, keys="request: {form: {x: \"${{ hmac(body.email, 'pepper') }}\"}}")
    for pepper in (PEPPER, "a-new-one-after-rotation"):
        assert sent(rules_of(file, pepper)) == f"x={digest(pepper, 'Jo@Acme.example')}"


def test_what_has_a_name_may_be_a_digest_but_no_condition(tmp_path: Path) -> None:
    let = "let: {who: \"hmac(body.email, 'crm')\"}"
    assert sent(rules_of(rules_file(tmp_path, keys=f'{let}, request: {{body: "${{{{ who }}}}"}}'))) == (
        digest(CRM, "Jo@Acme.example")
    )
    _, problems = check_rules(rules_file(tmp_path, keys=f"{let}, when: who == 'x'"))
    assert ["expected it in `request`" in str(each) for each in problems if each.severity == "error"] == [True]


@pytest.mark.parametrize(
    ("keys", "source", "expected"),
    [
        ("when: \"hmac(body.a, 'crm') == 'x'\"", "", "hmac: expected it in `request`, the only place"),
        ("to: \"${{ hmac(body.a, 'crm') }}\"", "", "hmac: expected it in `request`"),
        ("split: \"[hmac(body.a, 'crm')]\"", "", "hmac: expected it in `request`"),
        ("debounce: {key: \"hmac(body.a, 'crm')\", quiet: 1s}", "", "hmac: expected it in `request`"),
        ("", "id: \"hmac(body.a, 'crm')\"", "hmac: expected it in `request`"),
        (
            "request: {body: \"${{ hmac(body.a, 'crn') }}\"}",
            "",
            "(crm, pepper), got another string at character 14, did you mean 'crm'?",
        ),
        ('request: {body: "${{ hmac(body.a, body.b) }}"}', "", "expected the name of a secret as one string literal"),
        ("request: {body: \"${{ hmac(body.a, 'c' + 'rm') }}\"}", "", "expected the name of a secret as one string"),
        (
            "request: {body: \"${{ hmac('crm') }}\"}",
            "",
            "expected 2 arguments, a value and the name of a secret, got 1",
        ),
        (
            "request: {body: \"${{ hmac(body.a, 'crm', 1) }}\"}",
            "",
            "expected 2 arguments, a value and the name of a secret, got 3",
        ),
        ("request: {body: \"${{ body.a.hmac('crm') }}\"}", "", "unknown function 'hmac'"),
    ],
)
def test_what_is_refused(tmp_path: Path, keys: str, source: str, expected: str) -> None:
    text = RULES.format(keys=keys or "stop: false", source=source or "dedupe: off")
    if keys.startswith("to:"):
        text = text.replace("to: d, ", "")
    (file := tmp_path / "routes.yaml").write_text(text)
    _, problems = check_rules(file, environ={"PEPPER": PEPPER, "CRM": CRM})
    errors = [str(each) for each in problems if each.severity == "error"]
    assert any(expected in each for each in errors), errors


def test_a_value_that_has_no_bytes_is_a_dead_letter_that_says_so(tmp_path: Path) -> None:
    file = rules_file(tmp_path, keys="request: {body: \"${{ hmac(body.n, 'crm') }}\"}")
    assert sent(rules_of(file), b'{"n": 7}').endswith("hmac: expected a string or bytes")


def test_files_that_are_included_use_the_secrets_of_the_file_above_and_their_own(tmp_path: Path) -> None:
    team = "secrets: {own: own-secret-of-the-team}\nroutes:\n"
    for name in ("pepper", "own"):
        team += f"  - {{name: t-{name}, from: s, to: d, request: {{body: \"${{{{ hmac('x', '{name}') }}}}\"}}}}\n"
    (tmp_path / "team.yaml").write_text(team)
    file = rules_file(tmp_path, keys="request: {body: x}")
    file.write_text(file.read_text() + "include: team.yaml\n")
    routes = rules_of(file).routes
    assert routes.keys() == {"r", "t-pepper", "t-own"}
    file.write_text(file.read_text().replace("body: x", "body: \"${{ hmac('x', 'own') }}\""))
    _, problems = check_rules(file, environ={"PEPPER": PEPPER, "CRM": CRM})
    assert [str(each) for each in problems if "secrets` (crm, pepper), got another" in str(each)], "a team has its own"


def test_a_short_secret_is_refused_once_and_never_shown(tmp_path: Path) -> None:
    file = rules_file(tmp_path, keys="request: {body: \"${{ hmac('x', 'pepper') }}\"}")
    _, problems = check_rules(file, environ={"PEPPER": "hunter2", "CRM": CRM})
    errors = [str(each) for each in problems if each.severity == "error"]
    assert len(errors) == 1
    assert "secrets.pepper: expected a secret of at least 16 bytes, got a shorter one" in errors[0]
    assert "hunter2" not in errors[0]


def test_no_value_of_a_secret_is_in_what_is_printed_of_the_rules(tmp_path: Path) -> None:
    rules = rules_of(rules_file(tmp_path, keys="request: {body: \"${{ hmac('x', 'pepper') }}\"}"))
    assert PEPPER not in repr(rules)
    assert {PEPPER, CRM} <= rules.secret_values


def test_files_beside_each_other_do_not_share_their_secrets(tmp_path: Path) -> None:
    """A team's own secret hides that of the root for its files alone."""
    (tmp_path / "sub").mkdir()
    use = "  - {{name: {name}, from: s, to: d, request: {{body: \"${{{{ hmac('x', 'pepper') }}}}\"}}}}\n"
    (tmp_path / "a.yaml").write_text(
        "secrets: {pepper: the-pepper-of-team-a}\ninclude: sub/*.yaml\nroutes:\n" + use.format(name="a")
    )
    (tmp_path / "sub" / "s.yaml").write_text("routes:\n" + use.format(name="a-sub"))
    (tmp_path / "b.yaml").write_text("routes:\n" + use.format(name="b"))
    file = rules_file(tmp_path, keys="request: {body: x}")
    file.write_text(file.read_text() + "include: [a.yaml, b.yaml]\n")
    explained = explain(rules_of(file), source="s", headers=(), query="", body=b"{}", now=0.0).routes
    found = {route.name: each.request.body.decode() for route in explained for each in route.requests if each.request}
    theirs = digest("the-pepper-of-team-a", "x")
    assert found == {"r": "x", "a": theirs, "a-sub": theirs, "b": digest(PEPPER, "x")}


def test_a_policy_may_keep_the_secrets_of_the_root_to_itself(tmp_path: Path) -> None:
    use = "routes:\n  - {name: t, from: s, to: d, request: {body: \"${{ hmac('x', 'pepper') }}\"}}\n"
    (tmp_path / "team.yaml").write_text(use)
    file = rules_file(tmp_path, keys="request: {body: \"${{ hmac('x', 'pepper') }}\"}")
    file.write_text(file.read_text() + "include: team.yaml\npolicy: {forbid: [secrets]}\n")
    told = [
        str(each) for each in check_rules(file, environ={"PEPPER": PEPPER, "CRM": CRM})[1] if each.severity == "error"
    ]
    assert len(told) == 1
    assert "team.yaml:2:47: routes[0].request.body: " in told[0]
    assert "expected a name of the file's `secrets` (none), got another string" in told[0]
    (tmp_path / "team.yaml").write_text("secrets: {pepper: own-secret-of-the-team}\n" + use)
    assert rules_of(file).routes.keys() == {"r", "t"}, "its own are its own"


@pytest.mark.parametrize(
    "keys",
    [
        "request: {body: \"${{ hmac(body.a, '${PEPPER}') }}\"}",
        'let: {x: "hmac(body.a, \'${PEPPER}\')"}, request: {body: "${{ x }}"}',
        "when: \"body.a.matches('(${PEPPER}')\"",
        "when: \"headers['${PEPPER}'] == 'x'\"",
        "when: \"body.a + ${PEPPER} == 'x'\"",
        "match: {body.a: {matches: '(${PEPPER}'}}",
        "match: {'${PEPPER}': x}",
        "let: {x: \"body.a ${PEPPER}\"}, request: {body: '${{ x }}'}",
    ],
)
def test_no_problem_tells_the_value_of_a_reference(tmp_path: Path, keys: str) -> None:
    value = "TOPSECRET-pepper-value-1"
    file = rules_file(tmp_path, keys=keys)
    _, problems = check_rules(file, environ={"PEPPER": value, "CRM": CRM})
    assert {each.code for each in problems if each.severity == "error"} & {"expression", "value", "unknown_key"}
    assert [str(each) for each in problems if "TOPSECRET" in str(each)] == []


def test_a_dead_letter_tells_no_value_of_a_reference(tmp_path: Path) -> None:
    file = rules_file(tmp_path, keys="request: {body: \"${{ body.n + '${PEPPER}' }}\"}")
    route = rules_of(file, "TOPSECRET-pepper-value-1").routes["r"]
    assert route.request is not None
    with pytest.raises(ExpressionError) as raised:
        compose(a_delivery(event=an_event(body={"n": 7})), a_destination("d"), route.request, now=0.0)
    assert str(raised.value) == "request.body: body.n + '***': an operand has the wrong type"


def test_what_has_no_value_here_is_shown_as_that_and_differs_by_name(tmp_path: Path) -> None:
    file = rules_file(tmp_path, keys="request: {body: \"${{ hmac('x', 'pepper') + ' ' + hmac('x', 'crm') }}\"}")
    rules = load_rules(file, environ={}, resolve=False)
    hashed = hashlib.sha256(b"x").hexdigest()[:16]
    assert sent(rules) == f"hmac-by-pepper-{hashed} hmac-by-crm-{hashed}"


def test_a_secret_that_changes_is_a_change_of_the_route(tmp_path: Path) -> None:
    file = rules_file(tmp_path, keys="request: {body: \"${{ hmac('x', 'pepper') }}\"}")
    old, new = rules_of(file), rules_of(file, "a-new-one-after-rotation")
    assert old.routes["r"] != new.routes["r"]
    assert old.routes["r"] == rules_of(file).routes["r"]
    assert PEPPER not in repr(old.routes["r"].request)


def test_a_secret_that_no_request_uses_is_told(tmp_path: Path) -> None:
    file = rules_file(tmp_path, keys="let: {who: \"hmac(body.email, 'pepper')\"}, request: {body: {who: '${{ who }}'}}")
    _, problems = check_rules(file, environ={"PEPPER": PEPPER, "CRM": CRM})
    found = [(each.path, each.message) for each in problems if each.code == "unused"]
    assert found == [("secrets.crm", "no request computes a digest with 'crm'")]
