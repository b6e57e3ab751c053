"""`defaults:`: of a file for what it defines, and for the files that it includes."""

from pathlib import Path
from typing import Any

import pytest

from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Rules

ROOT = """
version: 1
include: teams/*.yaml
defaults:
  retry: {schedule: [1s, 2s], max_attempts: 7, results: {404: drop}}
  timeout: 3s
  concurrency: 4
  headers: {X-Env: prod, X-Team: platform}
sources: {shop: {verify: {scheme: none}}}
destinations:
  plain: {url: "http://127.0.0.1:1/"}
  own: {url: "http://127.0.0.1:1/", timeout: 30s, headers: {x-team: pay}}
routes:
  - {name: plain, from: shop, to: plain}
  - {name: own, from: shop, to: own, retry: {max_attempts: 2}}
  - {name: inline, from: shop, to: {name: inline, url: "http://127.0.0.1:1/", concurrency: 9}}
"""
TEAM = """
defaults: {timeout: 9s, rate: 5/s, retry: {max_age: 1h}, headers: {x-env: test}}
destinations: {team: {url: "http://127.0.0.1:1/"}}
routes: [{name: team, from: shop, to: team}]
"""


def load(folder: Path, root: str = ROOT, team: str = TEAM) -> Rules:
    (folder / "teams").mkdir(exist_ok=True)
    (folder / "teams/a.yaml").write_text(team)
    (folder / "routes.yaml").write_text(root)
    return load_rules(folder / "routes.yaml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"timeout": 3.0, "concurrency": 4, "rate": None, "headers": {"X-Env": "prod", "X-Team": "platform"}}),
        ("own", {"timeout": 30.0, "concurrency": 4, "rate": None, "headers": {"X-Env": "prod", "x-team": "pay"}}),
        (
            "inline",
            {"timeout": 3.0, "concurrency": 9, "rate": None, "headers": {"X-Env": "prod", "X-Team": "platform"}},
        ),
        ("team", {"timeout": 9.0, "concurrency": 4, "rate": 5.0, "headers": {"X-Team": "platform", "x-env": "test"}}),
    ],
)
def test_a_destination_has_what_it_says_and_else_the_defaults(
    name: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    found = load(tmp_path).destinations[name]
    assert {key: getattr(found, key) for key in expected} == {**expected, "headers": tuple(expected["headers"].items())}


@pytest.mark.parametrize(
    ("name", "max_attempts", "max_age"),
    [("plain", 7, 3 * 86400.0), ("own", 2, 3 * 86400.0), ("team", 7, 3600.0)],
)
def test_a_route_has_the_keys_of_its_retry_and_else_the_defaults(
    name: str, max_attempts: int, max_age: float, tmp_path: Path
) -> None:
    retry = load(tmp_path).routes[name].retry
    assert (retry.schedule, retry.max_attempts, retry.max_age) == ((1.0, 2.0), max_attempts, max_age)
    assert retry.results == (("404", "drop"),)


def test_what_a_file_includes_gives_nothing_to_others(tmp_path: Path) -> None:
    rules = load(tmp_path)
    assert rules.destinations["plain"].rate is None


def test_without_defaults_nothing_changes(tmp_path: Path) -> None:
    before = load(tmp_path, root=ROOT.replace("include: teams/*.yaml", ""))
    (tmp_path / "other").mkdir()
    after = load(tmp_path / "other", root=ROOT)
    assert {name: after.routes[name] for name in before.routes} == dict(before.routes)
    assert {name: after.destinations[name] for name in before.destinations} == dict(before.destinations)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (
            "destinations: {d: {url: 'http://127.0.0.1:1/', auth: {bearer: {token: t}}}}\n"  # noqa: ISC004 - one document
            "defaults: {headers: {Authorization: x}}\nroutes: []",
            "expected no Authorization where a destination has `auth`, got 'Authorization' in `defaults`",
        ),
        ("defaults: {timeout: 1h}", "expected a duration from 100ms to 5m, such as 5s, 2m or 1h30m, got '1h'"),
        ("defaults: {timout: 1s}", "unknown key 'timout', did you mean 'timeout'?"),
        ("defaults: {url: 'http://127.0.0.1:1/'}", "unknown key 'url': it belongs under `destinations.NAME`"),
    ],
)
def test_mistakes(root: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text("version: 1\n" + root)
    rules, problems = check_rules(tmp_path / "routes.yaml")
    assert rules is None
    assert [problem.message for problem in problems if problem.severity == "error"] == [message]


def test_a_credential_of_the_defaults_that_is_sent_unencrypted_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text(
        "version: 1\ndefaults: {headers: {X-Api-Key: k}}\nsources: {}\n"
        "destinations: {d: {url: 'http://crm.example/in'}}\nroutes: []"
    )
    _, problems = check_rules(tmp_path / "routes.yaml")
    assert "expected https with `headers.X-Api-Key`, got http: it is sent unencrypted" in [
        problem.message for problem in problems
    ]
