"""What `gateway check --strict` finds in rules that are valid."""

from pathlib import Path

import pytest

from gateway.cli import main
from gateway.rules.load import check_rules

RULES = """
version: 1
defaults: {{rate: 5/s}}
sources: {{shop: {{verify: {{scheme: hmac, header: X-S, secrets: [abcdefghijklmnopqrst]}}}}}}
destinations: {{d: {{{destination}}}}}
routes: [{{name: r, from: shop, to: d, {route}}}]
"""
URL = "url: 'https://d.example/'"


def found(folder: Path, *, destination: str = URL, route: str = "", rules: str = RULES) -> list[tuple[str, str]]:
    (file := folder / "routes.yaml").write_text(rules.format(destination=destination, route=route))
    built, problems = check_rules(file, lints=True)
    assert built is not None, problems
    return [(each.code, each.path) for each in problems]


def test_rules_in_which_nothing_is_doubtful(tmp_path: Path) -> None:
    assert found(tmp_path, route="match: {type: push, body.n: {gt: 1, lt: 2}}, when: size(body.l) > 0") == []


@pytest.mark.parametrize(
    ("url", "is_doubtful"),
    [
        ("http://d.example/", True),
        ("http://203.0.113.7/", True),
        ("http://d.internal.example/", True),
        ("https://d.example/", False),
        ("http://127.0.0.1:9/", False),
        ("http://localhost/", False),
        ("http://crm:8080/in", False),
        ("http://crm.team.svc.cluster.local/in", False),
        ("http://crm.internal", False),
    ],
)
def test_what_is_sent_in_the_clear(url: str, is_doubtful: bool, tmp_path: Path) -> None:  # noqa: FBT001 - of a table
    assert found(tmp_path, destination=f"url: '{url}'") == ([("plain", "destinations.d.url")] if is_doubtful else [])


def test_a_credential_in_the_clear_is_told_once(tmp_path: Path) -> None:
    destination = "url: 'http://d.example/', headers: {X-Api-Key: '${NO_SUCH_KEY:-k}'}"
    assert found(tmp_path, destination=destination) == [("weak", "destinations.d.url")]


@pytest.mark.parametrize(
    ("destination", "path"),
    [
        ("url: 'https://hooks.slack.com/services/T0/B0/xyz'", "url"),
        ("url: 'https://discord.com/api/webhooks/1/abc'", "url"),
        ("url: 'https://acme.webhook.office.com/webhookb2/1'", "url"),
        ("url: 'https://d.example/in?a=1&token=abc'", "url"),
        ("url: 'https://d.example/', headers: {Authorization: Bearer abc}", "headers.Authorization"),
        ("url: 'https://d.example/', headers: {X-Api-Key: '$${abc}'}", "headers.X-Api-Key"),
        ("url: 'https://hooks.slack.com/services/${SLACK:-x}'", None),
        ("url: 'https://d.example/in?a=1&token=${TOKEN:-x}'", None),
        ("url: 'https://d.example/in?page=1&token='", None),
        ("url: 'https://d.example/', headers: {X-Team: edge, Authorization: '${A:-x}'}", None),
    ],
)
def test_a_credential_that_is_written_as_it_is(destination: str, path: str | None, tmp_path: Path) -> None:
    expected = [] if path is None else [("weak", f"destinations.d.{path}")]
    assert found(tmp_path, destination=destination) == expected
    (file := tmp_path / "routes.yaml").write_text(RULES.format(destination=destination, route=""))
    assert not [each for each in check_rules(file, lints=True)[1] if "abc" in str(each) or "xyz" in str(each)]


def test_a_destination_without_a_rate(tmp_path: Path) -> None:
    rules = RULES.replace("defaults: {{rate: 5/s}}", "")
    assert found(tmp_path, rules=rules) == [("unlimited", "destinations.d")]
    assert found(tmp_path, rules=rules, destination=f"{URL}, rate: 1/m") == []


@pytest.mark.parametrize(
    "route",
    [
        "match: {all_of: [{type: a}, {type: b}]}",
        "match: {type: [a, b], all_of: [{type: [c, d]}]}",
        "match: {type: {is: a, not: x}, all_of: [{type: b}]}",
        "match: {body.n: {gt: 5, lt: 5}}",
        "match: {body.n: {gte: 6, lte: 5}}",
        "match: {any_of: [{body.n: {gt: 5, lt: 4}}, {all_of: [{type: a}, {type: b}]}]}",
        "match: {source: shop, all_of: [{all_of: [{body.a: 1}, {body.a: true}]}]}",
        "when: 'false'",
    ],
)
def test_a_route_that_no_event_reaches(route: str, tmp_path: Path) -> None:
    ((code, path),) = found(tmp_path, route=route)
    assert code == "unreachable"
    assert path in {"routes[0].match", "routes[0].when"}


@pytest.mark.parametrize(
    "route",
    [
        "match: {all_of: [{type: a}, {type: [a, b]}]}",
        "match: {all_of: [{type: a*}, {type: b*}]}",
        "match: {any_of: [{all_of: [{type: a}, {type: b}]}, {type: c}]}",
        "match: {not: {all_of: [{type: a}, {type: b}]}}",
        "match: {body.n: {gte: 5, lte: 5}}",
        "match: {body.n: {gt: 1, not: 2}}",
        "match: {all_of: [{body.a: 1}, {body.a: 1.0}]}",
        "enabled: false",
    ],
)
def test_a_route_that_an_event_may_reach(route: str, tmp_path: Path) -> None:
    assert found(tmp_path, route=route) == []


STOPS = """
version: 1
defaults: {{rate: 5/s}}
sources:
  shop: {{verify: {{scheme: hmac, header: X-S, secrets: [abcdefghijklmnopqrst]}}}}
  crm: {{verify: {{scheme: hmac, header: X-S, secrets: [abcdefghijklmnopqrst]}}}}
destinations: {{d: {{url: "https://d.example/"}}}}
routes:
  - {{name: first, to: d, {destination}}}
  - {{name: below, to: d, {route}}}
"""


@pytest.mark.parametrize(
    ("first", "below", "is_reached"),
    [
        ("from: [shop, crm], stop: true", "from: shop, match: {type: a}", False),
        ("from: [shop, crm], stop: true", "from: [crm, shop]", False),
        (
            "from: shop, stop: true, match: {type: a}",
            "from: shop, match: {body.n: 1, type: a}, when: 'size(body.l) > 0'",
            False,
        ),
        ("from: shop, stop: true, when: 'size(body.l) > 0'", "from: shop, when: 'size(body.l) > 0'", False),
        (
            "from: shop, stop: true, match: {type: a, body.n: 1}",
            "from: shop, match: {all_of: [{type: a}, {body.n: 1}]}",
            False,
        ),
        ("from: shop, stop: true, catch_all: true", "from: shop, catch_all: true", False),
        ("from: shop, stop: true", "from: [shop, crm]", True),
        ("from: shop", "from: shop", True),
        ("from: shop, stop: true, match: {type: a}", "from: shop, match: {type: b}", True),
        ("from: shop, stop: true, match: {type: a}, sample: 10%", "from: shop, match: {type: a}", True),
        ("from: shop, stop: true, match: {type: a, body.n: 1}", "from: shop, match: {type: a}", True),
        ("from: shop, stop: true, catch_all: true", "from: shop", True),
        ("from: shop, stop: true, match: {type: a}", "from: shop, catch_all: true", True),
    ],
)
def test_a_route_to_which_another_leaves_nothing(first: str, below: str, is_reached: bool, tmp_path: Path) -> None:  # noqa: FBT001 - of a table
    told = [each for each in found(tmp_path, destination=first, route=below, rules=STOPS) if each[0] != "unused"]
    assert told == ([] if is_reached else [("unreachable", "routes[1].name")])


@pytest.mark.parametrize(
    ("when", "is_matchable"),
    [
        ("body.ref == 'main'", True),
        ("type == 'push' && body.n >= 5 && headers['x-a'] == \"b\"", True),
        ("body.ref.startsWith('refs/')", True),
        ("has(body.a.b)", True),
        ("body['a-b'][0].c == null", True),
        ("body.ref == 'main' || body.n > 5", False),
        ("body.ref == body.branch", False),
        ("size(body.l) > 0", False),
        ("body.ref == 'a && b' && size(body.l) > 1", False),
        ("!has(body.a)", False),
        ("body.a", False),
    ],
)
def test_a_condition_that_match_can_say(when: str, is_matchable: bool, tmp_path: Path) -> None:  # noqa: FBT001 - of a table
    quoted = when.replace('"', '\\"')
    assert found(tmp_path, route=f'when: "{quoted}"') == ([("matchable", "routes[0].when")] if is_matchable else [])


def test_a_pattern_that_takes_long(tmp_path: Path) -> None:
    address = "^[a-z0-9._-]{1,200}@([a-z0-9-]{1,63}[.])+[a-z]{2,63}$"
    assert found(tmp_path, route=f"when: \"body.mail.matches('{address}')\"") == [("slow", "routes[0].when")]
    assert found(tmp_path, route="when: \"body.ref.matches('^refs/heads/release-[0-9]+$')\"") == []


@pytest.mark.parametrize(
    ("route", "paths"),
    [
        ("retry: {results: {5xx: drop, timeout: drop}}", [".results.5xx", ".results.timeout"]),
        ("retry: {results: {503: drop, 404: drop, 429: retry}}", [".results.503"]),
        ("retry: {results: {5xx: dead_letter, connect: retry_short}}", []),
        ("retry: {results: {4xx: drop, egress_refused: drop}}", []),
        ("retry: {schedule: [5m], max_age: 1m}", [".schedule"]),
        ("retry: {schedule: [2h], max_age: 2h}", []),
        ("retry: {schedule: [5m], max_age: 1m, max_attempts: 1}", []),
        ("retry: {schedule: [4d]}", [".schedule"]),
        ("retry: {max_age: 1s}", [".max_age"]),
        ("retry: {schedule: [2h]}, debounce: {key: body.k, quiet: 5s}", [".schedule"]),
    ],
)
def test_retries_by_which_events_are_lost(route: str, paths: list[str], tmp_path: Path) -> None:
    assert found(tmp_path, route=route) == [("lossy", f"routes[0].retry{path}") for path in paths]


def test_a_retry_of_the_defaults_that_loses_events_is_told_once(tmp_path: Path) -> None:
    rules = RULES.replace("{{rate: 5/s}}", "{{rate: 5/s, retry: {{results: {{dns: drop}}}}}}")
    rules = rules.replace("routes: [", "routes: [{{name: other, from: shop, to: d}}, ")
    assert found(tmp_path, rules=rules) == [("lossy", "defaults.retry.results.dns")]


def test_only_strict_looks_closer_and_a_comment_allows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(destination=URL, route="when: type == 'a'"))
    assert main(["check", str(file)]) == 0
    assert main(["check", str(file), "--strict"]) == 1
    assert "expected `match` for what it can say, got CEL" in capsys.readouterr().out
    file.write_text(file.read_text().replace("\nroutes:", "\n# allow matchable: it is to be an example\nroutes:"))
    assert main(["check", str(file), "--strict"]) == 0


@pytest.mark.parametrize(
    ("value", "is_doubtful"),
    [
        ("'> 1000'", True),
        ("'<= 1.5'", True),
        ("'a.(b|c)'", True),
        ("'^push$'", True),
        ("[x, 'a.(b|c)']", True),
        ("[x, 'a.*']", False),
        ("'a > b'", False),
        ("push", False),
        ("'*.created'", False),
        ("'5 $ or so'", False),
        ("'(a)'", False),
    ],
)
def test_a_condition_that_looks_like_a_test_or_a_pattern_is_told(
    tmp_path: Path, value: str, *, is_doubtful: bool
) -> None:
    codes = [code for code, _ in found(tmp_path, route=f"match: {{body.x: {value}, type: push}}")]
    assert codes == ["literal"] * is_doubtful
