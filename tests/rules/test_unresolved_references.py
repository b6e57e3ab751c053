"""Rules with references that can't be resolved here: what is told of them, and what is refused instead of guessed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gateway.cli import main
from gateway.rules.event_view import EventView
from gateway.rules.load import InvalidRulesError, check_rules, load_rules
from gateway.rules.rules import Rules
from gateway.rules.watch import changes
from tests.builders import an_event
from tests.rules.test_load import EVERY_KEY

RULES = """
version: 1
sources:
  shop:
    verify: {scheme: hmac, header: X-S, secrets: ["${SECRET}"]}
    {{source}}
destinations: {ci: {url: "https://ci.example/", {{destination}}}, otherwise: {url: "https://o.example/"}}
routes:
  - {name: build, from: shop, to: ci, {{route}}}
"""


def written(folder: Path, *, source: str = "", destination: str = "", route: str = "", rules: str = RULES) -> Path:
    for name, text in (("source", source), ("destination", destination), ("route", route)):
        rules = rules.replace(f"{{{{{name}}}}}", text)
    (file := folder / "routes.yaml").write_text(rules)
    return file


def loaded(file: Path) -> Rules:
    """Load rules as `test` and `diff` do."""
    return load_rules(file, environ={}, resolve=False, reads_secrets=False)


def found(file: Path) -> list[tuple[str, str, str]]:
    """Return what `check` finds, but for the references alone."""
    _, problems = check_rules(file, environ={})
    return [(each.code, each.path, each.message) for each in problems if "environment variable" not in each.message]


def errors(file: Path) -> list[tuple[str, str]]:
    return [(path, message) for code, path, message in found(file) if code not in ("unused", "unresolved", "weak")]


# --- Whatever the reference is in ---


def _without(tree: object) -> Iterator[object]:
    """Yield a tree with a reference in place of each of its scalars, one after another."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from ({**tree, key: other} for other in _without(value))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from ([*tree[:index], other, *tree[index + 1 :]] for other in _without(value))
    else:
        yield "${UNSET}"


MORE_KEYS = r"""
version: 1
sources:
  shop:
    path: /in/shop
    verify: {scheme: discord, public_keys: ["6c657b9a4bd6d3a3cf6d3a3cf6d3a3cf6c657b9a4bd6d3a3cf6d3a3cf6d3a3cf"]}
    key: body.key
    respond: {status: 200, headers: {X-A: b}, body: hi, after_delivery: {destination: ci, timeout: 1s}}
    limits: {body: 1KiB, rate: 1/s, concurrent: 5}
    allow_from: [10.0.0.0/8]
destinations:
  ci:
    url: https://ci.example/a?b=c
    auth: {oauth2: {token_url: "https://t.example/", client_id: a, client_secret: b, scope: c, audience: d}}
    proxy: http://proxy.example:3128
    proxy_auth: {username: a, password: b}
  other: {url: "https://o.example/", auth: {basic: {username: a, password: b}}}
routes:
  - {name: a, from: shop, to: ci, when: body.a == 'x', let: {b: body.b}, request: {path: /a, query: {a: b}}}
  - {name: b, from: shop, to: other, split: body.list, sample: 10%, enabled: true, stop: true}
  - {name: c, from: shop, to: ["o${{ body.o }}"], otherwise: other, delay: 5m, expires: "2099-01-01"}
  - {name: d, from: shop, to: other, debounce: {key: body.a, quiet: 5s}, request: {preset: slack, text: hello}}
"""


@pytest.mark.parametrize("text", [EVERY_KEY.replace("${CI:-https://ci.internal/hook}", "https://ci/"), MORE_KEYS])
def test_no_unresolved_reference_is_more_than_a_problem(tmp_path: Path, text: str) -> None:
    file = tmp_path / "routes.yaml"
    for tree in _without(yaml.safe_load(text)):
        file.write_text(json.dumps(tree))
        check_rules(file, environ={}, lints=True)  # raises nothing


# --- Sources ---


@pytest.mark.parametrize(
    "verify",
    [
        '{scheme: discord, public_keys: ["${KEY}"]}',
        '{scheme: hmac, header: X-S, secret_encoding: hex, secrets: ["${KEY}"]}',
        '{scheme: http-message-signature, algorithm: ed25519, public_keys: [{secret: "${KEY}", keyid: a}]}',
        '{scheme: sns, topics: ["${KEY}"]}',
        '{scheme: hmac, header: "${KEY} ", secrets: [abcdefghijklmnopqrst]}',
    ],
)
def test_a_source_whose_proof_is_unknown_is_one_of_which_all_else_is_known(tmp_path: Path, verify: str) -> None:
    rules = f"""
    version: 1
    sources: {{a: {{verify: {verify}, public_url: "https://hooks.example/"}}}}
    destinations: {{ci: {{url: "https://ci.example/"}}}}
    routes: [{{name: r, from: a, to: ci}}]
    """
    (file := tmp_path / "routes.yaml").write_text(rules)
    assert list(loaded(file).routes) == ["r"]
    assert not loaded(file).sources["a"].verifier.is_open
    assert {code for code, _, _ in found(file)} <= {"weak"}
    with pytest.raises(InvalidRulesError, match="environment variable KEY"):
        load_rules(file, environ={})


@pytest.mark.parametrize(
    "verify",
    [
        '{scheme: "${SCHEME}", secrets: [abcdefghijklmnopqrst]}',
        '{scheme: hmac, header: X-S, signed: "{id}.{body}", id_header: "${H} ", secrets: [abcdefghijklmnopqrst]}',
    ],
)
def test_without_the_place_of_identities_there_are_no_rules(tmp_path: Path, verify: str) -> None:
    (file := tmp_path / "routes.yaml").write_text(f"version: 1\nsources: {{a: {{verify: {verify}}}}}\n")
    with pytest.raises(InvalidRulesError, match="environment variable"):
        loaded(file)


def test_what_else_is_wrong_with_a_source_is_told_beside_an_unknown_key(tmp_path: Path) -> None:
    verify = '{scheme: hmac, secret_encoding: hex, secrets: ["${KEY}", "no hex"]}'
    (file := tmp_path / "routes.yaml").write_text(f"version: 1\nsources: {{a: {{verify: {verify}}}}}\n")
    assert [path for path, _ in errors(file)] == ["sources.a.verify", "sources.a.verify.secrets[1]"]


# --- Expressions ---


def test_a_condition_with_a_reference_is_the_one_that_is_written(tmp_path: Path) -> None:
    file = written(tmp_path, route="when: \"body.tenant == '${TENANT}' && body.amount > 10\"")
    when = loaded(file).routes["build"].when
    assert when is not None

    bodies = [("${TENANT}", 11), ("acme", 11), ("${TENANT}", 9)]
    events = [an_event(body={"tenant": tenant, "amount": amount}) for tenant, amount in bodies]
    assert [when.is_true(EventView.of(event)) for event in events] == [True, False, False]


@pytest.mark.parametrize(
    "keys",
    [
        {"source": "id: \"body['${F}']\""},
        {"source": "type: \"body['${F}']\""},
        {"source": "key: \"body['${F}']\""},
        {"route": "split: \"body['${F}']\""},
        {"route": "let: {a: \"body['${F}']\"}, when: a == 1"},
        {"route": "debounce: {key: \"body['${F}']\", quiet: 5s}"},
    ],
)
def test_no_expression_vanishes(tmp_path: Path, keys: dict[str, str]) -> None:
    """Another one is another rule."""
    old = loaded(written(tmp_path, **keys))
    new = loaded(written(tmp_path, **{key: text.replace("${F}", "${G}") for key, text in keys.items()}))
    assert changes(old, new).changed


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"route": 'when: "${CONDITION}"'}, "routes[0].when"),
        ({"route": 'when: "body.amount > ${LEAST}"'}, "routes[0].when"),
        ({"route": 'split: "${LIST}"'}, "routes[0].split"),
        ({"route": 'let: {a: "${A}"}, when: a == 1'}, "routes[0].let.a"),
        ({"route": 'debounce: {key: "${A}", quiet: 5s}'}, "routes[0].debounce.key"),
        ({"source": 'id: "${A}"'}, "sources.shop.id"),
    ],
)
def test_without_an_expression_there_are_no_rules(tmp_path: Path, keys: dict[str, str], path: str) -> None:
    """Instead of rules that take every event, or split none."""
    file = written(tmp_path, **keys)
    rules, problems = check_rules(file, environ={})
    assert rules is None
    assert {each.severity for each in problems} == {"warning"}
    (message,) = [message for _, at, message in found(file) if at == path]
    assert "that can be read without their values, got '" in message
    with pytest.raises(InvalidRulesError, match="without their values"):
        loaded(file)


@pytest.mark.parametrize("to", ['[ci, "${OTHER}"]', '["${PREFIX}-${{ body.tenant }}"]', '"${OTHER}"'])
def test_without_a_name_that_a_route_uses_there_are_no_rules(tmp_path: Path, to: str) -> None:
    """Instead of rules in which a route goes to the others alone."""
    file = written(tmp_path, rules=RULES.replace("to: ci", f"to: {to}"))
    rules, problems = check_rules(file, environ={})
    assert rules is None
    assert {each.severity for each in problems} == {"warning"}


@pytest.mark.parametrize(
    "route",
    [
        'match: {body.amount: {gt: "${LEAST}"}}',
        'request: {body: "${{ body.amount + ${MORE} }}"}',
        'request: {preset: pagerduty, routing_key: a, summary: b, severity: "${SEVERITY}"}',
    ],
)
def test_without_a_value_that_must_be_of_some_kind_there_are_no_rules(tmp_path: Path, route: str) -> None:
    file = written(tmp_path, route=route)
    rules, problems = check_rules(file, environ={})
    assert rules is None
    assert {each.severity for each in problems} == {"warning"}
    with pytest.raises(InvalidRulesError, match="environment variable"):
        loaded(file)


def test_a_wrong_expression_beside_a_reference_is_an_error(tmp_path: Path) -> None:
    """It is compiled as it is written."""
    _, problems = check_rules(written(tmp_path, route="when: \"bdy.a == '${A}'\""), environ={})
    assert any("bdy" in each.message for each in problems)


@pytest.mark.parametrize(
    "auth",
    [
        'bearer: {token: "${A}"}',
        'basic: {username: u, password: "${A}"}',
        'oauth2: {token_url: "https://t.example/", client_id: u, client_secret: "${A}"}',
    ],
)
def test_another_credential_is_a_change(tmp_path: Path, auth: str) -> None:
    old = loaded(written(tmp_path, destination=f"auth: {{{auth}}}"))
    new = loaded(written(tmp_path, destination=f"auth: {{{auth.replace('${A}', '${B}')}}}"))
    assert changes(old, new).changed == ("destination ci: auth",)


# --- Addresses ---


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("htps://x/${T}", "expected an http or https URL, got the scheme 'htps'"),
        ("https://user@x.example/${T}", "expected a URL without user and password"),
        ("https://x.example:0/${T}", "expected a URL with a port from 1 to 65535"),
        ("https://x.example/${T} b", "expected a URL without a fragment, spaces"),
        ("https://x_.example?t=${T}#a", "expected a URL without a fragment, spaces"),
    ],
)
def test_what_is_known_of_a_url_is_checked(tmp_path: Path, url: str, message: str) -> None:
    ((path, told),) = errors(written(tmp_path, rules=RULES.replace("https://ci.example/", url)))
    assert path == "destinations.ci.url"
    assert told.startswith(message)


@pytest.mark.parametrize(
    "url", ["${U}", "https://${H}/", "https://[${V6}]/", "https://x.example:${P}/", "https://x.example/${A}${B}?c=${C}"]
)
def test_a_url_that_may_be_right_is_as_it_is_written(tmp_path: Path, url: str) -> None:
    file = written(tmp_path, destination="headers: {X-Key: a}", rules=RULES.replace("https://ci.example/", url))
    assert errors(file) == []
    assert loaded(file).destinations["ci"].url == url


@pytest.mark.parametrize(
    ("path", "is_wrong"), [("/in/${S}", False), ("${S}", False), ("in/${S}", True), ("/in/${S}?a", True)]
)
def test_what_is_known_of_a_path_is_checked(tmp_path: Path, path: str, is_wrong: bool) -> None:  # noqa: FBT001 - of a table
    found = errors(written(tmp_path, source=f"path: '{path}'"))
    assert [where for where, _ in found] == ["sources.shop.path"] * is_wrong


def test_an_unknown_destination_of_a_response_is_no_crash(tmp_path: Path) -> None:
    rules = loaded(written(tmp_path, source='respond: {after_delivery: {destination: "${D}"}}'))
    response = rules.sources["shop"].response
    assert response is not None
    assert response.after_delivery is None


def test_an_unknown_include_may_define_any_name(tmp_path: Path) -> None:
    file = written(tmp_path, rules=RULES.replace("to: ci", "to: elsewhere") + 'include: "${TEAM}.yaml"\n')
    assert errors(file) == []
    with pytest.raises(InvalidRulesError, match="environment variable TEAM"):
        loaded(file)


# --- Commands ---


@pytest.mark.parametrize("form", ["github", "sarif"])
def test_a_ci_system_is_told_that_not_all_was_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    file = written(tmp_path, route='when: "${CONDITION}"')
    assert main(["check", str(file), "--format", form]) == 0
    assert "what depends on unresolved references wasn't checked" in capsys.readouterr().out
    assert main(["check", str(written(tmp_path)), "--format", form]) == 0
    assert "wasn't checked" not in capsys.readouterr().out
